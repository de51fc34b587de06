// SPDX-License-Identifier: MIT
// A llama2.c checkpoint, legacy format: seven int32, then float32 arrays of the sizes they imply.
//
//   dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: own output matrix), seq_len
//   embedding | attention norms | wq | wk | wv | wo | mlp norms | w1 | w2 | w3 | norm | RoPE table | [output]
//
// The arrays of all layers lie together, so the order here is by kind, then by layer. RoPE is interleaved,
// theta 10000; the table in the file holds the same angles and is skipped.
// Source: Karpathy, llama2.c, export.py (legacy_export).
#pragma once

#include "llama/float_reader.hpp"
#include "llama/input_file.hpp"
#include "llama/weights.hpp"

#include <array>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace llama {

namespace detail {

inline constexpr std::uint64_t llama2c_header_bytes = 7 * 4;

/// The header as a configuration; every number checked by itself.
inline model_config read_llama2c_header(input_file& file) {
  std::array<unsigned char, llama2c_header_bytes> bytes{};
  file.read(0, bytes, "header");
  const auto magic = load_little_endian<std::uint32_t>(bytes.data());
  if (magic == 0x616b3432U)
    file.fail("magic", "a version 1 or 2 checkpoint; only the legacy format is supported");

  const auto value = [&](int index, const char* name, index_t low, index_t high) {
    const auto number =
        static_cast<std::int32_t>(load_little_endian<std::uint32_t>(bytes.data() + 4 * index));
    if (number >= low && number <= high) return static_cast<index_t>(number);
    file.fail(name,
              std::to_string(number) + " is not in " + std::to_string(low) + " to " + std::to_string(high));
  };
  constexpr index_t width = size_limits::width;
  model_config c;
  c.hidden_size = value(0, "dim", 1, width);
  c.mlp_size = value(1, "hidden_dim", 1, width);
  c.num_layers = value(2, "n_layers", 1, size_limits::layers);
  c.num_q_heads = value(3, "n_heads", 1, width);
  c.num_kv_heads = value(4, "n_kv_heads", 1, width);
  const index_t vocab = value(5, "vocab_size", -width, width);
  if (vocab == 0) file.fail("vocab_size", "is 0");
  c.vocab_size = vocab < 0 ? -vocab : vocab;
  c.tied_embeddings = vocab > 0;
  c.max_context = value(6, "seq_len", 1, width);

  if (c.hidden_size % c.num_q_heads != 0) file.fail("n_heads", "does not divide dim");
  if (c.num_q_heads % c.num_kv_heads != 0) file.fail("n_kv_heads", "does not divide n_heads");
  c.head_dim = c.hidden_size / c.num_q_heads;
  if (c.head_dim % 2 != 0 || c.head_dim > size_limits::head_dim) {
    file.fail("n_heads", "gives heads of " + std::to_string(c.head_dim) +
                             " dimensions; even and at most 512 are supported");
  }
  c.norm_eps = 1e-5f;
  c.rope = {.head_dim = c.head_dim, .pairing = kvcache::rope_pairing::interleaved};
  c.bos_id = 1;
  c.stop_ids = {1, 2};
  return c;
}

/// The arrays of the file, one after the other.
class llama2c_arrays {
 public:
  explicit llama2c_arrays(input_file& file) : file_(&file) {}

  /// The next array: a matrix [rows, cols] or vector [size]. \pre the file is long enough, checked by the
  /// caller
  void take(matrix& out, index_t rows, index_t cols, const std::string& name) {
    out.resize(rows, cols);
    take_floats({out.data(), static_cast<std::size_t>(out.size())}, name);
  }
  void take(Eigen::VectorXf& out, index_t size, const std::string& name) {
    out.resize(size);
    take_floats({out.data(), static_cast<std::size_t>(out.size())}, name);
  }
  void skip(std::uint64_t num_floats) { offset_ += 4 * num_floats; }

 private:
  void take_floats(std::span<float> out, const std::string& name) {
    read_floats(*file_, offset_, "F32", out, name);
    offset_ += 4 * out.size();
  }

  input_file* file_;
  std::uint64_t offset_ = llama2c_header_bytes;  // bytes
};

/// Bytes a checkpoint with this header has; saturates rather than wraps.
inline std::uint64_t llama2c_file_bytes(const model_config& c) {
  const auto u = [](index_t n) { return static_cast<std::uint64_t>(n); };
  const auto table = [&](index_t rows, index_t cols) { return saturating_multiply(u(rows), u(cols)); };
  const index_t kv_size = c.num_kv_heads * c.head_dim;
  std::uint64_t layer = 2 * u(c.hidden_size);
  for (const index_t rows :
       {c.hidden_size, kv_size, kv_size, c.hidden_size, c.mlp_size, c.mlp_size, c.mlp_size}) {
    layer = saturating_add(layer, table(rows, c.hidden_size));
  }
  std::uint64_t floats = saturating_multiply(u(c.num_layers), layer);
  floats = saturating_add(floats, table(c.vocab_size, c.hidden_size));
  if (!c.tied_embeddings) floats = saturating_add(floats, table(c.vocab_size, c.hidden_size));
  floats = saturating_add(floats, saturating_add(u(c.hidden_size), table(c.max_context, c.head_dim)));
  return saturating_add(llama2c_header_bytes, saturating_multiply(4, floats));
}

}  // namespace detail

/// Loads a checkpoint. Throws model_error; allocates nothing before the size of the file is exactly right.
[[nodiscard]] inline model load_llama2c(const std::filesystem::path& path) {
  input_file file(path);
  model out;
  const model_config& c = out.config = detail::read_llama2c_header(file);
  if (const auto expected = detail::llama2c_file_bytes(c); expected != file.size()) {
    file.fail("header", "describes a file of " + std::to_string(expected) + " bytes, this one has " +
                            std::to_string(file.size()));
  }
  if (c.bos_id && c.vocab_size <= 2)
    file.fail("vocab_size", "has no room for the tokens that begin and end a text");

  const index_t dim = c.hidden_size, kv_size = c.num_kv_heads * c.head_dim;
  model_weights& w = out.weights;
  w.layers.resize(static_cast<std::size_t>(c.num_layers));
  detail::llama2c_arrays arrays(file);
  arrays.take(w.embedding, c.vocab_size, dim, "token_embedding_table");
  for (auto& layer : w.layers) arrays.take(layer.attention_norm, dim, "rms_att_weight");
  for (auto& layer : w.layers) arrays.take(layer.attention.wq, dim, dim, "wq");
  for (auto& layer : w.layers) arrays.take(layer.attention.wk, kv_size, dim, "wk");
  for (auto& layer : w.layers) arrays.take(layer.attention.wv, kv_size, dim, "wv");
  for (auto& layer : w.layers) arrays.take(layer.attention.wo, dim, dim, "wo");
  for (auto& layer : w.layers) arrays.take(layer.mlp_norm, dim, "rms_ffn_weight");
  for (auto& layer : w.layers) arrays.take(layer.w_gate, c.mlp_size, dim, "w1");
  for (auto& layer : w.layers) arrays.take(layer.w_down, dim, c.mlp_size, "w2");
  for (auto& layer : w.layers) arrays.take(layer.w_up, c.mlp_size, dim, "w3");
  arrays.take(w.final_norm, dim, "rms_final_weight");
  arrays.skip(
      static_cast<std::uint64_t>(c.max_context * c.head_dim));  // cosines and sines, head_dim / 2 of each
  if (!c.tied_embeddings) arrays.take(w.output, c.vocab_size, dim, "wcls");
  return out;
}

}  // namespace llama
