// SPDX-License-Identifier: MIT
// Blocks of bytes multiplied as they are, by the integer dot products of AVX-512 VNNI; included by avx512.hpp. The
// instruction takes unsigned times signed bytes and adds four products to a 32-bit lane: exact, so nothing here depends
// on an order.
//
//   scores   key + 128 (unsigned) * query, less 128 * sum of the query      query: two signed bytes, 128 * high + low
//   sums     weight (unsigned) * value                                      weight: two unsigned bytes, 256 * high + low

/// Rows of floats as two rows of bytes each; number = scale * (base * high + low).
template <index_t MaxRows, index_t MaxColumns>
struct byte_rows {
  alignas(64) std::array<std::int8_t, MaxRows * 2 * MaxColumns> bytes;  // [row][high, low][MaxColumns]
  float scales[MaxRows];
  std::int32_t starts[2 * MaxRows];  // of the accumulators of high and low

  [[nodiscard]] std::int8_t* at(index_t row, index_t part) noexcept {
    return &bytes[static_cast<std::size_t>((2 * row + part) * MaxColumns)];
  }
};

KVCACHE_INLINE void store_narrowed(std::int8_t* p, __m512i words) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(all, words));
}
KVCACHE_INLINE std::int32_t sum_of_words(__m512i a) {
  alignas(64) std::array<std::int32_t, 16> lane;
  _mm512_store_si512(lane.data(), a);
  std::int32_t sum = 0;
  for (const std::int32_t x : lane) sum += x;
  return sum;
}
KVCACHE_INLINE __m512i four_bytes(const std::int8_t* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}
KVCACHE_INLINE vec to_floats(__m512i words) { return {_mm512_maskz_cvtepi32_ps(all, words)}; }

/// One query, zeros up to a multiple of 16. A row that is not finite gets a scale that is not.
template <class Rows>
KVCACHE_TARGET inline void split_query(const float* query, index_t head_dim, index_t row, Rows& out) {
  constexpr float largest_integer = 127 * 128;
  const float size = largest(query, head_dim);
  const float scale = size / largest_integer;
  out.scales[row] = scale;
  __m512i sum_high = _mm512_setzero_si512();
  __m512i sum_low = _mm512_setzero_si512();
  for (index_t d = 0; d < head_dim; d += key_lanes) {
    const vec x = scale > 0.0F ? div(load_first(query + d, head_dim - d), broadcast(scale)) : zero();
    const __m512i whole = _mm512_maskz_cvtps_epi32(all, x.x);
    const __m512i high = _mm512_maskz_srai_epi32(all, _mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
    const __m512i low = _mm512_sub_epi32(whole, _mm512_maskz_slli_epi32(all, high, 7));
    store_narrowed(out.at(row, 0) + d, high);
    store_narrowed(out.at(row, 1) + d, low);
    sum_high = _mm512_add_epi32(sum_high, high);
    sum_low = _mm512_add_epi32(sum_low, low);
  }
  out.starts[2 * row] = -128 * sum_of_words(sum_high);
  out.starts[2 * row + 1] = -128 * sum_of_words(sum_low);
}

using query_bytes = byte_rows<4, max_head_dim>;

template <int Rows, int Groups>
KVCACHE_TARGET inline void score_bytes(const block_geometry& g, const std::int8_t* keys,
                                       const bfloat16* scales, query_bytes& q, float* out,
                                       read_ahead& ahead) {
  const index_t group_size = block_order<std::int8_t>::key_group_size(g);
  read_ahead next = ahead;
  __m512i sum[Rows][2][Groups];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i) {
      sum[r][0][i] = _mm512_set1_epi32(q.starts[2 * r]);
      sum[r][1][i] = _mm512_set1_epi32(q.starts[2 * r + 1]);
    }
  }
  for (index_t d = 0; d < g.head_dim; d += 4, keys += 64) {
    fetch<Groups>(next);
    __m512i k[Groups];
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i)
      k[i] = _mm512_xor_si512(_mm512_loadu_si512(keys + i * group_size), _mm512_set1_epi8(-128));
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512i high = four_bytes(q.at(r, 0) + d);
      const __m512i low = four_bytes(q.at(r, 1) + d);
