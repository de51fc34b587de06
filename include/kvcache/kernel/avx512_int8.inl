// SPDX-License-Identifier: MIT
// Blocks of bytes multiplied as they are, by the integer dot products of AVX-512 VNNI; included by avx512.hpp. The
// instruction takes unsigned times signed bytes and adds four products to a 32-bit lane: exact, so nothing here depends
// on an order. Queries and weights are one or two bytes, see avx512_bytes.inl.
//
//   scores   key + 128 (unsigned) * query, less 128 * sum of the query
//   sums     weight (unsigned) * value

// ---- scores ---------------------------------------------------------------------------------------------------------

/// Typed, because g++ 12 copies accumulators of type __m512i around in a loop.
using words [[gnu::vector_size(64)]] = std::int32_t;

KVCACHE_INLINE words same_words(std::int32_t x) { return reinterpret_cast<words>(_mm512_set1_epi32(x)); }
KVCACHE_INLINE void add_products(words& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  sum = reinterpret_cast<words>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), unsigned_bytes, signed_bytes));
}

/// high << shift | low, or the only part.
template <int Parts>
KVCACHE_INLINE __m512i joined(const words& high, const words& low, unsigned shift) {
  if constexpr (Parts == 1) {
    return reinterpret_cast<__m512i>(high);
  } else {
    return reinterpret_cast<__m512i>((high << static_cast<int>(shift)) + low);
  }
}

/// Registers hold 16 accumulators, their operands and addresses.
constexpr int byte_tile_width(int streams) { return streams >= 8 ? 2 : 4; }

template <int Parts, int Rows, int Groups>
KVCACHE_TARGET inline void score_bytes(const block_geometry& g, const std::int8_t* keys,
                                       const bfloat16* scales, const float* prepared, float* out,
                                       read_ahead& ahead) {
  const index_t group_size = block_order<std::int8_t>::key_group_size(g);
  const index_t row_floats = prepared_query_floats(g.head_dim);
  const index_t part_bytes = round_up_16(g.head_dim);
  prepared_head head[Rows];
  read_ahead next = ahead;
  words sum[Rows][Parts][Groups];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    std::memcpy(&head[r], prepared + r * row_floats, sizeof(prepared_head));
#pragma GCC unroll 16
    for (int i = 0; i < Groups * Parts; ++i)
      sum[r][i / Groups][i % Groups] = same_words(head[r].starts[i / Groups]);
  }
  const auto* query = reinterpret_cast<const std::int8_t*>(prepared + prepared_head_floats);
  const index_t row_bytes = row_floats * index_t{sizeof(float)};
  for (index_t d = 0; d < g.head_dim; d += 4, keys += 64, query += 4) {
    if (next.stride != 0) fetch<Groups>(next);
    __m512i k[Groups];
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i)
      k[i] = _mm512_xor_si512(_mm512_loadu_si512(keys + i * group_size), _mm512_set1_epi8(-128));
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < Parts; ++p) {
        const __m512i q = four_bytes(query + r * row_bytes + p * part_bytes);
#pragma GCC unroll 16
        for (int i = 0; i < Groups; ++i) add_products(sum[r][p][i], k[i], q);
      }
    }
  }
  ahead = next;
#pragma GCC unroll 16
  for (int i = 0; i < Groups; ++i) {
    const vec key_scale = widen_low(load_low_halves(scales + i * key_lanes));
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512i whole = joined<Parts>(sum[r][0][i], sum[r][Parts - 1][i], byte_split<Parts>::query_shift);
      store(out + r * g.block_size + i * key_lanes,
            fma(to_floats(whole), mul(key_scale, broadcast(head[r].scale)), broadcast(head[r].constant)));
    }
  }
}

