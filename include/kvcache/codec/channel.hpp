// SPDX-License-Identifier: MIT
// channel<4>, <3>: keys in equal steps between the least and the largest number of each channel of a block.
//
// Bits + 32 / block_size bits per number, the step and the middle of each channel being bfloat16. A number is off by at
// most half a step of its channel: what keys need, because attention looks at the extreme ones. Blocks are encoded whole.
// As a codec of its own its values are those of rotated<Bits>: the pair for 4 and 3 bits.
// Source: KIVI, Liu et al. 2024 (keys per channel, values per token).
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/channel_scaled.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvcache::inline v0::codec {

namespace detail {

/// Levels -2^(Bits-1) .. 2^(Bits-1) - 1.
template <int Bits>
struct channel_traits {
  static constexpr int bits = Bits;
  static constexpr std::string_view name = Bits == 4 ? "channel4" : "channel3";
  static constexpr bool has_token_scales = false;
  static constexpr int below = 1 << (Bits - 1);
  static constexpr std::array<std::int8_t, 16> all_levels = [] {
    std::array<std::int8_t, 16> all{};
    for (int i = 0; i < (1 << Bits); ++i)
      all[static_cast<std::size_t>(i)] = static_cast<std::int8_t>(i - below);
    return all;
  }();
  static constexpr const std::int8_t* levels() noexcept { return all_levels.data(); }
};

}  // namespace detail

template <int Bits>
struct channel_keys : detail::channel_scaled_keys<detail::channel_traits<Bits>> {
  using traits = detail::channel_traits<Bits>;
  using base = detail::channel_scaled_keys<traits>;

  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
                     index_t count, const_rows rows) {
    if (count == 0) return;
    detail::channel_floats least;
    detail::channel_floats largest;
    kernels.channel.ranges(rows, count, g.head_dim, least.data(), largest.data());
    detail::channel_floats middles;
    detail::channel_floats inverse_steps;
    for (index_t d = 0; d < g.head_dim; ++d) {
      const auto i = static_cast<std::size_t>(d);
      set_range(g, section, d, least[i], largest[i], middles[i], inverse_steps[i]);
    }
    detail::code_row row_codes;
    for (index_t t = 0; t < count; ++t) {
      kernels.channel.to_codes(rows.row(t), middles.data(), inverse_steps.data(), traits::below, g.head_dim,
                               row_codes.data());
      base::rows::codes::put(g, section, first + t, row_codes.data());
    }
  }

 private:
  /// Stores step and middle of a channel so that the levels reach from `least` to `largest`, roundings included.
  static void set_range(const block_geometry& g, std::byte* section, index_t dim, float least, float largest,
                        float& middle, float& inverse_step) {
    // The lower half has one level more: the middle lies half a step above the mean of both ends.
    const float half_step = (largest / 2 - least / 2) / static_cast<float>(2 * traits::below - 1);
    const bfloat16 offset = to_finite_bfloat16(least / 2 + largest / 2 + half_step);
    middle = to_float(offset);
    const float above = (largest - middle) / static_cast<float>(traits::below - 1);
    const float below = (middle - least) / static_cast<float>(traits::below);
    const bfloat16 step = bfloat16_not_below(std::max({above, below, 0.0F}));
    inverse_step = step.bits == 0 ? 0.0F : 1.0F / to_float(step);
    if (!std::isfinite(inverse_step)) inverse_step = 0.0F;  // steps below 2^-127 are nothing
    base::rows::set_channel(g, section, dim, step, offset);
  }
};

template <int Bits>
struct channel : sides<channel_keys<Bits>, rotated_values<Bits>>, sealing_options {
  static_assert(Bits == 4 || Bits == 3);
  static constexpr std::string_view name = channel_keys<Bits>::side_name();
};

static_assert(sealing_codec<channel<4>> && sealing_codec<channel<3>>);

}  // namespace kvcache::inline v0::codec
