// SPDX-License-Identifier: MIT
// tova: token omission via attention, the tokens that the newest query looks at least go.
//
// Source: Oren et al. 2024, "Transformers are Multi-State RNNs" (arXiv 2401.06104). There the weights of one layer are averaged
// over its heads; here over all layers.
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
class tova {
 public:
  static constexpr const char* name = "tova";
  static constexpr token_evidence evidence = token_evidence::weights;

  [[nodiscard]] static index_t num_queries() noexcept { return 1; }

  /// What the newest query gave to each token, [size]. Takes the place of what was observed before.
  void observe(std::span<const float> weights) { weights_.assign(weights.begin(), weights.end()); }

  void score(std::span<float> scores) const noexcept {
    KVCACHE_ASSERT(scores.size() == weights_.size(), "tova: as many tokens as were observed");
    std::copy(weights_.begin(), weights_.end(), scores.begin());
  }

  void keep(std::span<const index_t> tokens) noexcept {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      weights_[i] = weights_[static_cast<std::size_t>(tokens[i])];
    weights_.resize(tokens.size());
  }

  [[nodiscard]] static token_selection selection(index_t budget) noexcept { return {.budget = budget}; }

 private:
  std::vector<float> weights_;  // [size]
};

static_assert(token_policy<tova>);

}  // namespace kvcache::inline v0::eviction
