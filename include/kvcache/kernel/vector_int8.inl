// SPDX-License-Identifier: MIT
// Blocks of bytes with a scale per token, written once over the primitives that vector_kernels.inl lists, and included by
// it: bytes are widened to floats. What multiplies bytes as they are (avx512_int8.inl) takes encoding from here only.

KVCACHE_TARGET inline float largest(const float* row, index_t count) {
  const bits no_sign = fill(0x7fffffff);  // magnitudes are in the order of their words, NaN last
  bits most[2] = {fill(0), fill(0)};
  index_t i = 0;
  for (; i + 2 * key_lanes <= count; i += 2 * key_lanes) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      most[j] = larger_words(most[j], and_bits(load_bits(row + i + j * key_lanes), no_sign));
  }
  if (i + key_lanes <= count) {
    most[0] = larger_words(most[0], and_bits(load_bits(row + i), no_sign));
    i += key_lanes;
  }
  const vec size = as_floats(larger_words(most[0], most[1]));
  const float rest = i < count ? portable::largest(row + i, count - i) : 0.0F;
  return all_finite(size) ? std::max(largest_of(size), rest) + (rest - rest)
                          : std::numeric_limits<float>::quiet_NaN();
}

/// x / divisor, correctly rounded, where the divisor is between 2^-60 and 2^60 and the quotient between 2^-24 and 2^24, so that
/// remainders are normal numbers: two corrections of x * inverse, of which the first brings it within a unit in the last place
/// (Markstein, IBM J. Res. Dev. 34, 1990). Vectors are divided far more slowly than they are multiplied.
KVCACHE_INLINE vec quotient(vec x, vec minus_divisor, vec inverse) {
  vec q = mul(x, inverse);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) q = fma(fma(q, minus_divisor, x), inverse, q);
  return q;
}

KVCACHE_TARGET inline void quantize(const float* row, index_t count, float scale, std::int8_t* out) {
  const vec round_to_integer = broadcast(0x1.8p23F);
  const bool near_one = 0x1p-60F < scale && scale < 0x1p60F;
  const vec inverse = broadcast(near_one ? 1.0F / scale : 0.0F);
  index_t i = 0;
  for (; scale != 0.0F && i + key_lanes <= count; i += key_lanes) {
    const vec x = load(row + i);
    const vec q = near_one ? quotient(x, broadcast(-scale), inverse) : div(x, broadcast(scale));
    store_bytes(out + i, sub(add(q, round_to_integer), round_to_integer));
  }
  portable::quantize(row + i, count - i, scale, out + i);
}

KVCACHE_TARGET inline void scores_int8(const block_geometry& g, const std::byte* keys, const bfloat16* scales,
                                       index_t count, const float* prepared, index_t num_rows, float* out,
                                       const upcoming& next) {
  const const_rows queries{prepared, prepared_query_floats(g.head_dim)};
  score_blocks<std::int8_t>(g, keys, count, queries, num_rows, out, next);
  for (index_t t = 0; t < count; t += key_lanes) {
    const vec scale = widen_low(load_low_halves(scales + t));
    for (index_t r = 0; r < num_rows; ++r)
      store(out + r * g.block_size + t, mul(load(out + r * g.block_size + t), scale));
  }
}

/// 16 weights times the scales of their tokens. A hidden token's scale may be anything.
KVCACHE_INLINE vec scaled_weights(const float* weights, const bfloat16* scales) {
  const vec w = load(weights);
  return zero_where_zero(w, mul(w, widen_low(load_low_halves(scales))));
}

KVCACHE_TARGET inline void accumulate_int8(const block_geometry& g, const std::byte* values,
                                           const bfloat16* scales, index_t count, const float* weights,
                                           index_t num_rows, float* sums, const upcoming& next) {
  alignas(64) std::array<float, portable::scaled_rows * max_block_size> scaled;
  for (index_t first = 0; first < num_rows; first += portable::scaled_rows) {
    const index_t rows = std::min(portable::scaled_rows, num_rows - first);
    for (index_t r = 0; r < rows; ++r) {
      for (index_t t = 0; t < count; t += key_lanes)
        store(&scaled[static_cast<std::size_t>(r * g.block_size + t)],
              scaled_weights(weights + (first + r) * g.block_size + t, scales + t));
    }
    accumulate<std::int8_t>(g, values, count, scaled.data(), rows, sums + first * g.head_dim, next);
  }
}
