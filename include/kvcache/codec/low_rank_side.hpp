// SPDX-License-Identifier: MIT
// low_rank_side: what sides have in common whose rows are components in a basis: the bases, and the way in and out.
//
// Sums are in one fixed order: the same bits on every instruction set.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/low_rank_settings.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace kvcache::inline v0::codec::detail {

/// Rows that are worked on at a time.
inline constexpr index_t work_rows = 16;
/// Components of one row, and of so many.
using component_row = std::array<float, max_head_dim>;
using component_rows = std::array<float, work_rows * max_head_dim>;

/// Sixteen sums in the registers of any processor: four at a time, multiplied, then added.
class lane_sums {
 public:
  void add(const float* factors, float x) noexcept {
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) parts_[i] += lanes::rounded(lanes::load_four(factors + 4 * i) * x);
  }
  void add(const float* factors, const float* x) noexcept {
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i)
      parts_[i] += lanes::rounded(lanes::load_four(factors + 4 * i) * lanes::load_four(x + 4 * i));
  }
  void store(float* out) const noexcept { std::memcpy(out, parts_, sizeof(parts_)); }

 private:
  lanes::four_floats parts_[4] = {};
};

/// out[i] = sum_d matrix[i, d] x[d], the matrix in lanes: [rank/16][head_dim][16].
inline void project_lanes(const float* matrix, index_t rank, index_t head_dim, const float* x, float* out) {
  for (index_t i = 0; i < rank; i += key_lanes, out += key_lanes) {
    lane_sums sums;
    for (index_t d = 0; d < head_dim; ++d, matrix += key_lanes) sums.add(matrix, x[d]);
    sums.store(out);
  }
}

