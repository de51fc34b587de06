// SPDX-License-Identifier: MIT
// The two sides of low_rank: rows as components in a basis, attended without ever being rebuilt.
//
//   scores[r, t] = (spread * out q[r]) . c[t]                 the query is taken into the basis, once for many blocks
//   sums[r]      = out^T (spread * sum_t weights[r, t] c[t])  the sums are taken out of it, once for many blocks
//
// Groups of components are sections of their own (codec/low_rank_layout.hpp); scores and sums add up over them. Encoding
// and decoding are sums in one fixed order: the same bits on every instruction set. What passes the range of bfloat16 is
// stored as the largest number within.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvcache::inline v0::codec {

namespace detail {

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
    for (std::size_t i = 0; i < 4; ++i) parts_[i] += load(factors + 4 * i) * x;
  }
  void add(const float* factors, const float* x) noexcept {
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) parts_[i] += load(factors + 4 * i) * load(x + 4 * i);
  }
  void store(float* out) const noexcept { std::memcpy(out, parts_, sizeof(parts_)); }

 private:
  using four [[gnu::vector_size(16)]] = float;
  static four load(const float* from) noexcept {
    four loaded;
    std::memcpy(&loaded, from, sizeof(loaded));
    return loaded;
  }
  four parts_[4] = {};
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
    for (; d < head_dim; ++d) lanes[static_cast<std::size_t>(d % key_lanes)] += matrix[d] * x[d];
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
      for (index_t lane = 0; lane < lanes; ++lane) x[d] += matrix[lane] * c[i + lane];
    }
  }
}

/// The same, the matrix in rows.
inline void rebuild_rows(const float* matrix, index_t rank, index_t head_dim, const float* c, float* x) {
  std::fill_n(x, head_dim, 0.0F);
  for (index_t i = 0; i < rank; ++i, matrix += head_dim) {
    for (index_t d = 0; d < head_dim; ++d) x[d] += matrix[d] * c[i];
  }
}

/// to[i] += from[i], in steps that compilers vectorise at -O2; `to` and `from` do not overlap.
inline void add_floats(const float* from, index_t count, float* to) noexcept {
  std::array<float, key_lanes> sum;
  for (; count >= key_lanes; count -= key_lanes, from += key_lanes, to += key_lanes) {
    std::memcpy(sum.data(), to, sizeof(sum));
    for (std::size_t lane = 0; lane < key_lanes; ++lane) sum[lane] += from[lane];
    std::memcpy(to, sum.data(), sizeof(sum));
  }
  for (index_t i = 0; i < count; ++i) to[i] += from[i];
}

/// What keys and values have in common. \tparam Groups  key_groups or value_groups
template <class Groups>
struct low_rank_rows : plain_side {
  static constexpr bool is_keys = std::is_same_v<Groups, key_groups>;

  std::shared_ptr<const low_rank_bases> bases = nullptr;
  low_rank_basis basis = {};  ///< of the head that this is for; see at()

  [[nodiscard]] static constexpr std::string_view side_name() noexcept { return "low_rank"; }
  /// The bases of this side; see codec/description.hpp.
  void put_settings(std::vector<std::byte>& out) const {
    if (bases != nullptr) bases->put_settings(is_keys, out);
  }

  /// Throws shape_error where there are no bases, or those of another model.
  void validate(const cache_shape& shape) const {
    if (bases == nullptr) throw shape_error("kvcache: low_rank needs bases; see low_rank_bases::fit");
    if (!same_heads(bases->shape(), shape))
      throw shape_error("kvcache: the bases of low_rank are for another number of layers, heads or dims");
  }