/// Slots [t, count), `Groups` groups at a time, then fewer.
template <int Parts, int Rows, int Groups>
KVCACHE_TARGET inline void score_byte_groups(const block_geometry& g, const std::int8_t* keys,
                                             const bfloat16* scales, index_t count, const float* prepared,
                                             float* out, read_ahead& ahead) {
  for (; count > (Groups - 1) * key_lanes; count -= Groups * key_lanes) {
    score_bytes<Parts, Rows, Groups>(g, keys, scales, prepared, out, ahead);
    keys += Groups * block_order<std::int8_t>::key_group_size(g);
    scales += Groups * key_lanes;
    out += Groups * key_lanes;
  }
  if constexpr (Groups > 1)
    score_byte_groups<Parts, Rows, Groups / 2>(g, keys, scales, count, prepared, out, ahead);
}

/// As many times `Rows` rows as there are, then fewer.
template <int Parts, int Rows>
KVCACHE_TARGET inline void score_byte_rows(const block_geometry& g, const std::int8_t* keys,
                                           const bfloat16* scales, index_t count, const float* prepared,
                                           index_t num_rows, float* out, read_ahead& ahead) {
  for (; num_rows >= Rows; num_rows -= Rows, out += Rows * g.block_size) {
    score_byte_groups<Parts, Rows, byte_tile_width(Rows * Parts)>(g, keys, scales, count, prepared, out,
                                                                  ahead);
    prepared += Rows * prepared_query_floats(g.head_dim);
  }
  if constexpr (Rows > 1)
    score_byte_rows<Parts, Rows / 2>(g, keys, scales, count, prepared, num_rows, out, ahead);
}

template <int Parts>
KVCACHE_TARGET inline void scores_vnni(const block_geometry& g, const std::byte* keys, const bfloat16* scales,
                                       index_t count, const float* prepared, index_t num_rows, float* out,
                                       const std::byte* next) {
  read_ahead ahead = ahead_of(next, keys, num_row_tiles(num_rows, 4));
  score_byte_rows<Parts, 4>(g, reinterpret_cast<const std::int8_t*>(keys), scales, count, prepared, num_rows,
                            out, ahead);
}

// ---- sums -----------------------------------------------------------------------------------------------------------

/// Values of up to 64 tokens: `num_packs` times four, `stride` bytes apart.
struct value_bytes {
  const std::int8_t* at;
  index_t stride;
  index_t num_packs;
};

/// 16 * Chunks dims.
template <int Parts, int Rows, int Chunks>
KVCACHE_INLINE void sum_bytes(value_bytes v, const weight_bytes<Parts, Rows>& w, float* sums,
                              index_t sum_stride, read_ahead& ahead) {
  read_ahead next = ahead;
  words sum[Rows][Parts][Chunks];
#pragma GCC unroll 16
  for (auto& row : sum) {
#pragma GCC unroll 16
    for (int i = 0; i < Parts * Chunks; ++i) row[i / Chunks][i % Chunks] = same_words(0);
  }
  for (index_t t = 0; t < 4 * v.num_packs; t += 4, v.at += v.stride) {
    if (next.stride != 0) fetch<Chunks>(next);
    __m512i x[Chunks];
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) x[c] = _mm512_loadu_si512(v.at + 64 * c);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < Parts; ++p) {
        const __m512i weight = four_bytes(&w.bytes[r][p][t]);
#pragma GCC unroll 16
        for (int c = 0; c < Chunks; ++c) add_products(sum[r][p][c], weight, x[c]);
      }
    }
  }
  ahead = next;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const vec scale = broadcast(w.scales[r]);
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) {
      float* to = sums + r * sum_stride + c * key_lanes;
      const __m512i whole =
          joined<Parts>(sum[r][0][c], sum[r][Parts - 1][c], byte_split<Parts>::weight_shift);
      store(to, fma(to_floats(whole), scale, load(to)));
    }
  }
}

