// SPDX-License-Identifier: MIT
// The two sides of klt: rows as components in a basis, those that matter most in more bits, one scale for each token.
//
//   row:      | 8 | 6 | 5 | 4 | 3 | 2 bits |      components by falling energy; those behind are not stored
//   section:  | scales [block_size], bytes | bytes | trellis codes | ... |     each padded to 64
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
#include <kvcache/codec/klt_scale_choice.hpp>
#include <kvcache/codec/klt_scales.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/low_rank_settings.hpp>
#include <kvcache/codec/low_rank_side.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvcache::inline v0::codec {

namespace detail {

/// Levels of 64 tokens, each group of keys in whole lines.
using level_lines = std::array<std::int8_t, unpacked_tokens*(max_head_dim + 16)>;

/// What keys and values have in common. \tparam Order  keys_in_order or values_in_order
template <class Order>
struct klt_rows : low_rank_side<std::is_same_v<Order, keys_in_order>> {
  static constexpr std::string_view side_name() noexcept { return "klt"; }
  /// Throws shape_error where there are no bases, those of another model, or of a layout that klt has not.
  void validate(const cache_shape& shape) const {
    low_rank_side<std::is_same_v<Order, keys_in_order>>::validate(shape);
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      const low_rank_layout& layout = this->layout_of(layer);
      if (layout.num_exact() != 0)
        throw shape_error(
            "kvcache: klt stores components in 8, 6, 5, 4, 3 and 2 bits, these bases have others");
      if (layout.best_scales != this->layout_of(0).best_scales)
        throw shape_error("kvcache: klt: all layers have best_scales, or none");
      if (klt_dims<true>(layout) > max_head_dim || klt_dims<false>(layout) > max_head_dim)
        throw shape_error("kvcache: klt: groups of components, each rounded up to 4, must not exceed 512");
    }
  }

  /// The bases; see codec/low_rank_settings.hpp.
  void put_settings(std::vector<std::byte>& out) const {
    if (this->bases != nullptr) put_low_rank_settings(*this->bases, this->is_keys, settings_of::klt, out);
  }

  [[nodiscard]] index_t section_bytes(const block_geometry& g) const noexcept {
    return this->here_or_most(
        [&](const low_rank_layout& l) { return klt_sizes_of<Order>(l, g.block_size).section; });
  }
  [[nodiscard]] index_t row_bytes(const block_geometry& g) const noexcept {
    return this->here_or_most(
        [&](const low_rank_layout& l) { return klt_sizes_of<Order>(l, g.block_size).row; });
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    alignas(64) component_row x;
    alignas(64) component_row c;
    const bool best_scales = this->layout().best_scales;
    // components of five spreads stay within float
    const float widest = *std::max_element(this->basis.spreads, this->basis.spreads + this->rank());
    const klt_scale_choice<Order> choice(this->layout(), this->basis.spreads, g.block_size);
    const double limit = 0x1p127 / (5.0 * double{widest} * klt_scale_divisor);
    for (index_t t = first; t < first + count; ++t) {
      const float* row = rows.row(t - first);
      const unit_range range = unit_range_of(kernels, row, g.head_dim);
      std::transform(row, row + g.head_dim, x.begin(), [&](float number) { return number * range.inverse; });
      this->project(x.data(), g.head_dim, c.data());
      const double unit = double{range.unit} * in_spreads(c.data()) / klt_scale_divisor;
      const int usual = klt_scale_code(choice.usual(c.data()) * unit, limit);
      const row_place to{kernels, g, section, t};
      int code = usual;
      if (best_scales && usual != 0)
        code = put_best(to, c.data(), unit, usual, limit);
      else
        put(to, c.data(), unit, usual, x.data());
      section[t] = static_cast<std::byte>(code);
    }
  }

