// SPDX-License-Identifier: MIT
// Packed codes of trellises to their numbers in one pass, with VBMI; included by avx512.hpp after
// vector_trellis_decode.inl. For rows that are no whole units of packed lines, which avx512_trellis.inl multiplies at once.

/// Codes of 3, 5 and 6 bits: the low ones in one section, the others in another.
template <int Bits>
inline constexpr int bits_in_front = Bits == 3  ? 2
                                     : Bits > 4 ? 4
                                                : Bits;
template <int Bits>
inline constexpr int bits_behind = Bits - bits_in_front<Bits>;

/// Lines after which both sections are at the beginning of a packed line again.
template <int Bits>
inline constexpr int lines_in_step = 8 / (bits_behind<Bits> == 0 ? Bits : bits_behind<Bits>);

/// The `Bits` low bits of every byte.
template <int Bits>
inline constexpr auto low_bits = static_cast<std::int32_t>(0x01010101U * ((1U << Bits) - 1));

/// The codes of line `Line` of packed lines that begin at `at`, in the low bits of bytes; what is above them is indeterminate.
template <int Bits, int Line>
KVCACHE_INLINE __m512i codes_of_line(const std::byte* at) {
  static_assert(Bits == 1 || Bits == 2 || Bits == 4, "one packed line is a unit");
  return shift_right<Line * Bits % 8>(load_bits(at + Line * Bits / 8 * packed_line_bytes).x);
}

/// Packed lines of a section where they are taken, and those of the section behind it.
struct packed_places {
  const std::byte* low;
  const std::byte* high;
};

template <int Bits, int Line>
KVCACHE_INLINE __m512i codes_of_line(const packed_places& at) {
  constexpr int front = bits_in_front<Bits>;
  const __m512i low = codes_of_line<front, Line>(at.low);
  if constexpr (front == Bits)
    return low;
  else
    return select(low_bits<front>, low, shift_left<front>(codes_of_line<Bits - front, Line>(at.high)));
}

/// As states() in vector_trellis_decode.inl, of codes with anything above them.
template <int Bits, class Dims>
KVCACHE_INLINE bits states_of(__m512i codes, line_before& before) {
  __m512i s = select(low_bits<Bits>, codes, Dims::template earlier<1, Bits>({codes}, before.codes).x);
  if constexpr (Bits == 3) {
    s = select(low_bits<6>, s, Dims::template earlier<2, 6>({codes}, before.codes).x);
  } else if constexpr (Bits == 2) {
    const bits pairs{s};
    s = select(low_bits<4>, s, Dims::template earlier<2, 4>(pairs, before.pairs).x);
    before.pairs = pairs;
  }
  before.codes = {codes};
  return {s};
}

/// Where numbers go, run by run.
struct unpacked_runs {
  std::int8_t* out;
  std::int8_t* end;   // of this run
  index_t run_bytes;  // of one run
  index_t gap_bytes;  // from the end of one to the next

  KVCACHE_INLINE void put(bits numbers) {
    store_bits(out, numbers);
    out += 64;
  }
  /// Whether the next line begins a run.
  KVCACHE_INLINE bool begins() {
    if (out != end) return false;
    out += gap_bytes;
    end = out + run_bytes;
    return true;
  }
};

/// Lines [`Line`, lines_in_step) of those that begin at `at`; unless they are all wanted those in [first, end).
template <int Bits, class Dims, bool All, int Line = 0>
KVCACHE_INLINE void unpack_step(const packed_places& at, index_t first, index_t end, const byte_table& table,
                                line_before& before, unpacked_runs& to) {
  if (All || (Line >= first && Line < end)) {
    if (to.begins()) before = {broadcast_word(0), broadcast_word(0)};
    to.put(table.at(states_of<Bits, Dims>(codes_of_line<Bits, Line>(at), before)));
  }
  if constexpr (Line + 1 < lines_in_step<Bits>)
    unpack_step<Bits, Dims, All, Line + 1>(at, first, end, table, before, to);
}

