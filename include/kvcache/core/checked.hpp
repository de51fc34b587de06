// SPDX-License-Identifier: MIT
// Size arithmetic that throws instead of wrapping.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <cstdint>
#include <limits>

namespace kvcache::inline v0 {

/// \return the product; throws shape_error if a factor is negative or the product does not fit index_t.
constexpr index_t checked_mul(index_t a, index_t b) {
  if (a < 0 || b < 0) throw shape_error("kvcache: negative size");
  index_t product = 0;
  if (__builtin_mul_overflow(a, b, &product))
    throw shape_error("kvcache: size overflows");  // divides nothing
  return product;
}

template <class... More>
constexpr index_t checked_mul(index_t a, index_t b, More... more) {
  return checked_mul(checked_mul(a, b), more...);
}

/// \return the sum; throws shape_error if a term is negative or the sum does not fit index_t.
constexpr index_t checked_add(index_t a, index_t b) {
  if (a < 0 || b < 0) throw shape_error("kvcache: negative size");
  if (a > std::numeric_limits<index_t>::max() - b) throw shape_error("kvcache: size overflows");
  return a + b;
}

/// ceil(a / b). Inlined wherever it stands, as round_up: units that are known divide by shifts. \pre `a >= 0`, `b > 0`
[[gnu::always_inline]] constexpr index_t ceil_div(index_t a, index_t b) noexcept {
  const auto n = static_cast<std::uint64_t>(a);
  const auto unit = static_cast<std::uint64_t>(b);
  return static_cast<index_t>(n / unit + (n % unit != 0 ? 1 : 0));
}

/// The smallest multiple of `unit` that is >= `n`; throws shape_error if it does not fit.
[[gnu::always_inline]] constexpr index_t round_up(index_t n, index_t unit) {
  const auto rest = static_cast<index_t>(static_cast<std::uint64_t>(n) % static_cast<std::uint64_t>(unit));
  return rest == 0 && n >= 0 ? n : checked_add(n, unit - rest);
}

}  // namespace kvcache::inline v0
