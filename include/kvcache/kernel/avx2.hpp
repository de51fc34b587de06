// SPDX-License-Identifier: MIT
// The kernels for x86 with AVX2, FMA and F16C (Intel since Haswell, AMD since Zen). 16 lanes are two registers.
#pragma once

#include <kvcache/core/half.hpp>
#include <kvcache/core/prefetch.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/table.hpp>

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define KVCACHE_TARGET [[gnu::target("avx2,fma,f16c")]]
#define KVCACHE_INLINE KVCACHE_TARGET [[gnu::always_inline]] inline

namespace kvcache::inline v0::kernel::avx2 {

struct vec {
  __m256 low, high;
};
struct bits {
  __m256i low, high;
};

/// One line of block order as floats, one vector for each element of a pack.
template <int Pack>
struct widened {
  vec part[Pack];
};

template <class Element>
struct single_line;
using half_line = single_line<half>;

inline constexpr int max_score_rows = 4;
constexpr int score_groups(int rows) { return rows == 1 ? 2 : 1; }
inline constexpr int max_sum_rows = 4;
constexpr int sum_chunks(int rows) { return 4 / rows; }

KVCACHE_INLINE vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
KVCACHE_INLINE vec broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
KVCACHE_INLINE vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KVCACHE_INLINE void store(float* p, vec a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
KVCACHE_INLINE vec add(vec a, vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
KVCACHE_INLINE vec sub(vec a, vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
KVCACHE_INLINE vec mul(vec a, vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
KVCACHE_INLINE vec div(vec a, vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
KVCACHE_INLINE vec rounded(vec a) {
  asm("" : "+x"(a.low), "+x"(a.high));
  return a;
}
KVCACHE_INLINE vec fma(vec a, vec b, vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
KVCACHE_INLINE vec smaller(vec a, vec b) {
  return {_mm256_min_ps(b.low, a.low), _mm256_min_ps(b.high, a.high)};
}
KVCACHE_INLINE vec larger(vec a, vec b) {
  return {_mm256_max_ps(b.low, a.low), _mm256_max_ps(b.high, a.high)};
}

KVCACHE_INLINE vec magnitude(vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
KVCACHE_INLINE vec with_sign(vec sign, vec size) {
  const __m256 bit = _mm256_set1_ps(-0.0F);
  return {_mm256_or_ps(size.low, _mm256_and_ps(bit, sign.low)),
          _mm256_or_ps(size.high, _mm256_and_ps(bit, sign.high))};
}
KVCACHE_INLINE vec either_below(vec x, float limit, vec a, vec b) {
  const __m256 bound = _mm256_set1_ps(limit);
  return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, bound, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, bound, _CMP_LT_OQ))};
}

KVCACHE_INLINE __m256 add_to_exponent(__m256 p, __m256 n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shifted));
}
KVCACHE_INLINE __m256 zero_below(__m256 x, float limit, __m256 y) {
  const __m256 kept = _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NLT_UQ), y);
  return _mm256_blendv_ps(kept, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
KVCACHE_INLINE vec times_power(vec p, vec /*n*/, vec shifted, vec x) {
  return {zero_below(x.low, portable::least_exp, add_to_exponent(p.low, shifted.low)),
          zero_below(x.high, portable::least_exp, add_to_exponent(p.high, shifted.high))};
}
KVCACHE_INLINE std::uint32_t reaches(vec a, vec b) {
  const __m256 either =
      _mm256_or_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
  return static_cast<std::uint32_t>(_mm256_movemask_ps(either));
}

KVCACHE_INLINE float sum_of(vec a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

KVCACHE_INLINE float largest_of(vec a) {
  const __m256 eight = _mm256_max_ps(a.high, a.low);
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two));
}

KVCACHE_INLINE bool all_finite(vec a) {
  const __m256 none = _mm256_setzero_ps();  // x - x is zero for finite x, else NaN
  const __m256 low = _mm256_cmp_ps(_mm256_sub_ps(a.low, a.low), none, _CMP_EQ_OQ);
  const __m256 high = _mm256_cmp_ps(_mm256_sub_ps(a.high, a.high), none, _CMP_EQ_OQ);
  return _mm256_movemask_ps(_mm256_and_ps(low, high)) == 0xff;
}

KVCACHE_INLINE widened<1> widen(const float* p) { return {{load(p)}}; }

KVCACHE_INLINE bits load_bits(const void* p) {
  const auto* words = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
KVCACHE_INLINE void store_bits(void* p, bits a) {
  auto* words = static_cast<__m256i*>(p);
  _mm256_storeu_si256(words, a.low);
  _mm256_storeu_si256(words + 1, a.high);
}

KVCACHE_INLINE widened<2> widen(const bfloat16* p) {
  const bits words = load_bits(p);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
  return {{vec{_mm256_castsi256_ps(_mm256_slli_epi32(words.low, 16)),
               _mm256_castsi256_ps(_mm256_slli_epi32(words.high, 16))},
           vec{_mm256_castsi256_ps(_mm256_and_si256(words.low, upper)),
               _mm256_castsi256_ps(_mm256_and_si256(words.high, upper))}}};
}

/// The lower halves of eight words in the lower 128 bits, their upper halves in the upper ones.
KVCACHE_INLINE __m256i split_halves(__m256i words) {
  const __m256i in_lane = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, in_lane), 0b11'01'10'00);
}

KVCACHE_INLINE widened<2> widen(const half* p) {
  const bits words = load_bits(p);
  const __m256i low = split_halves(words.low);
  const __m256i high = split_halves(words.high);
  return {{vec{_mm256_cvtph_ps(_mm256_castsi256_si128(low)), _mm256_cvtph_ps(_mm256_castsi256_si128(high))},
           vec{_mm256_cvtph_ps(_mm256_extracti128_si256(low, 1)),
               _mm256_cvtph_ps(_mm256_extracti128_si256(high, 1))}}};
}

template <int Byte>
KVCACHE_INLINE __m256 widen_byte(__m256i words) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * Byte), 24));
}
KVCACHE_INLINE widened<4> widen(const std::int8_t* p) {
  const bits words = load_bits(p);
  return {{vec{widen_byte<0>(words.low), widen_byte<0>(words.high)},
           vec{widen_byte<1>(words.low), widen_byte<1>(words.high)},
           vec{widen_byte<2>(words.low), widen_byte<2>(words.high)},
           vec{widen_byte<3>(words.low), widen_byte<3>(words.high)}}};
}

