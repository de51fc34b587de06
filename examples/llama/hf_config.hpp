// SPDX-License-Identifier: MIT
// config.json of a Hugging Face folder: what this decoder can run, and a clear error for what it cannot.
#pragma once

#include "llama/json_fields.hpp"
#include "llama/model_config.hpp"

#include <algorithm>
#include <cmath>
#include <string>

namespace llama {

/// The RoPE constants, from `rope_theta` and `rope_scaling` or, in newer files, from `rope_parameters`.
[[nodiscard]] kvcache::rope_config read_rope(const json_fields& config, index_t head_dim,
                                             index_t max_context);

/// The fields of config.json; `file` is named in errors. Families: llama, mistral, qwen2, qwen3 (dense,
/// silu).
[[nodiscard]] model_config read_hf_config(const nlohmann::json& object, const std::filesystem::path& file);

namespace detail {

inline kvcache::rope_scaling_llama3 read_llama3(const json_fields& rope) {
  kvcache::rope_scaling_llama3 scaling{};
  scaling.factor = rope.number("factor", 1, 1e6);
  scaling.low_freq_factor = rope.number("low_freq_factor", 1e-3, 1e6);
  scaling.high_freq_factor = rope.number("high_freq_factor", 1e-3, 1e6);
  scaling.original_context = rope.integer("original_max_position_embeddings", 1, size_limits::context);
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    rope.fail("high_freq_factor", "not greater than low_freq_factor");
  }
  return scaling;
}

inline kvcache::rope_scaling_yarn read_yarn(const json_fields& rope, index_t max_context) {
  kvcache::rope_scaling_yarn scaling{};
  scaling.original_context =
      rope.integer_or("original_max_position_embeddings", max_context, 1, size_limits::context);
  const double extended = static_cast<double>(max_context) / static_cast<double>(scaling.original_context);
  scaling.factor = rope.number_or("factor", std::max(extended, 1.0), 1, 1e6);
  scaling.beta_fast = rope.number_or("beta_fast", 32, 1e-3, 1e6);
  scaling.beta_slow = rope.number_or("beta_slow", 1, 1e-3, 1e6);
  scaling.attention_factor = rope.number_or("attention_factor", 0, 0, 1e6);
  if (scaling.attention_factor == 0 && rope.has("mscale") && rope.has("mscale_all_dim")) {
    const double log_factor = scaling.factor > 1 ? std::log(scaling.factor) : 0.0;
    const auto magnitude = [&](const char* name) {
      return 0.1 * rope.number(name, 0, 1e6) * log_factor + 1.0;
    };
    scaling.attention_factor = magnitude("mscale") / magnitude("mscale_all_dim");
  }
  if (!rope.boolean_or("truncate", true)) rope.fail("truncate", "false is not supported");
  return scaling;
}

}  // namespace detail

inline kvcache::rope_config read_rope(const json_fields& config, index_t head_dim, index_t max_context) {
  const bool newer = config.has("rope_parameters");
  const bool scaled = newer || config.has("rope_scaling");
  const json_fields rope = newer    ? config.object("rope_parameters")
                           : scaled ? config.object("rope_scaling")
                                    : config;
  const json_fields& theta_of = newer && rope.has("rope_theta") ? rope : config;
  const json_fields& partial_of = newer && rope.has("partial_rotary_factor") ? rope : config;

  kvcache::rope_config result{.head_dim = head_dim, .pairing = kvcache::rope_pairing::half};
  result.theta = theta_of.number_or("rope_theta", 10000.0, 1e-3, 1e12);
  const double partial = partial_of.number_or("partial_rotary_factor", 1.0, 0.0, 1.0);
  result.rotary_dim = static_cast<index_t>(static_cast<double>(head_dim) * partial);
  if (result.rotary_dim < 2 || result.rotary_dim % 2 != 0) {
    partial_of.fail("partial_rotary_factor", "rotates " + std::to_string(result.rotary_dim) + " of " +
                                                 std::to_string(head_dim) +
                                                 " dimensions, which must be even");
  }
  if (!scaled) return result;

  const std::string key = rope.has("rope_type") ? "rope_type" : "type";
  if (newer && !rope.has(key)) {
    if (!rope.has("rope_theta")) rope.fail(key, "missing (a table per layer type is not supported)");
    return result;
  }
  const std::string type = rope.text(key);
  if (type == "default") return result;
  if (type == "linear") {
    result.scaling = kvcache::rope_scaling_linear{rope.number("factor", 1, 1e6)};
  } else if (type == "llama3") {
    result.scaling = detail::read_llama3(rope);
  } else if (type == "yarn") {
    result.scaling = detail::read_yarn(rope, max_context);
  } else {
    rope.fail(
        key,
        "\"" + printable(type) + "\" is not supported (linear, llama3 and yarn are)" +
            (type == "dynamic" ? "; its angles change with the length, so stored keys would go stale" : ""));
  }
  try {
    (void)kvcache::rope_table(result);
  } catch (const kvcache::shape_error& error) {  // each number is plausible, together they are not
    rope.fail(key, error.what());
  }
  return result;
}

