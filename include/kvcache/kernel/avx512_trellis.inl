// SPDX-License-Identifier: MIT
// The codec trellis multiplied as its codes are unpacked, with VBMI and coarse operands (avx512_bytes.inl); included by
// avx512.hpp. Packed codes become states in registers, states two look-ups, those a dot product for each row: four rows
// are served by one decoding. The dot products and the look-ups keep three of the processor's four units busy, so states
// are made of shifts and bit selections, as few as there can be, which the fourth does too.
//
//   keys     a word is a token, its bytes and their fields are dims: all of a unit of 2 bits is one stream of 32 bits
//   values   a word is a dim: the codes of the dim before are one word away
//
// A field is the code of one line in a byte of a packed line. Lines of a unit follow each other, so the field before that
// of the first dim is the field of the line before, of the last dim.

inline constexpr std::int32_t low_nibbles = 0x0f0f0f0f;
inline constexpr std::int32_t even_pairs = 0x33333333;

/// Bits of a where the mask has ones, else of b.
KVCACHE_INLINE __m512i select(std::int32_t mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xca);
}
template <int N>
KVCACHE_INLINE __m512i shift_left(__m512i a) {
  return _mm512_maskz_slli_epi32(all, a, N);
}
template <int N>
KVCACHE_INLINE __m512i shift_right(__m512i a) {
  return _mm512_maskz_srli_epi32(all, a, N);
}

/// The table; `flip` is what its bytes are xored with.
KVCACHE_INLINE byte_table load_table(const std::int8_t* table, std::uint8_t flip) {
  byte_table loaded(table);
#pragma GCC unroll 4
  for (__m512i& part : loaded.part)
    part = _mm512_xor_si512(part, _mm512_set1_epi8(static_cast<char>(flip)));
  return loaded;
}

// ---- scores ---------------------------------------------------------------------------------------------------------

/// What is left of 16 keys' codes when the next lines are taken: states(line of a unit, in order) of the unit at `at`.
template <int Bits>
struct key_stream;

/// A token's 16 codes, first in the highest bits, and windows into them.
template <>
struct key_stream<2> {
  __m512i codes;

  KVCACHE_INLINE void start() { codes = _mm512_setzero_si512(); }

  /// Swaps the bits that `mask` names with those that lie `N` higher.
  template <int N>
  KVCACHE_INLINE static __m512i swapped(__m512i x, std::int32_t mask) {
    const __m512i differ =
        _mm512_ternarylogic_epi32(x, shift_right<N>(x), _mm512_set1_epi32(mask), 0x28);  // (a ^ b) & c
    return _mm512_ternarylogic_epi32(x, differ, shift_left<N>(differ), 0x96);
  }
  /// Byte b holds dims b, 4 + b, 8 + b, 12 + b from its low bits on: a transposition about the other diagonal.
  KVCACHE_INLINE static __m512i in_order(__m512i packed) {
    return swapped<10>(swapped<20>(packed, 0x00000f0f), 0x00330033);
  }
  /// Where the state of each byte of line `Line` begins in 64 bits of two tokens.
  template <int Line>
  static constexpr std::uint64_t offsets() {
    std::uint64_t all_offsets = 0;
    for (unsigned i = 0; i < 8; ++i) {
      const unsigned last = Line == 0 ? 6 : 30 - 8 * Line;
      all_offsets |= std::uint64_t{i / 4 * 32 + last - i % 4 * 2} << (8 * i);
    }
    return all_offsets;
  }
  template <int Line>
  KVCACHE_INLINE __m512i states(const std::byte* at) {
    __m512i window = codes;
    if constexpr (Line == 0) {
      codes = in_order(load_bits(at).x);
      window = _mm512_shldi_epi32(window, codes, 8);
    } else {
      window = codes;
    }
    const auto from = _mm512_set1_epi64(static_cast<long long>(offsets<Line>()));
    return _mm512_maskz_multishift_epi64_epi8(~__mmask64{0}, from, window);
  }
};

