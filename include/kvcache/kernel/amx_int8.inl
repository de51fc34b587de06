// SPDX-License-Identifier: MIT
// Blocks of bytes multiplied in the tiles of AMX-INT8. A tile of a block as stored is a right operand:
//
//   scores   C[rows, 16 tokens] += A[rows, 64 dims]   * B[16 times 4 dims, 16 tokens]     signed * signed
//   sums     C[rows, 16 dims]   += A[rows, 64 tokens] * B[16 times 4 tokens, 16 dims]     unsigned * signed
//
// Queries and weights are the bytes that avx512_bytes.inl makes of them, one or two rows of A for each. Integers are exact
// and the few float operations the same, so that results are those of AVX-512 bit by bit, and either may do any part.
//
// For 64 tokens x 128 dims, scores and sums together, the tiles take 16 multiplications of 16 cycles for up to 16 rows of A, and 12
// stores of a C; AVX-512 takes 256 dot products for each row of A, two a cycle at best, but reads memory meanwhile, which tiles
// do not (bench/NOTES.md). So few rows are multiplied by AVX-512, and packed codes, which it multiplies as they are unpacked, up to
// eight. Included by amx.hpp.

inline constexpr index_t line_bytes = 64;      // of a row of a tile
inline constexpr index_t few_byte_rows = 4;    // queries up to which AVX-512 multiplies bytes
inline constexpr index_t few_packed_rows = 8;  // and packed codes, as they are unpacked

/// Rows of queries or weights of which each takes `Parts` rows of A.
template <int Parts>
inline constexpr index_t byte_rows_at_once = tile_rows / Parts;

/// Left operand: row r's parts, high first, are rows r * Parts and on of each tile; zeros below.
template <index_t MaxColumns>
struct byte_operand {
  alignas(64) std::array<std::int8_t, ceil_div(MaxColumns, line_bytes) * tile_rows * line_bytes> bytes;
  std::array<float, tile_rows> scales;     // of rows
  std::array<float, tile_rows> constants;  // added to the scores of rows

  [[nodiscard]] std::int8_t* tile(index_t piece) noexcept {
    return &bytes[static_cast<std::size_t>(piece * tile_rows * line_bytes)];
  }

  /// \param prepared  [num_rows, prepared_query_floats(head_dim)]
  template <int Parts>
  KVCACHE_TARGET void take_queries(const float* prepared, index_t num_rows, index_t head_dim) noexcept {
    const index_t row_floats = prepared_query_floats(head_dim);
    const index_t part_bytes = round_up(head_dim, key_lanes);
    for (index_t r = 0; r < num_rows; ++r) {
      avx512::prepared_head head;
      std::memcpy(&head, prepared + r * row_floats, sizeof(head));
      scales[static_cast<std::size_t>(r)] = head.scale;
      constants[static_cast<std::size_t>(r)] = head.constant;
    }
    for (index_t d = 0; d < head_dim; d += line_bytes) {
      const index_t rest = std::min(part_bytes - d, line_bytes);
      const __mmask64 theirs = ~__mmask64{0} >> (line_bytes - rest);
      for (index_t i = 0; i < tile_rows; ++i) {
        const float* row = prepared + i / Parts * row_floats + avx512::prepared_head_floats;
        const auto* part = reinterpret_cast<const std::int8_t*>(row) + i % Parts * part_bytes + d;
        const __m512i line = i < num_rows * Parts ? _mm512_maskz_loadu_epi8(theirs, part) : __m512i{};
        _mm512_store_si512(tile(d / line_bytes) + i * line_bytes, line);
      }
    }
  }

  /// Up to 64 weights of each row times their tokens' scales; both may be anything beyond `count`.
  template <int Parts>
  KVCACHE_TARGET void take_weights(const float* weights, index_t num_rows, index_t stride,
                                   const bfloat16* token_scales, index_t count) noexcept {
    std::int8_t* to = tile(0);
    index_t r = 0;
    for (; r + 4 <= num_rows; r += 4)
      take_some<Parts, 4>(weights + r * stride, stride, token_scales, count, r, to + r * Parts * line_bytes);
    for (; r < num_rows; ++r)
      take_some<Parts, 1>(weights + r * stride, stride, token_scales, count, r, to + r * Parts * line_bytes);
    std::fill(to + num_rows * Parts * line_bytes, to + tile_rows * line_bytes, std::int8_t{0});
  }

