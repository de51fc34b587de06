// SPDX-License-Identifier: MIT
// Packed codes of trellises to their numbers in one pass, with VBMI; included by avx512.hpp after
// vector_trellis_decode.inl. For rows that are no whole units of packed lines, which avx512_trellis.inl multiplies at once.

/// Lines of codes one after the other, from any line on.
template <int Bits>
struct code_lines {
  static_assert(Bits == 1 || Bits == 2 || Bits == 4, "one packed line is a unit");
  const std::byte* at;
  unsigned shift;

  KVCACHE_INLINE code_lines(const std::byte* packed, index_t line)
      : at(packed + line / packed_order<Bits>::lines_per_unit * packed_line_bytes),
        shift(static_cast<unsigned>(line % packed_order<Bits>::lines_per_unit) * Bits) {}

  KVCACHE_INLINE __m512i take() {
    const __m128i count = _mm_cvtsi32_si128(static_cast<int>(shift));
    const __m512i codes = _mm512_maskz_srl_epi32(all, load_bits(at).x, count);
    shift += Bits;
    at += shift / 8 * packed_line_bytes;
    shift %= 8;
    return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1)));
  }
};

/// Codes of 3, 5 and 6 bits: the low ones in one section, the others in another.
template <int Bits>
inline constexpr int bits_in_front = Bits == 3  ? 2
                                     : Bits > 4 ? 4
                                                : Bits;
template <int Bits>
inline constexpr int bits_behind = Bits - bits_in_front<Bits>;

template <int Bits>
requires(bits_behind<Bits> > 0) struct code_lines<Bits> {
  code_lines<bits_in_front<Bits>> low;
  code_lines<bits_behind<Bits>> high;

  KVCACHE_INLINE __m512i take() {
    const __m512i codes = low.take();
    return _mm512_or_si512(codes, shift_left<bits_in_front<Bits>>(high.take()));
  }
};

/// Packed lines [first, end) of a section, and those that are fetched meanwhile.
template <int Bits>
KVCACHE_INLINE void fetch_lines(const std::byte* next, index_t first, index_t end) {
  if (next == nullptr) return;
  constexpr index_t lines = packed_order<Bits>::lines_per_unit;
  for (index_t i = first / lines; i < ceil_div(end, lines); ++i)
    __builtin_prefetch(next + i * packed_line_bytes, 0, 3);
}

/// \param behind  bytes of the section of the low bits
template <int Bits>
KVCACHE_INLINE code_lines<Bits> lines_from(const packed_section& section, index_t behind, index_t line) {
  if constexpr (bits_behind < Bits >> 0) {
    return {code_lines<bits_in_front<Bits>>(section.codes, line),
            code_lines<bits_behind<Bits>>(section.codes + behind, line)};
  } else {
    return code_lines<Bits>(section.codes, line);
  }
}
template <int Bits>
KVCACHE_INLINE void fetch_lines_of(const std::byte* next, index_t behind, index_t first, index_t end) {
  fetch_lines<bits_in_front<Bits>>(next, first, end);
  if constexpr (bits_behind < Bits >> 0)
    fetch_lines<bits_behind<Bits>>(next == nullptr ? nullptr : next + behind, first, end);
}

/// `num_runs` runs of `num_lines` lines, of which the first is `first`.
template <int Bits, class Dims>
KVCACHE_TARGET inline void unpack_runs(const packed_section& section, index_t behind, index_t first,
                                       index_t num_runs, index_t num_lines, std::int8_t* out,
                                       index_t out_stride, const std::byte* next) {
  const byte_table table(section.codebook);
  fetch_lines_of<Bits>(next, behind, first, first + num_runs * num_lines);
  code_lines<Bits> lines = lines_from<Bits>(section, behind, first);
  for (index_t r = 0; r < num_runs; ++r, out += out_stride) {
    line_before before{broadcast_word(0), broadcast_word(0)};
#pragma GCC unroll 2
    for (index_t i = 0; i < num_lines; ++i)
      store_bits(out + 64 * i, table.at(states<Bits, Dims>({lines.take()}, before)));
  }
}

template <class Dims>
inline bool unpack_runs_of(const packed_section& section, index_t size, index_t first, index_t num_runs,
                           index_t num_lines, std::int8_t* out, index_t out_stride, const std::byte* next) {
  if (!runs_here()) return false;
  const index_t behind =
      section.bits == 3 ? packed_order<2>::section_bytes(size) : packed_order<4>::section_bytes(size);
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
