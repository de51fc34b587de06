// SPDX-License-Identifier: MIT
// Primitives of NEON for codes of less than 8 bits and for what is the same in every lane; included by neon.hpp.

KVCACHE_INLINE bits load_codebook(const std::int8_t* p) {
  return each_word([p](int) { return vreinterpretq_u32_s8(vld1q_s8(p)); });
}
KVCACHE_INLINE bits look_up(bits codebook, bits codes) {
  return each_word([&](int i) {
    return vreinterpretq_u32_u8(
        vqtbl1q_u8(vreinterpretq_u8_u32(codebook.x[i]), vreinterpretq_u8_u32(codes.x[i])));
  });
}
KVCACHE_INLINE vec eight_twice(const std::int8_t* p) {
  const int16x8_t halves = vmovl_s8(vld1_s8(p));
  const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves)));
  const float32x4_t high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves)));
  return {{low, high, low, high}};
}
KVCACHE_INLINE vec look_up(vec eight, vec place) {
  const uint8x16x2_t bytes = {{vreinterpretq_u8_f32(eight.x[0]), vreinterpretq_u8_f32(eight.x[1])}};
  return each([&](int i) {  // byte j of entry n is byte 4n + j
    const uint32x4_t entry = vandq_u32(vreinterpretq_u32_f32(place.x[i]), vdupq_n_u32(7));
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100U), entry, vdupq_n_u32(0x04040404U));
    return vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u32(at)));
  });
}
KVCACHE_INLINE vec count_if_above(vec place, vec x, vec limit, std::uint32_t n) {
  return each([&](int i) {
    const uint32x4_t more = vandq_u32(vcgtq_f32(x.x[i], limit.x[i]), vdupq_n_u32(n));
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(place.x[i]), more));
  });
}
KVCACHE_INLINE vec pick_above(vec x, vec limit, vec a, vec b) {
  return each([&](int i) { return vbslq_f32(vcgtq_f32(x.x[i], limit.x[i]), a.x[i], b.x[i]); });
}
KVCACHE_INLINE void store_places(void* p, vec places, vec sign, std::uint32_t flip) {
  const bits flipped = each_word([&](int i) {
    const int32x4_t negative = vshrq_n_s32(vreinterpretq_s32_f32(sign.x[i]), 31);
    return veorq_u32(vreinterpretq_u32_f32(places.x[i]),
                     vandq_u32(vreinterpretq_u32_s32(negative), vdupq_n_u32(flip)));
  });
  const uint16x8_t low = vcombine_u16(vmovn_u32(flipped.x[0]), vmovn_u32(flipped.x[1]));
  const uint16x8_t high = vcombine_u16(vmovn_u32(flipped.x[2]), vmovn_u32(flipped.x[3]));
  vst1q_u8(static_cast<std::uint8_t*>(p), vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}
KVCACHE_INLINE std::int32_t sum_of_whole(vec a) {
  std::int32_t sum = 0;
  for (int i = 0; i < 4; ++i) sum += vaddvq_s32(vcvtnq_s32_f32(a.x[i]));
  return sum;
}

KVCACHE_INLINE vec sum_everywhere(vec a) { return broadcast(static_cast<float>(sum_of_whole(a))); }