  /// Bytes of the bases of this side, of all heads.
  [[nodiscard]] index_t settings_bytes() const noexcept {
    if (bases == nullptr) return 0;
    return is_keys ? bases->key_bytes() : bases->value_bytes();
  }
  [[nodiscard]] index_t section_bytes(const block_geometry& g) const noexcept {
    return detail::section_bytes<Groups>(layout(), g.block_size);
  }
  [[nodiscard]] index_t row_bytes(const block_geometry& g) const noexcept {
    return detail::row_bytes<Groups>(layout(), g.block_size);
  }
  static status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                        const_rows rows) {
    return finite_rows(kernels, g, count, rows);
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    alignas(64) component_row x;
    alignas(64) component_row c;
    for (index_t t = first; t < first + count; ++t) {
      const float* row = rows.row(t - first);
      const unit_range range = unit_range_of(kernels, row, g.head_dim);
      std::transform(row, row + g.head_dim, x.begin(), [&](float number) { return number * range.inverse; });
      if constexpr (is_keys) {
        project_lanes(basis_in(), rank(), g.head_dim, x.data(), c.data());
      } else {
        project_rows(basis_in(), rank(), g.head_dim, x.data(), c.data());
      }
      for (index_t i = 0; i < rank(); ++i) {
        float& component = c[static_cast<std::size_t>(i)];
        component = std::clamp(component / basis.spreads[i] * range.unit, -0x1.FEp127F, 0x1.FEp127F);
      }
      for_each_group<Groups>(layout(), g.block_size, [&](const auto& side, const component_group& group) {
        side.encode(kernels, group.geometry, section + group.offset, t, 1, {c.data() + group.first, 0});
      });
    }
  }

  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t first,
              index_t count, mutable_rows rows) const {
    alignas(64) component_row c;
    for (index_t t = first; t < first + count; ++t) {
      for_each_group<Groups>(layout(), g.block_size, [&](const auto& side, const component_group& group) {
        side.decode(kernels, group.geometry, section + group.offset, t, 1, {c.data() + group.first, 0});
      });
      for (index_t i = 0; i < rank(); ++i) c[static_cast<std::size_t>(i)] *= basis.spreads[i];
      if constexpr (is_keys) {
        rebuild_lanes(basis.out, rank(), g.head_dim, c.data(), rows.row(t - first));
      } else {
        rebuild_rows(basis.out, rank(), g.head_dim, c.data(), rows.row(t - first));
      }
    }
  }

 protected:
  [[nodiscard]] low_rank_layout layout() const noexcept {
    if (bases == nullptr) return {};
    return is_keys ? bases->key_layout() : bases->value_layout();
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

}  // namespace detail

struct low_rank_keys : detail::low_rank_rows<detail::key_groups> {
  using groups = detail::key_groups;
  using group = detail::component_group;

  static low_rank_keys from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{}, settings.empty() ? nullptr : low_rank_bases::from_settings(true, settings, shape), {}}};
  }
  [[nodiscard]] low_rank_keys at(index_t layer, index_t head) const {
    return {{{}, this->bases, this->bases ? this->bases->keys(layer, head) : low_rank_basis{}}};
  }

  [[nodiscard]] index_t prepared_floats(const block_geometry& g) const noexcept {
    index_t floats = 0;
    detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
      floats += part_floats(side, part);
    });
    return floats;
  }

  /// prepared = | rows of the first group | rows of the next | ...
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    alignas(64) detail::component_rows memory;
    const index_t stride = padded_rank();
    for (index_t first = 0; first < num_rows; first += detail::work_rows) {
      const index_t n = std::min(detail::work_rows, num_rows - first);
      kernels.f32.scores({stride, g.head_dim}, basis_out(), stride, queries + first * g.head_dim, n,
                         memory.data(), nullptr);
      for (index_t r = 0; r < n; ++r) {
        float* row = memory.data() + r * stride;
        for (index_t i = 0; i < rank(); ++i) row[i] *= basis.spreads[i];
        prepare_row(kernels, g, row, first + r, num_rows, prepared);
      }
    }
    return prepared;
  }

  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const std::byte* next) const {
    const float* of_group = prepared;
    detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
      const std::byte* after =
          part.first + part.geometry.head_dim == rank() ? next : section + part.next_offset;
      if (part.first == 0) {
        side.scores(kernels, part.geometry, section, count, of_group, num_rows, scores, after);
      } else {
        add_scores(side, kernels, part, section, count, of_group, num_rows, scores, after);
      }
      of_group += num_rows * part_floats(side, part);
    });
  }

 private:
  /// Floats of a row of one group: prepared ones, or the components themselves.
  template <class Side>
  static index_t row_floats(const Side& side, const group& part) noexcept {
    const index_t floats = side.prepared_floats(part.geometry);
    return floats == 0 ? part.geometry.head_dim : floats;
  }
  /// The same with what keeps the next group aligned.
  template <class Side>
  static index_t part_floats(const Side& side, const group& part) noexcept {
    return round_up(row_floats(side, part), 16);
  }

  void prepare_row(const kernel::table& kernels, const block_geometry& g, const float* row, index_t index,
                   index_t num_rows, float* prepared) const {
    float* of_group = prepared;
    detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
      float* to = of_group + index * row_floats(side, part);
      const float* made = side.prepare(kernels, part.geometry, row + part.first, 1, to);
      if (made != to) std::copy_n(made, part.geometry.head_dim, to);
      of_group += num_rows * part_floats(side, part);
    });
  }

  template <class Side>
  static void add_scores(const Side& side, const kernel::table& kernels, const group& part,
                         const std::byte* section, index_t count, const float* prepared, index_t num_rows,
                         float* scores, const std::byte* next) {
    alignas(64) std::array<float, detail::work_rows * max_block_size> memory;
    const index_t block_size = part.geometry.block_size;
    const index_t num_scores = round_up(count, key_lanes);
    for (index_t first = 0; first < num_rows; first += detail::work_rows) {
      const index_t n = std::min(detail::work_rows, num_rows - first);
      side.scores(kernels, part.geometry, section + part.offset, count,
                  prepared + first * row_floats(side, part), n, memory.data(), next);
      for (index_t r = 0; r < n; ++r)
        detail::add_floats(memory.data() + r * block_size, num_scores, scores + (first + r) * block_size);
    }
  }
};

