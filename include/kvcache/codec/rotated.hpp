// SPDX-License-Identifier: MIT
// rotated<4>, <3>, <2>: rows rotated, every number one of 2^Bits levels, one scale for each row.
//
// Bits + 16 / head_dim bits per number; sections and the rest as in codec/rotated_rows.hpp. Relative mean squared error of
// normally distributed rows of 128, and of any rows that the rotation makes so: 0.0092, 0.0335, 0.1153 for 4, 3, 2 bits.
// The scale is the least-squares one.
// Source: Lloyd-Max levels after a random rotation, as in TurboQuant (Zandieh et al. 2025) without its second stage, and
// EDEN (Vargaftik et al. 2022).
#pragma once

#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/gaussian_codebook.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/rotated_rows.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <cstdint>
#include <string_view>

namespace kvcache::inline v0::codec {

namespace detail {

/// The nearest level, number by number; see rotated_rows.
template <int Bits>
struct gaussian_quantiser {
  static constexpr int bits = Bits;
  static constexpr std::string_view name = Bits == 4 ? "rotated4" : (Bits == 3 ? "rotated3" : "rotated2");
  static constexpr kernel::scalar_codebook book = gaussian_codebook<Bits>();

  static constexpr const std::int8_t* unpack_book() noexcept { return book.levels; }
  static float encode(const kernel::table& kernels, float* row, index_t count, std::uint8_t* codes) {
    return kernels.low_bit.nearest(row, count, book, codes);
  }
  static void levels(const std::uint8_t* codes, index_t count, float* row) noexcept {
    for (index_t d = 0; d < count; ++d) row[d] = static_cast<float>(book.levels[codes[d]]);
  }
  static void scores(const looked_up<Bits>& codes, const bfloat16* scales, const float* prepared,
                     index_t num_rows, float* scores) {
    codes.scores(scales, prepared, num_rows, scores);
  }
  static void accumulate(const looked_up<Bits>& codes, const bfloat16* scales, const float* weights,
                         index_t num_rows, float* sums) {
    codes.accumulate(scales, weights, num_rows, sums);
  }
};

}  // namespace detail

template <int Bits>
using rotated_keys = detail::rotated_keys<detail::gaussian_quantiser<Bits>>;
template <int Bits>
using rotated_values = detail::rotated_values<detail::gaussian_quantiser<Bits>>;

template <int Bits>
struct rotated : sides<rotated_keys<Bits>, rotated_values<Bits>> {
  static constexpr std::string_view name = rotated_keys<Bits>::side_name();
};

static_assert(block_codec<rotated<4>> && block_codec<rotated<3>> && block_codec<rotated<2>>);

}  // namespace kvcache::inline v0::codec
