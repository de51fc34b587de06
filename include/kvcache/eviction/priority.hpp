// SPDX-License-Identifier: MIT
// priority: lower classes go first; within a class, what is cheap to compute again and was not used for long.
//
//   rank of a block = (class, clock when it was last used + recompute cost, last use)        the lowest goes
//   clock           = the highest rank, without the class, of a block that went
//
// So a block that costs twice as much is kept about twice as long after its last use; with equal costs this is lru in
// each class.
// Source: Young 1994, "The k-server dual and loose competitiveness for paging" (GreedyDual), as in Cao and Irani 1997,
// "Cost-Aware WWW Proxy Caching Algorithms".
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/block_directory.hpp>
#include <kvcache/eviction/concepts.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvcache::inline v0::eviction {

/// A block_policy (eviction/concepts.hpp says what the members do). Every call O(log capacity): a binary heap.
class priority {
 public:
  static constexpr const char* name = "priority";

  explicit priority(index_t capacity) { set_capacity(capacity); }

  /// A block that is there already is touched, and takes the new class and cost.
  bool insert(block_key key, const block_info& info = {}) noexcept {
    KVCACHE_ASSERT(std::isfinite(info.recompute_cost) && info.recompute_cost >= 0,
                   "insert: recompute_cost must be finite and not negative");
    slot_index slot = blocks_.find(key);
    if (slot == no_slot) {
      if (size() >= capacity_) return false;
      slot = blocks_.add(key, info.parent);
    }
    rank(slot).priority = info.priority;
    rank(slot).cost = std::isfinite(info.recompute_cost) ? std::max(info.recompute_cost, 0.0) : 0.0;
    use(slot);
    return true;
  }

  bool touch(block_key key) noexcept {
    const slot_index slot = blocks_.find(key);
    if (slot != no_slot) use(slot);
    return slot != no_slot;
  }

  std::optional<block_key> evict() noexcept {
    while (!heap_.empty() && !blocks_.may_go(heap_.front())) leave_heap(heap_.front());
    if (heap_.empty()) return std::nullopt;
    const slot_index slot = heap_.front();
    const block_key key = blocks_.key(slot);
    clock_ = std::max(clock_, rank(slot).score);
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
  void unpin(block_key key) noexcept { enter_heap(blocks_.unpin(key)); }

  /// Throws shape_error, std::bad_alloc.
  void set_capacity(index_t capacity) {
    blocks_.reserve(capacity);
    KVCACHE_ASSERT(capacity >= size(), "set_capacity: evict first");
    ranks_.resize(static_cast<std::size_t>(blocks_.num_slots()));
    heap_.reserve(ranks_.size());
    capacity_ = capacity;
  }

  [[nodiscard]] bool contains(block_key key) const noexcept { return blocks_.find(key) != no_slot; }
  [[nodiscard]] index_t size() const noexcept { return blocks_.num_present(); }
  [[nodiscard]] index_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] index_t num_pinned() const noexcept { return blocks_.num_pinned(); }
  /// Memory of its books, in bytes. O(1).
  [[nodiscard]] index_t bytes() const noexcept {
    return blocks_.bytes() +
           static_cast<index_t>(ranks_.capacity() * sizeof(ranked) + heap_.capacity() * sizeof(slot_index));
  }

  void check() const;

 private:
  static constexpr index_t not_in_heap = -1;

  struct ranked {
    int priority = 0;
    double score = 0;            // clock when last used + cost
    std::uint64_t last_use = 0;  // of all uses of all blocks
    double cost = 0;
    index_t place = not_in_heap;  // in heap_

    /// Whether this block goes before the other.
    [[nodiscard]] bool before(const ranked& other) const noexcept {
      if (priority != other.priority) return priority < other.priority;
      if (score != other.score) return score < other.score;
      return last_use < other.last_use;
    }
  };

  [[nodiscard]] ranked& rank(slot_index slot) noexcept { return ranks_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] const ranked& rank(slot_index slot) const noexcept {
    return ranks_[static_cast<std::size_t>(slot)];
  }
  [[nodiscard]] slot_index in_heap(index_t place) const noexcept {
    return heap_[static_cast<std::size_t>(place)];
  }
  [[nodiscard]] bool goes_before(slot_index a, slot_index b) const noexcept {
    return rank(a).before(rank(b));
  }

  void use(slot_index slot) noexcept {
    leave_heap(slot);
    rank(slot).score = clock_ + rank(slot).cost;
    rank(slot).last_use = ++num_uses_;
    enter_heap(slot);
  }
  void remove(slot_index slot) noexcept {
    leave_heap(slot);
    enter_heap(blocks_.remove(slot));
  }

  /// Nothing happens where it is in already, or for no_slot.
  void enter_heap(slot_index slot) noexcept {
    if (slot == no_slot || rank(slot).place != not_in_heap) return;
    heap_.push_back(slot);
    sift(slot, static_cast<index_t>(heap_.size()) - 1);
  }
  void leave_heap(slot_index slot) noexcept {
    const index_t place = rank(slot).place;
    if (place == not_in_heap) return;
    rank(slot).place = not_in_heap;
    const slot_index last = heap_.back();
    heap_.pop_back();
    if (last != slot) sift(last, place);
  }
  void put(slot_index slot, index_t place) noexcept {
    heap_[static_cast<std::size_t>(place)] = slot;
    rank(slot).place = place;
  }
  /// Puts a block where it belongs, starting from a free place.
  void sift(slot_index slot, index_t place) noexcept;

  block_directory blocks_;
  std::vector<ranked> ranks_;     // [slots]
  std::vector<slot_index> heap_;  // those whose turn may come, the first to go in front
  index_t capacity_ = 0;
  double clock_ = 0;
  std::uint64_t num_uses_ = 0;
};

inline void priority::sift(slot_index slot, index_t place) noexcept {
  const auto count = static_cast<index_t>(heap_.size());
  while (place > 0 && goes_before(slot, in_heap((place - 1) / 2))) {
    put(in_heap((place - 1) / 2), place);
    place = (place - 1) / 2;
  }
  for (index_t child = 2 * place + 1; child < count; child = 2 * place + 1) {
    if (child + 1 < count && goes_before(in_heap(child + 1), in_heap(child))) ++child;
    if (!goes_before(in_heap(child), slot)) break;
    put(in_heap(child), place);
    place = child;
  }
  put(slot, place);
}

inline void priority::check() const {
  blocks_.check();
  for (index_t place = 0; place < static_cast<index_t>(heap_.size()); ++place) {
    const slot_index slot = in_heap(place);
    if (rank(slot).place != place || !blocks_.is_present(slot))
      throw invariant_error("kvcache: the heap holds present blocks that know their places");
    if (place > 0 && goes_before(slot, in_heap((place - 1) / 2)))
      throw invariant_error("kvcache: no block in the heap goes before the one above it");
  }
  if (size() > capacity_) throw invariant_error("kvcache: priority keeps to its capacity");
}

static_assert(block_policy<priority>);

}  // namespace kvcache::inline v0::eviction
