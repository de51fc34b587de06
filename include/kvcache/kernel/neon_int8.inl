// SPDX-License-Identifier: MIT
// Blocks of bytes multiplied as they are, by the integer dot products of ARM (dotprod: an option of Armv8.2, part of 8.4);
// included by neon.hpp. Queries and weights become the same bytes as in avx512_bytes.inl, and results are those of AVX-512
// bit by bit. Processors without the instructions multiply floats, see vector_int8.inl; which one it is, is asked at run time.
//
//   scores   key * query, both signed
//   sums     value + 128 * weight, both unsigned, less 128 * sum of the weights: they need all their eight bits
//
// The dot products stand in functions of their own that use nothing but intrinsics: what is compiled for other instructions
// than the rest of the program may not inline its primitives. clang before 16 has them only where the whole program
// may use them; there floats are multiplied, whatever it is compiled for, so that no two source files can disagree.
//
// bf16 blocks stay with float products: bfdot takes operands rounded to bf16, and with both split in two, what float
// accuracy needs, it is no less work than multiplying floats.

#if defined(__clang__) && __clang_major__ < 16

inline constexpr bool has_dot_products() noexcept { return false; }

template <int Parts>
inline constexpr int8_kernels kernels_for_bytes = kernels_for_int8;

#else

/// Whether this processor has them; asked at the first call, thread-safe.
inline bool has_dot_products() noexcept {
#if defined(__linux__)
  static const bool answer = (getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  static const bool answer = [] {
    int found = 0;
    std::size_t size = sizeof(found);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found != 0;
  }();
#else
  constexpr bool answer = false;
#endif
  return answer;
}

// ---- floats to bytes ------------------------------------------------------------------------------------------------

/// Whole numbers that the largest of a row becomes, and the bits below its high part.
template <int Parts>
struct byte_split {
  static constexpr float largest_query = Parts == 1 ? 127 : 127 * 128;
  static constexpr float largest_weight = Parts == 1 ? 255 : 255 * 256;
  static constexpr int query_shift = 7;
  static constexpr int weight_shift = 8;
};

/// number = scale * whole, whole = number * inverse. Tiny rows are taken as relative to 2^-110, so that both are normal
/// numbers; a row that is not finite gets a scale that is NaN.
struct byte_scale {
  float scale;
  float inverse;

  /// \param most  the largest magnitude of a row, NaN if it is not finite
  byte_scale(float most, float largest_integer) noexcept {
    const float size = most > 0x1p-110F ? most : 0x1p-110F;
    scale = size * (1.0F / largest_integer) + (most - most);
    inverse = largest_integer / size;
  }
};

/// 16 floats as whole numbers.
struct whole_numbers {
  int32x4_t x[4];

  KVCACHE_INLINE whole_numbers(vec numbers, float inverse) {
    for (int i = 0; i < 4; ++i) x[i] = vcvtnq_s32_f32(vmulq_n_f32(numbers.x[i], inverse));
  }
};

/// 16 numbers f(0) to f(3), of at most eight bits, as bytes.
template <class F>
KVCACHE_INLINE int8x16_t narrow_signed(F f) {
  const auto halves = [&f](int i) { return vcombine_s16(vqmovn_s32(f(i)), vqmovn_s32(f(i + 1))); };
  return vcombine_s8(vqmovn_s16(halves(0)), vqmovn_s16(halves(2)));
}
template <class F>
KVCACHE_INLINE uint8x16_t narrow_unsigned(F f) {
  const auto halves = [&f](int i) { return vcombine_s16(vqmovn_s32(f(i)), vqmovn_s32(f(i + 1))); };
  return vcombine_u8(vqmovun_s16(halves(0)), vqmovun_s16(halves(2)));
}

/// A prepared row: its scale, and from byte 64 on its parts, high first, each round_up(head_dim, 16) bytes.
inline constexpr index_t prepared_head_floats = 16;

template <int Parts>
KVCACHE_TARGET inline void prepare_whole(index_t head_dim, const float* queries, index_t num_rows,
                                         float* prepared) {
  const index_t part_bytes = round_up(head_dim, key_lanes);
  for (index_t r = 0; r < num_rows; ++r, queries += head_dim, prepared += prepared_query_floats(head_dim)) {
    const byte_scale s(largest(queries, head_dim), byte_split<Parts>::largest_query);
    *prepared = s.scale;
    auto* to = reinterpret_cast<std::int8_t*>(prepared + prepared_head_floats);
    for (index_t d = 0; d < head_dim; d += key_lanes, to += key_lanes) {
      const whole_numbers w(load_first(queries + d, head_dim - d), s.inverse);
      if constexpr (Parts == 1) {
        vst1q_s8(to, narrow_signed([&](int i) { return w.x[i]; }));
      } else {
        const auto high = [&](int i) { return vrshrq_n_s32(w.x[i], 7); };
        vst1q_s8(to, narrow_signed(high));
        vst1q_s8(to + part_bytes,
                 narrow_signed([&](int i) { return vsubq_s32(w.x[i], vshlq_n_s32(high(i), 7)); }));
      }
    }
  }
}

/// Weights of `Rows` rows as bytes.
template <int Parts, int Rows>
struct weight_bytes {
  alignas(64) std::int8_t bytes[Rows][Parts][sum_tokens];
  std::int32_t starts[Rows][Parts];  // of the accumulators: -128 * the sum of a part
  float scales[Rows];
};

/// Up to 64 weights of a row times the scales of their tokens, both of which may be anything beyond `count`.
template <int Parts>
KVCACHE_TARGET inline float split_weights(const float* weights, const bfloat16* scales, index_t count,
                                          std::int8_t (&bytes)[Parts][sum_tokens],
                                          std::int32_t (&starts)[Parts]) {
  alignas(64) std::array<float, sum_tokens> products{};
  for (index_t t = 0; t < count; t += key_lanes)
    store(&products[static_cast<std::size_t>(t)], scaled_weights(weights + t, scales + t));
  const byte_scale s(largest(products.data(), round_up(count, key_lanes)), byte_split<Parts>::largest_weight);
  std::int32_t sums[Parts] = {};
  for (index_t t = 0; t < sum_tokens; t += key_lanes) {
    const whole_numbers w(load(&products[static_cast<std::size_t>(t)]), s.inverse);
    const auto take = [&](int part, uint8x16_t x) {
      vst1q_s8(&bytes[part][t], vreinterpretq_s8_u8(x));
      sums[part] += vaddlvq_u8(x);
    };
    if constexpr (Parts == 1) {
      take(0, narrow_unsigned([&](int i) { return w.x[i]; }));
    } else {
      take(0, narrow_unsigned([&](int i) { return vshrq_n_s32(w.x[i], 8); }));
      take(1, narrow_unsigned([&](int i) { return vandq_s32(w.x[i], vdupq_n_s32(255)); }));
    }
  }
  for (int p = 0; p < Parts; ++p) starts[p] = -128 * sums[p];
  return s.scale;
}

// ---- products -------------------------------------------------------------------------------------------------------

#if defined(__ARM_FEATURE_DOTPROD)
#define KVCACHE_DOT_PRODUCTS
#else
#define KVCACHE_DOT_PRODUCTS [[gnu::target("arch=armv8.2-a+dotprod")]]
#endif

// sum[i] += bytes 4i to 4i + 3 of a line times bytes 4 * Lane to 4 * Lane + 3 of the left operand
struct signed_bytes {
  using line = int8x16_t;
  using left = int8x16_t;

  KVCACHE_DOT_PRODUCTS [[gnu::always_inline]] static line load(const std::int8_t* p) { return vld1q_s8(p); }
  KVCACHE_DOT_PRODUCTS [[gnu::always_inline]] static left load_left(const std::int8_t* p) {
    return vld1q_s8(p);
  }
  template <int Lane>
  KVCACHE_DOT_PRODUCTS [[gnu::always_inline]] static int32x4_t add(int32x4_t sum, line a, left b) {
    return vdotq_laneq_s32(sum, a, b, Lane);
  }
};
struct unsigned_bytes {  // lines are signed in memory
  using line = uint8x16_t;
  using left = uint8x16_t;

  KVCACHE_DOT_PRODUCTS [[gnu::always_inline]] static line load(const std::int8_t* p) {
    return veorq_u8(vreinterpretq_u8_s8(vld1q_s8(p)), vdupq_n_u8(128));
  }
  KVCACHE_DOT_PRODUCTS [[gnu::always_inline]] static left load_left(const std::int8_t* p) {
    return vreinterpretq_u8_s8(vld1q_s8(p));
  }
  template <int Lane>
  KVCACHE_DOT_PRODUCTS [[gnu::always_inline]] static int32x4_t add(int32x4_t sum, line a, left b) {
    return vreinterpretq_s32_u32(vdotq_laneq_u32(vreinterpretq_u32_s32(sum), a, b, Lane));
  }
};

/// Rows of bytes, four for each line of a block; readable up to a multiple of 16.
struct left_bytes {
  const std::int8_t* at;
  index_t row_bytes;
  index_t part_bytes;
};

/// Rows times parts: their 16 accumulators, operands and a line take 24 of the 32 registers.
inline constexpr int max_streams = 4;

template <class Bytes, int Lane, int Streams>
KVCACHE_DOT_PRODUCTS [[gnu::always_inline]] inline void add_line(const std::int8_t* line,
                                                                 const typename Bytes::left (&left)[Streams],
                                                                 int32x4_t (&sum)[Streams][4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto right = Bytes::load(line + 16 * i);
#pragma GCC unroll 4
    for (int s = 0; s < Streams; ++s) sum[s][i] = Bytes::template add<Lane>(sum[s][i], right, left[s]);
  }
}

/// sum[r * Parts + p] += part p of row r times lines that are `stride` bytes apart.
/// \param ahead  of which a line is fetched for each one here, where its stride is not 0
template <class Bytes, int Parts, int Rows>
KVCACHE_DOT_PRODUCTS inline void add_lines(left_bytes left, const std::int8_t* line, index_t stride,
                                           index_t num_lines, read_ahead& ahead,
                                           int32x4_t (&sums)[Rows * Parts][4]) {
  constexpr int streams = Rows * Parts;
  read_ahead next = ahead;
  int32x4_t sum[streams][4];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * streams; ++i) sum[i / 4][i % 4] = sums[i / 4][i % 4];
  for (; num_lines > 0; num_lines -= 4, line += 4 * stride, left.at += 16) {
    typename Bytes::left four[streams];
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s)
      four[s] = Bytes::load_left(left.at + s / Parts * left.row_bytes + s % Parts * left.part_bytes);
    if (next.stride != 0) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, next.at += next.stride) __builtin_prefetch(next.at, 0, 2);
    }
    add_line<Bytes, 0>(line, four, sum);
    if (num_lines > 1) add_line<Bytes, 1>(line + stride, four, sum);
    if (num_lines > 2) add_line<Bytes, 2>(line + 2 * stride, four, sum);
    if (num_lines > 3) add_line<Bytes, 3>(line + 3 * stride, four, sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4 * streams; ++i) sums[i / 4][i % 4] = sum[i / 4][i % 4];
  ahead = next;
}

