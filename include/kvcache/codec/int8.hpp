// SPDX-License-Identifier: MIT
// int8: every row of keys or values as bytes and one scale, the row's largest magnitude / 127.
//
//   section: | rows, block order of bytes | scales [block_size], bfloat16 |   each padded to 64
//
// 8 + 16 / head_dim bits per number. Relative mean squared error of normally distributed rows of 128: 4.2e-5. A number is
// off by at most 0.504 scales: half a step, and the scale is rounded up to bfloat16 so that huge and tiny rows keep it.
// Rows that are not finite are refused. Keys may be stored without their mean, see codec/key_means.hpp.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/key_means.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::codec {

namespace detail {

/// The scale of a row.
inline bfloat16 byte_scale(const kernel::table& kernels, const float* row, index_t head_dim) noexcept {
  return bfloat16_not_below(kernels.int8.largest(row, head_dim) / 127.0F);
}

/// What keys and values have in common. \tparam Order  keys_in_order or values_in_order
template <class Order>
struct int8_rows : plain_side {
  static constexpr bool reads_lines = true;
  [[nodiscard]] static constexpr std::string_view side_name() noexcept { return "int8"; }
  [[nodiscard]] static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return scales_offset(g) + scales_bytes(g);
  }
  [[nodiscard]] static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    return g.head_dim + index_t{sizeof(bfloat16)};
  }
  static status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                        const_rows rows) {
    return finite_rows(kernels, g, count, rows);
  }
  static void decode(const kernel::table& /*kernels*/, const block_geometry& g, const std::byte* section,
                     index_t first, index_t count, mutable_rows rows) {
    const auto* bytes = reinterpret_cast<const std::int8_t*>(section);
    for (index_t t = first; t < first + count; ++t) {
      const float scale = to_float(scales(section + scales_offset(g))[t]);
      float* row = rows.row(t - first);
      for (index_t d = 0; d < g.head_dim; ++d)
        row[d] = scale * static_cast<float>(bytes[Order::index(g, t, d)]);
    }
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    Order::move_row(g, from, from_slot, to, to_slot);
    set_scale(to + scales_offset(g), to_slot, scales(from + scales_offset(g))[from_slot]);
  }

 protected:
  static constexpr index_t scales_offset(const block_geometry& g) noexcept {
    return round_up(Order::size(g), block_alignment);
  }
};

}  // namespace detail

struct int8_keys : detail::int8_rows<detail::keys_in_order> {
  std::shared_ptr<const key_means> means =
      nullptr;                  ///< taken off the keys before they are quantised; null: nothing
  const float* mean = nullptr;  ///< of the head that this is for, [head_dim]

  [[nodiscard]] int8_keys at(index_t layer, index_t head) const {
    return {{}, means, means ? means->at(layer, head) : nullptr};
  }
  void validate(const cache_shape& shape) const {
    if (means) means->validate(shape);
  }
  [[nodiscard]] index_t settings_bytes() const noexcept { return means ? means->bytes() : 0; }
  /// The means, if there are any; see codec/description.hpp.
  void put_settings(std::vector<std::byte>& out) const {
    if (means) kvcache::detail::put_floats(means->all(), out);
  }
  static int8_keys from_settings(std::span<const std::byte> settings, const cache_shape& shape) {
    int8_keys made;
    if (!settings.empty())
      made.means = std::make_shared<const key_means>(
          shape, kvcache::detail::floats_in(
                     settings, checked_mul(shape.num_layers, shape.num_kv_heads, shape.head_dim)));
    return made;
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    std::array<float, max_head_dim> centred;
    for (index_t t = first; t < first + count; ++t) {
      const float* key = rows.row(t - first);
      if (mean != nullptr) {
        take_off(key, mean, g.head_dim, centred.data());
        key = centred.data();
      }
      const bfloat16 scale = detail::byte_scale(kernels, key, g.head_dim);
      set_scale(section + scales_offset(g), t, scale);
      detail::keys_in_order::put_bytes(kernels, g, section, t, key, to_float(scale));
    }
  }
  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t first,
              index_t count, mutable_rows rows) const {
    int8_rows::decode(kernels, g, section, first, count, rows);
    for (index_t t = 0; mean != nullptr && t < count; ++t) {
      for (index_t d = 0; d < g.head_dim; ++d) rows.row(t)[d] += mean[d];
    }
  }

  /// Rows as the kernels want them; behind them all, the dot product of each row with the mean.
  [[nodiscard]] index_t prepared_floats(const block_geometry& g) const noexcept {
    return kernel::prepared_query_floats(g.head_dim) + (means ? index_t{16} : index_t{0});
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    kernels.int8.prepare(g.head_dim, queries, num_rows, prepared);
    for (index_t r = 0; mean != nullptr && r < num_rows; ++r)
      constants(g, prepared, num_rows)[r] =
          std::inner_product(mean, mean + g.head_dim, queries + r * g.head_dim, 0.0F);
    return prepared;
  }
  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const kernel::upcoming& next) const {
    kernels.int8.scores(g, section, codec::scales(section + scales_offset(g)), count, prepared, num_rows,
                        scores, next);
    fetch_behind(next, scales_offset(g), section_bytes(g));
    for (index_t r = 0; mean != nullptr && r < num_rows; ++r)
      kernels.channel.shift(scores + r * g.block_size, round_up(count, key_lanes),
                            constants(g, prepared, num_rows)[r]);
  }

 private:
  template <class Float>
  static Float* constants(const block_geometry& g, Float* prepared, index_t num_rows) noexcept {
    return prepared + num_rows * kernel::prepared_query_floats(g.head_dim);
  }
};

struct int8_values : detail::int8_rows<detail::values_in_order> {
  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
                     index_t count, const_rows rows) {
    for (index_t t = first; t < first + count; ++t) {
      const float* value = rows.row(t - first);
      const bfloat16 scale = detail::byte_scale(kernels, value, g.head_dim);
      set_scale(section + scales_offset(g), t, scale);
      detail::values_in_order::put_bytes(kernels, g, section, t, value, to_float(scale));
    }
  }
  static void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                         index_t count, const float* weights, index_t num_rows, float* sums,
                         const kernel::upcoming& next) {
    kernels.int8.accumulate(g, section, scales(section + scales_offset(g)), count, weights, num_rows, sums,
                            next);
    fetch_behind(next, scales_offset(g), section_bytes(g));
  }
};

struct int8 : sides<int8_keys, int8_values> {
  static constexpr std::string_view name = "int8";
};

static_assert(block_codec<int8>);

}  // namespace kvcache::inline v0::codec
