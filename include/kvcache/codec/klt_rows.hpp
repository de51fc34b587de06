// SPDX-License-Identifier: MIT
// The two sides of klt: rows as components in a basis, those that matter most in more bits, one scale for each token.
//
//   row:      | 8 bits | 4 bits | 2 bits |      components by falling energy; those behind are not stored
//   section:  | bytes | trellis codes | trellis codes | scales [block_size], bfloat16 |     each padded to 64
//
//   component[i] = scale * spread[i] * unit * level[i]        unit: what a level of the group counts
//
// Spreads and units go into the query, once for many blocks, or to the sums behind them; groups add up. The scale is how
// large a row is beside those of the calibration, and so large that no component passes what its levels reach by much.
// Rows unlike those of the calibration would lose all else to such a scale: they get the one of least error, and components
// beyond it are cut off. They lose hardly more than all of what they have where the calibration saw nothing.
// The same bytes on every instruction set. Rows that are not finite are refused.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/klt_groups.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/low_rank_settings.hpp>
#include <kvcache/codec/low_rank_side.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>

namespace kvcache::inline v0::codec {

namespace detail {

/// What keys and values have in common. \tparam Order  keys_in_order or values_in_order
template <class Order>
struct klt_rows : low_rank_side<std::is_same_v<Order, keys_in_order>> {
  static constexpr std::string_view side_name() noexcept { return "klt"; }
  /// Throws shape_error where there are no bases, those of another model, or of a layout that klt has not.
  void validate(const cache_shape& shape) const {
    low_rank_side<std::is_same_v<Order, keys_in_order>>::validate(shape);
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      if (this->layout_of(layer).num_exact() != 0)
        throw shape_error("kvcache: klt stores components in 8, 4 and 2 bits, these bases have others");
    }
  }

  [[nodiscard]] index_t section_bytes(const block_geometry& g) const noexcept {
    return this->here_or_most([&](const low_rank_layout& l) {
      return klt_sizes_of<Order>(l, g.block_size).block + scales_bytes(g);
    });
  }
  [[nodiscard]] index_t row_bytes(const block_geometry& g) const noexcept {
    return this->here_or_most([&](const low_rank_layout& l) {
      return klt_sizes_of<Order>(l, g.block_size).row + index_t{sizeof(bfloat16)};
    });
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    alignas(64) component_row x;
    alignas(64) component_row c;
    for (index_t t = first; t < first + count; ++t) {
      const float* row = rows.row(t - first);
      const unit_range range = unit_range_of(kernels, row, g.head_dim);
      std::transform(row, row + g.head_dim, x.begin(), [&](float number) { return number * range.inverse; });
      this->project(x.data(), g.head_dim, c.data());
      for (index_t i = 0; i < this->rank(); ++i) c[static_cast<std::size_t>(i)] /= this->basis.spreads[i];
      const float unit = range.unit / klt_scale_divisor;
      const bfloat16 scale =
          bfloat16_not_below(std::min(scale_of(c.data(), g.block_size) * unit, largest_klt_scale));
      set_scale(section + codes_bytes(g), t, scale);
      const float inverse = to_float(scale) > 0 ? unit / to_float(scale) : 0.0F;
      for (index_t i = 0; i < this->rank(); ++i) c[static_cast<std::size_t>(i)] *= inverse;
      for_each(g, [&](auto group, const component_group& part) {
        group.encode(kernels, part.geometry, section + part.offset, t, c.data() + part.first);
      });
    }
  }

  void decode(const kernel::table& /*kernels*/, const block_geometry& g, const std::byte* section,
              index_t first, index_t count, mutable_rows rows) const {
    alignas(64) component_row c;
    for (index_t t = first; t < first + count; ++t) {
      const float scale = klt_scale_divisor * to_float(token_scales(g, section)[t]);
      for_each(g, [&](auto group, const component_group& part) {
        float* of_group = c.data() + part.first;
        group.decode(part.geometry, section + part.offset, t, of_group);
        for (index_t i = 0; i < part.geometry.head_dim; ++i) of_group[i] *= group.unit * scale;
      });
      this->rebuild(c.data(), g.head_dim, rows.row(t - first));
    }
  }

  void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                index_t to_slot) const noexcept {
    for_each(g, [&](auto group, const component_group& part) {
      group.move_row(part.geometry, from + part.offset, from_slot, to + part.offset, to_slot);
    });
    set_scale(to + codes_bytes(g), to_slot, token_scales(g, from)[from_slot]);
  }

 protected:
  template <class Body>
  void for_each(const block_geometry& g, Body body) const {
    for_each_klt_group<Order>(this->layout(), g.block_size, body);
  }
  [[nodiscard]] index_t codes_bytes(const block_geometry& g) const noexcept {
    return klt_sizes_of<Order>(this->layout(), g.block_size).block;
  }
  [[nodiscard]] const bfloat16* token_scales(const block_geometry& g,
                                             const std::byte* section) const noexcept {
    return scales(section + codes_bytes(g));
  }

