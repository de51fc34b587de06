// SPDX-License-Identifier: MIT
// metrics: counters and gauges of a manager as one plain value, and the observer that fills them.
//
//   cache_manager<page_pool<>, eviction::lru, no_cold_pool, no_spill_tier, metrics_recorder> manager(pool, options);
//   const metrics before = manager.observer().values;
//   const metrics minute = manager.observer().values - before;   // rates of an interval
//   const metrics all = manager_a + manager_b;                                                        // of two managers
//
// Counters stop at their largest value and never wrap; differences stop at 0.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/serving/observer.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

namespace kvcache::inline v0::serving {

namespace detail {

constexpr std::uint64_t saturating_add(std::uint64_t a, std::uint64_t b) noexcept {
  return a + b < a ? std::numeric_limits<std::uint64_t>::max() : a + b;
}
constexpr std::uint64_t saturating_subtract(std::uint64_t a, std::uint64_t b) noexcept {
  return a > b ? a - b : 0;
}
/// \pre neither is negative
constexpr index_t saturating_add(index_t a, index_t b) noexcept {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  return a > most - b ? most : a + b;
}

/// What was reported, as a count: below 0 it is 0.
constexpr std::uint64_t as_count(index_t value) noexcept {
  return value > 0 ? static_cast<std::uint64_t>(value) : 0;
}
/// Seconds as nanoseconds; NaN and less than nothing are 0.
constexpr std::uint64_t as_nanoseconds(double seconds) noexcept {
  if (!(seconds > 0)) return 0;
  const double nanoseconds = seconds * 1e9 + 0.5;
  return nanoseconds >= 0x1p64 ? std::numeric_limits<std::uint64_t>::max()
                               : static_cast<std::uint64_t>(nanoseconds);
}

/// part / whole, or nothing where there is no whole.
constexpr std::optional<double> ratio(double part, double whole) noexcept {
  return whole > 0 ? std::optional(part / whole) : std::nullopt;
}

}  // namespace detail

/// How often values of about which size came: bucket 0 has 0 and 1, bucket i the values above 2^(i-1) up to 2^i, the
/// last one all that are larger.
struct log2_histogram {
  static constexpr std::size_t num_bounds = 24;  ///< 1, 2, 4 ... 2^23
  std::array<std::uint64_t, num_bounds + 1> counts{};
  std::uint64_t sum = 0;  ///< of the values

  static constexpr std::uint64_t bound(std::size_t bucket) noexcept { return std::uint64_t{1} << bucket; }

  /// Negative values count as 0.
  constexpr void add(index_t value) noexcept {
    const std::uint64_t v = detail::as_count(value);
    const std::size_t bucket = v <= 1 ? 0 : static_cast<std::size_t>(std::bit_width(v - 1));
    std::uint64_t& count = counts[std::min(bucket, num_bounds)];
    count = detail::saturating_add(count, 1);
    sum = detail::saturating_add(sum, v);
  }

  [[nodiscard]] constexpr std::uint64_t count() const noexcept {
    std::uint64_t total = 0;
    for (const std::uint64_t n : counts) total = detail::saturating_add(total, n);
    return total;
  }

  /// The bound that at least `part` of the values do not exceed, 2^24 for those past the last one; nothing where there
  /// are no values. \pre `0 <= part <= 1`
  [[nodiscard]] constexpr std::optional<std::uint64_t> quantile(double part) const noexcept {
    const auto total = static_cast<double>(count());
    if (total == 0) return std::nullopt;
    std::uint64_t seen = 0;
    for (std::size_t bucket = 0; bucket < num_bounds; ++bucket) {
      seen = detail::saturating_add(seen, counts[bucket]);
      if (seen > 0 && static_cast<double>(seen) >= part * total) return bound(bucket);
    }
    return bound(num_bounds);
  }