template <>
struct key_stream<4> {
  __m512i high;  // the second line's codes, in low nibbles

  KVCACHE_INLINE void start() { high = _mm512_setzero_si512(); }
  template <int Line>
  KVCACHE_INLINE __m512i states(const std::byte* at) {
    const __m512i packed = load_bits(at).x;
    if constexpr (Line == 0) return select(low_nibbles, packed, _mm512_shldi_epi32(packed, high, 12));
    high = shift_right<4>(packed);
    return select(low_nibbles, high, _mm512_shldi_epi32(packed, shift_left<4>(packed), 8));
  }
};

template <>
struct key_stream<3> {
  line_before before;

  KVCACHE_INLINE void start() { before = {broadcast_word(0), broadcast_word(0)}; }
  template <int Line>
  KVCACHE_INLINE __m512i states(const std::byte* at) {
    packed_unit<3> unit;
    load_unit(at, unit);
    return vbmi::states<3, dims_in_bytes>(codes_of<3, Line>(unit.line), before).x;
  }
};

/// Where packed keys lie.
struct trellis_keys {
  const std::byte* at;
  const std::byte* next;  // fetched meanwhile
  index_t group_bytes;    // from one group of 16 keys to the next
  index_t num_units;      // of each group
};

/// Four dims of `Groups` groups after the other, line by line of a unit.
template <int Bits, int Line, int Rows, int Groups>
KVCACHE_INLINE void add_trellis_lines(key_stream<Bits> (&streams)[Groups], const std::byte* at,
                                      index_t group_bytes, const byte_table& table, const std::int8_t* query,
                                      index_t row_bytes, words (&sum)[Rows][Groups]) {
  __m512i k[Groups];
#pragma GCC unroll 4
  for (int i = 0; i < Groups; ++i)
    k[i] = table.at({streams[i].template states<Line>(at + i * group_bytes)}).x;
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const __m512i q = four_bytes(query + r * row_bytes + 4 * Line);
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) add_products(sum[r][i], k[i], q);
  }
  if constexpr (Line + 1 < packed_order<Bits>::lines_per_unit)
    add_trellis_lines<Bits, Line + 1>(streams, at, group_bytes, table, query, row_bytes, sum);
}

template <int Bits, int Rows, int Groups>
KVCACHE_TARGET inline void score_trellis_tile(const trellis_keys& keys, const byte_table& table_in_memory,
                                              const block_geometry& g, const bfloat16* scales,
                                              const float* prepared, float* out) {
  const byte_table table = table_in_memory;
  const index_t row_floats = prepared_query_floats(g.head_dim);
  prepared_head head[Rows];
  words sum[Rows][Groups];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    std::memcpy(&head[r], prepared + r * row_floats, sizeof(prepared_head));
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) sum[r][i] = same_words(head[r].starts[0]);
  }
  const auto* query = reinterpret_cast<const std::int8_t*>(prepared + prepared_head_floats);
  const std::byte* at = keys.at;
  const std::byte* next = keys.next;
  key_stream<Bits> streams[Groups];
#pragma GCC unroll 4
  for (key_stream<Bits>& stream : streams) stream.start();
  for (index_t u = 0; u < keys.num_units; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) fetch_unit<Bits>(next + i * keys.group_bytes);
    add_trellis_lines<Bits, 0>(streams, at, keys.group_bytes, table, query,
                               row_floats * index_t{sizeof(float)}, sum);
    at += packed_order<Bits>::unit_bytes;
    next += packed_order<Bits>::unit_bytes;
    query += 4 * packed_order<Bits>::lines_per_unit;
  }
#pragma GCC unroll 4
  for (int i = 0; i < Groups; ++i) {
    const vec key_scale = widen_low(load_low_halves(scales + i * key_lanes));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
      store(out + r * g.block_size + i * key_lanes,
            mul(to_floats(reinterpret_cast<__m512i>(sum[r][i])), mul(key_scale, broadcast(head[r].scale))));
  }
}

