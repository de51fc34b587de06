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

/// A row as put_key and put_value store it.
struct stored_row {
  std::array<std::int8_t, max_row> key{};
  std::array<std::int8_t, max_row> value{};
  bool only_itself = true;  ///< nothing else was written but zeros behind the key
  bool operator==(const stored_row&) const = default;
};

stored_row stored(const kernel::table& kernels, std::span<const float> row, float scale, index_t slot) {
  constexpr std::int8_t untouched = 85;
  const auto count = static_cast<index_t>(row.size());
  stored_row result;
  std::array<std::int8_t, (max_row / 4 + 2) * 64> words;
  words.fill(untouched);
  kernels.int8.put_key(row.data(), count, scale, words.data());
  std::array<std::int8_t, (max_row + 1) * 4> quads;
  quads.fill(untouched);
  kernels.int8.put_value(row.data(), count, scale, slot, quads.data());
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::size_t dim = i / 64 * 4 + i % 64;
    const bool own = i % 64 < 4 && dim < row.size();
    const bool padding = i % 64 < 4 && !own && i / 64 * 4 < row.size();
    if (own) result.key.at(dim) = words[i];
    if (!own && words[i] != (padding ? 0 : untouched)) result.only_itself = false;
  }
  for (std::size_t i = 0; i < quads.size(); ++i) {
    const bool own = static_cast<index_t>(i % 4) == slot && i / 4 < row.size();
    if (own) result.value.at(i / 4) = quads[i];
    if (!own && quads[i] != untouched) result.only_itself = false;
  }
  return result;
}

}  // namespace

TEST_CASE("a row becomes the same bytes on every level, also between two of them", "[kernel]") {
  test::random random;
  for (int i = 0; i < 20000; ++i) {
    // all magnitudes by turns with those that scales have
    const auto word = static_cast<std::uint16_t>(i % 2 == 0 ? random.between(0, 0x7f7f)
                                                            : random.between(120 << 7, 136 << 7));
    const float scale = i % 100 == 0 ? 5.0F / 127.0F : kvcache::to_float(bfloat16{word});
    const auto numbers = near_halves(random, scale);
    const auto count = static_cast<std::size_t>(random.between(0, static_cast<int>(max_row)));
    const std::span<const float> row = std::span(numbers).first(count);
    const index_t slot = i % 4;
    stored_row want;
    for (std::size_t d = 0; d < count; ++d) {
      // rounded twice is rounded once: a double has more than twice the bits of a float, and two
      const auto quotient = static_cast<float>(double{row[d]} / double{scale});
      want.key.at(d) = static_cast<std::int8_t>(scale == 0 ? 0.0F : std::nearbyint(quotient));
    }
    want.value = want.key;
    for (const kernel::isa level : kernel::available()) {
      const stored_row got = stored(kernel::select(level), row, scale, slot);
      if (got == want) continue;
      CAPTURE(kernel::to_string(level), scale, count, slot, got.only_itself);
      REQUIRE(got.key == want.key);
      REQUIRE(got.value == want.value);
      REQUIRE(got.only_itself);
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
