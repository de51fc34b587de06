// SPDX-License-Identifier: MIT
// The online softmax and soft caps, written once over the primitives that vector_kernels.inl lists, and included by it.

/// As portable::exp_below_slack, with the same polynomial and bound.
KVCACHE_INLINE vec exp_below_slack(vec x) {
  const vec round_to_integer = broadcast(0x1.8p23F);
  const vec shifted = fma(x, broadcast(1.44269504F), round_to_integer);
  const vec n = sub(shifted, round_to_integer);
  const vec r = fma(n, broadcast(-0x1.7f7d1cp-20F), fma(n, broadcast(-0x1.62e4p-1F), x));
  vec p = fma(r, broadcast(portable::exp_terms[4]), broadcast(portable::exp_terms[3]));
  p = fma(p, r, broadcast(portable::exp_terms[2]));
  p = fma(p, r, broadcast(portable::exp_terms[1]));
  p = fma(p, r, broadcast(portable::exp_terms[0]));
  p = fma(p, r, broadcast(1.0F));
  p = fma(p, r, broadcast(1.0F));
  return times_power(p, n, shifted, x);
}

/// What is taken off the scores of `Rows` rows before they are weighed. Maxima seldom rise; that none does is one branch, and
/// nothing waits for it.
template <int Rows>
KVCACHE_INLINE void softmax_shifts(const float* scores, index_t stride, index_t count, softmax_row* rows,
                                   float* rescales, vec (&shift)[Rows]) {
  vec largest[Rows];
#pragma GCC unroll 4
  for (vec& l : largest) l = broadcast(-std::numeric_limits<float>::infinity());
  for (index_t t = 0; t < count; t += key_lanes) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) largest[r] = larger(largest[r], load(scores + r * stride + t));
  }
  std::uint32_t rises = 0;
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    rises |= reaches(largest[r], broadcast(rows[r].max + softmax_slack));  // always where max is -infinity
    rescales[r] = 1.0F;
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    if (rises != 0) [[unlikely]]
      rescales[r] = portable::raise_max(rows[r], largest_of(largest[r]));
    shift[r] = broadcast(portable::softmax_shift(rows[r]));
  }
}

/// `Rows` rows side by side: what one row waits for, the others fill.
template <int Rows>
KVCACHE_TARGET inline void softmax_of_rows(float* scores, index_t stride, index_t count, softmax_row* rows,
                                           float* rescales) {
  vec shift[Rows];
  softmax_shifts<Rows>(scores, stride, count, rows, rescales, shift);
  vec sum[Rows];
#pragma GCC unroll 4
  for (vec& s : sum) s = zero();
  for (index_t t = 0; t < count; t += key_lanes) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      float* at = scores + r * stride + t;
      const vec weights = exp_below_slack(sub(load(at), shift[r]));
      store(at, weights);
      sum[r] = add(sum[r], weights);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) rows[r].sum += sum_of(sum[r]);
}

KVCACHE_TARGET inline void softmax(float* scores, index_t stride, index_t count, index_t num_rows,
                                   softmax_row* rows, float* rescales) {
  index_t r = 0;
  for (; r + 4 <= num_rows; r += 4)
    softmax_of_rows<4>(scores + r * stride, stride, count, rows + r, rescales + r);
  for (; r < num_rows; ++r) softmax_of_rows<1>(scores + r * stride, stride, count, rows + r, rescales + r);
}

/// As portable::tanh, times `cap`.
KVCACHE_TARGET inline void soft_cap(float* scores, index_t count, float cap) {
  for (index_t t = 0; t < count; t += key_lanes) {
    const vec x = div(load(scores + t), broadcast(cap));
    const vec size = magnitude(x);
    const vec x2 = mul(x, x);
    vec p = fma(x2, broadcast(-1382.0F / 155925.0F), broadcast(62.0F / 2835.0F));
    p = fma(p, x2, broadcast(-17.0F / 315.0F));
    p = fma(p, x2, broadcast(2.0F / 15.0F));
    p = fma(p, x2, broadcast(-1.0F / 3.0F));
    const vec near_zero = fma(mul(size, x2), p, size);
    const vec e = exp_below_slack(mul(broadcast(-2.0F), size));
    const vec far = div(sub(broadcast(1.0F), e), add(broadcast(1.0F), e));
    store(scores + t, mul(broadcast(cap), with_sign(x, either_below(size, 0.35F, near_zero, far))));
  }
}
