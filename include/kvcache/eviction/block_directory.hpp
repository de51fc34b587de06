// SPDX-License-Identifier: MIT
// block_directory: the blocks that a policy knows, by key, with their pins and the chains they form.
//
//   key --hash--> buckets [ -, 3, -, 0, 7, - ]      slots [ block 0 | block 1 | ... ]      parent = slot of another
//
// A slot is a small number that stays with a key until it is removed, so whatever a policy keeps per block is a vector
// indexed by it. A key is present (the block is cached) or a ghost (it was; only its name is remembered).
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/concepts.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvcache::inline v0::eviction {

using slot_index = std::int32_t;
inline constexpr slot_index no_slot = -1;

/// To be reserved before it is used. Open addressing with linear probing, at most half full. Every member O(1)
/// expected, unless it says otherwise; only `reserve` allocates.
class block_directory {
 public:
  /// Room for at least `capacity` blocks and as many ghosts with `slots_per_block` 2. O(slots).
  /// Throws shape_error unless capacity is in [0, 2^30], and std::bad_alloc.
  void reserve(index_t capacity, index_t slots_per_block = 1);

  [[nodiscard]] index_t num_slots() const noexcept { return static_cast<index_t>(entries_.size()); }
  [[nodiscard]] index_t num_present() const noexcept { return num_present_; }
  [[nodiscard]] index_t num_ghosts() const noexcept { return num_keys_ - num_present_; }
  [[nodiscard]] index_t num_pinned() const noexcept { return num_pinned_; }

  /// Memory of these books, in bytes. O(1).
  [[nodiscard]] index_t bytes() const noexcept {
    return static_cast<index_t>(entries_.capacity() * sizeof(block) +
                                (buckets_.capacity() + unused_.capacity()) * sizeof(slot_index));
  }

  /// The slot of a key, present or ghost, or no_slot.
  [[nodiscard]] slot_index find(block_key key) const noexcept { return buckets_[bucket_of(key)]; }
  /// The slot of a key that is present, or no_slot.
  [[nodiscard]] slot_index find_present(block_key key) const noexcept {
    const slot_index slot = find(key);
    return slot != no_slot && entry(slot).present ? slot : no_slot;
  }
  [[nodiscard]] block_key key(slot_index slot) const noexcept { return entry(slot).key; }
  /// The block before it if that is present, else no_slot.
  [[nodiscard]] slot_index parent_of(slot_index slot) const noexcept {
    const slot_index parent = entry(slot).parent;
    return parent != no_slot && entry(parent).life == entry(slot).parent_life ? parent : no_slot;
  }
  [[nodiscard]] bool is_present(slot_index slot) const noexcept { return entry(slot).present; }

  /// Makes a key present, a ghost as well. \pre it is not present, and there is a slot left
  slot_index add(block_key key, block_key parent) noexcept;

  /// The block is gone. \return its parent if that may go now, else no_slot. \pre present
  slot_index make_ghost(slot_index slot) noexcept;

  /// Forgets the key; the slot will be another's. \return as make_ghost
  slot_index remove(slot_index slot) noexcept;

  /// \pre the block is present
  void pin(block_key key) noexcept {
    const slot_index slot = find_present(key);
    KVCACHE_ASSERT(slot != no_slot, "pin: the policy must have the block");
    if (slot != no_slot && entry(slot).pins++ == 0) ++num_pinned_;
  }
  /// \return the block if it may go now, else no_slot. \pre pinned
  slot_index unpin(block_key key) noexcept {
    const slot_index slot = find_present(key);
    KVCACHE_ASSERT(slot != no_slot && is_pinned(slot), "unpin: the block must be pinned");
    if (slot == no_slot || !is_pinned(slot)) return no_slot;
    if (--entry(slot).pins == 0) --num_pinned_;
    return may_go(slot) ? slot : no_slot;
  }
  [[nodiscard]] bool is_pinned(slot_index slot) const noexcept { return entry(slot).pins != 0; }

  /// Neither pinned nor the parent of a block that is present.
  [[nodiscard]] bool may_go(slot_index slot) const noexcept {
    return entry(slot).pins == 0 && entry(slot).num_children == 0;
  }

  /// Proves hash, counts and chains by counting them anew. O(slots). Throws invariant_error.
  void check() const;

 private:
  struct block {
    block_key key = 0;
    slot_index parent = no_slot;     // while `parent_life` is the life of that slot
    std::uint32_t parent_life = 0;   // what the parent's `life` was
    std::uint32_t life = 0;          // counts up when the block in this slot goes
    std::uint32_t num_children = 0;  // present blocks whose parent this is
    std::uint32_t pins = 0;
    bool used = false;
    bool present = false;
  };

  [[nodiscard]] block& entry(slot_index slot) noexcept { return entries_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] const block& entry(slot_index slot) const noexcept {
    return entries_[static_cast<std::size_t>(slot)];
  }

  /// Where a probe for the key begins: keys may be consecutive numbers, so they are mixed (splitmix64).
  [[nodiscard]] std::size_t home_of(block_key key) const noexcept {
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9U;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBU;
    return static_cast<std::size_t>(key ^ (key >> 31)) & (buckets_.size() - 1);
  }
  /// The bucket that holds the key, or the empty one that would.
  [[nodiscard]] std::size_t bucket_of(block_key key) const noexcept {
    std::size_t at = home_of(key);
    while (buckets_[at] != no_slot && entry(buckets_[at]).key != key) at = (at + 1) & (buckets_.size() - 1);
    return at;
  }
  void erase_bucket(std::size_t at) noexcept;

  std::vector<block> entries_;       // [num_slots]
  std::vector<slot_index> buckets_;  // a power of two, at least twice the slots
  std::vector<slot_index> unused_;   // slots to give out; capacity for all
  index_t num_keys_ = 0;
  index_t num_present_ = 0;
  index_t num_pinned_ = 0;
};

inline void block_directory::reserve(index_t capacity, index_t slots_per_block) {
  if (capacity < 0 || capacity > index_t{1} << 30)
    throw shape_error("kvcache: the capacity of a policy is 0 to 2^30 blocks");
  const index_t before = num_slots();
  const index_t wanted = capacity * slots_per_block;  // at most 2^31, so that an index fits
  if (wanted <= before && !buckets_.empty()) return;
  const auto count = static_cast<std::size_t>(wanted);
  std::vector<slot_index> buckets(std::bit_ceil(2 * count + 2), no_slot);
  unused_.reserve(count);
  entries_.resize(count);
  // Nothing below can fail.
  buckets_.swap(buckets);
  for (index_t slot = wanted - 1; slot >= before; --slot) unused_.push_back(static_cast<slot_index>(slot));
  for (const slot_index slot : buckets) {
    if (slot != no_slot) buckets_[bucket_of(entry(slot).key)] = slot;
  }
}

inline slot_index block_directory::add(block_key key, block_key parent) noexcept {
  KVCACHE_ASSERT(key != no_block, "insert: no_block is not the key of any block");
  const std::size_t at = bucket_of(key);
  if (buckets_[at] == no_slot) {
    buckets_[at] = unused_.back();
    unused_.pop_back();
    ++num_keys_;
  }
  const slot_index slot = buckets_[at];
  block& added = entry(slot);
  added.key = key;
  added.used = true;
  added.present = true;
  added.parent = no_slot;
  ++num_present_;
  const slot_index before = parent != key ? find_present(parent) : no_slot;
  if (before != no_slot) {
    added.parent = before;
    added.parent_life = entry(before).life;
    ++entry(before).num_children;
  }
  return slot;
}

inline slot_index block_directory::make_ghost(slot_index slot) noexcept {
  block& gone = entry(slot);
  const slot_index parent = parent_of(slot);
  ++gone.life;
  gone.present = false;
  gone.parent = no_slot;
  gone.num_children = 0;
  --num_present_;
  if (gone.pins != 0) --num_pinned_;
  gone.pins = 0;
  if (parent == no_slot) return no_slot;
  --entry(parent).num_children;
  return may_go(parent) ? parent : no_slot;
}

inline slot_index block_directory::remove(slot_index slot) noexcept {
  const slot_index parent = entry(slot).present ? make_ghost(slot) : no_slot;
  erase_bucket(bucket_of(entry(slot).key));
  entry(slot).used = false;
  unused_.push_back(slot);
  --num_keys_;
  return parent;
}

/// Closes the gap: what was pushed past it by probing moves back.
inline void block_directory::erase_bucket(std::size_t at) noexcept {
  const std::size_t mask = buckets_.size() - 1;
  for (std::size_t next = (at + 1) & mask; buckets_[next] != no_slot; next = (next + 1) & mask) {
    const std::size_t home = home_of(entry(buckets_[next]).key);
    if (((next - home) & mask) < ((next - at) & mask)) continue;  // its home lies behind the gap
    buckets_[at] = buckets_[next];
    at = next;
  }
  buckets_[at] = no_slot;
}

inline void block_directory::check() const {
  using kvcache::detail::require;
  index_t used = 0, present = 0, pinned = 0;
  std::vector<std::uint32_t> children(entries_.size(), 0);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const block& b = entries_[i];
    used += b.used ? 1 : 0;
    present += b.present ? 1 : 0;
    pinned += b.pins != 0 ? 1 : 0;
    require(b.used || !b.present, "a present block has a slot");
    require(b.present || (b.pins == 0 && b.num_children == 0), "a ghost is neither pinned nor a parent");
    const slot_index parent = parent_of(static_cast<slot_index>(i));
    if (b.present && parent != no_slot) ++children[static_cast<std::size_t>(parent)];
  }
  require(used == num_keys_ && present == num_present_ && pinned == num_pinned_, "the counts are right");
  require(used + static_cast<index_t>(unused_.size()) == num_slots(), "a slot is used or to be given out");
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    require(children[i] == entries_[i].num_children, "a parent counts its present children");
    require(!entries_[i].used || find(entries_[i].key) == static_cast<slot_index>(i), "every key is found");
  }
}

}  // namespace kvcache::inline v0::eviction
