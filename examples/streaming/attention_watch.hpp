// SPDX-License-Identifier: MIT
// What policies want to see of a forward pass: the weights of all its queries, or the newest queries themselves, to be
// asked when tokens are chosen.
#pragma once

#include <kvcache/attention/options.hpp>
#include <kvcache/attention/weights.hpp>
#include <kvcache/eviction/token_policy.hpp>
#include <kvcache/interop/any_cache.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace streaming {

using kvcache::index_t;

/// For one cache. Use: forward_watched(..., watch.of(cache)), then `show` to a policy.
class attention_watch {
 public:
  /// \param window       newest queries to keep for each layer; 0: none
  /// \param every_query  whether to add up the weights of all queries as they come
  attention_watch(index_t num_layers, index_t window, bool every_query)
      : window_(window), every_query_(every_query), layers_(static_cast<std::size_t>(num_layers)) {}

  /// What a policy asks for.
  template <class Policy>
  [[nodiscard]] static attention_watch for_policy(index_t num_layers, const Policy& policy) {
    const bool every = policy.num_queries() == kvcache::eviction::every_query;
    return {num_layers, every ? 0 : policy.num_queries(), every};
  }

  [[nodiscard]] bool wants_nothing() const noexcept { return window_ == 0 && !every_query_; }

  /// What forward_watched takes.
  template <class Cache>
  [[nodiscard]] auto of(Cache& cache) {
    return [this, &cache](index_t layer, std::span<const float> q, std::span<const float> lse,
                          const kvcache::attend_options& options) {
      const auto size = static_cast<std::size_t>(cache[layer].size());
      if (every_query_) {
        sums_.resize(std::max(sums_.size(), size), 0.0F);
        add_token_weights(q, cache[layer], lse, std::span(sums_).first(size), options);
      }
      layers_[static_cast<std::size_t>(layer)].append(q, lse, options, window_);
    };
  }

  /// The weights of all queries since the last call, [size].
  [[nodiscard]] std::vector<float> take_sums() { return std::exchange(sums_, {}); }

  /// Those of the newest queries, at most `num_queries`, over the tokens there are.
  template <class Cache>
  [[nodiscard]] std::vector<float> newest_weights(const Cache& cache, index_t num_queries) const {
    std::vector<float> sums(static_cast<std::size_t>(cache.size()), 0.0F);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const layer_queries& kept = layers_[i];
      const auto n = static_cast<std::size_t>(std::min(num_queries, kept.count));
      if (n == 0) continue;
      kvcache::attend_options options = kept.options;
      options.q_len = static_cast<index_t>(n);
      const auto newest = [&](const std::vector<float>& rows) {
        const std::size_t width = rows.size() / static_cast<std::size_t>(kept.count);
        return std::span(rows).last(n * width);
      };
      add_token_weights(newest(kept.q), cache[static_cast<index_t>(i)], newest(kept.lse), sums, options);
    }
    return sums;
  }

  /// Forgets all but the newest queries: those whose tokens are still there.
  void keep_newest(index_t num_queries) {
    for (layer_queries& layer : layers_) layer.cut(num_queries);
  }

 private:
  struct layer_queries {
    std::vector<float> q;    // [count, num_q_heads, head_dim], rotated
    std::vector<float> lse;  // [count, num_q_heads]
    index_t count = 0;
    kvcache::attend_options options;

    void append(std::span<const float> more, std::span<const float> more_lse,
                const kvcache::attend_options& given, index_t window) {
      if (window == 0) return;
      q.insert(q.end(), more.begin(), more.end());
      lse.insert(lse.end(), more_lse.begin(), more_lse.end());
      count += given.q_len;
      options = given;
      cut(window);
    }
    void cut(index_t window) {
      if (count <= window) return;
      for (std::vector<float>* rows : {&q, &lse}) {
        const auto width = std::ssize(*rows) / count;
        rows->erase(rows->begin(), rows->begin() + (count - window) * width);
      }
      count = window;
    }
  };

  index_t window_;
  bool every_query_;
  std::vector<float> sums_;
  std::vector<layer_queries> layers_;
};

}  // namespace streaming
