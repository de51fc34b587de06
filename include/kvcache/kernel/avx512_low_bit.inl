// SPDX-License-Identifier: MIT
// What a tile of rows keeps in registers while codes are multiplied as bytes: sums for 16 accumulators, coarse operands
// (avx512_bytes.inl). Included by avx512.hpp.

/// How many rows are worth it: each tile of them makes bytes of the codes again.
inline constexpr int most_packed_rows = 8;

/// Groups of 16 keys, and lines of 16 dims, that a tile of `rows` rows takes.
constexpr int packed_tile_width(int rows) { return rows > 4 ? 2 : 4; }

/// Sums of products of `Groups` groups of keys and as many rows.
template <int Rows, int Groups>
struct score_sums {
  words sum[Rows][Groups];

  KVCACHE_INLINE void start(const float* prepared, index_t row_floats) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      prepared_head head;
      std::memcpy(&head, prepared + r * row_floats, sizeof(head));
#pragma GCC unroll 4
      for (int i = 0; i < Groups; ++i) sum[r][i] = same_words(head.starts[0]);
    }
  }
  /// Four dims of each group: those of the queries' word `word`.
  KVCACHE_INLINE void add(const __m512i (&k)[Groups], const row_column<Rows>& queries, int word) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i q = four_bytes(reinterpret_cast<const std::int8_t*>(queries.row(r) + word));
#pragma GCC unroll 4
      for (int i = 0; i < Groups; ++i) add_products(sum[r][i], k[i], q);
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
      for (int i = 0; i < Groups; ++i)
        store(out + i * key_lanes,
              fma(to_floats(reinterpret_cast<__m512i>(sum[r][i])), mul(key_scales[i], scale), constant));
    }
  }
};

/// Sums of products of `Lines` lines of values and as many rows.
template <int Rows, int Lines>
struct value_sums {
  words sum[Rows][Lines];

  KVCACHE_INLINE void start() {
#pragma GCC unroll 8
    for (auto& row : sum) {
#pragma GCC unroll 4
      for (words& s : row) s = same_words(0);
    }
  }
  /// Of the four values from `t` on.
  KVCACHE_INLINE void add(const __m512i (&x)[Lines], const weight_bytes<1, Rows>& w, index_t t) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i weight = four_bytes(&w.bytes[r][0][t]);
#pragma GCC unroll 4
      for (int c = 0; c < Lines; ++c) add_products(sum[r][c], weight, x[c]);
    }
  }
  KVCACHE_INLINE void finish(const weight_bytes<1, Rows>& w, float* sums, index_t sum_stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r, sums += sum_stride) {
      const vec scale = broadcast(w.scales[r]);
#pragma GCC unroll 4
      for (int c = 0; c < Lines; ++c) {
        float* to = sums + c * key_lanes;
        store(to, fma(to_floats(reinterpret_cast<__m512i>(sum[r][c])), scale, load(to)));
      }
    }
  }
};
