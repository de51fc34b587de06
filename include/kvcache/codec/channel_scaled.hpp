// SPDX-License-Identifier: MIT
// What channel and balanced share: whole blocks in which every channel (dim) has a scale and an offset of its own.
//
//   number = offset[dim] + token_scale[token] * scale[dim] * level[code]
//
//   section: | codes, packed | scales [head_dim] | offsets [head_dim] | token scales [block_size], if any |  bfloat16
//
// Nothing is multiplied back token by token: a channel's scale goes into the query once for each block, or to the sums
// behind it; the offsets make one number for each query row, or are added once with the sum of the weights.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvcache::inline v0::codec::detail {

using channel_floats = std::array<float, max_head_dim>;

/// A scale of 1 for each token.
inline const bfloat16* unit_scales() noexcept {
  static constexpr auto ones = [] {
    std::array<bfloat16, max_block_size> all{};
    all.fill(bfloat16{0x3f80});
    return all;
  }();
  return ones.data();
}

/// \tparam Traits  has bits, name (see codec/description.hpp), levels() (16 bytes, of which 2^bits count) and has_token_scales
template <class Traits, class Order>
struct channel_scaled_rows : plain_side {
  static constexpr bool needs_whole_blocks = true;
  [[nodiscard]] static constexpr std::string_view side_name() noexcept { return Traits::name; }
  using codes = packed_codes<Traits::bits, Order>;

  [[nodiscard]] static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return token_scales_offset(g) + (Traits::has_token_scales ? scales_bytes(g) : 0);
  }
  /// The share of one token in what a block needs, rounded up.
  [[nodiscard]] static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    constexpr index_t size = sizeof(bfloat16);
    return codes::row_bytes(g) + ceil_div(2 * g.head_dim * size, g.block_size) +
           (Traits::has_token_scales ? size : 0);
  }
  static status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                        const_rows rows) {
    return finite_rows(kernels, g, count, rows);
  }

  static void decode(const kernel::table& /*kernels*/, const block_geometry& g, const std::byte* section,
                     index_t first, index_t count, mutable_rows rows) {
    const bfloat16* scale = channel_scales(g, section);
    const bfloat16* offset = channel_offsets(g, section);
    for (index_t t = first; t < first + count; ++t) {
      float* row = rows.row(t - first);
      const float token_scale = Traits::has_token_scales ? to_float(token_scales(g, section)[t]) : 1.0F;
      for (index_t d = 0; d < g.head_dim; ++d) {
        const auto level = static_cast<float>(Traits::levels()[codes::get(g, section, t, d)]);
        row[d] =
            to_float(offset[d]) + to_float(scale[d]) * (token_scale * level);  // a level alone might overflow
      }
    }
  }

 protected:
  static void set_channel(const block_geometry& g, std::byte* section, index_t dim, bfloat16 scale,
                          bfloat16 offset) noexcept {
    set_scale(section + codes::section_bytes(g), dim, scale);
    set_scale(section + codes::section_bytes(g) + channel_bytes(g), dim, offset);
  }
  static const bfloat16* channel_scales(const block_geometry& g, const std::byte* section) noexcept {
    return scales(section + codes::section_bytes(g));
  }
  static const bfloat16* channel_offsets(const block_geometry& g, const std::byte* section) noexcept {
    return scales(section + codes::section_bytes(g) + channel_bytes(g));
  }
  static constexpr index_t token_scales_offset(const block_geometry& g) noexcept {
    return codes::section_bytes(g) + 2 * channel_bytes(g);
  }
  static const bfloat16* token_scales(const block_geometry& g, const std::byte* section) noexcept {
    return scales(section + token_scales_offset(g));
  }
  static void fetch_scales(const block_geometry& g, const std::byte* next) noexcept {
    fetch_behind(next, codes::section_bytes(g), section_bytes(g));
  }
  static const bfloat16* scales_of_tokens(const block_geometry& g, const std::byte* section) noexcept {
    return Traits::has_token_scales ? token_scales(g, section) : unit_scales();
  }

 private:
  static constexpr index_t channel_bytes(const block_geometry& g) noexcept {
    return round_up(g.head_dim * index_t{sizeof(bfloat16)}, block_alignment);
  }
};

template <class Traits>
struct channel_scaled_keys : channel_scaled_rows<Traits, keys_in_order> {
  using rows = channel_scaled_rows<Traits, keys_in_order>;

  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* queries, index_t num_rows, float* scores, const kernel::upcoming& next) const {
    alignas(64) std::array<float, rows_at_once*(16 + max_head_dim)> prepared;
    std::array<float, rows_at_once> constants;
    for (index_t first = 0; first < num_rows; first += rows_at_once) {
      const index_t n = std::min(rows_at_once, num_rows - first);
      const float* from = queries + first * g.head_dim;
      float* to = scores + first * g.block_size;
      const bool with_constants = fold(kernels, g, section, from, n, prepared.data(), constants.data());
      looked_up<Traits::bits>{kernels, g, section, Traits::levels(), count, next}.scores(
          rows::scales_of_tokens(g, section), prepared.data(), n, to);
      if (with_constants) continue;
      const index_t num_scores = round_up(count, key_lanes);
      for (index_t r = 0; r < n; ++r)
        kernels.channel.shift(to + r * g.block_size, num_scores, constants[static_cast<std::size_t>(r)]);
    }
    rows::fetch_scales(g, next);
  }

 private:
  static constexpr index_t rows_at_once = 8;

  /// Queries times the channels' scales, made ready, and their dot products with the offsets.
  /// \return whether these are in `prepared` too, and not in `constants`
  static bool fold(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                   const float* queries, index_t num_rows, float* prepared, float* constants) {
    if (const auto at_once = kernels.coarse.prepare_folded; at_once != nullptr) {
      at_once(g.head_dim, queries, num_rows, rows::channel_scales(g, section),
              rows::channel_offsets(g, section), prepared);
      return true;
    }
    alignas(64) std::array<float, rows_at_once * max_head_dim> folded;
    kernels.channel.fold(queries, num_rows, g.head_dim, rows::channel_scales(g, section),
                         rows::channel_offsets(g, section), folded.data(), constants);
    kernels.coarse.prepare(g.head_dim, folded.data(), num_rows, prepared);
    return false;
  }
};

template <class Traits>
struct channel_scaled_values : channel_scaled_rows<Traits, values_in_order> {
  using rows = channel_scaled_rows<Traits, values_in_order>;

  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const kernel::upcoming& next) const {
    constexpr index_t rows_at_once = 8;
    alignas(64) std::array<float, rows_at_once * max_head_dim> parts;
    for (index_t first = 0; first < num_rows; first += rows_at_once) {
      const index_t n = std::min(rows_at_once, num_rows - first);
      const float* from = weights + first * g.block_size;
      std::fill_n(parts.begin(), n * g.head_dim, 0.0F);
      looked_up<Traits::bits>{kernels, g, section, Traits::levels(), count, next}.accumulate(
          rows::scales_of_tokens(g, section), from, n, parts.data());
      for (index_t r = 0; r < n; ++r) {
        float all_weights = 0;
        for (index_t t = 0; t < count; ++t) all_weights += from[r * g.block_size + t];
        kernels.channel.unfold(parts.data() + r * g.head_dim, g.head_dim, rows::channel_scales(g, section),
                               rows::channel_offsets(g, section), all_weights,
                               sums + (first + r) * g.head_dim);
      }
    }
    rows::fetch_scales(g, next);
  }
};

}  // namespace kvcache::inline v0::codec::detail
