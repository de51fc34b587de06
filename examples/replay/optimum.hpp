// SPDX-License-Identifier: MIT
// optimum: the most blocks a cache could have hit, had it known the trace in advance.
//
// After each request it keeps, of what it had and what came, the blocks that are used again soonest; nothing has to be
// stored. Where every block has one block before it, as in chains, a block is never wanted sooner than its parent, so
// what is kept is whole prefixes, and no policy can hit more.
// Source: Belady 1966, "A Study of Replacement Algorithms for a Virtual-Storage Computer" (MIN).
#pragma once

#include "replay/trace.hpp"

#include <cstddef>
#include <iterator>
#include <limits>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace replay {

class optimum {
 public:
  /// Looks up for every block of every request which request uses it next. O(blocks).
  explicit optimum(const trace& t) {
    std::unordered_map<block_key, std::size_t> ids;
    for (const request& r : t.requests) {
      uses_.emplace_back();
      for (const block_key key : r)
        uses_.back().push_back({ids.emplace(key, ids.size()).first->second, never});
    }
    num_different_ = ids.size();
    std::vector<index_t> next(num_different_, never);
    for (std::size_t i = uses_.size(); i-- > 0;) {
      for (use& u : uses_[i]) u.next = std::exchange(next[u.block], static_cast<index_t>(i));
    }
  }

  /// \return blocks that were hit. O(blocks * log(capacity)).
  [[nodiscard]] index_t hits(index_t capacity) const {
    std::set<kept> cache;  // those to keep in front
    std::vector<kept> place(num_different_, kept{never, 0, 0});
    index_t count = 0;
    for (const auto& request_uses : uses_) {
      bool prefix = true;
      for (const use& u : request_uses) {
        prefix = prefix && cache.contains(place[u.block]);
        count += prefix ? 1 : 0;
      }
      for (std::size_t i = 0; i < request_uses.size(); ++i) {
        const use& u = request_uses[i];
        cache.erase(place[u.block]);
        place[u.block] = {u.next, i, u.block};
        if (u.next != never) cache.insert(place[u.block]);
      }
      while (static_cast<index_t>(cache.size()) > capacity) cache.erase(std::prev(cache.end()));
    }
    return count;
  }

 private:
  static constexpr index_t never = std::numeric_limits<index_t>::max();

  struct use {
    std::size_t block;
    index_t next;  // request
  };
  struct kept {
    index_t next;       // request
    std::size_t depth;  // in its chain
    std::size_t block;

    friend bool operator<(const kept& a, const kept& b) {
      return std::tie(a.next, a.depth, a.block) < std::tie(b.next, b.depth, b.block);
    }
  };

  std::vector<std::vector<use>> uses_;  // [requests][blocks]
  std::size_t num_different_ = 0;
};

}  // namespace replay
