// SPDX-License-Identifier: MIT
// Packed codes multiplied without unpacking them to memory first: shift, mask and table look-up run beside the integer dot
// products, in other units of the processor. Coarse operands (avx512_bytes.inl); included by avx512.hpp.

/// How many rows are worth it: each tile of four rows unpacks again.
inline constexpr index_t most_packed_rows = 8;

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

template <int Bits>
KVCACHE_INLINE void fetch_unit(const std::byte* p) {
#pragma GCC unroll 3
  for (int i = 0; i < packed_unit<Bits>::packed_lines; ++i) prefetch::line(p + i * packed_line_bytes);
}

// ---- scores ---------------------------------------------------------------------------------------------------------

/// Where packed keys lie and what they are multiplied with.
struct packed_keys {
  const std::byte* at;
  const std::byte* next;  // fetched meanwhile
  index_t group_bytes;    // from one group of 16 keys to the next
  index_t num_units;      // of each group
  bits codebook;
};

/// Four dims of `Groups` groups after the other, line by line of a unit.
template <int Bits, int Line, int Rows, int Groups>
KVCACHE_INLINE void add_key_lines(const packed_unit<Bits> (&units)[Groups], bits codebook,
                                  const std::int8_t* query, index_t row_bytes, words (&sum)[Rows][Groups]) {
  __m512i k[Groups];
#pragma GCC unroll 4
  for (int i = 0; i < Groups; ++i) k[i] = look_up(codebook, codes_of<Bits, Line>(units[i].line)).x;
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const __m512i q = four_bytes(query + r * row_bytes + 4 * Line);
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) add_products(sum[r][i], k[i], q);
  }
  if constexpr (Line + 1 < packed_order<Bits>::lines_per_unit)
    add_key_lines<Bits, Line + 1>(units, codebook, query, row_bytes, sum);
}

template <int Bits, int Rows, int Groups>
KVCACHE_TARGET inline void score_packed_tile(const packed_keys& keys, const block_geometry& g,
                                             const bfloat16* scales, const float* prepared, float* out) {
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
  for (index_t u = 0; u < keys.num_units; ++u) {
    packed_unit<Bits> units[Groups];
#pragma GCC unroll 4
    for (int i = 0; i < Groups; ++i) {
      load_unit(at + i * keys.group_bytes, units[i]);
      fetch_unit<Bits>(next + i * keys.group_bytes);
    }
    add_key_lines<Bits, 0>(units, keys.codebook, query, row_floats * index_t{sizeof(float)}, sum);
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
            fma(to_floats(reinterpret_cast<__m512i>(sum[r][i])), mul(key_scale, broadcast(head[r].scale)),
                broadcast(head[r].constant)));
  }
}

/// As many times `Rows` rows as there are, then fewer; of each, four groups of keys at a time where the registers allow.
template <int Bits, int Rows>
KVCACHE_TARGET inline void score_packed_rows(packed_keys keys, const block_geometry& g,
                                             const bfloat16* scales, index_t count, const float* prepared,
                                             index_t num_rows, float* out) {
  constexpr int groups = Bits == 3 ? 2 : 4;
  for (; num_rows >= Rows; num_rows -= Rows, out += Rows * g.block_size) {
    packed_keys here = keys;
    const auto advance = [&here](index_t by) {
      here.at += by * here.group_bytes;
      here.next += by * here.group_bytes;
    };
    index_t t = 0;
    for (; t + (groups - 1) * key_lanes < count; t += groups * key_lanes, advance(groups))
      score_packed_tile<Bits, Rows, groups>(here, g, scales + t, prepared, out + t);
    for (; t < count; t += key_lanes, advance(1))
      score_packed_tile<Bits, Rows, 1>(here, g, scales + t, prepared, out + t);
    prepared += Rows * prepared_query_floats(g.head_dim);
  }
  if constexpr (Rows > 1) score_packed_rows<Bits, Rows / 2>(keys, g, scales, count, prepared, num_rows, out);
}

template <int Bits>
KVCACHE_TARGET inline bool score_packed(const packed_section& section, const block_geometry& g,
                                        const bfloat16* scales, index_t count, const float* prepared,
                                        index_t num_rows, float* out, const std::byte* next) {
  constexpr index_t lines = packed_order<Bits>::lines_per_unit;
  if (g.head_dim % (4 * lines) != 0 || num_rows > most_packed_rows) return false;
  const index_t num_units = g.head_dim / (4 * lines);
  const packed_keys keys{section.codes, next == nullptr ? section.codes : next,
                         num_units * packed_order<Bits>::unit_bytes, num_units,
                         load_unsigned_codebook(section.codebook)};
  score_packed_rows<Bits, 4>(keys, g, scales, count, prepared, num_rows, out);
  return true;
}

KVCACHE_TARGET inline bool packed_scores(const packed_section& section, const block_geometry& g,
                                         const bfloat16* scales, index_t count, const float* prepared,
                                         index_t num_rows, float* out, const std::byte* next) {
  const auto run = section.bits == 4   ? score_packed<4>
                   : section.bits == 3 ? score_packed<3>
                                       : score_packed<2>;
  return run(section, g, scales, count, prepared, num_rows, out, next);
}

