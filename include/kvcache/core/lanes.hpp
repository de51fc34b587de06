// SPDX-License-Identifier: MIT
// lanes: four numbers at a time in the registers of any processor, for plain loops that -O2 leaves scalar. Each lane does
// what a loop over single numbers would do, in the same order: the same bits.
#pragma once

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvcache::inline v0::lanes {

using four_floats [[gnu::vector_size(16)]] = float;

inline constexpr index_t width = 4;

/// x, which the compiler takes for unknown: a product is rounded before it is added to anything, also where there are fused
/// multiplications and additions (-ffp-contract). What is stored is the same bytes in all builds because of it.
template <class T>
inline T rounded(T x) noexcept {
#if defined(__SSE2__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

inline four_floats load_four(const float* from) noexcept {
  four_floats loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return loaded;
}
inline void store_four(float* to, four_floats numbers) noexcept {
  std::memcpy(to, &numbers, sizeof(numbers));
}

/// x within [-limit, limit]; NaN stays.
inline float bounded(float x, float limit) noexcept { return std::clamp(x, -limit, limit); }
inline four_floats bounded(four_floats x, float limit) noexcept {
  const four_floats most = {limit, limit, limit, limit};
  const four_floats below = most < x ? most : x;
  return below < -most ? -most : below;
}

/// Calls four(d) for d = 0, 4, ... as far as four numbers are left of `count`, and one(d) for those behind them.
template <class Four, class One>
void for_each(index_t count, Four four, One one) {
  const index_t whole = count - (count & (width - 1));
  for (index_t d = 0; d < whole; d += width) four(d);
  for (index_t d = whole; d < count; ++d) one(d);
}

/// to[d] = f(from[d]...) for d < count, where f takes numbers or four_floats. `to` may be one of the sources.
template <class F, class... Sources>
void transform(index_t count, float* to, F f, const Sources*... from) {
  for_each(
      count, [&](index_t d) { store_four(to + d, f(load_four(from + d)...)); },
      [&](index_t d) { to[d] = f(from[d]...); });
}

}  // namespace kvcache::inline v0::lanes
