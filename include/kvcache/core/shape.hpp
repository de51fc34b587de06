// SPDX-License-Identifier: MIT
// cache_shape: the four numbers that fix every address in a cache.
#pragma once

#include <kvcache/core/checked.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <string>

namespace kvcache::inline v0 {

struct cache_shape {
  index_t num_layers = 1;
  index_t num_kv_heads = 1;
  index_t head_dim = 64;    ///< 1 to 512
  index_t block_size = 64;  ///< tokens: 16, 32, 64, 128 or 256

  friend bool operator==(const cache_shape&, const cache_shape&) = default;
};

/// Whether what one layer and head has fits the other shape: all but the block size.
constexpr bool same_heads(const cache_shape& a, const cache_shape& b) noexcept {
  return a.num_layers == b.num_layers && a.num_kv_heads == b.num_kv_heads && a.head_dim == b.head_dim;
}

inline constexpr index_t max_head_dim = 512;
inline constexpr index_t max_block_size = 256;

constexpr bool is_block_size(index_t n) noexcept {
  return n == 16 || n == 32 || n == 64 || n == 128 || n == 256;
}

/// Throws shape_error naming the field that cannot be.
inline void validate(const cache_shape& shape) {
  const auto refuse = [](const char* rule, index_t got) {
    throw shape_error(std::string("kvcache: ") + rule + ", got " + std::to_string(got));
  };
  if (shape.num_layers < 1) refuse("num_layers must be at least 1", shape.num_layers);
  if (shape.num_kv_heads < 1) refuse("num_kv_heads must be at least 1", shape.num_kv_heads);
  if (shape.head_dim < 1 || shape.head_dim > max_head_dim)
    refuse("head_dim must be 1 to 512", shape.head_dim);
  if (!is_block_size(shape.block_size)) refuse("block_size must be 16, 32, 64, 128 or 256", shape.block_size);
  // The floats of one token over all layers, keys and values: what callers allocate and codecs multiply up.
  (void)checked_mul(shape.num_layers, shape.num_kv_heads, shape.head_dim, 2 * index_t{sizeof(float)});
}

}  // namespace kvcache::inline v0
