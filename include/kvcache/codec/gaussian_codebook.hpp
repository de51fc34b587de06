// SPDX-License-Identifier: MIT
// The codebooks of rotated and balanced: the levels that are best for normally distributed numbers, as bytes.
//
// Relative mean squared error at unit variance: 0.1175, 0.0345, 0.0095 for 2, 3 and 4 bits; 0.4 % more at 4 bits for being
// bytes. Source: Max 1960, "Quantizing for minimum distortion"; Lloyd 1982, "Least squares quantization in PCM".
#pragma once

#include <kvcache/kernel/table.hpp>

namespace kvcache::inline v0::codec {

/// The codebook for `Bits` bits. Thresholds lie halfway between levels, in units of the standard deviation.
template <int Bits>
constexpr kernel::scalar_codebook gaussian_codebook() noexcept {
  static_assert(Bits == 2 || Bits == 3 || Bits == 4);
  if constexpr (Bits == 2) {
    return {2, {-127, -38, 38, 127}, {0.9816F}};
  } else if constexpr (Bits == 3) {
    return {3, {-127, -79, -45, -14, 14, 45, 79, 127}, {0.50055F, 1.04995F, 1.7479F}};
  } else {
    return {4,
            {-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127},
            {0.2582F, 0.5224F, 0.79955F, 1.09925F, 1.4371F, 1.8435F, 2.4008F}};
  }
}

}  // namespace kvcache::inline v0::codec
