// SPDX-License-Identifier: MIT
// contiguous_cache: one region of memory per layer and KV head.
//
//   base ->  | layer 0, head 0: block 0 | block 1 | ... | room to grow |
//            | layer 0, head 1: block 0 | block 1 | ... | room to grow |     block = base + region * stride
//            | ...                                                     |                       + index * block_bytes
//
// Every region is as many blocks long, and as many bytes as those take in its layer.
//
// Addresses for `max_tokens` are reserved at the start and memory is granted as tokens come, so growing copies
// nothing. Such memory comes in small pages, which take a tenth to a quarter longer to read: each time regions have
// grown by a huge page, those that are full are joined to huge ones, in one region with each append. Beyond
// max_tokens, or where the system cannot reserve or grant, or a memory resource is given, or there are more than
// 4096 regions, growth doubles and copies (amortised O(1) per token).
#pragma once

#include <kvcache/cache/block_layout.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/sequence_cache.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/address_space.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory_resource>
#include <new>
#include <numeric>
#include <span>
#include <utility>

namespace kvcache::inline v0 {

struct contiguous_options {
  /// Tokens that addresses are reserved for. No limit: a longer sequence moves once and reserves twice as much.
  index_t max_tokens = index_t{1} << 18;
  /// Where blocks are allocated; nullptr reserves address space from the system instead.
  std::pmr::memory_resource* memory = nullptr;
};

/// The address function of contiguous_cache; see block_storage.
class contiguous_storage {
 public:
  using options = contiguous_options;

  /// No memory yet. Throws shape_error if the sizes overflow or max_tokens is negative.
  contiguous_storage(const block_layout& layout, const contiguous_options& settings)
      : layout_(layout), options_(settings) {
    reserved_blocks_ = ceil_div(checked_add(settings.max_tokens, 0), layout.shape().block_size);
    (void)checked_mul(layout.page_bytes(), std::max(reserved_blocks_, index_t{1}));
  }

  contiguous_storage(contiguous_storage&&) noexcept = default;
  contiguous_storage& operator=(contiguous_storage&&) noexcept = default;

  /// Grows the capacity to at least `last` blocks.
  [[nodiscard]] status prepare_write(index_t first, index_t last) {
    join_pages(std::min(first, num_blocks_));
    if (last <= num_blocks_) return status::ok;
    try {
      return grow(last);
    } catch (const std::bad_alloc&) {
      return status::out_of_memory;
    } catch (const shape_error&) {  // more bytes than an index can count
      return status::out_of_memory;
    }
  }

  /// Moves blocks down. O(bytes behind the first that goes).
  [[nodiscard]] status keep_blocks(std::span<const index_t> kept, index_t /*own_first*/,
                                   index_t /*own_last*/) noexcept {
    const cache_shape& shape = layout_.shape();
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      const auto block_bytes = static_cast<std::size_t>(layout_.block_bytes(layer));
      for (index_t head = 0; head < shape.num_kv_heads; ++head) {
        for (std::size_t i = 0; i < kept.size(); ++i) {
          const auto to = static_cast<index_t>(i);
          if (kept[i] != to) std::memcpy(block(layer, head, to), block(layer, head, kept[i]), block_bytes);
        }
      }
    }
    return status::ok;
  }

  /// Keeps its memory, as a vector does.
  void shrink(index_t /*num_blocks*/) noexcept {}

  /// Keeps memory for `num_blocks` blocks only.
  void shrink_to_fit(index_t num_blocks) noexcept {
    if (num_blocks >= num_blocks_) return;
    if (space_) {
      (void)for_each_region([&](index_t layer, index_t start) {
        space_.revoke(start + granted_bytes(layer, num_blocks), start + granted_bytes(layer, num_blocks_));
        return true;
      });
      num_blocks_ = num_blocks;
      joined_blocks_ = std::min(joined_blocks_, num_blocks);
      joining_region_ = 0;
    } else {
      try {
        num_blocks_ = num_blocks;
        (void)reallocate(num_blocks);
      } catch (const std::bad_alloc&) {
        num_blocks_ = memory_.size() / layout_.page_bytes();  // as it was
      }
    }
  }

