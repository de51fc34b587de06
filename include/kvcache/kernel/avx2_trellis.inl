// SPDX-License-Identifier: MIT
// Primitives of the codec trellis for AVX2; included by avx2.hpp. What they mean is said in vector_trellis.inl and
// vector_trellis_decode.inl.

KVCACHE_INLINE bits smaller_words(bits a, bits b) {
  return {_mm256_min_epi32(a.low, b.low), _mm256_min_epi32(a.high, b.high)};
}
KVCACHE_INLINE bits broadcast_word(std::int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
KVCACHE_INLINE bits masked_or(bits a, bits mask, bits b) { return or_bits(and_bits(a, mask), b); }
KVCACHE_INLINE void store_low_bytes(void* p, bits a) {
  const bits bytes = and_bits(a, broadcast_word(255));
  const __m256i halves = _mm256_packus_epi32(bytes.low, bytes.high);
  const __m256i in_order = _mm256_permute4x64_epi64(halves, 0b11'01'10'00);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1)));
}
KVCACHE_INLINE bits add_products(bits sum, bits a, bits b) {
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.low)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.high))};
}

template <int Run>
KVCACHE_INLINE bits spread(const std::int32_t* p) {
  if constexpr (Run == 16) {
    return broadcast_word(*p);
  } else if constexpr (Run == 8) {
    return {_mm256_set1_epi32(p[0]), _mm256_set1_epi32(p[1])};
  } else {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256 twice = _mm256_castsi256_ps(_mm256_broadcastsi128_si256(words));
    const __m256i low = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i high = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    return {_mm256_castps_si256(_mm256_permutevar_ps(twice, low)),
            _mm256_castps_si256(_mm256_permutevar_ps(twice, high))};
  }
}

KVCACHE_INLINE void store_words(void* p, bits a, index_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i n = _mm256_set1_epi32(static_cast<int>(count));
  _mm256_maskstore_epi32(static_cast<int*>(p), _mm256_cmpgt_epi32(n, lane), a.low);
  const __m256i upper = _mm256_add_epi32(lane, _mm256_set1_epi32(8));
  _mm256_maskstore_epi32(static_cast<int*>(p) + 8, _mm256_cmpgt_epi32(n, upper), a.high);
}

template <int N>
KVCACHE_INLINE bits shifted_left(bits a) {
  return {_mm256_slli_epi32(a.low, N), _mm256_slli_epi32(a.high, N)};
}
/// a << N | b >> (32 - N)
struct funnel {
  template <int N>
  KVCACHE_INLINE static bits shift(bits a, bits b) {
    return or_bits(shifted_left<N>(a), {_mm256_srli_epi32(b.low, 32 - N), _mm256_srli_epi32(b.high, 32 - N)});
  }
};
template <int N>
KVCACHE_INLINE __m256i words_before(__m256i a, __m256i b) {
  return _mm256_alignr_epi8(a, _mm256_permute2x128_si256(b, a, 0x21), 16 - 4 * N);
}
template <int N>
KVCACHE_INLINE bits words_before(bits a, bits b) {
  return {words_before<N>(a.low, b.high), words_before<N>(a.high, a.low)};
}

/// 8 tables of 16 bytes, of which three bits of an index select one, pair by pair, and a sign.
struct byte_table {
  const std::int8_t* entries;

  explicit byte_table(const std::int8_t* table) noexcept : entries(table) {}

  [[nodiscard]] KVCACHE_INLINE __m256i part(int i, __m256i low_bits) const {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * i));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(part), low_bits);
  }
  [[nodiscard]] KVCACHE_INLINE __m256i at(__m256i index) const {
    const __m256i low_bits = _mm256_and_si256(index, _mm256_set1_epi8(15));
    __m256i chosen[4];
    const __m256i bit = _mm256_slli_epi16(index, 3);  // to the top of its byte, which blends look at
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      chosen[i] = _mm256_blendv_epi8(part(2 * i, low_bits), part(2 * i + 1, low_bits), bit);
#pragma GCC unroll 2
    for (int width = 2, shift = 2; width > 0; width /= 2, --shift) {
      const __m256i next = _mm256_slli_epi16(index, shift);
#pragma GCC unroll 2
      for (int i = 0; i < width; ++i) chosen[i] = _mm256_blendv_epi8(chosen[2 * i], chosen[2 * i + 1], next);
    }
    return _mm256_sign_epi8(chosen[0], _mm256_or_si256(index, _mm256_set1_epi8(1)));  // not zero
  }
  [[nodiscard]] KVCACHE_INLINE bits at(bits index) const { return {at(index.low), at(index.high)}; }
};