  void decode(const kernel::table& /*kernels*/, const block_geometry& g, const std::byte* section,
              index_t first, index_t count, mutable_rows rows) const {
    alignas(64) component_row c;
    for (index_t t = first; t < first + count; ++t) {
      const float scale = klt_scale_divisor * to_float(klt_scales[std::to_integer<std::size_t>(section[t])]);
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
    to[to_slot] = from[from_slot];
  }

 protected:
  template <class Body>
  void for_each(const block_geometry& g, Body body) const {
    for_each_klt_group<Order>(this->layout(), g.block_size, body);
  }
  /// The levels of a group, side by side with those of others. \param next  the section that is read next; may be null
  template <class Group>
  static void unpack(const kernel::table& kernels, Group group, const component_group& part,
                     const std::byte* section, const std::byte* next, klt_piece piece) {
    piece.next = next == nullptr ? nullptr : next + part.offset;
    group.unpack(kernels, part.geometry, section + part.offset, piece);
  }

 private:
  /// Where a row goes.
  struct row_place {
    const kernel::table& kernels;
    const block_geometry& g;
    std::byte* section;
    index_t token;
  };

  /// Stores the codes of components for a scale. \param scaled  [rank], becomes what they are the codes of
  void put(const row_place& to, const float* c, double unit, int scale_code, float* scaled) const {
    const double scale = to_float(klt_scales[static_cast<std::size_t>(scale_code)]);
    const auto inverse = static_cast<float>(scale > 0 ? std::min(unit / scale, 0x1p100) : 0);
    lanes::transform(
        this->rank(), scaled, [inverse](auto x) { return x * inverse; }, c);
    for_each(to.g, [&](auto group, const component_group& part) {
      group.encode(to.kernels, part.geometry, to.section + part.offset, to.token, scaled + part.first);
    });
  }

  /// Squares of what the codes differ by from `scaled`, times spreads.
  [[nodiscard]] double error_of(const row_place& of, const float* scaled) const {
    alignas(64) component_row stored;
    double squares = 0;
    for_each(of.g, [&](auto group, const component_group& part) {
      group.decode(part.geometry, of.section + part.offset, of.token, stored.data());
      for (index_t i = 0; i < part.geometry.head_dim; ++i) {
        const index_t component = part.first + i;
        const float is = lanes::rounded(stored[static_cast<std::size_t>(i)] * group.unit);
        const double error = double{this->basis.spreads[component]} * (is - scaled[component]);
        squares += lanes::rounded(error * error);
      }
    });
    return squares;
  }

  /// The same for the scale of least error of `code` and its neighbours: from scale to scale the error of a row changes by
  /// more than what the levels lose by a scale that is not the usual one. \return its code \pre code > 0
  int put_best(const row_place& to, const float* c, double unit, int code, double limit) const {
    alignas(64) component_row scaled;
    double least = std::numeric_limits<double>::infinity();
    int best = code;
    for (const int tried : {code + 1, code - 1, code}) {
      if (tried < 1 || tried >= int{klt_scales.size()}) continue;
      const double scale = to_float(klt_scales[static_cast<std::size_t>(tried)]);
      if (tried != code && scale > limit) continue;
      put(to, c, unit, tried, scaled.data());
      const double error = error_of(to, scaled.data()) * scale * scale;
      if (error > least) continue;
      least = error;
      best = tried;
    }
    if (best != code) put(to, c, unit, best, scaled.data());
    return best;
  }

  /// Divides components by their spreads and by what they are then at most, which is returned. \post finite: low_rank_bases has no
  /// numbers beyond 1e15 and no spreads below 1e-15
  double in_spreads(float* c) const noexcept {
    float largest = 0;
    for (index_t i = 0; i < this->rank(); ++i) {
      c[i] /= this->basis.spreads[i];
      largest = std::max(largest, std::fabs(c[i]));
    }
    if (largest < 0x1p-120F) largest = 0;  // its inverse may not be a float: no components at all
    const float inverse = largest > 0 ? 1 / largest : 0;
    for (index_t i = 0; i < this->rank(); ++i) c[i] *= inverse;
    return double{largest};
  }
};

}  // namespace detail

