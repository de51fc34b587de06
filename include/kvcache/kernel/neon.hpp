// SPDX-License-Identifier: MIT
// The kernels for 64-bit ARM: Advanced SIMD, which every such processor has. 16 lanes are four registers. Blocks of bytes
// are multiplied by integer dot products where the processor has them (neon_int8.inl).
#pragma once

#include <kvcache/core/half.hpp>
#include <kvcache/core/prefetch.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/table.hpp>

#if defined(__aarch64__)

#include <arm_neon.h>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define KVCACHE_TARGET
#define KVCACHE_INLINE [[gnu::always_inline]] inline

namespace kvcache::inline v0::kernel::neon {

struct vec {
  float32x4_t x[4];
};
struct bits {
  uint32x4_t x[4];
};

/// One line of block order as floats, one vector for each element of a pack.
template <int Pack>
struct widened {
  vec part[Pack];
};

template <class Element>
struct single_line;
using half_line = single_line<half>;

// 32 registers: four rows of one group take 16, a line and its halves 8 to 12.
inline constexpr int max_score_rows = 4;
constexpr int score_groups(int rows) { return rows == 1 ? 2 : 1; }
inline constexpr int max_sum_rows = 4;
constexpr int sum_chunks(int rows) { return 4 / rows; }

/// Applies an operation on four lanes to all 16.
template <class F>
KVCACHE_INLINE vec each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class F>
KVCACHE_INLINE bits each_word(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

KVCACHE_INLINE vec broadcast(float a) {
  const float32x4_t x = vdupq_n_f32(a);
  return {{x, x, x, x}};
}
KVCACHE_INLINE vec zero() { return broadcast(0.0F); }
KVCACHE_INLINE vec load(const float* p) {
  return each([p](int i) { return vld1q_f32(p + 4 * i); });
}
KVCACHE_INLINE void store(float* p, vec a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.x[i]);
}
KVCACHE_INLINE vec add(vec a, vec b) {
  return each([&](int i) { return vaddq_f32(a.x[i], b.x[i]); });
}
KVCACHE_INLINE vec sub(vec a, vec b) {
  return each([&](int i) { return vsubq_f32(a.x[i], b.x[i]); });
}
KVCACHE_INLINE vec mul(vec a, vec b) {
  return each([&](int i) { return vmulq_f32(a.x[i], b.x[i]); });
}
KVCACHE_INLINE vec div(vec a, vec b) {
  return each([&](int i) { return vdivq_f32(a.x[i], b.x[i]); });
}
KVCACHE_INLINE vec rounded(vec a) {
  for (float32x4_t& x : a.x) asm("" : "+w"(x));
  return a;
}
KVCACHE_INLINE vec fma(vec a, vec b, vec c) {
  return each([&](int i) { return vfmaq_f32(c.x[i], a.x[i], b.x[i]); });
}
KVCACHE_INLINE vec smaller(vec a, vec b) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(b.x[i], a.x[i]), b.x[i], a.x[i]); });
}
KVCACHE_INLINE vec larger(vec a, vec b) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(a.x[i], b.x[i]), b.x[i], a.x[i]); });
}
KVCACHE_INLINE vec magnitude(vec a) {
  return each([&](int i) { return vabsq_f32(a.x[i]); });
}
KVCACHE_INLINE vec with_sign(vec sign, vec size) {
  return each([&](int i) { return vbslq_f32(vdupq_n_u32(0x80000000U), sign.x[i], size.x[i]); });
}
KVCACHE_INLINE vec either_below(vec x, float limit, vec a, vec b) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(x.x[i], vdupq_n_f32(limit)), a.x[i], b.x[i]); });
}

KVCACHE_INLINE vec add_to_exponent(vec p, vec n) {
  return each([&](int i) {
    const uint32x4_t shifted = vshlq_n_u32(vreinterpretq_u32_f32(n.x[i]), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p.x[i]), shifted));
  });
}
KVCACHE_INLINE vec zero_below(vec x, float limit, vec y) {
  return each([&](int i) {
    const uint32x4_t below = vcltq_f32(x.x[i], vdupq_n_f32(limit));
    const float32x4_t kept = vbslq_f32(below, vdupq_n_f32(0.0F), y.x[i]);
    return vbslq_f32(vceqq_f32(x.x[i], x.x[i]), kept, x.x[i]);
  });
}