#undef KVCACHE_DOT_PRODUCTS

/// high << Shift | low, or the only part.
template <int Parts, int Shift>
KVCACHE_INLINE vec joined(const int32x4_t (&high)[4], const int32x4_t (&low)[4]) {
  return each([&](int i) {
    return vcvtq_f32_s32(Parts == 1 ? high[i] : vaddq_s32(vshlq_n_s32(high[i], Shift), low[i]));
  });
}

// ---- scores ---------------------------------------------------------------------------------------------------------

/// One group of 16 keys for as many times `Rows` rows as there are, then for fewer.
template <int Parts, int Rows>
KVCACHE_TARGET inline void score_whole_rows(const block_geometry& g, const std::int8_t* keys,
                                            const bfloat16* scales, const float* prepared, index_t num_rows,
                                            float* out, read_ahead& ahead) {
  const index_t row_floats = prepared_query_floats(g.head_dim);
  for (; num_rows >= Rows; num_rows -= Rows, prepared += Rows * row_floats, out += Rows * g.block_size) {
    int32x4_t sum[Rows * Parts][4];
#pragma GCC unroll 4
    for (auto& stream : sum) {
#pragma GCC unroll 4
      for (int32x4_t& s : stream) s = vdupq_n_s32(0);
    }
    const auto* bytes = reinterpret_cast<const std::int8_t*>(prepared + prepared_head_floats);
    add_lines<signed_bytes, Parts, Rows>(
        {bytes, row_floats * index_t{sizeof(float)}, round_up(g.head_dim, key_lanes)}, keys, 64,
        block_order<std::int8_t>::key_packs(g), ahead, sum);
    const vec key_scale = widen_low(load_low_halves(scales));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const vec whole =
          joined<Parts, byte_split<Parts>::query_shift>(sum[r * Parts], sum[r * Parts + Parts - 1]);
      store(out + r * g.block_size, mul(whole, mul(key_scale, broadcast(prepared[r * row_floats]))));
    }
  }
  if constexpr (Rows > 1) score_whole_rows<Parts, Rows / 2>(g, keys, scales, prepared, num_rows, out, ahead);
}

