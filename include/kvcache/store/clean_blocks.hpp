// SPDX-License-Identifier: MIT
// clean_blocks: the blocks of a sequence as files have them. The bytes depend on the tokens alone: slots that hold none are
// zero rows, whatever they held before, so that nothing of tokens that were deleted gets into a file.
#pragma once

#include <kvcache/cache/block_access.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>
#include <kvcache/store/identity.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory_resource>
#include <vector>

namespace kvcache::inline v0::store::detail {

using access = kvcache::detail::block_access;

/// Geometry and size of the exact first tokens of a head.
inline block_geometry sink_geometry(const stored_sequence& s) {
  return {round_up(s.codec.sink_tokens, key_lanes), s.shape.head_dim};
}
inline index_t sink_bytes(const stored_sequence& s) {
  return s.codec.sink_tokens == 0 ? 0 : codec::exact_tokens{s.codec.exact_as}.block_bytes(sink_geometry(s));
}
inline index_t exact_block_bytes(const stored_sequence& s) {
  return codec::exact_tokens{s.codec.exact_as}.block_bytes(geometry_of(s.shape));
}

/// Each member returns the block where it lies, if it can be written as it is, else a copy in memory that holds
/// largest_bytes(): `copy()` gives that memory, and is called for nothing else.
template <class Cache>
class clean_blocks {
 public:
  /// \param about  shape and codec of the cache
  clean_blocks(const Cache& cache, const stored_sequence& about)
      : cache_(&cache),
        kernels_(&kernel::best()),
        seals_(about.codec.seals),
        exact_{about.codec.exact_as},
        sink_tokens_(about.codec.sink_tokens),
        sink_geometry_(sink_geometry(about)),
        largest_bytes_(std::max(exact_block_bytes(about), sink_bytes(about))),
        rows_(static_cast<std::size_t>(2 * about.shape.block_size * about.shape.head_dim)) {
    for (index_t layer = 0; layer < cache.shape().num_layers; ++layer)
      largest_bytes_ = std::max(largest_bytes_, access::block_bytes(cache, layer));
  }

  [[nodiscard]] index_t largest_bytes() const noexcept { return largest_bytes_; }

  /// A block in the encoding of the codec, of which `count` slots have tokens.
  template <class Copy>
  const std::byte* block(index_t layer, index_t head, index_t index, index_t count, Copy copy) {
    const std::byte* data = access::block(*cache_, layer, head, index);
    const auto bytes = static_cast<std::size_t>(access::block_bytes(*cache_, layer));
    if (seals_ && index == 0 && sink_tokens_ == geometry().block_size) {  // all of it is in the sinks
      std::byte* to = copy();
      std::memset(to, 0, bytes);
      return to;
    }
    if (count == geometry().block_size) return data;
    std::byte* to = copy();
    std::memcpy(to, data, bytes);
    clear_slots(codec_at(cache_->codec(), layer, head), to, count);
    return to;
  }

  /// An exact block, of which `count` slots have tokens.
  template <class Copy>
  const std::byte* exact_block(index_t layer, index_t head, index_t index, index_t count, Copy copy) {
    const std::byte* data = access::exact_block(*cache_, layer, head, index);
    const bool has_padding = geometry().head_dim % 2 != 0;
    if (count == geometry().block_size && !has_padding) return data;
    return exact_copy(data, geometry(), count, copy());
  }

  /// The exact first tokens of a head; zeros as long as no block is sealed.
  template <class Copy>
  const std::byte* sinks(index_t layer, index_t head, index_t num_sealed, Copy copy) {
    std::byte* to = copy();
    if (num_sealed > 0)
      return exact_copy(access::sinks(*cache_, layer, head), sink_geometry_, sink_tokens_, to);
    std::memset(to, 0, static_cast<std::size_t>(exact_.block_bytes(sink_geometry_)));
    return to;
  }

  /// Slots [count, block_size) of a block become zero rows.
  template <class Codec>
  void clear_slots(const Codec& codec, std::byte* block, index_t count) {
    const block_geometry g = geometry();
    std::fill(rows_.begin(), rows_.end(), 0.0F);
    const const_rows none{rows_.data(), g.head_dim};
    if (count < g.block_size)
      (void)codec.encode(*kernels_, g, block, count, g.block_size - count, none, none);
  }

 private:
  [[nodiscard]] block_geometry geometry() const noexcept { return geometry_of(cache_->shape()); }

  /// As if it had just been made.
  const std::byte* exact_copy(const std::byte* block, const block_geometry& g, index_t count, std::byte* to) {
    const mutable_rows k{rows_.data(), g.head_dim};
    const mutable_rows v{rows_.data() + g.block_size * g.head_dim, g.head_dim};
    exact_.decode(*kernels_, g, block, 0, count, k, v);
    std::memset(to, 0, static_cast<std::size_t>(exact_.block_bytes(g)));
    exact_.encode(*kernels_, g, to, 0, count, {k.data, k.stride}, {v.data, v.stride});
    return to;
  }

  const Cache* cache_;
  const kernel::table* kernels_;
  bool seals_;
  codec::exact_tokens exact_;
  index_t sink_tokens_;
  block_geometry sink_geometry_;
  index_t largest_bytes_;
  std::vector<float> rows_;  // [2, block_size, head_dim]; sinks are no more than a block
};

/// The same with memory for as many copies as are asked for, which is kept. What it returns stays until reuse().
template <class Cache>
class copied_blocks {
 public:
  copied_blocks(const Cache& cache, const stored_sequence& about) : clean_(cache, about) {}

  void reuse() noexcept { num_used_ = 0; }
  const std::byte* block(index_t layer, index_t head, index_t index, index_t count) {
    return clean_.block(layer, head, index, count, next());
  }
  const std::byte* exact_block(index_t layer, index_t head, index_t index, index_t count) {
    return clean_.exact_block(layer, head, index, count, next());
  }
  const std::byte* sinks(index_t layer, index_t head, index_t num_sealed) {
    return clean_.sinks(layer, head, num_sealed, next());
  }

 private:
  /// Throws std::bad_alloc when it is called.
  auto next() {
    return [this] {
      if (num_used_ == copies_.size())
        copies_.emplace_back(clean_.largest_bytes(), std::pmr::new_delete_resource());
      return copies_[num_used_++].data();
    };
  }

  clean_blocks<Cache> clean_;
  std::vector<memory_block> copies_;
  std::size_t num_used_ = 0;
};

}  // namespace kvcache::inline v0::store::detail
