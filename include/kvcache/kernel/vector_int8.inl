// SPDX-License-Identifier: MIT
// Blocks of bytes with a scale per token, written once over the primitives that vector_kernels.inl lists, and included by
// it: bytes are widened to floats. What multiplies bytes as they are (avx512_int8.inl) takes encoding from here only.

/// The word of a row's largest magnitude, in every lane: they are in the order of their words, infinity and NaN last.
KVCACHE_INLINE bits largest_magnitude(const float* row, index_t count) {
  const bits no_sign = fill(0x7fffffff);
  bits most[2] = {fill(0), fill(0)};
  index_t i = 0;
  for (; i + 2 * key_lanes <= count; i += 2 * key_lanes) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      most[j] = larger_words(most[j], and_bits(load_bits(row + i + j * key_lanes), no_sign));
  }
  for (; i < count; i += key_lanes)
    most[0] = larger_words(most[0], and_bits(as_bits(load_first(row + i, count - i)), no_sign));
  return largest_everywhere(larger_words(most[0], most[1]));
}

KVCACHE_TARGET inline float largest(const float* row, index_t count) {
  constexpr std::uint32_t infinity = 0x7f800000;
  const std::uint32_t word = first_word(largest_magnitude(row, count));
  return word < infinity ? std::bit_cast<float>(word) : std::numeric_limits<float>::quiet_NaN();
}

KVCACHE_TARGET inline void put_key(const float* row, index_t count, float scale, std::int8_t* words) {
  const divider steps(scale);
  std::array<std::int8_t, max_head_dim + 4> bytes;
  index_t d = 0;
  for (; scale != 0.0F && d + key_lanes <= count; d += key_lanes)
    store_bytes(&bytes[static_cast<std::size_t>(d)], steps(load(row + d)));
  for (; d < count; ++d) bytes[static_cast<std::size_t>(d)] = portable::to_byte(row[d], scale);
  std::memset(&bytes[static_cast<std::size_t>(d)], 0, 4);
  portable::put_key_words(bytes.data(), count, words);
}

KVCACHE_TARGET inline void put_value(const float* row, index_t count, float scale, index_t slot,
                                     std::int8_t* quads) {
  const divider steps(scale);
  index_t d = 0;
  for (; scale != 0.0F && d + key_lanes <= count; d += key_lanes, quads += 4 * key_lanes)
    store_bits(quads, with_byte(load_bits(quads), slot, steps(load(row + d))));
  for (; d < count; ++d, quads += 4) quads[slot] = portable::to_byte(row[d], scale);
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