  [[nodiscard]] std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    return base_ + layout_.offset(region_blocks_, layer, head, index);
  }
  /// Blocks there is memory for, per layer and head.
  [[nodiscard]] index_t num_blocks() const noexcept { return num_blocks_; }
  [[nodiscard]] index_t total_bytes() const noexcept {
    index_t bytes = 0;
    for (index_t layer = 0; layer < shape().num_layers; ++layer) bytes += granted_bytes(layer, num_blocks_);
    return shape().num_kv_heads * bytes;
  }
  [[nodiscard]] index_t shared_bytes() const noexcept { return 0; }
  [[nodiscard]] std::pmr::memory_resource* memory() const noexcept {
    return options_.memory != nullptr ? options_.memory : huge_page_resource();
  }
  [[nodiscard]] contiguous_storage empty_like() const { return {layout_, options_}; }

  /// Whether growth still happens in place.
  [[nodiscard]] bool grows_in_place() const noexcept { return static_cast<bool>(space_); }

  void check() const {
    for (index_t layer = 0; num_blocks_ > 0 && layer < shape().num_layers; ++layer) {
      if (base_ == nullptr || granted_bytes(layer, num_blocks_) > region_blocks_ * layout_.block_bytes(layer))
        throw invariant_error("kvcache: every region has memory for its blocks");
    }
  }

 private:
  static constexpr index_t huge_page = address_space::huge_page;

  [[nodiscard]] const cache_shape& shape() const noexcept { return layout_.shape(); }
  /// Bytes that `blocks` blocks of one region take.
  [[nodiscard]] index_t granted_bytes(index_t layer, index_t blocks) const noexcept {
    const index_t bytes = blocks * layout_.block_bytes(layer);
    return space_ ? ceil_div(bytes, address_space::granularity()) * address_space::granularity() : bytes;
  }

  /// Calls body(layer, offset of the region from base) for each region until it returns false.
  /// \return how many regions it returned true for
  template <class Body>
  index_t for_each_region(Body body) const {
    index_t done = 0;
    for (index_t layer = 0; layer < shape().num_layers; ++layer) {
      for (index_t head = 0; head < shape().num_kv_heads; ++head, ++done) {
        if (!body(layer, layout_.offset(region_blocks_, layer, head, 0))) return done;
      }
    }
    return done;
  }

  /// Regions of so many blocks, or a multiple, end where pages of `page_bytes` bytes do, in every layer.
  [[nodiscard]] index_t granular_blocks(index_t page_bytes) const noexcept {
    index_t blocks = 1;  // page sizes are powers of two: the largest that a layer needs is a multiple of all
    for (index_t layer = 0; layer < shape().num_layers; ++layer)
      blocks = std::max(blocks, page_bytes / std::gcd(page_bytes, layout_.block_bytes(layer)));
    return blocks;
  }

  // A region costs the system two mappings, of which a process has about 65,000: so many regions are copied.
  static constexpr index_t max_reserved_regions = 4096;

  status grow(index_t needed) {
    // A little more than needed where memory is only granted (untouched pages cost none), double where it is copied.
    const bool in_place = space_ && needed <= reserved_blocks_;
    if (in_place && grant(std::min(reserved_blocks_, needed + needed / 8)) == status::ok) return status::ok;
    const bool may_reserve =
        options_.memory == nullptr && layout_.num_regions() <= max_reserved_regions && !in_place;
    if (may_reserve && reserve(std::max(needed, num_blocks_ == 0 ? reserved_blocks_ : 2 * num_blocks_)) &&
        grant_or_forget(needed) == status::ok)
      return status::ok;
    return reallocate(std::max(needed, 2 * num_blocks_));
  }

  /// Grants memory for blocks [num_blocks_, blocks) of every region.
  status grant(index_t blocks) {
    const index_t granted = for_each_region([&](index_t layer, index_t start) {
      return space_.grant(start + granted_bytes(layer, num_blocks_), start + granted_bytes(layer, blocks));
    });
    if (granted < layout_.num_regions()) {
      index_t left = granted;
      (void)for_each_region([&](index_t layer, index_t start) {
        if (left-- == 0) return false;
        space_.revoke(start + granted_bytes(layer, num_blocks_), start + granted_bytes(layer, blocks));
        return true;
      });
      return status::out_of_memory;
    }
    num_blocks_ = blocks;
    return status::ok;
  }

  /// Joins the small pages that `full_blocks` blocks of the regions fill: in each call one or two huge pages of one region, so
  /// that no append takes long.
  void join_pages(index_t full_blocks) noexcept {
    if (!space_) return;
    const index_t blocks_of_page =
        ceil_div(layout_.num_regions() * huge_page, layout_.page_bytes());  // on average
    const index_t joining_blocks = joined_blocks_ + blocks_of_page;
    if (joining_region_ == 0 && full_blocks < joining_blocks) return;
    const index_t num_heads = shape().num_kv_heads;
    const index_t layer = joining_region_ / num_heads;
    const index_t start = layout_.offset(region_blocks_, layer, joining_region_ % num_heads, 0);
    const auto page_of = [&](index_t blocks) {
      return (start + blocks * layout_.block_bytes(layer)) / huge_page * huge_page;
    };
    (void)space_.join(std::max(page_of(joined_blocks_), round_up(start, huge_page)), page_of(joining_blocks));
    if (++joining_region_ < layout_.num_regions()) return;
    joined_blocks_ = joining_blocks;
    joining_region_ = 0;
  }

  /// Reserves addresses for `blocks` blocks in `next_`: to where huge pages end, so that the next region begins with one, if
  /// that is at most twice as many and the system has them. \return false where it refuses
  bool reserve(index_t blocks) {
    const auto reserve_multiple_of = [&](index_t granular) {
      next_region_blocks_ = round_up(blocks, granular);
      next_ = address_space::reserve(checked_mul(next_region_blocks_, layout_.page_bytes()));
      return static_cast<bool>(next_);
    };
    next_blocks_ = blocks;
    const index_t of_huge_pages = granular_blocks(huge_page);
    return (of_huge_pages <= blocks && reserve_multiple_of(of_huge_pages)) ||
           reserve_multiple_of(granular_blocks(address_space::granularity()));
  }

  /// Moves into the addresses just reserved; on failure stays where it is.
  status grant_or_forget(index_t needed) {
    contiguous_storage moved(layout_, options_);
    moved.space_ = std::move(next_);
    moved.base_ = moved.space_.data();
    moved.region_blocks_ = next_region_blocks_;
    moved.reserved_blocks_ = next_blocks_;
    if (const status s = moved.grant(needed); s != status::ok) return s;
    moved.take_blocks_from(*this);
    *this = std::move(moved);
    return status::ok;
  }

  /// Copying growth. Throws std::bad_alloc or shape_error, then nothing changed.
  status reallocate(index_t blocks) {
    std::pmr::memory_resource* memory = options_.memory != nullptr ? options_.memory : huge_page_resource();
    contiguous_storage moved(layout_, options_);
    moved.region_blocks_ = blocks;
    if (blocks > 0) moved.memory_ = memory_block(checked_mul(blocks, layout_.page_bytes()), memory);
    moved.base_ = moved.memory_.data();
    moved.num_blocks_ = blocks;
    moved.take_blocks_from(*this);
    *this = std::move(moved);
    return status::ok;
  }

  void take_blocks_from(const contiguous_storage& other) {
    if (other.num_blocks_ == 0) return;
    for (index_t layer = 0; layer < shape().num_layers; ++layer) {
      const auto bytes = static_cast<std::size_t>(other.num_blocks_ * layout_.block_bytes(layer));
      for (index_t head = 0; head < shape().num_kv_heads; ++head)
        std::memcpy(block(layer, head, 0), other.block(layer, head, 0), bytes);
    }
  }

  block_layout layout_;
  contiguous_options options_;
  index_t reserved_blocks_ = 0;  // per region, that addresses are (to be) reserved for
  index_t num_blocks_ = 0;       // per region, that there is memory for
  index_t region_blocks_ = 0;    // per region, that there are addresses for
  std::byte* base_ = nullptr;
  address_space space_;  // one of the two holds the memory
  memory_block memory_;
  index_t joined_blocks_ = 0;   // of every region, whose pages were joined
  index_t joining_region_ = 0;  // the first whose next pages were not, while others' were
  address_space next_;          // between reserve and grant_or_forget only
  index_t next_region_blocks_ = 0;
  index_t next_blocks_ = 0;
};

/// One region per layer and head: the fastest to walk, nothing shared, copies to fork.
template <block_codec Codec = codec::bf16>
using contiguous_cache = sequence_cache<Codec, contiguous_storage>;

static_assert(block_storage<contiguous_storage> && kv_cache<contiguous_cache<>>);

}  // namespace kvcache::inline v0
