// SPDX-License-Identifier: MIT
// keep_tokens: forgetting tokens in the middle of a sequence, the same ones in all layers and heads.
//
//   before   | 0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 |      kept: 0 1 2 3 8 9 12 13, blocks of 4 tokens
//   blocks   | 0 1 2 3 | 8 9 10 11 | 12 13 |                 blocks without a kept token go: O(blocks), no row is read
//   rows     | 0 1 2 3 | 8 9 12 13 |                         what is left closes up: rows move as they are encoded
//
// Tokens are then counted anew from 0; the positions that RoPE was computed for are kept beside them (cache/positions.hpp).
// Stored keys are never changed: where positions close up as well, attention rotates the query for each segment instead.
// Source: positions within the cache, Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks".
#pragma once

#include <kvcache/cache/positions.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <new>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

/// Which tokens may go; 0 is no limit.
struct keep_limits {
  index_t whole_blocks =
      0;  ///< tokens below this one stay or go by whole blocks: they are sealed, or rows cannot move
  index_t pinned = 0;  ///< tokens below this one stay: the block that has exact sinks beside it
};

/// What keep_tokens did.
struct keep_result {
  status code = status::ok;  ///< anything else: nothing changed
  index_t num_forgotten = 0;
  /// Bytes that went back to the pool or the memory resource. Less than the tokens took where blocks stay in a fork, where
  /// memory is kept for what comes next (contiguous, until shrink_to_fit) or goes by chunks; negative where moving rows
  /// copied shared pages.
  index_t freed_bytes = 0;
};

namespace detail {

/// Where tokens that stay are before and after: blocks that have none of them are left out first.
class keep_plan {
 public:
  /// \param tokens  ascending; must outlive the plan. Throws std::bad_alloc.
  keep_plan(std::span<const index_t> tokens, index_t block_size)
      : tokens_(tokens), block_size_(block_size), first_moved_(static_cast<index_t>(tokens.size())) {
    for (index_t i = 0; i < num_tokens(); ++i) {
      const index_t token = tokens_[static_cast<std::size_t>(i)];
      if (blocks_.empty() || blocks_.back() != token / block_size) blocks_.push_back(token / block_size);
      const index_t place = (static_cast<index_t>(blocks_.size()) - 1) * block_size + token % block_size;
      if (place != i && first_moved_ == num_tokens()) first_moved_ = i;
    }
  }

  [[nodiscard]] std::span<const index_t> tokens() const noexcept { return tokens_; }
  [[nodiscard]] index_t num_tokens() const noexcept { return static_cast<index_t>(tokens_.size()); }

  /// Blocks with a kept token, ascending.
  [[nodiscard]] std::span<const index_t> blocks() const noexcept { return blocks_; }
  /// How many of them lie before block `index`.
  [[nodiscard]] index_t blocks_before(index_t index) const noexcept {
    return std::lower_bound(blocks_.begin(), blocks_.end(), index) - blocks_.begin();
  }

  /// Whether rows move, once blocks have; all from token first_moved() on, counted anew.
  [[nodiscard]] bool moves_rows() const noexcept { return first_moved_ < num_tokens(); }
  [[nodiscard]] index_t first_moved() const noexcept { return first_moved_; }

  /// Calls body(from, to) for rows that move once blocks have, in an order in which none is overwritten before it moved:
  /// indices of slots, block * block_size + slot.
  template <class Body>
  void for_each_move(Body body) const {
    auto block = static_cast<index_t>(0);
    for (index_t i = first_moved_; i < num_tokens(); ++i) {
      const index_t token = tokens_[static_cast<std::size_t>(i)];
      while (blocks_[static_cast<std::size_t>(block)] != token / block_size_) ++block;
      body(block * block_size_ + token % block_size_, i);
    }
  }

  /// Whether tokens below `end`, a multiple of the block size, stay by whole blocks.
  [[nodiscard]] bool keeps_whole_blocks(index_t end) const noexcept {
    const index_t kept_blocks = blocks_before(end / block_size_);
    const auto kept_tokens = std::lower_bound(tokens_.begin(), tokens_.end(), end) - tokens_.begin();
    return kept_tokens == kept_blocks * block_size_;
  }

 private:
  std::span<const index_t> tokens_;
  index_t block_size_;
  std::vector<index_t> blocks_;
  index_t first_moved_;
};

/// \pre of keep_tokens, for a sequence of `size` tokens
[[nodiscard]] inline bool may_be_kept(std::span<const index_t> tokens, index_t size) noexcept {
  if (tokens.empty()) return size == 0;
  return tokens.front() >= 0 && tokens.back() == size - 1 &&
         std::adjacent_find(tokens.begin(), tokens.end(), std::greater_equal<>{}) == tokens.end();
}

/// sequence_cache::keep_tokens over what a sequence is made of.
/// \param blocks  direct_blocks or sealing_blocks
/// \param sizes   [num_layers] tokens
template <class Blocks>
keep_result keep_tokens(Blocks& blocks, position_map& positions, std::vector<index_t>& sizes,
                        std::span<const index_t> tokens, keep_positions mode) {
  const index_t size_before = sizes.front();
  KVCACHE_ASSERT(std::count(sizes.begin(), sizes.end(), size_before) == std::ssize(sizes),
                 "keep_tokens: every layer must have the same tokens");
  KVCACHE_ASSERT(may_be_kept(tokens, size_before),
                 "keep_tokens: tokens must be ascending and in the sequence, the newest among them");
  const auto unshared = [&] {
    const auto use = blocks.bytes(sizes);
    return use.total - use.shared;
  };
  const index_t bytes_before = unshared();
  try {
    position_map kept_positions = positions.kept(tokens, mode);
    const keep_plan plan(tokens, blocks.geometry().block_size);
    if (const status s = blocks.keep(plan); s != status::ok) return {s, 0, 0};
    std::swap(positions, kept_positions);
  } catch (const std::bad_alloc&) {
    return {status::out_of_memory, 0, 0};
  }
  std::fill(sizes.begin(), sizes.end(), static_cast<index_t>(tokens.size()));
  return {status::ok, size_before - sizes.front(), bytes_before - unshared()};
}

}  // namespace detail

}  // namespace kvcache::inline v0
