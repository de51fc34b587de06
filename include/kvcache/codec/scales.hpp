// SPDX-License-Identifier: MIT
// Scales of a section: one bfloat16 for each token, and what lossy codecs ask of rows.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/prefetch.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace kvcache::inline v0::codec {

/// Bytes of one scale for each slot, padded to 64.
constexpr index_t scales_bytes(const block_geometry& g) noexcept {
  return round_up(g.block_size * index_t{sizeof(bfloat16)}, block_alignment);
}

inline const bfloat16* scales(const std::byte* section) noexcept {
  return reinterpret_cast<const bfloat16*>(section);
}

/// Fetches what stands behind the codes of a section that is wanted soon. To be called when kernels have fetched the codes: in
/// order of address the processor looks the next page up by itself, and what jumps ahead of it is waited for.
/// \param next  the section, or null
inline void fetch_behind(const std::byte* next, index_t codes_bytes, index_t section_bytes) noexcept {
  for (index_t i = codes_bytes; next != nullptr && i < section_bytes; i += block_alignment)
    prefetch::line(next + i);
}

inline void set_scale(std::byte* section, index_t slot, bfloat16 scale) noexcept {
  reinterpret_cast<bfloat16*>(section)[slot] = scale;
}

/// not_finite if a row holds NaN or infinity.
inline status finite_rows(const kernel::table& kernels, const block_geometry& g, index_t count,
                          const_rows rows) {
  for (index_t t = 0; t < count; ++t) {
    const float largest = kernels.int8.largest(rows.row(t), g.head_dim);
    if (largest != largest) return status::not_finite;
  }
  return status::ok;
}

/// The nearest bfloat16, the largest finite one instead of infinity. \pre x is not NaN
inline bfloat16 to_finite_bfloat16(float x) noexcept {
  constexpr float largest = 0x1.FEp127F;
  return from_float<bfloat16>(std::clamp(x, -largest, largest));
}

/// out = row - mean, within the range of bfloat16; `out` may be either.
inline void take_off(const float* row, const float* mean, index_t head_dim, float* out) noexcept {
  lanes::transform(
      head_dim, out, [](auto x, auto m) { return lanes::bounded(x - m, 0x1.FEp127F); }, row, mean);
}

/// The smallest bfloat16 that is not below x, the largest finite one instead of infinity. \pre x >= 0, finite
inline bfloat16 bfloat16_not_below(float x) noexcept {
  return to_finite_bfloat16(
      to_float(bfloat16{static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(x) + 0xffffU) >> 16U)}));
}

/// A power of two that brings a row's largest magnitude into [1, 4), or leaves it below 1 if it is denormal: then
/// what follows can neither overflow nor lose precision. `inverse` is 1 / unit.
struct unit_range {
  float unit;
  float inverse;
};

/// \pre the row is finite
inline unit_range unit_range_of(const kernel::table& kernels, const float* row, index_t count) {
  const auto exponent = std::bit_cast<std::uint32_t>(kernels.int8.largest(row, count)) >> 23U;
  const std::uint32_t biased = std::clamp(exponent, 1U, 253U);
  return {std::bit_cast<float>(biased << 23U), std::bit_cast<float>((254U - biased) << 23U)};
}

}  // namespace kvcache::inline v0::codec
