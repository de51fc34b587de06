// SPDX-License-Identifier: MIT
// Float operands of avx512_int8.inl as bytes, one (Parts == 1) or two for each number, and a scale for each row; included
// by avx512.hpp.
//
//   query    signed, q or 128 * high + low
//   weight   unsigned, w or 256 * high + low

/// Whole numbers that the largest of a row becomes, and the bits below its high part.
template <int Parts>
struct byte_split {
  static constexpr float largest_query = Parts == 1 ? 127 : 127 * 128;
  static constexpr float largest_weight = Parts == 1 ? 255 : 255 * 256;
  static constexpr unsigned query_shift = Parts == 1 ? 0 : 7;
  static constexpr unsigned weight_shift = Parts == 1 ? 0 : 8;
};

/// |x| as words, which order as the numbers do, infinity and NaN last.
KVCACHE_INLINE __m512i magnitude_bits(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
KVCACHE_INLINE __m512i larger_words(__m512i a, __m512i b) { return _mm512_maskz_max_epu32(all, a, b); }

/// Words of a and b by turns, each what two words of theirs come to.
KVCACHE_INLINE __m512i fold_largest(__m512i a, __m512i b) {
  return larger_words(_mm512_maskz_unpacklo_epi32(all, a, b), _mm512_maskz_unpackhi_epi32(all, a, b));
}
KVCACHE_INLINE __m512i fold_sums(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_maskz_unpacklo_epi32(all, a, b), _mm512_maskz_unpackhi_epi32(all, a, b));
}

/// Word r: the largest word of row r.
KVCACHE_INLINE __m128i largest_of_four(const __m512i (&row)[4]) {
  const __m512i a = fold_largest(row[0], row[1]);
  const __m512i b = fold_largest(row[2], row[3]);
  const __m512i four = larger_words(_mm512_maskz_unpacklo_epi64(__mmask8{0xff}, a, b),
                                    _mm512_maskz_unpackhi_epi64(__mmask8{0xff}, a, b));
  const __m256i two = _mm256_max_epu32(lower(four), upper(four));
  return _mm_max_epu32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
}

/// Word r: the sum of row r.
KVCACHE_INLINE __m128i sum_of_four(const __m512i (&row)[4]) {
  const __m512i a = fold_sums(row[0], row[1]);
  const __m512i b = fold_sums(row[2], row[3]);
  const __m512i four = _mm512_add_epi32(_mm512_maskz_unpacklo_epi64(__mmask8{0xff}, a, b),
                                        _mm512_maskz_unpackhi_epi64(__mmask8{0xff}, a, b));
  const __m256i two = _mm256_add_epi32(lower(four), upper(four));
  return _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
}

/// The same of floats.
KVCACHE_INLINE __m512 fold_sums(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_maskz_unpacklo_ps(all, a, b), _mm512_maskz_unpackhi_ps(all, a, b));
}
KVCACHE_INLINE __m128 sum_of_four(const __m512 (&row)[4]) {
  const __m512d a = _mm512_castps_pd(fold_sums(row[0], row[1]));
  const __m512d b = _mm512_castps_pd(fold_sums(row[2], row[3]));
  const vec four{_mm512_add_ps(_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(__mmask8{0xff}, a, b)),
                               _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(__mmask8{0xff}, a, b)))};
  const __m256 two = _mm256_add_ps(lower(four), upper(four));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

/// Of up to four rows: number = scale * whole, whole = number * inverse. Tiny rows are taken as relative to 2^-110, so
/// that both are normal numbers; a row that is not finite gets a scale that is NaN.
struct byte_scales {
  alignas(16) float scale[4];
  alignas(16) float inverse[4];
};

/// \param most  largest magnitudes of each row, as words
KVCACHE_INLINE void scale_to(float largest_integer, const __m512i (&most)[4], byte_scales& out) {
  const __m128i words = largest_of_four(most);
  const __m128 size = _mm_max_ps(_mm_castsi128_ps(words), _mm_set1_ps(0x1p-110F));  // 2^-110 for NaN
  const __m128i infinity = _mm_set1_epi32(0x7f800000);
  const __m128i not_finite = _mm_cmpeq_epi32(_mm_max_epu32(words, infinity), words);  // all ones are NaN
  const __m128 scale = _mm_mul_ps(size, _mm_set1_ps(1.0F / largest_integer));
  _mm_store_ps(out.scale, _mm_or_ps(scale, _mm_castsi128_ps(not_finite)));
  _mm_store_ps(out.inverse, _mm_div_ps(_mm_set1_ps(largest_integer), size));
}

