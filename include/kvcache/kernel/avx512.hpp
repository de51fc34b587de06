// SPDX-License-Identifier: MIT
// The kernels for x86 with AVX-512 F, BW, DQ, VL, VNNI (Intel since Cascade Lake, AMD since Zen 4). 16 lanes are one register.
#pragma once

#include <kvcache/core/half.hpp>
#include <kvcache/core/prefetch.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/table.hpp>

#if defined(__x86_64__)

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
#include <utility>

// The maskz forms with a full mask are the plain instructions; g++ 12 warns about the undefined source of the others.
#define KVCACHE_TARGET [[gnu::target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]]
#define KVCACHE_INLINE KVCACHE_TARGET [[gnu::always_inline]] inline

namespace kvcache::inline v0::kernel::avx512 {

inline constexpr __mmask16 all = 0xffff;

struct vec {
  __m512 x;
};
struct bits {
  __m512i x;
};

/// One line of block order as floats, one vector for each element of a pack.
template <int Pack>
struct widened {
  vec part[Pack];
};

inline constexpr int max_score_rows = 8;
constexpr int score_groups(int rows) { return rows == 8 ? 2 : 4; }
inline constexpr int max_sum_rows = 8;
constexpr int sum_chunks(int rows) { return rows == 8 ? 2 : rows == 4 ? 4 : 8; }

KVCACHE_INLINE vec zero() { return {_mm512_setzero_ps()}; }
KVCACHE_INLINE vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
KVCACHE_INLINE vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
KVCACHE_INLINE void store(float* p, vec a) { _mm512_storeu_ps(p, a.x); }
KVCACHE_INLINE vec add(vec a, vec b) { return {_mm512_add_ps(a.x, b.x)}; }
KVCACHE_INLINE vec sub(vec a, vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
KVCACHE_INLINE vec mul(vec a, vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
KVCACHE_INLINE vec div(vec a, vec b) { return {_mm512_div_ps(a.x, b.x)}; }
KVCACHE_INLINE vec rounded(vec a) {
  asm("" : "+v"(a.x));
  return a;
}
KVCACHE_INLINE vec fma(vec a, vec b, vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
KVCACHE_INLINE vec smaller(vec a, vec b) { return {_mm512_maskz_min_ps(all, b.x, a.x)}; }
KVCACHE_INLINE vec larger(vec a, vec b) { return {_mm512_maskz_max_ps(all, b.x, a.x)}; }

KVCACHE_INLINE vec magnitude(vec a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0F), a.x)}; }
KVCACHE_INLINE vec with_sign(vec sign, vec size) {
  return {_mm512_or_ps(size.x, _mm512_and_ps(_mm512_set1_ps(-0.0F), sign.x))};
}
KVCACHE_INLINE vec either_below(vec x, float limit, vec a, vec b) {
  return {_mm512_mask_mov_ps(b.x, _mm512_cmp_ps_mask(x.x, _mm512_set1_ps(limit), _CMP_LT_OQ), a.x)};
}

KVCACHE_INLINE vec times_power(vec p, vec n, vec /*shifted*/, vec x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.x, _mm512_set1_ps(portable::least_exp), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(keep, p.x, n.x)};
}
KVCACHE_INLINE std::uint32_t reaches(vec a, vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ); }

KVCACHE_INLINE __m256 lower(vec a) { return __builtin_shufflevector(a.x, a.x, 0, 1, 2, 3, 4, 5, 6, 7); }
KVCACHE_INLINE __m256 upper(vec a) { return __builtin_shufflevector(a.x, a.x, 8, 9, 10, 11, 12, 13, 14, 15); }

KVCACHE_INLINE float sum_of(vec a) {
  const __m256 eight = _mm256_add_ps(lower(a), upper(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

KVCACHE_INLINE float largest_of(vec a) {
  const __m256 eight = _mm256_max_ps(upper(a), lower(a));
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two));
}

KVCACHE_INLINE __mmask16 finite_lanes(vec a) {
  return _mm512_cmp_ps_mask(_mm512_sub_ps(a.x, a.x), _mm512_setzero_ps(), _CMP_EQ_OQ);
}
KVCACHE_INLINE bool all_finite(vec a) { return finite_lanes(a) == all; }

KVCACHE_INLINE widened<1> widen(const float* p) { return {{load(p)}}; }

KVCACHE_INLINE widened<2> widen(const bfloat16* p) {
  const __m512i words = _mm512_loadu_si512(p);
  return {
      {vec{_mm512_castsi512_ps(_mm512_maskz_slli_epi32(all, words, 16))},
       vec{_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000U))))}}};
}

