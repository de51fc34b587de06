// SPDX-License-Identifier: MIT
// dense_kv: keys and values that were just computed, in block order, for attention without a cache.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>

namespace kvcache::inline v0 {

/// One layer of one sequence, complete and read-only. Recomputing over it and reading a cache of the same codec
/// and block size go through the same arithmetic and give the same bits.
template <block_codec Codec = codec::f32>
class dense_kv {
 public:
  /// \param k,v  [tokens, num_kv_heads, head_dim]; what the codec has for each layer is that of layer 0,
  ///             and exact tails and sinks are left out: every block is the codec's
  /// Throws shape_error, std::bad_alloc, and capacity_error if a lossy codec meets NaN or infinity.
  dense_kv(const cache_shape& shape, std::span<const float> k, std::span<const float> v, Codec codec = {})
      : shape_(shape), codec_(codec) {
    validate(shape_);
    validate(codec_, shape_);
    const block_geometry g{shape.block_size, shape.head_dim};
    const index_t stride = shape.num_kv_heads * shape.head_dim;
    KVCACHE_ASSERT(k.size() == v.size() && static_cast<index_t>(k.size()) % stride == 0,
                   "dense_kv: keys and values must hold the same whole number of tokens");
    size_ = static_cast<index_t>(k.size()) / stride;
    num_blocks_ = ceil_div(size_, g.block_size);
    block_bytes_ = block_bytes_at(codec_, 0, g);
    const index_t bytes = checked_mul(num_blocks_, shape.num_kv_heads, block_bytes_);
    if (bytes == 0) return;
    memory_ = memory_block(bytes, huge_page_resource());
    std::memset(memory_.data(), 0, static_cast<std::size_t>(bytes));
    for (index_t head = 0; head < shape.num_kv_heads; ++head) {
      for (index_t t = 0; t < size_; t += g.block_size) {
        const index_t offset = t * stride + head * shape.head_dim;
        const status s = codec_at(codec_, 0, head)
                             .encode(kernel::best(), g, block_at(head, t / g.block_size), 0,
                                     std::min(g.block_size, size_ - t), {k.data() + offset, stride},
                                     {v.data() + offset, stride});
        if (s != status::ok) throw capacity_error("dense_kv", s);
      }
    }
  }

  /// A handle for `attend`; models cache_layer. Invalidated when the dense_kv is moved or destroyed.
  class layer_ref {
   public:
    explicit layer_ref(const dense_kv& rows) noexcept : rows_(&rows) {}
    [[nodiscard]] const cache_shape& shape() const noexcept { return rows_->shape_; }
    [[nodiscard]] const Codec& codec() const noexcept { return rows_->codec_; }
    [[nodiscard]] decltype(auto) codec(index_t head) const noexcept {
      return codec_at(rows_->codec_, 0, head);
    }
    [[nodiscard]] index_t size() const noexcept { return rows_->size_; }
    [[nodiscard]] const position_map& positions() const noexcept { return rows_->positions_; }
    [[nodiscard]] const std::byte* block(index_t head, index_t index) const noexcept {
      return rows_->block_at(head, index);
    }

   private:
    const dense_kv* rows_;
  };
  static_assert(cache_layer<layer_ref>);

  [[nodiscard]] layer_ref layer() const noexcept { return layer_ref(*this); }

 private:
  [[nodiscard]] std::byte* block_at(index_t head, index_t index) const noexcept {
    return memory_.data() + (head * num_blocks_ + index) * block_bytes_;
  }

  cache_shape shape_;
  [[no_unique_address]] Codec codec_;
  index_t size_ = 0;
  index_t num_blocks_ = 0;
  index_t block_bytes_ = 0;
  memory_block memory_;
  position_map positions_;
};

}  // namespace kvcache::inline v0
