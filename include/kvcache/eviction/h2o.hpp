// SPDX-License-Identifier: MIT
// h2o: heavy hitters, the tokens that got most attention so far, and the recent ones, half of the budget each.
//
// Sums favour old tokens, which were there to be looked at for longer: that is why recent ones are protected.
// Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models"
// (arXiv 2306.14048).
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/select_tokens.hpp>
#include <kvcache/eviction/token_policy.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

namespace kvcache::inline v0::eviction {

/// A token_policy. Keeps one float for each token.
class h2o {
 public:
  static constexpr const char* name = "h2o";
  static constexpr token_evidence evidence = token_evidence::weights;

  [[nodiscard]] static index_t num_queries() noexcept { return every_query; }

  /// What queries gave to each token, [size]; every query once. The sequence may have grown, not shrunk.
  void observe(std::span<const float> weights) {
    KVCACHE_ASSERT(weights.size() >= sums_.size(), "h2o: keep() says which tokens are left");
    if (weights.size() > sums_.capacity()) sums_.reserve(std::max(weights.size(), 2 * sums_.capacity()));
    sums_.resize(weights.size(), 0.0F);
    for (std::size_t t = 0; t < weights.size(); ++t) sums_[t] += weights[t];
  }

  void score(std::span<float> scores) const noexcept {
    KVCACHE_ASSERT(scores.size() == sums_.size(), "h2o: as many tokens as were observed");
    std::copy(sums_.begin(), sums_.end(), scores.begin());
  }

  void keep(std::span<const index_t> tokens) noexcept {
    for (std::size_t i = 0; i < tokens.size(); ++i) sums_[i] = sums_[static_cast<std::size_t>(tokens[i])];
    sums_.resize(tokens.size());
  }

  [[nodiscard]] static token_selection selection(index_t budget) noexcept {
    return {.budget = budget, .recent = budget / 2};
  }

 private:
  std::vector<float> sums_;  // [size]
};

static_assert(token_policy<h2o>);

}  // namespace kvcache::inline v0::eviction