/// The last dims, on a copy: what follows in memory is not theirs.
template <int Parts, int Rows>
KVCACHE_TARGET inline void sum_last_bytes(const value_bytes& v, index_t num_dims,
                                          const weight_bytes<Parts, Rows>& w, float* sums,
                                          index_t sum_stride) {
  alignas(64) std::array<std::int8_t, sum_tokens / 4 * 64> padded{};
  for (index_t p = 0; p < v.num_packs; ++p)
    std::copy_n(v.at + p * v.stride, 4 * num_dims, &padded[static_cast<std::size_t>(64 * p)]);
  alignas(64) std::array<float, Rows * key_lanes> last{};
  read_ahead nothing = ahead_of(nullptr, reinterpret_cast<const std::byte*>(padded.data()), 1);
  sum_bytes<Parts, Rows, 1>({padded.data(), 64, v.num_packs}, w, last.data(), key_lanes, nothing);
  for (index_t r = 0; r < Rows; ++r) {
    for (index_t i = 0; i < num_dims; ++i)
      sums[r * sum_stride + i] += last[static_cast<std::size_t>(r * key_lanes + i)];
  }
}

/// Dims [0, num_dims) in tiles of 16 * Chunks, then in smaller ones.
template <int Parts, int Rows, int Chunks>
KVCACHE_TARGET inline void sum_byte_dims(value_bytes v, index_t num_dims, const weight_bytes<Parts, Rows>& w,
                                         float* sums, index_t sum_stride, read_ahead& ahead) {
  constexpr index_t width = Chunks * key_lanes;
  for (; num_dims >= width; num_dims -= width, v.at += 4 * width, sums += width)
    sum_bytes<Parts, Rows, Chunks>(v, w, sums, sum_stride, ahead);
  if constexpr (Chunks > 1) {
    sum_byte_dims<Parts, Rows, Chunks / 2>(v, num_dims, w, sums, sum_stride, ahead);
  } else if (num_dims > 0) {
    sum_last_bytes(v, num_dims, w, sums, sum_stride);
  }
}

/// Up to 64 tokens for as many times `Rows` rows as there are, then for fewer.
template <int Parts, int Rows>
KVCACHE_TARGET inline void sum_byte_rows(const block_geometry& g, const std::byte* values,
                                         const bfloat16* scales, index_t count, const float* weights,
                                         index_t num_rows, float* sums, read_ahead& ahead) {
  for (; num_rows >= Rows; num_rows -= Rows, weights += Rows * g.block_size, sums += Rows * g.head_dim) {
    weight_bytes<Parts, Rows> w;
    split_weights(weights, g.block_size, scales, count, w);
    const auto* bytes = reinterpret_cast<const std::int8_t*>(values);
    sum_byte_dims<Parts, Rows, byte_tile_width(Rows * Parts)>({bytes, 4 * g.head_dim, ceil_div(count, 4)},
                                                              g.head_dim, w, sums, g.head_dim, ahead);
  }
  if constexpr (Rows > 1)
    sum_byte_rows<Parts, Rows / 2>(g, values, scales, count, weights, num_rows, sums, ahead);
}

template <int Parts>
KVCACHE_TARGET inline void accumulate_vnni(const block_geometry& g, const std::byte* values,
                                           const bfloat16* scales, index_t count, const float* weights,
                                           index_t num_rows, float* sums, const std::byte* next) {
  read_ahead ahead = ahead_of(next, values, num_row_tiles(num_rows, 4));
  for (index_t t = 0; t < count; t += sum_tokens)
    sum_byte_rows<Parts, 4>(g, values + t * g.head_dim, scales + t, std::min(sum_tokens, count - t),
                            weights + t, num_rows, sums, ahead);
}

template <int Parts>
inline constexpr int8_kernels kernels_for_bytes = {largest,
                                                   quantize,
                                                   prepare_vnni<Parts>,
                                                   scores_vnni<Parts>,
                                                   accumulate_vnni<Parts>,
                                                   Parts == 1 ? prepare_folded : nullptr};
