// SPDX-License-Identifier: MIT
// int8: every row of keys or values as bytes and one scale, the row's largest magnitude / 127.
//
//   block: | keys, block order of bytes | values | key scales [block_size] | value scales [block_size] |   each padded to 64
//
// 8 + 16 / head_dim bits per number. Relative mean squared error of normally distributed rows of 128: 4.3e-5. A number is
// off by at most 0.504 scales: half a step, and the scale is rounded up to bfloat16 so that huge and tiny rows keep it.
// Rows that are not finite are refused.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace kvcache::inline v0::codec {

struct int8 {
  using order = block_order<std::int8_t>;

  static constexpr std::string_view name = "int8";

  /// Bytes of one block, all four sections.
  [[nodiscard]] static constexpr index_t block_bytes(const block_geometry& g) noexcept {
    return value_scales_offset(g) + padded(scale_bytes(g));
  }

  /// Bytes that one more token takes, keys and values, without padding.
  [[nodiscard]] static constexpr index_t token_bytes(const block_geometry& g) noexcept {
    return 2 * (g.head_dim + static_cast<index_t>(sizeof(bfloat16)));
  }

  /// Returns not_finite, and writes nothing, if a row holds NaN or infinity.
  static status encode(const kernel::table& kernels, const block_geometry& g, std::byte* block, index_t first,
                       index_t count, const_rows k, const_rows v) {
    std::array<bfloat16, max_block_size> key_scales;
    std::array<bfloat16, max_block_size> value_scales;
    for (index_t t = 0; t < count; ++t) {
      const float key = kernels.int8.largest(k.row(t), g.head_dim);
      const float value = kernels.int8.largest(v.row(t), g.head_dim);
      if (key != key || value != value) return status::not_finite;
      key_scales[static_cast<std::size_t>(t)] = scale_of(key);
      value_scales[static_cast<std::size_t>(t)] = scale_of(value);
    }
    const auto scale_count = static_cast<std::size_t>(count) * sizeof(bfloat16);
    std::memcpy(block + key_scales_offset(g) + first * 2, key_scales.data(), scale_count);
    std::memcpy(block + value_scales_offset(g) + first * 2, value_scales.data(), scale_count);

    auto* keys = reinterpret_cast<std::int8_t*>(block);
    auto* values = reinterpret_cast<std::int8_t*>(block + values_offset(g));
    std::array<std::int8_t, max_head_dim + 4> bytes;
    for (index_t t = 0; t < count; ++t) {
      std::memset(&bytes[static_cast<std::size_t>(g.head_dim)], 0, 4);
      kernels.int8.quantize(k.row(t), g.head_dim, to_float(key_scales[static_cast<std::size_t>(t)]),
                            bytes.data());
      for (index_t d = 0; d < g.head_dim; d += order::pack)
        std::memcpy(keys + order::key_index(g, first + t, d), &bytes[static_cast<std::size_t>(d)],
                    order::pack);
      kernels.int8.quantize(v.row(t), g.head_dim, to_float(value_scales[static_cast<std::size_t>(t)]),
                            bytes.data());
      std::int8_t* to = values + order::value_index(g, first + t, 0);
      for (index_t d = 0; d < g.head_dim; ++d) to[d * order::pack] = bytes[static_cast<std::size_t>(d)];
    }
    return status::ok;
  }

  static void decode(const kernel::table& /*kernels*/, const block_geometry& g, const std::byte* block,
                     index_t first, index_t count, mutable_rows k, mutable_rows v) {
    const auto* keys = reinterpret_cast<const std::int8_t*>(block);
    const auto* values = reinterpret_cast<const std::int8_t*>(block + values_offset(g));
    for (index_t t = first; t < first + count; ++t) {
      const float key_scale = to_float(scales(block + key_scales_offset(g))[t]);
      const float value_scale = to_float(scales(block + value_scales_offset(g))[t]);
      float* key = k.row(t - first);
      float* value = v.row(t - first);
      for (index_t d = 0; d < g.head_dim; ++d) {
        key[d] = key_scale * static_cast<float>(keys[order::key_index(g, t, d)]);
        value[d] = value_scale * static_cast<float>(values[order::value_index(g, t, d)]);
      }
    }
  }

  static void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                     index_t count, const float* queries, index_t num_rows, float* scores) {
    alignas(64) std::array<float, 4 * kernel::prepared_query_floats(max_head_dim)> prepared;
    for (index_t r = 0; r < num_rows; r += 4) {
      const index_t rows = std::min(index_t{4}, num_rows - r);
      kernels.int8.prepare(g.head_dim, queries + r * g.head_dim, rows, prepared.data());
      kernels.int8.scores(g, block, scales(block + key_scales_offset(g)), count, prepared.data(), rows,
                          scores + r * g.block_size, block + values_offset(g));
    }
  }

  static void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                         index_t count, const float* weights, index_t num_rows, float* sums,
                         const std::byte* next_block) {
    kernels.int8.accumulate(g, block + values_offset(g), scales(block + value_scales_offset(g)), count,
                            weights, num_rows, sums, next_block);
  }

  friend bool operator==(const int8&, const int8&) = default;

 private:
  /// largest / 127, rounded up.
  static bfloat16 scale_of(float largest) noexcept {
    return {static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(largest / 127.0F) + 0xffffU) >> 16)};
  }

  static const bfloat16* scales(const std::byte* section) noexcept {
    return reinterpret_cast<const bfloat16*>(section);
  }
  static constexpr index_t padded(index_t bytes) noexcept { return round_up(bytes, block_alignment); }
  static constexpr index_t scale_bytes(const block_geometry& g) noexcept {
    return g.block_size * static_cast<index_t>(sizeof(bfloat16));
  }
  static constexpr index_t values_offset(const block_geometry& g) noexcept {
    return padded(order::key_size(g));
  }
  static constexpr index_t key_scales_offset(const block_geometry& g) noexcept {
    return values_offset(g) + padded(order::value_size(g));
  }
  static constexpr index_t value_scales_offset(const block_geometry& g) noexcept {
    return key_scales_offset(g) + padded(scale_bytes(g));
  }
};

static_assert(block_codec<int8>);

}  // namespace kvcache::inline v0::codec
