// SPDX-License-Identifier: MIT
// Scales of klt: one byte for each token. A row is one scale beside those of the calibration, so most scales are near 1.
//
//   code 0: 0        code 128: 1        64 codes to either side: 16 to the octave        beyond them: steps of almost 2 octaves
//
// So eight octaves around 1 in steps of 3 to 6 percent, and 2^-114 to 2^125 in all. A scale is rounded up, so that nothing is
// cut off. In the bits of a bfloat16, of which 128 are an octave, codes are three straight lines.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvcache::inline v0::codec::detail {

/// Kernels take scales so many times smaller: levels times scales stay within float as long as components do.
inline constexpr float klt_scale_divisor = 32.0F;

/// The bits of a scale that is divided by klt_scale_divisor.
constexpr std::uint16_t klt_scale_bits(std::uint8_t code) noexcept {
  constexpr int one = (127 - 5) * 128;  // 1/32
  constexpr int near = 64;
  const int steps = code - 128;
  const int above = std::max(steps - near, 0);
  const int below = std::min(steps + near, 0);
  const int bits = one + 8 * steps + (246 - 8) * above + (224 - 8) * below;
  return static_cast<std::uint16_t>(code == 0 ? 0 : bits);
}

/// Of all codes.
inline constexpr std::array<bfloat16, 256> klt_scales = [] {
  std::array<bfloat16, 256> scales{};
  for (std::size_t code = 0; code < scales.size(); ++code)
    scales[code] = bfloat16{klt_scale_bits(static_cast<std::uint8_t>(code))};
  return scales;
}();

/// The code of the least scale that is not below x, of the greatest up to `limit` if that is beyond it; zero for an x far below
/// all scales. \param x, limit  divided by klt_scale_divisor
inline std::uint8_t klt_scale_code(double x, double limit) noexcept {
  const auto value = [](std::size_t code) { return static_cast<double>(to_float(klt_scales[code])); };
  if (x < value(1) / 4) return 0;
  std::size_t code = 0;
  for (std::size_t step = 128; step > 0; step /= 2) {
    if (code + step < klt_scales.size() && value(code + step) < x) code += step;
  }
  code = std::min(code + 1, klt_scales.size() - 1);
  while (code > 1 && value(code) > limit) --code;
  return static_cast<std::uint8_t>(code);
}

/// Bytes of one code for each slot, padded to 64.
constexpr index_t klt_scales_bytes(index_t block_size) noexcept {
  return round_up(block_size, block_alignment);
}

/// The scales of up to 64 tokens as kernels take them.
class klt_scale_run {
 public:
  /// \param codes  of the block
  klt_scale_run(const std::byte* codes, index_t first, index_t count) noexcept {
    std::array<std::uint8_t, unpacked_tokens> own;
    own.fill(128);
    std::memcpy(own.data(), codes + first, static_cast<std::size_t>(count));
    if (are_near(own)) {
      for (std::size_t t = 0; t < own.size(); ++t) {
        constexpr std::uint16_t zero = klt_scale_bits(128) - 8 * 128;
        scales_[t] = bfloat16{static_cast<std::uint16_t>(zero + 8 * own[t])};
      }
    } else {
      for (std::size_t t = 0; t < own.size(); ++t) scales_[t] = klt_scales[own[t]];
    }
  }
  [[nodiscard]] const bfloat16* data() const noexcept { return scales_.data(); }

 private:
  /// Whether all codes lie on the line around 128, from 64 to 191: their highest two bits differ.
  static bool are_near(const std::array<std::uint8_t, unpacked_tokens>& codes) noexcept {
    std::uint64_t differ = ~std::uint64_t{0};
    for (std::size_t t = 0; t < codes.size(); t += sizeof(differ)) {
      std::uint64_t eight = 0;
      std::memcpy(&eight, &codes[t], sizeof(eight));
      differ &= eight ^ eight << 1U;
    }
    return (differ & 0x8080808080808080U) == 0x8080808080808080U;
  }

  alignas(64) std::array<bfloat16, static_cast<std::size_t>(unpacked_tokens)> scales_;
};

}  // namespace kvcache::inline v0::codec::detail