template <int Parts>
KVCACHE_TARGET inline void scores_whole(const block_geometry& g, const std::byte* keys,
                                        const bfloat16* scales, index_t count, const float* prepared,
                                        index_t num_rows, float* out, const upcoming& next) {
  constexpr int rows = max_streams / Parts;
  const auto* group = reinterpret_cast<const std::int8_t*>(keys);
  read_ahead ahead = ahead_of(next, keys, num_row_tiles(num_rows, rows));
  for (index_t t = 0; t < count; t += key_lanes, group += block_order<std::int8_t>::key_group_size(g))
    score_whole_rows<Parts, rows>(g, group, scales + t, prepared, num_rows, out + t, ahead);
}

// ---- sums -----------------------------------------------------------------------------------------------------------

/// Values of up to 64 tokens: `num_packs` times four, `stride` bytes apart.
struct value_bytes {
  const std::int8_t* at;
  index_t stride;
  index_t num_packs;
};

/// 16 dims.
template <int Parts, int Rows>
KVCACHE_INLINE void sum_whole(const value_bytes& v, const weight_bytes<Parts, Rows>& w, float* sums,
                              index_t sum_stride, read_ahead& ahead) {
  int32x4_t sum[Rows * Parts][4];
#pragma GCC unroll 4
  for (int s = 0; s < Rows * Parts; ++s) {
#pragma GCC unroll 4
    for (int32x4_t& x : sum[s]) x = vdupq_n_s32(w.starts[s / Parts][s % Parts]);
  }
  add_lines<unsigned_bytes, Parts, Rows>({w.bytes[0][0], Parts * sum_tokens, sum_tokens}, v.at, v.stride,
                                         v.num_packs, ahead, sum);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    float* to = sums + r * sum_stride;
    const vec whole =
        joined<Parts, byte_split<Parts>::weight_shift>(sum[r * Parts], sum[r * Parts + Parts - 1]);
    store(to, fma(whole, broadcast(w.scales[r]), load(to)));
  }
}