KVCACHE_INLINE widened<2> widen(const half* p) {
  // the halves of all words, then their other halves
  alignas(64) static constexpr std::array<std::int16_t, 32> even_then_odd = {
      0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
      1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i halves = _mm512_maskz_permutexvar_epi16(
      ~__mmask32{0}, _mm512_load_si512(even_then_odd.data()), _mm512_loadu_si512(p));
  return {{vec{_mm512_maskz_cvtph_ps(all, __builtin_shufflevector(halves, halves, 0, 1, 2, 3))},
           vec{_mm512_maskz_cvtph_ps(all, __builtin_shufflevector(halves, halves, 4, 5, 6, 7))}}};
}

#include <kvcache/kernel/avx512_half.inl>

KVCACHE_INLINE vec top_byte(__m512i words) {
  return {_mm512_maskz_cvtepi32_ps(all, _mm512_maskz_srai_epi32(all, words, 24))};
}
KVCACHE_INLINE widened<4> widen(const std::int8_t* p) {
  const __m512i words = _mm512_loadu_si512(p);
  return {{top_byte(_mm512_maskz_slli_epi32(all, words, 24)),
           top_byte(_mm512_maskz_slli_epi32(all, words, 16)),
           top_byte(_mm512_maskz_slli_epi32(all, words, 8)), top_byte(words)}};
}

KVCACHE_INLINE bits load_low_halves(const void* p) {
  return {_mm512_maskz_cvtepu16_epi32(all, _mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
KVCACHE_INLINE void store_bytes(void* p, vec a) {
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm512_maskz_cvtepi32_epi8(all, _mm512_maskz_cvtps_epi32(all, a.x)));
}
KVCACHE_INLINE bits with_byte(bits words, index_t slot, vec whole) {
  const __m128i distance = _mm_cvtsi32_si128(static_cast<int>(8 * slot));
  const __m512i in_slot = _mm512_maskz_sll_epi32(all, _mm512_maskz_cvtps_epi32(all, whole.x), distance);
  return {_mm512_mask_mov_epi8(words.x, 0x1111111111111111U << static_cast<unsigned>(slot), in_slot)};
}
KVCACHE_INLINE vec zero_where_zero(vec w, vec x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(w.x, _mm512_setzero_ps(), _CMP_NEQ_UQ), x.x)};
}

template <class Element>
KVCACHE_INLINE bits narrow(vec a);

template <>
KVCACHE_INLINE bits narrow<half>(vec a) {
  return {_mm512_maskz_cvtepu16_epi32(all, _mm512_maskz_cvtps_ph(all, a.x, _MM_FROUND_TO_NEAREST_INT))};
}

template <>
KVCACHE_INLINE bits narrow<bfloat16>(vec a) {
  const __m512i u = _mm512_castps_si512(a.x);
  const __m512i high = _mm512_maskz_srli_epi32(all, u, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_maskz_srli_epi32(all, _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return {_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40))};
}

/// bf16 in the low half of each word.
KVCACHE_INLINE vec widen_low(bits a) { return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(all, a.x, 16))}; }

KVCACHE_INLINE bits load_bits(const void* p) { return {_mm512_loadu_si512(p)}; }
KVCACHE_INLINE void store_bits(void* p, bits a) { _mm512_storeu_si512(p, a.x); }
KVCACHE_INLINE void store_low_halves(void* p, bits a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(all, a.x));
}
KVCACHE_INLINE bits low_high(bits a, bits b) {
  return {_mm512_or_si512(a.x, _mm512_maskz_slli_epi32(all, b.x, 16))};
}
KVCACHE_INLINE bits with_half(bits words, index_t slot, bits half_words) {
  const __mmask32 odd_halves = 0xaaaaaaaaU;
  const __m512i both = low_high(half_words, half_words).x;
  return {_mm512_mask_mov_epi16(words.x, slot == 0 ? ~odd_halves : odd_halves, both)};
}

