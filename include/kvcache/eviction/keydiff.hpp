// SPDX-License-Identifier: MIT
// keydiff: tokens whose keys are like the others' go, those that stand out stay. Asks no query.
//
//   score[t] = - mean over layers and heads of cos(key[t], anchor),   anchor = mean over tokens of key / |key|
//
// Source: Park et al. 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
// Resource-Constrained Environments" (arXiv 2504.15364); there each head chooses its own tokens.
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/select_tokens.hpp>
#include <kvcache/eviction/token_policy.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0::eviction {

/// A token_policy. Keeps one float for each token, and computes in double.
class keydiff {
 public:
  static constexpr const char* name = "keydiff";
  static constexpr token_evidence evidence = token_evidence::keys;

  [[nodiscard]] static index_t num_queries() noexcept { return 0; }

  /// Keys of one layer as they are stored, rotated; once for each layer before tokens are chosen. A sequence of another length
  /// begins anew. \param keys  [size, num_heads, head_dim]
  void observe(std::span<const float> keys, index_t num_heads, index_t head_dim) {
    const index_t width = num_heads * head_dim;
    KVCACHE_ASSERT(num_heads >= 1 && head_dim >= 1 && static_cast<index_t>(keys.size()) % width == 0,
                   "keydiff: keys must be [size, num_heads, head_dim]");
    const auto size = static_cast<index_t>(keys.size()) / width;
    if (size != static_cast<index_t>(likeness_.size())) {
      likeness_.assign(static_cast<std::size_t>(size), 0.0F);
      num_heads_ = 0;
    }
    std::vector<double> anchor(static_cast<std::size_t>(head_dim));
    for (index_t head = 0; head < num_heads; ++head) {
      std::fill(anchor.begin(), anchor.end(), 0.0);
      const auto key = [&](index_t t) {
        return keys.subspan(static_cast<std::size_t>(t * width + head * head_dim), anchor.size());
      };
      for (index_t t = 0; t < size; ++t) {
        const double norm = length(key(t));
        for (std::size_t d = 0; norm > 0 && d < anchor.size(); ++d)
          anchor[d] += static_cast<double>(key(t)[d]) / norm;
      }
      const double anchor_norm = length(anchor);
      for (index_t t = 0; t < size; ++t) {
        double dot = 0;
        for (std::size_t d = 0; d < anchor.size(); ++d) dot += static_cast<double>(key(t)[d]) * anchor[d];
        const double norms = length(key(t)) * anchor_norm;
        if (norms > 0) likeness_[static_cast<std::size_t>(t)] += static_cast<float>(dot / norms);
      }
    }
    num_heads_ += num_heads;
  }

  void score(std::span<float> scores) const noexcept {
    KVCACHE_ASSERT(scores.size() == likeness_.size(), "keydiff: as many tokens as were observed");
    const auto heads = static_cast<float>(std::max(num_heads_, index_t{1}));
    for (std::size_t t = 0; t < scores.size(); ++t) scores[t] = -likeness_[t] / heads;
  }

  /// Forgets what it saw: the mean is another one now.
  void keep(std::span<const index_t> /*tokens*/) noexcept {
    likeness_.clear();
    num_heads_ = 0;
  }

  [[nodiscard]] static token_selection selection(index_t budget) noexcept { return {.budget = budget}; }

 private:
  template <class Row>
  static double length(const Row& row) noexcept {
    double square = 0;
    for (const auto x : row) square += static_cast<double>(x) * static_cast<double>(x);
    return std::sqrt(square);
  }

  std::vector<float> likeness_;  // [size], summed over heads and layers
  index_t num_heads_ = 0;
};

static_assert(token_policy<keydiff>);

/// Shows a policy all keys of a cache. O(size * head_dim) for each head of each layer, decoding included.
/// \param cache  any kv_cache or any_cache, every layer with the same tokens
template <class Cache, class Policy>
void observe_keys(const Cache& cache, Policy& policy) {
  const auto shape = cache.shape();
  std::vector<float> k(static_cast<std::size_t>(cache.size() * shape.num_kv_heads * shape.head_dim));
  std::vector<float> v(k.size());
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    cache[layer].copy_out(0, cache.size(), k, v);
    policy.observe(std::span<const float>(k), shape.num_kv_heads, shape.head_dim);
  }
}

}  // namespace kvcache::inline v0::eviction