struct low_rank_values : detail::low_rank_rows<detail::value_groups> {
  using groups = detail::value_groups;
  using group = detail::component_group;
  static constexpr bool turns_sums = true;

  static low_rank_values from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{}, settings.empty() ? nullptr : low_rank_bases::from_settings(false, settings, shape), {}}};
  }
  [[nodiscard]] low_rank_values at(index_t layer, index_t head) const {
    return {{{}, this->bases, this->bases ? this->bases->values(layer, head) : low_rank_basis{}}};
  }

  /// Components of row r come to lie in sums[r, 0 .. rank).
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const std::byte* next) const {
    alignas(64) detail::component_rows memory;
    detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
      const index_t dim = part.geometry.head_dim;
      const std::byte* after = part.first + dim == rank() ? next : section + part.next_offset;
      for (index_t first = 0; first < num_rows; first += detail::work_rows) {
        const index_t n = std::min(detail::work_rows, num_rows - first);
        std::fill_n(memory.begin(), n * dim, 0.0F);
        side.accumulate(kernels, part.geometry, section + part.offset, count, weights + first * g.block_size,
                        n, memory.data(), after);
        for (index_t r = 0; r < n; ++r)
          detail::add_floats(memory.data() + r * dim, dim, sums + (first + r) * g.head_dim + part.first);
      }
    });
  }

  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    alignas(64) detail::component_rows memory;
    const index_t stride = padded_rank();
    for (index_t first = 0; first < num_rows; first += detail::work_rows) {
      const index_t n = std::min(detail::work_rows, num_rows - first);
      float* rows = sums + first * g.head_dim;
      std::fill_n(memory.begin(), n * stride, 0.0F);
      for (index_t r = 0; r < n; ++r)
        finish_row(kernels, g, rows + r * g.head_dim, memory.data() + r * stride);
      std::fill_n(rows, n * g.head_dim, 0.0F);
      kernels.f32.accumulate({stride, g.head_dim}, basis_out(), rank(), memory.data(), n, rows, nullptr);
    }
  }

 private:
  /// components = spread * sums, out of the groups' own coordinates.
  void finish_row(const kernel::table& kernels, const block_geometry& g, float* sums,
                  float* components) const {
    detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
      side.finish(kernels, part.geometry, 1, sums + part.first);
    });
    for (index_t i = 0; i < rank(); ++i) components[i] = sums[i] * basis.spreads[i];
  }
};

}  // namespace kvcache::inline v0::codec
