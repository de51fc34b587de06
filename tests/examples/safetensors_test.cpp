// SPDX-License-Identifier: MIT
// Safetensors files and folders around them: sound ones load, broken ones say which file and field is wrong.
#include "examples/allocation_watch.hpp"
#include "examples/model_files.hpp"
#include "support/catch.hpp"

#include "llama/decoder.hpp"

#include <optional>

namespace {

using namespace model_files;
using llama::load_model;
using llama::matrix;
using llama::model_error;

/// A folder with the sound configuration and these weights.
struct model_folder : temporary_folder {
  explicit model_folder(std::string_view weights = sound_parts().bytes(),
                        const json& configuration = config()) {
    write("config.json", configuration.dump());
    write("model.safetensors", weights);
  }
};

/// The error of loading, or nothing if it loads. Anything but a model_error ends the test.
std::optional<model_error> error_of(const std::filesystem::path& path) {
  try {
    (void)load_model(path);
    return std::nullopt;
  } catch (const model_error& error) {
    return error;
  }
}

/// Checks that a folder is refused because of `field` of `file`.
void require_refused(const std::filesystem::path& folder, const std::string& file, const std::string& field) {
  CAPTURE(file, field);
  const auto error = error_of(folder);
  REQUIRE(error);
  CAPTURE(error->what());
  CHECK(error->file().filename() == file);
  CHECK(error->field() == field);
}

void require_weights_refused(const std::string& weights, const std::string& field) {
  require_refused(model_folder(weights).path(), "model.safetensors", field);
}

matrix logits_of(const std::filesystem::path& path) {
  const std::vector<index_t> tokens{1, 5, 9, 3, 15, 0};
  return llama::decoder(load_model(path)).recompute(tokens, 6);
}

}  // namespace

TEST_CASE("a sound folder loads in every element type to the same model", "[examples]") {
  const matrix exact = logits_of(model_folder().path());
  REQUIRE(exact.allFinite());
  CHECK(logits_of(model_folder(sound_parts("F16").bytes()).path()) == exact);
  CHECK(logits_of(model_folder(sound_parts("BF16").bytes()).path()) == exact);
}

TEST_CASE("tied embeddings are the output matrix, with or without a copy of it in the file", "[examples]") {
  json tied = config();
  tied["tie_word_embeddings"] = true;
  const matrix without = logits_of(model_folder(parts_of(tensor_list(true)).bytes(), tied).path());
  CHECK(logits_of(model_folder(sound_parts().bytes(), tied).path()) == without);
  require_refused(model_folder(parts_of(tensor_list(true)).bytes()).path(), "model.safetensors",
                  "lm_head.weight");
}

TEST_CASE("shards listed by an index are one model", "[examples]") {
  const matrix whole = logits_of(model_folder().path());
  temporary_folder folder;
  folder.write("config.json", config().dump());
  safetensors_parts first, second;
  json map = json::object();
  index_t seed = 0;
  for (const auto& [name, shape] : tensor_list()) {
    const bool in_first = seed % 3 == 0;
    (in_first ? first : second).add(name, shape, "F32", seed++);
    map[name] = in_first ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
  }
  folder.write("model-00001-of-00002.safetensors", first.bytes());
  folder.write("model-00002-of-00002.safetensors", second.bytes());
  const std::string index = "model.safetensors.index.json";
  const auto write_index = [&](const json& weight_map) {
    folder.write(index, json{{"weight_map", weight_map}}.dump());
  };
  write_index(map);
  CHECK(logits_of(folder.path()) == whole);

  SECTION("a tensor that no shard has") {
    map["model.norm.weight"] = map["model.norm.weight"] == "model-00001-of-00002.safetensors"
                                   ? "model-00002-of-00002.safetensors"
                                   : "model-00001-of-00002.safetensors";
    write_index(map);
    const auto error = error_of(folder.path());
    REQUIRE(error);
    CHECK(error->field() == "model.norm.weight");
  }
  SECTION("a tensor the index leaves out") {
    map.erase("model.norm.weight");
    write_index(map);
    require_refused(folder.path(), index, "model.norm.weight");
  }
  SECTION("a shard that is not there") {
    std::filesystem::remove(folder.path() / "model-00002-of-00002.safetensors");
    require_refused(folder.path(), "model-00002-of-00002.safetensors", "");
  }
  SECTION("a shard outside the folder") {
    const std::string name = GENERATE("../x.safetensors", "/etc/passwd", "a\\b", "..", ".", "");
    map["model.norm.weight"] = name;
    write_index(map);
    require_refused(folder.path(), index, "weight_map.model.norm.weight");
  }
  SECTION("a shard that is a number") {
    map["model.norm.weight"] = 1;
    write_index(map);
    require_refused(folder.path(), index, "weight_map.model.norm.weight");
  }
  SECTION("an index that is no index") {
    folder.write(index, GENERATE("", "[]", "{}", "{\"weight_map\": []}", "{\"weight_map\": {}", "null"));
    const auto error = error_of(folder.path());
    REQUIRE(error);
    CHECK(error->file().filename() == index);
  }
}

