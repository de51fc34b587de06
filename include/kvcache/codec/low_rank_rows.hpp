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
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/low_rank_settings.hpp>
#include <kvcache/codec/low_rank_side.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvcache::inline v0::codec {

namespace detail {

/// What keys and values have in common. \tparam Groups  key_groups or value_groups
template <class Groups>
struct low_rank_rows : low_rank_side<std::is_same_v<Groups, key_groups>> {
  static constexpr std::string_view side_name() noexcept { return "low_rank"; }
  /// Throws shape_error where there are no bases, those of another model, or of a layout that low_rank has not.
  void validate(const cache_shape& shape) const {
    low_rank_side<std::is_same_v<Groups, key_groups>>::validate(shape);
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      if (this->layout_of(layer).num_of_klt() != 0)
        throw shape_error(
            "kvcache: low_rank stores no components in 6, 5 or 3 bits, these bases have some; see klt");
    }
  }
  /// The bases; see codec/low_rank_settings.hpp.
  void put_settings(std::vector<std::byte>& out) const {
    if (this->bases != nullptr)
      put_low_rank_settings(*this->bases, this->is_keys, settings_of::low_rank, out);
  }

  [[nodiscard]] index_t section_bytes(const block_geometry& g) const noexcept {
    return this->here_or_most(
        [&](const low_rank_layout& l) { return detail::section_bytes<Groups>(l, g.block_size); });
  }
  [[nodiscard]] index_t row_bytes(const block_geometry& g) const noexcept {
    return this->here_or_most(
        [&](const low_rank_layout& l) { return detail::row_bytes<Groups>(l, g.block_size); });
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
      for (index_t i = 0; i < this->rank(); ++i) {
        float& component = c[static_cast<std::size_t>(i)];
        component = std::clamp(component / this->basis.spreads[i] * range.unit, -0x1.FEp127F, 0x1.FEp127F);
      }
      for_each_group<Groups>(
          this->layout(), g.block_size, [&](const auto& side, const component_group& group) {
            side.encode(kernels, group.geometry, section + group.offset, t, 1, {c.data() + group.first, 0});
          });
    }
  }

  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t first,
              index_t count, mutable_rows rows) const {
    alignas(64) component_row c;
    for (index_t t = first; t < first + count; ++t) {
      for_each_group<Groups>(
          this->layout(), g.block_size, [&](const auto& side, const component_group& group) {
            side.decode(kernels, group.geometry, section + group.offset, t, 1, {c.data() + group.first, 0});
          });
      this->rebuild(c.data(), g.head_dim, rows.row(t - first));
    }
  }

  void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                index_t to_slot) const noexcept {
    for_each_group<Groups>(this->layout(), g.block_size, [&](const auto& side, const component_group& group) {
      side.move_row(group.geometry, from + group.offset, from_slot, to + group.offset, to_slot);
    });
  }
};

}  // namespace detail

struct low_rank_keys : detail::low_rank_rows<detail::key_groups> {
  using groups = detail::key_groups;
  using group = detail::component_group;

  /// Throws shape_error.
  static low_rank_keys from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{{}, detail::low_rank_bases_from(settings, is_keys, detail::settings_of::low_rank, shape)}}};
  }
  [[nodiscard]] low_rank_keys at(index_t layer, index_t head) const {
    return {{{{}, this->bases, this->basis_at(layer, head)}}};
  }

  [[nodiscard]] index_t prepared_floats(const block_geometry& g) const noexcept {
    return this->here_or_most([&](const low_rank_layout& l) {
      index_t floats = 0;
      detail::for_each_group<groups>(
          l, g.block_size, [&](const auto& side, const group& part) { floats += part_floats(side, part); });
      return floats;
    });
  }

  /// prepared = | rows of the first group | rows of the next | ...
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    for_each_query(kernels, g, queries, num_rows,
                   [&](index_t r, const float* row) { prepare_row(kernels, g, row, r, num_rows, prepared); });
    return prepared;
  }

  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const kernel::upcoming& next) const {
    const float* of_group = prepared;
    detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
      const kernel::upcoming then = next.part(part.offset);
      const auto score = [&](index_t first, index_t n, float* out) {
        const float* rows = of_group + first * row_floats(side, part);
        if constexpr (requires { side.scores_of_plain; })
          side.scores_of_plain(kernels, part.geometry, section + part.offset, count, rows, n, out, then);
        else
          side.scores(kernels, part.geometry, section + part.offset, count, rows, n, out, then);
      };
      if (part.first == 0)
        score(0, num_rows, scores);
      else
        detail::add_scores(kernels, g.block_size, count, num_rows, scores, score);
      of_group += num_rows * part_floats(side, part);
    });
  }

 private:
  /// Floats of a row of one group: prepared ones, or, of exact components, the components themselves.
  template <class Side>
  static index_t row_floats(const Side& side, const group& part) noexcept {
    if constexpr (requires { side.scores_of_plain; })
      return part.geometry.head_dim;
    else
      return side.prepared_floats(part.geometry);
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
      if constexpr (requires { side.scores_of_plain; })
        std::copy_n(row + part.first, part.geometry.head_dim, to);
      else
        (void)side.prepare(kernels, part.geometry, row + part.first, 1, to);
      of_group += num_rows * part_floats(side, part);
    });
  }
};

struct low_rank_values : detail::low_rank_rows<detail::value_groups> {
  using groups = detail::value_groups;
  using group = detail::component_group;
  static constexpr bool turns_sums = true;

  /// Throws shape_error.
  static low_rank_values from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{{}, detail::low_rank_bases_from(settings, is_keys, detail::settings_of::low_rank, shape)}}};
  }
  [[nodiscard]] low_rank_values at(index_t layer, index_t head) const {
    return {{{{}, this->bases, this->basis_at(layer, head)}}};
  }

  /// Components of row r come to lie in sums[r, 0 .. rank).
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const kernel::upcoming& next) const {
    detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
      detail::add_sums(kernels, part.geometry.head_dim, part.geometry.head_dim, g.head_dim, num_rows,
                       sums + part.first, [&](index_t first, index_t n, float* out) {
                         side.accumulate(kernels, part.geometry, section + part.offset, count,
                                         weights + first * g.block_size, n, out, next.part(part.offset));
                       });
    });
  }

  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    rebuild_sums(kernels, g, num_rows, sums, [&](float* row) {
      detail::for_each_group<groups>(layout(), g.block_size, [&](const auto& side, const group& part) {
        side.finish(kernels, part.geometry, 1, row + part.first);
      });
    });
  }
};

}  // namespace kvcache::inline v0::codec
