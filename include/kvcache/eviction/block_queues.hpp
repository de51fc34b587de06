// SPDX-License-Identifier: MIT
// block_queues: a few queues of blocks, oldest to newest, each block in at most one of them.
//
//   oldest -> [ 4 ] <-> [ 9 ] <-> [ 2 ] <- newest        parked: [ 7 ]
//
// Doubly linked lists through two vectors, indexed by slot. A block whose turn comes while it may not go is parked: it
// stays a member of its queue but leaves the line, so that nobody passes it twice. Unparked it is the oldest.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/block_directory.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvcache::inline v0::eviction {

/// Every member O(1), unless it says otherwise; only `reserve` allocates.
template <std::size_t NumQueues>
class block_queues {
 public:
  using queue_index = std::uint8_t;  // NumQueues: in none

  /// Room for slots 0 .. num_slots - 1.
  void reserve(index_t num_slots) {
    if (num_slots > static_cast<index_t>(links_.size())) links_.resize(static_cast<std::size_t>(num_slots));
  }

  /// Memory of these books, in bytes. O(1).
  [[nodiscard]] index_t bytes() const noexcept {
    return static_cast<index_t>(links_.capacity() * sizeof(link_pair));
  }

  /// Members, parked ones too, and those in line.
  [[nodiscard]] index_t size(queue_index queue) const noexcept { return queues_[queue].size; }
  [[nodiscard]] index_t in_line(queue_index queue) const noexcept { return queues_[queue].in_line; }
  /// The first in line, or no_slot.
  [[nodiscard]] slot_index oldest(queue_index queue) const noexcept { return queues_[queue].oldest; }
  [[nodiscard]] queue_index queue_of(slot_index slot) const noexcept { return at(slot).queue; }

  /// Becomes the newest of a queue, wherever it was before.
  void push(queue_index queue, slot_index slot) noexcept {
    join(queue, slot);
    link(slot, queues_[queue].newest, no_slot);
  }

  /// Is to go right before `parent` if that is in line in the same queue, so that a chain goes from its tail; else
  /// becomes the newest.
  void push_before(slot_index parent, queue_index queue, slot_index slot) noexcept {
    if (parent == no_slot || at(parent).queue != queue || !at(parent).in_line) return push(queue, slot);
    join(queue, slot);
    link(slot, at(parent).older, parent);
  }

  /// Is in no queue any more.
  void remove(slot_index slot) noexcept {
    if (at(slot).queue == none) return;
    unlink(slot);
    --queues_[at(slot).queue].size;
    at(slot).queue = none;
  }

  /// If it was parked it is the oldest now. Nothing happens for no_slot.
  void unpark(slot_index slot) noexcept {
    if (slot != no_slot && at(slot).queue != none && !at(slot).in_line)
      link(slot, no_slot, queues_[at(slot).queue].oldest);
  }

  /// Leaves the line until it is unparked or pushed. \pre in line
  void park(slot_index slot) noexcept { unlink(slot); }

  /// The oldest block for which `may_go(slot)` holds, or no_slot; those before it are parked. O(1) amortised.
  template <class MayGo>
  slot_index oldest_that(queue_index queue, MayGo may_go) noexcept {
    while (oldest(queue) != no_slot && !may_go(oldest(queue))) park(oldest(queue));
    return oldest(queue);
  }

  /// Proves links and sizes against each other. O(slots). Throws invariant_error.
  void check() const {
    using kvcache::detail::require;
    std::array<index_t, NumQueues> members{}, in_line{};
    for (const link_pair& l : links_) {
      require(l.queue != none || !l.in_line, "what is in line is in a queue");
      if (l.queue != none) ++members[l.queue];
      if (l.in_line) ++in_line[l.queue];
    }
    for (std::size_t q = 0; q < NumQueues; ++q) {
      index_t walked = 0;
      slot_index before = no_slot;
      for (slot_index slot = queues_[q].oldest; slot != no_slot; before = slot, slot = at(slot).newer) {
        require(at(slot).older == before && at(slot).in_line && at(slot).queue == q, "links go both ways");
        require(++walked <= in_line[q], "a queue has an end");
      }
      require(before == queues_[q].newest && walked == in_line[q], "a queue ends at its newest");
      require(members[q] == queues_[q].size && in_line[q] == queues_[q].in_line, "a queue knows its size");
    }
  }

 private:
  static constexpr auto none = static_cast<queue_index>(NumQueues);

  struct link_pair {
    slot_index older = no_slot;
    slot_index newer = no_slot;
    queue_index queue = none;
    bool in_line = false;
  };
  struct ends {
    slot_index oldest = no_slot;
    slot_index newest = no_slot;
    index_t size = 0;
    index_t in_line = 0;
  };

  [[nodiscard]] link_pair& at(slot_index slot) noexcept { return links_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] const link_pair& at(slot_index slot) const noexcept {
    return links_[static_cast<std::size_t>(slot)];
  }

  void join(queue_index queue, slot_index slot) noexcept {
    remove(slot);
    at(slot).queue = queue;
    ++queues_[queue].size;
  }
  /// Between two neighbours of its queue; no_slot is the end.
  void link(slot_index slot, slot_index older, slot_index newer) noexcept {
    ends& queue = queues_[at(slot).queue];
    at(slot).older = older;
    at(slot).newer = newer;
    at(slot).in_line = true;
    ++queue.in_line;
    (older == no_slot ? queue.oldest : at(older).newer) = slot;
    (newer == no_slot ? queue.newest : at(newer).older) = slot;
  }
  void unlink(slot_index slot) noexcept {
    link_pair& l = at(slot);
    if (!l.in_line) return;
    (l.older == no_slot ? queues_[l.queue].oldest : at(l.older).newer) = l.newer;
    (l.newer == no_slot ? queues_[l.queue].newest : at(l.newer).older) = l.older;
    l.in_line = false;
    --queues_[l.queue].in_line;
  }

  std::vector<link_pair> links_;
  std::array<ends, NumQueues> queues_{};
};

}  // namespace kvcache::inline v0::eviction