TEST_CASE("a folder that lacks a file names it", "[examples]") {
  temporary_folder folder;
  require_refused(folder.path(), "config.json", "");
  folder.write("config.json", config().dump());
  require_refused(folder.path(), "model.safetensors", "");
  CHECK(error_of(folder.path() / "nowhere")->file().filename() == "nowhere");
  std::filesystem::create_directory(folder.path() / "model.safetensors");
  require_refused(folder.path(), "model.safetensors", "");
}

TEST_CASE("a safetensors file cut off anywhere is refused", "[examples]") {
  const std::string whole = sound_parts("F16").bytes();
  temporary_folder folder;
  folder.write("config.json", config().dump());
  for (std::size_t length = 0; length < whole.size(); length += length < 64 ? 1 : 29) {
    CAPTURE(length);
    folder.write("model.safetensors", std::string_view(whole).substr(0, length));
    const auto error = error_of(folder.path());
    REQUIRE(error);
    REQUIRE(error->file().filename() == "model.safetensors");
  }
}

TEST_CASE("any changed byte of a header loads or is refused, and nothing else", "[examples]") {
  const auto parts = sound_parts("BF16");
  const std::string header = parts.header.dump();
  temporary_folder folder;
  folder.write("config.json", config().dump());
  for (const char change : {'\0', '9', '"', '{', '-', '\xff'}) {
    for (std::size_t at = static_cast<unsigned char>(change) % 7; at < header.size(); at += 11) {
      CAPTURE(at, static_cast<int>(change));
      std::string changed = header;
      changed[at] = change;
      folder.write("model.safetensors", parts.bytes_with(changed));
      (void)error_of(folder.path());
    }
  }
}

TEST_CASE("absurd header lengths allocate nothing", "[examples]") {
  const std::string sound = sound_parts().bytes();
  for (const std::uint64_t length :
       {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{7}, sound.size() - 8, sound.size() - 7,
        sound.size(), std::uint64_t{99'999'999}, std::uint64_t{100'000'001}, std::uint64_t{1} << 32,
        std::uint64_t{1} << 62, ~std::uint64_t{0} - 7, ~std::uint64_t{0}}) {
    CAPTURE(length);
    std::string bytes;
    put(bytes, length);
    const model_folder folder(bytes + sound.substr(8));
    const allocation_watch watch;
    const auto error = error_of(folder.path());
    REQUIRE(error);
    CAPTURE(error->what());
    CHECK(error->file().filename() == "model.safetensors");
    CHECK((error->field() == "header" || error->field() == "header length"));
    CHECK(watch.largest() <= 2 * sound.size());
  }
}

TEST_CASE("a header that is not an object of tensors is refused", "[examples]") {
  const auto parts = sound_parts();
  for (const std::string header : {"", "null", "7", "[]", "\"text\"", "{", "{}}", "{\"a\"}", "{\"a\": 1e999}",
                                   "\xff\xfe{}", "{} trailing"}) {
    CAPTURE(header);
    require_weights_refused(parts.bytes_with(header), "header");
  }
  require_weights_refused(parts.bytes_with("{\"a\": " + std::string(100, '[') + std::string(100, ']') + "}"),
                          "header");
  require_weights_refused(parts.bytes_with(std::string(50000, '[')), "header");
  require_weights_refused(parts.bytes_with("{\"a\": 1}"), "a");
  require_weights_refused(parts.bytes_with("{\"__metadata__\": 1}"), "__metadata__");
  require_weights_refused(parts.bytes_with("{}"), "data");
}

TEST_CASE("a key that appears twice is refused", "[examples]") {
  const auto parts = sound_parts();
  std::string header = parts.header.dump();
  const std::string entry = "\"model.norm.weight\":" + parts.header["model.norm.weight"].dump();
  header.insert(1, entry + ",");
  require_weights_refused(parts.bytes_with(header), "model.norm.weight");

  const std::string text = config().dump();
  const model_folder folder;
  folder.write("config.json", text.substr(0, text.size() - 1) + ",\"vocab_size\":16}");
  require_refused(folder.path(), "config.json", "vocab_size");
}