KVCACHE_INLINE vec times_power(vec p, vec /*n*/, vec shifted, vec x) {
  return zero_below(x, portable::least_exp, add_to_exponent(p, shifted));
}
KVCACHE_INLINE std::uint32_t reaches(vec a, vec b) {
  uint32x4_t any = vcgeq_f32(a.x[0], b.x[0]);
  for (int i = 1; i < 4; ++i) any = vorrq_u32(any, vcgeq_f32(a.x[i], b.x[i]));
  return vmaxvq_u32(any);
}

KVCACHE_INLINE float sum_of(vec a) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(a.x[0], a.x[1]), vaddq_f32(a.x[2], a.x[3])));
}
KVCACHE_INLINE float largest_of(vec a) {
  const auto larger_of = [](float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), y, x); };
  return vmaxnmvq_f32(larger_of(larger_of(a.x[0], a.x[1]), larger_of(a.x[2], a.x[3])));
}
KVCACHE_INLINE bool all_finite(vec a) {
  const vec none = sub(a, a);  // zero for what is finite, else NaN
  const float32x4_t sum = vaddq_f32(vaddq_f32(none.x[0], none.x[1]), vaddq_f32(none.x[2], none.x[3]));
  return vminvq_u32(vceqq_f32(sum, sum)) != 0;
}

KVCACHE_INLINE bits load_bits(const void* p) {
  return each_word([p](int i) { return vld1q_u32(static_cast<const std::uint32_t*>(p) + 4 * i); });
}
KVCACHE_INLINE void store_bits(void* p, bits a) {
  for (int i = 0; i < 4; ++i) vst1q_u32(static_cast<std::uint32_t*>(p) + 4 * i, a.x[i]);
}

KVCACHE_INLINE widened<1> widen(const float* p) { return {{load(p)}}; }

KVCACHE_INLINE widened<2> widen(const bfloat16* p) {
  const bits words = load_bits(p);
  const uint32x4_t upper = vdupq_n_u32(0xffff0000U);
  return {{each([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(words.x[i], 16)); }),
           each([&](int i) { return vreinterpretq_f32_u32(vandq_u32(words.x[i], upper)); })}};
}

KVCACHE_INLINE widened<2> widen(const half* p) {
  const bits words = load_bits(p);
  const auto to_floats = [](uint16x4_t halves) { return vcvt_f32_f16(vreinterpret_f16_u16(halves)); };
  return {{each([&](int i) { return to_floats(vmovn_u32(words.x[i])); }),
           each([&](int i) { return to_floats(vshrn_n_u32(words.x[i], 16)); })}};
}

template <int Byte>
KVCACHE_INLINE vec widen_byte(bits words) {
  return each([&](int i) {
    const int32x4_t top = vreinterpretq_s32_u32(vshlq_u32(words.x[i], vdupq_n_s32(24 - 8 * Byte)));
    return vcvtq_f32_s32(vshrq_n_s32(top, 24));
  });
}
KVCACHE_INLINE widened<4> widen(const std::int8_t* p) {
  const bits words = load_bits(p);
  return {{widen_byte<0>(words), widen_byte<1>(words), widen_byte<2>(words), widen_byte<3>(words)}};
}

KVCACHE_INLINE bits load_low_halves(const void* p) {
  return each_word([p](int i) { return vmovl_u16(vld1_u16(static_cast<const std::uint16_t*>(p) + 4 * i)); });
}
KVCACHE_INLINE vec widen_low(bits a) {
  return each([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(a.x[i], 16)); });
}
KVCACHE_INLINE void store_bytes(void* p, vec a) {
  const auto halves = [&a](int i) {
    return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.x[i])), vqmovn_s32(vcvtnq_s32_f32(a.x[i + 1])));
  };
  vst1q_s8(static_cast<std::int8_t*>(p), vcombine_s8(vqmovn_s16(halves(0)), vqmovn_s16(halves(2))));
}
KVCACHE_INLINE bits with_byte(bits words, index_t slot, vec whole) {
  const int32x4_t distance = vdupq_n_s32(static_cast<int>(8 * slot));
  const uint32x4_t replaced = vshlq_u32(vdupq_n_u32(255), distance);
  return each_word([&](int i) {
    const uint32x4_t in_slot = vshlq_u32(vreinterpretq_u32_s32(vcvtnq_s32_f32(whole.x[i])), distance);
    return vbslq_u32(replaced, in_slot, words.x[i]);
  });
}
KVCACHE_INLINE vec zero_where_zero(vec w, vec x) {
  return each([&](int i) { return vbslq_f32(vceqzq_f32(w.x[i]), vdupq_n_f32(0.0F), x.x[i]); });
}