KVCACHE_INLINE __m512i to_whole(__m512 x, __m512 inverse) {
  return _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(x, inverse));
}
KVCACHE_INLINE vec to_floats(__m512i words) { return {_mm512_maskz_cvtepi32_ps(all, words)}; }
KVCACHE_INLINE __m512i four_bytes(const std::int8_t* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

/// 64 words in 16 bits, saturated, in the order that packing once more and in_order() put right.
KVCACHE_INLINE __m512i in_order(__m512i packed) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_maskz_permutexvar_epi32(all, order, packed);
}
KVCACHE_INLINE __m512i signed_bytes(const __m512i (&w)[4]) {
  return in_order(_mm512_packs_epi16(_mm512_packs_epi32(w[0], w[1]), _mm512_packs_epi32(w[2], w[3])));
}
KVCACHE_INLINE __m512i unsigned_bytes(const __m512i (&w)[4]) {
  return in_order(_mm512_packus_epi16(_mm512_packs_epi32(w[0], w[1]), _mm512_packs_epi32(w[2], w[3])));
}

// ---- queries --------------------------------------------------------------------------------------------------------

/// A prepared row: this, and from byte 64 on its parts, high first, each round_up(head_dim, 16) bytes.
struct prepared_head {
  float scale;
  std::int32_t starts[2];  // of the accumulators of the parts: -128 * their sum
  float constant;          // added to every score
};

inline constexpr index_t prepared_head_floats = 16;

constexpr index_t round_up_16(index_t n) { return (n + 15) / 16 * 16; }
constexpr index_t round_up_64(index_t n) { return (n + 63) / 64 * 64; }

/// The first `count` of 16 lanes, all if there are more.
constexpr __mmask16 first_lanes(index_t count) {
  return static_cast<__mmask16>((1U << std::clamp(count, index_t{0}, key_lanes)) - 1U);
}

/// Part `Part` of 64 dims.
template <int Parts, int Part>
KVCACHE_INLINE __m512i query_part(const __m512i (&whole)[4]) {
  if constexpr (Parts == 1) {
    return signed_bytes(whole);
  } else {
    __m512i part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i high = _mm512_maskz_srai_epi32(all, _mm512_add_epi32(whole[i], _mm512_set1_epi32(64)), 7);
      part[i] = Part == 0 ? high : _mm512_sub_epi32(whole[i], _mm512_maskz_slli_epi32(all, high, 7));
    }
    return signed_bytes(part);
  }
}

/// Floats [0, 64) of a row, zeros from `count` on.
KVCACHE_INLINE void load_64(const float* p, index_t count, __m512 (&x)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = _mm512_maskz_loadu_ps(first_lanes(count - 16 * i), p + 16 * i);
}
KVCACHE_INLINE void load_64(const float* p, __m512 (&x)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_ps(p + 16 * i);
}

KVCACHE_INLINE __m512i larger_magnitudes(__m512i most, const __m512 (&x)[4]) {
  const __m512i a = larger_words(magnitude_bits(x[0]), magnitude_bits(x[1]));
  const __m512i b = larger_words(magnitude_bits(x[2]), magnitude_bits(x[3]));
  return larger_words(most, larger_words(a, b));
}

/// Stores up to 64 dims of one part, in whole 16s, and adds them to `sum`.
KVCACHE_INLINE void store_query(std::int8_t* to, __m512i bytes, index_t count, __m512i& sum) {
  sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes);
  if (count > 48) {
    _mm512_storeu_si512(to, bytes);
  } else {
    const auto words = static_cast<unsigned>(ceil_div(count, key_lanes) * 4);
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1U << words) - 1U), bytes);
  }
}

/// The largest magnitudes of a row, as words.
KVCACHE_INLINE __m512i largest_magnitudes(const float* row, index_t count) {
  __m512 x[4];
  __m512i most = _mm512_setzero_si512();
  index_t i = 0;
  for (; i + 64 <= count; i += 64) {
    load_64(row + i, x);
    most = larger_magnitudes(most, x);
  }
  if (i < count) {
    load_64(row + i, count - i, x);
    most = larger_magnitudes(most, x);
  }
  return most;
}

/// Stores the parts of up to 64 dims, `part_bytes` apart.
template <int Parts>
KVCACHE_INLINE void store_parts(const __m512 (&x)[4], float inverse, index_t count, std::int8_t* to,
                                index_t part_bytes, __m512i (&sum)[Parts]) {
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512i whole[4] = {to_whole(x[0], scale), to_whole(x[1], scale), to_whole(x[2], scale),
                            to_whole(x[3], scale)};
  store_query(to, query_part<Parts, 0>(whole), count, sum[0]);
  if constexpr (Parts == 2) store_query(to + part_bytes, query_part<Parts, 1>(whole), count, sum[1]);
}