KVCACHE_INLINE bits load_low_halves(const void* p) {
  const auto* halves = static_cast<const __m128i*>(p);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)), _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))};
}
KVCACHE_INLINE vec widen_low(bits a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.low, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(a.high, 16))};
}
KVCACHE_INLINE void store_bytes(void* p, vec a) {
  const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
  const __m256i in_order = _mm256_permute4x64_epi64(halves, 0b11'01'10'00);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1)));
}
KVCACHE_INLINE __m256i with_byte(__m256i words, index_t slot, __m256 whole) {
  const __m128i distance = _mm_cvtsi32_si128(static_cast<int>(8 * slot));
  const __m256i replaced = _mm256_sll_epi32(_mm256_set1_epi32(255), distance);
  return _mm256_blendv_epi8(words, _mm256_sll_epi32(_mm256_cvtps_epi32(whole), distance), replaced);
}
KVCACHE_INLINE bits with_byte(bits words, index_t slot, vec whole) {
  return {with_byte(words.low, slot, whole.low), with_byte(words.high, slot, whole.high)};
}
KVCACHE_INLINE vec zero_where_zero(vec w, vec x) {
  const __m256 none = _mm256_setzero_ps();
  return {_mm256_and_ps(_mm256_cmp_ps(w.low, none, _CMP_NEQ_UQ), x.low),
          _mm256_and_ps(_mm256_cmp_ps(w.high, none, _CMP_NEQ_UQ), x.high)};
}

template <class Element>
KVCACHE_INLINE bits narrow(vec a);

template <>
KVCACHE_INLINE bits narrow<half>(vec a) {
  return {_mm256_cvtepu16_epi32(_mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT)),
          _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT))};
}

KVCACHE_INLINE __m256i narrow_bfloat16(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i upper = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}

template <>
KVCACHE_INLINE bits narrow<bfloat16>(vec a) {
  return {narrow_bfloat16(a.low), narrow_bfloat16(a.high)};
}

KVCACHE_INLINE void store_low_halves(void* p, bits a) {
  const __m256i mixed = _mm256_packus_epi32(a.low, a.high);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0b11'01'10'00));
}
KVCACHE_INLINE bits low_high(bits a, bits b) {
  return {_mm256_or_si256(a.low, _mm256_slli_epi32(b.low, 16)),
          _mm256_or_si256(a.high, _mm256_slli_epi32(b.high, 16))};
}
KVCACHE_INLINE bits with_half(bits words, index_t slot, bits half_words) {
  const bits both = low_high(half_words, half_words);
  const __m256i replace = _mm256_set1_epi32(slot == 0 ? 0xffff : static_cast<int>(0xffff0000U));
  return {_mm256_blendv_epi8(words.low, both.low, replace),
          _mm256_blendv_epi8(words.high, both.high, replace)};
}

