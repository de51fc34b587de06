// SPDX-License-Identifier: MIT
// s3_fifo: three queues in order of arrival. New blocks prove themselves in a small one before they get a long stay.
//
//   new -> [ small, 1/10 ] --used again--> [ main ] <-- a returning ghost        main: used blocks go round once more
//                 |---------not used----> [ ghosts ]
//
// A block that may not go still moves on when it was used, and does not count against the small queue.
//
// Source: Yang et al. 2023, "FIFO Queues are All You Need for Cache Eviction", algorithm 1.
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/block_directory.hpp>
#include <kvcache/eviction/block_queues.hpp>
#include <kvcache/eviction/concepts.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvcache::inline v0::eviction {

/// A block_policy (eviction/concepts.hpp says what the members do). Every call O(1); a use is one byte written, no list
/// changes. Remembers the keys of at most `capacity` blocks that went from the small queue.
class s3_fifo {
 public:
  static constexpr const char* name = "s3_fifo";

  explicit s3_fifo(index_t capacity) { set_capacity(capacity); }

  bool insert(block_key key, const block_info& info = {}) noexcept {
    if (touch(key)) return true;
    if (size() >= capacity_) return false;
    const bool returns = blocks_.find(key) != no_slot;
    const slot_index slot = blocks_.add(key, info.parent);
    uses(slot) = 0;
    // A parent that was used since it came has come with an earlier request.
    const slot_index parent = blocks_.parent_of(slot);
    order_.push_before(parent != no_slot && uses(parent) == 0 ? parent : no_slot, returns ? main : small,
                       slot);
    return true;
  }

  bool touch(block_key key) noexcept {
    const slot_index slot = blocks_.find_present(key);
    if (slot == no_slot) return false;
    uses(slot) = static_cast<std::uint8_t>(std::min(uses(slot) + 1, most_uses));
    return true;
  }

  std::optional<block_key> evict() noexcept;

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
  [[nodiscard]] index_t bytes() const noexcept {
    return blocks_.bytes() + order_.bytes() + static_cast<index_t>(uses_.capacity());
  }
  [[nodiscard]] index_t num_ghosts() const noexcept { return blocks_.num_ghosts(); }

  void check() const;

 private:
  enum queue : std::uint8_t { small, main, ghosts };
  static constexpr int most_uses = 3;        // counted
  static constexpr int uses_to_stay = 2;     // in the small queue
  static constexpr index_t small_part = 10;  // of the capacity, 1/10

  [[nodiscard]] std::uint8_t& uses(slot_index slot) noexcept { return uses_[static_cast<std::size_t>(slot)]; }
  void remove(slot_index slot) noexcept {
    order_.remove(slot);
    order_.unpark(blocks_.remove(slot));
  }
  slot_index next_of_small() noexcept;
  slot_index next_of_main() noexcept;

  block_directory blocks_;
  block_queues<3> order_;
  std::vector<std::uint8_t> uses_;  // since it arrived or went round, [slots]
  index_t capacity_ = 0;
};

inline std::optional<block_key> s3_fifo::evict() noexcept {
  const bool small_first = order_.in_line(small) >= std::max(capacity_ / small_part, index_t{1});
  slot_index slot = small_first ? next_of_small() : next_of_main();
  if (slot == no_slot) slot = small_first ? next_of_main() : next_of_small();
  if (slot == no_slot) slot = next_of_main();  // what the small queue has just handed over
  if (slot == no_slot) return std::nullopt;
  const block_key key = blocks_.key(slot);
  if (order_.queue_of(slot) == small) {
    if (num_ghosts() >= capacity_) remove(order_.oldest(ghosts));
    order_.push(ghosts, slot);
    order_.unpark(blocks_.make_ghost(slot));
  } else {
    remove(slot);
  }
  return key;
}

/// The oldest block of the small queue that was not used enough; used ones before it move to the main queue.
inline slot_index s3_fifo::next_of_small() noexcept {
  slot_index slot = order_.oldest(small);
  for (; slot != no_slot; slot = order_.oldest(small)) {
    if (uses(slot) >= uses_to_stay) {
      uses(slot) = 0;
      order_.push(main, slot);
    } else if (blocks_.may_go(slot)) {
      break;
    } else {
      order_.park(slot);
    }
  }
  return slot;
}

/// The oldest block of the main queue that was not used since it went round.
inline slot_index s3_fifo::next_of_main() noexcept {
  slot_index slot = order_.oldest(main);
  for (; slot != no_slot; slot = order_.oldest(main)) {
    if (uses(slot) > 0) {
      --uses(slot);
      order_.push(main, slot);
    } else if (blocks_.may_go(slot)) {
      break;
    } else {
      order_.park(slot);
    }
  }
  return slot;
}

inline void s3_fifo::set_capacity(index_t capacity) {
  blocks_.reserve(capacity, 2);
  KVCACHE_ASSERT(capacity >= size(), "set_capacity: evict first");
  order_.reserve(blocks_.num_slots());
  uses_.resize(static_cast<std::size_t>(blocks_.num_slots()));
  capacity_ = capacity;
  while (num_ghosts() > capacity_) remove(order_.oldest(ghosts));
}

inline void s3_fifo::check() const {
  blocks_.check();
  order_.check();
  if (size() > capacity_ || order_.size(small) + order_.size(main) != size() || num_ghosts() > capacity_)
    throw invariant_error("kvcache: s3_fifo keeps to its capacity, ghosts included");
}

static_assert(block_policy<s3_fifo>);

}  // namespace kvcache::inline v0::eviction
