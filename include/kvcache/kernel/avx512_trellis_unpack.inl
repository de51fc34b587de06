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

/// Lines that are taken with shifts known in advance: whole packed lines of the low bits. Few, since with all sizes of klt much
/// code takes turns.
template <int Bits>
inline constexpr int lines_in_step = Bits == 4 ? 2 : 4;

/// The `Bits` low bits of every byte.
template <int Bits>
inline constexpr auto low_bits = static_cast<std::int32_t>(0x01010101U * ((1U << Bits) - 1));

/// Bits of 32-bit words, `N` places up, or down if it is negative.
template <int N>
KVCACHE_INLINE __m512i shifted(__m512i a) {
  if constexpr (N >= 0)
    return shift_left<N>(a);
  else
    return shift_right<-N>(a);
}

/// Bytes from the beginning of a section to the packed line that has line `line`.
template <int Bits>
KVCACHE_INLINE std::size_t packed_line_at(index_t line) {
  return static_cast<std::size_t>(line) * Bits / 8 * packed_line_bytes;
}

/// Two sections of packed codes: the low bits, and the others if there are any.
template <int Bits>
struct packed_places {
  const std::byte* low;
  const std::byte* high;

  [[nodiscard]] KVCACHE_INLINE const std::byte* low_at(index_t line) const {
    return low + packed_line_at<bits_in_front<Bits>>(line);
  }
  [[nodiscard]] KVCACHE_INLINE const std::byte* high_at(index_t line) const {
    return high + packed_line_at<bits_behind<Bits>>(line);
  }
  /// What is packed behind the low bits of a step: that of its first line in the low bits of bytes, of those after it above them.
  [[nodiscard]] KVCACHE_INLINE __m512i high_bits(index_t line) const {
    constexpr int behind = bits_behind<Bits>;
    if constexpr (behind == 0) return _mm512_setzero_si512();
    const __m512i packed = load_bits(high_at(line)).x;
    if constexpr (behind * lines_in_step<Bits> % 8 == 0) return packed;
    return _mm512_maskz_srl_epi32(
        all, packed, _mm_cvtsi64_si128(static_cast<index_t>(static_cast<std::size_t>(line) * behind % 8)));
  }
  /// Fetches the packed lines of a step.
  KVCACHE_INLINE void fetch(index_t line) const {
    constexpr int low_lines = lines_in_step<Bits> * bits_in_front<Bits> / 8;
#pragma GCC unroll 2
    for (int i = 0; i < low_lines; ++i) prefetch::line(low_at(line) + i * packed_line_bytes);
    if constexpr (bits_behind<Bits> != 0) prefetch::line(high_at(line));
  }
};

/// As states() in vector_trellis_decode.inl, of codes in the low bits of bytes, with anything above them.
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
  line_before before{broadcast_word(0), broadcast_word(0)};

  template <int Bits, class Dims>
  KVCACHE_INLINE void put(__m512i codes, const byte_table& table) {
    if (out == end) {
      out += gap_bytes;
      end = out + run_bytes;
      before = {broadcast_word(0), broadcast_word(0)};
    }
    store_bits(out, table.at(states_of<Bits, Dims>(codes, before)));
    out += 64;
  }
};

/// Lines [`Line`, lines_in_step) of a step; unless they are all wanted those below `end`.
template <int Bits, class Dims, bool All, int Line = 0>
KVCACHE_INLINE void unpack_step(const std::byte* low, __m512i high, index_t end, const byte_table& table,
                                unpacked_runs& to) {
  constexpr int front = bits_in_front<Bits>;
  if (!All && Line >= end) return;
  __m512i codes = shift_right<Line * front % 8>(load_bits(low + Line * front / 8 * packed_line_bytes).x);
  if constexpr (front != Bits)
    codes = select(low_bits<front>, codes, shifted<front - Line * bits_behind<Bits>>(high));
  to.put<Bits, Dims>(codes, table);
  if constexpr (Line + 1 < lines_in_step<Bits>)
    unpack_step<Bits, Dims, All, Line + 1>(low, high, end, table, to);
}

/// `num_runs` runs of `num_lines` lines, of which the first is `first`, a multiple of 4. \param behind  bytes of the section of
/// the low bits, 0 where they are all
template <int Bits, class Dims>
KVCACHE_TARGET inline void unpack_runs(const packed_section& section, index_t behind, index_t first,
                                       index_t num_runs, index_t num_lines, std::int8_t* out,
                                       index_t out_stride, const std::byte* next) {
  constexpr index_t step = lines_in_step<Bits>;
  const byte_table table(section.codebook);
  const index_t end = first + num_runs * num_lines;
  const packed_places<Bits> at{section.codes, section.codes + behind};
  const packed_places<Bits> ahead = next == nullptr ? at : packed_places<Bits>{next, next + behind};
  unpacked_runs to{out, out + 64 * num_lines, 64 * num_lines, out_stride - 64 * num_lines};
  for (index_t line = first; line < end; line += step) {
    ahead.fetch(line);
    if (line + step <= end)
      unpack_step<Bits, Dims, true>(at.low_at(line), at.high_bits(line), step, table, to);
    else
      unpack_step<Bits, Dims, false>(at.low_at(line), at.high_bits(line), end - line, table, to);
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
