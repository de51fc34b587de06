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

/// number = scale * whole, whole = number * inverse. Tiny rows are taken as relative to
/// 2^-110, so that both are normal numbers; a row that is not finite gets a scale that is NaN.
struct byte_scale {
  float scale;
  float inverse;
};

/// \param size_bits  of the largest magnitude of a row, as an integer
inline byte_scale scale_to(float largest_integer, std::uint32_t size_bits) {
  if (size_bits >= 0x7f800000U) return {std::numeric_limits<float>::quiet_NaN(), 0.0F};
  const float size = std::max(std::bit_cast<float>(size_bits), 0x1p-110F);
  return {size * (1.0F / largest_integer), largest_integer / size};
}

/// |x| as words, which order as the numbers do, infinity and NaN last.
KVCACHE_INLINE __m512i magnitude_bits(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
KVCACHE_INLINE __m512i larger_words(__m512i a, __m512i b) { return _mm512_maskz_max_epu32(all, a, b); }
KVCACHE_INLINE std::uint32_t largest_word(__m512i a) {
  const __m256i eight = _mm256_max_epu32(lower(a), upper(a));
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0b01'00'11'10));
  return static_cast<std::uint32_t>(
      _mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0b10'11'00'01))));
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
};

inline constexpr index_t prepared_head_floats = 16;

constexpr index_t round_up_16(index_t n) { return (n + 15) / 16 * 16; }

/// high << shift | low, or the only part.
template <int Parts>
KVCACHE_INLINE __m512i joined(__m512i high, __m512i low, unsigned shift) {
  if constexpr (Parts == 1) {
    return high;
  } else {
    return _mm512_add_epi32(_mm512_maskz_slli_epi32(all, high, shift), low);
  }
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
  for (int i = 0; i < 4; ++i) {
    const index_t rest = std::clamp(count - 16 * i, index_t{0}, key_lanes);
    x[i] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << rest) - 1U), p + 16 * i);
  }
}
KVCACHE_INLINE void load_64(const float* p, __m512 (&x)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_ps(p + 16 * i);
}

KVCACHE_INLINE __m512i larger_words(__m512i most, const __m512 (&x)[4]) {
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

/// One query. \param to  [prepared_query_floats(head_dim)]
template <int Parts>
KVCACHE_TARGET inline void prepare_query(index_t head_dim, const float* query, float* to) {
  const index_t last = head_dim / 64 * 64;
  __m512 x[4];
  __m512i most = _mm512_setzero_si512();
  for (index_t d = 0; d < last; d += 64) {
    load_64(query + d, x);
    most = larger_words(most, x);
  }
  if (last < head_dim) {
    load_64(query + last, head_dim - last, x);
    most = larger_words(most, x);
  }
  const byte_scale s = scale_to(byte_split<Parts>::largest_query, largest_word(most));
  const __m512 inverse = _mm512_set1_ps(s.inverse);

  auto* bytes = reinterpret_cast<std::int8_t*>(to + prepared_head_floats);
  const index_t part_bytes = round_up_16(head_dim);
  __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (index_t d = 0; d < head_dim; d += 64) {
    const index_t count = head_dim - d;
    if (count >= 64) load_64(query + d, x);
    if (count < 64) load_64(query + d, count, x);
    const __m512i whole[4] = {to_whole(x[0], inverse), to_whole(x[1], inverse), to_whole(x[2], inverse),
                              to_whole(x[3], inverse)};
    store_query(bytes + d, query_part<Parts, 0>(whole), count, sum[0]);
    if constexpr (Parts == 2) store_query(bytes + part_bytes + d, query_part<Parts, 1>(whole), count, sum[1]);
  }
  prepared_head head{s.scale, {-128 * sum_of_words(sum[0]), 0}};
  if constexpr (Parts == 2) head.starts[1] = -128 * sum_of_words(sum[1]);
  std::memcpy(to, &head, sizeof(head));
}

template <int Parts>
KVCACHE_TARGET inline void prepare_vnni(index_t head_dim, const float* queries, index_t num_rows,
                                        float* prepared) {
  for (index_t r = 0; r < num_rows; ++r)
    prepare_query<Parts>(head_dim, queries + r * head_dim, prepared + r * prepared_query_floats(head_dim));
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

/// Up to 64 weights of each row times the scales of their tokens.
template <int Parts, int Rows>
KVCACHE_INLINE void split_weights(const float* weights, index_t stride, const bfloat16* scales, index_t count,
                                  weight_bytes<Parts, Rows>& out) {
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    __m512 w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w[i] = i * key_lanes < count
                 ? scaled_weights(weights + r * stride + i * key_lanes, scales + i * key_lanes).x
                 : _mm512_setzero_ps();
    }
    const byte_scale s =
        scale_to(byte_split<Parts>::largest_weight, largest_word(larger_words(_mm512_setzero_si512(), w)));
    const __m512 inverse = _mm512_set1_ps(s.inverse);
    const __m512i whole[4] = {to_whole(w[0], inverse), to_whole(w[1], inverse), to_whole(w[2], inverse),
                              to_whole(w[3], inverse)};
    out.scales[r] = s.scale;
    store_weights<Parts>(whole, out.bytes[r]);
  }
}
