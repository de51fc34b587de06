// SPDX-License-Identifier: MIT
// arc: adaptive replacement, which balances blocks used once against blocks used again by its own mistakes.
//
//   ghosts of once [ ... ] <- once | again -> [ ... ] ghosts of again          once + again <= capacity
//                                target of `once`: up when a ghost of once returns, down for a ghost of again
//
// Source: Megiddo and Modha 2003, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (T1, T2, B1, B2 and p there).
// It evicts when it is asked to, before it is told what comes instead; so the target moves on `insert`. Blocks that
// may not go do not count against it.
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/block_directory.hpp>
#include <kvcache/eviction/block_queues.hpp>
#include <kvcache/eviction/concepts.hpp>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace kvcache::inline v0::eviction {

/// A block_policy (eviction/concepts.hpp says what the members do). Every call O(1). Remembers the keys of at most
/// `capacity` blocks that went.
class arc {
 public:
  static constexpr const char* name = "arc";

  explicit arc(index_t capacity) { set_capacity(capacity); }

  bool insert(block_key key, const block_info& info = {}) noexcept {
    if (touch(key)) return true;
    if (size() >= capacity_) return false;
    const slot_index ghost = blocks_.find(key);
    if (ghost != no_slot) adapt(order_.queue_of(ghost));
    const slot_index slot = blocks_.add(key, info.parent);
    order_.push_before(blocks_.parent_of(slot), ghost == no_slot ? once : again, slot);
    forget_oldest();
    return true;
  }

  bool touch(block_key key) noexcept {
    const slot_index slot = blocks_.find_present(key);
    if (slot != no_slot) order_.push(again, slot);
    return slot != no_slot;
  }

  std::optional<block_key> evict() noexcept {
    const queue first = order_.in_line(once) > target_ ? once : again;
    slot_index slot = oldest(first);
    if (slot == no_slot) slot = oldest(first == once ? again : once);
    if (slot == no_slot) return std::nullopt;
    const block_key key = blocks_.key(slot);
    order_.push(order_.queue_of(slot) == once ? ghosts_of_once : ghosts_of_again, slot);
    order_.unpark(blocks_.make_ghost(slot));
    forget_oldest();
    return key;
  }

  /// Forgets that the block went, too; false then.
  bool erase(block_key key) noexcept {
    const slot_index slot = blocks_.find(key);
    if (slot == no_slot) return false;
    const bool present = blocks_.is_present(slot);
    KVCACHE_ASSERT(!blocks_.is_pinned(slot), "erase: unpin the block first");
    remove(slot);
    return present;
  }

  void pin(block_key key) noexcept { blocks_.pin(key); }
  void unpin(block_key key) noexcept { order_.unpark(blocks_.unpin(key)); }

  /// Throws shape_error, std::bad_alloc.
  void set_capacity(index_t capacity);

  [[nodiscard]] bool contains(block_key key) const noexcept { return blocks_.find_present(key) != no_slot; }
  [[nodiscard]] index_t size() const noexcept { return blocks_.num_present(); }
  [[nodiscard]] index_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] index_t num_pinned() const noexcept { return blocks_.num_pinned(); }
  /// Memory of its books, in bytes. O(1).
  [[nodiscard]] index_t bytes() const noexcept { return blocks_.bytes() + order_.bytes(); }
  [[nodiscard]] index_t num_ghosts() const noexcept { return blocks_.num_ghosts(); }

  void check() const;

 private:
  enum queue : std::uint8_t { once, again, ghosts_of_once, ghosts_of_again };

  slot_index oldest(queue q) noexcept {
    return order_.oldest_that(q, [&](slot_index s) { return blocks_.may_go(s); });
  }
  void remove(slot_index slot) noexcept {
    order_.remove(slot);
    order_.unpark(blocks_.remove(slot));
  }
  /// once + its ghosts <= capacity, and all ghosts <= capacity.
  void forget_oldest() noexcept {
    while (order_.size(ghosts_of_once) > 0 && order_.size(ghosts_of_once) + order_.size(once) > capacity_)
      remove(order_.oldest(ghosts_of_once));
    while (num_ghosts() > capacity_) remove(order_.oldest(ghosts_of_again));
  }
  /// A ghost of this queue returned: its side was too small. Whole steps: on traces they hit more than fractions.
  void adapt(std::uint8_t ghosts) noexcept {
    const index_t of_once = order_.size(ghosts_of_once), of_again = order_.size(ghosts_of_again);
    if (ghosts == ghosts_of_once) {
      target_ = std::min(target_ + std::max(of_again / of_once, index_t{1}), capacity_);
    } else {
      target_ = std::max(target_ - std::max(of_once / of_again, index_t{1}), index_t{0});
    }
  }

  block_directory blocks_;
  block_queues<4> order_;
  index_t capacity_ = 0;
  index_t target_ = 0;  // blocks that `once` should have
};

inline void arc::set_capacity(index_t capacity) {
  blocks_.reserve(capacity, 2);
  KVCACHE_ASSERT(capacity >= size(), "set_capacity: evict first");
  order_.reserve(blocks_.num_slots());
  capacity_ = capacity;
  target_ = std::min(target_, capacity);
  forget_oldest();
}

inline void arc::check() const {
  blocks_.check();
  order_.check();
  if (size() > capacity_ || order_.size(once) + order_.size(again) != size() ||
      order_.size(once) + order_.size(ghosts_of_once) > capacity_ || num_ghosts() > capacity_)
    throw invariant_error("kvcache: arc keeps to its capacity, ghosts included");
}

static_assert(block_policy<arc>);

}  // namespace kvcache::inline v0::eviction