 private:
  /// Root mean square of the components in spreads, those that spread far counting more; but so much that none is beyond the
  /// reach of its group, unless the noise of that would be more than a quarter of the row.
  [[nodiscard]] float scale_of(const float* c, index_t block_size) const noexcept {
    float squares = 0;
    float spreads = 0;
    float least = 0;
    float energy = 0;
    float noise = 0;  // at a scale of one
    for_each_klt_group<Order>(this->layout(), block_size, [&](auto group, const component_group& part) {
      for (index_t i = part.first; i < part.first + part.geometry.head_dim; ++i) {
        const float spread = this->basis.spreads[i];
        squares += spread * c[i] * c[i];
        spreads += spread;
        energy += spread * c[i] * (spread * c[i]);
        noise += spread * spread * static_cast<float>(group.error);
        least = std::max(least, std::fabs(c[i]) / group.reach);
      }
    });
    const float usual = spreads > 0 ? std::max(std::sqrt(squares / spreads), least) : 0.0F;
    return noise * usual * usual <= energy / 4 ? usual : best_scale(c, block_size, noise);
  }

  /// The scale of least noise and components cut off, noise * scale^2 + sum over i beyond the reach of
  /// spread[i]^2 (|c[i]| - reach * scale)^2: by Newton's method, which comes to it from below.
  [[nodiscard]] float best_scale(const float* c, index_t block_size, float noise) const noexcept {
    float scale = 0;
    for (int step = 0; step < 16; ++step) {
      float wanted = 0;
      float weight = noise;
      for_each_klt_group<Order>(this->layout(), block_size, [&](auto group, const component_group& part) {
        for (index_t i = part.first; i < part.first + part.geometry.head_dim; ++i) {
          if (std::fabs(c[i]) <= group.reach * scale) continue;
          const float reached = this->basis.spreads[i] * group.reach;
          wanted += this->basis.spreads[i] * std::fabs(c[i]) * reached;
          weight += reached * reached;
        }
      });
      const float next = wanted / weight;
      if (!(next > scale)) break;
      scale = next;
    }
    return scale;
  }
};

}  // namespace detail

struct klt_keys : detail::klt_rows<detail::keys_in_order> {
  using group = detail::component_group;

  /// Throws shape_error.
  static klt_keys from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{{}, detail::low_rank_bases_from(settings, is_keys, shape)}}};
  }
  [[nodiscard]] klt_keys at(index_t layer, index_t head) const {
    return {{{{}, this->bases, this->basis_at(layer, head)}}};
  }

  /// prepared = | rows of the first group | rows of the next | ...
  [[nodiscard]] index_t prepared_floats(const block_geometry& g) const noexcept {
    return this->here_or_most([&](const low_rank_layout& l) {
      index_t floats = 0;
      detail::for_each_klt_group<detail::keys_in_order>(l, g.block_size, [&](auto, const group& part) {
        floats += kernel::prepared_query_floats(part.geometry.head_dim);
      });
      return floats;
    });
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    for_each_query(kernels, g, queries, num_rows, [&](index_t r, float* row) {
      float* of_group = prepared;
      for_each(g, [&](auto with, const group& part) {
        const index_t floats = kernel::prepared_query_floats(part.geometry.head_dim);
        float* own = row + part.first;
        for (index_t i = 0; i < part.geometry.head_dim; ++i) own[i] *= with.unit * detail::klt_scale_divisor;
        with.kernels_in(kernels).prepare(part.geometry.head_dim, own, 1, of_group + r * floats);
        of_group += num_rows * floats;
      });
    });
    return prepared;
  }

  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const std::byte* next) const {
    for_each(g, [&](auto with, const group& part) {
      const index_t floats = kernel::prepared_query_floats(part.geometry.head_dim);
      const auto write = [&](index_t first, index_t n, float* out) {
        with.scores(kernels, part.geometry, section + part.offset, token_scales(g, section), count,
                    prepared + first * floats, n, out, after(part, section, next));
      };
      if (part.first == 0) {
        write(0, num_rows, scores);
      } else {
        detail::add_scores(g.block_size, count, num_rows, scores, write);
      }
      prepared += num_rows * floats;
    });
  }
};

struct klt_values : detail::klt_rows<detail::values_in_order> {
  using group = detail::component_group;
  static constexpr bool turns_sums = true;

  /// Throws shape_error.
  static klt_values from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{{}, detail::low_rank_bases_from(settings, is_keys, shape)}}};
  }
  [[nodiscard]] klt_values at(index_t layer, index_t head) const {
    return {{{{}, this->bases, this->basis_at(layer, head)}}};
  }

  /// Components of row r come to lie in sums[r, 0 .. rank), in levels.
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const std::byte* next) const {
    for_each(g, [&](auto with, const group& part) {
      detail::add_sums(part.geometry.head_dim, g.head_dim, num_rows, sums + part.first,
                       [&](index_t first, index_t n, float* out) {
                         with.accumulate(kernels, part.geometry, section + part.offset,
                                         token_scales(g, section), count, weights + first * g.block_size, n,
                                         out, after(part, section, next));
                       });
    });
  }

  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    rebuild_sums(kernels, g, num_rows, sums, [&](float* row) {
      for_each(g, [&](auto with, const group& part) {
        for (index_t i = part.first; i < part.first + part.geometry.head_dim; ++i)
          row[i] *= with.unit * detail::klt_scale_divisor;
      });
    });
  }
};

}  // namespace kvcache::inline v0::codec