  friend constexpr bool operator==(const log2_histogram&, const log2_histogram&) = default;
};

/// Bytes now; see cache_manager and page_pool::bytes(). None is negative.
struct memory_gauges {
  index_t live = 0;    ///< held by sequences and kept prefixes, those that several refer to once
  index_t slack = 0;   ///< part of `live` that holds no token; gauges_of: free pages only
  index_t shared = 0;  ///< part of `live` that several sequences refer to
  index_t budget = 0;  ///< most that may be held; 0: no limit
  index_t exact = 0;   ///< what the tokens in `live` would take in bf16; 0: not known

  friend constexpr bool operator==(const memory_gauges&, const memory_gauges&) = default;
};

/// A step of the pressure ladder.
struct rung_counts {
  std::uint64_t count = 0;
  std::uint64_t bytes = 0;  ///< freed; of refuse: asked for in vain

  friend constexpr bool operator==(const rung_counts&, const rung_counts&) = default;
};

/// Values that may be copied, compared, added and subtracted. Threads: as any plain struct.
struct metrics {
  memory_gauges memory;

  std::uint64_t lookups = 0;
  std::uint64_t tokens_asked = 0;
  std::uint64_t tokens_hit = 0;
  log2_histogram reuse_distance;   ///< ticks (lookups) between two uses of what was hit
  log2_histogram age_at_eviction;  ///< ticks since the last use of what went

  std::array<rung_counts, num_rungs> rungs{};  ///< by rung; see at()
  std::uint64_t recodes = 0;
  std::uint64_t recoded_bytes_before = 0;
  std::uint64_t recoded_bytes_after = 0;
  std::uint64_t spilled_bytes = 0;  ///< handed to the tier
  std::uint64_t decisions = 0;

  std::uint64_t tokens_appended = 0;
  std::uint64_t append_nanoseconds = 0;  ///< 0 where no clock is given
  std::uint64_t tokens_attended = 0;
  std::uint64_t attend_nanoseconds = 0;

  [[nodiscard]] constexpr rung_counts& at(rung r) noexcept { return rungs[static_cast<std::size_t>(r)]; }
  [[nodiscard]] constexpr const rung_counts& at(rung r) const noexcept {
    return rungs[static_cast<std::size_t>(r)];
  }

  /// Tokens hit of those asked for, 0 to 1; nothing where none was asked for.
  [[nodiscard]] constexpr std::optional<double> hit_rate() const noexcept {
    return detail::ratio(static_cast<double>(tokens_hit), static_cast<double>(tokens_asked));
  }
  /// Bytes of the tokens in bf16 over the bytes they take; nothing where either is not known.
  [[nodiscard]] constexpr std::optional<double> compression_ratio() const noexcept {
    if (memory.exact <= 0) return std::nullopt;
    return detail::ratio(static_cast<double>(memory.exact), static_cast<double>(memory.live - memory.slack));
  }
  [[nodiscard]] constexpr std::optional<double> append_tokens_per_second() const noexcept {
    return detail::ratio(1e9 * static_cast<double>(tokens_appended), static_cast<double>(append_nanoseconds));
  }
  [[nodiscard]] constexpr std::optional<double> attend_tokens_per_second() const noexcept {
    return detail::ratio(1e9 * static_cast<double>(tokens_attended), static_cast<double>(attend_nanoseconds));
  }

  /// Both together, as of two managers. O(1), as all here.
  friend constexpr metrics operator+(metrics a, const metrics& b) noexcept {
    using detail::saturating_add;
    a.memory = {saturating_add(a.memory.live, b.memory.live), saturating_add(a.memory.slack, b.memory.slack),
                saturating_add(a.memory.shared, b.memory.shared),
                saturating_add(a.memory.budget, b.memory.budget),
                saturating_add(a.memory.exact, b.memory.exact)};
    a.for_each_counter(b, [](std::uint64_t& x, std::uint64_t y) { x = saturating_add(x, y); });
    return a;
  }

