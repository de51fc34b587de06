// SPDX-License-Identifier: MIT
// merge_parts: results of attention over parts of the keys, merged in an order that depends on their number only.
//
//   6 parts        (0 1) (2 3) 4 5        what 6 has over a power of two folds first, so that 4 are left
//                  ((0 1)(2 3)) (4 5)     then neighbours, level by level
//                  ((0 1)(2 3)) ((4 5))   so that parts in one process and parts in 6 (interop/mpi.hpp) give the same bits
//
// attend gives a part's output and, in attend_options::lse, its log-sum-exp. Which keys belong to a part is free; they
// may not be in two.
#pragma once

#include <kvcache/attention/softmax_state.hpp>
#include <kvcache/attention/visibility.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <span>

namespace kvcache::inline v0 {

/// What attend says of one part of the keys, in memory of the caller.
struct partial_result {
  std::span<float> out;  ///< [num_rows, head_dim], normalised; zero where the part saw nothing
  std::span<float> lse;  ///< [num_rows], natural logarithm; -infinity where the part saw nothing
};

/// Which of `count` tokens, heads or rows are part `part` of `num_parts`: consecutive ones, as many as the others have or
/// one more, and the first parts are the longer ones. Empty where there are more parts than things.
/// \pre `0 <= part < num_parts`, `count >= 0`
[[nodiscard]] constexpr token_range share_of(index_t count, index_t part, index_t num_parts) noexcept {
  KVCACHE_ASSERT(0 <= part && part < num_parts && count >= 0, "share_of: the part must exist");
  const index_t each = count / num_parts;
  const index_t longer = count % num_parts;
  const index_t first = part * each + std::min(part, longer);
  return {first, first + each + (part < longer ? 1 : 0)};
}

/// Merges all parts into the first; the others are left with intermediate results. No part is no change.
///
/// Numerics: each of the ceil(log2(parts)) + 1 levels adds less than 1e-7 * (3 + |lse|) * max|v| to what attend states
/// for its parts, |lse| <= scale * max|q| * max|k| + ln(kv_len). A part that saw nothing leaves no trace.
/// Complexity: O(parts * num_rows * head_dim). Allocates nothing. \pre all parts have one shape
inline void merge_parts(std::span<const partial_result> parts) {
  const auto into = [&parts](std::size_t to, std::size_t from) {
    merge(parts[to].out, parts[to].lse, parts[from].out, parts[from].lse);
  };
  const std::size_t whole = std::bit_floor(parts.size());
  const std::size_t extra = parts.size() - whole;
  for (std::size_t i = 0; i < extra; ++i) into(2 * i, 2 * i + 1);
  const auto place = [extra](std::size_t i) { return i < extra ? 2 * i : i + extra; };
  for (std::size_t step = 1; step < whole; step *= 2) {
    for (std::size_t i = 0; i + step < whole; i += 2 * step) into(place(i), place(i + step));
  }
}

}  // namespace kvcache::inline v0