#pragma GCC unroll 16
      for (int i = 0; i < Groups; ++i) {
        sum[r][0][i] = _mm512_dpbusd_epi32(sum[r][0][i], k[i], high);
        sum[r][1][i] = _mm512_dpbusd_epi32(sum[r][1][i], k[i], low);
      }
    }
  }
  ahead = next;
#pragma GCC unroll 16
  for (int i = 0; i < Groups; ++i) {
    const vec key_scale = widen_low(load_low_halves(scales + i * key_lanes));
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512i whole = _mm512_add_epi32(_mm512_maskz_slli_epi32(all, sum[r][0][i], 7), sum[r][1][i]);
      const vec scale = mul(key_scale, broadcast(q.scales[r]));
      store(out + r * g.block_size + i * key_lanes, mul(to_floats(whole), scale));
    }
  }
}

template <int Rows>
KVCACHE_TARGET inline void score_byte_rows(const block_geometry& g, const std::int8_t* keys,
                                           const bfloat16* scales, index_t count, const float* queries,
                                           float* out, read_ahead& ahead) {
  query_bytes q;
  for (index_t r = 0; r < Rows; ++r) split_query(queries + r * g.head_dim, g.head_dim, r, q);
  const index_t group_size = block_order<std::int8_t>::key_group_size(g);
  index_t t = 0;
  for (; t + key_lanes < count; t += 2 * key_lanes, keys += 2 * group_size)
    score_bytes<Rows, 2>(g, keys, scales + t, q, out + t, ahead);
  if (t < count) score_bytes<Rows, 1>(g, keys, scales + t, q, out + t, ahead);
}

KVCACHE_TARGET inline void scores_vnni(const block_geometry& g, const std::byte* keys, const bfloat16* scales,
                                       index_t count, const float* queries, index_t num_rows, float* out,
                                       const std::byte* next) {
  const auto* bytes = reinterpret_cast<const std::int8_t*>(keys);
  read_ahead ahead = ahead_of(next, keys, num_row_tiles(num_rows, 4));
  index_t r = 0;
  for (; r + 4 <= num_rows; r += 4)
    score_byte_rows<4>(g, bytes, scales, count, queries + r * g.head_dim, out + r * g.block_size, ahead);
  for (; r < num_rows; ++r)
    score_byte_rows<1>(g, bytes, scales, count, queries + r * g.head_dim, out + r * g.block_size, ahead);
}

using weight_bytes = byte_rows<4, sum_tokens>;

/// Up to 64 weights times the scales of their tokens.
KVCACHE_TARGET inline void split_weights(const float* weights, const bfloat16* scales, index_t count,
                                         index_t row, weight_bytes& out) {
  constexpr float largest_integer = 65280;  // 255 * 256
  vec w[sum_tokens / key_lanes];
  vec most = zero();
#pragma GCC unroll 4
  for (index_t i = 0; i < sum_tokens / key_lanes; ++i) {
    w[i] = i * key_lanes < count ? scaled_weights(weights + i * key_lanes, scales + i * key_lanes) : zero();
    most = larger(most, w[i]);
  }
  // NaN among the weights is not larger than anything: it has to be asked for.
  const vec all_weights = add(add(w[0], w[1]), add(w[2], w[3]));
  const float size =
      largest_of(most) + (all_finite(all_weights) ? 0.0F : std::numeric_limits<float>::quiet_NaN());
  const float scale = size / largest_integer;
  out.scales[row] = scale;
#pragma GCC unroll 4
  for (index_t i = 0; i < sum_tokens / key_lanes; ++i) {
    const vec x = scale > 0.0F ? div(w[i], broadcast(scale)) : zero();
    const __m512i whole = _mm512_maskz_cvtps_epi32(all, x.x);
    store_narrowed(out.at(row, 0) + i * key_lanes, _mm512_maskz_srli_epi32(all, whole, 8));
    store_narrowed(out.at(row, 1) + i * key_lanes, _mm512_and_si512(whole, _mm512_set1_epi32(255)));
  }
}