// ---- sums -----------------------------------------------------------------------------------------------------------

/// Packed values of up to 64 tokens: `num_packs` times four, `pack_bytes` apart.
struct packed_values {
  const std::byte* at;
  const std::byte* next;
  index_t pack_bytes;
  index_t num_packs;
  bits codebook;
};

/// Lines that are summed at a time: with four rows all accumulators are in registers.
inline constexpr int sum_lines = 4;

/// Lines First .. First + 3 of consecutive units times the weights of four tokens.
template <int Bits, int First, int Line, int Rows>
KVCACHE_INLINE void add_value_lines(const packed_unit<Bits>* units, bits codebook,
                                    const __m512i (&weight)[Rows], words (&sum)[Rows][sum_lines]) {
  constexpr int lines = packed_order<Bits>::lines_per_unit;
  const __m512i x =
      look_up(codebook, codes_of<Bits, (First + Line) % lines>(units[(First + Line) / lines].line)).x;
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) add_products(sum[r][Line], weight[r], x);
  if constexpr (Line + 1 < sum_lines) add_value_lines<Bits, First, Line + 1>(units, codebook, weight, sum);
}

template <int Bits, int First, int Rows>
KVCACHE_INLINE void sum_packed_tile(packed_values v, const weight_bytes<1, Rows>& w, float* sums,
                                    index_t sum_stride) {
  constexpr int num_units = Bits == 4 ? 2 : 1;
  words sum[Rows][sum_lines];
#pragma GCC unroll 4
  for (auto& row : sum) {
#pragma GCC unroll 4
    for (words& s : row) s = same_words(0);
  }
  for (index_t t = 0; t < 4 * v.num_packs; t += 4, v.at += v.pack_bytes, v.next += v.pack_bytes) {
    packed_unit<Bits> units[num_units];
#pragma GCC unroll 2
    for (int u = 0; u < num_units; ++u) {
      load_unit(v.at + u * packed_order<Bits>::unit_bytes, units[u]);
      fetch_unit<Bits>(v.next + u * packed_order<Bits>::unit_bytes);
    }
    __m512i weight[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) weight[r] = four_bytes(&w.bytes[r][0][t]);
    add_value_lines<Bits, First, 0>(units, v.codebook, weight, sum);
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

template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_packed_rows(const packed_values& v, const block_geometry& g,
                                           const bfloat16* scales, index_t count, const float* weights,
                                           index_t num_rows, float* sums) {
  constexpr index_t dims = (Bits == 3 ? 8 : sum_lines) * key_lanes;  // of a tile, or of two
  constexpr index_t tile_bytes = (Bits == 4 ? 2 : 1) * packed_order<Bits>::unit_bytes;
  for (; num_rows >= Rows; num_rows -= Rows, weights += Rows * g.block_size, sums += Rows * g.head_dim) {
    weight_bytes<1, Rows> w;
    split_weights(weights, g.block_size, scales, count, w);
    packed_values here = v;
    for (index_t d = 0; d < g.head_dim; d += dims, here.at += tile_bytes, here.next += tile_bytes) {
      sum_packed_tile<Bits, 0>(here, w, sums + d, g.head_dim);
      if constexpr (Bits == 3) sum_packed_tile<Bits, 4>(here, w, sums + d + 4 * key_lanes, g.head_dim);
    }
  }
  if constexpr (Rows > 1) sum_packed_rows<Bits, Rows / 2>(v, g, scales, count, weights, num_rows, sums);
}

template <int Bits>
KVCACHE_TARGET inline bool sum_packed(const packed_section& section, const block_geometry& g,
                                      const bfloat16* scales, index_t count, const float* weights,
                                      index_t num_rows, float* sums, const std::byte* next) {
  constexpr index_t lines = packed_order<Bits>::lines_per_unit;
  constexpr index_t dims = (Bits == 3 ? 8 : sum_lines) * key_lanes;
  if (g.head_dim % dims != 0 || num_rows > most_packed_rows) return false;
  const index_t pack_bytes = g.head_dim / key_lanes / lines * packed_order<Bits>::unit_bytes;
  const bits codebook = load_codebook(section.codebook);
  for (index_t t = 0; t < count; t += sum_tokens) {
    const index_t num_tokens = std::min(sum_tokens, count - t);
    const index_t skip = t / 4 * pack_bytes;
    const packed_values v{section.codes + skip, (next == nullptr ? section.codes : next) + skip, pack_bytes,
                          ceil_div(num_tokens, 4), codebook};
    sum_packed_rows<Bits, 4>(v, g, scales + t, num_tokens, weights + t, num_rows, sums);
  }
  return true;
}

KVCACHE_TARGET inline bool packed_accumulate(const packed_section& section, const block_geometry& g,
                                             const bfloat16* scales, index_t count, const float* weights,
                                             index_t num_rows, float* sums, const std::byte* next) {
  const auto run = section.bits == 4 ? sum_packed<4> : section.bits == 3 ? sum_packed<3> : sum_packed<2>;
  return run(section, g, scales, count, weights, num_rows, sums, next);
}

inline constexpr low_bit_kernels kernels_for_packed = {unpack, hadamard, nearest, packed_scores,
                                                       packed_accumulate};
