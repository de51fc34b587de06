// SPDX-License-Identifier: MIT
// half (IEEE binary16) and bfloat16 as storage types: bits, and conversions from and to float.
//
// Narrowing rounds to nearest, ties to even; infinities and signs are kept, NaN stays NaN (quiet), values too
// large become infinity, subnormals are exact. All conversions are branch-free so that loops vectorise.
#pragma once

#include <bit>
#include <cstdint>

namespace kvcache::inline v0 {

static_assert(std::endian::native == std::endian::little, "kvcache's block order is little-endian");

struct half {
  std::uint16_t bits = 0;
  friend bool operator==(half, half) = default;  // of the bits: NaN equals itself, -0 differs from +0
};

struct bfloat16 {
  std::uint16_t bits = 0;
  friend bool operator==(bfloat16, bfloat16) = default;
};

constexpr float to_float(float x) noexcept { return x; }

constexpr float to_float(bfloat16 x) noexcept { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

constexpr float to_float(half x) noexcept {
  // Shift exponent and mantissa into place and let one multiplication by 2^112 re-bias the exponent; it
  // normalises subnormals as well. Infinity and NaN (exponent all ones) are put back afterwards.
  const std::uint32_t magnitude = (std::uint32_t{x.bits} & 0x7fffU) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
  const std::uint32_t special = magnitude >= (0x7c00U << 13) ? 0x7f800000U : 0U;
  const std::uint32_t sign = (std::uint32_t{x.bits} & 0x8000U) << 16;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | special | sign);
}

/// Narrows `x` to the element type `Element`.
template <class Element>
constexpr Element from_float(float x) noexcept;

template <>
constexpr float from_float<float>(float x) noexcept {
  return x;
}

template <>
constexpr bfloat16 from_float<bfloat16>(float x) noexcept {
  const auto u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7fffU + ((u >> 16) & 1U)) >> 16;
  const std::uint32_t quiet_nan = (u >> 16) | 0x40U;  // rounding must not carry a NaN into infinity
  return {static_cast<std::uint16_t>((u & 0x7fffffffU) > 0x7f800000U ? quiet_nan : rounded)};
}

template <>
constexpr half from_float<half>(float x) noexcept {
  const auto u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 16) & 0x8000U;
  const std::uint32_t magnitude = u & 0x7fffffffU;
  // Normal results: re-bias the exponent (127 - 15 = 112) and round the 13 dropped bits to even.
  const std::uint32_t normal = (magnitude - (112U << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  // Subnormal results: adding 0.5 aligns the mantissa so that the float addition itself rounds to even.
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) -
                                  std::bit_cast<std::uint32_t>(0.5F);
  const std::uint32_t quiet_nan = 0x7e00U | ((magnitude >> 13) & 0x3ffU);
  const std::uint32_t finite = magnitude < (113U << 23) ? subnormal : normal;
  const std::uint32_t bounded =
      magnitude >= 0x477ff000U ? 0x7c00U : finite;  // 65520 and up round to infinity
  const std::uint32_t result = magnitude > 0x7f800000U ? quiet_nan : bounded;
  return {static_cast<std::uint16_t>(sign | result)};
}

}  // namespace kvcache::inline v0
