// SPDX-License-Identifier: MIT
// Packed codes multiplied without unpacking them to memory first: shift, mask and table look-up run beside the integer dot
// products, in other units of the processor. Coarse operands (avx512_bytes.inl); included by avx512.hpp.

/// How many rows are worth it, one tile of the packed ones: more would make bytes of the codes again.
inline constexpr int most_packed_rows = 8;

/// The codebook of keys, plus 128: unsigned, as the dot product wants them.
KVCACHE_INLINE bits load_unsigned_codebook(const std::int8_t* p) {
  return {_mm512_xor_si512(load_codebook(p).x, _mm512_set1_epi8(-128))};
}

/// One unit of packed lines.
template <int Bits>
struct packed_unit {
  static constexpr int packed_lines = Bits == 3 ? 3 : 1;
  bits line[packed_lines];
};

template <int Bits>
KVCACHE_INLINE void load_unit(const std::byte* p, packed_unit<Bits>& unit) {
#pragma GCC unroll 3
  for (int i = 0; i < packed_unit<Bits>::packed_lines; ++i)
    unit.line[i] = load_bits(p + i * packed_line_bytes);
}

/// Lines of what comes next, as many as are multiplied meanwhile. By levels, those that are wanted later are asked for in two
/// streams, from the section's beginning and from its middle on (bench/NOTES.md, "In order of address").
struct lines_ahead {
  const std::byte* far;    // of the stream whose turn it is
  const std::byte* other;  // of the other one
  const std::byte* near;
  index_t stride;  // of either

  /// \param num_bytes  of the section
  lines_ahead(const upcoming& then, index_t num_bytes)
      : far(then.next),
        other(then.next +
              (prefetch::by_levels ? round_up(num_bytes / 2, packed_line_bytes) : packed_line_bytes)),
        near(then.soon),
        stride(prefetch::by_levels ? packed_line_bytes : 2 * packed_line_bytes) {}

  [[gnu::always_inline]] void step() {
    far = std::exchange(other, far + stride);
    near += packed_line_bytes;
  }
  template <int Lines>
  KVCACHE_INLINE void fetch() {
#pragma GCC unroll 6
    for (int i = 0; i < Lines; ++i, step()) prefetch::lines(far, near);
  }
};

// ---- scores ---------------------------------------------------------------------------------------------------------

/// Where packed keys lie and what they are multiplied with.
struct packed_keys {
  const std::byte* at;
  index_t group_bytes;  // from one group of 16 keys to the next
  index_t num_units;    // of each group
  bits codebook;
};

/// Four dims of `Groups` groups after the other, line by line of a unit.
template <int Bits, int Line, int Rows, int Groups>
KVCACHE_INLINE void add_key_lines(const packed_unit<Bits> (&units)[Groups], bits codebook,
                                  const row_column<Rows>& queries, score_sums<Rows, Groups>& sums) {
  __m512i k[Groups];
#pragma GCC unroll 4
  for (int i = 0; i < Groups; ++i) k[i] = look_up(codebook, codes_of<Bits, Line>(units[i].line)).x;
  sums.add(k, queries, Line);
  if constexpr (Line + 1 < packed_order<Bits>::lines_per_unit)
    add_key_lines<Bits, Line + 1>(units, codebook, queries, sums);
}

template <int Bits, int Rows, int Groups>
KVCACHE_TARGET inline void score_packed_tile(const packed_keys& keys, const block_geometry& g,
                                             const bfloat16* scales, const float* prepared, float* out,
                                             lines_ahead& ahead) {
  const index_t row_floats = prepared_query_floats(g.head_dim);
  row_column<Rows> queries(prepared + prepared_head_floats, row_floats);
  const std::byte* at = keys.at;
  lines_ahead next = ahead;  // in registers
  score_sums<Rows, Groups> sums;
  sums.start(prepared, row_floats);
  for (index_t u = 0; u < keys.num_units; ++u) {
    packed_unit<Bits> units[Groups];
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) load_unit(at + i * keys.group_bytes, units[i]);
    next.fetch<Groups * packed_unit<Bits>::packed_lines>();
    add_key_lines<Bits, 0>(units, keys.codebook, queries, sums);
    at += packed_order<Bits>::unit_bytes;
    queries.go_on(packed_order<Bits>::lines_per_unit);
  }
  ahead = next;
  sums.finish(scales, prepared, row_floats, out, g.block_size);
}

