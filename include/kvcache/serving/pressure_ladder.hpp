// SPDX-License-Identifier: MIT
// pressure_ladder: what a cache_manager does when bytes run short, in which order, how far, and how often it did.
//
//   0 ........ low ............ high ... limit ........ | kept free | budget
//               ^ frees down to here      ^ grows where that helps and there is memory
//                               ^ begins here
//
// The policy picks the block, the ladder its fate: the first rung that takes it.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/serving/observer.hpp>

#include <algorithm>
#include <array>
#include <cstddef>

namespace kvcache::inline v0::serving {

struct ladder_options {
  /// What is tried on a block, first to last. A rung that is not there is not climbed, nor is what stands
  /// behind refuse; so {rung::refuse} keeps everything that was ever released.
  std::array<rung, num_rungs> rungs = {rung::drop, rung::recode, rung::spill, rung::refuse};
  /// Part of the limit at which it begins. Re-encoding needs what it writes free between here and the budget, in
  /// slabs of few pages: those with a page in use stay with their pool.
  double high = 0.95;
  double low = 0.85;  ///< part of the limit down to which it frees, so that it does not begin again at once

  bool adapt =
      true;  ///< the three decisions below, told to the observer; off: rungs as they are, limit == budget
  index_t start_bytes = 0;     ///< the limit to begin with; 0: the budget
  double low_hit_rate = 0.5;   ///< below it, and where the budget has room, the limit grows instead
  double growth = 1.5;         ///< factor
  bool compress_first = true;  ///< recode and spill come before drop, wherever they stand
};

/// How often each rung was taken, and what for.
struct ladder_counts {
  std::array<index_t, num_rungs>
      times{};  ///< blocks dropped and spilled, sequences re-encoded, requests refused
  std::array<index_t, num_rungs> bytes{};  ///< freed; wanted, where refused

  [[nodiscard]] index_t of(rung r) const noexcept { return times[static_cast<std::size_t>(r)]; }
  void add(rung r, index_t freed) noexcept {
    ++times[static_cast<std::size_t>(r)];
    bytes[static_cast<std::size_t>(r)] += freed;
  }
};

/// Part of the tokens asked for that were cached; recent lookups weigh more.
class recent_hit_rate {
 public:
  void add(index_t asked, index_t hit) noexcept {
    asked_ = kept * asked_ + static_cast<double>(asked);
    hit_ = kept * hit_ + static_cast<double>(hit);
  }
  /// 0 before the first lookup.
  [[nodiscard]] double value() const noexcept { return asked_ > 0 ? hit_ / asked_ : 0; }

 private:
  static constexpr double kept = 0.98;  // of a lookup's weight, when the next one comes
  double asked_ = 0;
  double hit_ = 0;
};

/// Order, marks and limit.
class pressure_ladder {
 public:
  /// Throws shape_error unless 0 < low <= high <= 1, growth > 1 and no rung stands there twice.
  pressure_ladder(const ladder_options& options, index_t budget) : options_(options), budget_(budget) {
    if (!(0 < options.low && options.low <= options.high && options.high <= 1))
      throw shape_error("kvcache: the marks of a ladder must be 0 < low <= high <= 1");
    if (!(options.growth > 1)) throw shape_error("kvcache: the growth of a ladder must be above 1");
    if (options.start_bytes < 0) throw shape_error("kvcache: start_bytes must not be negative");
    limit_ = adapts() && options.start_bytes > 0 ? std::min(options.start_bytes, budget) : budget;
    for (const rung r : options.rungs) {
      if (r == rung::refuse) break;
      order_[at(count_++)] = r;
    }
    if (adapts() && options.compress_first)
      std::stable_partition(order_.begin(), order_.begin() + count_, [](rung r) { return r != rung::drop; });
    for (index_t i = 0; i < count_; ++i)
      for (index_t j = 0; j < i; ++j)
        if (order_[at(i)] == order_[at(j)]) throw shape_error("kvcache: a rung stands in a ladder once");
    reordered_ = !std::equal(order_.begin(), order_.begin() + count_, options.rungs.begin());
  }

  [[nodiscard]] index_t num_rungs() const noexcept { return count_; }
  [[nodiscard]] rung at_step(index_t i) const noexcept { return order_[at(i)]; }
  /// Whether `r` is climbed before dropping.
  [[nodiscard]] bool before_drop(rung r) const noexcept {
    const auto end = order_.begin() + count_;
    return std::find(order_.begin(), end, r) < std::find(order_.begin(), end, rung::drop);
  }
  [[nodiscard]] bool adapts() const noexcept { return options_.adapt; }
  /// Whether compressing first has changed the order that was asked for.
  [[nodiscard]] bool reordered() const noexcept { return reordered_; }

  [[nodiscard]] index_t budget() const noexcept { return budget_; }
  /// Of the budget, what nothing that is held may take, and what remains.
  [[nodiscard]] index_t kept_free() const noexcept { return kept_free_; }
  [[nodiscard]] index_t most_bytes() const noexcept { return budget_ - kept_free_; }
  void keep_free(index_t bytes) noexcept { kept_free_ = bytes; }
  [[nodiscard]] index_t limit() const noexcept { return limit_; }
  [[nodiscard]] index_t high_mark() const noexcept { return part_of_limit(options_.high); }
  [[nodiscard]] index_t low_mark() const noexcept { return part_of_limit(options_.low); }

  /// Grows the limit where hits are few and the budget has room. \return whether it did
  bool grow(double hit_rate) noexcept {
    if (!adapts() || hit_rate >= options_.low_hit_rate || limit_ >= budget_) return false;
    limit_ = std::min(budget_, static_cast<index_t>(static_cast<double>(limit_) * options_.growth) + 1);
    return true;
  }
  /// The limit is at least this, as nothing else helped. \pre bytes <= budget()
  void raise_to(index_t bytes) noexcept { limit_ = std::max(limit_, bytes); }

 private:
  static std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] index_t part_of_limit(double part) const noexcept {
    return static_cast<index_t>(static_cast<double>(std::min(limit_, most_bytes())) * part);
  }

  ladder_options options_;
  std::array<rung, serving::num_rungs> order_{};
  index_t count_ = 0;
  index_t budget_;
  index_t kept_free_ = 0;
  index_t limit_ = 0;
  bool reordered_ = false;
};

}  // namespace kvcache::inline v0::serving
