// SPDX-License-Identifier: MIT
// The codec trellis multiplied as its codes are unpacked, with VBMI and coarse operands (avx512_bytes.inl); included by
// avx512.hpp. Packed codes become states in registers, a state is a look-up and a sign, and what that gives is
// multiplied by four rows at once; more rows take it from memory.
//
//   keys     a word is a token, its bytes and their fields are dims: all of a unit of 2 bits is one stream of 32 bits
//   values   a word is a dim: the codes of the dim before are one word away
//
// A field is the code of one line in a byte of a packed line. Lines of a unit follow each other, so the field before that
// of the first dim is the field of the line before, of the last dim.

inline constexpr std::int32_t low_nibbles = 0x0f0f0f0f;
inline constexpr std::int32_t even_pairs = 0x33333333;

/// Bits of a where the mask has ones, else of b, which is what has just been shifted and is written over.
KVCACHE_INLINE __m512i select(std::int32_t mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(b, a, _mm512_set1_epi32(mask), 0xd8);
}
template <int N>
KVCACHE_INLINE __m512i shift_left(__m512i a) {
  return _mm512_maskz_slli_epi32(all, a, N);
}
template <int N>
KVCACHE_INLINE __m512i shift_right(__m512i a) {
  return _mm512_maskz_srli_epi32(all, a, N);
}

/// Lines of 64 tokens.
using trellis_lines = std::array<std::byte, static_cast<std::size_t>(sum_tokens* max_head_dim)>;

/// The table; `flip`, 0 or 128, is what its bytes are xored with.
KVCACHE_INLINE byte_table load_table(const std::int8_t* table, std::uint8_t flip) {
  byte_table loaded(table);
#pragma GCC unroll 2
  for (__m512i& part : loaded.part) part = _mm512_xor_si512(part, _mm512_set1_epi8(static_cast<char>(flip)));
  return loaded;
}

template <int Bits>
KVCACHE_INLINE void fetch_unit(const std::byte* p) {
#pragma GCC unroll 3
  for (int i = 0; i < packed_unit<Bits>::packed_lines; ++i) prefetch::line(p + i * packed_line_bytes);
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
    if constexpr (Line == 0) {  // begins with codes of the unit before
      codes = in_order(load_bits(at).x);
      window = _mm512_shldi_epi32(window, codes, 8);
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

/// Where packed keys lie, and where their lines go if more rows will want them: numbers of the table, plus 128.
struct trellis_keys {
  const std::byte* at;
  const std::byte* next;  // fetched meanwhile
  std::byte* lines;       // may be null
  index_t group_bytes;    // from one group of 16 keys to the next
  index_t group_lines;    // the same in `lines`
  index_t num_units;      // of each group
};

/// Four dims of `Groups` groups after the other, line by line of a unit.
template <int Bits, int Line, int Rows, int Groups>
KVCACHE_INLINE void add_key_lines(key_stream<Bits> (&streams)[Groups], const trellis_keys& keys,
                                  const byte_table& table, const row_column<Rows>& queries,
                                  score_sums<Rows, Groups>& sums) {
  __m512i k[Groups];
#pragma GCC unroll 4
  for (int i = 0; i < Groups; ++i)
    k[i] = table.at({streams[i].template states<Line>(keys.at + i * keys.group_bytes)}).x;
  if (keys.lines != nullptr) {
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i)
      _mm512_store_si512(keys.lines + i * keys.group_lines + Line * packed_line_bytes, k[i]);
  }
  sums.add(k, queries, Line);
  if constexpr (Line + 1 < packed_order<Bits>::lines_per_unit)
    add_key_lines<Bits, Line + 1>(streams, keys, table, queries, sums);
}

template <int Bits, int Rows, int Groups>
KVCACHE_TARGET inline void score_trellis_tile(trellis_keys keys, const byte_table& table_in_memory,
                                              const block_geometry& g, const bfloat16* scales,
                                              const float* prepared, float* out) {
  using order = packed_order<Bits>;
  const byte_table table = table_in_memory;
  const index_t row_floats = prepared_query_floats(g.head_dim);
  row_column<Rows> queries(prepared + prepared_head_floats, row_floats);
  score_sums<Rows, Groups> sums;
  sums.start(prepared, row_floats);
  key_stream<Bits> streams[Groups];
#pragma GCC unroll 4
  for (key_stream<Bits>& stream : streams) stream.start();
  for (index_t u = 0; u < keys.num_units; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) fetch_unit<Bits>(keys.next + i * keys.group_bytes);
    add_key_lines<Bits, 0>(streams, keys, table, queries, sums);
    keys.at += order::unit_bytes;
    keys.next += order::unit_bytes;
    if (keys.lines != nullptr) keys.lines += order::lines_per_unit * packed_line_bytes;
    queries.go_on(order::lines_per_unit);
  }
  sums.finish(scales, prepared, row_floats, out, g.block_size);
}

