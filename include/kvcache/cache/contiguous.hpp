// SPDX-License-Identifier: MIT
// contiguous_cache: one region of memory per layer and KV head.
//
//   base ->  | layer 0, head 0: block 0 | block 1 | ... | room to grow |
//            | layer 0, head 1: block 0 | block 1 | ... | room to grow |     block = base + region * stride
//            | ...                                                     |                       + index * block_bytes
//
// Addresses for `max_tokens` are reserved at the start and memory is granted as tokens come, so growing copies
// nothing. Beyond max_tokens, or where the system cannot reserve or grant, or a memory resource is given, or there
// are more than 4096 regions, growth doubles and copies (amortised O(1) per token).
#pragma once

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
  contiguous_storage(const cache_shape& shape, index_t block_bytes, const contiguous_options& settings)
      : shape_(shape), block_bytes_(block_bytes), options_(settings) {
    reserved_blocks_ = ceil_div(checked_add(settings.max_tokens, 0), shape.block_size);
    (void)checked_mul(num_regions(), block_bytes_, std::max(reserved_blocks_, index_t{1}));
  }

  contiguous_storage(contiguous_storage&&) noexcept = default;
  contiguous_storage& operator=(contiguous_storage&&) noexcept = default;

  /// Grows the capacity to at least `last` blocks.
  [[nodiscard]] status prepare_write(index_t /*first*/, index_t last) {
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
    for (index_t layer = 0; layer < shape_.num_layers; ++layer) {
      for (index_t head = 0; head < shape_.num_kv_heads; ++head) {
        for (std::size_t i = 0; i < kept.size(); ++i) {
          const auto to = static_cast<index_t>(i);
          if (kept[i] == to) continue;
          std::memcpy(block(layer, head, to), block(layer, head, kept[i]),
                      static_cast<std::size_t>(block_bytes_));
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
      const index_t kept = granted_bytes(num_blocks);
      for (index_t region = 0; region < num_regions(); ++region)
        space_.revoke(region * stride_bytes_ + kept, region * stride_bytes_ + granted_bytes(num_blocks_));
      num_blocks_ = num_blocks;
    } else {
      try {
        num_blocks_ = num_blocks;
        (void)reallocate(num_blocks);
      } catch (const std::bad_alloc&) {
        num_blocks_ = memory_.size() / (block_bytes_ * num_regions());  // as it was
      }
    }
  }

  [[nodiscard]] std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    return base_ + (layer * shape_.num_kv_heads + head) * stride_bytes_ + index * block_bytes_;
  }
  /// Blocks there is memory for, per layer and head.
  [[nodiscard]] index_t num_blocks() const noexcept { return num_blocks_; }
  [[nodiscard]] index_t total_bytes() const noexcept { return num_regions() * granted_bytes(num_blocks_); }
  [[nodiscard]] index_t shared_bytes() const noexcept { return 0; }
  [[nodiscard]] std::pmr::memory_resource* memory() const noexcept {
    return options_.memory != nullptr ? options_.memory : huge_page_resource();
  }
  [[nodiscard]] contiguous_storage empty_like() const { return {shape_, block_bytes_, options_}; }

  /// Whether growth still happens in place.
  [[nodiscard]] bool grows_in_place() const noexcept { return static_cast<bool>(space_); }

  void check() const {
    if (num_blocks_ > 0 && (base_ == nullptr || granted_bytes(num_blocks_) > stride_bytes_))
      throw invariant_error("kvcache: every region has memory for its blocks");
  }

 private:
  [[nodiscard]] index_t num_regions() const noexcept { return shape_.num_layers * shape_.num_kv_heads; }
  [[nodiscard]] index_t granted_bytes(index_t blocks) const noexcept {
    const index_t bytes = blocks * block_bytes_;
    return space_ ? ceil_div(bytes, address_space::granularity()) * address_space::granularity() : bytes;
  }

  // A region costs the system two mappings, of which a process has about 65,000: so many regions are copied.
  static constexpr index_t max_reserved_regions = 4096;

  status grow(index_t needed) {
    // A little more than needed where memory is only granted (untouched pages cost none), double where it is copied.
    const bool in_place = space_ && needed <= reserved_blocks_;
    if (in_place && grant(std::min(reserved_blocks_, needed + needed / 8)) == status::ok) return status::ok;
    const bool may_reserve = options_.memory == nullptr && num_regions() <= max_reserved_regions && !in_place;
    if (may_reserve && reserve(std::max(needed, num_blocks_ == 0 ? reserved_blocks_ : 2 * num_blocks_)) &&
        grant_or_forget(needed) == status::ok)
      return status::ok;
    return reallocate(std::max(needed, 2 * num_blocks_));
  }

  /// Grants memory for blocks [num_blocks_, blocks) of every region.
  status grant(index_t blocks) {
    const index_t from = granted_bytes(num_blocks_);
    const index_t to = granted_bytes(blocks);
    for (index_t region = 0; region < num_regions(); ++region) {
      if (space_.grant(region * stride_bytes_ + from, region * stride_bytes_ + to)) continue;
      for (index_t r = 0; r < region; ++r) space_.revoke(r * stride_bytes_ + from, r * stride_bytes_ + to);
      return status::out_of_memory;
    }
    num_blocks_ = blocks;
    return status::ok;
  }

  /// Reserves addresses for `blocks` blocks in `next_`. \return false where the system refuses.
  bool reserve(index_t blocks) {
    const index_t stride = round_up(checked_mul(blocks, block_bytes_), address_space::granularity());
    next_ = address_space::reserve(checked_mul(stride, num_regions()));
    if (!next_) return false;
    next_stride_ = stride;
    next_blocks_ = blocks;
    return true;
  }

  /// Moves into the addresses just reserved; on failure stays where it is.
  status grant_or_forget(index_t needed) {
    contiguous_storage moved(shape_, block_bytes_, options_);
    moved.space_ = std::move(next_);
    moved.base_ = moved.space_.data();
    moved.stride_bytes_ = next_stride_;
    moved.reserved_blocks_ = next_blocks_;
    if (const status s = moved.grant(needed); s != status::ok) return s;
    moved.take_blocks_from(*this);
    *this = std::move(moved);
    return status::ok;
  }

  /// Copying growth. Throws std::bad_alloc or shape_error, then nothing changed.
  status reallocate(index_t blocks) {
    std::pmr::memory_resource* memory = options_.memory != nullptr ? options_.memory : huge_page_resource();
    contiguous_storage moved(shape_, block_bytes_, options_);
    moved.stride_bytes_ = checked_mul(blocks, block_bytes_);
    if (blocks > 0) moved.memory_ = memory_block(checked_mul(moved.stride_bytes_, num_regions()), memory);
    moved.base_ = moved.memory_.data();
    moved.num_blocks_ = blocks;
    moved.take_blocks_from(*this);
    *this = std::move(moved);
    return status::ok;
  }

  void take_blocks_from(const contiguous_storage& other) {
    const auto bytes = static_cast<std::size_t>(other.num_blocks_ * block_bytes_);
    for (index_t region = 0; bytes > 0 && region < num_regions(); ++region)
      std::memcpy(base_ + region * stride_bytes_, other.base_ + region * other.stride_bytes_, bytes);
  }

  cache_shape shape_;
  index_t block_bytes_;
  contiguous_options options_;
  index_t reserved_blocks_ = 0;  // per region, that addresses are (to be) reserved for
  index_t num_blocks_ = 0;       // per region, that there is memory for
  index_t stride_bytes_ = 0;     // from one region to the next
  std::byte* base_ = nullptr;
  address_space space_;  // one of the two holds the memory
  memory_block memory_;
  address_space next_;  // between reserve and grant_or_forget only
  index_t next_stride_ = 0;
  index_t next_blocks_ = 0;
};

/// One region per layer and head: the fastest to walk, nothing shared, copies to fork.
template <block_codec Codec = codec::bf16>
using contiguous_cache = sequence_cache<Codec, contiguous_storage>;

static_assert(block_storage<contiguous_storage> && kv_cache<contiguous_cache<>>);

}  // namespace kvcache::inline v0
