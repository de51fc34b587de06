// SPDX-License-Identifier: MIT
// Queries times the scales of a block's channels as bytes, in one go: it happens in every block. Included by avx512.hpp.
//
//   prepared   as prepare_vnni<1> makes it of queries[r, d] * scales[d]; the head's constant is sum_d queries[r, d] * offsets[d]

/// The low 16 bits of the words of two vectors, in order.
KVCACHE_INLINE __m512i low_halves(__m512 a, __m512 b) {
  alignas(64) static constexpr auto even = [] {
    std::array<std::int16_t, 32> halves{};
    for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::int16_t>(2 * i);
    return halves;
  }();
  return _mm512_permutex2var_epi16(_mm512_castps_si512(a), _mm512_load_si512(even.data()),
                                   _mm512_castps_si512(b));
}

/// |a| or |b|, whichever is larger; of a number and NaN the number.
KVCACHE_INLINE __m512 larger_magnitude(__m512 a, __m512 b) {
  constexpr int without_sign = 0b1011;
  return _mm512_maskz_range_ps(all, a, b, without_sign);
}

/// 16 bfloat16 as floats, zeros where the mask is.
KVCACHE_INLINE __m512 load_widened(__mmask16 mask, const bfloat16* p) {
  return widen_low(bits{_mm512_maskz_cvtepu16_epi32(all, _mm256_maskz_loadu_epi16(mask, p))}).x;
}

/// 16 dims of up to four rows times the channels' scales. Rows lie side by side: where one was half a page or more behind the
/// other, loads would wait for stores that they only seem to depend on.
template <int Rows>
struct folded_16 {
  alignas(64) float row[Rows][key_lanes];
};

/// Folds 16 dims; their largest magnitudes, and the dot products.
template <int Rows>
KVCACHE_INLINE void fold_16(const float* queries, index_t head_dim, __mmask16 mask, __m512 scale,
                            __m512 offset, folded_16<Rows>& to, __m512 (&most)[Rows], __m512 (&dot)[4]) {
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const __m512 q = _mm512_maskz_loadu_ps(mask, queries + r * head_dim);
    const __m512 x = _mm512_mul_ps(q, scale);
    _mm512_store_ps(to.row[r], x);
    most[r] = larger_magnitude(most[r], x);
    dot[r] = _mm512_fmadd_ps(q, offset, dot[r]);
  }
}

/// 64 dims of row r times `inverse`, rounded to bytes.
template <int Rows>
KVCACHE_INLINE __m512i rounded_bytes(const folded_16<Rows>* x, int r, __m512 inverse) {
  const __m512 round_to_integer = _mm512_set1_ps(0x1.8p23F);  // leaves the integer in the low bits
  __m512 w[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) w[i] = _mm512_fmadd_ps(_mm512_load_ps(x[i].row[r]), inverse, round_to_integer);
  const __m512i by_turns = _mm512_packs_epi16(low_halves(w[0], w[1]), low_halves(w[2], w[3]));
  return _mm512_maskz_permutexvar_epi64(__mmask8{0xff}, _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), by_turns);
}

/// Up to four rows on their way.
template <int Rows>
class folded_rows {
 public:
  /// Products and dot products, and from the largest products the scales.
  KVCACHE_INLINE void fold(index_t head_dim, const float* queries, const bfloat16* scales,
                           const bfloat16* offsets) {
    folded_16<Rows>* to = products_;
    __m512 most[Rows];
    __m512 dot[4] = {};
#pragma GCC unroll 4
    for (__m512& m : most) m = _mm512_setzero_ps();
    index_t d = 0;
    for (; d + key_lanes <= head_dim; d += key_lanes, ++to)
      fold_16<Rows>(queries + d, head_dim, all, load_widened(scales + d).x, load_widened(offsets + d).x, *to,
                    most, dot);
    for (; d < round_up_64(head_dim); d += key_lanes, ++to) {
      const __mmask16 mask = first_lanes(head_dim - d);
      fold_16<Rows>(queries + d, head_dim, mask, load_widened(mask, scales + d),
                    load_widened(mask, offsets + d), *to, most, dot);
    }
    __m512i sizes[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sizes[r] = _mm512_castps_si512(most[r]);
    scale_to(byte_split<1>::largest_query, sizes, scales_);
    _mm_store_ps(constants_, sum_of_four(dot));
  }

  /// As prepare_rows.
  KVCACHE_INLINE void write(index_t head_dim, float* prepared) const {
    const index_t row_floats = prepared_query_floats(head_dim);
    __m512i sums[4] = {};
    const folded_16<Rows>* from = products_;
    for (index_t d = 0; d < head_dim; d += 64, from += 4) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        store_query(reinterpret_cast<std::int8_t*>(prepared + r * row_floats + prepared_head_floats) + d,
                    rounded_bytes(from, r, _mm512_set1_ps(scales_.inverse[r])), head_dim - d, sums[r]);
    }
    alignas(16) std::int32_t starts[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(starts), sum_of_four(sums));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const prepared_head head{scales_.scale[r], {-128 * starts[r], 0}, constants_[r]};
      std::memcpy(prepared + r * row_floats, &head, sizeof(head));
    }
  }

 private:
  folded_16<Rows> products_[round_up_64(max_head_dim) / key_lanes];  // zeros up to whole 64s
  byte_scales scales_;
  alignas(16) float constants_[4];
};

/// `Groups` times `Rows` rows: all products first, since each group's scales are waited for.
template <int Rows, int Groups>
KVCACHE_TARGET inline void prepare_folded_rows(index_t head_dim, const float* queries, const bfloat16* scales,
                                               const bfloat16* offsets, float* prepared) {
  folded_rows<Rows> groups[Groups];
#pragma GCC unroll 2
  for (int i = 0; i < Groups; ++i) groups[i].fold(head_dim, queries + i * Rows * head_dim, scales, offsets);
#pragma GCC unroll 2
  for (int i = 0; i < Groups; ++i)
    groups[i].write(head_dim, prepared + i * Rows * prepared_query_floats(head_dim));
}

KVCACHE_TARGET inline void prepare_folded(index_t head_dim, const float* queries, index_t num_rows,
                                          const bfloat16* scales, const bfloat16* offsets, float* prepared) {
  const index_t row_floats = prepared_query_floats(head_dim);
  index_t r = 0;
  for (; r + 8 <= num_rows; r += 8)
    prepare_folded_rows<4, 2>(head_dim, queries + r * head_dim, scales, offsets, prepared + r * row_floats);
  for (; r + 4 <= num_rows; r += 4)
    prepare_folded_rows<4, 1>(head_dim, queries + r * head_dim, scales, offsets, prepared + r * row_floats);
  for (; r < num_rows; ++r)
    prepare_folded_rows<1, 1>(head_dim, queries + r * head_dim, scales, offsets, prepared + r * row_floats);
}
