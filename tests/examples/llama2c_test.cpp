// SPDX-License-Identifier: MIT
// llama2.c checkpoints and tokenizers: sound ones load, broken ones say which file and field is wrong.
#include "examples/allocation_watch.hpp"
#include "examples/model_files.hpp"
#include "support/catch.hpp"

#include "llama/decoder.hpp"
#include "llama/tokenizer.hpp"

#include <optional>

namespace {

using namespace model_files;
using llama::bpe_tokenizer;
using llama::matrix;
using llama::model_error;

/// The error of loading a checkpoint of these bytes, or nothing if it loads.
std::optional<model_error> error_of(std::string_view bytes) {
  const temporary_folder folder;
  try {
    (void)llama::load_model(folder.write("model.bin", bytes));
    return std::nullopt;
  } catch (const model_error& error) {
    CHECK(error.file().filename() == "model.bin");
    return error;
  }
}

std::string refused_field(std::string_view bytes) {
  const auto error = error_of(bytes);
  return error ? error->field() : "none";
}

/// A sound checkpoint whose header field `index` says something else.
std::string with_field(std::size_t index, std::int32_t value) {
  std::string field, bytes = llama2c_bytes();
  put(field, static_cast<std::uint32_t>(value));
  return bytes.replace(4 * index, 4, field);
}

std::optional<model_error> tokenizer_error(std::string_view bytes, index_t vocab_size) {
  const temporary_folder folder;
  try {
    (void)bpe_tokenizer(folder.write("tok.bin", bytes), vocab_size);
    return std::nullopt;
  } catch (const model_error& error) {
    CHECK(error.file().filename() == "tok.bin");
    return error;
  }
}

constexpr index_t num_bytes_tokens = 259;

}  // namespace

TEST_CASE("a sound checkpoint loads, with its own output matrix or without", "[examples]") {
  const temporary_folder folder;
  const auto tied = llama::load_model(folder.write("tied.bin", llama2c_bytes()));
  CHECK(tied.config.hidden_size == 8);
  CHECK(tied.config.mlp_size == 12);
  CHECK(tied.config.num_layers == 2);
  CHECK(tied.config.num_q_heads == 2);
  CHECK(tied.config.num_kv_heads == 1);
  CHECK(tied.config.head_dim == 4);
  CHECK(tied.config.vocab_size == 16);
  CHECK(tied.config.max_context == 32);
  CHECK(tied.config.rope.pairing == kvcache::rope_pairing::interleaved);
  CHECK(tied.config.tied_embeddings);
  CHECK(tied.weights.output.size() == 0);

  const auto untied = llama::load_model(folder.write("untied.bin", llama2c_bytes({8, 12, 2, 2, 1, -16, 32})));
  CHECK(untied.config.vocab_size == 16);
  CHECK_FALSE(untied.config.tied_embeddings);
  CHECK(untied.weights.output.rows() == 16);
  CHECK(untied.weights.output(0, 0) == weight(12));  // thirteenth array of the file

  const std::vector<index_t> tokens{1, 4, 7};
  CHECK(llama::decoder(tied).recompute(tokens, 3).allFinite());
  CHECK(llama::decoder(untied).recompute(tokens, 3).allFinite());
}

TEST_CASE("a checkpoint cut off anywhere, or with bytes to spare, is refused", "[examples]") {
  const std::string whole = llama2c_bytes();
  for (std::size_t length = 0; length < whole.size(); length += length < 200 ? 1 : 37) {
    CAPTURE(length);
    CHECK(refused_field(std::string_view(whole).substr(0, length)) == "header");
  }
  CHECK(refused_field(whole + "x") == "header");
  CHECK(refused_field(whole + whole) == "header");
  CHECK(refused_field(whole) == "none");
}

