// SPDX-License-Identifier: MIT
// Rows times factors of their dims, in plain C++.
#pragma once

#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

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

inline constexpr channel_kernels kernels_for_channels = {multiply, shift, add_to, fold, unfold, couple};

}  // namespace kvcache::inline v0::kernel::portable