/// Of lines that a tile before has made. What is next is asked for again: the first time, in a hurry, some of it was not
/// brought.
template <int Bits, int Rows, int Groups>
KVCACHE_TARGET inline void score_lines_tile(const trellis_keys& keys, const block_geometry& g,
                                            const bfloat16* scales, const float* prepared, float* out) {
  const index_t row_floats = prepared_query_floats(g.head_dim);
  row_column<Rows> queries(prepared + prepared_head_floats, row_floats);
  const std::byte* lines = keys.lines;
  const std::byte* next = keys.next;
  score_sums<Rows, Groups> sums;
  sums.start(prepared, row_floats);
  for (index_t d = 0; d < g.head_dim; d += 4, lines += packed_line_bytes, queries.go_on(1)) {
    if (d % (4 * packed_order<Bits>::lines_per_unit) == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < Groups; ++i) fetch_unit<Bits>(next + i * keys.group_bytes);
      next += packed_order<Bits>::unit_bytes;
    }
    __m512i k[Groups];
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) k[i] = load_bits(lines + i * keys.group_lines).x;
    sums.add(k, queries, 0);
  }
  sums.finish(scales, prepared, row_floats, out, g.block_size);
}

/// Four, two or one rows of what is left, until none is. \param unpacked  the lines are there
template <int Bits, int Rows, int Groups>
KVCACHE_TARGET inline void score_trellis_rows(const trellis_keys& keys, const byte_table& table,
                                              const block_geometry& g, const bfloat16* scales,
                                              const float* prepared, index_t num_rows, float* out,
                                              bool unpacked) {
  for (; num_rows >= Rows; num_rows -= Rows, out += Rows * g.block_size) {
    if (unpacked) {
      score_lines_tile<Bits, Rows, Groups>(keys, g, scales, prepared, out);
    } else {
      score_trellis_tile<Bits, Rows, Groups>(keys, table, g, scales, prepared, out);
      unpacked = true;
    }
    prepared += Rows * prepared_query_floats(g.head_dim);
  }
  if constexpr (Rows > 1)
    score_trellis_rows<Bits, Rows / 2, Groups>(keys, table, g, scales, prepared, num_rows, out, unpacked);
}

/// Whether one tile of rows serves them all, so that nobody wants lines.
constexpr bool is_one_tile(index_t num_rows) { return num_rows == 1 || num_rows == 2 || num_rows == 4; }

template <int Bits>
KVCACHE_TARGET inline bool score_trellis(const packed_section& section, const block_geometry& g,
                                         const bfloat16* scales, index_t count, const float* prepared,
                                         index_t num_rows, float* out, const std::byte* next) {
  constexpr index_t lines = packed_order<Bits>::lines_per_unit;
  if (g.head_dim % (4 * lines) != 0 || num_rows > most_packed_rows) return false;
  constexpr int groups = Bits == 3 ? 2 : 4;
  alignas(64) trellis_lines memory;
  const index_t num_units = g.head_dim / (4 * lines);
  const byte_table table = load_table(section.codebook, 128);
  trellis_keys keys{section.codes,
                    next == nullptr ? section.codes : next,
                    is_one_tile(num_rows) ? nullptr : memory.data(),
                    num_units * packed_order<Bits>::unit_bytes,
                    num_units * lines * packed_line_bytes,
                    num_units};
  const auto advance = [&](index_t by) {
    keys.at += by * keys.group_bytes;
    keys.next += by * keys.group_bytes;
  };
  index_t t = 0;
  for (; t + (groups - 1) * key_lanes < count; t += groups * key_lanes, advance(groups))
    score_trellis_rows<Bits, 4, groups>(keys, table, g, scales + t, prepared, num_rows, out + t, false);
  for (; t < count; t += key_lanes, advance(1))
    score_trellis_rows<Bits, 4, 1>(keys, table, g, scales + t, prepared, num_rows, out + t, false);
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
