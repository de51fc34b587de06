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

KVCACHE_TARGET inline void means(const_rows rows, index_t num_rows, index_t count, float* means) {
  const divider share(static_cast<float>(num_rows));
  index_t d = 0;
  for (; d + key_lanes <= count; d += key_lanes) {
    vec sum = zero();
    for (index_t t = 0; t < num_rows; ++t) {
      const vec x = load(rows.row(t) + d);
      const bool tiny = reaches(broadcast(0x1p-100F), magnitude(x)) != 0;
      sum = add(sum, tiny ? div(x, broadcast(static_cast<float>(num_rows))) : share(x));
    }
    store(means + d, sum);
  }
  portable::means({rows.data + d, rows.stride}, num_rows, count - d, means + d);
}

KVCACHE_TARGET inline void ranges(const_rows rows, index_t num_rows, index_t count, float* least,
                                  float* largest) {
  index_t d = 0;
  for (; d + key_lanes <= count; d += key_lanes) {
    vec low = load(rows.row(0) + d);
    vec high = low;
    for (index_t t = 1; t < num_rows; ++t) {
      const vec x = load(rows.row(t) + d);
      low = smaller(low, x);
      high = larger(high, x);
    }
    store(least + d, low);
    store(largest + d, high);
  }
  portable::ranges({rows.data + d, rows.stride}, num_rows, count - d, least + d, largest + d);
}

/// (row - means) * factor
KVCACHE_INLINE vec deviation(const float* row, const float* means, float factor) {
  return mul(sub(load(row), load(means)), broadcast(factor));
}

KVCACHE_TARGET inline void squares_of_channels(const_rows rows, index_t num_rows, index_t count,
                                               const float* means, float factor, const float* weights,
                                               float* squares) {
  index_t d = 0;
  for (; d + key_lanes <= count; d += key_lanes) {
    vec sum = zero();
    for (index_t t = 0; t < num_rows; ++t) {
      const vec x = deviation(rows.row(t) + d, means + d, factor);
      sum = add(sum, rounded(mul(mul(broadcast(weights[t]), x), x)));
    }
    store(squares + d, sum);
  }
  portable::squares_of_channels({rows.data + d, rows.stride}, num_rows, count - d, means + d, factor, weights,
                                squares + d);
}

KVCACHE_TARGET inline void squares_of_tokens(const_rows rows, index_t num_rows, index_t count,
                                             const float* means, float factor, const float* weights,
                                             float* sums) {
  for (index_t t = 0; t < num_rows; ++t) {
    const float* row = rows.row(t);
    vec sum = zero();
    index_t d = 0;
    for (; d + key_lanes <= count; d += key_lanes) {
      const vec x = deviation(row + d, means + d, factor);
      sum = add(sum, rounded(mul(mul(x, x), load(weights + d))));
    }
    std::array<float, key_lanes> parts;
    store(parts.data(), sum);
    sums[t] = portable::rest_of_squares(parts, row, d, count, means, factor, weights);
  }
}

KVCACHE_TARGET inline void to_codes(const float* row, const float* middles, const float* inverse_steps,
                                    int below, index_t count, std::uint8_t* codes) {
  const auto least = static_cast<float>(-below);
  const auto largest = static_cast<float>(below - 1);
  index_t d = 0;
  for (; d + key_lanes <= count; d += key_lanes) {
    const vec steps = mul(sub(load(row + d), load(middles + d)), load(inverse_steps + d));
    const vec bounded = smaller(larger(steps, broadcast(least)), broadcast(largest));
    store_low_bytes(codes + d, as_bits(add(bounded, broadcast(0x1.8p23F + static_cast<float>(below)))));
  }
  portable::to_codes(row + d, middles + d, inverse_steps + d, below, count - d, codes + d);
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

inline constexpr channel_kernels kernels_for_channels = {
    multiply,          shift,   add_to, fold, unfold, couple, means, ranges, squares_of_channels,
    squares_of_tokens, to_codes};