 private:
  template <int Parts, int Rows>
  KVCACHE_INLINE void take_some(const float* weights, index_t stride, const bfloat16* token_scales,
                                index_t count, index_t first, std::int8_t* to) noexcept {
    avx512::weight_bytes<Parts, Rows> w;
    avx512::split_weights(weights, stride, token_scales, count, w);
    std::memcpy(to, w.bytes, sizeof(w.bytes));
    std::copy_n(w.scales, Rows, &scales[static_cast<std::size_t>(first)]);
  }
};

/// A right operand's first lines, zeros below; for pieces where more would not be theirs.
struct byte_tile {
  alignas(64) std::array<std::int8_t, tile_rows * line_bytes> bytes;

  const void* fill(const std::int8_t* from, index_t stride, index_t num_lines, index_t num_bytes) noexcept {
    bytes.fill(0);
    for (index_t i = 0; i < num_lines; ++i)
      std::copy_n(from + i * stride, num_bytes, &bytes[static_cast<std::size_t>(i * line_bytes)]);
    return bytes.data();
  }
};

/// What tiles 0 to 3 hold in the end.
struct byte_product {
  alignas(64) std::array<std::int32_t, 4 * tile_rows * tile_rows> c;

  [[nodiscard]] KVCACHE_INLINE avx512::words line(index_t i, index_t row) const noexcept {
    return reinterpret_cast<avx512::words>(
        _mm512_load_si512(&c[static_cast<std::size_t>((i * tile_rows + row) * tile_rows)]));
  }
  /// Row `row` of the left operand in tile i, its parts put together.
  template <int Parts>
  [[nodiscard]] KVCACHE_INLINE avx512::vec row_of(index_t i, index_t row, unsigned shift) const noexcept {
    return avx512::to_floats(
        avx512::joined<Parts>(line(i, row * Parts), line(i, row * Parts + Parts - 1), shift));
  }
  template <class Tiles>
  static void begin(index_t num_tiles) noexcept {
    for_tiles(
        num_tiles, []<int I>(index_t) __attribute__((always_inline)) { Tiles::template zero<I>(); });
  }
  template <class Tiles>
  void end(index_t num_tiles) noexcept {
    for_tiles(
        num_tiles, [this]<int I>(index_t i) __attribute__((always_inline)) {
          Tiles::template store<I>(&c[static_cast<std::size_t>(i * tile_rows * tile_rows)], line_bytes);
        });
  }
};

