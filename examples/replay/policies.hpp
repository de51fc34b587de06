// SPDX-License-Identifier: MIT
// Serves a trace from a cache of so many blocks, and counts the hits: once for each policy of the library.
#pragma once

#include "replay/trace.hpp"

#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/concepts.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace replay {

enum class style {
  server,  ///< the blocks of a request are stored head first, know their parents, and are pinned while it runs
  tail_first,  ///< what simulators do: after a request its blocks are used from the tail, nothing else is known
};

/// Blocks of the request up to the first that is missing: a block behind a gap cannot be hit.
template <kvcache::eviction::block_policy Policy>
[[nodiscard]] index_t prefix_hits(const Policy& policy, const request& blocks) {
  const auto missing =
      std::find_if(blocks.begin(), blocks.end(), [&](block_key key) { return !policy.contains(key); });
  return missing - blocks.begin();
}

/// What a block's recomputation costs, where the first one's is 1: attention over the blocks before it comes on
/// top of the matrices, which cost as much for every block.
[[nodiscard]] inline double recompute_cost(index_t depth) {
  constexpr double blocks_until_double = 32;
  return 1 + static_cast<double>(depth) / blocks_until_double;
}

/// One request as a server runs it. A cache that is full of pinned blocks leaves the rest of the request out.
template <kvcache::eviction::block_policy Policy>
index_t serve(Policy& policy, const request& blocks) {
  const index_t hits = prefix_hits(policy, blocks);
  index_t num_held = 0;
  for (const block_key key : blocks) {
    if (num_held < hits) {
      policy.touch(key);
    } else {
      if (policy.size() == policy.capacity() && !policy.evict()) break;
      kvcache::eviction::block_info info{.recompute_cost = recompute_cost(num_held)};
      if (num_held > 0) info.parent = blocks[static_cast<std::size_t>(num_held) - 1];
      if (!policy.insert(key, info)) break;
    }
    policy.pin(key);
    ++num_held;
  }
  while (num_held > 0) policy.unpin(blocks[static_cast<std::size_t>(--num_held)]);
  return hits;
}

/// The same as simulators do it.
template <kvcache::eviction::block_policy Policy>
index_t use_tail_first(Policy& policy, const request& blocks) {
  const index_t hits = prefix_hits(policy, blocks);
  for (auto key = blocks.rbegin(); key != blocks.rend(); ++key) {
    if (policy.touch(*key)) continue;
    if (policy.size() == policy.capacity()) policy.evict();
    policy.insert(*key, {.recompute_cost = recompute_cost(blocks.rend() - key - 1)});
  }
  return hits;
}

/// \return blocks that were hit
template <kvcache::eviction::block_policy Policy>
[[nodiscard]] index_t hits_of(const trace& t, index_t capacity, style how) {
  Policy policy(capacity);
  index_t hits = 0;
  for (const request& blocks : t.requests)
    hits += how == style::server ? serve(policy, blocks) : use_tail_first(policy, blocks);
  policy.check();
  return hits;
}

struct named_policy {
  std::string_view name;
  index_t (*hits)(const trace& t, index_t capacity, style how);
};

[[nodiscard]] inline const std::vector<named_policy>& policies() {
  namespace eviction = kvcache::eviction;
  static const std::vector<named_policy> list{
      {eviction::lru::name, hits_of<eviction::lru>},
      {eviction::arc::name, hits_of<eviction::arc>},
      {eviction::s3_fifo::name, hits_of<eviction::s3_fifo>},
      {eviction::priority::name, hits_of<eviction::priority>},
  };
  return list;
}

}  // namespace replay