/// As many times `Rows` rows as there are, then fewer; of each, some groups of keys at a time.
template <int Bits, int Rows>
KVCACHE_TARGET inline void score_trellis_rows(const trellis_keys& keys, const byte_table& table,
                                              const block_geometry& g, const bfloat16* scales, index_t count,
                                              const float* prepared, index_t num_rows, float* out) {
  constexpr int groups = Bits == 3 ? 2 : 4;
  for (; num_rows >= Rows; num_rows -= Rows, out += Rows * g.block_size) {
    trellis_keys here = keys;
    const auto advance = [&here](index_t by) {
      here.at += by * here.group_bytes;
      here.next += by * here.group_bytes;
    };
    index_t t = 0;
    for (; t + (groups - 1) * key_lanes < count; t += groups * key_lanes, advance(groups))
      score_trellis_tile<Bits, Rows, groups>(here, table, g, scales + t, prepared, out + t);
    for (; t < count; t += key_lanes, advance(1))
      score_trellis_tile<Bits, Rows, 1>(here, table, g, scales + t, prepared, out + t);
    prepared += Rows * prepared_query_floats(g.head_dim);
  }
  if constexpr (Rows > 1)
    score_trellis_rows<Bits, Rows / 2>(keys, table, g, scales, count, prepared, num_rows, out);
}

template <int Bits>
KVCACHE_TARGET inline bool score_trellis(const packed_section& section, const block_geometry& g,
                                         const bfloat16* scales, index_t count, const float* prepared,
                                         index_t num_rows, float* out, const std::byte* next) {
  constexpr index_t lines = packed_order<Bits>::lines_per_unit;
  if (g.head_dim % (4 * lines) != 0 || num_rows > most_packed_rows) return false;
  const index_t num_units = g.head_dim / (4 * lines);
  const trellis_keys keys{section.codes, next == nullptr ? section.codes : next,
                          num_units * packed_order<Bits>::unit_bytes, num_units};
  score_trellis_rows<Bits, 4>(keys, load_table(section.codebook, 128), g, scales, count, prepared, num_rows,
                              out);
  return true;
}

inline bool trellis_scores(const packed_section& section, const block_geometry& g, const bfloat16* scales,
                           index_t count, const float* prepared, index_t num_rows, float* out,
                           const std::byte* next) {
  const auto run = section.bits == 4   ? score_trellis<4>
                   : section.bits == 3 ? score_trellis<3>
                                       : score_trellis<2>;
  return runs_here() && run(section, g, scales, count, prepared, num_rows, out, next);
}

// ---- sums -----------------------------------------------------------------------------------------------------------

/// Packed values of up to 64 tokens: `num_packs` times four, `pack_bytes` apart, from some dim on.
struct trellis_values {
  const std::byte* at;
  const std::byte* before;  // the unit of the dims before, or zeros
  const std::byte* next;
  index_t pack_bytes;
  index_t before_bytes;  // pack_bytes, or none from zeros to zeros
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
    line_before before{codes_of<3, First == 0 ? 7 : First - 1>(earlier.line), broadcast_word(0)};
    line<0>(unit, before, out);
  }
};

