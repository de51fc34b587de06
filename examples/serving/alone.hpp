// SPDX-License-Identifier: MIT
// A conversation by itself: one sequence from the beginning to the end, with nothing shared, released or evicted.
#pragma once

#include "serving/batch_decoder.hpp"
#include "serving/conversation.hpp"

#include <algorithm>
#include <span>
#include <vector>

namespace serving {

/// Runs a conversation that has just begun to its end. \param cache  empty
template <class Cache>
[[nodiscard]] conversation run_alone(const batch_decoder& model, conversation c, Cache cache) {
  struct sequence {
    Cache* of;
    [[nodiscard]] const Cache& cache() const { return *of; }
    void append(index_t layer, std::span<const float> k, std::span<const float> v) {
      (*of)[layer].append(k, v);
    }
  } alone{&cache};
  constexpr index_t most_rows = 64;
  while (true) {
    std::vector<batch_row> rows;
    const index_t missing = std::ssize(c.tokens()) - cache.size();
    for (index_t i = 0; i < std::min(missing, most_rows); ++i)
      rows.push_back({c.tokens()[static_cast<std::size_t>(cache.size() + i)], 0, i + 1 == missing});
    const matrix logits = model.step(std::span(&alone, 1), std::span<const batch_row>(rows));
    if (logits.rows() == 0) continue;
    (void)c.speak(llama::row_of(logits, 0));
    if (c.is_over()) return c;
    if (c.turn_is_over()) c.hear();
  }
}

}  // namespace serving