/// The last dims, on a copy: what follows in memory is not theirs.
template <int Parts, int Rows>
KVCACHE_TARGET inline void sum_last_whole(const value_bytes& v, index_t num_dims,
                                          const weight_bytes<Parts, Rows>& w, float* sums,
                                          index_t sum_stride) {
  alignas(64) std::array<std::int8_t, sum_tokens / 4 * 64> padded{};
  for (index_t p = 0; p < v.num_packs; ++p)
    std::copy_n(v.at + p * v.stride, 4 * num_dims, &padded[static_cast<std::size_t>(64 * p)]);
  alignas(64) std::array<float, Rows * key_lanes> last{};
  read_ahead nothing = ahead_of(nullptr, reinterpret_cast<const std::byte*>(padded.data()), 1);
  sum_whole<Parts, Rows>({padded.data(), 64, v.num_packs}, w, last.data(), key_lanes, nothing);
  for (index_t r = 0; r < Rows; ++r) {
    for (index_t i = 0; i < num_dims; ++i)
      sums[r * sum_stride + i] += last[static_cast<std::size_t>(r * key_lanes + i)];
  }
}

/// Up to 64 tokens for as many times `Rows` rows as there are, then for fewer.
template <int Parts, int Rows>
KVCACHE_TARGET inline void sum_whole_rows(const block_geometry& g, const value_bytes& v,
                                          const bfloat16* scales, index_t count, const float* weights,
                                          index_t num_rows, float* sums, read_ahead& ahead) {
  for (; num_rows >= Rows; num_rows -= Rows, weights += Rows * g.block_size, sums += Rows * g.head_dim) {
    weight_bytes<Parts, Rows> w;
    for (int r = 0; r < Rows; ++r)
      w.scales[r] = split_weights<Parts>(weights + r * g.block_size, scales, count, w.bytes[r], w.starts[r]);
    value_bytes here = v;
    index_t d = 0;
    for (; d + key_lanes <= g.head_dim; d += key_lanes, here.at += 4 * key_lanes)
      sum_whole<Parts, Rows>(here, w, sums + d, g.head_dim, ahead);
    if (d < g.head_dim) sum_last_whole<Parts, Rows>(here, g.head_dim - d, w, sums + d, g.head_dim);
  }
  if constexpr (Rows > 1)
    sum_whole_rows<Parts, Rows / 2>(g, v, scales, count, weights, num_rows, sums, ahead);
}