KVCACHE_INLINE bits fill(std::uint32_t word) {
  const __m256i x = _mm256_set1_epi32(static_cast<int>(word));
  return {x, x};
}
KVCACHE_INLINE bits and_bits(bits a, bits b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
KVCACHE_INLINE bits larger_words(bits a, bits b) {
  return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}
KVCACHE_INLINE bits sub_words(bits a, bits b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
KVCACHE_INLINE std::uint32_t first_word(bits a) {
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(a.low)));
}
/// combine(all lanes), in every lane.
template <class Combine>
KVCACHE_INLINE bits everywhere(bits a, Combine combine) {
  __m256i x = combine(a.low, a.high);
  x = combine(x, _mm256_permute4x64_epi64(x, 0b01'00'11'10));
  x = combine(x, _mm256_shuffle_epi32(x, 0b01'00'11'10));
  x = combine(x, _mm256_shuffle_epi32(x, 0b10'11'00'01));
  return {x, x};
}
struct add_words {
  KVCACHE_INLINE __m256i operator()(__m256i a, __m256i b) const { return _mm256_add_epi32(a, b); }
};
struct larger_of_words {
  KVCACHE_INLINE __m256i operator()(__m256i a, __m256i b) const { return _mm256_max_epi32(a, b); }
};
KVCACHE_INLINE bits largest_everywhere(bits a) { return everywhere(a, larger_of_words{}); }
KVCACHE_INLINE bits sum_words_everywhere(vec a) {
  return everywhere({_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}, add_words{});
}
KVCACHE_INLINE vec sum_everywhere(vec a) {
  const __m256 sum = _mm256_cvtepi32_ps(sum_words_everywhere(a).low);
  return {sum, sum};
}
KVCACHE_INLINE std::int32_t sum_of_whole(vec a) {
  return static_cast<std::int32_t>(first_word(sum_words_everywhere(a)));
}
KVCACHE_INLINE bits as_bits(vec a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
KVCACHE_INLINE vec as_floats(bits a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
KVCACHE_INLINE bits or_bits(bits a, bits b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
template <int N>
KVCACHE_INLINE bits shifted(bits a) {
  if constexpr (N < 0) return {_mm256_slli_epi32(a.low, -N), _mm256_slli_epi32(a.high, -N)};
  return {_mm256_srli_epi32(a.low, N), _mm256_srli_epi32(a.high, N)};
}
KVCACHE_INLINE bits load_codebook(const std::int8_t* p) {
  const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {x, x};
}
KVCACHE_INLINE bits look_up(bits codebook, bits codes) {
  return {_mm256_shuffle_epi8(codebook.low, codes.low), _mm256_shuffle_epi8(codebook.high, codes.high)};
}
KVCACHE_INLINE vec eight_twice(const std::int8_t* p) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
  return {x, x};
}
KVCACHE_INLINE vec look_up(vec eight, vec place) {
  return {_mm256_permutevar8x32_ps(eight.low, _mm256_castps_si256(place.low)),
          _mm256_permutevar8x32_ps(eight.high, _mm256_castps_si256(place.high))};
}
KVCACHE_INLINE __m256 count_if_above(__m256 place, __m256 x, __m256 limit, __m256i n) {
  const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, limit, _CMP_GT_OQ));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(place), _mm256_and_si256(above, n)));
}
KVCACHE_INLINE vec count_if_above(vec place, vec x, vec limit, std::uint32_t n) {
  return {count_if_above(place.low, x.low, limit.low, fill(n).low),
          count_if_above(place.high, x.high, limit.high, fill(n).high)};
}
KVCACHE_INLINE vec pick_above(vec x, vec limit, vec a, vec b) {
  return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, limit.low, _CMP_GT_OQ)),
          _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, limit.high, _CMP_GT_OQ))};
}
KVCACHE_INLINE __m256i low_byte_flipped(__m256 places, __m256 sign, __m256i flip) {
  const __m256i negative = _mm256_srai_epi32(_mm256_castps_si256(sign), 31);
  const __m256i flipped = _mm256_xor_si256(_mm256_castps_si256(places), _mm256_and_si256(negative, flip));
  return _mm256_and_si256(flipped, _mm256_set1_epi32(255));
}
KVCACHE_INLINE void store_places(void* p, vec places, vec sign, std::uint32_t flip) {
  const __m256i mixed = _mm256_packs_epi32(low_byte_flipped(places.low, sign.low, fill(flip).low),
                                           low_byte_flipped(places.high, sign.high, fill(flip).low));
  const __m256i halves = _mm256_permute4x64_epi64(mixed, 0b11'01'10'00);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
KVCACHE_INLINE vec interleave(__m256 a, __m256 b) {
  const __m256 low = _mm256_unpacklo_ps(a, b);
  const __m256 high = _mm256_unpackhi_ps(a, b);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
KVCACHE_INLINE vec interleave_low(vec a, vec b) { return interleave(a.low, b.low); }
KVCACHE_INLINE vec interleave_high(vec a, vec b) { return interleave(a.high, b.high); }

#include <kvcache/kernel/avx2_trellis.inl>
#include <kvcache/kernel/vector_kernels.inl>
#include <kvcache/kernel/vector_trellis_decode.inl>

inline constexpr trellis_kernels kernels_for_trellis = {encode_trellis, decode_trellis_keys,
                                                        decode_trellis_values};

inline constexpr table kernels = {
    isa::avx2,        kernels_for<float>,   kernels_for<half>,    kernels_for<bfloat16>, kernels_for_int8,
    kernels_for_int8, kernels_for_low_bits, kernels_for_channels, kernels_for_trellis,   softmax,
    soft_cap};

inline bool runs_here() noexcept {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace kvcache::inline v0::kernel::avx2

#undef KVCACHE_TARGET
#undef KVCACHE_INLINE

#endif
