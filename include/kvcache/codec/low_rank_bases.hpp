// SPDX-License-Identifier: MIT
// low_rank_bases: the bases that low_rank stores rows in, one for the keys and one for the values of each head.
//
//   stored  c = (in x) / spread             rank numbers in place of the head_dim of x
//   read    q . x  ~  (spread * out q) . c       x  ~  out^T (spread * c)        out in^T = identity
//
// Where nothing is known of the queries, or of what the sums of values are multiplied by, in and out are one matrix with
// orthonormal rows.
// How they are found: codec/low_rank.hpp, the only part that needs Eigen.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::codec {

/// What low_rank_bases are made from, for instance from a file. Matrices are row-major.
struct low_rank_matrices {
  low_rank_layout key_layout = {};                  ///< of every layer; of rank 0: no bases for keys
  low_rank_layout value_layout = {};                ///< the same for values
  std::vector<low_rank_layout> key_layouts = {};    ///< [num_layers], or empty: key_layout
  std::vector<low_rank_layout> value_layouts = {};  ///< [num_layers], or empty: value_layout
  std::vector<float> keys_in = {};        ///< [num_layers, num_kv_heads, key rank of the layer, head_dim]
  std::vector<float> keys_out = {};       ///< the same size, or empty: keys_in
  std::vector<float> values = {};         ///< [num_layers, num_kv_heads, value rank, head_dim]: in
  std::vector<float> values_out = {};     ///< the same size, or empty: values
  std::vector<float> key_spreads = {};    ///< [num_layers, num_kv_heads, key rank], above zero
  std::vector<float> value_spreads = {};  ///< [num_layers, num_kv_heads, value rank]
};

/// What the rows of one head are multiplied by. Components are padded to a multiple of 16 by zeros, spreads by ones.
struct low_rank_basis {
  const float* in = nullptr;   ///< keys: [rank/16][head_dim][16], the block order; values: [rank][head_dim]
  const float* out = nullptr;  ///< the same order; may be `in`
  const float* spreads = nullptr;           ///< [rank]
  const low_rank_layout* layout = nullptr;  ///< of the layer
};

/// What is calibrated: rows as they are appended, and what the queries looked like.
struct low_rank_sample {
  std::span<const float>
      k;  ///< [num_layers, tokens, num_kv_heads, head_dim], keys rotated as they are stored
  std::span<const float> v;  ///< the same
  /// Sum or mean of q q^T over the queries that read a head, [num_layers, num_kv_heads, head_dim, head_dim]; or empty.
  std::span<const float> query_moments = {};
};

/// Shared by the copies of a codec, never changed.
class low_rank_bases {
 public:
  /// Throws shape_error if a size is wrong, a layout does not fit head_dim or a number is not finite, or above 1e15.
  low_rank_bases(const cache_shape& shape, const low_rank_matrices& matrices);

  /// The best bases for sample rows, keys and values by the same options or each by its own. Defined in
  /// codec/low_rank.hpp. Throws shape_error if options, sizes or numbers cannot be.
  static std::shared_ptr<const low_rank_bases> fit(const cache_shape& shape, const low_rank_options& options,
                                                   const low_rank_sample& sample);
  static std::shared_ptr<const low_rank_bases> fit(const cache_shape& shape, const low_rank_options& keys,
                                                   const low_rank_options& values,
                                                   const low_rank_sample& sample);
  /// The same for the tokens that a cache has now. \tparam Cache  any kv_cache
  template <class Cache>
  static std::shared_ptr<const low_rank_bases> fit_from(const Cache& cache, const low_rank_options& options,
                                                        std::span<const float> query_moments = {}) {
    return fit_from(cache, options, options, query_moments);
  }
  template <class Cache>
  static std::shared_ptr<const low_rank_bases> fit_from(const Cache& cache, const low_rank_options& keys,
                                                        const low_rank_options& values,
                                                        std::span<const float> query_moments = {});

