// SPDX-License-Identifier: MIT
// lru: the block that was not used for the longest time goes first, within a chain the last one.
//
// The default. On conversations recency says most of what can be known (README, "Which blocks go").
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/block_directory.hpp>
#include <kvcache/eviction/block_queues.hpp>
#include <kvcache/eviction/concepts.hpp>

#include <optional>

namespace kvcache::inline v0::eviction {

/// A block_policy (eviction/concepts.hpp says what the members do). Every call O(1).
class lru {
 public:
  static constexpr const char* name = "lru";

  explicit lru(index_t capacity) { set_capacity(capacity); }

  bool insert(block_key key, const block_info& info = {}) noexcept {
    if (touch(key)) return true;
    if (size() >= capacity_) return false;
    order_.push(0, blocks_.add(key, info.parent));
    return true;
  }

  bool touch(block_key key) noexcept {
    const slot_index slot = blocks_.find(key);
    if (slot != no_slot) order_.push(0, slot);
    return slot != no_slot;
  }

  std::optional<block_key> evict() noexcept {
    const slot_index slot = order_.oldest_that(0, [&](slot_index s) { return blocks_.may_go(s); });
    if (slot == no_slot) return std::nullopt;
    const block_key key = blocks_.key(slot);
    remove(slot);
    return key;
  }

  bool erase(block_key key) noexcept {
    const slot_index slot = blocks_.find(key);
    if (slot == no_slot) return false;
    KVCACHE_ASSERT(!blocks_.is_pinned(slot), "erase: unpin the block first");
    remove(slot);
    return true;
  }

  void pin(block_key key) noexcept { blocks_.pin(key); }
  void unpin(block_key key) noexcept { order_.unpark(blocks_.unpin(key)); }

  /// Throws shape_error, std::bad_alloc.
  void set_capacity(index_t capacity) {
    blocks_.reserve(capacity);
    KVCACHE_ASSERT(capacity >= size(), "set_capacity: evict first");
    order_.reserve(blocks_.num_slots());
    capacity_ = capacity;
  }

  [[nodiscard]] bool contains(block_key key) const noexcept { return blocks_.find(key) != no_slot; }
  [[nodiscard]] index_t size() const noexcept { return blocks_.num_present(); }
  [[nodiscard]] index_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] index_t num_pinned() const noexcept { return blocks_.num_pinned(); }
  /// Memory of its books, in bytes. O(1).
  [[nodiscard]] index_t bytes() const noexcept { return blocks_.bytes() + order_.bytes(); }

  void check() const {
    blocks_.check();
    order_.check();
  }

 private:
  void remove(slot_index slot) noexcept {
    order_.remove(slot);
    order_.unpark(blocks_.remove(slot));
  }

  block_directory blocks_;
  block_queues<1> order_;
  index_t capacity_ = 0;
};

static_assert(block_policy<lru>);

}  // namespace kvcache::inline v0::eviction