/// As many times `Rows` rows as there are, then fewer; of each, as many groups of keys at a time as the registers allow.
template <int Bits, int Rows>
KVCACHE_TARGET inline void score_packed_rows(const packed_keys& keys, const block_geometry& g,
                                             const bfloat16* scales, index_t count, const float* prepared,
                                             index_t num_rows, float* out, const lines_ahead& ahead) {
  constexpr int groups = Bits == 3 ? 2 : byte_tile_width(Rows);
  for (; num_rows >= Rows; num_rows -= Rows, out += Rows * g.block_size) {
    packed_keys here = keys;
    lines_ahead next = ahead;
    index_t t = 0;
    for (; t + (groups - 1) * key_lanes < count;
         t += groups * key_lanes, here.at += groups * here.group_bytes)
      score_packed_tile<Bits, Rows, groups>(here, g, scales + t, prepared, out + t, next);
    for (; t < count; t += key_lanes, here.at += here.group_bytes)
      score_packed_tile<Bits, Rows, 1>(here, g, scales + t, prepared, out + t, next);
    prepared += Rows * prepared_query_floats(g.head_dim);
  }
  if constexpr (Rows > 1)
    score_packed_rows<Bits, Rows / 2>(keys, g, scales, count, prepared, num_rows, out, ahead);
}

template <int Bits>
KVCACHE_TARGET inline bool score_packed(const packed_section& section, const block_geometry& g,
                                        const bfloat16* scales, index_t count, const float* prepared,
                                        index_t num_rows, float* out, const upcoming& next) {
  constexpr index_t lines = packed_order<Bits>::lines_per_unit;
  if (g.head_dim % (4 * lines) != 0 || num_rows > most_packed_rows) return false;
  const index_t num_units = g.head_dim / (4 * lines);
  const packed_keys keys{section.codes, num_units * packed_order<Bits>::unit_bytes, num_units,
                         load_unsigned_codebook(section.codebook)};
  const lines_ahead ahead(next.or_at_hand(section.codes), g.block_size / key_lanes * keys.group_bytes);
  score_packed_rows<Bits, most_packed_rows>(keys, g, scales, count, prepared, num_rows, out, ahead);
  return true;
}

KVCACHE_TARGET inline bool packed_scores(const packed_section& section, const block_geometry& g,
                                         const bfloat16* scales, index_t count, const float* prepared,
                                         index_t num_rows, float* out, const upcoming& next) {
  const auto run = section.bits == 4   ? score_packed<4>
                   : section.bits == 3 ? score_packed<3>
                                       : score_packed<2>;
  return run(section, g, scales, count, prepared, num_rows, out, next);
}

// ---- sums -----------------------------------------------------------------------------------------------------------

/// Packed values of up to 64 tokens: `num_packs` times four, `pack_bytes` apart.
struct packed_values {
  const std::byte* at;
  index_t pack_bytes;
  index_t num_packs;
  bits codebook;
};

/// Lines First, First + 1 and so on of consecutive units.
template <int Bits, int First, int Line, int Lines>
KVCACHE_INLINE void look_up_lines(const packed_unit<Bits>* units, bits codebook, __m512i (&x)[Lines]) {
  constexpr int lines = packed_order<Bits>::lines_per_unit;
  x[Line] = look_up(codebook, codes_of<Bits, (First + Line) % lines>(units[(First + Line) / lines].line)).x;
  if constexpr (Line + 1 < Lines) look_up_lines<Bits, First, Line + 1>(units, codebook, x);
}

/// Lines of one unit, or of as many as a tile takes.
template <int Bits, int Rows>
inline constexpr int lines_of_units = std::max(byte_tile_width(Rows),
                                               static_cast<int>(packed_order<Bits>::lines_per_unit));

