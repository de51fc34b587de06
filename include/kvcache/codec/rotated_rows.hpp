// SPDX-License-Identifier: MIT
// What rotated and trellis share: rows rotated, then quantised one by one, each with a scale of its own.
//
//   section: | codes, packed | scales [block_size], bfloat16 |   each padded to 64
//
// Tokens are encoded as they come; the query is rotated once for many blocks, and so is the output. Rows that are not finite
// are refused; rows of zeros stay zero.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/rotation.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::codec::detail {

/// A rotation from its settings: the matrices, or nothing. Throws shape_error.
inline rotation rotation_in(std::span<const std::byte> settings, const cache_shape& shape) {
  rotation made;
  if (settings.empty()) return made;
  const index_t count =
      checked_mul(shape.num_layers, shape.num_kv_heads, checked_mul(shape.head_dim, shape.head_dim));
  made.matrices =
      std::make_shared<const rotation_matrices>(shape, kvcache::detail::floats_in(settings, count));
  return made;
}

/// \tparam Quantiser  how a row of numbers becomes codes:
///   bits; name, see codec/description.hpp; unpack_book(), 16 bytes that codes are looked up in when they are unpacked;
///   encode(kernels, row, count, codes) -> scale, row[d] ~ scale * level;  levels(codes, count, row): the levels again;
///   scores(codes, scales, prepared, num_rows, scores), accumulate(codes, scales, weights, num_rows, sums), `codes` being
///   looked_up
/// \tparam Order      keys_in_order or values_in_order
template <class Quantiser, class Order>
struct rotated_rows : plain_side {
  using codes = packed_codes<Quantiser::bits, Order>;

  codec::rotation rotation = {};

  [[nodiscard]] static constexpr std::string_view side_name() noexcept { return Quantiser::name; }
  void validate(const cache_shape& shape) const {
    if (rotation.matrices) rotation.matrices->validate(shape);
  }
  /// Bytes of the matrices; those that keys and values share count for both.
  [[nodiscard]] index_t settings_bytes() const noexcept {
    return rotation.matrices ? rotation.matrices->bytes() : 0;
  }
  /// The matrices, if there are any; see codec/description.hpp.
  void put_settings(std::vector<std::byte>& out) const {
    if (rotation.matrices) kvcache::detail::put_floats(rotation.matrices->all(), out);
  }

  [[nodiscard]] static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return codes::section_bytes(g) + scales_bytes(g);
  }
  [[nodiscard]] static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    return codes::row_bytes(g) + index_t{sizeof(bfloat16)};
  }
  static status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                        const_rows rows) {
    return finite_rows(kernels, g, count, rows);
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    alignas(64) std::array<float, max_head_dim> row;
    code_row row_codes;
    for (index_t t = first; t < first + count; ++t) {
      const unit_range range = unit_range_of(kernels, rows.row(t - first), g.head_dim);
      rotation.turn(kernels, rows.row(t - first), g.head_dim, row.data(), range.inverse);
      const float scale = Quantiser::encode(kernels, row.data(), g.head_dim, row_codes.data());
      set_scale(section + codes::section_bytes(g), t, to_finite_bfloat16(scale * range.unit));
      codes::put(g, section, t, row_codes.data());
    }
  }

  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t first,
              index_t count, mutable_rows rows) const {
    code_row row_codes;
    for (index_t t = first; t < first + count; ++t) {
      const float scale = to_float(section_scales(g, section)[t]);
      float* row = rows.row(t - first);
      for (index_t d = 0; d < g.head_dim; ++d)
        row_codes[static_cast<std::size_t>(d)] = codes::get(g, section, t, d);
      Quantiser::levels(row_codes.data(), g.head_dim, row);
      rotation.turn_back(kernels, row, g.head_dim);
      for (index_t d = 0; d < g.head_dim; ++d) row[d] *= scale;
    }
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    code_row row_codes;
    for (index_t d = 0; d < g.head_dim; ++d)
      row_codes[static_cast<std::size_t>(d)] = codes::get(g, from, from_slot, d);
    codes::put(g, to, to_slot, row_codes.data());
    set_scale(to + codes::section_bytes(g), to_slot, section_scales(g, from)[from_slot]);
  }

 protected:
  [[nodiscard]] static looked_up<Quantiser::bits> codes_of(const kernel::table& kernels,
                                                           const block_geometry& g, const std::byte* section,
                                                           index_t count,
                                                           const kernel::upcoming& next) noexcept {
    return {kernels, g, section, Quantiser::unpack_book(), count, next};
  }
  static void fetch_scales(const block_geometry& g, const std::byte* next) noexcept {
    fetch_behind(next, codes::section_bytes(g), section_bytes(g));
  }
  static const bfloat16* section_scales(const block_geometry& g, const std::byte* section) noexcept {
    return scales(section + codes::section_bytes(g));
  }
};

template <class Quantiser>
struct rotated_keys : rotated_rows<Quantiser, keys_in_order> {
  static constexpr bool coarse_queries = true;  ///< queries are bytes

  [[nodiscard]] rotated_keys at(index_t layer, index_t head) const {
    return {{{}, this->rotation.at(layer, head)}};
  }
  static rotated_keys from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{}, rotation_in(settings, shape)}};
  }
  [[nodiscard]] static constexpr index_t prepared_floats(const block_geometry& g) noexcept {
    return kernel::prepared_query_floats(g.head_dim);
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    alignas(64) std::array<float, max_head_dim> row;
    for (index_t r = 0; r < num_rows; ++r) {
      this->rotation.turn(kernels, queries + r * g.head_dim, g.head_dim, row.data());
      kernels.coarse.prepare(g.head_dim, row.data(), 1, prepared + r * prepared_floats(g));
    }
    return prepared;
  }
  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const kernel::upcoming& next) const {
    Quantiser::scores(this->codes_of(kernels, g, section, count, next), this->section_scales(g, section),
                      prepared, num_rows, scores);
    this->fetch_scales(g, next);
  }
};

template <class Quantiser>
struct rotated_values : rotated_rows<Quantiser, values_in_order> {
  static constexpr bool turns_sums = true;

  [[nodiscard]] rotated_values at(index_t layer, index_t head) const {
    return {{{}, this->rotation.at(layer, head)}};
  }
  static rotated_values from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    return {{{}, rotation_in(settings, shape)}};
  }
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const kernel::upcoming& next) const {
    Quantiser::accumulate(this->codes_of(kernels, g, section, count, next), this->section_scales(g, section),
                          weights, num_rows, sums);
    this->fetch_scales(g, next);
  }
  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    for (index_t r = 0; r < num_rows; ++r)
      this->rotation.turn_back(kernels, sums + r * g.head_dim, g.head_dim);
  }
};

}  // namespace kvcache::inline v0::codec::detail
