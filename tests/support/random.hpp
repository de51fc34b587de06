// SPDX-License-Identifier: MIT
// Random numbers for tests: the same on every machine and in every run, and a failure says how to repeat it.
//
//   TEST_CASE("...") {
//     test::random random;                                // a failure below prints "KVCACHE_TEST_SEED=..."
//     std::vector<float> k = random.floats(n);
//     switch (random.below(4)) { ... }
//   }
//
// KVCACHE_TEST_SEED=123 in the environment sets the seed, KVCACHE_TEST_SEED=random draws a new one.
#pragma once

#include "support/catch.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numbers>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace test {

/// The seed of this process: KVCACHE_TEST_SEED, or 1.
inline std::uint64_t seed() {
  static const std::uint64_t value = [] {
    const char* text = std::getenv("KVCACHE_TEST_SEED");
    if (text == nullptr || *text == '\0') return std::uint64_t{1};
    if (std::string_view(text) == "random") return std::uint64_t{std::random_device{}()};
    return static_cast<std::uint64_t>(std::stoull(text));
  }();
  return value;
}

/// A generator (splitmix64) whose every distribution is spelled out here, because those of <random> differ between
/// standard libraries. Also a UniformRandomBitGenerator, for std::shuffle where the exact order does not matter.
class random {
 public:
  using result_type = std::uint64_t;

  /// `stream` tells generators of one test apart.
  explicit random(std::uint64_t stream = 0)
      : state_(seed() * 0x9E3779B97F4A7C15u + stream * 0xD1B54A32D192ED03u),
        message_(Catch::MessageBuilder("INFO", CATCH_INTERNAL_LINEINFO, Catch::ResultWas::Info)
                 << "repeat with KVCACHE_TEST_SEED=" << seed()) {}

  random(const random&) = delete;
  random& operator=(const random&) = delete;

  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return ~result_type{0}; }

  result_type operator()() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  /// An integer in [0, n). \pre n > 0
  std::ptrdiff_t below(std::ptrdiff_t n) {
    return static_cast<std::ptrdiff_t>((*this)() % static_cast<std::uint64_t>(n));
  }

  /// An integer in [first, last].
  std::ptrdiff_t between(std::ptrdiff_t first, std::ptrdiff_t last) {
    return first + below(last - first + 1);
  }

  /// True with probability `p`.
  bool chance(double p) { return unit() < p; }

  /// A number in [0, 1), a multiple of 2^-53.
  double unit() { return static_cast<double>((*this)() >> 11) * 0x1.0p-53; }

  /// A number in [low, high).
  float uniform(float low = -1, float high = 1) {
    return static_cast<float>(low + (static_cast<double>(high) - low) * unit());
  }

  /// Normally distributed, mean 0 and deviation 1 (Box-Muller).
  float normal() {
    const double radius = std::sqrt(-2 * std::log(1 - unit()));
    return static_cast<float>(radius * std::cos(2 * std::numbers::pi * unit()));
  }

  /// Fills `values` with normally distributed numbers.
  void fill(std::span<float> values) {
    for (float& value : values) value = normal();
  }

  /// `count` normally distributed numbers.
  std::vector<float> floats(std::ptrdiff_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    fill(values);
    return values;
  }

 private:
  std::uint64_t state_;
  Catch::ScopedMessage message_;  // printed with every failure while this generator lives
};

}  // namespace test
