// SPDX-License-Identifier: MIT
// Random numbers that are the same on every machine.
#pragma once

#include "common/splitmix64.hpp"

#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

namespace quality {

class random_numbers : program::splitmix64 {
 public:
  explicit random_numbers(std::uint64_t seed) : splitmix64(seed * 0x9E3779B97F4A7C15U) {}

  using splitmix64::unit;

  /// In [low, high).
  double uniform(double low, double high) { return low + (high - low) * unit(); }

  /// A whole number in [0, n). \pre n > 0
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }

  /// Mean 0, deviation 1. Source: Box and Muller 1958.
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - unit()));
    return radius * std::cos(2 * std::numbers::pi * unit());
  }

  std::vector<double> normals(std::size_t count) {
    std::vector<double> values(count);
    for (double& value : values) value = normal();
    return values;
  }
};

}  // namespace quality