/// int8_kernels::scores in tiles, for any number of rows.
template <class Tiles, int Parts>
KVCACHE_TARGET inline void score_bytes(const block_geometry& g, const std::byte* keys, const bfloat16* scales,
                                       index_t count, const float* prepared, index_t num_rows, float* out,
                                       const upcoming& next) {
  constexpr index_t at_once = byte_rows_at_once<Parts>;
  const auto* lines = reinterpret_cast<const std::int8_t*>(keys);
  const index_t packs = block_order<std::int8_t>::key_packs(g);  // lines of a group of 16 tokens
  const index_t num_groups = ceil_div(count, key_lanes);
  sections_ahead ahead(next, keys, num_groups * packs * line_bytes, ceil_div(num_rows, at_once));
  byte_operand<max_head_dim> q;
  byte_product c;
  byte_tile padded;
  const tiles_in_use<Tiles> in_use(tile_shape::of(tile_rows));
  for (index_t row = 0; row < num_rows; row += at_once) {
    const index_t rows = std::min(num_rows - row, at_once);
    q.template take_queries<Parts>(prepared + row * prepared_query_floats(g.head_dim), rows, g.head_dim);
    for (index_t first = 0; first < num_groups; first += 4) {
      const index_t n = std::min(index_t{4}, num_groups - first);
      byte_product::begin<Tiles>(n);
      for (index_t p = 0; p < packs; p += tile_rows) {
        Tiles::template load<4>(q.tile(p / tile_rows), line_bytes);
        for_tiles(
            n, [&]<int I>(index_t i) __attribute__((always_inline)) {
              // Lines of the next group do no harm: they meet zeros of the query. Behind the last group is nothing of ours.
              const index_t at = (first + i) * packs + p;
              const index_t rest = num_groups * packs - at;
              const std::int8_t* from = lines + at * line_bytes;
              ahead.fetch();
              Tiles::template load<6>(
                  rest >= tile_rows ? from : padded.fill(from, line_bytes, rest, line_bytes), line_bytes);
              Tiles::template multiply_signed<I, 4, 6>();
            });
      }
      c.end<Tiles>(n);
      for (index_t i = 0; i < n; ++i) {
        const index_t t = (first + i) * key_lanes;
        const avx512::vec key_scale = avx512::widen_low(avx512::load_low_halves(scales + t));
        for (index_t r = 0; r < rows; ++r) {
          const avx512::vec scale = avx512::broadcast(q.scales[static_cast<std::size_t>(r)]);
          const avx512::vec constant = avx512::broadcast(q.constants[static_cast<std::size_t>(r)]);
          avx512::store(out + (row + r) * g.block_size + t,
                        avx512::fma(c.row_of<Parts>(i, r, avx512::byte_split<Parts>::query_shift),
                                    avx512::mul(key_scale, scale), constant));
        }
      }
    }
  }
}

/// sums[d] += scale * x[d] for up to 16 dims, rounded as in AVX-512: once, where there are 16.
KVCACHE_INLINE void add_products_to(float* sums, avx512::vec x, float scale, index_t num_dims) {
  const avx512::vec s = avx512::broadcast(scale);
  if (num_dims == key_lanes) return avx512::store(sums, avx512::fma(x, s, avx512::load(sums)));
  alignas(64) std::array<float, key_lanes> last;
  avx512::store(last.data(), avx512::fma(x, s, avx512::zero()));
  for (index_t d = 0; d < num_dims; ++d) sums[d] += last[static_cast<std::size_t>(d)];
}

/// int8_kernels::accumulate in tiles, for any number of rows.
template <class Tiles, int Parts>
KVCACHE_TARGET inline void sum_bytes(const block_geometry& g, const std::byte* values, const bfloat16* scales,
                                     index_t count, const float* weights, index_t num_rows, float* sums,
                                     const upcoming& next) {
  constexpr index_t at_once = byte_rows_at_once<Parts>;
  const index_t stride = 4 * g.head_dim;  // bytes from four tokens to the next four
  sections_ahead ahead(next, values, round_up(count, 4) * g.head_dim, ceil_div(num_rows, at_once));
  byte_operand<avx512::sum_tokens> w;
  byte_product c;
  byte_tile padded;
  const tiles_in_use<Tiles> in_use(tile_shape::of(tile_rows));
  for (index_t t = 0; t < count; t += avx512::sum_tokens) {
    const index_t num_tokens = std::min(avx512::sum_tokens, count - t);
    const index_t packs = ceil_div(num_tokens, 4);
    const auto* bytes = reinterpret_cast<const std::int8_t*>(values) + t * g.head_dim;
    for (index_t row = 0; row < num_rows; row += at_once) {
      const index_t rows = std::min(num_rows - row, at_once);
      w.template take_weights<Parts>(weights + row * g.block_size + t, rows, g.block_size, scales + t,
                                     num_tokens);
      Tiles::template load<4>(w.tile(0), line_bytes);
      for (index_t d = 0; d < g.head_dim; d += 4 * key_lanes) {
        const index_t n = std::min(index_t{4}, ceil_div(g.head_dim - d, key_lanes));
        const auto dims_of = [&](index_t i) { return std::min(key_lanes, g.head_dim - d - i * key_lanes); };
        byte_product::begin<Tiles>(n);
        for_tiles(
            n, [&]<int I>(index_t i) __attribute__((always_inline)) {
              const std::int8_t* from = bytes + 4 * (d + i * key_lanes);
              ahead.fetch();
              if (packs == tile_rows && dims_of(i) == key_lanes) {
                Tiles::template load<6>(from, stride);
              } else {
                Tiles::template load<6>(padded.fill(from, stride, packs, 4 * dims_of(i)), line_bytes);
              }
              Tiles::template multiply_unsigned<I, 4, 6>();
            });
        c.end<Tiles>(n);
        for (index_t r = 0; r < rows; ++r) {
          float* to = sums + (row + r) * g.head_dim + d;
          for (index_t i = 0; i < n; ++i)
            add_products_to(to + i * key_lanes,
                            c.row_of<Parts>(i, r, avx512::byte_split<Parts>::weight_shift),
                            w.scales[static_cast<std::size_t>(r)], dims_of(i));
        }
      }
    }
  }
}