template <int Parts>
KVCACHE_TARGET inline void accumulate_whole(const block_geometry& g, const std::byte* values,
                                            const bfloat16* scales, index_t count, const float* weights,
                                            index_t num_rows, float* sums, const upcoming& next) {
  constexpr int rows = max_streams / Parts;
  read_ahead ahead = ahead_of(next, values, num_row_tiles(num_rows, rows));
  for (index_t t = 0; t < count; t += sum_tokens) {
    const index_t num_tokens = std::min(sum_tokens, count - t);
    const auto* bytes = reinterpret_cast<const std::int8_t*>(values) + t * g.head_dim;
    sum_whole_rows<Parts, rows>(g, {bytes, 4 * g.head_dim, ceil_div(num_tokens, 4)}, scales + t, num_tokens,
                                weights + t, num_rows, sums, ahead);
  }
}

// ---- integers or floats ---------------------------------------------------------------------------------------------

template <int Parts>
inline void prepare_best(index_t head_dim, const float* queries, index_t num_rows, float* prepared) {
  (has_dot_products() ? prepare_whole<Parts> : portable::prepare)(head_dim, queries, num_rows, prepared);
}
template <int Parts>
inline void scores_best(const block_geometry& g, const std::byte* keys, const bfloat16* scales, index_t count,
                        const float* prepared, index_t num_rows, float* out, const upcoming& next) {
  (has_dot_products() ? scores_whole<Parts> : scores_int8)(g, keys, scales, count, prepared, num_rows, out,
                                                           next);
}
template <int Parts>
inline void accumulate_best(const block_geometry& g, const std::byte* values, const bfloat16* scales,
                            index_t count, const float* weights, index_t num_rows, float* sums,
                            const upcoming& next) {
  (has_dot_products() ? accumulate_whole<Parts> : accumulate_int8)(g, values, scales, count, weights,
                                                                   num_rows, sums, next);
}

template <int Parts>
inline constexpr int8_kernels kernels_for_bytes = {
    largest, put_key, put_value, prepare_best<Parts>, scores_best<Parts>, accumulate_best<Parts>};

#endif
