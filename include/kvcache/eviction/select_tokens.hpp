// SPDX-License-Identifier: MIT
// select_tokens: the tokens with the highest scores, within a budget, one by one or by blocks; one engine for all policies.
//
//   scores   | .9 .1 .2 .1 | .5 .0 .7 .1 | .3 .3 .2 .4 | .1 .2 |     budget 10, sinks 1, recent 3, blocks of 4
//   stays    |  block 0    |             |  block 2    |  all  |     blocks 0 and 2 have protected tokens, 1 does not fit
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace kvcache::inline v0::eviction {

/// How a block is judged by the scores of its tokens.
enum class unit_score { mean, max };

struct token_selection {
  index_t budget = 0;  ///< tokens to keep; protected ones stay even if they are more
  index_t sinks = 0;   ///< first tokens, that stay
  index_t recent = 1;  ///< newest tokens, that stay; the newest one always does
  index_t unit =
      1;  ///< tokens that stay or go together: 1, or the cache's block_size, which frees blocks without moving a row
  unit_score judged = unit_score::mean;
  index_t whole_blocks = 0;  ///< tokens below this one go by units of block_size only; see keep_limits
  index_t block_size = 1;    ///< of those
};

/// Chooses the tokens that stay.
///
/// Units (tokens, or blocks; the last may be shorter) with a protected token come first, then the others by score, as long
/// as they fit: one that does not is passed over. Of equal scores the newer unit stays. NaN counts as the lowest score.
/// \param scores  [size], the higher the longer a token stays
/// \return        indices of tokens, ascending, the newest one among them; all of them if they fit. At most `budget`, unless
///                protected units are more.
/// O(size log size). Throws std::bad_alloc.
[[nodiscard]] inline std::vector<index_t> select_tokens(std::span<const float> scores,
                                                        const token_selection& selection);

namespace detail {

/// Tokens [first, last) that stay or go together.
struct token_unit {
  index_t first;
  index_t last;
  float score;
};

/// All units of a sequence, in order.
inline std::vector<token_unit> units_of(std::span<const float> scores, const token_selection& s) {
  std::vector<token_unit> units;
  const auto size = static_cast<index_t>(scores.size());
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  for (index_t t = 0; t < size;) {
    // Where blocks are asked for, one that begins below the limit is whole; behind it units go on from where that ends.
    const index_t width = t < s.whole_blocks ? std::max(s.unit, s.block_size) : s.unit;
    token_unit unit{t, std::min(size, t / width * width + width), lowest};
    double sum = 0;
    for (; t < unit.last; ++t) {
      const float score = scores[static_cast<std::size_t>(t)];
      const float known = score == score ? score : lowest;
      unit.score = std::max(unit.score, known);
      sum += static_cast<double>(known);
    }
    if (s.judged == unit_score::mean)
      unit.score = static_cast<float>(sum / static_cast<double>(t - unit.first));
    if (unit.score != unit.score) unit.score = lowest;  // infinities of both signs
    units.push_back(unit);
  }
  return units;
}

}  // namespace detail

inline std::vector<index_t> select_tokens(std::span<const float> scores, const token_selection& selection) {
  const auto size = static_cast<index_t>(scores.size());
  const token_selection& s = selection;
  KVCACHE_ASSERT(
      s.budget >= 0 && s.sinks >= 0 && s.recent >= 0 && s.unit >= 1 && s.block_size >= 1,
      "select_tokens: budget, sinks and recent must not be negative, units have at least one token");
  KVCACHE_ASSERT(s.unit % s.block_size == 0 || s.block_size % s.unit == 0,
                 "select_tokens: units must fit into blocks, or blocks into units");
  std::vector<index_t> tokens;
  tokens.reserve(static_cast<std::size_t>(size));
  if (size <= s.budget) {
    for (index_t t = 0; t < size; ++t) tokens.push_back(t);
    return tokens;
  }
  const auto units = detail::units_of(scores, s);
  const index_t first_recent = size - std::max(s.recent, index_t{1});
  const auto is_protected = [&](const detail::token_unit& u) {
    return u.first < s.sinks || u.last > first_recent;
  };
  std::vector<bool> stays(units.size());
  std::vector<std::size_t> others;
  index_t left = s.budget;
  for (std::size_t i = 0; i < units.size(); ++i) {
    stays[i] = is_protected(units[i]);
    if (stays[i]) left -= units[i].last - units[i].first;
    if (!stays[i]) others.push_back(i);
  }
  std::sort(others.begin(), others.end(), [&](std::size_t a, std::size_t b) {
    return units[a].score != units[b].score ? units[a].score > units[b].score : a > b;
  });
  for (const std::size_t i : others) {
    const index_t num_tokens = units[i].last - units[i].first;
    if (num_tokens > left) continue;
    stays[i] = true;
    left -= num_tokens;
  }
  for (std::size_t i = 0; i < units.size(); ++i) {
    for (index_t t = units[i].first; stays[i] && t < units[i].last; ++t) tokens.push_back(t);
  }
  return tokens;
}

}  // namespace kvcache::inline v0::eviction
