// SPDX-License-Identifier: MIT
// What a tile of rows keeps in registers while bytes are multiplied, whether they lie in a block or are made of codes: sums in
// up to 16 accumulators, of one or two parts (avx512_bytes.inl). Included by avx512.hpp.

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

/// Sums of products of `Groups` groups of keys and as many rows.
template <int Rows, int Groups, int Parts = 1>
struct score_sums {
  words sum[Rows][Parts][Groups];

  KVCACHE_INLINE void start(const float* prepared, index_t row_floats) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      prepared_head head;
      std::memcpy(&head, prepared + r * row_floats, sizeof(head));
#pragma GCC unroll 8
      for (int i = 0; i < Groups * Parts; ++i)
        sum[r][i / Groups][i % Groups] = same_words(head.starts[i / Groups]);
    }
  }
  /// Four dims of each group: those of the queries' word `word`. \param part_words  from one part of a query to the next
  KVCACHE_INLINE void add(const __m512i (&k)[Groups], const row_column<Rows>& queries, int word,
                          index_t part_words = 0) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < Parts; ++p) {
        const float* at = queries.row(r) + word + p * part_words;
        const __m512i q = four_bytes(reinterpret_cast<const std::int8_t*>(at));
#pragma GCC unroll 4
        for (int i = 0; i < Groups; ++i) add_products(sum[r][p][i], k[i], q);
      }
    }
  }
  KVCACHE_INLINE void finish(const bfloat16* scales, const float* prepared, index_t row_floats, float* out,
                             index_t out_stride) const {
    vec key_scales[Groups];
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) key_scales[i] = widen_low(load_low_halves(scales + i * key_lanes));
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r, prepared += row_floats, out += out_stride) {
      const vec scale = broadcast(prepared[offsetof(prepared_head, scale) / sizeof(float)]);
      const vec constant = broadcast(prepared[offsetof(prepared_head, constant) / sizeof(float)]);
#pragma GCC unroll 4
      for (int i = 0; i < Groups; ++i) {
        const __m512i whole =
            joined<Parts>(sum[r][0][i], sum[r][Parts - 1][i], byte_split<Parts>::query_shift);
        store(out + i * key_lanes, fma(to_floats(whole), mul(key_scales[i], scale), constant));
      }
    }
  }
};

/// Sums of products of `Lines` lines of values and as many rows.
template <int Rows, int Lines, int Parts = 1>
struct value_sums {
  words sum[Rows][Parts][Lines];

  KVCACHE_INLINE void start() {
#pragma GCC unroll 8
    for (auto& row : sum) {
#pragma GCC unroll 8
      for (int i = 0; i < Parts * Lines; ++i) row[i / Lines][i % Lines] = same_words(0);
    }
  }
  /// Of the four values from `t` on.
  KVCACHE_INLINE void add(const __m512i (&x)[Lines], const weight_bytes<Parts, Rows>& w, index_t t) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < Parts; ++p) {
        const __m512i weight = four_bytes(&w.bytes[r][p][t]);
#pragma GCC unroll 4
        for (int c = 0; c < Lines; ++c) add_products(sum[r][p][c], weight, x[c]);
      }
    }
  }
  KVCACHE_INLINE void finish(const weight_bytes<Parts, Rows>& w, float* sums, index_t sum_stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r, sums += sum_stride) {
      const vec scale = broadcast(w.scales[r]);
#pragma GCC unroll 4
      for (int c = 0; c < Lines; ++c) {
        float* to = sums + c * key_lanes;
        const __m512i whole =
            joined<Parts>(sum[r][0][c], sum[r][Parts - 1][c], byte_split<Parts>::weight_shift);
        store(to, fma(to_floats(whole), scale, load(to)));
      }
    }
  }
};