// ---- tiles or not ---------------------------------------------------------------------------------------------------

template <class Tiles, int Parts>
inline void score_bytes_best(const block_geometry& g, const std::byte* keys, const bfloat16* scales,
                             index_t count, const float* prepared, index_t num_rows, float* out,
                             const upcoming& next) {
  const bool in_tiles = num_rows > few_byte_rows && Tiles::multiply_bytes_here();
  const auto run = in_tiles ? score_bytes<Tiles, Parts> : avx512::kernels_for_bytes<Parts>.scores;
  run(g, keys, scales, count, prepared, num_rows, out, next);
}

template <class Tiles, int Parts>
inline void sum_bytes_best(const block_geometry& g, const std::byte* values, const bfloat16* scales,
                           index_t count, const float* weights, index_t num_rows, float* sums,
                           const upcoming& next) {
  const bool in_tiles = num_rows > few_byte_rows && Tiles::multiply_bytes_here();
  const auto run = in_tiles ? sum_bytes<Tiles, Parts> : avx512::kernels_for_bytes<Parts>.accumulate;
  run(g, values, scales, count, weights, num_rows, sums, next);
}

/// \return false, for whoever calls to unpack to memory, where that and tiles are better
template <class Tiles>
inline bool score_packed_best(const packed_section& section, const block_geometry& g, const bfloat16* scales,
                              index_t count, const float* prepared, index_t num_rows, float* out,
                              const upcoming& next) {
  if (num_rows > few_packed_rows && Tiles::multiply_bytes_here()) return false;
  return avx512::kernels_for_packed.scores(section, g, scales, count, prepared, num_rows, out, next);
}

template <class Tiles>
inline bool sum_packed_best(const packed_section& section, const block_geometry& g, const bfloat16* scales,
                            index_t count, const float* weights, index_t num_rows, float* sums,
                            const upcoming& next) {
  if (num_rows > few_packed_rows && Tiles::multiply_bytes_here()) return false;
  return avx512::kernels_for_packed.accumulate(section, g, scales, count, weights, num_rows, sums, next);
}

template <class Tiles, int Parts>
inline constexpr int8_kernels kernels_for_bytes = {avx512::kernels_for_bytes<Parts>.largest,
                                                   avx512::kernels_for_bytes<Parts>.put_key,
                                                   avx512::kernels_for_bytes<Parts>.put_value,
                                                   avx512::kernels_for_bytes<Parts>.prepare,
                                                   score_bytes_best<Tiles, Parts>,
                                                   sum_bytes_best<Tiles, Parts>,
                                                   avx512::kernels_for_bytes<Parts>.prepare_folded};

template <class Tiles>
inline constexpr low_bit_kernels kernels_for_packed = {
    avx512::kernels_for_packed.unpack, avx512::kernels_for_packed.hadamard,
    avx512::kernels_for_packed.nearest, score_packed_best<Tiles>, sum_packed_best<Tiles>};
