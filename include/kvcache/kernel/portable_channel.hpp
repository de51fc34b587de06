// SPDX-License-Identifier: MIT
// Scales and offsets of channels in plain C++.
#pragma once

#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

namespace kvcache::inline v0::kernel::portable {

inline float fold(const float* query, index_t head_dim, const bfloat16* scales, const bfloat16* offsets,
                  float* folded) {
  float dot = 0.0F;
  for (index_t d = 0; d < head_dim; ++d) {
    folded[d] = query[d] * to_float(scales[d]);
    dot += query[d] * to_float(offsets[d]);
  }
  return dot;
}

inline void unfold(const float* part, index_t head_dim, const bfloat16* scales, const bfloat16* offsets,
                   float offset_weight, float* sums) {
  for (index_t d = 0; d < head_dim; ++d)
    sums[d] += part[d] * to_float(scales[d]) + offset_weight * to_float(offsets[d]);
}

inline constexpr channel_kernels kernels_for_channels = {fold, unfold};

}  // namespace kvcache::inline v0::kernel::portable
