// SPDX-License-Identifier: MIT
// A model that reads and writes for as long as one likes: whenever its cache is full, a policy says which tokens go.
#pragma once

#include "llama/decoder.hpp"
#include "streaming/attention_watch.hpp"
#include "streaming/policies.hpp"

#include <kvcache/core/executor.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/eviction/evict_tokens.hpp>
#include <kvcache/eviction/keydiff.hpp>

#include <algorithm>
#include <span>
#include <utility>
#include <variant>

namespace streaming {

struct stream_settings {
  index_t max_tokens = 256;   ///< in the cache
  index_t kept_tokens = 192;  ///< after an eviction
  index_t unit = 16;          ///< tokens that go together: 1, or the cache's block size
  kvcache::keep_positions positions = kvcache::keep_positions::consecutive;
};

/// \tparam Cache  a container's, or any_cache
template <class Cache>
class token_stream {
 public:
  token_stream(const llama::decoder& model, Cache cache, any_policy policy, const stream_settings& settings)
      : model_(&model),
        cache_(std::move(cache)),
        policy_(std::move(policy)),
        settings_(settings),
        watch_(std::visit(
            [&](const auto& p) { return attention_watch::for_policy(model.config().num_layers, p); },
            policy_)) {}

  /// Logits after `token`, [1, vocab]. Throws kvcache::capacity_error.
  llama::matrix next(index_t token) {
    if (cache_.size() >= settings_.max_tokens) make_room();
    kvcache::serial_executor serial;
    if (watch_.wants_nothing()) return model_->forward(std::span(&token, 1), cache_, 1, serial);
    llama::matrix logits =
        model_->forward_watched(std::span(&token, 1), cache_, 1, serial, watch_.of(cache_));
    if (auto* heavy = std::get_if<eviction::h2o>(&policy_)) heavy->observe(watch_.take_sums());
    return logits;
  }

  [[nodiscard]] const Cache& cache() const noexcept { return cache_; }
  [[nodiscard]] index_t num_evictions() const noexcept { return num_evictions_; }

 private:
  void make_room() {
    std::visit([this](auto& policy) { make_room_by(policy); }, policy_);
  }

  template <class Policy>
  void make_room_by(Policy& policy) {
    if constexpr (Policy::evidence == eviction::token_evidence::keys) {
      observe_keys(cache_, policy);
    } else if constexpr (Policy::evidence == eviction::token_evidence::weights) {
      if (policy.num_queries() != eviction::every_query)
        policy.observe(watch_.newest_weights(cache_, policy.num_queries()));
    }
    eviction::token_selection selection = policy.selection(settings_.kept_tokens);
    selection.unit = settings_.unit;
    const auto result = eviction::evict_tokens(cache_, policy, selection, settings_.positions);
    if (result.code != kvcache::status::ok) throw kvcache::capacity_error("evict_tokens", result.code);
    watch_.keep_newest(std::max<index_t>(selection.recent, 1));
    ++num_evictions_;
  }

  const llama::decoder* model_;
  Cache cache_;
  any_policy policy_;
  stream_settings settings_;
  attention_watch watch_;
  index_t num_evictions_ = 0;
};

}  // namespace streaming