  /// What was counted between `earlier` and `later`; the gauges are the later ones.
  friend constexpr metrics operator-(metrics later, const metrics& earlier) noexcept {
    later.for_each_counter(earlier,
                           [](std::uint64_t& x, std::uint64_t y) { x = detail::saturating_subtract(x, y); });
    return later;
  }

  friend constexpr bool operator==(const metrics&, const metrics&) = default;

 private:
  /// change(counter, the same of `other`) for every counter there is.
  template <class Change>
  constexpr void for_each_counter(const metrics& other, Change change) noexcept {
    for (const auto counter :
         {&metrics::lookups, &metrics::tokens_asked, &metrics::tokens_hit, &metrics::recodes,
          &metrics::recoded_bytes_before, &metrics::recoded_bytes_after, &metrics::spilled_bytes,
          &metrics::decisions, &metrics::tokens_appended, &metrics::append_nanoseconds,
          &metrics::tokens_attended, &metrics::attend_nanoseconds})
      change(this->*counter, other.*counter);
    for (const auto histogram : {&metrics::reuse_distance, &metrics::age_at_eviction}) {
      for (std::size_t i = 0; i <= log2_histogram::num_bounds; ++i)
        change((this->*histogram).counts[i], (other.*histogram).counts[i]);
      change((this->*histogram).sum, (other.*histogram).sum);
    }
    for (std::size_t i = 0; i < rungs.size(); ++i) {
      change(rungs[i].count, other.rungs[i].count);
      change(rungs[i].bytes, other.rungs[i].bytes);
    }
  }
};

static_assert(std::is_trivially_copyable_v<metrics>);

/// The observer (serving/observer.hpp) that fills metrics. Gauges are not reported, they are asked for: set `values.memory`
/// before you look (serving/gauges.hpp). No member allocates or throws. Threads: as what reports to it.
struct metrics_recorder {
  metrics values;

  constexpr void on_lookup(index_t tokens_asked, index_t tokens_hit) noexcept {
    count(values.lookups, 1);
    count(values.tokens_asked, tokens_asked);
    count(values.tokens_hit, tokens_hit);
  }
  constexpr void on_append(index_t tokens, double seconds) noexcept {
    count(values.tokens_appended, tokens);
    count_time(values.append_nanoseconds, seconds);
  }
  constexpr void on_attend(index_t tokens, double seconds) noexcept {
    count(values.tokens_attended, tokens);
    count_time(values.attend_nanoseconds, seconds);
  }
  constexpr void on_evict(rung by, index_t bytes, index_t age_ticks) noexcept {
    count(values.at(by).count, 1);
    count(values.at(by).bytes, bytes);
    values.age_at_eviction.add(age_ticks);
  }
  constexpr void on_reuse(index_t distance_ticks) noexcept { values.reuse_distance.add(distance_ticks); }
  constexpr void on_recode(index_t bytes_before, index_t bytes_after) noexcept {
    count(values.recodes, 1);
    count(values.recoded_bytes_before, bytes_before);
    count(values.recoded_bytes_after, bytes_after);
  }
  constexpr void on_refuse(index_t bytes) noexcept {
    count(values.at(rung::refuse).count, 1);
    count(values.at(rung::refuse).bytes, bytes);
  }
  constexpr void on_spill(index_t bytes) noexcept { count(values.spilled_bytes, bytes); }
  constexpr void on_decision(decision /*what*/, index_t /*amount*/, double /*measure*/) noexcept {
    count(values.decisions, 1);
  }

 private:
  static constexpr void count(std::uint64_t& counter, index_t more) noexcept {
    counter = detail::saturating_add(counter, detail::as_count(more));
  }
  static constexpr void count_time(std::uint64_t& counter, double seconds) noexcept {
    counter = detail::saturating_add(counter, detail::as_nanoseconds(seconds));
  }
};

}  // namespace kvcache::inline v0::serving