/// Up to four queries, one after the other in every step: their chains of instructions overlap.
template <int Parts, int Rows>
KVCACHE_TARGET inline void prepare_rows(index_t head_dim, const float* queries, float* prepared) {
  const index_t row_floats = 16 + round_up_16(head_dim);
  __m512i most[4] = {};
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) most[r] = largest_magnitudes(queries + r * head_dim, head_dim);
  byte_scales s;
  scale_to(byte_split<Parts>::largest_query, most, s);

  __m512i sums[Parts][4] = {};
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const float* query = queries + r * head_dim;
    auto* to = reinterpret_cast<std::int8_t*>(prepared + r * row_floats + prepared_head_floats);
    __m512i sum[Parts] = {};
    __m512 x[4];
    index_t d = 0;
    for (; d + 64 <= head_dim; d += 64) {
      load_64(query + d, x);
      store_parts<Parts>(x, s.inverse[r], 64, to + d, round_up_16(head_dim), sum);
    }
    if (d < head_dim) {
      load_64(query + d, head_dim - d, x);
      store_parts<Parts>(x, s.inverse[r], head_dim - d, to + d, round_up_16(head_dim), sum);
    }
#pragma GCC unroll 2
    for (int p = 0; p < Parts; ++p) sums[p][r] = sum[p];
  }

  alignas(16) std::int32_t starts[2][4] = {};
#pragma GCC unroll 2
  for (int p = 0; p < Parts; ++p)
    _mm_store_si128(reinterpret_cast<__m128i*>(starts[p]), sum_of_four(sums[p]));
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const prepared_head head{s.scale[r], {-128 * starts[0][r], -128 * starts[1][r]}, 0.0F};
    std::memcpy(prepared + r * row_floats, &head, sizeof(head));
  }
}

template <int Parts>
KVCACHE_TARGET inline void prepare_vnni(index_t head_dim, const float* queries, index_t num_rows,
                                        float* prepared) {
  const index_t row_floats = prepared_query_floats(head_dim);
  index_t r = 0;
  for (; r + 4 <= num_rows; r += 4)
    prepare_rows<Parts, 4>(head_dim, queries + r * head_dim, prepared + r * row_floats);
  for (; r < num_rows; ++r)
    prepare_rows<Parts, 1>(head_dim, queries + r * head_dim, prepared + r * row_floats);
}

// ---- weights --------------------------------------------------------------------------------------------------------

/// Weights of `Rows` rows as bytes.
template <int Parts, int Rows>
struct weight_bytes {
  alignas(64) std::int8_t bytes[Rows][Parts][sum_tokens];
  float scales[Rows];
};

/// 64 whole weights as bytes, high part first.
template <int Parts>
KVCACHE_INLINE void store_weights(const __m512i (&whole)[4], std::int8_t (&to)[Parts][sum_tokens]) {
  if constexpr (Parts == 1) {
    _mm512_store_si512(to[0], unsigned_bytes(whole));
  } else {
    __m512i high[4];
    __m512i low[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      high[i] = _mm512_maskz_srli_epi32(all, whole[i], 8);
      low[i] = _mm512_and_si512(whole[i], _mm512_set1_epi32(255));
    }
    _mm512_store_si512(to[0], unsigned_bytes(high));
    _mm512_store_si512(to[1], unsigned_bytes(low));
  }
}

/// Up to 64 weights of rows First .. First + Rows - 1 times the scales of their tokens.
template <int First, int Rows, int Parts, int All>
KVCACHE_INLINE void split_rows(const float* weights, index_t stride, const bfloat16* scales, index_t count,
                               weight_bytes<Parts, All>& out) {
  weights += First * stride;
  __m512 w[Rows][4];
  __m512i most[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __mmask16 theirs = i * key_lanes < count ? all : __mmask16{0};
    const __m256i halves = _mm256_maskz_loadu_epi16(theirs, scales + i * key_lanes);
    const __m512 scale = widen_low(bits{_mm512_maskz_cvtepu16_epi32(all, halves)}).x;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512 x = _mm512_maskz_loadu_ps(theirs, weights + r * stride + i * key_lanes);
      const __mmask16 visible = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      w[r][i] = _mm512_maskz_mul_ps(visible, x, scale);
      most[r] = larger_words(most[r], _mm512_castps_si512(w[r][i]));
    }
  }
  byte_scales s;
  scale_to(byte_split<Parts>::largest_weight, most, s);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(s.inverse[r]);
    const __m512i whole[4] = {to_whole(w[r][0], inverse), to_whole(w[r][1], inverse),
                              to_whole(w[r][2], inverse), to_whole(w[r][3], inverse)};
    out.scales[First + r] = s.scale[r];
    store_weights<Parts>(whole, out.bytes[First + r]);
  }
}

/// Weights and scales may be anything beyond `count`.
template <int Parts, int Rows>
KVCACHE_TARGET inline void split_weights(const float* weights, index_t stride, const bfloat16* scales,
                                         index_t count, weight_bytes<Parts, Rows>& out) {
  split_rows<0, std::min(Rows, 4)>(weights, stride, scales, count, out);
  if constexpr (Rows > 4) split_rows<4, Rows - 4>(weights, stride, scales, count, out);
}
