// SPDX-License-Identifier: MIT
// block_layout: where the blocks of each layer and head lie in a page. Layers may have blocks of different sizes.
//
//   page      | layer 0: head 0 | head 1 | layer 1: head 0 | head 1 | ...       every block of a layer as large
//   n pages   | layer 0, head 0: block 0 .. n-1 | layer 0, head 1: ... | ...    as large, each head in one piece
//
// A page of a pool is n = 1; a chunk is n = blocks_per_chunk; a contiguous cache is n = all that it has addresses for.
// Where all layers are alike an address is two multiplications and no table.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

/// Copied freely; copies share the table, where there is one.
class block_layout {
 public:
  /// Blocks of `block_bytes` bytes in every layer. Throws shape_error if a page's size overflows.
  block_layout(const cache_shape& shape, index_t block_bytes)
      : shape_(shape),
        block_bytes_(block_bytes),
        page_bytes_(checked_mul(shape.num_layers, shape.num_kv_heads, block_bytes)) {}

  /// \param block_bytes  [num_layers]
  /// Throws shape_error if there are not so many or a page's size overflows; std::bad_alloc.
  block_layout(const cache_shape& shape, std::span<const index_t> block_bytes) : shape_(shape) {
    if (static_cast<index_t>(block_bytes.size()) != shape.num_layers || block_bytes.empty())
      throw shape_error("kvcache: a block layout needs the bytes of a block of every layer");
    block_bytes_ = block_bytes.front();
    const bool alike = std::all_of(block_bytes.begin(), block_bytes.end(),
                                   [this](index_t bytes) { return bytes == block_bytes_; });
    std::unique_ptr<layer_blocks[]> layers;
    if (!alike) layers = std::make_unique<layer_blocks[]>(block_bytes.size());
    for (std::size_t i = 0; i < block_bytes.size(); ++i) {
      if (!alike) layers[i] = {page_bytes_, block_bytes[i]};
      page_bytes_ = checked_add(page_bytes_, checked_mul(shape.num_kv_heads, block_bytes[i]));
    }
    layers_ = std::move(layers);
  }

  [[nodiscard]] const cache_shape& shape() const noexcept { return shape_; }
  /// Heads of all layers.
  [[nodiscard]] index_t num_regions() const noexcept { return shape_.num_layers * shape_.num_kv_heads; }
  /// Bytes of one block of a layer, the same for all its heads.
  [[nodiscard]] index_t block_bytes(index_t layer) const noexcept {
    return layers_ == nullptr ? block_bytes_ : layers_[layer].block_bytes;
  }
  /// Bytes of the blocks of all layers and heads for one span of block_size tokens.
  [[nodiscard]] index_t page_bytes() const noexcept { return page_bytes_; }

  /// Where block `index` of a head begins in a piece of `num_pages` pages, in bytes. O(1).
  /// \pre `0 <= index < num_pages`, the layer and the head exist
  [[nodiscard]] index_t offset(index_t num_pages, index_t layer, index_t head, index_t index) const noexcept {
    if (layers_ == nullptr) return ((layer * shape_.num_kv_heads + head) * num_pages + index) * block_bytes_;
    const layer_blocks& here = layers_[layer];
    return num_pages * here.offset + (head * num_pages + index) * here.block_bytes;
  }

  /// Whether every layer's blocks are as large.
  [[nodiscard]] bool is_uniform() const noexcept { return layers_ == nullptr; }

 private:
  struct layer_blocks {
    index_t offset = 0;  // of the first head in a page
    index_t block_bytes = 0;
  };

  cache_shape shape_;
  index_t block_bytes_ = 0;  // of every layer, where there is no table
  index_t page_bytes_ = 0;
  std::shared_ptr<const layer_blocks[]> layers_;  // [num_layers]; null where all are alike
};

/// The layout of the blocks that a codec makes. Throws shape_error, std::bad_alloc.
template <block_codec Codec>
[[nodiscard]] block_layout layout_of(const cache_shape& shape, const Codec& codec) {
  const block_geometry g = geometry_of(shape);
  if constexpr (requires { codec.at(index_t{}, index_t{}); }) {
    std::vector<index_t> block_bytes;
    for (index_t layer = 0; layer < shape.num_layers; ++layer)
      block_bytes.push_back(block_bytes_at(codec, layer, g));
    return {shape, block_bytes};
  } else {
    return {shape, codec.block_bytes(g)};
  }
}

}  // namespace kvcache::inline v0