/// The same, the matrix in rows: [rank][head_dim].
inline void project_rows(const float* matrix, index_t rank, index_t head_dim, const float* x, float* out) {
  for (index_t i = 0; i < rank; ++i, matrix += head_dim) {
    lane_sums sums;
    index_t d = 0;
    for (; d + key_lanes <= head_dim; d += key_lanes) sums.add(matrix + d, x + d);
    std::array<float, key_lanes> lanes;
    sums.store(lanes.data());
    for (; d < head_dim; ++d)
      lanes[static_cast<std::size_t>(d % key_lanes)] += lanes::rounded(matrix[d] * x[d]);
    for (std::size_t half = key_lanes / 2; half > 0; half /= 2) {
      for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    out[i] = lanes[0];
  }
}

/// x[d] = sum_i matrix[i, d] c[i], the matrix in lanes.
inline void rebuild_lanes(const float* matrix, index_t rank, index_t head_dim, const float* c, float* x) {
  std::fill_n(x, head_dim, 0.0F);
  for (index_t i = 0; i < rank; i += key_lanes) {
    const index_t lanes = std::min(key_lanes, rank - i);
    for (index_t d = 0; d < head_dim; ++d, matrix += key_lanes) {
      for (index_t lane = 0; lane < lanes; ++lane) x[d] += lanes::rounded(matrix[lane] * c[i + lane]);
    }
  }
}

/// The same, the matrix in rows.
inline void rebuild_rows(const float* matrix, index_t rank, index_t head_dim, const float* c, float* x) {
  std::fill_n(x, head_dim, 0.0F);
  for (index_t i = 0; i < rank; ++i, matrix += head_dim) {
    lanes::transform(
        head_dim, x, [factor = c[i]](auto sum, auto m) { return sum + lanes::rounded(m * factor); }, x,
        matrix);
  }
}

/// Calls body(first, n) for all rows, work_rows at a time.
template <class Body>
void for_each_rows(index_t num_rows, Body body) {
  for (index_t first = 0; first < num_rows; first += work_rows)
    body(first, std::min(work_rows, num_rows - first));
}

/// Adds what part(first, n, out) writes to scores: those of n rows from `first` on, [n, block_size].
template <class Part>
void add_scores(const kernel::table& kernels, index_t block_size, index_t count, index_t num_rows,
                float* scores, Part part) {
  alignas(64) std::array<float, work_rows * max_block_size> memory;
  for_each_rows(num_rows, [&](index_t first, index_t n) {
    part(first, n, memory.data());
    for (index_t r = 0; r < n; ++r)
      kernels.channel.add_to(memory.data() + r * block_size, round_up(count, key_lanes),
                             scores + (first + r) * block_size);
  });
}

/// Adds what part(first, n, out) adds to zeros, [n, padded_dim], the first `dim` of each row, to rows of sums that are
/// `stride` apart.
template <class Part>
void add_sums(const kernel::table& kernels, index_t padded_dim, index_t dim, index_t stride, index_t num_rows,
              float* sums, Part part) {
  alignas(64) component_rows memory;
  for_each_rows(num_rows, [&](index_t first, index_t n) {
    std::fill_n(memory.begin(), n * padded_dim, 0.0F);
    part(first, n, memory.data());
    for (index_t r = 0; r < n; ++r)
      kernels.channel.add_to(memory.data() + r * padded_dim, dim, sums + (first + r) * stride);
  });
}

/// \tparam IsKeys  the basis is that of keys, in lanes
template <bool IsKeys>
struct low_rank_side : plain_side {
  static constexpr bool is_keys = IsKeys;

  std::shared_ptr<const low_rank_bases> bases = nullptr;
  low_rank_basis basis = {};  ///< of the head that this is for; see at()

  /// Throws shape_error where there are no bases, or those of another model.
  void validate(const cache_shape& shape) const {
    if (bases == nullptr)
      throw shape_error("kvcache: low_rank and klt need bases; see low_rank_bases::fit, klt_bases");
    if (!same_heads(bases->shape(), shape))
      throw shape_error("kvcache: the bases of low_rank are for another number of layers, heads or dims");
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      if (layout_of(layer).rank() < 1)
        throw shape_error(std::string("kvcache: low_rank has no bases for ") + (is_keys ? "keys" : "values"));
    }
  }

  /// Bytes of the bases of this side, of all heads.
  [[nodiscard]] index_t settings_bytes() const noexcept {
    if (bases == nullptr) return 0;
    return is_keys ? bases->key_bytes() : bases->value_bytes();
  }
  static status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                        const_rows rows) {
    return finite_rows(kernels, g, count, rows);
  }

  [[nodiscard]] low_rank_basis basis_at(index_t layer, index_t head) const noexcept {
    if (bases == nullptr) return {};
    return is_keys ? bases->keys(layer, head) : bases->values(layer, head);
  }

 protected:
  /// The components of a row. \param c  [padded_rank]
  void project(const float* x, index_t head_dim, float* c) const {
    if constexpr (is_keys) {
      project_lanes(basis_in(), rank(), head_dim, x, c);
    } else {
      project_rows(basis_in(), rank(), head_dim, x, c);
    }
  }
  /// A row of its components, which are multiplied by their spreads first.
  void rebuild(float* c, index_t head_dim, float* x) const {
    for (index_t i = 0; i < rank(); ++i) c[i] *= basis.spreads[i];
    if constexpr (is_keys) {
      rebuild_lanes(basis.out, rank(), head_dim, c, x);
    } else {
      rebuild_rows(basis.out, rank(), head_dim, c, x);
    }
  }
  /// Calls body(row, components) for every query: what the components of a key are multiplied by, spreads included.
  template <class Body>
  void for_each_query(const kernel::table& kernels, const block_geometry& g, const float* queries,
                      index_t num_rows, Body body) const {
    alignas(64) component_rows memory;
    const index_t stride = padded_rank();
    for_each_rows(num_rows, [&](index_t first, index_t n) {
      kernels.f32.scores({stride, g.head_dim}, basis_out(), stride, queries + first * g.head_dim, n,
                         memory.data(), nullptr);
      for (index_t r = 0; r < n; ++r) {
        float* row = memory.data() + r * stride;
        for (index_t i = 0; i < rank(); ++i) row[i] *= basis.spreads[i];
        body(first + r, row);
      }
    });
  }
  /// Sums out of the basis, in place. \param components_in  turns a row of sums into components that lack their spreads, in
  ///                                                        place too
  template <class Turn>
  void rebuild_sums(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums,
                    Turn components_in) const {
    alignas(64) component_rows memory;
    const index_t stride = padded_rank();
    for_each_rows(num_rows, [&](index_t first, index_t n) {
      float* rows = sums + first * g.head_dim;
      std::fill_n(memory.begin(), n * stride, 0.0F);
      for (index_t r = 0; r < n; ++r) {
        float* row = rows + r * g.head_dim;
        components_in(row);
        for (index_t i = 0; i < rank(); ++i)
          memory[static_cast<std::size_t>(r * stride + i)] = row[i] * basis.spreads[i];
      }
      std::fill_n(rows, n * g.head_dim, 0.0F);
      kernels.f32.accumulate({stride, g.head_dim}, basis_out(), rank(), memory.data(), n, rows, nullptr);
    });
  }
  [[nodiscard]] const low_rank_layout& layout() const noexcept {
    static constexpr low_rank_layout none{};
    return basis.layout != nullptr ? *basis.layout : none;
  }
  [[nodiscard]] const low_rank_layout& layout_of(index_t layer) const noexcept {
    return is_keys ? bases->key_layout(layer) : bases->value_layout(layer);
  }
  /// count(layout) of the layer that this is for; the largest of any layer where it is for none.
  template <class Count>
  [[nodiscard]] index_t here_or_most(Count count) const {
    if (basis.layout != nullptr || bases == nullptr) return count(layout());
    index_t most = 0;
    for (index_t layer = 0; layer < bases->shape().num_layers; ++layer)
      most = std::max(most, count(layout_of(layer)));
    return most;
  }
  [[nodiscard]] index_t rank() const noexcept { return layout().rank(); }
  /// Components and the padding behind them.
  [[nodiscard]] index_t padded_rank() const noexcept { return round_up(rank(), key_lanes); }
  [[nodiscard]] const float* basis_in() const noexcept {
    KVCACHE_ASSERT(basis.in != nullptr, "low_rank: a side is used through at(layer, head)");
    return basis.in;
  }
  /// out, as a kernel takes it.
  [[nodiscard]] const std::byte* basis_out() const noexcept {
    KVCACHE_ASSERT(basis.out != nullptr, "low_rank: a side is used through at(layer, head)");
    return reinterpret_cast<const std::byte*>(basis.out);
  }
};

}  // namespace kvcache::inline v0::codec::detail
