// SPDX-License-Identifier: MIT
// released_prefixes: the memory behind a cache_manager. Pools, the prefixes that released sequences have left in them,
// and the ladder that takes them away when bytes run short.
//
//   budget >= warm pool (pages, free slabs, tables) + cold pool + index of each + exact tails + live sequences' books
//             + room to work in, which is kept free: evicting, re-encoding and spilling begin where memory has run out
#pragma once

#include <kvcache/cache/paged.hpp>
#include <kvcache/cache/recoded.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/serving/counted_memory.hpp>
#include <kvcache/serving/live_sequence.hpp>
#include <kvcache/serving/observer.hpp>
#include <kvcache/serving/prefix_index.hpp>
#include <kvcache/serving/pressure_ladder.hpp>
#include <kvcache/serving/spill_tier.hpp>

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvcache::inline v0::serving {

/// No smaller codec to re-encode with.
struct no_cold_pool {};

namespace detail {

/// A pool and the prefixes stored in it.
template <class Pool, class Policy>
struct pooled_prefixes {
  using cache_type = decltype(std::declval<Pool&>().sequence());

  pooled_prefixes(const Pool& pages, std::pmr::memory_resource* memory)
      : pool(pages), index(pages.shape().block_size, {.num_blocks = 64, .memory = memory}) {
    const cache_type probe = pool.sequence();
    sequence_bytes = probe.own_bytes() + probe.tail_bytes();
    tail_bytes = probe.tail_bytes();
  }

  /// All of its memory, and that without free pages.
  [[nodiscard]] index_t bytes() const noexcept {
    return pool.allocated_bytes() + pool.books_bytes() + index.bytes();
  }
  [[nodiscard]] index_t used() const noexcept { return bytes() - free_bytes(); }
  [[nodiscard]] index_t free_bytes() const noexcept {
    return pool.allocated_bytes() - pool.num_in_use() * pool.page_bytes();
  }
  [[nodiscard]] index_t pages_for(index_t tokens) const noexcept {
    return (tokens + pool.shape().block_size - 1) / pool.shape().block_size;
  }
  /// The pool may allocate so many bytes more.
  void allow(index_t bytes) {
    pool.set_budget(std::max(pool.allocated_bytes() + std::max(bytes, index_t{0}), pool.page_bytes()));
  }

  Pool pool;
  prefix_index<cache_type, Policy> index;
  index_t sequence_bytes = 0;  // most that one takes besides pages and table
  index_t tail_bytes = 0;
};
template <class Policy>
struct pooled_prefixes<no_cold_pool, Policy> {
  pooled_prefixes(const no_cold_pool&, std::pmr::memory_resource*) noexcept {}
  static index_t bytes() noexcept { return 0; }
  static index_t used() noexcept { return 0; }
};

template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
class released_prefixes {
 public:
  static constexpr bool has_cold = !std::is_same_v<ColdPool, no_cold_pool>;
  static constexpr bool has_tier = !std::is_same_v<Tier, no_spill_tier>;
  using live_sequence = detail::live_sequence<decltype(std::declval<Pool&>().sequence()), Policy>;
  using warm_type = pooled_prefixes<Pool, Policy>;
  using cold_type = pooled_prefixes<ColdPool, Policy>;

  released_prefixes(const Pool& pool, const ladder_options& options, index_t budget,
                    const ColdPool& cold_pool, Tier* spill_to, Observer told,
                    std::pmr::memory_resource* upstream)
      : memory(upstream),
        warm(pool, upstream),
        cold(cold_pool, upstream),
        tier(spill_to),
        observer(std::move(told)),
        ladder(options, budget) {
    if constexpr (has_cold) {
      if (pool.shape() != cold_pool.shape())
        throw shape_error("kvcache: the cold pool needs the shape of the pool");
    }
    ladder.keep_free(work_bytes(longest));
  }

  /// Everything, to the byte; and that without pages which are free to be taken.
  [[nodiscard]] index_t bytes() const noexcept { return warm.bytes() + cold.bytes() + live_bytes(); }
  [[nodiscard]] index_t used() const noexcept { return warm.used() + cold.used() + live_bytes(); }
  [[nodiscard]] index_t live_bytes() const noexcept { return memory.bytes() + own_bytes; }

  /// What evicting, re-encoding, spilling, and getting at what was, work in at most; by the longest prefix that was
  /// stored: its tokens and blocks once more where edges are joined, and its tokens as a path, for the cold pool and
  /// meanwhile for the tier.
  [[nodiscard]] index_t work_bytes(index_t tokens) const noexcept {
    const cache_shape& shape = warm.pool.shape();
    const index_t path = tokens * index_t{sizeof(token_id)};
    index_t bytes = path + (tokens / shape.block_size + 1) * index_t{sizeof(void*)};
    index_t rows = 0;
    if constexpr (has_cold) {
      bytes += path;
      rows = kvcache::detail::append_tokens_bytes(shape, tokens);
    }
    if constexpr (has_tier) {
      if (tier != nullptr) {
        bytes += path;
        rows = std::max(rows, spill_work_bytes(shape, shape.block_size));
      }
    }
    return bytes + rows;
  }

  /// Makes sure that a demand can be met within the budget, climbing the ladder if need be.
  /// \return false if not; what was evicted until then stays so
  [[nodiscard]] bool make_room(const demand& d);
  /// The same for a caller who is told: a refusal is counted.
  [[nodiscard]] status ensure(const demand& d) {
    if (make_room(d)) return status::ok;
    const index_t missing = std::max(used() + more_used(d) - ladder.most_bytes(), index_t{1});
    counts.add(rung::refuse, missing);
    tell_refuse(observer, missing);
    return status::out_of_pages;
  }

  counted_memory memory;  // for the books of live sequences
  index_t own_bytes = 0;  // of live sequences
  warm_type warm;
  [[no_unique_address]] cold_type cold;
  Tier* tier;
  [[no_unique_address]] Observer observer;
  pressure_ladder ladder;
  ladder_counts counts;
  recent_hit_rate hits;
  index_t longest = 0;  // tokens of a prefix that was stored; for them the ladder keeps work_bytes free

 private:
  [[nodiscard]] index_t more_used(const demand& d) const noexcept {
    return d.pages * warm.pool.page_bytes() + d.other;
  }
  [[nodiscard]] index_t page_growth(const demand& d) const noexcept {
    return d.table_pages == 0 ? 0 : warm.pool.growth_bytes(d.pages, d.table_pages, d.new_table);
  }
  [[nodiscard]] bool fits_now(const demand& d);
  [[nodiscard]] bool fits(const demand& d);
  void release_free() noexcept {
    warm.pool.release_free();
    if constexpr (has_cold) cold.pool.release_free();
  }
  bool take_one();
  template <class From>
  bool take_one(From& from);
  template <class Victim>
  bool spill(const Victim& victim);
  template <class Victim>
  bool recode(Victim& victim);
};

/// Whether it can be met with the memory there is.
template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
bool released_prefixes<Pool, Policy, ColdPool, Tier, Observer>::fits_now(const demand& d) {
  // A whole slab if there is room, else no page more than needed.
  const index_t room = ladder.most_bytes() - bytes() - d.other;
  if (room < 0) return false;
  const index_t page = warm.pool.page_bytes();
  warm.allow(room);
  if (page_growth(d) <= room) return true;
  const index_t missing = d.pages - warm.free_bytes() / page;
  warm.allow(missing * page);
  return page_growth(d) <= room;
}

template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
bool released_prefixes<Pool, Policy, ColdPool, Tier, Observer>::fits(const demand& d) {
  if (fits_now(d)) return true;
  release_free();
  return fits_now(d);
}

template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
bool released_prefixes<Pool, Policy, ColdPool, Tier, Observer>::make_room(const demand& d) {
  const index_t more = more_used(d);
  const auto above = [&](index_t mark) { return used() + more > mark; };
  while (above(ladder.high_mark()) && ladder.grow(hits.value()))
    tell_decision(observer, decision::grow, ladder.limit(), hits.value());
  if (above(ladder.high_mark())) {
    if (ladder.reordered())
      tell_decision(observer, decision::compress_first, used() + more - ladder.low_mark(), hits.value());
    while (above(ladder.low_mark()) && take_one()) continue;
  }
  while (!fits(d))
    if (!take_one()) return false;
  if (above(ladder.limit())) ladder.raise_to(std::min(used() + more, ladder.budget()));
  return true;
}

/// One block of the policy's choice goes. \return false: none may, or no rung takes it
template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
bool released_prefixes<Pool, Policy, ColdPool, Tier, Observer>::take_one() {
  if constexpr (has_cold) {
    // What was re-encoded was used before what was not; but first all is re-encoded that can be.
    const bool warm_first = ladder.before_drop(rung::recode);
    if (warm_first && take_one(warm)) return true;
    if (take_one(cold)) return true;
    return !warm_first && take_one(warm);
  } else {
    return take_one(warm);
  }
}

template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
template <class From>
bool released_prefixes<Pool, Policy, ColdPool, Tier, Observer>::take_one(From& from) {
  if (ladder.num_rungs() == 0) return false;
  auto victim = from.index.next_victim();
  if (!victim) return false;
  const index_t before = from.used();
  const index_t age = victim->age();
  for (index_t i = 0; i < ladder.num_rungs(); ++i) {
    const rung r = ladder.at_step(i);
    if (r == rung::recode) {
      if constexpr (has_cold && std::is_same_v<From, warm_type>) {
        if (&from != &warm || !recode(*victim)) continue;  // the cold pool may be of the same type
        std::move(*victim).take();
      } else {
        continue;
      }
    } else if (r == rung::spill && !spill(*victim)) {
      continue;
    }
    victim.reset();
    const index_t freed = before - from.used();
    counts.add(r, freed);
    tell_evict(observer, r, freed, age);
    return true;
  }
  std::move(*victim).keep();
  return false;
}

/// Hands a block to the tier, unless that has it. One that is not whole could not be found again, and is not
/// handed over.
template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
template <class Victim>
bool released_prefixes<Pool, Policy, ColdPool, Tier, Observer>::spill([[maybe_unused]] const Victim& victim) {
  if constexpr (has_tier) {
    if (tier == nullptr) return false;
    if (victim.last() - victim.first() < warm.pool.shape().block_size) return true;
    try {
      const std::vector<token_id> path = victim.tokens();
      if (tier->contains(victim.space(), path)) return true;
      const std::vector<std::byte> rows = spilled_rows(victim.sequence(), victim.first(), victim.last());
      if (!tier->put(victim.space(), path, rows)) return false;
      tell_spill(observer, static_cast<index_t>(rows.size()));
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  } else {
    return false;
  }
}

/// Stores the victim's sequence in the cold pool as well, if what it has alone takes less there than it frees. What it
/// shares is stored there once, for all that begin alike and will follow it.
template <class Pool, class Policy, class ColdPool, class Tier, class Observer>
template <class Victim>
bool released_prefixes<Pool, Policy, ColdPool, Tier, Observer>::recode([[maybe_unused]] Victim& victim) {
  if constexpr (has_cold) {
    try {
      const std::vector<token_id> path = victim.tokens();
      const prefix_space space = victim.space();
      const auto size = static_cast<index_t>(path.size());
      const auto held = cold.index.hold(space, path);
      const index_t known = cold.index.longest(space, path);
      const index_t new_pages = cold.pages_for(size) - known / cold.pool.shape().block_size;
      const index_t alone_from = std::max(known, victim.alone_from());
      const index_t alone_pages = cold.pages_for(size) - alone_from / cold.pool.shape().block_size;
      const index_t takes = alone_pages * cold.pool.page_bytes() + cold.sequence_bytes;
      const index_t own_pages = warm.pages_for(size) - victim.alone_from() / warm.pool.shape().block_size;
      const index_t frees = own_pages * warm.pool.page_bytes() + victim.sequence().own_bytes();
      if (takes >= frees) {
        tell_decision(observer, decision::not_worth, takes, static_cast<double>(frees));
        return false;
      }
      const index_t books = cold.sequence_bytes + cold.index.growth_bytes(space, size);
      const auto growth = [&] { return cold.pool.growth_bytes(new_pages, cold.pages_for(size), true); };
      const auto has_room = [&] {
        const index_t room = ladder.most_bytes() - bytes() - books;
        cold.allow(room);
        if (room >= 0 && growth() > room) cold.allow(new_pages * cold.pool.page_bytes() - cold.free_bytes());
        return growth() <= room;
      };
      if (!has_room()) release_free();
      while (!has_room())
        if (!take_one(cold)) return false;
      const index_t pages_before = cold.pool.num_in_use();
      index_t after = 0;
      {
        auto hit = cold.index.match(space, path);
        auto lean = hit.sequence ? std::move(*hit.sequence) : cold.pool.sequence();
        kvcache::detail::append_tokens(victim.sequence(), lean, hit.size, size);
        hit.held.release();
        const index_t pages = std::min(cold.pool.num_in_use() - pages_before, alone_pages);
        after = lean.own_bytes() + pages * cold.pool.page_bytes();
        (void)cold.index.insert(space, path, std::move(lean));
      }
      tell_recode(observer, frees, after);
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    } catch (const capacity_error&) {
      return false;
    }
  } else {
    return false;
  }
}

}  // namespace detail
}  // namespace kvcache::inline v0::serving
