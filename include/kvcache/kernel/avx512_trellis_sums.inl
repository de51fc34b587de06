// SPDX-License-Identifier: MIT
// Sums of the codec trellis, made as its scores in avx512_trellis.inl; included after it. Sixteen dims of a pack of four
// values are a line; four lines are summed at a time.

/// Lines that are summed at a time: with four rows all accumulators are in registers.
inline constexpr int sum_lines = 4;

/// Packed values of up to 64 tokens: `num_packs` times four, `pack_bytes` apart, from some dim on.
struct trellis_values {
  const std::byte* at;
  const std::byte* before;  // the unit of the dims before, or zeros
  const std::byte* next;    // fetched meanwhile
  std::byte* lines;         // where they go if more rows will want them; may be null
  index_t pack_bytes;
  index_t before_bytes;  // pack_bytes, or none from zeros to zeros
  index_t pack_lines;    // bytes of the lines of a pack
  index_t num_packs;
};

/// Words of a, moved up by N, after the last of b.
template <int N>
KVCACHE_INLINE __m512i words_after(__m512i a, __m512i b) {
  return _mm512_maskz_alignr_epi32(all, a, b, 16 - N);
}

/// States of four lines of values, `First` the first of them in its unit. \param before  the unit before
template <int Bits, int First>
struct value_states;

/// Pairs of codes, each with that of the dim before, then pairs of pairs; even lines lie in one register, odd ones in
/// another.
template <>
struct value_states<2, 0> {
  KVCACHE_INLINE static __m512i odd(__m512i packed, __m512i earlier) {
    return select(even_pairs, shift_right<2>(packed), earlier);
  }
  KVCACHE_INLINE static void take(const std::byte* at, const std::byte* unit_before, __m512i (&out)[4]) {
    const __m512i now = load_bits(at).x;
    const __m512i before = load_bits(unit_before).x;
    const __m512i wrapped =
        select(static_cast<std::int32_t>(0xfcfcfcfcU), shift_left<2>(now), shift_right<6>(before));
    const __m512i earlier = words_after<1>(now, wrapped);
    const __m512i even_lines = select(even_pairs, now, shift_left<2>(earlier));
    const __m512i odd_lines = odd(now, earlier);
    // only the last words of what is before matter, and those have no word of another unit before them
    const __m512i odd_before = odd(before, words_after<1>(before, before));
    const __m512i even_wrapped = select(low_nibbles, shift_right<4>(odd_before), shift_left<4>(odd_lines));
    const __m512i even_earlier = words_after<2>(even_lines, even_wrapped);
    const __m512i odd_earlier = words_after<2>(odd_lines, even_lines);
    out[0] = select(low_nibbles, even_lines, shift_left<4>(even_earlier));
    out[1] = select(low_nibbles, odd_lines, shift_left<4>(odd_earlier));
    out[2] = select(low_nibbles, shift_right<4>(even_lines), even_earlier);
    out[3] = select(low_nibbles, shift_right<4>(odd_lines), odd_earlier);
  }
};

template <>
struct value_states<4, 0> {
  KVCACHE_INLINE static void take(const std::byte* at, const std::byte* unit_before, __m512i (&out)[4]) {
    __m512i before = load_bits(unit_before).x;
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const __m512i now = load_bits(at + u * packed_order<4>::unit_bytes).x;
      const __m512i up = shift_left<4>(now);
      out[2 * u] = select(low_nibbles, now, words_after<1>(up, before));
      out[2 * u + 1] = select(low_nibbles, shift_right<4>(now), words_after<1>(now, up));
      before = now;
    }
  }
};

template <int First>
struct value_states<3, First> {
  template <int Line>
  KVCACHE_INLINE static void line(const packed_unit<3>& unit, line_before& before, __m512i (&out)[4]) {
    out[Line] = states<3, dims_in_words>(codes_of<3, First + Line>(unit.line), before).x;
    if constexpr (Line < 3) line<Line + 1>(unit, before, out);
  }
  KVCACHE_INLINE static void take(const std::byte* at, const std::byte* unit_before, __m512i (&out)[4]) {
    packed_unit<3> unit;
    packed_unit<3> earlier;
    load_unit(at, unit);
    load_unit(First == 0 ? unit_before : at, earlier);
    line_before before{codes_of < 3, First == 0 ? 7 : First - 1 > (earlier.line), broadcast_word(0)};
    line<0>(unit, before, out);
  }
};

template <int Bits, int First, int Rows>
KVCACHE_TARGET inline void sum_trellis_tile(trellis_values v, const byte_table& table_in_memory,
                                            const weight_bytes<1, Rows>& w, float* sums, index_t sum_stride) {
  constexpr int num_units = Bits == 4 ? 2 : 1;
  const byte_table table = table_in_memory;
  value_sums<Rows, sum_lines> sum;
  sum.start();
  for (index_t p = 0; p < v.num_packs; ++p) {
#pragma GCC unroll 2
    for (int u = 0; u < num_units; ++u) fetch_unit<Bits>(v.next + u * packed_order<Bits>::unit_bytes);
    __m512i x[sum_lines];
    value_states<Bits, First>::take(v.at, v.before, x);
#pragma GCC unroll 4
    for (__m512i& states : x) states = table.at({states}).x;
    if (v.lines != nullptr) {
#pragma GCC unroll 4
      for (int c = 0; c < sum_lines; ++c) _mm512_store_si512(v.lines + c * packed_line_bytes, x[c]);
      v.lines += v.pack_lines;
    }
    sum.add(x, w, 4 * p);
    v.at += v.pack_bytes;
    v.before += v.before_bytes;
    v.next += v.pack_bytes;
  }
  sum.finish(w, sums, sum_stride);
}

