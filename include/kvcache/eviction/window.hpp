// SPDX-License-Identifier: MIT
// sliding_window and sinks_window: the newest tokens stay, and the first few.
//
// Models put much of their attention on the first tokens, whatever those say; without them they fail once the window has
// passed. With keep_positions::consecutive the stream may run past the model's context.
// Source: sinks, Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453); windows,
// Beltagy et al. 2020, "Longformer".
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/eviction/select_tokens.hpp>
#include <kvcache/eviction/token_policy.hpp>

#include <cstddef>
#include <span>

namespace kvcache::inline v0::eviction {

/// The newest tokens stay. A token_policy.
struct sliding_window : no_token_books {
  static constexpr const char* name = "window";
  static constexpr token_evidence evidence = token_evidence::none;

  static void score(std::span<float> scores) noexcept {
    for (std::size_t t = 0; t < scores.size(); ++t) scores[t] = static_cast<float>(t);
  }
  [[nodiscard]] static token_selection selection(index_t budget) noexcept { return {.budget = budget}; }
};

/// The first `sinks` tokens and the newest stay: StreamingLLM. A token_policy.
struct sinks_window : sliding_window {
  static constexpr const char* name = "sinks";

  index_t sinks = 4;

  [[nodiscard]] token_selection selection(index_t budget) const noexcept {
    return {.budget = budget, .sinks = sinks};
  }
};

static_assert(token_policy<sliding_window> && token_policy<sinks_window>);

}  // namespace kvcache::inline v0::eviction
