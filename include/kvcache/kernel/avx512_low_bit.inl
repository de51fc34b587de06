// SPDX-License-Identifier: MIT
// Primitives of AVX-512 for codes of less than 8 bits and for what is the same in every lane; included by avx512.hpp.

KVCACHE_INLINE bits load_codebook(const std::int8_t* p) {
  return {_mm512_maskz_broadcast_i32x4(all, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
KVCACHE_INLINE bits look_up(bits codebook, bits codes) { return {_mm512_shuffle_epi8(codebook.x, codes.x)}; }
KVCACHE_INLINE vec eight_twice(const std::int8_t* p) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm512_maskz_cvtepi32_ps(all, _mm512_maskz_cvtepi8_epi32(all, _mm_unpacklo_epi64(eight, eight)))};
}
KVCACHE_INLINE vec look_up(vec eight, vec place) {
  return {_mm512_maskz_permutexvar_ps(all, _mm512_castps_si512(place.x), eight.x)};
}
KVCACHE_INLINE vec count_if_above(vec place, vec x, vec limit, std::uint32_t n) {
  const __m512i words = _mm512_castps_si512(place.x);
  const __mmask16 above = _mm512_cmp_ps_mask(x.x, limit.x, _CMP_GT_OQ);
  return {_mm512_castsi512_ps(_mm512_mask_add_epi32(words, above, words, fill(n).x))};
}
KVCACHE_INLINE vec pick_above(vec x, vec limit, vec a, vec b) {
  return {_mm512_mask_mov_ps(b.x, _mm512_cmp_ps_mask(x.x, limit.x, _CMP_GT_OQ), a.x)};
}
KVCACHE_INLINE void store_places(void* p, vec places, vec sign, std::uint32_t flip) {
  const __m512i words = _mm512_castps_si512(places.x);
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(sign.x));
  const __m512i flipped = _mm512_mask_xor_epi32(words, negative, words, fill(flip).x);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(all, flipped));
}
KVCACHE_INLINE __m256i lower(__m512i a) { return __builtin_shufflevector(a, a, 0, 1, 2, 3); }
KVCACHE_INLINE __m256i upper(__m512i a) { return __builtin_shufflevector(a, a, 4, 5, 6, 7); }
/// combine(all lanes), in every lane.
template <class Combine>
KVCACHE_INLINE __m512i everywhere(__m512i a, Combine combine) {
  a = combine(a, _mm512_maskz_shuffle_i64x2(0xff, a, a, 0b01'00'11'10));
  a = combine(a, _mm512_maskz_shuffle_i64x2(0xff, a, a, 0b10'11'00'01));
  a = combine(a, _mm512_maskz_shuffle_epi32(all, a, _MM_PERM_BADC));
  return combine(a, _mm512_maskz_shuffle_epi32(all, a, _MM_PERM_CDAB));
}
struct add_words {
  KVCACHE_INLINE __m512i operator()(__m512i a, __m512i b) const { return _mm512_add_epi32(a, b); }
};
struct larger_of_words {
  KVCACHE_INLINE __m512i operator()(__m512i a, __m512i b) const { return _mm512_maskz_max_epi32(all, a, b); }
};
KVCACHE_INLINE bits largest_everywhere(bits a) { return {everywhere(a.x, larger_of_words{})}; }
KVCACHE_INLINE bits sum_words_everywhere(vec a) {
  return {everywhere(_mm512_maskz_cvtps_epi32(all, a.x), add_words{})};
}
KVCACHE_INLINE vec sum_everywhere(vec a) {
  return {_mm512_maskz_cvtepi32_ps(all, sum_words_everywhere(a).x)};
}
KVCACHE_INLINE std::uint32_t first_word(bits a) {
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(__builtin_shufflevector(a.x, a.x, 0, 1)));
}
KVCACHE_INLINE bits sub_words(bits a, bits b) { return {_mm512_sub_epi32(a.x, b.x)}; }
KVCACHE_INLINE std::int32_t sum_of_whole(vec a) {
  return static_cast<std::int32_t>(first_word(sum_words_everywhere(a)));
}