/// Of lines that a tile before has made; fetches again, as for scores.
template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_lines_tile(const trellis_values& v, const weight_bytes<1, Rows>& w,
                                          float* sums, index_t sum_stride) {
  const std::byte* lines = v.lines;
  const std::byte* next = v.next;
  value_sums<Rows, sum_lines> sum;
  sum.start();
  for (index_t p = 0; p < v.num_packs; ++p, lines += v.pack_lines, next += v.pack_bytes) {
    fetch_unit<Bits>(next);
    if constexpr (Bits == 4) fetch_unit<Bits>(next + packed_order<4>::unit_bytes);
    __m512i x[sum_lines];
#pragma GCC unroll 4
    for (int c = 0; c < sum_lines; ++c) x[c] = load_bits(lines + c * packed_line_bytes).x;
    sum.add(x, w, 4 * p);
  }
  sum.finish(w, sums, sum_stride);
}

/// 64 dims of `Rows` rows. \param unpacked  the lines are there
template <int Bits, int First, int Rows>
KVCACHE_INLINE void sum_trellis_dims(trellis_values& v, const byte_table& table,
                                     const weight_bytes<1, Rows>& w, bool unpacked, float* sums,
                                     index_t sum_stride) {
  if (unpacked)
    sum_lines_tile<Bits>(v, w, sums, sum_stride);
  else
    sum_trellis_tile<Bits, First>(v, table, w, sums, sum_stride);
  if (v.lines != nullptr) v.lines += sum_lines * packed_line_bytes;
}

/// As for scores.
template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_trellis_rows(const trellis_values& v, const byte_table& table,
                                            const block_geometry& g, const bfloat16* scales, index_t count,
                                            const float* weights, index_t num_rows, float* sums,
                                            bool unpacked) {
  using order = packed_order<Bits>;
  constexpr index_t dims = sum_lines * key_lanes;
  constexpr index_t tile_bytes = (Bits == 4 ? 2 : 1) * order::unit_bytes;
  for (; num_rows >= Rows; num_rows -= Rows, weights += Rows * g.block_size, sums += Rows * g.head_dim) {
    weight_bytes<1, Rows> w;
    split_weights(weights, g.block_size, scales, count, w);
    trellis_values here = v;
    for (index_t d = 0; d < g.head_dim; d += dims) {
      sum_trellis_dims<Bits, 0>(here, table, w, unpacked, sums + d, g.head_dim);
      if constexpr (Bits == 3)
        sum_trellis_dims<Bits, sum_lines>(here, table, w, unpacked, sums + (d += dims), g.head_dim);
      here.at += tile_bytes;
      here.next += tile_bytes;
      here.before = here.at - order::unit_bytes;
      here.before_bytes = here.pack_bytes;
    }
    unpacked = true;
  }
  if constexpr (Rows > 1)
    sum_trellis_rows<Bits, Rows / 2>(v, table, g, scales, count, weights, num_rows, sums, unpacked);
}

template <int Bits>
KVCACHE_TARGET inline bool sum_trellis(const packed_section& section, const block_geometry& g,
                                       const bfloat16* scales, index_t count, const float* weights,
                                       index_t num_rows, float* sums, const std::byte* next) {
  using order = packed_order<Bits>;
  constexpr index_t dims = std::max(index_t{sum_lines}, order::lines_per_unit) * key_lanes;
  if (g.head_dim % dims != 0 || num_rows > most_packed_rows) return false;
  alignas(64) static constexpr std::array<std::byte, order::unit_bytes> zeros{};
  alignas(64) trellis_lines memory;
  const byte_table table = load_table(section.codebook, 0);
  const std::byte* to_fetch = next == nullptr ? section.codes : next;
  for (index_t t = 0; t < count; t += sum_tokens) {
    const index_t num_tokens = std::min(sum_tokens, count - t);
    const index_t skip = order::section_bytes(t * g.head_dim);
    const trellis_values v{section.codes + skip,
                           zeros.data(),
                           to_fetch + skip,
                           is_one_tile(num_rows) ? nullptr : memory.data(),
                           order::section_bytes(4 * g.head_dim),
                           0,
                           4 * g.head_dim,
                           ceil_div(num_tokens, 4)};
    sum_trellis_rows<Bits, 4>(v, table, g, scales + t, num_tokens, weights + t, num_rows, sums, false);
  }
  return true;
}

inline bool trellis_accumulate(const packed_section& section, const block_geometry& g, const bfloat16* scales,
                               index_t count, const float* weights, index_t num_rows, float* sums,
                               const std::byte* next) {
  const auto run = section.bits == 4 ? sum_trellis<4> : section.bits == 3 ? sum_trellis<3> : sum_trellis<2>;
  return runs_here() && run(section, g, scales, count, weights, num_rows, sums, next);
}
