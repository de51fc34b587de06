// SPDX-License-Identifier: MIT
// How sealing_blocks encodes what leaves the exact tail, and makes an exact tail again when a sequence is cut.
#pragma once

#include <kvcache/block/view.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/sealing_blocks.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace kvcache::inline v0::detail {

/// Encodes the blocks that left the tail of a layer of `size` tokens.
template <sealing_codec Codec, block_storage Storage>
status sealing_blocks<Codec, Storage>::seal(const kernel::table& kernels, index_t layer, index_t size) {
  const block_geometry g = geometry();
  for (index_t& index = state(layer).sealed; index < blocks_to_seal(size); ++index) {
    for (index_t head = 0; head < shape().num_kv_heads; ++head) {
      const mutable_rows k = work_rows(0);
      const mutable_rows v = work_rows(1);
      exact_.decode(kernels, g, exact_block(layer, head, index), 0, g.block_size, k, v);
      const index_t skipped = index == 0 ? num_sinks() : 0;
      std::byte* to = direct_.block(layer, head, index);
      const auto& here = codec_at(codec(), layer, head);
      std::memset(to, 0, static_cast<std::size_t>(here.block_bytes(g)));  // padding too: no stale bytes
      if (skipped > 0) {
        std::memset(sinks(layer, head), 0, static_cast<std::size_t>(sink_bytes()));
        exact_.encode(kernels, sink_geometry(), sinks(layer, head), 0, skipped, constant(k), constant(v));
      }
      if (skipped == g.block_size) continue;
      const status s = here.encode(kernels, g, to, skipped, g.block_size - skipped,
                                   {k.row(skipped), k.stride}, {v.row(skipped), v.stride});
      if (s != status::ok) return s;
    }
  }
  return status::ok;
}

/// Makes the tail of a layer that is cut to `size` tokens: exact where the ring still has them, else decoded.
template <sealing_codec Codec, block_storage Storage>
void sealing_blocks<Codec, Storage>::unseal(const kernel::table& kernels, index_t layer,
                                            index_t size) noexcept {
  layer_state& s = state(layer);
  while (s.sealed > blocks_to_seal(size) && s.sealed > s.first_in_ring) --s.sealed;
  const index_t block_size = shape().block_size;
  const index_t cut_block = size / block_size;
  const float most = exact_.largest();
  if (s.sealed <= cut_block) return;
  for (index_t head = 0; size % block_size != 0 && head < shape().num_kv_heads; ++head) {
    const mutable_rows k = work_rows(0);
    const mutable_rows v = work_rows(1);
    read_piece(kernels, layer, head, {cut_block, 0, block_size, 0}, k, v);
    // What a codec gives back beyond what exact tokens can be would be refused when the block is sealed again.
    for (const mutable_rows& rows : {k, v}) {
      for (index_t t = 0; t < block_size; ++t) {
        float* row = rows.row(t);
        std::transform(row, row + shape().head_dim, row,
                       [most](float x) { return x == x ? std::clamp(x, -most, most) : 0.0F; });
      }
    }
    exact_.encode(kernels, geometry(), exact_block(layer, head, cut_block), 0, block_size, constant(k),
                  constant(v));
  }
  s.sealed = cut_block;
  s.first_in_ring = cut_block;
}

}  // namespace kvcache::inline v0::detail
