// SPDX-License-Identifier: MIT
// Scales and offsets of channels, written once over the primitives that vector_kernels.inl lists, and included by it.

/// 16 bfloat16 as floats.
KVCACHE_INLINE vec load_widened(const bfloat16* p) { return widen_low(load_low_halves(p)); }

KVCACHE_TARGET inline float fold(const float* query, index_t head_dim, const bfloat16* scales,
                                 const bfloat16* offsets, float* folded) {
  vec dot = zero();
  for (index_t d = 0; d < head_dim; d += key_lanes) {
    const vec q = load_first(query + d, head_dim - d);
    store(folded + d, zero_where_zero(q, mul(q, load_widened(scales + d))));
    dot = add(dot, zero_where_zero(q, mul(q, load_widened(offsets + d))));
  }
  return sum_of(dot);
}

KVCACHE_TARGET inline void unfold(const float* part, index_t head_dim, const bfloat16* scales,
                                  const bfloat16* offsets, float offset_weight, float* sums) {
  index_t d = 0;
  for (; d + key_lanes <= head_dim; d += key_lanes) {
    const vec offset = fma(broadcast(offset_weight), load_widened(offsets + d), load(sums + d));
    store(sums + d, fma(load(part + d), load_widened(scales + d), offset));
  }
  portable::unfold(part + d, head_dim - d, scales + d, offsets + d, offset_weight, sums + d);
}

inline constexpr channel_kernels kernels_for_channels = {fold, unfold};
