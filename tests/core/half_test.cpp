// SPDX-License-Identifier: MIT
// All 65,536 halves and bfloat16s, and the rounding between them, against Eigen's.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/core/half.hpp>

#include <Eigen/Core>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

using kvcache::bfloat16;
using kvcache::from_float;
using kvcache::half;
using kvcache::to_float;

namespace {

std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

template <class Ours, class Theirs>
Theirs same_bits(Ours x) {
  return Eigen::numext::bit_cast<Theirs>(x.bits);
}

/// Widening of every bit pattern, and narrowing of every widened value.
template <class Ours, class Theirs>
void check_all_patterns() {
  for (std::uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const Ours x{static_cast<std::uint16_t>(bits)};
    const float ours = to_float(x);
    const auto theirs = static_cast<float>(same_bits<Ours, Theirs>(x));
    if (std::isnan(theirs)) {
      if (!std::isnan(ours)) FAIL("pattern " << bits << " should be NaN");
      if (!std::isnan(to_float(from_float<Ours>(ours)))) FAIL("pattern " << bits << " loses its NaN");
      continue;
    }
    if (bits_of(ours) != bits_of(theirs)) FAIL("pattern " << bits << ": " << ours << " is not " << theirs);
    if (from_float<Ours>(ours) != x)
      FAIL("pattern " << bits << " does not survive the way to float and back");
  }
  SUCCEED();
}

template <class Ours, class Theirs>
void check_narrowing(float x) {
  const Ours ours = from_float<Ours>(x);
  const Theirs theirs(x);
  if (std::isnan(x)) {
    if (!std::isnan(to_float(ours))) FAIL("NaN " << bits_of(x) << " became " << to_float(ours));
  } else if (ours.bits != Eigen::numext::bit_cast<std::uint16_t>(theirs)) {
    FAIL("narrowing " << x << " (bits " << bits_of(x) << "): " << ours.bits);
  }
}

/// Every value of the type, the middle between neighbours, and one float above and below each of these.
template <class Ours, class Theirs>
void check_rounding_at_every_boundary() {
  for (std::uint32_t bits = 0; bits < 0xffff; ++bits) {
    const float low = to_float(Ours{static_cast<std::uint16_t>(bits)});
    const float high = to_float(Ours{static_cast<std::uint16_t>(bits + 1)});
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const auto middle = static_cast<float>((static_cast<double>(low) + static_cast<double>(high)) / 2);
    for (const float x : {low, middle}) {
      check_narrowing<Ours, Theirs>(x);
      check_narrowing<Ours, Theirs>(std::nextafter(x, -std::numeric_limits<float>::infinity()));
      check_narrowing<Ours, Theirs>(std::nextafter(x, std::numeric_limits<float>::infinity()));
    }
  }
  SUCCEED();
}

template <class Ours, class Theirs>
void check_random_floats() {
  test::random random;
  for (int i = 0; i < 2'000'000; ++i)
    check_narrowing<Ours, Theirs>(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  SUCCEED();
}

}  // namespace

TEST_CASE("every half widens as Eigen's does and narrows back to itself", "[core]") {
  check_all_patterns<half, Eigen::half>();
}

TEST_CASE("every bfloat16 widens as Eigen's does and narrows back to itself", "[core]") {
  check_all_patterns<bfloat16, Eigen::bfloat16>();
}

TEST_CASE("narrowing to half rounds to nearest even", "[core]") {
  check_rounding_at_every_boundary<half, Eigen::half>();
  check_random_floats<half, Eigen::half>();
  CHECK(from_float<half>(65519.996F).bits == 0x7bff);  // the largest finite half
  CHECK(from_float<half>(65520.0F).bits == 0x7c00);    // halfway to what would come next: infinity
  CHECK(from_float<half>(0x1p-25F).bits == 0);  // halfway between zero and the smallest subnormal: even
  CHECK(from_float<half>(0x1.000002p-25F).bits == 1);
}

TEST_CASE("narrowing to bfloat16 rounds to nearest even", "[core]") {
  check_rounding_at_every_boundary<bfloat16, Eigen::bfloat16>();
  check_random_floats<bfloat16, Eigen::bfloat16>();
  CHECK(from_float<bfloat16>(std::numeric_limits<float>::max()).bits == 0x7f80);
}

TEST_CASE("infinities, signed zeros and NaN are kept", "[core]") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  CHECK(to_float(from_float<half>(infinity)) == infinity);
  CHECK(to_float(from_float<half>(-infinity)) == -infinity);
  CHECK(to_float(from_float<bfloat16>(-infinity)) == -infinity);
  CHECK(std::signbit(to_float(from_float<half>(-0.0F))));
  CHECK(std::signbit(to_float(from_float<bfloat16>(-0.0F))));
  // A NaN whose payload lies in the bits that are dropped must not become infinity.
  const auto nan = std::bit_cast<float>(std::uint32_t{0x7f800001});
  CHECK(std::isnan(to_float(from_float<half>(nan))));
  CHECK(std::isnan(to_float(from_float<bfloat16>(nan))));
}
