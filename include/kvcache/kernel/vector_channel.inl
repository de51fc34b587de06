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
  for (; t + key_lanes <= count; t += key_lanes)
    store(scores + t, add(load(scores + t), broadcast(constant)));
  portable::shift(scores + t, count - t, constant);
}

KVCACHE_TARGET inline void add_to(const float* part, index_t count, float* sums) {
  index_t i = 0;
  for (; i + key_lanes <= count; i += key_lanes) store(sums + i, add(load(sums + i), load(part + i)));
  portable::add_to(part + i, count - i, sums + i);
}

/// `Rows` rows, for which scales and offsets are widened once.
template <int Rows>
KVCACHE_TARGET inline void fold_rows(const float* queries, index_t head_dim, const bfloat16* scales,
                                     const bfloat16* offsets, float* folded, float* dots) {
  vec dot[Rows];
#pragma GCC unroll 4
  for (vec& sum : dot) sum = zero();
  index_t d = 0;
  for (; d + key_lanes <= head_dim; d += key_lanes) {
    const vec scale = load_widened(scales + d);
    const vec offset = load_widened(offsets + d);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const vec q = load(queries + r * head_dim + d);
      store(folded + r * head_dim + d, mul(q, scale));
      dot[r] = fma(q, offset, dot[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    float rest = 0.0F;
    portable::fold(queries + r * head_dim + d, 1, head_dim - d, scales + d, offsets + d,
                   folded + r * head_dim + d, &rest);
    dots[r] = sum_of(dot[r]) + rest;
  }
}

KVCACHE_TARGET inline void fold(const float* queries, index_t num_rows, index_t head_dim,
                                const bfloat16* scales, const bfloat16* offsets, float* folded, float* dots) {
  index_t r = 0;
  for (; r + 4 <= num_rows; r += 4)
    fold_rows<4>(queries + r * head_dim, head_dim, scales, offsets, folded + r * head_dim, dots + r);
  for (; r < num_rows; ++r)
    fold_rows<1>(queries + r * head_dim, head_dim, scales, offsets, folded + r * head_dim, dots + r);
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

KVCACHE_TARGET inline void couple(const float* queries, index_t num_rows, index_t stride, index_t num_pairs,
                                  const bfloat16* means, float* out) {
  for (index_t r = 0; r < num_rows; ++r, queries += stride, out += 2 * num_pairs) {
    const float* a = queries;
    const float* b = queries + num_pairs;
    index_t i = 0;
    for (; i + key_lanes <= num_pairs; i += key_lanes) {
      const vec mean_a = load_widened(means + i);
      const vec mean_b = load_widened(means + num_pairs + i);
      store(out + i, fma(load(a + i), mean_a, mul(load(b + i), mean_b)));
      store(out + num_pairs + i, sub(mul(load(b + i), mean_a), mul(load(a + i), mean_b)));
    }
    portable::couple_pairs(a, b, i, num_pairs, means, out);
  }
}

inline constexpr channel_kernels kernels_for_channels = {multiply, shift, add_to, fold, unfold, couple};
