// SPDX-License-Identifier: MIT
// Rows to bytes: the same bytes on every level, wherever a quotient lies.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace {

using kvcache::bfloat16;
using kvcache::index_t;
namespace kernel = kvcache::kernel;

constexpr std::size_t max_row = 67;

/// Numbers that are some units in the last place from where `scale` rounds up or down, and small ones; at the ends within what
/// a byte holds.
std::array<float, max_row> near_halves(test::random& random, float scale) {
  std::array<float, max_row> row{};
  for (float& x : row) {
    const auto half = static_cast<float>(random.between(-128, 127)) + 0.5F;
    const bool at_end = std::abs(half) > 127;
    const auto units = static_cast<std::uint32_t>(random.between(at_end ? -8 : -3, at_end ? -2 : 3));
    x = std::bit_cast<float>(std::bit_cast<std::uint32_t>(half * scale) + units);
    if (random.chance(0.1)) x = std::ldexp(scale, -static_cast<int>(random.between(0, 40)));
    if (!std::isfinite(x)) x = scale;
  }
  return row;
}

}  // namespace

TEST_CASE("a row becomes the same bytes on every level, also between two of them", "[kernel]") {
  test::random random;
  const kernel::table& portable = kernel::select(kernel::isa::portable);
  for (int i = 0; i < 20000; ++i) {
    // all magnitudes by turns with those that scales have
    const auto word = static_cast<std::uint16_t>(i % 2 == 0 ? random.between(0, 0x7f7f)
                                                            : random.between(120 << 7, 136 << 7));
    const float scale = kvcache::to_float(bfloat16{word});
    const auto row = near_halves(random, scale);
    const auto count = static_cast<index_t>(random.between(0, static_cast<int>(max_row)));
    std::array<std::int8_t, max_row> want{};
    portable.int8.quantize(row.data(), count, scale, want.data());
    for (const kernel::isa level : kernel::available()) {
      std::array<std::int8_t, max_row> got{};
      kernel::select(level).int8.quantize(row.data(), count, scale, got.data());
      if (got == want) continue;
      CAPTURE(kernel::to_string(level), scale, count);
      REQUIRE(got == want);
    }
  }
}

TEST_CASE("the largest magnitude of a row is found on every level, or NaN", "[kernel]") {
  test::random random;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const kernel::isa level : kernel::available()) {
    CAPTURE(kernel::to_string(level));
    const kernel::table& kernels = kernel::select(level);
    for (index_t count = 0; count <= static_cast<index_t>(max_row); ++count) {
      CAPTURE(count);
      std::array<float, max_row> row{};
      float want = 0;
      for (float& x : std::span(row).first(static_cast<std::size_t>(count))) {
        x = std::ldexp(random.normal(), static_cast<int>(random.between(-140, 120)));
        want = std::max(want, std::abs(x));
      }
      CHECK(kernels.int8.largest(row.data(), count) == want);
      if (count == 0) continue;
      const auto at = static_cast<std::size_t>(random.between(0, static_cast<int>(count) - 1));
      for (const float x : {infinity, -infinity, std::nanf(""), -std::nanf("")}) {
        row[at] = x;
        CHECK(std::isnan(kernels.int8.largest(row.data(), count)));
      }
    }
  }
}
