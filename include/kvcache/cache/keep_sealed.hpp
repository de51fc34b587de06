// SPDX-License-Identifier: MIT
// keep_tokens where a codec seals: sealed blocks stay or go whole, none is encoded again; exact tokens stay one by one, bit
// by bit.
//
//   before   [sinks] sealed 0 | sealed 1 | sealed 2 | exact 3 | exact 4       kept: blocks 0 and 2, some tokens behind
//   after    [sinks] sealed 0 | sealed 2 | exact ...
//
// The exact tail may be shorter than tail_tokens for a while: no sealed block becomes exact again.
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/keep_tokens.hpp>
#include <kvcache/cache/sealing_blocks.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <cstddef>
#include <cstring>
#include <new>

namespace kvcache::inline v0::detail {

template <sealing_codec Codec, block_storage Storage>
keep_limits sealing_blocks<Codec, Storage>::limits(index_t size) const noexcept {
  if (!seals_) return direct_.limits(size);
  const index_t sealed = blocks_needed({}) * shape().block_size;
  return {sealed, num_sinks() > 0 && sealed > 0 ? shape().block_size : 0};
}

template <sealing_codec Codec, block_storage Storage>
status sealing_blocks<Codec, Storage>::keep(const keep_plan& plan) {
  if (!seals_) return direct_.keep(plan);
  const index_t num_sealed = blocks_needed({});
  KVCACHE_ASSERT(plan.keeps_whole_blocks(num_sealed * shape().block_size),
                 "keep_tokens: sealed blocks stay or go whole; see keep_limits");
  KVCACHE_ASSERT(num_sinks() == 0 || num_sealed == 0 || plan.blocks().front() == 0,
                 "keep_tokens: the block with exact sinks stays; see keep_limits");
  memory_block copy;  // of one head's ring
  if (tail_.data() != nullptr) {
    try {
      copy = memory_block(ring_blocks_ * exact_bytes_, storage().memory());
    } catch (const std::bad_alloc&) {
      return status::out_of_memory;
    }
  }
  const index_t sealed_kept = plan.blocks_before(num_sealed);
  const auto kept = plan.blocks().first(static_cast<std::size_t>(sealed_kept));
  if (const status s = storage().keep_blocks(kept, sealed_kept, sealed_kept); s != status::ok) return s;
  storage().shrink(sealed_kept);
  if (copy.data() != nullptr) keep_exact(plan, copy.data());
  return status::ok;
}

/// Moves the exact tokens to where they belong once those before them are gone, and counts what is sealed anew.
/// \param copy  [ring_blocks * exact_bytes]: in a ring places may be needed by others before they are free
template <sealing_codec Codec, block_storage Storage>
void sealing_blocks<Codec, Storage>::keep_exact(const keep_plan& plan, std::byte* copy) noexcept {
  const block_geometry g = geometry();
  for (index_t layer = 0; layer < shape().num_layers; ++layer) {
    layer_state& s = state(layer);
    const index_t sealed = plan.blocks_before(s.sealed);
    const index_t first = sealed * g.block_size;  // exact token, counted anew
    for (index_t head = 0; head < shape().num_kv_heads; ++head) {
      std::memcpy(copy, region(layer, head), static_cast<std::size_t>(ring_blocks_ * exact_bytes_));
      for (index_t i = first; i < plan.num_tokens(); ++i) {
        const index_t token = plan.tokens()[static_cast<std::size_t>(i)];
        if (token == i) continue;
        exact_.move_token(g, copy + token / g.block_size % ring_blocks_ * exact_bytes_, token % g.block_size,
                          exact_block(layer, head, i / g.block_size), i % g.block_size);
      }
    }
    s = {sealed, sealed};
  }
}

}  // namespace kvcache::inline v0::detail
