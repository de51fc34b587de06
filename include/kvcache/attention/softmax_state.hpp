// SPDX-License-Identifier: MIT
// Softmax in parts: states over disjoint sets of keys that merge into the state over their union.
//
// Of one query's logits s[t]:   max = max s[t],  sum = sum exp(s[t] - max),  sums[d] = sum exp(s[t] - max) v[t, d]
//                               out = sums / sum,  lse = max + ln(sum)      natural logarithm
//
// A state that has seen nothing has max = lse = -infinity and merges without a trace; its output is zero.
// Source: Milakov and Gimelshein 2018; merging as in Ye et al. 2024, "FlashInfer", section 2.2 (there base 2).
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

namespace kvcache::inline v0 {

/// The running softmax of some query rows, in memory of the caller.
struct softmax_state {
  std::span<kernel::softmax_row> rows;  ///< [num_rows]
  std::span<float> sums;                ///< [num_rows, head_dim], not normalised

  [[nodiscard]] index_t head_dim() const noexcept {
    return rows.empty() ? 0 : static_cast<index_t>(sums.size() / rows.size());
  }
  [[nodiscard]] std::span<float> row_sums(std::size_t row) const noexcept {
    const auto dim = static_cast<std::size_t>(head_dim());
    return sums.subspan(row * dim, dim);
  }

  /// Nothing seen.
  void reset() const noexcept {
    for (kernel::softmax_row& row : rows) row = {-std::numeric_limits<float>::infinity(), 0.0F};
    for (float& x : sums) x = 0.0F;
  }

  /// Whether no sum is NaN or infinite.
  [[nodiscard]] bool all_finite() const noexcept {
    float probe = 0.0F;  // NaN once a product with zero was
    for (const kernel::softmax_row& row : rows) probe += row.sum * 0.0F;
    std::array<lanes::four_floats, 4> probes{};  // side by side: an addition waits for the one before it
    constexpr std::size_t step = 4 * lanes::width;
    std::size_t i = 0;
    for (; i + step <= sums.size(); i += step) {
      for (std::size_t p = 0; p < probes.size(); ++p)
        probes[p] += lanes::load_four(&sums[i + p * lanes::width]) * 0.0F;
    }
    for (; i < sums.size(); ++i) probe += sums[i] * 0.0F;
    const lanes::four_floats all = (probes[0] + probes[1]) + (probes[2] + probes[3]);
    return probe + ((all[0] + all[1]) + (all[2] + all[3])) == 0.0F;
  }

  /// Adds what `other` has seen; the keys must not overlap. \pre same shape
  void merge(const softmax_state& other) const noexcept {
    KVCACHE_ASSERT(rows.size() == other.rows.size() && sums.size() == other.sums.size(),
                   "merge: states must have one shape");
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const float max = rows[r].max < other.rows[r].max ? other.rows[r].max : rows[r].max;
      const float mine = weight(rows[r], max);
      const float theirs = weight(other.rows[r], max);
      rows[r] = {max, rows[r].sum * mine + other.rows[r].sum * theirs};
      const auto from = other.row_sums(r);
      const auto to = row_sums(r);
      lanes::transform(
          head_dim(), to.data(), [=](auto a, auto b) { return a * mine + b * theirs; }, to.data(),
          from.data());
    }
  }

  /// Normalised output of a row, [head_dim]; zero if it has seen nothing.
  /// \return its log-sum-exp, natural logarithm
  float finish(std::size_t row, std::span<float> out) const noexcept {
    const float sum = rows[row].sum;
    if (sum == 0.0F) {
      std::fill(out.begin(), out.end(), 0.0F);
      return -std::numeric_limits<float>::infinity();
    }
    lanes::transform(
        head_dim(), out.data(), [sum](auto x) { return x / sum; }, row_sums(row).data());
    return rows[row].max + std::log(sum);
  }

 private:
  /// exp(row.max - max), and 0 rather than NaN for a state that has seen nothing.
  static float weight(const kernel::softmax_row& row, float max) noexcept {
    return row.sum == 0.0F ? 0.0F : std::exp(row.max - max);
  }
};

/// Merges normalised partial results over disjoint keys, as different splits, segments or processes have them.
/// \param out, other_out  [num_rows, head_dim]; the result replaces `out`
/// \param lse, other_lse  [num_rows], natural logarithm, -infinity where a part saw nothing; replaces `lse`
inline void merge(std::span<float> out, std::span<float> lse, std::span<const float> other_out,
                  std::span<const float> other_lse) {
  KVCACHE_ASSERT(out.size() == other_out.size() && lse.size() == other_lse.size() &&
                     (lse.empty() ? out.empty() : out.size() % lse.size() == 0),
                 "merge: both parts must have one shape");
  const std::size_t dim = lse.empty() ? 0 : out.size() / lse.size();
  for (std::size_t r = 0; r < lse.size(); ++r) {
    if (other_lse[r] == -std::numeric_limits<float>::infinity()) continue;
    const float max = lse[r] < other_lse[r] ? other_lse[r] : lse[r];
    const float mine = std::exp(lse[r] - max);
    const float theirs = std::exp(other_lse[r] - max);
    for (std::size_t d = r * dim; d < (r + 1) * dim; ++d)
      out[d] = (out[d] * mine + other_out[d] * theirs) / (mine + theirs);
    lse[r] = max + std::log(mine + theirs);
  }
}

}  // namespace kvcache::inline v0
