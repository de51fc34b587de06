// SPDX-License-Identifier: MIT
// The most blocks that any cache could have hit on a trace, known to its end. Two ways, both slow. Uses nothing of the
// library.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

namespace oracle {

using request = std::vector<std::uint64_t>;  ///< keys of the blocks of one chain, head first
using block_set = std::set<std::uint64_t>;

/// Blocks of the request that are hit: those before the first that is not there.
inline std::ptrdiff_t prefix_hits(const request& r, const block_set& cached) {
  return std::find_if(r.begin(), r.end(), [&](auto k) { return cached.count(k) == 0; }) - r.begin();
}

/// Belady's MIN with bypass: after each request, of what is cached and what the request had, keep the blocks that are
/// used again soonest; of those used again by one request the ones nearer to its head.
inline std::ptrdiff_t belady_hits(const std::vector<request>& trace, std::size_t capacity) {
  block_set cached;
  std::ptrdiff_t hits = 0;
  for (std::size_t now = 0; now < trace.size(); ++now) {
    hits += prefix_hits(trace[now], cached);
    cached.insert(trace[now].begin(), trace[now].end());
    std::vector<std::pair<std::pair<std::size_t, std::ptrdiff_t>, std::uint64_t>> wanted;
    for (const auto k : cached) {
      for (std::size_t next = now + 1; next < trace.size(); ++next) {
        const auto at = std::find(trace[next].begin(), trace[next].end(), k);
        if (at == trace[next].end()) continue;
        wanted.push_back({{next, at - trace[next].begin()}, k});
        break;
      }
    }
    std::sort(wanted.begin(), wanted.end());
    if (wanted.size() > capacity) wanted.resize(capacity);
    cached.clear();
    for (const auto& [when, k] : wanted) cached.insert(k);
  }
  return hits;
}

/// Tries every set of blocks that could be kept after every request. For traces of a handful of blocks.
inline std::ptrdiff_t exhaustive_hits(const std::vector<request>& trace, std::size_t capacity,
                                      std::size_t now = 0, const block_set& cached = {}) {
  if (now == trace.size()) return 0;
  block_set pool = cached;
  pool.insert(trace[now].begin(), trace[now].end());
  const std::vector<std::uint64_t> blocks(pool.begin(), pool.end());
  std::ptrdiff_t best = 0;
  for (std::uint64_t kept = 0; kept < std::uint64_t{1} << blocks.size(); ++kept) {
    block_set next;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      if ((kept >> i & 1) != 0) next.insert(blocks[i]);
    }
    // More is never worse, so only full sets are tried.
    if (next.size() == std::min(capacity, blocks.size()))
      best = std::max(best, exhaustive_hits(trace, capacity, now + 1, next));
  }
  return prefix_hits(trace[now], cached) + best;
}

}  // namespace oracle
