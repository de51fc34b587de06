// SPDX-License-Identifier: MIT
// live_sequence: a sequence of a cache_manager that is in use, and how it gets at what is stored in another form.
//
//   prompt   | stored as it is: forked | in the cold pool: decoded | in the tier: restored | to be computed |
#pragma once

#include <kvcache/cache/recoded.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/serving/observer.hpp>
#include <kvcache/serving/prefix_index.hpp>
#include <kvcache/serving/spill_tier.hpp>

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <new>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0::serving::detail {

/// Memory that is about to be taken.
struct demand {
  index_t pages = 0;        ///< of the warm pool
  index_t table_pages = 0;  ///< the length that a page table grows to; 0: no table does
  bool new_table = false;
  index_t other = 0;  ///< bytes
};

/// A sequence of a cache_manager that is in use.
template <class Cache, class Policy>
struct live_sequence {
  live_sequence(Cache sequence, const prefix_space& s, std::pmr::memory_resource* memory)
      : cache(std::move(sequence)), tokens(memory), space(s, memory) {}

  Cache cache;
  std::pmr::vector<token_id> tokens;
  stored_space space;
  typename prefix_index<Cache, Policy>::lease held;  // what it was forked from
  index_t own_bytes = 0;
  double append_seconds = 0;  // of the layers so far
};

/// What appending rows [from, last) may take.
template <class Released>
demand demand_of(const Released& released, const typename Released::live_sequence& s, index_t from,
                 index_t last) noexcept {
  const auto& warm = released.warm;
  const std::span<const page_id> table = s.cache.storage().page_table();
  const auto present = static_cast<index_t>(table.size());
  const index_t needed = warm.pages_for(last);
  index_t pages = std::max(needed - present, index_t{0});
  for (index_t i = from / s.cache.shape().block_size; i < std::min(needed, present); ++i)
    pages += warm.pool.ref_count(table[static_cast<std::size_t>(i)]) > 1 ? 1 : 0;
  return {.pages = pages,
          .table_pages = pages > 0 ? needed : 0,
          .other = std::max(warm.sequence_bytes - s.cache.own_bytes(), index_t{0})};
}

/// Makes a place for the ids of so many tokens. \return out_of_pages or out_of_memory, then nothing changed
template <class Released>
status reserve_ids(Released& released, typename Released::live_sequence& s, index_t num_tokens) {
  const auto capacity = static_cast<std::size_t>(num_tokens);
  if (capacity <= s.tokens.capacity()) return status::ok;
  if (const status code = released.ensure({.other = num_tokens * index_t{sizeof(token_id)}});
      code != status::ok)
    return code;
  try {
    s.tokens.reserve(capacity);
  } catch (const std::bad_alloc&) {
    return status::out_of_memory;
  }
  return status::ok;
}

/// Pages of the live sequences, each once. Two of them share what their tables begin with, and nothing behind it.
template <class LiveMap>
index_t live_pages(const LiveMap& live) noexcept {
  index_t pages = 0;
  for (auto s = live.begin(); s != live.end(); ++s) {
    const auto table = s->second.cache.storage().page_table();
    std::ptrdiff_t shared = 0;
    for (auto other = live.begin(); other != s; ++other) {
      const auto theirs = other->second.cache.storage().page_table();
      const auto end = std::mismatch(table.begin(), table.end(), theirs.begin(), theirs.end()).first;
      shared = std::max(shared, end - table.begin());
    }
    pages += std::ssize(table) - shared;
  }
  return pages;
}

/// Decodes what is stored in the cold pool only. \return tokens
template <class Released>
index_t recall([[maybe_unused]] Released& released, [[maybe_unused]] typename Released::live_sequence& s,
               [[maybe_unused]] std::span<const token_id> wanted) {
  if constexpr (Released::has_cold) {
    auto& index = released.cold.index;
    const prefix_space space = s.space.view();
    const index_t have = s.cache.size();
    auto held = index.hold(space, wanted);
    const index_t stored = index.longest(space, wanted);
    if (stored <= have || !released.make_room(demand_of(released, s, have, stored))) return 0;
    try {
      kvcache::detail::append_tokens(*index.peek(space, wanted), s.cache, have, stored);
    } catch (const std::bad_alloc&) {
      s.cache.truncate(have);
      return 0;
    } catch (const capacity_error&) {
      s.cache.truncate(have);
      return 0;
    }
    held.release();
    (void)index.erase(space, wanted.first(static_cast<std::size_t>(stored)));
    tell_decision(released.observer, decision::recall, stored - have,
                  static_cast<double>(stored - have) / static_cast<double>(wanted.size()));
    return stored - have;
  } else {
    return 0;
  }
}

/// Brings blocks back from the tier, as far as it has them. \return tokens
template <class Released>
index_t restore([[maybe_unused]] Released& released, [[maybe_unused]] typename Released::live_sequence& s,
                [[maybe_unused]] std::span<const token_id> wanted) {
  index_t restored = 0;
  if constexpr (Released::has_tier) {
    const cache_shape shape = s.cache.shape();
    auto* tier = released.tier;
    try {
      for (index_t have = s.cache.size(); tier != nullptr; have = s.cache.size()) {
        const index_t first = have / shape.block_size * shape.block_size;
        const index_t last = first + shape.block_size;
        if (last > static_cast<index_t>(wanted.size())) break;
        const auto path = wanted.first(static_cast<std::size_t>(last));
        if (!tier->contains(s.space.view(), path) || !released.make_room(demand_of(released, s, have, last)))
          break;
        std::vector<std::byte> bytes(most_spilled_bytes(shape, shape.block_size));
        const index_t size = tier->get(s.space.view(), path, bytes);
        if (size < 0) break;
        const std::size_t valid = std::min(static_cast<std::size_t>(size), bytes.size());
        const auto rows = std::span<const std::byte>(bytes).first(valid);
        if (!are_spilled(shape, shape.block_size, rows)) {
          tier->erase(s.space.view(), path);
          break;
        }
        if (append_spilled(s.cache, rows, shape.block_size, have - first) != status::ok) break;
        restored += last - have;
      }
    } catch (const std::bad_alloc&) {  // what was restored so far is there
    }
  }
  return restored;
}

}  // namespace kvcache::inline v0::serving::detail
