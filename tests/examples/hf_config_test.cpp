// SPDX-License-Identifier: MIT
// config.json: what each field means, and a clear error for what the decoder cannot run.
#include "examples/model_files.hpp"
#include "support/catch.hpp"

#include "llama/hf_config.hpp"

#include <functional>
#include <optional>
#include <variant>

namespace {

using namespace model_files;
using llama::model_config;
using llama::model_error;

model_config read(const json& object) { return llama::read_hf_config(object, "config.json"); }

/// The field that an error names; "" when the configuration is fine.
std::string refused_field(const json& object) {
  try {
    (void)read(object);
    return "";
  } catch (const model_error& error) {
    CHECK(error.file() == "config.json");
    return error.field();
  }
}

json with(const std::string& field, const json& value) {
  json object = config();
  object[field] = value;
  return object;
}

}  // namespace

TEST_CASE("the sizes of a configuration arrive where they belong", "[examples]") {
  const model_config c = read(config());
  CHECK(c.hidden_size == 8);
  CHECK(c.mlp_size == 12);
  CHECK(c.num_layers == 2);
  CHECK(c.num_q_heads == 2);
  CHECK(c.num_kv_heads == 1);
  CHECK(c.head_dim == 4);
  CHECK(c.vocab_size == 16);
  CHECK(c.max_context == 32);
  CHECK(c.norm_eps == 1e-5f);
  CHECK(c.rope.pairing == kvcache::rope_pairing::half);
  CHECK(c.rope.theta == 10000.0);
  CHECK(c.bos_id == std::optional<index_t>(1));
  CHECK(c.stop_ids == std::vector<index_t>{2});
  CHECK_FALSE(c.tied_embeddings);
  CHECK_FALSE(c.attention_bias);
  CHECK(read(with("head_dim", 6)).head_dim == 6);
  CHECK(read(with("head_dim", nullptr)).head_dim == 4);
  CHECK(read(with("num_key_value_heads", nullptr)).num_kv_heads == 2);
  CHECK(read(with("eos_token_id", {2, 5})).stop_ids == std::vector<index_t>{2, 5});
  CHECK(read(with("eos_token_id", nullptr)).stop_ids.empty());
  CHECK_FALSE(read(with("bos_token_id", nullptr)).bos_id.has_value());
}

TEST_CASE("families differ in their biases, norms and windows", "[examples]") {
  CHECK(read(with("attention_bias", true)).attention_bias);
  CHECK(read(with("attention_bias", true)).output_bias);
  json qwen2 = with("model_type", "qwen2");
  qwen2["sliding_window"] = 16;  // set, but not in use
  qwen2["use_sliding_window"] = false;
  CHECK(read(qwen2).attention_bias);
  CHECK_FALSE(read(qwen2).output_bias);
  CHECK(read(qwen2).window == 0);
  qwen2["use_sliding_window"] = true;
  CHECK(refused_field(qwen2) == "use_sliding_window");
  json qwen3 = with("model_type", "qwen3");
  CHECK(read(qwen3).qk_norm);
  CHECK(read(qwen3).head_dim == 128);
  json mistral = with("model_type", "mistral");
  mistral["sliding_window"] = 16;
  CHECK(read(mistral).window == 16);
  mistral["layer_types"] = {"full_attention", "full_attention"};
  CHECK(read(mistral).window == 0);
  mistral["layer_types"] = {"full_attention", "sliding_attention"};
  CHECK(refused_field(mistral) == "layer_types");
  CHECK(refused_field(with("layer_types", {"linear_attention"})) == "layer_types");
}