TEST_CASE("an entry with a wrong type, shape or place names the tensor", "[examples]") {
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const auto sound = sound_parts();
  const auto refuse = [&](const char* field, const json& value, const std::string& named) {
    CAPTURE(field, value.dump());
    auto parts = sound;
    if (value.is_null()) {
      parts.header[name].erase(field);
    } else {
      parts.header[name][field] = value;
    }
    const model_folder folder(parts.bytes());
    const allocation_watch watch;
    require_refused(folder.path(), "model.safetensors", named);
    CHECK(watch.largest() <= 4 * parts.bytes().size());
  };
  const index_t begin = sound.header[name]["data_offsets"][0], end = sound.header[name]["data_offsets"][1];
  const auto size = static_cast<index_t>(sound.data.size());

  for (const json& value : {json("F99"), json(""), json(4), json(std::string(5000, 'x')), json()}) {
    refuse("dtype", value, name + ".dtype");
  }
  refuse("dtype", "F16", name + ".data_offsets");  // half as many bytes
  refuse("dtype", "I32", name);                    // right size, cannot be a weight
  for (const json& value : {json(), json(12), json("12, 8"), json::object()})
    refuse("shape", value, name + ".shape");
  for (const json& value :
       {json{12, -8}, json{12, 8.0}, json{12, "8"}, json{12, nullptr}, json{12, UINT64_MAX}}) {
    refuse("shape", value, name + ".shape");
  }
  refuse("shape", json::array(), name + ".data_offsets");
  refuse("shape", json{12, 9}, name + ".data_offsets");
  refuse("shape", json{index_t{1} << 32, index_t{1} << 32, 96}, name + ".data_offsets");  // wraps to 0
  refuse("shape", json{INT64_MAX, 2}, name + ".data_offsets");
  refuse("shape", json{8, 12}, name);  // as many bytes, another shape
  refuse("shape", json{96}, name);
  refuse("shape", json{1, 12, 8}, name);
  for (const json& value :
       {json(), json(begin), json{begin}, json{begin, end, end}, json{end, begin}, json{-4, end},
        json{begin, "x"}, json{0.5, end}, json{begin, size + 4}, json{UINT64_MAX - 3, UINT64_MAX},
        json{INT64_MAX - 3, INT64_MAX}, json{begin, end - 4}, json{begin, INT64_MAX}}) {
    refuse("data_offsets", value, name + ".data_offsets");
  }
}

TEST_CASE("overlapping tensors, holes and spare bytes are refused", "[examples]") {
  const auto sound = sound_parts();
  const auto moved = [&](const std::string& name, index_t by) {
    auto parts = sound;
    auto& offsets = parts.header[name]["data_offsets"];
    offsets = {offsets[0].get<index_t>() + by, offsets[1].get<index_t>() + by};
    return parts.bytes();
  };
  CHECK(error_of(model_folder(moved("model.layers.0.mlp.up_proj.weight", -4)).path()));
  require_weights_refused(moved("model.layers.0.mlp.up_proj.weight", -4),
                          "model.layers.0.mlp.up_proj.weight");
  require_weights_refused(moved("model.embed_tokens.weight", 4), "model.embed_tokens.weight");
  CHECK(error_of(model_folder(moved("model.norm.weight", -32)).path()));  // exactly upon another one

  auto hole = sound;
  hole.header.erase("model.norm.weight");
  require_weights_refused(hole.bytes(), "lm_head.weight");
  auto spare = sound;
  spare.data += "four";
  require_weights_refused(spare.bytes(), "data");
  auto short_of = sound;
  short_of.data.resize(short_of.data.size() - 4);
  require_weights_refused(short_of.bytes(), "lm_head.weight.data_offsets");
}

TEST_CASE("missing and unknown tensors are named", "[examples]") {
  for (const auto& [name, shape] : tensor_list()) {
    safetensors_parts parts;
    for (const auto& [other, other_shape] : tensor_list()) {
      if (other != name) parts.add(other, other_shape, "F32", 0);
    }
    require_weights_refused(parts.bytes(), name);
  }
  auto extra = sound_parts();
  extra.add("model.layers.0.self_attn.q_proj.bias", {8}, "F32", 0);
  require_weights_refused(extra.bytes(), "model.layers.0.self_attn.q_proj.bias");
  auto harmless = sound_parts();
  harmless.add("model.layers.0.self_attn.rotary_emb.inv_freq", {2}, "F32", 0);
  harmless.header["__metadata__"] = {{"format", "pt"}};
  CHECK_FALSE(error_of(model_folder(harmless.bytes()).path()));
}

TEST_CASE("weights that are no numbers are refused", "[examples]") {
  for (const std::string dtype : {"F32", "F16", "BF16"}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      auto parts = sound_parts(dtype);
      const auto at = parts.header["model.norm.weight"]["data_offsets"][0].get<std::size_t>();
      const std::string bytes = encoded(dtype, bad);
      parts.data.replace(at, bytes.size(), bytes);
      require_weights_refused(parts.bytes(), "model.norm.weight");
    }
  }
}
