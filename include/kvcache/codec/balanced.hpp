// SPDX-License-Identifier: MIT
// balanced<4>, <3>, <2>: rows of a block less the mean of each channel, divided by a scale of their channel and one of their
// token, then the levels of normally distributed numbers.
//
// Bits + 32 / block_size + 16 / head_dim bits per number. The best of the scalar codecs for keys at 2 bits: outlier channels
// and outlier tokens both lose their size before they are quantised. Blocks are encoded whole.
// Source: alternating normalisation as in Sinkhorn and Knopp 1967; token scales by least squares.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/channel_scaled.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/gaussian_codebook.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace kvcache::inline v0::codec {

namespace detail {

template <int Bits>
struct balanced_traits {
  static constexpr int bits = Bits;
  static constexpr std::string_view name = Bits == 4 ? "balanced4" : (Bits == 3 ? "balanced3" : "balanced2");
  static constexpr bool has_token_scales = true;
  static constexpr kernel::scalar_codebook book = gaussian_codebook<Bits>();
  static constexpr const std::int8_t* levels() noexcept { return book.levels; }
};

/// Means and spreads of the channels of some rows, with every token's own size taken out.
class channel_statistics {
 public:
  /// \param unit  what the rows are divided by before anything is squared
  channel_statistics(const block_geometry& g, index_t count, const_rows rows, float inverse_unit)
      : dim_(g.head_dim), count_(count), rows_(rows), inverse_unit_(inverse_unit) {
    means_.fill(0.0F);
    float* means = means_.data();
    const auto num_rows = static_cast<float>(count_);
    for (index_t t = 0; t < count; ++t) {
      lanes::transform(
          dim_, means, [=](auto mean, auto x) { return mean + x / num_rows; }, means, rows.row(t));
    }
    for_each_dim([&](std::size_t i) { means_[i] = to_float(to_finite_bfloat16(means_[i])); });
    weights_.fill(1.0F);
    constexpr int rounds = 3;
    for (int round = 0; round < rounds; ++round) {
      measure_channels();
      if (round + 1 < rounds) measure_tokens();
    }
  }

  [[nodiscard]] float mean(index_t dim) const noexcept { return means_[static_cast<std::size_t>(dim)]; }
  [[nodiscard]] const float* means() const noexcept { return means_.data(); }
  /// Root mean square of what is left of a channel, in units.
  [[nodiscard]] float spread(index_t dim) const noexcept {
    return std::sqrt(squares_[static_cast<std::size_t>(dim)]);
  }

 private:
  template <class Body>
  void for_each_dim(Body body) const {
    for (index_t d = 0; d < dim_; ++d) body(static_cast<std::size_t>(d));
  }

  /// squares[d] = mean over tokens of weight * x^2
  void measure_channels() {
    squares_.fill(0.0F);
    for (index_t t = 0; t < count_; ++t) {
      const float* row = rows_.row(t);
      const float weight = weights_[static_cast<std::size_t>(t)] / static_cast<float>(count_);
      const float* means = means_.data();
      float* squares = squares_.data();
      const float inverse_unit = inverse_unit_;
      const auto add_square = [=](auto sum, auto number, auto mean) {
        const auto x = (number - mean) * inverse_unit;
        return sum + lanes::rounded(weight * x * x);
      };
      lanes::transform(dim_, squares, add_square, squares, row, means);
    }
  }

  /// weight[t] = 1 / mean over channels of x^2 / squares[d]
  void measure_tokens() {
    channel_floats inverse;
    for_each_dim([&](std::size_t i) { inverse[i] = squares_[i] > 0 ? 1.0F / squares_[i] : 0.0F; });
    for (index_t t = 0; t < count_; ++t) {
      const float* row = rows_.row(t);
      std::array<float, 16> parts{};
      lanes::four_floats sums[4] = {};
      index_t d = 0;
      for (; d + 16 <= dim_; d += 16) {
        for (index_t i = 0; i < 4; ++i) {
          const index_t at = d + 4 * i;
          const lanes::four_floats x =
              (lanes::load_four(row + at) - lanes::load_four(means_.data() + at)) * inverse_unit_;
          sums[i] += lanes::rounded(x * x * lanes::load_four(inverse.data() + at));
        }
      }
      std::memcpy(parts.data(), sums, sizeof(sums));
      for (; d < dim_; ++d) {
        const auto i = static_cast<std::size_t>(d);
        const float x = (row[i] - means_[i]) * inverse_unit_;
        parts[i % parts.size()] += lanes::rounded(x * x * inverse[i]);
      }
      float sum = 0;
      for (const float part : parts) sum += part;
      weights_[static_cast<std::size_t>(t)] = sum > 0 ? static_cast<float>(dim_) / sum : 0.0F;
    }
  }

  index_t dim_;
  index_t count_;
  const_rows rows_;
  float inverse_unit_;
  channel_floats means_;
  channel_floats squares_;
  std::array<float, max_block_size> weights_;
};

/// Encoding, the same for keys and values.
template <int Bits, class Base>
struct balanced_side : Base {
  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
                     index_t count, const_rows rows) {
    if (count == 0) return;
    float largest = 0;
    for (index_t t = 0; t < count; ++t)
      largest = std::max(largest, kernels.int8.largest(rows.row(t), g.head_dim));
    const float unit = std::max(largest, 0x1p-100F);
    const channel_statistics statistics(g, count, rows, 1.0F / unit);
    channel_floats inverse_scales;
    for (index_t d = 0; d < g.head_dim; ++d) {
      const bfloat16 scale = to_finite_bfloat16(statistics.spread(d) * unit);
      const float inverse = 1.0F / to_float(scale);
      inverse_scales[static_cast<std::size_t>(d)] = std::isfinite(inverse) ? inverse : 0.0F;
      Base::rows::set_channel(g, section, d, scale, from_float<bfloat16>(statistics.mean(d)));
    }
    alignas(64) channel_floats row;
    code_row row_codes;
    for (index_t t = 0; t < count; ++t) {
      lanes::transform(
          g.head_dim, row.data(), [](auto x, auto mean, auto inverse) { return (x - mean) * inverse; },
          rows.row(t), statistics.means(), inverse_scales.data());
      const float scale =
          kernels.low_bit.nearest(row.data(), g.head_dim, balanced_traits<Bits>::book, row_codes.data());
      set_scale(section + Base::rows::token_scales_offset(g), first + t, to_finite_bfloat16(scale));
      Base::rows::codes::put(g, section, first + t, row_codes.data());
    }
  }
};

}  // namespace detail

template <int Bits>
using balanced_keys = detail::balanced_side<Bits, detail::channel_scaled_keys<detail::balanced_traits<Bits>>>;
template <int Bits>
using balanced_values =
    detail::balanced_side<Bits, detail::channel_scaled_values<detail::balanced_traits<Bits>>>;

template <int Bits>
struct balanced : sides<balanced_keys<Bits>, balanced_values<Bits>>, sealing_options {
  static constexpr std::string_view name = balanced_keys<Bits>::side_name();
};

static_assert(sealing_codec<balanced<4>> && sealing_codec<balanced<3>> && sealing_codec<balanced<2>>);

}  // namespace kvcache::inline v0::codec