/// 16 * Chunks dims of `num_packs` times four tokens.
template <int Rows, int Chunks>
KVCACHE_TARGET inline void sum_bytes(const std::int8_t* values, index_t stride, index_t num_packs,
                                     weight_bytes& w, float* sums, index_t sum_stride, read_ahead& ahead) {
  read_ahead next = ahead;
  __m512i sum[Rows][2][Chunks];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) sum[r][0][c] = sum[r][1][c] = _mm512_setzero_si512();
  }
  for (index_t p = 0; p < num_packs; ++p, values += stride) {
    fetch<Chunks>(next);
    __m512i v[Chunks];
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) v[c] = _mm512_loadu_si512(values + 64 * c);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512i high = four_bytes(w.at(r, 0) + 4 * p);
      const __m512i low = four_bytes(w.at(r, 1) + 4 * p);
#pragma GCC unroll 16
      for (int c = 0; c < Chunks; ++c) {
        sum[r][0][c] = _mm512_dpbusd_epi32(sum[r][0][c], high, v[c]);
        sum[r][1][c] = _mm512_dpbusd_epi32(sum[r][1][c], low, v[c]);
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
      const __m512i whole = _mm512_add_epi32(_mm512_maskz_slli_epi32(all, sum[r][0][c], 8), sum[r][1][c]);
      store(to, fma(to_floats(whole), scale, load(to)));
    }
  }
}

/// The values of up to 64 tokens for `Rows` rows.
template <int Rows>
KVCACHE_TARGET inline void sum_byte_rows(const block_geometry& g, const std::int8_t* values,
                                         index_t num_packs, weight_bytes& w, float* sums, read_ahead& ahead) {
  const index_t stride = 4 * g.head_dim;
  index_t d = 0;
  for (; d + 2 * key_lanes <= g.head_dim; d += 2 * key_lanes)
    sum_bytes<Rows, 2>(values + 4 * d, stride, num_packs, w, sums + d, g.head_dim, ahead);
  for (; d + key_lanes <= g.head_dim; d += key_lanes)
    sum_bytes<Rows, 1>(values + 4 * d, stride, num_packs, w, sums + d, g.head_dim, ahead);
  const index_t num_dims = g.head_dim - d;
  if (num_dims == 0) return;
  // the last dims, on a copy: what follows in memory is not theirs
  alignas(64) std::array<std::int8_t, sum_tokens / 4 * 64> padded{};
  for (index_t p = 0; p < num_packs; ++p)
    std::copy_n(values + p * stride + 4 * d, 4 * num_dims, &padded[static_cast<std::size_t>(64 * p)]);
  alignas(64) std::array<float, Rows * key_lanes> last{};
  read_ahead nothing = ahead_of(nullptr, reinterpret_cast<const std::byte*>(padded.data()), 1);
  sum_bytes<Rows, 1>(padded.data(), 64, num_packs, w, last.data(), key_lanes, nothing);
  for (index_t r = 0; r < Rows; ++r) {
    for (index_t i = 0; i < num_dims; ++i)
      sums[r * g.head_dim + d + i] += last[static_cast<std::size_t>(r * key_lanes + i)];
  }
}

KVCACHE_TARGET inline void accumulate_vnni(const block_geometry& g, const std::byte* values,
                                           const bfloat16* scales, index_t count, const float* weights,
                                           index_t num_rows, float* sums, const std::byte* next) {
  read_ahead ahead = ahead_of(next, values, num_row_tiles(num_rows, 4));
  for (index_t t = 0; t < count; t += sum_tokens) {
    const auto* bytes = reinterpret_cast<const std::int8_t*>(values) + t * g.head_dim;
    const index_t num_tokens = std::min(sum_tokens, count - t);
    for (index_t first = 0; first < num_rows; first += 4) {
      const index_t rows = std::min(index_t{4}, num_rows - first);
      weight_bytes w;
      for (index_t r = 0; r < rows; ++r)
        split_weights(weights + (first + r) * g.block_size + t, scales + t, num_tokens, r, w);
      float* to = sums + first * g.head_dim;
      if (rows == 4) sum_byte_rows<4>(g, bytes, ceil_div(num_tokens, 4), w, to, ahead);
      if (rows == 3) sum_byte_rows<3>(g, bytes, ceil_div(num_tokens, 4), w, to, ahead);
      if (rows == 2) sum_byte_rows<2>(g, bytes, ceil_div(num_tokens, 4), w, to, ahead);
      if (rows == 1) sum_byte_rows<1>(g, bytes, ceil_div(num_tokens, 4), w, to, ahead);
    }
  }
}