template <class Element>
KVCACHE_INLINE bits narrow(vec a);

template <>
KVCACHE_INLINE bits narrow<half>(vec a) {
  return each_word([&](int i) { return vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(a.x[i]))); });
}

template <>
KVCACHE_INLINE bits narrow<bfloat16>(vec a) {
  return each_word([&](int i) {
    const uint32x4_t u = vreinterpretq_u32_f32(a.x[i]);
    const uint32x4_t upper = vshrq_n_u32(u, 16);
    const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vbslq_u32(vceqq_f32(a.x[i], a.x[i]), rounded, vorrq_u32(upper, vdupq_n_u32(0x40)));
  });
}

KVCACHE_INLINE void store_low_halves(void* p, bits a) {
  for (int i = 0; i < 4; ++i) vst1_u16(static_cast<std::uint16_t*>(p) + 4 * i, vmovn_u32(a.x[i]));
}
KVCACHE_INLINE bits low_high(bits a, bits b) {
  return each_word([&](int i) { return vorrq_u32(a.x[i], vshlq_n_u32(b.x[i], 16)); });
}
KVCACHE_INLINE bits with_half(bits words, index_t slot, bits half_words) {
  const uint32x4_t replaced = vdupq_n_u32(slot == 0 ? 0xffffU : 0xffff0000U);
  const bits both = low_high(half_words, half_words);
  return each_word([&](int i) { return vbslq_u32(replaced, both.x[i], words.x[i]); });
}

KVCACHE_INLINE bits fill(std::uint32_t word) {
  return each_word([&](int) { return vdupq_n_u32(word); });
}
KVCACHE_INLINE bits and_bits(bits a, bits b) {
  return each_word([&](int i) { return vandq_u32(a.x[i], b.x[i]); });
}
KVCACHE_INLINE bits larger_words(bits a, bits b) {
  return each_word([&](int i) { return vmaxq_u32(a.x[i], b.x[i]); });
}
KVCACHE_INLINE bits sub_words(bits a, bits b) {
  return each_word([&](int i) { return vsubq_u32(a.x[i], b.x[i]); });
}
KVCACHE_INLINE std::uint32_t first_word(bits a) { return vgetq_lane_u32(a.x[0], 0); }
KVCACHE_INLINE bits largest_everywhere(bits a) {
  return fill(vmaxvq_u32(vmaxq_u32(vmaxq_u32(a.x[0], a.x[1]), vmaxq_u32(a.x[2], a.x[3]))));
}
KVCACHE_INLINE bits as_bits(vec a) {
  return each_word([&](int i) { return vreinterpretq_u32_f32(a.x[i]); });
}
KVCACHE_INLINE vec as_floats(bits a) {
  return each([&](int i) { return vreinterpretq_f32_u32(a.x[i]); });
}
KVCACHE_INLINE bits or_bits(bits a, bits b) {
  return each_word([&](int i) { return vorrq_u32(a.x[i], b.x[i]); });
}
template <int N>
KVCACHE_INLINE bits shifted(bits a) {
  return each_word([&](int i) { return vshlq_u32(a.x[i], vdupq_n_s32(-N)); });
}
#include <kvcache/kernel/neon_low_bit.inl>

KVCACHE_INLINE vec interleave_low(vec a, vec b) {
  return {{vzip1q_f32(a.x[0], b.x[0]), vzip2q_f32(a.x[0], b.x[0]), vzip1q_f32(a.x[1], b.x[1]),
           vzip2q_f32(a.x[1], b.x[1])}};
}
KVCACHE_INLINE vec interleave_high(vec a, vec b) {
  return {{vzip1q_f32(a.x[2], b.x[2]), vzip2q_f32(a.x[2], b.x[2]), vzip1q_f32(a.x[3], b.x[3]),
           vzip2q_f32(a.x[3], b.x[3])}};
}

// ---- for the codec trellis ----

KVCACHE_INLINE int32x4_t as_signed(uint32x4_t a) { return vreinterpretq_s32_u32(a); }
KVCACHE_INLINE uint32x4_t as_unsigned(int32x4_t a) { return vreinterpretq_u32_s32(a); }

