// SPDX-License-Identifier: MIT
// snapkv: the tokens that the newest queries look at, and their neighbours; those queries' own tokens stay.
//
//   score[t] = mean of what the newest `window` queries gave to tokens t - 2 .. t + 2; nothing lies before the first or in the window
//
// Source: Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469), with the average
// pool that later implementations use; there each head chooses its own tokens.
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/select_tokens.hpp>
#include <kvcache/eviction/token_policy.hpp>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace kvcache::inline v0::eviction {

/// A token_policy. Keeps one float for each token.
class snapkv {
 public:
  static constexpr const char* name = "snapkv";
  static constexpr token_evidence evidence = token_evidence::weights;

  /// \param window  queries that are asked, and tokens that stay
  /// \param pool    tokens that a score is the mean of, odd
  explicit snapkv(index_t window = 64, index_t pool = 5) noexcept : window_(window), pool_(pool) {
    KVCACHE_ASSERT(window >= 1 && pool >= 1 && pool % 2 == 1,
                   "snapkv: the window is not empty, the pool is odd");
  }

  [[nodiscard]] index_t num_queries() const noexcept { return window_; }

  /// What the newest `window` queries gave to each token, [size]. Takes the place of what was observed before.
  void observe(std::span<const float> weights) { weights_.assign(weights.begin(), weights.end()); }

  void score(std::span<float> scores) const noexcept {
    KVCACHE_ASSERT(scores.size() == weights_.size(), "snapkv: as many tokens as were observed");
    const auto size = static_cast<index_t>(scores.size());
    const index_t before_window = std::max(size - window_, index_t{0});
    for (index_t t = 0; t < before_window; ++t) {
      const index_t first = std::max(t - pool_ / 2, index_t{0});
      const index_t last = std::min(t + pool_ / 2 + 1, before_window);
      float sum = 0;
      for (index_t n = first; n < last; ++n) sum += weights_[static_cast<std::size_t>(n)];
      scores[static_cast<std::size_t>(t)] = sum / static_cast<float>(pool_);
    }
    std::fill(scores.begin() + before_window, scores.end(), std::numeric_limits<float>::infinity());
  }

  void keep(std::span<const index_t> tokens) noexcept {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      weights_[i] = weights_[static_cast<std::size_t>(tokens[i])];
    weights_.resize(tokens.size());
  }

  /// The window, or half of the budget where that is less.
  [[nodiscard]] token_selection selection(index_t budget) const noexcept {
    return {.budget = budget, .recent = std::min(window_, budget / 2)};
  }

 private:
  index_t window_;
  index_t pool_;
  std::vector<float> weights_;  // [size]
};

static_assert(token_policy<snapkv>);

}  // namespace kvcache::inline v0::eviction
