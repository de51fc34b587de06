// SPDX-License-Identifier: MIT
// The block order: where element (token, dim) of one block lies. The same on every machine.
//
// A block is `block_size` tokens of one layer and one KV head. `pack` elements fill 32 bits:
//
//   keys    [block_size/16][ceil(head_dim/pack)][16 tokens][pack dims]      tokens in lanes: no horizontal sums
//   values  [block_size/pack][head_dim][pack tokens]                        dims in lanes
//
//   keys, 16 bit:   | t0d0 t0d1 | t1d0 t1d1 | ... | t15d0 t15d1 |  64 bytes: dims 0, 1 of tokens 0..15
//                   | t0d2 t0d3 | t1d2 t1d3 | ... | t15d2 t15d3 |  64 bytes: dims 2, 3
//   values, 16 bit: | t0d0 t1d0 | t0d1 t1d1 | t0d2 t1d2 | ...      tokens 0, 1, dim by dim; then tokens 2, 3
//
// Where head_dim is not a multiple of `pack`, the keys' last dims are zero. Values are never padded.
#pragma once

#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>

namespace kvcache::inline v0 {

/// What the index arithmetic of a block depends on. \pre valid for cache_shape, see validate()
struct block_geometry {
  index_t block_size = 64;  ///< tokens
  index_t head_dim = 64;    ///< elements of one row

  friend bool operator==(const block_geometry&, const block_geometry&) = default;
};

/// The geometry of the blocks of a shape.
constexpr block_geometry geometry_of(const cache_shape& shape) noexcept {
  return {shape.block_size, shape.head_dim};
}

/// Tokens side by side in a key group; the block order is built from groups of this many.
inline constexpr index_t key_lanes = 16;

/// Index arithmetic in elements of type `Element` (8, 16 or 32 bits).
template <class Element>
struct block_order {
  static_assert(sizeof(Element) == 1 || sizeof(Element) == 2 || sizeof(Element) == 4);

  static constexpr index_t pack = 4 / static_cast<index_t>(sizeof(Element));

  /// 32-bit groups of dims in one key row.
  static constexpr index_t key_packs(const block_geometry& g) noexcept { return ceil_div(g.head_dim, pack); }

  /// Elements of one group of `key_lanes` tokens.
  static constexpr index_t key_group_size(const block_geometry& g) noexcept {
    return key_packs(g) * key_lanes * pack;
  }

  /// Elements of all keys of a block, padding included.
  static constexpr index_t key_size(const block_geometry& g) noexcept {
    return g.block_size / key_lanes * key_group_size(g);
  }

  /// \post result == ((token/16 * key_packs + dim/pack) * 16 + token%16) * pack + dim%pack
  static constexpr index_t key_index(const block_geometry& g, index_t token, index_t dim) noexcept {
    return ((token / key_lanes * key_packs(g) + dim / pack) * key_lanes + token % key_lanes) * pack +
           dim % pack;
  }

  /// Elements of all values of a block.
  static constexpr index_t value_size(const block_geometry& g) noexcept { return g.block_size * g.head_dim; }

  /// \post result == (token/pack * head_dim + dim) * pack + token%pack
  static constexpr index_t value_index(const block_geometry& g, index_t token, index_t dim) noexcept {
    return (token / pack * g.head_dim + dim) * pack + token % pack;
  }
};

}  // namespace kvcache::inline v0