KVCACHE_INLINE bits fill(std::uint32_t word) { return {_mm512_set1_epi32(static_cast<int>(word))}; }
KVCACHE_INLINE bits and_bits(bits a, bits b) { return {_mm512_and_si512(a.x, b.x)}; }
KVCACHE_INLINE bits larger_words(bits a, bits b) { return {_mm512_maskz_max_epi32(all, a.x, b.x)}; }
KVCACHE_INLINE bits as_bits(vec a) { return {_mm512_castps_si512(a.x)}; }
KVCACHE_INLINE vec as_floats(bits a) { return {_mm512_castsi512_ps(a.x)}; }
KVCACHE_INLINE bits or_bits(bits a, bits b) { return {_mm512_or_si512(a.x, b.x)}; }
template <int N>
KVCACHE_INLINE bits shifted(bits a) {
  if constexpr (N < 0) return {_mm512_maskz_slli_epi32(all, a.x, -N)};
  return {_mm512_maskz_srli_epi32(all, a.x, std::max(N, 0))};
}
#include <kvcache/kernel/avx512_low_bit.inl>

KVCACHE_INLINE vec interleave_low(vec a, vec b) {
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return {_mm512_permutex2var_ps(a.x, order, b.x)};
}
KVCACHE_INLINE vec interleave_high(vec a, vec b) {
  const __m512i order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(a.x, order, b.x)};
}

// ---- for the codec trellis ----

KVCACHE_INLINE bits smaller_words(bits a, bits b) { return {_mm512_maskz_min_epi32(all, a.x, b.x)}; }
KVCACHE_INLINE bits broadcast_word(std::int32_t a) { return {_mm512_set1_epi32(a)}; }
KVCACHE_INLINE bits masked_or(bits a, bits mask, bits b) { return or_bits(and_bits(a, mask), b); }
KVCACHE_INLINE void store_low_bytes(void* p, bits a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(all, a.x));
}
KVCACHE_INLINE bits add_products(bits sum, bits a, bits b) { return {_mm512_dpwssd_epi32(sum.x, a.x, b.x)}; }

template <int Run>
KVCACHE_INLINE bits spread(const std::int32_t* p) {
  if constexpr (Run == 16) {
    return broadcast_word(*p);
  } else if constexpr (Run == 8) {
    return {_mm512_mask_mov_epi32(_mm512_set1_epi32(p[0]), 0xff00, _mm512_set1_epi32(p[1]))};
  } else {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512 four_times = _mm512_castsi512_ps(_mm512_maskz_broadcast_i32x4(all, words));
    return {_mm512_castps_si512(_mm512_maskz_permutevar_ps(all, four_times, lane))};
  }
}

KVCACHE_INLINE void store_words(void* p, bits a, index_t count) {
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1U << count) - 1U), a.x);
}

template <int N>
KVCACHE_INLINE bits shifted_left(bits a) {
  return {_mm512_maskz_slli_epi32(all, a.x, N)};
}
/// a << N | b >> (32 - N)
struct funnel {
  template <int N>
  KVCACHE_INLINE static bits shift(bits a, bits b) {
    return or_bits(shifted_left<N>(a), {_mm512_maskz_srli_epi32(all, b.x, 32 - N)});
  }
};
template <int N>
KVCACHE_INLINE bits words_before(bits a, bits b) {
  return {_mm512_maskz_alignr_epi32(all, a.x, b.x, 16 - N)};
}

/// Numbers whose index has its highest bit are the negatives of those without. `found` may be off by 128.
KVCACHE_INLINE __m512i with_sign_of(__m512i index, __m512i found) {
  return _mm512_mask_sub_epi8(found, _mm512_movepi8_mask(index), _mm512_setzero_si512(), found);
}

/// 8 tables of 16 bytes, of which three bits of an index select one, pair by pair.
struct byte_table {
  const std::int8_t* entries;

  explicit byte_table(const std::int8_t* table) noexcept : entries(table) {}

