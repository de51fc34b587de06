// SPDX-License-Identifier: MIT
// The plain twin: what one writes without a library. Float arrays [head][token][dim] per layer, and an
// attention of two passes for each query head. What the containers have to beat, and what makes them
// comparable.
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

namespace kvcache::bench {

/// Keys and values of one layer, [head][capacity][dim]; the capacity doubles.
struct plain_layer {
  cache_shape shape;
  index_t size = 0;
  index_t capacity = 0;
  std::vector<float> keys = {};
  std::vector<float> values = {};

  [[nodiscard]] std::size_t row(index_t head, index_t token) const {
    return static_cast<std::size_t>((head * capacity + token) * shape.head_dim);
  }

  void grow(index_t tokens) {
    plain_layer larger{shape, size, tokens, {}, {}};
    larger.keys.resize(static_cast<std::size_t>(shape.num_kv_heads * tokens * shape.head_dim));
    larger.values.resize(larger.keys.size());
    for (index_t h = 0; h < shape.num_kv_heads; ++h) {
      std::copy_n(keys.data() + row(h, 0), size * shape.head_dim, larger.keys.data() + larger.row(h, 0));
      std::copy_n(values.data() + row(h, 0), size * shape.head_dim, larger.values.data() + larger.row(h, 0));
    }
    *this = std::move(larger);
  }

  /// \param k,v  [tokens, num_kv_heads, head_dim]
  void append(std::span<const float> k, std::span<const float> v) {
    const index_t dim = shape.head_dim;
    const index_t count = static_cast<index_t>(k.size()) / (shape.num_kv_heads * dim);
    if (size + count > capacity) grow(std::max(size + count, 2 * capacity));
    for (index_t t = 0; t < count; ++t) {
      for (index_t h = 0; h < shape.num_kv_heads; ++h) {
        const index_t from = (t * shape.num_kv_heads + h) * dim;
        std::copy_n(k.data() + from, dim, keys.data() + row(h, size + t));
        std::copy_n(v.data() + from, dim, values.data() + row(h, size + t));
      }
    }
    size += count;
  }
};

/// One sequence, with the verbs of the library's containers that the benchmarks use.
class plain_cache {
 public:
  plain_cache(const cache_shape& shape, index_t max_tokens)
      : layers_(static_cast<std::size_t>(shape.num_layers), plain_layer{shape}) {
    for (plain_layer& layer : layers_) layer.grow(max_tokens);
  }

  [[nodiscard]] plain_layer& operator[](index_t layer) { return layers_[static_cast<std::size_t>(layer)]; }
  [[nodiscard]] const plain_layer& operator[](index_t layer) const {
    return layers_[static_cast<std::size_t>(layer)];
  }
  [[nodiscard]] const cache_shape& shape() const { return layers_.front().shape; }
  [[nodiscard]] plain_cache clone() const { return *this; }
  [[nodiscard]] plain_cache fork(index_t num_tokens) const {
    plain_cache copy(*this);
    copy.truncate(num_tokens);
    return copy;
  }
  void truncate(index_t num_tokens) {
    for (plain_layer& layer : layers_) layer.size = std::min(layer.size, num_tokens);
  }
  [[nodiscard]] memory_use bytes() const {
    memory_use use;
    for (const plain_layer& layer : layers_) {
      const index_t row_bytes = layer.shape.num_kv_heads * layer.shape.head_dim * 2 * index_t{sizeof(float)};
      use.total += layer.capacity * row_bytes;
      use.payload += layer.size * row_bytes;
    }
    use.slack = use.total - use.payload;
    return use;
  }

 private:
  std::vector<plain_layer> layers_;
};

/// Sixteen partial sums, because compilers may not reorder a float sum by themselves.
inline float plain_dot(const float* a, const float* b, index_t n) {
  std::array<float, 16> part{};
  for (index_t i = 0; i + 16 <= n; i += 16) {
    for (std::size_t j = 0; j < 16; ++j)
      part[j] += a[i + static_cast<index_t>(j)] * b[i + static_cast<index_t>(j)];
  }
  float sum = 0;
  for (const float x : part) sum += x;
  for (index_t i = n / 16 * 16; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

/// Decode attention: one query token over everything in the layer.
/// \param q,out  [num_q_heads, head_dim]
inline void plain_attend(std::span<const float> q, const plain_layer& layer, std::span<float> out,
                         std::vector<float>& weights) {
  const index_t dim = layer.shape.head_dim;
  const index_t num_heads = static_cast<index_t>(q.size()) / dim;
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  weights.resize(static_cast<std::size_t>(layer.size));
  for (index_t h = 0; h < num_heads; ++h) {
    const index_t kv_head = h / (num_heads / layer.shape.num_kv_heads);
    const float* query = q.data() + h * dim;
    const float* key = layer.keys.data() + layer.row(kv_head, 0);
    for (index_t t = 0; t < layer.size; ++t)
      weights[static_cast<std::size_t>(t)] = scale * plain_dot(query, key + t * dim, dim);

    const float max = *std::max_element(weights.begin(), weights.end());
    float sum = 0;
    for (float& w : weights) sum += w = std::exp(w - max);

    float* sums = out.data() + h * dim;
    std::fill_n(sums, dim, 0.0F);
    const float* value = layer.values.data() + layer.row(kv_head, 0);
    for (index_t t = 0; t < layer.size; ++t) {
      const float w = weights[static_cast<std::size_t>(t)];
      for (index_t d = 0; d < dim; ++d) sums[d] += w * value[t * dim + d];
    }
    for (index_t d = 0; d < dim; ++d) sums[d] /= sum;
  }
}

}  // namespace kvcache::bench