TEST_CASE("every header field is checked by name, before anything is allocated for it", "[examples]") {
  const std::vector<std::string> names{"dim",        "hidden_dim", "n_layers", "n_heads",
                                       "n_kv_heads", "vocab_size", "seq_len"};
  const std::size_t file_bytes = llama2c_bytes().size();
  for (std::size_t field = 0; field < names.size(); ++field) {
    for (const std::int32_t value :
         {0, -1, -16, 1, 2, 3, 5, 7, 9, 15, 17, 1 << 10, 1 << 16, 1 << 24, INT32_MAX, INT32_MIN}) {
      CAPTURE(names[field], value);
      const std::string bytes = with_field(field, value);
      if (bytes == llama2c_bytes()) continue;
      const allocation_watch watch;
      const auto error = error_of(bytes);
      CHECK(watch.largest() <= 64 * 1024 + file_bytes);
      // Other heads of the same sum of sizes are another model that fits the file.
      if (!error) {
        CHECK((names[field] == "n_heads" || names[field] == "n_kv_heads"));
      } else if (value <= 0 && names[field] != "vocab_size") {
        CHECK(error->field() == names[field]);
      }
    }
  }
  CHECK(refused_field(with_field(5, 0)) == "vocab_size");
  CHECK(refused_field(with_field(3, 3)) == "n_heads");
  CHECK(refused_field(with_field(4, 3)) == "n_kv_heads");
  CHECK(refused_field(with_field(3, 8)) == "n_heads");  // heads of one dimension cannot be rotated
  CHECK(refused_field(with_field(1, 1 << 24)) == "header");
  CHECK(refused_field(with_field(6, 1 << 24)) == "header");
  CHECK(refused_field(with_field(0, 0x616b3432)) == "magic");
}

TEST_CASE("any byte of a header may change without harm", "[examples]") {
  const std::string sound = llama2c_bytes();
  for (std::size_t at = 0; at < 28; ++at) {
    for (int value = 0; value < 256; value += 5) {
      std::string changed = sound;
      changed[at] = static_cast<char>(value);
      (void)error_of(changed);
    }
  }
}

TEST_CASE("a checkpoint with weights that are no numbers names the array", "[examples]") {
  std::string bytes = llama2c_bytes(), bad;
  put_float(bad, std::numeric_limits<float>::infinity());
  const std::size_t embedding = 28, norms = embedding + 4 * 16 * 8, wq = norms + 4 * 2 * 8;
  CHECK(refused_field(std::string(bytes).replace(embedding + 40, 4, bad)) == "token_embedding_table");
  CHECK(refused_field(std::string(bytes).replace(norms, 4, bad)) == "rms_att_weight");
  CHECK(refused_field(std::string(bytes).replace(wq + 4, 4, bad)) == "wq");
}

TEST_CASE("a tokenizer cut off anywhere, or with bytes to spare, is refused", "[examples]") {
  const std::string whole = tokenizer_bytes(byte_tokens());
  for (std::size_t length = 0; length < whole.size(); length += length < 300 ? 1 : 13) {
    CAPTURE(length);
    CHECK(tokenizer_error(std::string_view(whole).substr(0, length), num_bytes_tokens));
  }
  CHECK(tokenizer_error(whole + "x", num_bytes_tokens)->field() == "tokens");
  CHECK(tokenizer_error(whole, num_bytes_tokens + 1));
  CHECK(tokenizer_error(whole, num_bytes_tokens - 1));
  CHECK(tokenizer_error(whole, index_t{1} << 24)->field() == "tokens");
  CHECK_FALSE(tokenizer_error(whole, num_bytes_tokens));
}

TEST_CASE("a tokenizer with a bad length, score or byte token names the token", "[examples]") {
  const std::string whole = tokenizer_bytes(byte_tokens());
  const auto changed = [&](std::size_t at, std::uint32_t value) {
    std::string field;
    put(field, value);
    return std::string(whole).replace(at, 4, field);
  };
  for (const std::uint32_t length : {9U, 6000U, 0x7fffffffU, 0x80000000U, 0xffffffffU}) {
    CAPTURE(length);
    const allocation_watch watch;
    CHECK(tokenizer_error(changed(8, length), num_bytes_tokens)->field() == "token 0");
    CHECK(watch.largest() < 64 * 1024);
  }
  const std::string huge = changed(0, 0xffffffffU);  // max_token_length
  CHECK_FALSE(tokenizer_error(huge, num_bytes_tokens));
  CHECK(tokenizer_error(changed(4, 0x7fc00000U), num_bytes_tokens)->field() == "token 0");
  auto list = byte_tokens();
  std::swap(list[70], list[71]);
  CHECK(tokenizer_error(tokenizer_bytes(list), num_bytes_tokens)->field() == "token 70");
}
