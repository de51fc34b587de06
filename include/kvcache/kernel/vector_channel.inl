// SPDX-License-Identifier: MIT
// Rows times factors of their dims, written once over the primitives that vector_kernels.inl lists, and included by it.

/// 16 bfloat16 as floats.
KVCACHE_INLINE vec load_widened(const bfloat16* p) { return widen_low(load_low_halves(p)); }

KVCACHE_TARGET inline void multiply(const float* row, const float* factors, float factor, index_t count,
                                    float* out) {
  index_t d = 0;
  for (; d + key_lanes <= count; d += key_lanes)
    store(out + d, mul(mul(load(row + d), load(factors + d)), broadcast(factor)));
  portable::multiply(row + d, factors + d, factor, count - d, out + d);
}

KVCACHE_TARGET inline void shift(float* scores, index_t count, float constant) {
  index_t t = 0;
  for (; t + key_lanes <= count; t += key_lanes) store(scores + t, add(load(scores + t), broadcast(constant)));
  portable::shift(scores + t, count - t, constant);
}

KVCACHE_TARGET inline float fold(const float* query, index_t head_dim, const bfloat16* scales,
                                 const bfloat16* offsets, float* folded) {
  vec dot = zero();
  index_t d = 0;
  for (; d + key_lanes <= head_dim; d += key_lanes) {
    const vec q = load(query + d);
    store(folded + d, mul(q, load_widened(scales + d)));
    dot = fma(q, load_widened(offsets + d), dot);
  }
  return sum_of(dot) + portable::fold(query + d, head_dim - d, scales + d, offsets + d, folded + d);
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

inline constexpr channel_kernels kernels_for_channels = {multiply, shift, fold, unfold};