TEST_CASE("each kind of RoPE scaling is read, old and new way of writing it", "[examples]") {
  const json llama3{{"rope_type", "llama3"},
                    {"factor", 8.0},
                    {"low_freq_factor", 1.0},
                    {"high_freq_factor", 4.0},
                    {"original_max_position_embeddings", 8192}};
  const auto scaling = [](const json& object) { return read(object).rope.scaling; };

  CHECK(std::holds_alternative<std::monostate>(scaling(with("rope_scaling", nullptr))));
  CHECK(std::holds_alternative<std::monostate>(scaling(with("rope_scaling", {{"rope_type", "default"}}))));
  CHECK(std::get<kvcache::rope_scaling_linear>(
            scaling(with("rope_scaling", {{"type", "linear"}, {"factor", 4}})))
            .factor == 4);
  CHECK(std::get<kvcache::rope_scaling_llama3>(scaling(with("rope_scaling", llama3))).original_context ==
        8192);
  const auto yarn = std::get<kvcache::rope_scaling_yarn>(scaling(with(
      "rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 8}})));
  CHECK(yarn.factor == 4);
  CHECK(yarn.original_context == 8);
  CHECK(yarn.beta_fast == 32);
  CHECK(yarn.beta_slow == 1);
  CHECK(yarn.attention_factor == 0);

  json newer = with("rope_parameters", llama3);
  newer.erase("rope_theta");
  newer["rope_parameters"]["rope_theta"] = 500000.0;
  CHECK(read(newer).rope.theta == 500000.0);
  CHECK(std::holds_alternative<kvcache::rope_scaling_llama3>(scaling(newer)));
  CHECK(read(with("rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5e5}})).rope.theta == 5e5);
  CHECK(read(with("rope_parameters", {{"rope_theta", 5e5}})).rope.theta == 5e5);
  CHECK(read(with("partial_rotary_factor", 0.5)).rope.rotary_dim == 2);
  CHECK(
      read(with("rope_parameters", {{"rope_theta", 5e5}, {"partial_rotary_factor", 0.5}})).rope.rotary_dim ==
      2);
}

TEST_CASE("RoPE that cannot be computed is refused", "[examples]") {
  CHECK(refused_field(with("rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}})) == "rope_scaling.type");
  CHECK(refused_field(with("rope_scaling", {{"rope_type", "longrope"}})) == "rope_scaling.rope_type");
  CHECK(refused_field(with("rope_scaling", {{"factor", 2.0}})) == "rope_scaling.type");
  CHECK(refused_field(with("rope_scaling", {{"type", "linear"}})) == "rope_scaling.factor");
  CHECK(refused_field(with("rope_scaling", {{"type", "linear"}, {"factor", 0}})) == "rope_scaling.factor");
  CHECK(refused_field(with("rope_scaling", {{"type", "linear"}, {"factor", "2"}})) == "rope_scaling.factor");
  CHECK(refused_field(with("rope_scaling", "linear")) == "rope_scaling");
  CHECK(refused_field(with("rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}})) ==
        "rope_scaling.low_freq_factor");
  CHECK(refused_field(with("rope_parameters", {{"full_attention", {{"rope_type", "default"}}}})) ==
        "rope_parameters.type");
  CHECK(refused_field(with("rope_theta", 0)) == "rope_theta");
  CHECK(refused_field(with("rope_theta", -1e4)) == "rope_theta");
  CHECK(refused_field(with("partial_rotary_factor", 0.3)) == "partial_rotary_factor");
}

TEST_CASE("sizes that are no integers, negative or absurd are refused by name", "[examples]") {
  for (const char* field : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                            "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim"}) {
    for (const json& value :
         {json(0), json(-8), json(8.0), json(8.5), json("8"), json(true), json(json::array({8})),
          json(UINT64_MAX), json(INT64_MAX), json(INT64_MIN), json(1e30)}) {
      CAPTURE(field, value.dump());
      CHECK(refused_field(with(field, value)) == field);
    }
  }
  for (const char* field : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                            "vocab_size", "max_position_embeddings"}) {
    json object = config();
    object.erase(field);
    CHECK(refused_field(object) == field);
  }
}

TEST_CASE("sizes that do not fit together and settings that do not exist are refused", "[examples]") {
  CHECK(refused_field(with("num_key_value_heads", 3)) == "num_key_value_heads");
  CHECK(refused_field(with("num_attention_heads", 3)) == "num_attention_heads");
  CHECK(refused_field(with("head_dim", 5)) == "head_dim");
  CHECK(refused_field(with("head_dim", 514)) == "head_dim");
  CHECK(refused_field(with("rms_norm_eps", -1e-5)) == "rms_norm_eps");
  CHECK(refused_field(with("rms_norm_eps", "1e-5")) == "rms_norm_eps");
  CHECK(refused_field(with("model_type", "gpt2")) == "model_type");
  CHECK(refused_field(with("model_type", 3)) == "model_type");
  CHECK(refused_field(with("hidden_act", "gelu")) == "hidden_act");
  CHECK(refused_field(with("mlp_bias", true)) == "mlp_bias");
  CHECK(refused_field(with("quantization_config", json::object())) == "quantization_config");
  CHECK(refused_field(with("tie_word_embeddings", 1)) == "tie_word_embeddings");
  CHECK(refused_field(with("attention_bias", "yes")) == "attention_bias");
  CHECK(refused_field(with("bos_token_id", 16)) == "bos_token_id");
  for (const json& value : {json(16), json(-1), json("2"), json{2, 99}, json(2.0), json::object()}) {
    CAPTURE(value.dump());
    CHECK(refused_field(with("eos_token_id", value)) == "eos_token_id");
  }
}

TEST_CASE("a configuration asks for the tensors of its family", "[examples]") {
  const auto load = [](const json& object, const safetensors_parts& parts) {
    const temporary_folder folder;
    folder.write("config.json", object.dump());
    folder.write("model.safetensors", parts.bytes());
    return llama::load_model(folder.path());
  };
  const auto missing = [&](const json& object, const safetensors_parts& parts) -> std::string {
    try {
      (void)load(object, parts);
      return "";
    } catch (const model_error& error) {
      return error.field();
    }
  };
  json qwen3 = with("model_type", "qwen3");
  qwen3["head_dim"] = 4;
  CHECK(load(with("attention_bias", true), parts_of(tensor_list(false, true, true)))
            .weights.layers[1]
            .attention.bo.size() == 8);
  CHECK(load(with("model_type", "qwen2"), parts_of(tensor_list(false, true)))
            .weights.layers[1]
            .attention.bk.size() == 4);
  CHECK(load(qwen3, parts_of(tensor_list(false, false, false, true)))
            .weights.layers[1]
            .attention.k_norm.size() == 4);

  CHECK(missing(with("attention_bias", true), sound_parts()) == "model.layers.0.self_attn.q_proj.bias");
  CHECK(missing(with("model_type", "qwen2"), sound_parts()) == "model.layers.0.self_attn.q_proj.bias");
  CHECK(missing(qwen3, sound_parts()) == "model.layers.0.self_attn.q_norm.weight");
  CHECK(missing(with("num_hidden_layers", 3), sound_parts()) == "model.layers.2.input_layernorm.weight");
  CHECK(missing(with("num_hidden_layers", 1), sound_parts()) == "model.layers.1.input_layernorm.weight");
  CHECK(missing(with("vocab_size", 17), sound_parts()) == "model.embed_tokens.weight");
  CHECK(missing(with("vocab_size", 1 << 24), sound_parts()) == "model.embed_tokens.weight");
  CHECK(missing(with("intermediate_size", 1 << 24), sound_parts()) == "model.layers.0.mlp.gate_proj.weight");
}

TEST_CASE("any changed byte of config.json loads or is refused, and nothing else", "[examples]") {
  const temporary_folder folder;
  folder.write("model.safetensors", sound_parts().bytes());
  const std::string text = config().dump();
  for (const char change : {'\0', '9', '"', '}', '-', '.', '\xff'}) {
    for (std::size_t at = static_cast<unsigned char>(change) % 3; at < text.size(); at += 3) {
      CAPTURE(at, static_cast<int>(change));
      std::string changed = text;
      changed[at] = change;
      folder.write("config.json", changed);
      try {
        (void)llama::load_model(folder.path());
      } catch (const model_error& error) {
        CHECK_FALSE(std::string(error.what()).empty());
      }
    }
  }
}

TEST_CASE("RoPE numbers that are plausible one by one and not together are refused with file and field",
          "[examples]") {
  const auto refusal = [](const json& object) -> std::string {
    try {
      (void)read(object);
    } catch (const llama::model_error& error) {
      return error.what();
    }
    return "";
  };
  const json linear{{"rope_type", "linear"}, {"factor", 0.5}};
  CHECK(refusal(with("rope_scaling", linear)).find("factor") != std::string::npos);
  const json yarn{{"rope_type", "yarn"}, {"factor", 4.0}, {"beta_fast", 1}, {"beta_slow", 2}};
  CHECK(refusal(with("rope_scaling", yarn)).find("beta_fast") != std::string::npos);
  json flat = with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}});
  flat["rope_theta"] = 1.0;
  CHECK(refusal(flat).find("theta") != std::string::npos);
}
