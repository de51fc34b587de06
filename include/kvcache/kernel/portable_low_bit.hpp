// SPDX-License-Identifier: MIT
// Numbers of less than 8 bits in plain C++: what low_bit_kernels says, and the scalar steps that every level shares.
#pragma once

#include <kvcache/block/packed.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace kvcache::inline v0::kernel::portable {

// ---- unpacking ------------------------------------------------------------------------------------------------------

template <int Bits>
void unpack_lines(const std::byte* packed, index_t first_line, index_t num_lines, const std::int8_t* codebook,
                  std::int8_t* out) {
  const index_t first = first_line * packed_line_bytes;
  for (index_t i = 0; i < num_lines * packed_line_bytes; ++i)
    out[i] = codebook[packed_order<Bits>::get(packed, first + i)];
}

inline void unpack(int bits, const std::byte* packed, index_t first_line, index_t num_lines,
                   const std::int8_t* codebook, std::int8_t* out, const std::byte* /*next*/) {
  if (bits == 1) unpack_lines<1>(packed, first_line, num_lines, codebook, out);
  if (bits == 2) unpack_lines<2>(packed, first_line, num_lines, codebook, out);
  if (bits == 3) unpack_lines<3>(packed, first_line, num_lines, codebook, out);
  if (bits == 4) unpack_lines<4>(packed, first_line, num_lines, codebook, out);
}

// ---- Walsh-Hadamard transform ---------------------------------------------------------------------------------------

/// The same additions as the rounds in low_bit_kernels, each number left where it is instead of shuffled.
inline void hadamard(float* row, index_t size) {
  for (index_t half = size / 2; half > 0; half /= 2) {
    for (index_t first = 0; first < size; first += 2 * half) {
      for (index_t i = first; i < first + half; ++i) {
        const float a = row[i];
        const float b = row[i + half];
        row[i] = a + b;
        row[i + half] = a - b;
      }
    }
  }
}

// ---- scalar quantisation --------------------------------------------------------------------------------------------

/// 2^exponent, -126 <= exponent <= 127.
constexpr float power_of_two(int exponent) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23U);
}

/// The power of two that brings the largest number of a row into [256, 512): two factors, since it may be no float.
struct whole_scaling {
  float first;
  float second;
  int exponent;
};

/// \pre 0 < largest < infinity
inline whole_scaling whole_scaling_of(float largest) noexcept {
  const bool tiny = largest < std::numeric_limits<float>::min();
  const auto word = std::bit_cast<std::uint32_t>(tiny ? largest * 0x1p64F : largest);
  const int exponent = 8 - (static_cast<int>(word >> 23U) - 127 - (tiny ? 64 : 0));
  return {power_of_two(exponent / 2), power_of_two(exponent - exponent / 2), exponent};
}

/// Thresholds as whole numbers: |m| is above one if and only if it is strictly larger than this.
inline std::array<float, 7> whole_thresholds(const scalar_codebook& book, std::int32_t sum_of_squares,
                                             index_t count) noexcept {
  constexpr double beyond_all = 1024;
  const double rms = std::sqrt(static_cast<double>(sum_of_squares) / static_cast<double>(count));
  const std::size_t num_thresholds = (std::size_t{1} << static_cast<unsigned>(book.bits - 1)) - 1;
  std::array<float, 7> whole;
#pragma GCC unroll 7
  for (std::size_t j = 0; j < whole.size(); ++j) {
    const double threshold = static_cast<double>(book.thresholds[j]) * rms;
    const double used = j < num_thresholds && threshold < beyond_all ? threshold : beyond_all;
    whole[j] = static_cast<float>(static_cast<std::int32_t>(used));
  }
  return whole;
}

/// The least-squares scale, undoing the scaling to whole numbers.
inline float least_squares_scale(std::int32_t products, std::int32_t squares, int exponent) noexcept {
  const auto undo = std::bit_cast<double>(static_cast<std::uint64_t>(1023 - exponent) << 52U);
  const double scale = static_cast<double>(products) / static_cast<double>(squares) * undo;
  return static_cast<float>(std::min(scale, static_cast<double>(std::numeric_limits<float>::max())));
}

inline float nearest(const float* row, index_t count, const scalar_codebook& book, std::uint8_t* codes) {
  constexpr float round_to_integer = 0x1.8p23F;
  const int num_positive = 1 << (book.bits - 1);

  // pass 1: the largest number
  float largest = 0.0F;
  for (index_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(row[i]));
  if (largest == 0.0F) {
    std::fill_n(codes, count, static_cast<std::uint8_t>(num_positive));
    return 0.0F;
  }

  // pass 2: whole numbers, and their squares
  const whole_scaling scaling = whole_scaling_of(largest);
  std::array<std::int32_t, max_head_dim> whole;
  std::int32_t sum_of_squares = 0;
  for (index_t i = 0; i < count; ++i) {
    const float shifted = row[i] * scaling.first * scaling.second + round_to_integer;
    const auto m = static_cast<std::int32_t>(shifted - round_to_integer);
    whole[static_cast<std::size_t>(i)] = m;
    sum_of_squares += m * m;
  }

  // pass 3: codes, and the sums of the scale
  const std::array<float, 7> thresholds = whole_thresholds(book, sum_of_squares, count);
  std::int32_t products = 0;
  std::int32_t squares = 0;
  for (index_t i = 0; i < count; ++i) {
    const std::int32_t m = whole[static_cast<std::size_t>(i)];
    const auto size = static_cast<float>(std::abs(m));
    int index = 0;
    for (const float threshold : thresholds) index += size > threshold ? 1 : 0;
    const int code = m < 0 ? num_positive - 1 - index : num_positive + index;
    codes[i] = static_cast<std::uint8_t>(code);
    products += m * book.levels[code];
    squares += book.levels[code] * book.levels[code];
  }
  return least_squares_scale(products, squares, scaling.exponent);
}

inline constexpr low_bit_kernels kernels_for_low_bits = {unpack, hadamard, nearest};

}  // namespace kvcache::inline v0::kernel::portable