struct klt_keys : detail::klt_rows<detail::keys_in_order> {
  using group = detail::component_group;

  /// Throws shape_error.
  static klt_keys from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{{}, detail::low_rank_bases_from(settings, is_keys, detail::settings_of::klt, shape)}}};
  }
  [[nodiscard]] klt_keys at(index_t layer, index_t head) const {
    return {{{{}, this->bases, this->basis_at(layer, head)}}};
  }

  /// prepared = | rows for the fine groups | rows for the others |
  [[nodiscard]] index_t prepared_floats(const block_geometry& /*g*/) const noexcept {
    return this->here_or_most([](const low_rank_layout& l) {
      return floats_of(detail::klt_dims<true>(l)) + floats_of(detail::klt_dims<false>(l));
    });
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    const index_t fine = floats_of(detail::klt_dims<true>(layout()));
    const index_t others = floats_of(detail::klt_dims<false>(layout()));
    for_each_query(kernels, g, queries, num_rows, [&](index_t r, const float* row) {
      prepare_row<true>(kernels, g, row, prepared + r * fine);
      prepare_row<false>(kernels, g, row, prepared + num_rows * fine + r * others);
    });
    return prepared;
  }

  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const std::byte* next) const {
    fetch_behind(next, 0, detail::klt_scales_bytes(g.block_size));
    const float* for_others = prepared + num_rows * floats_of(detail::klt_dims<true>(layout()));
    for (index_t t = 0; t < count; t += detail::unpacked_tokens) {
      const index_t here = std::min(detail::unpacked_tokens, count - t);
      const key_piece keys{kernels, g, section, next, t, here, detail::klt_scale_run(section, t, here)};
      score<true>(keys, prepared, num_rows, scores + t);
      score<false>(keys, for_others, num_rows, scores + t);
    }
  }

 private:
  /// Up to 64 tokens.
  struct key_piece {
    const kernel::table& kernels;
    const block_geometry& g;
    const std::byte* section;
    const std::byte* next;
    index_t token;
    index_t num_tokens;
    detail::klt_scale_run scales;
  };

  static index_t floats_of(index_t dims) noexcept {
    return dims == 0 ? 0 : kernel::prepared_query_floats(dims);
  }
  /// Calls body(group, part, dim) for each of these groups, `dim` being where its first line is.
  template <bool Fine, class Body>
  void for_each_of(const block_geometry& g, Body body) const {
    index_t dim = 0;
    for_each(g, [&](auto with, const group& part) {
      if constexpr (decltype(with)::fine == Fine) {
        body(with, part, dim);
        dim += round_up(part.geometry.head_dim, detail::keys_in_order::order::pack);
      }
    });
  }
  template <bool Fine>
  static const kernel::int8_kernels& kernels_in(const kernel::table& kernels) noexcept {
    return Fine ? kernels.int8 : kernels.coarse;
  }

  template <bool Fine>
  void prepare_row(const kernel::table& kernels, const block_geometry& g, const float* row,
                   float* prepared) const {
    const index_t dims = detail::klt_dims<Fine>(layout());
    if (dims == 0) return;
    alignas(64) std::array<float, max_head_dim + 16> own{};
    for_each_of<Fine>(g, [&](auto with, const group& part, index_t dim) {
      std::transform(row + part.first, row + part.first + part.geometry.head_dim, own.begin() + dim,
                     [&](float x) { return x * (with.unit * detail::klt_scale_divisor); });
    });
    kernels_in<Fine>(kernels).prepare(dims, own.data(), 1, prepared);
  }

  /// Writes the scores of the fine groups; writes those of the others where there are no fine ones, else adds them.
  template <bool Fine>
  void score(const key_piece& keys, const float* prepared, index_t num_rows, float* scores) const {
    const block_geometry together{keys.g.block_size, detail::klt_dims<Fine>(layout())};
    if (together.head_dim == 0) return;
    alignas(64) detail::level_lines memory;
    for_each_of<Fine>(keys.g, [&](auto with, const group& part, index_t dim) {
      unpack(keys.kernels, with, part, keys.section, keys.next,
             {keys.token, keys.num_tokens, nullptr, memory.data() + key_lanes * dim,
              detail::keys_in_order::size({key_lanes, together.head_dim})});
    });
    const auto write = [&](index_t first, index_t n, float* out) {
      kernels_in<Fine>(keys.kernels)
          .scores(together, reinterpret_cast<const std::byte*>(memory.data()), keys.scales.data(),
                  keys.num_tokens, prepared + first * floats_of(together.head_dim), n, out, nullptr);
    };
    if (Fine || detail::klt_dims<true>(layout()) == 0)
      write(0, num_rows, scores);
    else
      detail::add_scores(keys.kernels, keys.g.block_size, keys.num_tokens, num_rows, scores, write);
  }
};