namespace detail {

inline void read_sizes(const json_fields& config, bool qwen3, model_config& out) {
  constexpr index_t width = size_limits::width;
  out.hidden_size = config.integer("hidden_size", 1, width);
  out.mlp_size = config.integer("intermediate_size", 1, width);
  out.num_layers = config.integer("num_hidden_layers", 1, size_limits::layers);
  out.num_q_heads = config.integer("num_attention_heads", 1, width);
  out.num_kv_heads = config.integer_or("num_key_value_heads", out.num_q_heads, 1, width);
  out.vocab_size = config.integer("vocab_size", 1, width);
  out.max_context = config.integer("max_position_embeddings", 1, size_limits::context);
  if (out.num_q_heads % out.num_kv_heads != 0) {
    config.fail("num_key_value_heads", "does not divide num_attention_heads");
  }
  if (config.has("head_dim") || qwen3) {
    out.head_dim = config.integer_or("head_dim", 128, 2, size_limits::head_dim);
  } else {
    out.head_dim = out.hidden_size / out.num_q_heads;
    if (out.hidden_size % out.num_q_heads != 0)
      config.fail("num_attention_heads", "does not divide hidden_size");
    if (out.head_dim < 2 || out.head_dim > size_limits::head_dim)
      config.fail("head_dim", "is not in 2 to 512");
  }
  if (out.head_dim % 2 != 0) config.fail("head_dim", "is odd, so RoPE cannot pair its dimensions");
}

/// The window of `sliding_window`: mistral sets it for all layers, the qwens only when they say so.
inline index_t read_window(const json_fields& config, bool mistral) {
  if (config.boolean_or("use_sliding_window", false))
    config.fail("use_sliding_window", "true is not supported");
  if (config.has("layer_types")) {
    const auto& types = config.array("layer_types");
    if (!types.empty() && types.front() == "full_attention") mistral = false;
    for (const auto& type : types) {
      if (type != types.front()) config.fail("layer_types", "layers of different types are not supported");
      if (type != "full_attention" && !(mistral && type == "sliding_attention")) {
        config.fail("layer_types", "only full_attention is supported");
      }
    }
  }
  return mistral ? config.integer_or("sliding_window", 0, 1, size_limits::context) : 0;
}

/// `eos_token_id` is one id or a list of them.
inline std::vector<index_t> read_stop_ids(const json_fields& config, const nlohmann::json& object,
                                          index_t vocab_size) {
  std::vector<index_t> ids;
  if (!config.has("eos_token_id")) return ids;
  const auto& field = object.at("eos_token_id");
  for (const auto& value : field.is_array() ? field : nlohmann::json::array({field})) {
    const auto id = as_index(value);
    if (!id || *id < 0 || *id >= vocab_size) config.fail("eos_token_id", "not a token of the vocabulary");
    ids.push_back(*id);
  }
  return ids;
}

}  // namespace detail

inline model_config read_hf_config(const nlohmann::json& object, const std::filesystem::path& file) {
  const json_fields config(object, file);
  const std::string family = config.text_or("model_type", "llama");
  const bool mistral = family == "mistral", qwen2 = family == "qwen2", qwen3 = family == "qwen3";
  if (family != "llama" && !mistral && !qwen2 && !qwen3) {
    config.fail("model_type",
                "\"" + printable(family) + "\" is not supported (llama, mistral, qwen2, qwen3 are)");
  }
  if (const auto act = config.text_or("hidden_act", "silu"); act != "silu") {
    config.fail("hidden_act", "\"" + printable(act) + "\" is not supported (silu is)");
  }
  if (config.boolean_or("mlp_bias", false)) config.fail("mlp_bias", "true is not supported");
  if (config.has("quantization_config"))
    config.fail("quantization_config", "quantized weights are not supported");

  model_config out;
  detail::read_sizes(config, qwen3, out);
  out.norm_eps = static_cast<float>(config.number_or("rms_norm_eps", 1e-6, 0.0, 1.0));
  out.rope = read_rope(config, out.head_dim, out.max_context);
  out.window = detail::read_window(config, mistral);
  out.tied_embeddings = config.boolean_or("tie_word_embeddings", false);
  out.attention_bias = qwen2 || config.boolean_or("attention_bias", false);
  out.output_bias = !qwen2 && out.attention_bias;
  out.qk_norm = qwen3;
  if (const index_t bos = config.integer_or("bos_token_id", -1, 0, out.vocab_size - 1); bos >= 0)
    out.bos_id = bos;
  out.stop_ids = detail::read_stop_ids(config, object, out.vocab_size);
  return out;
}

}  // namespace llama