template <int Bits, int First, int Rows>
KVCACHE_INLINE void sum_packed_tile(packed_values v, const weight_bytes<1, Rows>& w, float* sums,
                                    index_t sum_stride, lines_ahead& ahead) {
  constexpr int lines = byte_tile_width(Rows);
  constexpr int num_units = lines_of_units<Bits, Rows> / packed_order<Bits>::lines_per_unit;
  constexpr int passes = lines_of_units<Bits, Rows> / lines;  // over the same units, each asks for its share
  lines_ahead next = ahead;                                   // in registers
  value_sums<Rows, lines> sum;
  sum.start();
  for (index_t t = 0; t < 4 * v.num_packs; t += 4, v.at += v.pack_bytes) {
    packed_unit<Bits> units[num_units];
#pragma GCC unroll 2
    for (int u = 0; u < num_units; ++u) load_unit(v.at + u * packed_order<Bits>::unit_bytes, units[u]);
    if (passes == 1 || t / 4 % passes == First / lines)
      next.fetch<num_units * packed_unit<Bits>::packed_lines>();
    __m512i x[lines];
    look_up_lines<Bits, First, 0>(units, v.codebook, x);
    sum.add(x, w, t);
  }
  ahead = next;
  sum.finish(w, sums, sum_stride);
}

/// Those lines from First on.
template <int Bits, int First, int Rows>
KVCACHE_INLINE void sum_packed_units(const packed_values& v, const weight_bytes<1, Rows>& w, float* sums,
                                     index_t sum_stride, lines_ahead& next) {
  sum_packed_tile<Bits, First>(v, w, sums + First * key_lanes, sum_stride, next);
  constexpr int then = First + byte_tile_width(Rows);
  if constexpr (then < lines_of_units<Bits, Rows>) sum_packed_units<Bits, then>(v, w, sums, sum_stride, next);
}

template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_packed_rows(const packed_values& v, const block_geometry& g,
                                           const bfloat16* scales, index_t count, const float* weights,
                                           index_t num_rows, float* sums, const lines_ahead& ahead) {
  constexpr int lines = lines_of_units<Bits, Rows>;
  constexpr index_t num_bytes = lines / packed_order<Bits>::lines_per_unit * packed_order<Bits>::unit_bytes;
  for (; num_rows >= Rows; num_rows -= Rows, weights += Rows * g.block_size, sums += Rows * g.head_dim) {
    weight_bytes<1, Rows> w;
    split_weights(weights, g.block_size, scales, count, w);
    packed_values here = v;
    lines_ahead next = ahead;
    for (index_t d = 0; d < g.head_dim; d += lines * key_lanes, here.at += num_bytes)
      sum_packed_units<Bits, 0>(here, w, sums + d, g.head_dim, next);
  }
  if constexpr (Rows > 1)
    sum_packed_rows<Bits, Rows / 2>(v, g, scales, count, weights, num_rows, sums, ahead);
}

template <int Bits>
KVCACHE_TARGET inline bool sum_packed(const packed_section& section, const block_geometry& g,
                                      const bfloat16* scales, index_t count, const float* weights,
                                      index_t num_rows, float* sums, const upcoming& next) {
  constexpr index_t lines = packed_order<Bits>::lines_per_unit;
  constexpr index_t dims = lines_of_units<Bits, 1> * key_lanes;
  if (g.head_dim % dims != 0 || num_rows > most_packed_rows) return false;
  const index_t pack_bytes = g.head_dim / key_lanes / lines * packed_order<Bits>::unit_bytes;
  const bits codebook = load_codebook(section.codebook);
  for (index_t t = 0; t < count; t += sum_tokens) {
    const index_t num_tokens = std::min(sum_tokens, count - t);
    const index_t skip = t / 4 * pack_bytes;
    const packed_values v{section.codes + skip, pack_bytes, ceil_div(num_tokens, 4), codebook};
    const lines_ahead ahead(next.or_at_hand(section.codes).part(skip), v.num_packs * pack_bytes);
    sum_packed_rows<Bits, most_packed_rows>(v, g, scales + t, num_tokens, weights + t, num_rows, sums, ahead);
  }
  return true;
}

KVCACHE_TARGET inline bool packed_accumulate(const packed_section& section, const block_geometry& g,
                                             const bfloat16* scales, index_t count, const float* weights,
                                             index_t num_rows, float* sums, const upcoming& next) {
  const auto run = section.bits == 4 ? sum_packed<4> : section.bits == 3 ? sum_packed<3> : sum_packed<2>;
  return run(section, g, scales, count, weights, num_rows, sums, next);
}

inline constexpr low_bit_kernels kernels_for_packed = {unpack, hadamard, nearest, packed_scores,
                                                       packed_accumulate};