template <int Bits, int First, int Rows>
KVCACHE_TARGET inline void sum_trellis_tile(trellis_values v, const byte_table& table_in_memory,
                                            const weight_bytes<1, Rows>& w, float* sums, index_t sum_stride) {
  constexpr int num_units = Bits == 4 ? 2 : 1;
  const byte_table table = table_in_memory;
  words sum[Rows][sum_lines];
#pragma GCC unroll 4
  for (auto& row : sum) {
#pragma GCC unroll 4
    for (words& s : row) s = same_words(0);
  }
  for (index_t t = 0; t < 4 * v.num_packs; t += 4) {
#pragma GCC unroll 2
    for (int u = 0; u < num_units; ++u) fetch_unit<Bits>(v.next + u * packed_order<Bits>::unit_bytes);
    __m512i line[sum_lines];
    value_states<Bits, First>::take(v.at, v.before, line);
    v.at += v.pack_bytes;
    v.before += v.before_bytes;
    v.next += v.pack_bytes;
#pragma GCC unroll 4
    for (__m512i& x : line) x = table.at({x}).x;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512i weight = four_bytes(&w.bytes[r][0][t]);
#pragma GCC unroll 4
      for (int c = 0; c < sum_lines; ++c) add_products(sum[r][c], weight, line[c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < sum_lines; ++c) {
      float* to = sums + r * sum_stride + c * key_lanes;
      store(to, fma(to_floats(reinterpret_cast<__m512i>(sum[r][c])), broadcast(w.scales[r]), load(to)));
    }
  }
}

/// Dims that are summed at a time: a tile, or two.
template <int Bits>
inline constexpr index_t trellis_sum_dims = (Bits == 3 ? 8 : sum_lines) * key_lanes;

template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_trellis_rows(const trellis_values& v, const byte_table& table,
                                            const block_geometry& g, const bfloat16* scales, index_t count,
                                            const float* weights, index_t num_rows, float* sums) {
  using order = packed_order<Bits>;
  constexpr index_t dims = trellis_sum_dims<Bits>;
  constexpr index_t tile_bytes = (Bits == 4 ? 2 : 1) * order::unit_bytes;
  for (; num_rows >= Rows; num_rows -= Rows, weights += Rows * g.block_size, sums += Rows * g.head_dim) {
    weight_bytes<1, Rows> w;
    split_weights(weights, g.block_size, scales, count, w);
    trellis_values here = v;
    for (index_t d = 0; d < g.head_dim; d += dims) {
      sum_trellis_tile<Bits, 0>(here, table, w, sums + d, g.head_dim);
      if constexpr (Bits == 3) sum_trellis_tile<Bits, 4>(here, table, w, sums + d + 4 * key_lanes, g.head_dim);
      here.at += tile_bytes;
      here.next += tile_bytes;
      here.before = here.at - order::unit_bytes;
      here.before_bytes = here.pack_bytes;
    }
  }
  if constexpr (Rows > 1)
    sum_trellis_rows<Bits, Rows / 2>(v, table, g, scales, count, weights, num_rows, sums);
}

template <int Bits>
KVCACHE_TARGET inline bool sum_trellis(const packed_section& section, const block_geometry& g,
                                       const bfloat16* scales, index_t count, const float* weights,
                                       index_t num_rows, float* sums, const std::byte* next) {
  if (g.head_dim % trellis_sum_dims<Bits> != 0 || num_rows > most_packed_rows) return false;
  alignas(64) static constexpr std::array<std::byte, 3 * packed_line_bytes> zeros{};
  const index_t pack_bytes =
      g.head_dim / key_lanes / packed_order<Bits>::lines_per_unit * packed_order<Bits>::unit_bytes;
  const byte_table table = load_table(section.codebook, 0);
  for (index_t t = 0; t < count; t += sum_tokens) {
    const index_t num_tokens = std::min(sum_tokens, count - t);
    const index_t skip = t / 4 * pack_bytes;
    const trellis_values v{section.codes + skip,
                           zeros.data(),
                           (next == nullptr ? section.codes : next) + skip,
                           pack_bytes,
                           0,
                           ceil_div(num_tokens, 4)};
    sum_trellis_rows<Bits, 4>(v, table, g, scales + t, num_tokens, weights + t, num_rows, sums);
  }
  return true;
}

inline bool trellis_accumulate(const packed_section& section, const block_geometry& g, const bfloat16* scales,
                               index_t count, const float* weights, index_t num_rows, float* sums,
                               const std::byte* next) {
  const auto run = section.bits == 4 ? sum_trellis<4> : section.bits == 3 ? sum_trellis<3> : sum_trellis<2>;
  return runs_here() && run(section, g, scales, count, weights, num_rows, sums, next);
}
