// SPDX-License-Identifier: MIT
// Blocks of bytes multiplied as they are, by the integer dot products of AVX-512 VNNI; included by avx512.hpp. The
// instruction takes unsigned times signed bytes and adds four products to a 32-bit lane: exact, so nothing here depends
// on an order. Queries and weights are one or two bytes, see avx512_bytes.inl.
//
//   scores   key + 128 (unsigned) * query, less 128 * sum of the query
//   sums     weight (unsigned) * value

// ---- scores ---------------------------------------------------------------------------------------------------------

template <int Parts, int Rows, int Groups>
KVCACHE_TARGET inline void score_bytes(const block_geometry& g, const std::int8_t* keys,
                                       const bfloat16* scales, const float* prepared, float* out,
                                       read_ahead& ahead) {
  const index_t group_size = block_order<std::int8_t>::key_group_size(g);
  const index_t row_floats = prepared_query_floats(g.head_dim);
  const index_t part_words = round_up_16(g.head_dim) / 4;
  read_ahead next = ahead;
  score_sums<Rows, Groups, Parts> sums;
  sums.start(prepared, row_floats);
  row_column<Rows> queries(prepared + prepared_head_floats, row_floats);
  for (index_t d = 0; d < g.head_dim; d += 4, keys += 64, queries.go_on(1)) {
    if (next.stride != 0) fetch<Groups>(next);
    __m512i k[Groups];
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i)
      k[i] = _mm512_xor_si512(_mm512_loadu_si512(keys + i * group_size), _mm512_set1_epi8(-128));
    sums.add(k, queries, 0, part_words);
  }
  ahead = next;
  sums.finish(scales, prepared, row_floats, out, g.block_size);
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
                                       const upcoming& next) {
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
  value_sums<Rows, Chunks, Parts> sum;
  sum.start();
  for (index_t t = 0; t < 4 * v.num_packs; t += 4, v.at += v.stride) {
    if (next.stride != 0) fetch<Chunks>(next);
    __m512i x[Chunks];
#pragma GCC unroll 4
    for (int c = 0; c < Chunks; ++c) x[c] = _mm512_loadu_si512(v.at + 64 * c);
    sum.add(x, w, t);
  }
  ahead = next;
  sum.finish(w, sums, sum_stride);
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
                                           index_t num_rows, float* sums, const upcoming& next) {
  read_ahead ahead = ahead_of(next, values, num_row_tiles(num_rows, 4));
  for (index_t t = 0; t < count; t += sum_tokens)
    sum_byte_rows<Parts, 4>(g, values + t * g.head_dim, scales + t, std::min(sum_tokens, count - t),
                            weights + t, num_rows, sums, ahead);
}

template <int Parts>
inline constexpr int8_kernels kernels_for_bytes = {largest,
                                                   put_key,
                                                   put_value,
                                                   prepare_vnni<Parts>,
                                                   scores_vnni<Parts>,
                                                   accumulate_vnni<Parts>,
                                                   Parts == 1 ? prepare_folded : nullptr};
