// SPDX-License-Identifier: MIT
// The sizes and constants of a Llama-architecture model, whatever file they came from.
#pragma once

#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>

#include <optional>
#include <vector>

namespace llama {

using kvcache::index_t;

struct model_config {
  index_t hidden_size = 0;  // width of the residual stream
  index_t mlp_size = 0;     // width inside SwiGLU
  index_t num_layers = 0;
  index_t num_q_heads = 0;  // a multiple of num_kv_heads
  index_t num_kv_heads = 0;
  index_t head_dim = 0;     // even, at most 512
  index_t vocab_size = 0;   // tokens
  index_t max_context = 0;  // tokens it was made for

  float norm_eps = 1e-5f;
  kvcache::rope_config rope{};
  index_t window = 0;  // tokens a query looks back, 0: all

  bool tied_embeddings = false;  // the output matrix is the embedding
  bool attention_bias = false;   // q, k and v have biases
  bool output_bias = false;      // so has the output projection
  bool qk_norm = false;          // every head of q and k is normalised before RoPE

  std::optional<index_t> bos_id;  // token that starts a text, if the model has one
  std::vector<index_t> stop_ids;  // tokens that end one
};

/// What a cache for this model must hold.
[[nodiscard]] inline kvcache::cache_shape cache_shape_of(const model_config& config,
                                                         index_t block_size = 64) {
  return {.num_layers = config.num_layers,
          .num_kv_heads = config.num_kv_heads,
          .head_dim = config.head_dim,
          .block_size = block_size};
}

/// The attention of each layer, in the library's terms.
[[nodiscard]] inline kvcache::attention_config attention_config_of(const model_config& config) {
  kvcache::attention_config attention{};
  attention.num_q_heads = config.num_q_heads;
  attention.num_kv_heads = config.num_kv_heads;
  attention.head_dim = config.head_dim;
  attention.rope = config.rope;
  attention.window = config.window;
  return attention;
}

/// Largest value a loader accepts for each size: products of two stay far from overflow.
struct size_limits {
  static constexpr index_t width = index_t{1} << 24;  // hidden_size, mlp_size, vocab_size, heads
  static constexpr index_t layers = index_t{1} << 16;
  static constexpr index_t context = index_t{1} << 31;  // tokens
  static constexpr index_t head_dim = 512;
};

}  // namespace llama