/// Packed lines that begin at `at` and hold lines_in_step are fetched.
template <int Bits>
KVCACHE_INLINE void fetch_step(const packed_places& at) {
  constexpr int low_lines = lines_in_step<Bits> * bits_in_front<Bits> / 8;
#pragma GCC unroll 4
  for (int i = 0; i < low_lines; ++i) __builtin_prefetch(at.low + i * packed_line_bytes, 0, 3);
  if constexpr (bits_in_front<Bits> != Bits) __builtin_prefetch(at.high, 0, 3);
}

/// Goes on by `lines`, a multiple of lines_in_step.
template <int Bits>
KVCACHE_INLINE void advance(packed_places& at, index_t lines) {
  at.low += lines * bits_in_front<Bits> / 8 * packed_line_bytes;
  if constexpr (bits_in_front<Bits> != Bits) at.high += lines * bits_behind<Bits> / 8 * packed_line_bytes;
}

/// `num_runs` runs of `num_lines` lines, of which the first is `first`. \param behind  bytes of the section of the low bits, 0
/// where they are all
template <int Bits, class Dims>
KVCACHE_TARGET inline void unpack_runs(const packed_section& section, index_t behind, index_t first,
                                       index_t num_runs, index_t num_lines, std::int8_t* out,
                                       index_t out_stride, const std::byte* next) {
  constexpr index_t step = lines_in_step<Bits>;
  const byte_table table(section.codebook);
  const index_t end = first + num_runs * num_lines;
  line_before before{broadcast_word(0), broadcast_word(0)};
  unpacked_runs to{out, out + 64 * num_lines, 64 * num_lines, out_stride - 64 * num_lines};
  index_t line = first / step * step;
  packed_places at{section.codes, section.codes + behind};
  packed_places ahead = next == nullptr ? at : packed_places{next, next + behind};
  advance<Bits>(at, line);
  advance<Bits>(ahead, line);
  for (; line < end; line += step, advance<Bits>(at, step), advance<Bits>(ahead, step)) {
    fetch_step<Bits>(ahead);
    if (line >= first && line + step <= end)
      unpack_step<Bits, Dims, true>(at, 0, step, table, before, to);
    else
      unpack_step<Bits, Dims, false>(at, first - line, end - line, table, before, to);
  }
}

template <class Dims>
inline bool unpack_runs_of(const packed_section& section, index_t size, index_t first, index_t num_runs,
                           index_t num_lines, std::int8_t* out, index_t out_stride, const std::byte* next) {
  if (!runs_here()) return false;
  const index_t behind = section.bits == 3  ? packed_order<2>::section_bytes(size)
                         : section.bits > 4 ? packed_order<4>::section_bytes(size)
                                            : 0;
  const auto run = section.bits == 6   ? unpack_runs<6, Dims>
                   : section.bits == 5 ? unpack_runs<5, Dims>
                   : section.bits == 4 ? unpack_runs<4, Dims>
                   : section.bits == 3 ? unpack_runs<3, Dims>
                                       : unpack_runs<2, Dims>;
  run(section, behind, first, num_runs, num_lines, out, out_stride, next);
  return true;
}

inline bool unpack_trellis_keys(const packed_section& section, const block_geometry& g, index_t token,
                                index_t num_tokens, std::int8_t* out, index_t out_stride,
                                const std::byte* next) {
  using order = block_order<std::int8_t>;
  return unpack_runs_of<dims_in_bytes>(section, order::key_size(g), token / key_lanes * order::key_packs(g),
                                       ceil_div(num_tokens, key_lanes), order::key_packs(g), out, out_stride,
                                       next);
}
/// Where packs are whole lines.
inline bool unpack_trellis_values(const packed_section& section, const block_geometry& g, index_t token,
                                  index_t num_tokens, std::int8_t* out, index_t out_stride,
                                  const std::byte* next) {
  using order = block_order<std::int8_t>;
  constexpr index_t dims = 64 / order::pack;  // of a line
  if (g.head_dim % dims != 0) return false;
  return unpack_runs_of<dims_in_words>(
      section, order::value_size(g), token / order::pack * (g.head_dim / dims),
      ceil_div(num_tokens, order::pack), g.head_dim / dims, out, out_stride, next);
}