struct klt_values : detail::klt_rows<detail::values_in_order> {
  using group = detail::component_group;
  static constexpr bool turns_sums = true;

  /// Throws shape_error.
  static klt_values from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{{}, detail::low_rank_bases_from(settings, is_keys, detail::settings_of::klt, shape)}}};
  }
  [[nodiscard]] klt_values at(index_t layer, index_t head) const {
    return {{{{}, this->bases, this->basis_at(layer, head)}}};
  }

  /// Components of row r come to lie in sums[r, 0 .. rank), in levels; what is behind them is indeterminate. Weights are taken
  /// as 8 bits, which is less than what codes are off by.
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const std::byte* next) const {
    fetch_behind(next, 0, detail::klt_scales_bytes(g.block_size));
    // so few dims are sooner multiplied for nothing than the others are added once more
    constexpr index_t few = 64;
    if (g.head_dim - rank() < few) {
      sum(kernels, g, {section, next, count}, g, weights, num_rows, sums);
    } else {
      detail::add_sums(kernels, padded_rank(), rank(), g.head_dim, num_rows, sums,
                       [&](index_t first, index_t n, float* out) {
                         sum(kernels, g, {section, next, count}, {g.block_size, padded_rank()},
                             weights + first * g.block_size, n, out);
                       });
    }
  }

  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    rebuild_sums(kernels, g, num_rows, sums, [&](float* row) {
      for_each(g, [&](auto with, const group& part) {
        for (index_t i = part.first; i < part.first + part.geometry.head_dim; ++i)
          row[i] *= with.unit * detail::klt_scale_divisor;
      });
    });
  }

 private:
  struct klt_section {
    const std::byte* at;
    const std::byte* next;
    index_t count;
  };

  /// \param together  of the levels as they are multiplied, and of `sums`
  void sum(const kernel::table& kernels, const block_geometry& g, const klt_section& section,
           const block_geometry& together, const float* weights, index_t num_rows, float* sums) const {
    const index_t stride = detail::values_in_order::order::pack * together.head_dim;
    alignas(64) detail::level_lines memory;
    for (index_t t = 0; t < section.count; t += detail::unpacked_tokens) {
      const index_t num_tokens = std::min(detail::unpacked_tokens, section.count - t);
      const detail::klt_scale_run run(section.at, t, num_tokens);
      for_each(g, [&](auto with, const group& part) {
        unpack(kernels, with, part, section.at, section.next,
               {t, num_tokens, nullptr, memory.data() + detail::values_in_order::order::pack * part.first,
                stride});
      });
      kernels.coarse.accumulate(together, reinterpret_cast<const std::byte*>(memory.data()), run.data(),
                                num_tokens, weights + t, num_rows, sums, nullptr);
    }
  }
};

}  // namespace kvcache::inline v0::codec
