// SPDX-License-Identifier: MIT
// Small model files built in a folder of their own, sound ones and, after a change, broken ones.
#pragma once

#include "llama/load_model.hpp"
#include "temporary_folder.hpp"

#include <kvcache/core/half.hpp>

#include <nlohmann/json.hpp>

#include <bit>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace model_files {

using kvcache::index_t;
using nlohmann::json;

[[nodiscard]] inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// Appends an unsigned integer, least significant byte first.
template <class Unsigned>
void put(std::string& out, Unsigned value) {
  for (std::size_t i = 0; i < sizeof(Unsigned); ++i) out += static_cast<char>(value >> (8 * i) & 0xFF);
}

inline void put_float(std::string& out, float value) { put(out, std::bit_cast<std::uint32_t>(value)); }

/// The k-th weight of any test model: exact in bfloat16, so every element type stores the same model.
[[nodiscard]] inline float weight(index_t k) { return static_cast<float>(k * 37 % 31 - 15) / 64.0f; }

[[nodiscard]] inline std::string encoded(const std::string& dtype, float value) {
  std::string out;
  if (dtype == "F32") put_float(out, value);
  if (dtype == "F16") put(out, kvcache::from_float<kvcache::half>(value).bits);
  if (dtype == "BF16") put(out, kvcache::from_float<kvcache::bfloat16>(value).bits);
  return out;
}

/// A safetensors file in two parts, so that a test can change the header and keep the data.
struct safetensors_parts {
  json header = json::object();
  std::string data;

  void add(const std::string& name, const std::vector<index_t>& shape, const std::string& dtype,
           index_t seed) {
    index_t size = 1;
    for (const index_t n : shape) size *= n;
    const auto begin = data.size();
    for (index_t i = 0; i < size; ++i) data += encoded(dtype, weight(i + seed));
    header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }

  [[nodiscard]] std::string bytes() const { return bytes_with(header.dump()); }
  [[nodiscard]] std::string bytes_with(const std::string& header_text) const {
    std::string out;
    put(out, static_cast<std::uint64_t>(header_text.size()));
    return out + header_text + data;
  }
};

/// The configuration of the test model: 2 layers, hidden 8, 2 query heads on 1 KV head of 4, 16 tokens.
[[nodiscard]] inline json config() {
  return {{"model_type", "llama"},    {"hidden_size", 8},
          {"intermediate_size", 12},  {"num_hidden_layers", 2},
          {"num_attention_heads", 2}, {"num_key_value_heads", 1},
          {"vocab_size", 16},         {"max_position_embeddings", 32},
          {"rms_norm_eps", 1e-5},     {"rope_theta", 10000.0},
          {"hidden_act", "silu"},     {"tie_word_embeddings", false},
          {"torch_dtype", "float32"}, {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

/// Name and shape of every tensor of that model; biases and norms of q and k where asked for.
[[nodiscard]] inline std::vector<std::pair<std::string, std::vector<index_t>>> tensor_list(
    bool tied = false, bool qkv_bias = false, bool output_bias = false, bool qk_norm = false) {
  std::vector<std::pair<std::string, std::vector<index_t>>> list{{"model.embed_tokens.weight", {16, 8}}};
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    list.push_back({layer + "input_layernorm.weight", {8}});
    list.push_back({layer + "self_attn.q_proj.weight", {8, 8}});
    list.push_back({layer + "self_attn.k_proj.weight", {4, 8}});
    list.push_back({layer + "self_attn.v_proj.weight", {4, 8}});
    list.push_back({layer + "self_attn.o_proj.weight", {8, 8}});
    if (qkv_bias) {
      list.push_back({layer + "self_attn.q_proj.bias", {8}});
      list.push_back({layer + "self_attn.k_proj.bias", {4}});
      list.push_back({layer + "self_attn.v_proj.bias", {4}});
    }
    if (output_bias) list.push_back({layer + "self_attn.o_proj.bias", {8}});
    if (qk_norm) {
      list.push_back({layer + "self_attn.q_norm.weight", {4}});
      list.push_back({layer + "self_attn.k_norm.weight", {4}});
    }
    list.push_back({layer + "post_attention_layernorm.weight", {8}});
    list.push_back({layer + "mlp.gate_proj.weight", {12, 8}});
    list.push_back({layer + "mlp.up_proj.weight", {12, 8}});
    list.push_back({layer + "mlp.down_proj.weight", {8, 12}});
  }
  list.push_back({"model.norm.weight", {8}});
  if (!tied) list.push_back({"lm_head.weight", {16, 8}});
  return list;
}

[[nodiscard]] inline safetensors_parts parts_of(
    const std::vector<std::pair<std::string, std::vector<index_t>>>& list, const std::string& dtype = "F32") {
  safetensors_parts parts;
  index_t seed = 0;
  for (const auto& [name, shape] : list) parts.add(name, shape, dtype, seed++);
  return parts;
}

[[nodiscard]] inline safetensors_parts sound_parts(const std::string& dtype = "F32") {
  return parts_of(tensor_list(), dtype);
}

/// Seven header fields of a llama2.c checkpoint: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
/// seq_len.
using llama2c_header = std::vector<std::int32_t>;

/// A sound checkpoint of the same architecture; a negative vocab_size brings its own output matrix.
[[nodiscard]] inline std::string llama2c_bytes(const llama2c_header& header = {8, 12, 2, 2, 1, 16, 32}) {
  std::string out;
  for (const std::int32_t field : header) put(out, static_cast<std::uint32_t>(field));
  const index_t dim = header[0], hidden = header[1], layers = header[2], kv = dim / header[3] * header[4];
  const index_t vocab = header[5] < 0 ? -header[5] : header[5], context = header[6];
  index_t seed = 0;
  const auto array = [&](index_t count) {
    for (index_t i = 0; i < count; ++i) put_float(out, weight(i + seed));
    ++seed;
  };
  array(vocab * dim);
  for (const index_t count :
       {dim, dim * dim, dim * kv, dim * kv, dim * dim, dim, hidden * dim, hidden * dim, hidden * dim}) {
    array(layers * count);
  }
  array(dim);
  array(context * dim / header[3]);
  if (header[5] < 0) array(vocab * dim);
  return out;
}

/// Entries of a llama2.c tokenizer: text and score.
using token_list = std::vector<std::pair<std::string, float>>;

/// Three special tokens and the 256 byte tokens that every such tokenizer begins with.
[[nodiscard]] inline token_list byte_tokens() {
  token_list list{{"<unk>", 0.0f}, {"\n<s>\n", 0.0f}, {"\n</s>\n", 0.0f}};
  for (std::size_t b = 0; b < 256; ++b) {
    const std::string digits = "0123456789ABCDEF";
    list.push_back({std::string("<0x") + digits[b / 16] + digits[b % 16] + ">", 0.0f});
  }
  return list;
}

[[nodiscard]] inline std::string tokenizer_bytes(const token_list& list, std::uint32_t longest = 8) {
  std::string out;
  put(out, longest);
  for (const auto& [text, score] : list) {
    put_float(out, score);
    put(out, static_cast<std::uint32_t>(text.size()));
    out += text;
  }
  return out;
}

}  // namespace model_files