KVCACHE_INLINE bits smaller_words(bits a, bits b) {
  return each_word([&](int i) { return as_unsigned(vminq_s32(as_signed(a.x[i]), as_signed(b.x[i]))); });
}
KVCACHE_INLINE bits broadcast_word(std::int32_t a) {
  return each_word([a](int) { return as_unsigned(vdupq_n_s32(a)); });
}
KVCACHE_INLINE bits masked_or(bits a, bits mask, bits b) { return or_bits(and_bits(a, mask), b); }
KVCACHE_INLINE void store_low_bytes(void* p, bits a) {
  const auto halves = [&](int i) { return vcombine_u16(vmovn_u32(a.x[i]), vmovn_u32(a.x[i + 1])); };
  vst1q_u8(static_cast<std::uint8_t*>(p), vcombine_u8(vmovn_u16(halves(0)), vmovn_u16(halves(2))));
}
KVCACHE_INLINE bits add_products(bits sum, bits a, bits b) {
  return each_word([&](int i) {
    const int32x4_t x = as_signed(a.x[i]);
    const int32x4_t y = as_signed(b.x[i]);
    const int32x4_t with_low = vmlal_s16(as_signed(sum.x[i]), vmovn_s32(x), vmovn_s32(y));
    return as_unsigned(vmlal_s16(with_low, vshrn_n_s32(x, 16), vshrn_n_s32(y, 16)));
  });
}

template <int Run>
KVCACHE_INLINE bits spread(const std::int32_t* p) {
  return each_word([p](int i) { return as_unsigned(vld1q_dup_s32(p + 4 * i / Run)); });
}

KVCACHE_INLINE void store_words(void* p, bits a, index_t count) {
  std::memcpy(p, a.x, static_cast<std::size_t>(count) * sizeof(std::uint32_t));
}

template <int N>
KVCACHE_INLINE bits shifted_left(bits a) {
  return each_word([&](int i) { return vshlq_n_u32(a.x[i], N); });
}
/// a << N | b >> (32 - N)
struct funnel {
  template <int N>
  KVCACHE_INLINE static bits shift(bits a, bits b) {
    return each_word([&](int i) { return vorrq_u32(vshlq_n_u32(a.x[i], N), vshrq_n_u32(b.x[i], 32 - N)); });
  }
};
template <int N>
KVCACHE_INLINE bits words_before(bits a, bits b) {
  return each_word(
      [&](int i) { return vextq_u32(i == 0 ? b.x[3] : a.x[i == 0 ? 0 : i - 1], a.x[i], 4 - N); });
}

/// 64 bytes in four registers at a time; an index beyond them leaves what was found before.
struct byte_table {
  uint8x16x4_t part[2];

  explicit byte_table(const std::int8_t* table) noexcept {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) part[i].val[j] = vreinterpretq_u8_s8(vld1q_s8(table + 64 * i + 16 * j));
    }
  }
  [[nodiscard]] KVCACHE_INLINE bits at(bits index) const {
    return each_word([&](int i) {
      const uint8x16_t bytes = vreinterpretq_u8_u32(index.x[i]);
      const uint8x16_t in_half = vandq_u8(bytes, vdupq_n_u8(127));
      const uint8x16_t found =
          vqtbx4q_u8(vqtbl4q_u8(part[0], in_half), part[1], vsubq_u8(in_half, vdupq_n_u8(64)));
      const uint8x16_t sign = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(bytes), 7));  // -1 or 0
      return vreinterpretq_u32_u8(vsubq_u8(veorq_u8(found, sign), sign));
    });
  }
};

#include <kvcache/kernel/vector_kernels.inl>
#include <kvcache/kernel/vector_trellis_decode.inl>

// after what it builds on
#include <kvcache/kernel/neon_int8.inl>

inline constexpr trellis_kernels kernels_for_trellis = {encode_trellis, decode_trellis_keys,
                                                        decode_trellis_values};

inline constexpr table kernels = {isa::neon,
                                  kernels_for<float>,
                                  kernels_for<half>,
                                  kernels_for<bfloat16>,
                                  kernels_for_bytes<2>,
                                  kernels_for_bytes<1>,
                                  kernels_for_low_bits,
                                  kernels_for_channels,
                                  kernels_for_trellis,
                                  softmax,
                                  soft_cap};

inline bool runs_here() noexcept { return true; }

}  // namespace kvcache::inline v0::kernel::neon

#undef KVCACHE_TARGET
#undef KVCACHE_INLINE

#endif