  [[nodiscard]] const cache_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] const low_rank_layout& key_layout(index_t layer = 0) const noexcept {
    return keys_.layouts[static_cast<std::size_t>(layer)];
  }
  [[nodiscard]] const low_rank_layout& value_layout(index_t layer = 0) const noexcept {
    return values_.layouts[static_cast<std::size_t>(layer)];
  }

  [[nodiscard]] low_rank_basis keys(index_t layer, index_t head) const noexcept {
    return basis_of(keys_, layer, head);
  }
  [[nodiscard]] low_rank_basis values(index_t layer, index_t head) const noexcept {
    return basis_of(values_, layer, head);
  }

  /// Memory of the bases of the keys and of the values; part of what each cache with them reports as shared.
  [[nodiscard]] index_t key_bytes() const noexcept { return keys_.num_floats * index_t{sizeof(float)}; }
  [[nodiscard]] index_t value_bytes() const noexcept { return values_.num_floats * index_t{sizeof(float)}; }

 private:
  /// Layouts of the layers, and where in the memory each has its bases.
  struct one_side {
    std::vector<low_rank_layout> layouts;  // [num_layers]
    std::vector<index_t> first;            // [num_layers] float of the first head
    std::vector<index_t> head_floats;      // [num_layers] from one head to the next
    index_t num_floats = 0;
    bool weighted = false;  // out is a matrix of its own

    [[nodiscard]] index_t at(index_t layer, index_t head) const noexcept {
      const auto i = static_cast<std::size_t>(layer);
      return first[i] + head * head_floats[i];
    }
  };

  [[nodiscard]] const float* floats() const noexcept {
    return reinterpret_cast<const float*>(memory_.data());
  }
  [[nodiscard]] index_t matrix_floats(const low_rank_layout& layout) const noexcept {
    return round_up(layout.rank(), key_lanes) * shape_.head_dim;
  }
  [[nodiscard]] low_rank_basis basis_of(const one_side& side, index_t layer, index_t head) const noexcept {
    const low_rank_layout& layout = side.layouts[static_cast<std::size_t>(layer)];
    const float* at = floats() + side.at(layer, head);
    const float* out = side.weighted ? at + matrix_floats(layout) : at;
    return {at, out, out + matrix_floats(layout), &layout};
  }

  [[nodiscard]] one_side side_of(std::vector<low_rank_layout> layouts, const low_rank_layout& layout,
                                 bool weighted, index_t first) const {
    const auto num_layers = static_cast<std::size_t>(shape_.num_layers);
    if (layouts.empty()) layouts.assign(num_layers, layout);
    if (layouts.size() != num_layers)
      throw shape_error("kvcache: low_rank: layouts must be [num_layers], or one for all");
    one_side side;
    side.weighted = weighted;
    const index_t num_matrices = weighted ? 2 : 1;
    for (const low_rank_layout& each : layouts) {
      check_layout(each);
      side.first.push_back(first + side.num_floats);
      side.head_floats.push_back(num_matrices * matrix_floats(each) + round_up(each.rank(), key_lanes));
      side.num_floats += shape_.num_kv_heads * side.head_floats.back();
    }
    side.layouts = std::move(layouts);
    return side;
  }

  void check_layout(const low_rank_layout& layout) const {
    for (const index_t count : layout.counts()) {
      if (count < 0 || count > shape_.head_dim)
        throw shape_error("kvcache: low_rank: a group has 0 to head_dim components");
    }
    if (layout.rank() > shape_.head_dim)
      throw shape_error("kvcache: low_rank: rank must be at most head_dim, got " +
                        std::to_string(layout.rank()));
  }
  /// Components of all heads of all layers.
  [[nodiscard]] index_t num_components(const one_side& side) const noexcept {
    index_t ranks = 0;
    for (const low_rank_layout& layout : side.layouts) ranks += layout.rank();
    return shape_.num_kv_heads * ranks;
  }
  static void check_floats(const std::vector<float>& floats, index_t count, bool above_zero) {
    if (static_cast<index_t>(floats.size()) != count)
      throw shape_error("kvcache: low_rank: bases must be [num_layers, num_kv_heads, rank, head_dim]");
    for (const float x : floats) {
      if (!(std::fabs(x) <= 1e15F) || (above_zero && !(x >= 1e-15F)))
        throw shape_error("kvcache: low_rank: the numbers of a basis must be finite, and spreads above zero");
    }
  }

  /// Rows [rank, head_dim] of one head into the block order of keys, zeros behind them.
  void put_lanes(const float* rows, index_t rank, float* to) const noexcept {
    const block_geometry g{round_up(rank, key_lanes), shape_.head_dim};
    for (index_t i = 0; i < rank; ++i) {
      for (index_t d = 0; d < shape_.head_dim; ++d)
        to[block_order<float>::key_index(g, i, d)] = rows[i * shape_.head_dim + d];
    }
  }

  /// Calls body(rank, components of the heads before, basis of the head) for each head of each layer.
  template <class Body>
  void for_each_basis(const one_side& side, Body body) const {
    index_t components = 0;
    for (index_t layer = 0; layer < shape_.num_layers; ++layer) {
      const index_t rank = side.layouts[static_cast<std::size_t>(layer)].rank();
      for (index_t head = 0; head < shape_.num_kv_heads; ++head, components += rank)
        body(rank, components, const_cast<float*>(floats()) + side.at(layer, head));
    }
  }

  cache_shape shape_;
  one_side keys_;
  one_side values_;
  memory_block memory_;
};

