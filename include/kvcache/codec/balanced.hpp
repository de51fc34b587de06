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
#include <limits>
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
  /// \param inverse_unit  what the rows are multiplied by before anything is squared
  channel_statistics(const kernel::table& kernels, const block_geometry& g, index_t count, const_rows rows,
                     float inverse_unit)
      : kernels_(kernels), dim_(g.head_dim), count_(count), rows_(rows), inverse_unit_(inverse_unit) {
    kernels.channel.means(rows, count, dim_, means_.data());
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
    std::array<float, max_block_size> shares;
    std::transform(weights_.begin(), weights_.begin() + count_, shares.begin(),
                   [this](float weight) { return weight / static_cast<float>(count_); });
    kernels_.channel.squares_of_channels(rows_, count_, dim_, means_.data(), inverse_unit_, shares.data(),
                                         squares_.data());
  }

  /// weight[t] = 1 / mean over channels of x^2 / squares[d]
  void measure_tokens() {
    channel_floats inverse;
    for_each_dim([&](std::size_t i) { inverse[i] = squares_[i] > 0 ? 1.0F / squares_[i] : 0.0F; });
    kernels_.channel.squares_of_tokens(rows_, count_, dim_, means_.data(), inverse_unit_, inverse.data(),
                                       weights_.data());
    std::transform(weights_.begin(), weights_.begin() + count_, weights_.begin(),
                   [this](float sum) { return sum > 0 ? static_cast<float>(dim_) / sum : 0.0F; });
  }

  const kernel::table& kernels_;
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
    static constexpr float most = std::numeric_limits<float>::max();
    float largest = 0;
    for (index_t t = 0; t < count; ++t)
      largest = std::max(largest, kernels.int8.largest(rows.row(t), g.head_dim));
    const float unit = std::max(largest, 0x1p-100F);
    const channel_statistics statistics(kernels, g, count, rows, 1.0F / unit);
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
      const auto normalise = [&](auto difference) {
        lanes::transform(
            g.head_dim, row.data(),
            [=](auto x, auto mean, auto inverse) { return difference(x, mean) * inverse; }, rows.row(t),
            statistics.means(), inverse_scales.data());
      };
      if (largest < most / 2) {
        normalise([](auto x, auto mean) { return x - mean; });
      } else {  // may be further apart than any float
        normalise([](auto x, auto mean) { return lanes::bounded(x - mean, most); });
      }
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