  [[nodiscard]] KVCACHE_INLINE __m512i part(int i, __m512i low_bits) const {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * i));
    return _mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(all, part), low_bits);
  }
  [[nodiscard]] KVCACHE_INLINE bits at(bits index) const {
    const __m512i low_bits = _mm512_and_si512(index.x, _mm512_set1_epi8(15));
    __m512i chosen[4];
    const __mmask64 bit = _mm512_test_epi8_mask(index.x, _mm512_set1_epi8(16));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      chosen[i] = _mm512_mask_mov_epi8(part(2 * i, low_bits), bit, part(2 * i + 1, low_bits));
#pragma GCC unroll 2
    for (int width = 2; width > 0; width /= 2) {
      const __mmask64 next = _mm512_test_epi8_mask(index.x, _mm512_set1_epi8(static_cast<char>(64 / width)));
#pragma GCC unroll 2
      for (int i = 0; i < width; ++i)
        chosen[i] = _mm512_mask_mov_epi8(chosen[2 * i], next, chosen[2 * i + 1]);
    }
    return {with_sign_of(index.x, chosen[0])};
  }
};

#include <kvcache/kernel/vector_kernels.inl>
#include <kvcache/kernel/vector_trellis_decode.inl>

// after what it builds on
#include <kvcache/kernel/avx512_bytes.inl>
#include <kvcache/kernel/avx512_bytes_sums.inl>
#include <kvcache/kernel/avx512_fold.inl>
#include <kvcache/kernel/avx512_int8.inl>
#include <kvcache/kernel/avx512_packed.inl>

// The same with VBMI (Intel since Ice Lake, AMD since Zen 4), where an index into 128 bytes is one instruction.
#pragma push_macro("KVCACHE_TARGET")
#undef KVCACHE_TARGET
#define KVCACHE_TARGET \
  [[gnu::target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")]]

namespace vbmi {

/// a << N | b >> (32 - N)
struct funnel {
  template <int N>
  KVCACHE_INLINE static bits shift(bits a, bits b) {
    return {_mm512_shldi_epi32(a.x, b.x, N)};
  }
};

struct byte_table {
  __m512i part[2];

  KVCACHE_INLINE explicit byte_table(const std::int8_t* table) {
    for (int i = 0; i < 2; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
  }
  [[nodiscard]] KVCACHE_INLINE bits at(bits index) const {
    __m512i found = index.x;  // g++ would copy the table's first half, to write over that
    asm("vpermi2b %2, %1, %0" : "+v"(found) : "v"(part[0]), "v"(part[1]));
    return {with_sign_of(index.x, found)};
  }
};

inline bool runs_here() noexcept {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

#include <kvcache/kernel/vector_trellis_decode.inl>

#include <kvcache/kernel/avx512_trellis.inl>
#include <kvcache/kernel/avx512_trellis_sums.inl>
#include <kvcache/kernel/avx512_trellis_unpack.inl>

}  // namespace vbmi

#pragma pop_macro("KVCACHE_TARGET")

inline void decode_trellis_keys_best(int num_bits, index_t head_dim, index_t num_groups,
                                     const std::uint8_t* codes, const std::int8_t* table, std::int8_t* out,
                                     index_t out_stride) {
  (vbmi::runs_here() ? vbmi::decode_trellis_keys : decode_trellis_keys)(num_bits, head_dim, num_groups, codes,
                                                                        table, out, out_stride);
}
inline void decode_trellis_values_best(int num_bits, index_t head_dim, index_t num_packs,
                                       const std::uint8_t* codes, const std::int8_t* table, std::int8_t* out,
                                       index_t out_stride) {
  (vbmi::runs_here() ? vbmi::decode_trellis_values : decode_trellis_values)(num_bits, head_dim, num_packs,
                                                                            codes, table, out, out_stride);
}

inline constexpr trellis_kernels kernels_for_trellis = {encode_trellis,
                                                        decode_trellis_keys_best,
                                                        decode_trellis_values_best,
                                                        vbmi::unpack_trellis_keys,
                                                        vbmi::unpack_trellis_values,
                                                        vbmi::trellis_scores,
                                                        vbmi::trellis_accumulate};

inline constexpr table kernels = {isa::avx512,
                                  kernels_for<float>,
                                  kernels_for<half>,
                                  kernels_for<bfloat16>,
                                  kernels_for_bytes<2>,
                                  kernels_for_bytes<1>,
                                  kernels_for_packed,
                                  kernels_for_channels,
                                  kernels_for_trellis,
                                  softmax,
                                  soft_cap};

inline bool runs_here() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace kvcache::inline v0::kernel::avx512

#undef KVCACHE_TARGET
#undef KVCACHE_INLINE

#endif
