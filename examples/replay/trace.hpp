// SPDX-License-Identifier: MIT
// A trace: what was asked of a prefix cache, request by request, as the keys of blocks.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/eviction/concepts.hpp>

#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

namespace replay {

using kvcache::index_t;
using kvcache::eviction::block_key;

/// The blocks of one request, head first: system prompt, earlier turns, the new question. No key twice.
using request = std::vector<block_key>;

struct trace {
  std::string name;
  std::vector<request> requests;  ///< in order of arrival

  [[nodiscard]] index_t num_blocks() const {
    index_t count = 0;
    for (const request& r : requests) count += static_cast<index_t>(r.size());
    return count;
  }
};

/// What the cache of a server that never forgets would have hit.
struct trace_summary {
  index_t num_blocks = 0;     ///< asked for
  index_t num_different = 0;  ///< capacity that holds everything
  index_t most_hits = 0;
};

[[nodiscard]] inline trace_summary summarize(const trace& t) {
  trace_summary sum{.num_blocks = t.num_blocks()};
  std::unordered_set<block_key> seen;
  for (const request& r : t.requests) {
    const auto missing = std::find_if(r.begin(), r.end(), [&](block_key key) { return !seen.contains(key); });
    sum.most_hits += missing - r.begin();
    seen.insert(r.begin(), r.end());
  }
  sum.num_different = static_cast<index_t>(seen.size());
  return sum;
}

}  // namespace replay