inline low_rank_bases::low_rank_bases(const cache_shape& shape, const low_rank_matrices& matrices)
    : shape_(shape) {
  validate(shape);
  keys_ = side_of(matrices.key_layouts, matrices.key_layout, !matrices.keys_out.empty(), 0);
  values_ =
      side_of(matrices.value_layouts, matrices.value_layout, !matrices.values_out.empty(), keys_.num_floats);
  const index_t dim = shape.head_dim;
  check_floats(matrices.keys_in, num_components(keys_) * dim, false);
  if (keys_.weighted) check_floats(matrices.keys_out, num_components(keys_) * dim, false);
  check_floats(matrices.values, num_components(values_) * dim, false);
  if (values_.weighted) check_floats(matrices.values_out, num_components(values_) * dim, false);
  check_floats(matrices.key_spreads, num_components(keys_), true);
  check_floats(matrices.value_spreads, num_components(values_), true);

  const index_t num_floats = keys_.num_floats + values_.num_floats;
  if (num_floats == 0) throw shape_error("kvcache: low_rank: rank must be 1 to head_dim, got 0");
  memory_ = memory_block(num_floats * index_t{sizeof(float)}, huge_page_resource());
  std::fill_n(reinterpret_cast<float*>(memory_.data()), num_floats, 0.0F);
  const auto put_spreads = [](const std::vector<float>& spreads, index_t first, index_t rank, float* to) {
    std::fill_n(to, round_up(rank, key_lanes), 1.0F);
    std::copy_n(spreads.begin() + first, rank, to);
  };
  for_each_basis(keys_, [&](index_t rank, index_t first, float* to) {
    const index_t matrix = round_up(rank, key_lanes) * dim;
    put_lanes(matrices.keys_in.data() + first * dim, rank, to);
    if (keys_.weighted) put_lanes(matrices.keys_out.data() + first * dim, rank, to += matrix);
    put_spreads(matrices.key_spreads, first, rank, to + matrix);
  });
  for_each_basis(values_, [&](index_t rank, index_t first, float* to) {
    const index_t matrix = round_up(rank, key_lanes) * dim;
    std::copy_n(matrices.values.begin() + first * dim, rank * dim, to);
    if (values_.weighted) std::copy_n(matrices.values_out.begin() + first * dim, rank * dim, to += matrix);
    put_spreads(matrices.value_spreads, first, rank, to + matrix);
  });
}

}  // namespace kvcache::inline v0::codec
