// SPDX-License-Identifier: MIT
// blocks_for_codec: what holds the blocks of a sequence, by what its codec asks for.
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/direct_blocks.hpp>
#include <kvcache/cache/keep_sealed.hpp>
#include <kvcache/cache/seal_blocks.hpp>
#include <kvcache/cache/sealing_blocks.hpp>
#include <kvcache/codec/concepts.hpp>

namespace kvcache::inline v0::detail {

struct block_access;  // cache/block_access.hpp

template <block_codec Codec, block_storage Storage>
struct blocks_for_codec {
  static_assert(
      !requires(const Codec& codec) { codec.tail_tokens; },
      "a codec with tail_tokens needs sink_tokens and exact_as, as codec::sealing_options has them");
  using type = direct_blocks<Codec, Storage>;
};
template <sealing_codec Codec, block_storage Storage>
struct blocks_for_codec<Codec, Storage> {
  using type = sealing_blocks<Codec, Storage>;
};

}  // namespace kvcache::inline v0::detail
