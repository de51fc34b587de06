// SPDX-License-Identifier: MIT
// chunked_cache: grows by chunks of n blocks; nothing ever moves, and truncating frees memory.
//
//   chunk 0                              chunk 1
//   | layer 0, head 0: block 0 .. n-1 |  | layer 0, head 0: block n .. 2n-1 |
//   | layer 0, head 1: block 0 .. n-1 |  | layer 0, head 1: block n .. 2n-1 |    block = chunk[index / n] + index % n
//   | ...                             |  | ...                              |
#pragma once

#include <kvcache/cache/block_layout.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/sequence_cache.hpp>
#include <kvcache/codec/exact.hpp>
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
#include <vector>

namespace kvcache::inline v0 {

struct chunked_options {
  index_t blocks_per_chunk = 4;                              ///< per layer and head, at least 1
  std::pmr::memory_resource* memory = huge_page_resource();  ///< where chunks are allocated
};

/// The address function of chunked_cache; see block_storage.
class chunked_storage {
 public:
  using options = chunked_options;

  /// No memory yet. Throws shape_error if blocks_per_chunk is not positive or a chunk's size overflows.
  chunked_storage(const block_layout& layout, const chunked_options& settings)
      : layout_(layout), options_(settings) {
    if (settings.blocks_per_chunk < 1) throw shape_error("kvcache: blocks_per_chunk must be at least 1");
    chunk_bytes_ = checked_mul(settings.blocks_per_chunk, layout.page_bytes());
  }

  /// Adds chunks until there are `last` blocks.
  [[nodiscard]] status prepare_write(index_t /*first*/, index_t last) {
    const index_t missing = std::max(
        ceil_div(last, options_.blocks_per_chunk) - static_cast<index_t>(chunks_.size()), index_t{0});
    if (exceeds_memory(missing, chunk_bytes_, options_.memory)) return status::out_of_memory;
    const std::size_t before = chunks_.size();
    try {
      while (num_blocks() < last) chunks_.emplace_back(chunk_bytes_, options_.memory);
    } catch (const std::bad_alloc&) {
      chunks_.resize(before);
      return status::out_of_memory;
    }
    return status::ok;
  }

  /// Takes chunks out that hold none of the blocks, O(1) each; the other blocks move down, O(bytes behind the first gap).
  [[nodiscard]] status keep_blocks(std::span<const index_t> kept, index_t /*own_first*/,
                                   index_t /*own_last*/) noexcept {
    const index_t n = options_.blocks_per_chunk;
    index_t num_chunks = 0;  // that hold some
    index_t last_chunk = -1;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      if (const index_t chunk = kept[i] / n; chunk != last_chunk) {
        if (chunk != num_chunks)
          chunks_[static_cast<std::size_t>(num_chunks)].swap(chunks_[static_cast<std::size_t>(chunk)]);
        ++num_chunks;
        last_chunk = chunk;
      }
      move_block((num_chunks - 1) * n + kept[i] % n, static_cast<index_t>(i));
    }
    shrink(static_cast<index_t>(kept.size()));
    return status::ok;
  }

  /// Frees the chunks that hold none of the first `num_blocks` blocks.
  void shrink(index_t num_blocks) noexcept {
    const auto needed = static_cast<std::size_t>(ceil_div(num_blocks, options_.blocks_per_chunk));
    while (chunks_.size() > needed) chunks_.pop_back();
  }

  [[nodiscard]] std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    const index_t n = options_.blocks_per_chunk;
    return chunks_[static_cast<std::size_t>(index / n)].data() + layout_.offset(n, layer, head, index % n);
  }
  [[nodiscard]] index_t num_blocks() const noexcept {
    return static_cast<index_t>(chunks_.size()) * options_.blocks_per_chunk;
  }
  [[nodiscard]] index_t total_bytes() const noexcept {
    return static_cast<index_t>(chunks_.size()) * chunk_bytes_;
  }
  [[nodiscard]] index_t shared_bytes() const noexcept { return 0; }
  [[nodiscard]] std::pmr::memory_resource* memory() const noexcept { return options_.memory; }
  [[nodiscard]] chunked_storage empty_like() const { return {layout_, options_}; }

  void check() const {
    for (const memory_block& chunk : chunks_) {
      if (chunk.data() == nullptr || chunk.size() != chunk_bytes_)
        throw invariant_error("kvcache: every chunk has its full size");
    }
  }

 private:
  /// Copies a block of all layers and heads to another place.
  void move_block(index_t from, index_t to) noexcept {
    const cache_shape& shape = layout_.shape();
    for (index_t layer = 0; from != to && layer < shape.num_layers; ++layer) {
      for (index_t head = 0; head < shape.num_kv_heads; ++head)
        std::memcpy(block(layer, head, to), block(layer, head, from),
                    static_cast<std::size_t>(layout_.block_bytes(layer)));
    }
  }

  block_layout layout_;
  chunked_options options_;
  index_t chunk_bytes_ = 0;
  std::vector<memory_block> chunks_;
};

/// Chunks of blocks: grows without reserving or copying, frees on truncate, copies to fork.
template <block_codec Codec = codec::bf16>
using chunked_cache = sequence_cache<Codec, chunked_storage>;

static_assert(block_storage<chunked_storage> && kv_cache<chunked_cache<>>);

}  // namespace kvcache::inline v0
