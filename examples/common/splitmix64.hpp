// SPDX-License-Identifier: MIT
// Random bits that are the same on every machine; the distributions of <random> differ between standard libraries.
#pragma once

#include <cstdint>

namespace program {

/// 64 random bits a step. Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
class splitmix64 {
 public:
  explicit splitmix64(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15U;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31U);
  }

  /// In [0, 1), a multiple of 2^-53.
  double unit() { return static_cast<double>(next() >> 11U) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

}  // namespace program
