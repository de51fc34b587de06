// SPDX-License-Identifier: MIT
// Rows times factors of their dims, in plain C++.
#pragma once

#include <kvcache/block/view.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace kvcache::inline v0::kernel::portable {

inline void multiply(const float* row, const float* factors, float factor, index_t count, float* out) {
  for (index_t d = 0; d < count; ++d) out[d] = row[d] * factors[d] * factor;
}

inline void shift(float* scores, index_t count, float constant) {
  for (index_t t = 0; t < count; ++t) scores[t] += constant;
}

inline void add_to(const float* part, index_t count, float* sums) {
  for (index_t i = 0; i < count; ++i) sums[i] += part[i];
}

inline void fold(const float* queries, index_t num_rows, index_t head_dim, const bfloat16* scales,
                 const bfloat16* offsets, float* folded, float* dots) {
  for (index_t r = 0; r < num_rows; ++r) {
    float dot = 0.0F;
    for (index_t d = 0; d < head_dim; ++d) {
      folded[r * head_dim + d] = queries[r * head_dim + d] * to_float(scales[d]);
      dot += queries[r * head_dim + d] * to_float(offsets[d]);
    }
    dots[r] = dot;
  }
}

inline void unfold(const float* part, index_t head_dim, const bfloat16* scales, const bfloat16* offsets,
                   float offset_weight, float* sums) {
  for (index_t d = 0; d < head_dim; ++d)
    sums[d] += part[d] * to_float(scales[d]) + offset_weight * to_float(offsets[d]);
}

inline void couple_pairs(const float* a, const float* b, index_t first, index_t num_pairs,
                         const bfloat16* means, float* out) {
  for (index_t i = first; i < num_pairs; ++i) {
    const float mean_a = to_float(means[i]);
    const float mean_b = to_float(means[num_pairs + i]);
    out[i] = a[i] * mean_a + b[i] * mean_b;
    out[num_pairs + i] = b[i] * mean_a - a[i] * mean_b;
  }
}

inline void couple(const float* queries, index_t num_rows, index_t stride, index_t num_pairs,
                   const bfloat16* means, float* out) {
  for (index_t r = 0; r < num_rows; ++r)
    couple_pairs(queries + r * stride, queries + r * stride + num_pairs, 0, num_pairs, means,
                 out + r * 2 * num_pairs);
}

inline void means(const_rows rows, index_t num_rows, index_t count, float* means) {
  std::fill_n(means, count, 0.0F);
  for (index_t t = 0; t < num_rows; ++t) {
    for (index_t d = 0; d < count; ++d) means[d] += rows.row(t)[d] / static_cast<float>(num_rows);
  }
}

inline void ranges(const_rows rows, index_t num_rows, index_t count, float* least, float* largest) {
  std::copy_n(rows.row(0), count, least);
  std::copy_n(rows.row(0), count, largest);
  for (index_t t = 1; t < num_rows; ++t) {
    const float* row = rows.row(t);
    for (index_t d = 0; d < count; ++d) {
      least[d] = std::min(least[d], row[d]);
      largest[d] = std::max(largest[d], row[d]);
    }
  }
}

inline void squares_of_channels(const_rows rows, index_t num_rows, index_t count, const float* means,
                                float factor, const float* weights, float* squares) {
  std::fill_n(squares, count, 0.0F);
  for (index_t t = 0; t < num_rows; ++t) {
    for (index_t d = 0; d < count; ++d) {
      const float x = (rows.row(t)[d] - means[d]) * factor;
      squares[d] += lanes::rounded(weights[t] * x * x);
    }
  }
}

/// The end of a token: dims [first, count), `first` a multiple of 16, whose squares come to the 16 sums before them.
inline float rest_of_squares(std::array<float, 16> sums, const float* row, index_t first, index_t count,
                             const float* means, float factor, const float* weights) {
  for (index_t d = first; d < count; ++d) {
    const float x = (row[d] - means[d]) * factor;
    sums[static_cast<std::size_t>(d % 16)] += lanes::rounded(x * x * weights[d]);
  }
  float sum = 0;
  for (const float part : sums) sum += part;
  return sum;
}

inline void squares_of_tokens(const_rows rows, index_t num_rows, index_t count, const float* means,
                              float factor, const float* weights, float* sums) {
  for (index_t t = 0; t < num_rows; ++t)
    sums[t] = rest_of_squares({}, rows.row(t), 0, count, means, factor, weights);
}

inline void to_codes(const float* row, const float* middles, const float* inverse_steps, int below,
                     index_t count, std::uint8_t* codes) {
  constexpr float round_to_integer = 0x1.8p23F;  // adding it leaves the integer in the low mantissa bits
  for (index_t d = 0; d < count; ++d) {
    const float steps = (row[d] - middles[d]) * inverse_steps[d];
    const float bounded = std::clamp(steps, static_cast<float>(-below), static_cast<float>(below - 1));
    const float shifted = bounded + (round_to_integer + static_cast<float>(below));
    codes[d] = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(shifted));
  }
}

inline constexpr channel_kernels kernels_for_channels = {
    multiply,          shift,   add_to, fold, unfold, couple, means, ranges, squares_of_channels,
    squares_of_tokens, to_codes};

}  // namespace kvcache::inline v0::kernel::portable
