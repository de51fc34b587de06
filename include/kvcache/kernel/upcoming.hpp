// SPDX-License-Identifier: MIT
// kernel::upcoming: what kernels fetch while they multiply what is at hand.
#pragma once

#include <kvcache/core/types.hpp>

#include <cstddef>

namespace kvcache::inline v0::kernel {

/// What will be read after the section at hand, fetched meanwhile, as much as it has; either may be null. Taken by reference,
/// and made where it is used: a copy is one load of what several stores have just written, which waits for all of them.
struct upcoming {
  const std::byte* next;  ///< the one that comes next, or a later one where memory takes longer to answer
  /// By levels (core/prefetch.hpp): one that comes sooner, as a rule; `next` is a later one.
  const std::byte* soon = nullptr;
  bool apart = false;  ///< blocks lie elsewhere than behind one another, as a rule in other pages
  /// Where not 0: `next` lies `offset` bytes in a block of so many, which its sections fetch together, each its share of every page.
  index_t block_bytes = 0;
  index_t offset = 0;

  upcoming(const std::byte* then, const std::byte* before_that = nullptr,
           bool blocks_lie_apart = false) noexcept
      : next(then), soon(before_that), apart(blocks_lie_apart) {}
  /// What is so many bytes in them.
  [[nodiscard]] upcoming part(index_t num_bytes) const noexcept {
    return {next == nullptr ? nullptr : next + num_bytes, soon == nullptr ? nullptr : soon + num_bytes};
  }
  /// `next` is a part of such a block.
  void set_block(index_t section_offset, index_t num_bytes) noexcept {
    block_bytes = num_bytes;
    offset = section_offset;
  }
  /// `section` in place of null: at hand, it costs nothing to ask for.
  [[nodiscard]] upcoming or_at_hand(const std::byte* section) const noexcept {
    return {next == nullptr ? section : next, soon == nullptr ? section : soon};
  }
  /// For codecs and kernels that look no nearer.
  operator const std::byte*() const noexcept { return next; }
};

}  // namespace kvcache::inline v0::kernel
