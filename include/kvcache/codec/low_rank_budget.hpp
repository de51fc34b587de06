// SPDX-License-Identifier: MIT
// How low_rank shares a budget of bytes out over layers: each has a list of layouts it may have, what they take and what
// error they leave, and the bytes go where they save the most.
//
//   error |.                      Of each layer the lower convex hull counts. Steps along all hulls are taken, the steepest
//         | `.   .                first, as long as they fit: the least sum of errors that some budget between this one
//         |   `-._  .             and one step less could have.
//         |       `--.____
//         +---------------- bytes
//
// Source: Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
#pragma once

#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

namespace kvcache::inline v0::codec::detail {

/// The choices that are worth their bytes at some price of a byte: falling error, ever flatter, by rising bytes.
/// O(n log n). \pre there is one
inline std::vector<layout_choice> lower_hull(std::vector<layout_choice> choices) {
  std::sort(choices.begin(), choices.end(), [](const layout_choice& a, const layout_choice& b) {
    return a.bytes != b.bytes ? a.bytes < b.bytes : a.error < b.error;
  });
  std::vector<layout_choice> hull;
  for (const layout_choice& next : choices) {
    if (!hull.empty() && !(next.error < hull.back().error)) continue;  // more bytes for nothing
    while (hull.size() > 1) {
      const layout_choice& before = hull[hull.size() - 2];
      const layout_choice& last = hull.back();
      const double gained = (before.error - last.error) * static_cast<double>(next.bytes - before.bytes);
      if (gained > (before.error - next.error) * static_cast<double>(last.bytes - before.bytes)) break;
      hull.pop_back();  // on or above the line from the one before to the next
    }
    hull.push_back(next);
  }
  return hull;
}

/// One choice for each layer, together at most `budget` bytes; nothing if the smallest ones take more.
/// \param hulls  for each layer its lower_hull
inline std::vector<layout_choice> share_out(std::span<const std::vector<layout_choice>> hulls,
                                            double budget) {
  std::vector<std::size_t> at(hulls.size(), 0);
  double bytes = 0;
  for (const auto& hull : hulls) bytes += static_cast<double>(hull.front().bytes);
  if (bytes > budget) return {};
  for (;;) {
    std::size_t steepest = hulls.size();
    double best = 0;
    for (std::size_t i = 0; i < hulls.size(); ++i) {
      if (at[i] + 1 >= hulls[i].size()) continue;
      const layout_choice& now = hulls[i][at[i]];
      const layout_choice& next = hulls[i][at[i] + 1];
      const auto more = static_cast<double>(next.bytes - now.bytes);
      if (bytes + more > budget || (now.error - next.error) / more <= best) continue;
      best = (now.error - next.error) / more;
      steepest = i;
    }
    if (steepest == hulls.size()) break;
    bytes -= static_cast<double>(hulls[steepest][at[steepest]].bytes);
    bytes += static_cast<double>(hulls[steepest][++at[steepest]].bytes);
  }
  std::vector<layout_choice> chosen;
  for (std::size_t i = 0; i < hulls.size(); ++i) chosen.push_back(hulls[i][at[i]]);
  return chosen;
}

}  // namespace kvcache::inline v0::codec::detail
