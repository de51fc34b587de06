// SPDX-License-Identifier: MIT
// What a policy that decides which cached blocks go is told, and what it answers.
//
//   chain    [ system prompt ] <- [ question 1 ] <- [ answer 1 ]        a block's parent is the block before it
//                             ^-- [ question 2 ]                        the shared head goes last
//
// A policy keeps books only: which keys there are, in which order they go. The blocks belong to the caller, who evicts
// when it needs room, and inserts what it has stored. Three rules hold for every policy:
//
//   - `evict` never answers a pinned block,
//   - nor a block that has a child in the policy: without its parent a cached block cannot be hit. So a pin on
//     the last block of a chain holds the whole chain, and chains shrink from their tails,
//   - a block that was passed over for one of these reasons is the next to go once the reason is gone, unless it
//     is touched.
#pragma once

#include <kvcache/core/types.hpp>

#include <concepts>
#include <cstdint>
#include <optional>

namespace kvcache::inline v0::eviction {

/// Names a block for as long as it may come back, so a function of its content: a hash of its tokens and of the
/// blocks before it, or an id that an index gives to each such chain. Different blocks need different keys.
using block_key = std::uint64_t;

/// Not the key of any block.
inline constexpr block_key no_block = ~block_key{0};

struct block_info {
  block_key parent = no_block;  ///< the block before it; ignored where the policy does not have it
  int priority = 0;             ///< class of the block: a higher one goes after all of the lower ones
  double recompute_cost = 1;    ///< of the block, in any unit; finite and not negative
};

/// Constructed from its capacity, the most blocks it has at a time; throws shape_error if that is negative or above
/// 2^30, and std::bad_alloc. Nothing else allocates, except `set_capacity`. Values can be copied. No threads: the
/// caller guards a policy like a container.
///
/// `insert(key, info)`   a block that was just stored, and used once. False, and nothing changed, where the policy
///                       is full. A key that is there already is touched.
/// `touch(key)`          the block was used: once per request that hits it, before the blocks behind it are
///                       inserted. False if the key is not there.
/// `evict()`             takes the next block to go out of the policy; nothing if there is none that may go.
/// `erase(key)`          forgets a block that is no longer valid. False if the key is not there. It may not be pinned.
/// `pin(key)`            as often as there are users (references); `unpin(key)` undoes one. Neither is a use.
/// `set_capacity(n)`     from now on at most `n` blocks. `n` may not be less than `size()`: evict first.
/// `size()`, `capacity()`, `num_pinned()`, `contains(key)`
/// `check()`             recounts everything; throws invariant_error.
/// `bytes()`             memory of its books, where a policy has it: those of the library do.
///
/// Costs are amortised: each call O(1) or O(log capacity), as each policy says.
template <class P>
concept block_policy = std::constructible_from<P, index_t> && std::copyable<P> &&
    requires(P& policy, const P& settled, block_key key, const block_info& info, index_t n) {
  { policy.insert(key, info) } -> std::same_as<bool>;
  { policy.insert(key) } -> std::same_as<bool>;
  { policy.touch(key) } -> std::same_as<bool>;
  { policy.erase(key) } -> std::same_as<bool>;
  { policy.evict() } -> std::same_as<std::optional<block_key>>;
  policy.pin(key);
  policy.unpin(key);
  policy.set_capacity(n);
  { settled.contains(key) } -> std::same_as<bool>;
  { settled.size() } -> std::same_as<index_t>;
  { settled.capacity() } -> std::same_as<index_t>;
  { settled.num_pinned() } -> std::same_as<index_t>;
  settled.check();
};

}  // namespace kvcache::inline v0::eviction
