// SPDX-License-Identifier: MIT
// Random numbers that are the same on every machine: splitmix64 and Box-Muller, spelled out because the distributions of
// <random> differ between standard libraries.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

namespace quality {

class random_numbers {
 public:
  explicit random_numbers(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U) {}

  /// In [0, 1), a multiple of 2^-53.
  double unit() { return static_cast<double>(next() >> 11U) * 0x1.0p-53; }

  /// In [low, high).
  double uniform(double low, double high) { return low + (high - low) * unit(); }

  /// A whole number in [0, n). \pre n > 0
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }

  /// Mean 0, deviation 1.
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - unit()));
    return radius * std::cos(2 * std::numbers::pi * unit());
  }

  std::vector<double> normals(std::size_t count) {
    std::vector<double> values(count);
    for (double& value : values) value = normal();
    return values;
  }

 private:
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15U;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31U);
  }

  std::uint64_t state_;
};

}  // namespace quality
