// SPDX-License-Identifier: MIT
// What a plan has to know of a Hugging Face config.json: fewer fields than the decoder needs, so of many more models.
#pragma once

#include "llama/input_file.hpp"
#include "llama/json_fields.hpp"
#include "llama/model_error.hpp"

#include <kvcache/core/types.hpp>
#include <kvcache/serving/planner.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

namespace planning {

using kvcache::index_t;
using kvcache::serving::model_shape;

/// Where the bytes of the weights were learned from.
enum class weight_source { given, files, estimate, unknown };

struct hf_model {
  model_shape shape;  // weight_bytes 0 where they are not known
  weight_source weights = weight_source::unknown;
};

namespace detail {

inline constexpr index_t most = index_t{1} << 24;  // of any size: products of two stay far from overflow

/// Bytes of one weight, or nothing for a type that has no whole number of them.
inline std::optional<index_t> element_bytes(std::string_view type) {
  if (type == "float32") return 4;
  if (type == "float16" || type == "bfloat16") return 2;
  return std::nullopt;
}

/// The weights of a plain decoder with gated MLPs; nothing for all others.
inline std::optional<index_t> estimated_weights(const llama::json_fields& config, const model_shape& shape) {
  for (const char* name : {"num_experts", "num_local_experts", "n_routed_experts", "quantization_config"}) {
    if (config.has(name)) return std::nullopt;
  }
  for (const char* name : {"hidden_size", "intermediate_size", "vocab_size"}) {
    if (!config.has(name)) return std::nullopt;
  }
  const char* type_name = config.has("torch_dtype") ? "torch_dtype" : "dtype";
  if (!config.has(type_name)) return std::nullopt;
  const auto bytes = element_bytes(config.text(type_name));
  if (!bytes) return std::nullopt;
  const index_t hidden = config.integer("hidden_size", 1, most);
  const index_t mlp = config.integer("intermediate_size", 1, most);
  const index_t vocabulary = config.integer("vocab_size", 1, most);
  const index_t heads = kvcache::checked_mul(2, shape.num_q_heads + shape.num_kv_heads, shape.head_dim);
  const index_t layer = kvcache::checked_mul(hidden, kvcache::checked_add(heads, 3 * mlp));
  const index_t tables = (config.boolean_or("tie_word_embeddings", false) ? 1 : 2) * vocabulary * hidden;
  return kvcache::checked_mul(kvcache::checked_add(kvcache::checked_mul(layer, shape.num_layers), tables),
                              *bytes);
}

/// The bytes of all *.safetensors in a folder; nothing where there are none.
inline std::optional<index_t> weight_files(const std::filesystem::path& folder) {
  index_t total = 0;
  std::error_code error;
  for (std::filesystem::directory_iterator file(folder, error), end; !error && file != end;
       file.increment(error)) {
    if (file->path().extension() != ".safetensors") continue;
    const auto bytes = file->file_size(error);
    if (error) return std::nullopt;
    total += static_cast<index_t>(bytes);
  }
  return total > 0 ? std::optional(total) : std::nullopt;
}

}  // namespace detail

/// The fields of config.json, or of its `text_config` where the model reads more than text.
/// Throws llama::model_error naming the field.
[[nodiscard]] inline hf_model read_hf_shape(const nlohmann::json& object, const std::filesystem::path& file) {
  const llama::json_fields whole(object, file);
  const bool nested = !whole.has("num_hidden_layers") && whole.has("text_config");
  const llama::json_fields config = nested ? whole.object("text_config") : whole;
  if (config.has("kv_lora_rank"))
    config.fail("kv_lora_rank",
                "latent attention stores no keys and values per head; this library does not hold it");

  hf_model out;
  model_shape& shape = out.shape;
  shape.num_layers = config.integer("num_hidden_layers", 1, detail::most);
  shape.num_q_heads = config.integer("num_attention_heads", 1, detail::most);
  shape.num_kv_heads = config.integer_or("num_key_value_heads", shape.num_q_heads, 1, detail::most);
  if (shape.num_q_heads % shape.num_kv_heads != 0)
    config.fail("num_key_value_heads", "does not divide num_attention_heads");
  if (config.has("head_dim")) {
    shape.head_dim = config.integer("head_dim", 1, kvcache::max_head_dim);
  } else if (config.text_or("model_type", "").starts_with("qwen3")) {
    shape.head_dim = 128;  // what those models take where nothing is said
  } else {
    const index_t hidden = config.integer("hidden_size", 1, detail::most);
    if (hidden % shape.num_q_heads != 0) config.fail("num_attention_heads", "does not divide hidden_size");
    shape.head_dim = hidden / shape.num_q_heads;
    if (shape.head_dim > kvcache::max_head_dim) config.fail("head_dim", "is more than 512");
  }
  shape.max_context = config.integer_or("max_position_embeddings", 0, 1, index_t{1} << 40);
  try {
    if (const auto bytes = detail::estimated_weights(config, shape)) {
      shape.weight_bytes = *bytes;
      out.weights = weight_source::estimate;
    }
  } catch (const kvcache::shape_error&) {
    config.fail("num_hidden_layers", "so many weights that their bytes overflow");
  }
  return out;
}

/// A config.json, or the folder that holds one; the weights are those of the *.safetensors beside it, if there are any.
/// Throws llama::model_error.
[[nodiscard]] inline hf_model read_hf_shape(std::filesystem::path path) {
  std::error_code unreadable;  // then the file says what is wrong
  if (std::filesystem::is_directory(path, unreadable)) path /= "config.json";
  llama::input_file file(path);
  constexpr std::uint64_t most_bytes = 16 << 20;
  if (file.size() > most_bytes) file.fail("", "is no config.json: more than 16 MiB");
  hf_model model =
      read_hf_shape(llama::parse_json_object(file.read_text(0, file.size(), ""), path, ""), path);
  const auto folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  if (const auto bytes = detail::weight_files(folder)) {
    model.shape.weight_bytes = *bytes;
    model.weights = weight_source::files;
  }
  return model;
}

}  // namespace planning
