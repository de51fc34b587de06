// SPDX-License-Identifier: MIT
// A Hugging Face folder: config.json, and model.safetensors or the shards of model.safetensors.index.json.
#pragma once

#include "llama/hf_config.hpp"
#include "llama/safetensors.hpp"
#include "llama/weights.hpp"

#include <array>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <system_error>
#include <vector>

namespace llama {

/// The tensors of a folder by name, whichever file each is in.
class hf_tensors {
 public:
  explicit hf_tensors(const std::filesystem::path& folder);

  /// A tensor as a matrix or vector. Checks shape and type against the file before it allocates.
  [[nodiscard]] matrix load_matrix(const std::string& name, index_t rows, index_t cols);
  [[nodiscard]] Eigen::VectorXf load_vector(const std::string& name, index_t size);

  /// Throws for a tensor nobody asked for: a model that has one computes something this decoder does not.
  void require_all_used(bool tied_embeddings) const;

 private:
  void open_shards(const std::filesystem::path& index);
  safetensors_file& file_of(const std::string& name);

  std::filesystem::path listed_in_;  // the file that should have named a missing tensor
  std::vector<safetensors_file> files_;
  std::map<std::string, std::size_t> file_of_;  // tensor name -> index in files_
  std::set<std::string> used_;
};

inline hf_tensors::hf_tensors(const std::filesystem::path& folder) {
  const auto single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
  std::error_code unreadable;  // then opening the single file says what is wrong
  if (!std::filesystem::exists(single, unreadable) && std::filesystem::exists(index, unreadable)) {
    open_shards(index);
    return;
  }
  listed_in_ = single;
  files_.emplace_back(single);
  for (const auto& [name, info] : files_[0].tensors()) file_of_.emplace(name, 0);
}

inline void hf_tensors::open_shards(const std::filesystem::path& index) {
  constexpr std::uint64_t max_index = 100'000'000;  // bytes
  listed_in_ = index;
  input_file file(index);
  if (file.size() > max_index) file.fail("", "too large for an index");
  const auto parsed = parse_json_object(file.read_text(0, file.size(), ""), index, "");
  const auto map = json_fields(parsed, index).object("weight_map");
  std::map<std::string, std::size_t> opened;  // shard file name -> index in files_
  for (const auto& [name, value] : parsed.at("weight_map").items()) {
    const std::string shard = map.text(name);
    // A name only: a shard is never looked for outside the folder.
    if (shard.empty() || shard == "." || shard == ".." || shard.find_first_of("/\\") != std::string::npos ||
        shard.find('\0') != std::string::npos) {
      map.fail(name, "\"" + printable(shard) + "\" is not the name of a file in this folder");
    }
    const auto [entry, is_new] = opened.emplace(shard, files_.size());
    if (is_new) files_.emplace_back(index.parent_path() / shard);
    file_of_.emplace(name, entry->second);
  }
}

inline safetensors_file& hf_tensors::file_of(const std::string& name) {
  const auto found = file_of_.find(name);
  if (found == file_of_.end()) throw model_error(listed_in_, name, "missing tensor");
  used_.insert(name);
  return files_[found->second];
}

inline matrix hf_tensors::load_matrix(const std::string& name, index_t rows, index_t cols) {
  safetensors_file& file = file_of(name);
  file.require(name, std::array{rows, cols});
  matrix out(rows, cols);
  file.read(name, {out.data(), static_cast<std::size_t>(out.size())});
  return out;
}

inline Eigen::VectorXf hf_tensors::load_vector(const std::string& name, index_t size) {
  safetensors_file& file = file_of(name);
  file.require(name, std::array{size});
  Eigen::VectorXf out(size);
  file.read(name, {out.data(), static_cast<std::size_t>(out.size())});
  return out;
}

inline void hf_tensors::require_all_used(bool tied_embeddings) const {
  for (const auto& [name, file] : file_of_) {
    const bool redundant =
        name.ends_with("rotary_emb.inv_freq") || (tied_embeddings && name == "lm_head.weight");
    if (!redundant && !used_.contains(name)) {
      throw model_error(files_[file].path(), name, "unexpected tensor, which this decoder would ignore");
    }
  }
}

namespace detail {

inline kvcache::attention_weights load_attention(hf_tensors& tensors, const model_config& c,
                                                 const std::string& at) {
  const index_t q_size = c.num_q_heads * c.head_dim, kv_size = c.num_kv_heads * c.head_dim;
  kvcache::attention_weights w{};
  w.wq = tensors.load_matrix(at + "q_proj.weight", q_size, c.hidden_size);
  w.wk = tensors.load_matrix(at + "k_proj.weight", kv_size, c.hidden_size);
  w.wv = tensors.load_matrix(at + "v_proj.weight", kv_size, c.hidden_size);
  w.wo = tensors.load_matrix(at + "o_proj.weight", c.hidden_size, q_size);
  if (c.attention_bias) {
    w.bq = tensors.load_vector(at + "q_proj.bias", q_size);
    w.bk = tensors.load_vector(at + "k_proj.bias", kv_size);
    w.bv = tensors.load_vector(at + "v_proj.bias", kv_size);
  }
  if (c.output_bias) w.bo = tensors.load_vector(at + "o_proj.bias", c.hidden_size);
  if (c.qk_norm) {
    w.q_norm = tensors.load_vector(at + "q_norm.weight", c.head_dim);
    w.k_norm = tensors.load_vector(at + "k_norm.weight", c.head_dim);
  }
  w.norm_eps = c.norm_eps;
  return w;
}

inline layer_weights load_layer(hf_tensors& tensors, const model_config& c, const std::string& at) {
  layer_weights layer;
  layer.attention_norm = tensors.load_vector(at + "input_layernorm.weight", c.hidden_size);
  layer.attention = load_attention(tensors, c, at + "self_attn.");
  layer.mlp_norm = tensors.load_vector(at + "post_attention_layernorm.weight", c.hidden_size);
  layer.w_gate = tensors.load_matrix(at + "mlp.gate_proj.weight", c.mlp_size, c.hidden_size);
  layer.w_up = tensors.load_matrix(at + "mlp.up_proj.weight", c.mlp_size, c.hidden_size);
  layer.w_down = tensors.load_matrix(at + "mlp.down_proj.weight", c.hidden_size, c.mlp_size);
  return layer;
}

}  // namespace detail

/// Loads a folder. Throws model_error. Memory: the weights as float, once, and a small buffer.
[[nodiscard]] inline model load_hf_folder(const std::filesystem::path& folder) {
  constexpr std::uint64_t max_config = 16 << 20;  // bytes
  input_file file(folder / "config.json");
  if (file.size() > max_config) file.fail("", "too large for a configuration");
  const auto object = parse_json_object(file.read_text(0, file.size(), ""), file.path(), "");

  model out;
  const model_config& c = out.config = read_hf_config(object, file.path());
  hf_tensors tensors(folder);
  out.weights.embedding = tensors.load_matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  for (index_t layer = 0; layer < c.num_layers; ++layer) {
    out.weights.layers.push_back(
        detail::load_layer(tensors, c, "model.layers." + std::to_string(layer) + "."));
  }
  out.weights.final_norm = tensors.load_vector("model.norm.weight", c.hidden_size);
  if (!c.tied_embeddings)
    out.weights.output = tensors.load_matrix("lm_head.weight", c.vocab_size, c.hidden_size);
  tensors.require_all_used(c.tied_embeddings);
  return out;
}

}  // namespace llama
