// SPDX-License-Identifier: MIT
// Sums of the codec trellis, as its scores in avx512_trellis.inl; included after it.
//
// Sixteen dims of a pack of four values are a line, and four lines are summed at a time. Their states go through the
// first-level cache, some packs before they are looked up: from code to product is a chain of forty cycles, and a
// processor that has to wait for such a chain sees too few instructions ahead to do anything else meanwhile.

/// Words of a, moved up by N, after the last of b.
template <int N>
KVCACHE_INLINE __m512i words_after(__m512i a, __m512i b) {
  return _mm512_maskz_alignr_epi32(all, a, b, 16 - N);
}

/// The states of a pack of values.
///   packed_bytes, lines           that are taken at a time, from one pack
///   take(at, carried, out, carry) `carried` is the line that the dims before have left as `carry`
///   in_order(sums)                of four lines to those of consecutive dims
template <int Bits>
struct value_states;

template <int Line>
KVCACHE_INLINE void store_line(std::byte* out, __m512i x) {
  _mm512_store_si512(out + Line * packed_line_bytes, x);
}

struct lines_in_order {
  KVCACHE_INLINE static void in_order(words (&)[4]) {}
};

/// Which bytes and bits go where in value_states<2>.
struct pair_places {
  using bytes = std::array<std::uint8_t, 64>;

  /// Bytes of a token beside each other: dims 4q ... 4q + 3 of token k are word 4q + k.
  static constexpr bytes by_token() {
    bytes from{};
    for (unsigned i = 0; i < 64; ++i)
      from[i] = static_cast<std::uint8_t>(i % 4 * 4 + i / 4 % 4);
    return from;
  }
  /// For lines `line` and the next, quads of dims q, tokens k: the byte of that quad, then of the quad before, from 64 on
  /// in what was carried.
  static constexpr bytes pairs_of(unsigned line) {
    bytes from{};
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned j = line + i / 16;
      const unsigned q = i / 4 % 4;
      const unsigned word = 4 * (i % 4);
      from[2 * i] = static_cast<std::uint8_t>(16 * q + word + 3 - j);
      const unsigned before = q > 0 ? 16 * (q - 1) + word + 3 - j : j > 0 ? 48 + word + 4 - j : 112 + word;
      from[2 * i + 1] = static_cast<std::uint8_t>(before);
    }
    return from;
  }
  /// Where in 64 bits the states of dims `dim` and the next begin.
  static constexpr bytes offsets_of(unsigned dim) {
    bytes from{};
    for (unsigned i = 0; i < 64; ++i)
      from[i] = static_cast<std::uint8_t>(i % 4 * 16 + 6 - 2 * (dim + i / 4 % 2));
    return from;
  }
};

/// Four dims of a token become a byte, four codes, and two such bytes, side by side, hold the states of four dims. Of those
/// the first two are taken of two lines, then the last two, so that one window into 64 bits gives eight states.
template <>
struct value_states<2> {
  static constexpr int lines = 4;
  static constexpr index_t packed_bytes = packed_order<2>::unit_bytes;

  using bytes = pair_places::bytes;
  alignas(64) static constexpr bytes tokens = pair_places::by_token();
  alignas(64) static constexpr bytes pairs[2] = {pair_places::pairs_of(0), pair_places::pairs_of(2)};
  alignas(64) static constexpr bytes offsets[2] = {pair_places::offsets_of(0), pair_places::offsets_of(2)};

  KVCACHE_INLINE static __m512i constant(const bytes& x) { return _mm512_load_si512(x.data()); }
  KVCACHE_INLINE static __m512i window(int i, __m512i codes) {
    return _mm512_maskz_multishift_epi64_epi8(~__mmask64{0}, constant(offsets[i]), codes);
  }
  KVCACHE_INLINE static void take(const std::byte* at, const std::byte* carried, std::byte* out,
                                  std::byte* carry) {
    const __m512i before = load_once(carried);
    const __m512i codes =
        key_stream<2>::in_order(_mm512_shuffle_epi8(load_once(at), constant(tokens)));
    _mm512_store_si512(carry, codes);
    const __m512i low = _mm512_permutex2var_epi8(codes, constant(pairs[0]), before);
    const __m512i high = _mm512_maskz_permutexvar_epi8(~__mmask64{0}, constant(pairs[1]), codes);
    store_line<0>(out, window(0, low));
    store_line<1>(out, window(1, low));
    store_line<2>(out, window(0, high));
    store_line<3>(out, window(1, high));
  }
  /// Pairs of words by turns.
  KVCACHE_INLINE static void in_order(words (&sum)[4]) {
    const __m512i lower_half = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i upper_half = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const auto a = reinterpret_cast<__m512i>(sum[i]);
      const auto b = reinterpret_cast<__m512i>(sum[i + 1]);
      sum[i] = reinterpret_cast<words>(_mm512_permutex2var_epi64(a, lower_half, b));
      sum[i + 1] = reinterpret_cast<words>(_mm512_permutex2var_epi64(a, upper_half, b));
    }
  }
};

/// Two units.
template <>
struct value_states<4> : lines_in_order {
  static constexpr int lines = 4;
  static constexpr index_t packed_bytes = 2 * packed_order<4>::unit_bytes;

  template <int Line>
  KVCACHE_INLINE static __m512i take_unit(__m512i now, __m512i before, std::byte* out) {
    const __m512i up = shift_left<4>(now);
    store_line<Line>(out, select(low_nibbles, now, words_after<1>(up, before)));
    store_line<Line + 1>(out, select(low_nibbles, shift_right<4>(now), words_after<1>(now, up)));
    return now;
  }
  KVCACHE_INLINE static void take(const std::byte* at, const std::byte* carried, std::byte* out,
                                  std::byte* carry) {
    const __m512i first = take_unit<0>(load_once(at), load_once(carried), out);
    _mm512_store_si512(carry, take_unit<2>(load_once(at + packed_order<4>::unit_bytes), first, out));
  }
};

/// The codes of the last line are carried.
template <>
struct value_states<3> : lines_in_order {
  static constexpr int lines = 8;
  static constexpr index_t packed_bytes = packed_order<3>::unit_bytes;

  template <int Line>
  KVCACHE_INLINE static void take_lines(const packed_unit<3>& unit, line_before& before, std::byte* out) {
    store_line<Line>(out, states<3, dims_in_words>(codes_of<3, Line>(unit.line), before).x);
    if constexpr (Line + 1 < lines) take_lines<Line + 1>(unit, before, out);
  }
  KVCACHE_INLINE static void take(const std::byte* at, const std::byte* carried, std::byte* out,
                                  std::byte* carry) {
    packed_unit<3> unit;
    load_unit(at, unit);
    line_before before{load_bits(carried), broadcast_word(0)};
    take_lines<0>(unit, before, out);
    store_bits(carry, before.codes);
  }
};

/// Makes the lines of up to 64 values, packs of the same dims after the other, then those of the dims that follow.
template <int Bits>
struct state_maker {
  using states = value_states<Bits>;

  const std::byte* at;  // packed
  const std::byte* next;
  const std::byte* carried;
  std::byte* carry;
  std::byte* lines;
  index_t pack_bytes;  // from one pack to the next, packed
  index_t pack_lines;  // the same in `lines`
  index_t num_packs;
  index_t num_steps;  // in all
  index_t made;
  index_t pack;
  std::byte* left;  // what every pack carried

  /// \param left_lines  a line for each pack
  KVCACHE_INLINE void start(const std::byte* codes, const std::byte* to_fetch, std::byte* out,
                            std::byte* left_lines, index_t head_dim, index_t num_tokens) {
    alignas(64) static constexpr std::array<std::byte, packed_line_bytes> zeros{};
    at = codes;
    next = to_fetch;
    lines = out;
    carried = zeros.data();
    left = left_lines;
    carry = left;
    pack_bytes = head_dim / (states::lines * key_lanes) * states::packed_bytes;
    pack_lines = 4 * head_dim;
    num_packs = ceil_div(num_tokens, 4);
    num_steps = head_dim / (states::lines * key_lanes) * num_packs;
    made = 0;
    pack = 0;
  }
  KVCACHE_INLINE void make_one() {
    states::take(at, carried, lines, carry);
#pragma GCC unroll 3
    for (index_t i = 0; i < states::packed_bytes; i += packed_line_bytes) __builtin_prefetch(next + i, 0, 2);
    at += pack_bytes;
    next += pack_bytes;
    lines += pack_lines;
    carry += packed_line_bytes;
    if (made >= num_packs) carried += packed_line_bytes;
    ++made;
    if (++pack == num_packs) next_dims();
  }
  KVCACHE_INLINE void next_dims() {
    pack = 0;
    at += states::packed_bytes - num_packs * pack_bytes;
    next += states::packed_bytes - num_packs * pack_bytes;
    lines += states::lines * packed_line_bytes - num_packs * pack_lines;
    carry = left;
    carried = left;
  }
};

/// Packs of values whose states are ready before they are looked up.
inline constexpr index_t packs_ahead = 4;

/// Sums of products of four lines and as many rows.
template <int Rows>
struct value_sums {
  words sum[Rows][sum_lines];

  KVCACHE_INLINE void start() {
#pragma GCC unroll 4
    for (auto& row : sum) {
#pragma GCC unroll 4
      for (words& s : row) s = same_words(0);
    }
  }
  /// Of the four values from `t` on.
  KVCACHE_INLINE void add(const __m512i (&x)[sum_lines], const weight_bytes<1, Rows>& w, index_t t) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512i weight = four_bytes(&w.bytes[r][0][t]);
#pragma GCC unroll 4
      for (int c = 0; c < sum_lines; ++c) add_products(sum[r][c], weight, x[c]);
    }
  }
  template <class States>
  KVCACHE_INLINE void finish(const weight_bytes<1, Rows>& w, float* sums, index_t sum_stride) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      States::in_order(sum[r]);
#pragma GCC unroll 4
      for (int c = 0; c < sum_lines; ++c) {
        float* to = sums + r * sum_stride + c * key_lanes;
        store(to, fma(to_floats(reinterpret_cast<__m512i>(sum[r][c])), broadcast(w.scales[r]), load(to)));
      }
    }
  }
};

/// \param step   the step of `maker` that made, or will make, the first of these lines
/// \param keeps  more rows will want the lines
template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_trellis_tile(state_maker<Bits>& maker_in_memory,
                                            const byte_table& table_in_memory, index_t step, std::byte* lines,
                                            const weight_bytes<1, Rows>& w, bool keeps, float* sums,
                                            index_t sum_stride) {
  state_maker<Bits> maker = maker_in_memory;
  const byte_table table = table_in_memory;
  value_sums<Rows> sum;
  sum.start();
  while (maker.made < std::min(step + packs_ahead, maker.num_steps)) maker.make_one();
  for (index_t p = 0; p < maker.num_packs; ++p, lines += maker.pack_lines) {
    if (maker.made < std::min(step + p + packs_ahead + 1, maker.num_steps)) maker.make_one();
    __m512i x[sum_lines];
#pragma GCC unroll 4
    for (int c = 0; c < sum_lines; ++c) x[c] = table.at({load_once(lines + c * packed_line_bytes)}).x;
    if (keeps) {
#pragma GCC unroll 4
      for (int c = 0; c < sum_lines; ++c) _mm512_store_si512(lines + c * packed_line_bytes, x[c]);
    }
    sum.add(x, w, 4 * p);
  }
  maker_in_memory = maker;
  sum.template finish<value_states<Bits>>(w, sums, sum_stride);
}

/// Of lines that a tile before has made.
template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_lines_tile(const state_maker<Bits>& made, const std::byte* lines,
                                          const weight_bytes<1, Rows>& w, float* sums, index_t sum_stride) {
  value_sums<Rows> sum;
  sum.start();
  for (index_t p = 0; p < made.num_packs; ++p, lines += made.pack_lines) {
    __m512i x[sum_lines];
#pragma GCC unroll 4
    for (int c = 0; c < sum_lines; ++c) x[c] = load_bits(lines + c * packed_line_bytes).x;
    sum.add(x, w, 4 * p);
  }
  sum.template finish<value_states<Bits>>(w, sums, sum_stride);
}

/// As for scores.
template <int Bits, int Rows>
KVCACHE_TARGET inline void sum_trellis_rows(state_maker<Bits>& maker, std::byte* lines, const byte_table& table,
                                            const block_geometry& g, const bfloat16* scales, index_t count,
                                            const float* weights, index_t num_rows, float* sums,
                                            bool unpacked) {
  constexpr index_t dims = sum_lines * key_lanes;
  constexpr index_t dims_of_step = value_states<Bits>::lines * key_lanes;
  for (; num_rows >= Rows; num_rows -= Rows, weights += Rows * g.block_size, sums += Rows * g.head_dim) {
    weight_bytes<1, Rows> w;
    split_weights(weights, g.block_size, scales, count, w);
    for (index_t d = 0; d < g.head_dim; d += dims) {
      if (unpacked)
        sum_lines_tile(maker, lines + 4 * d, w, sums + d, g.head_dim);
      else
        sum_trellis_tile(maker, table, d / dims_of_step * maker.num_packs, lines + 4 * d, w, num_rows > Rows,
                         sums + d, g.head_dim);
    }
    unpacked = true;
  }
  if constexpr (Rows > 1)
    sum_trellis_rows<Bits, Rows / 2>(maker, lines, table, g, scales, count, weights, num_rows, sums, unpacked);
}

template <int Bits>
KVCACHE_TARGET inline bool sum_trellis(const packed_section& section, const block_geometry& g,
                                       const bfloat16* scales, index_t count, const float* weights,
                                       index_t num_rows, float* sums, const std::byte* next) {
  using states = value_states<Bits>;
  if (g.head_dim % (states::lines * key_lanes) != 0 || num_rows > most_packed_rows) return false;
  alignas(64) trellis_lines memory;
  alignas(64) std::array<std::byte, sum_tokens / 4 * packed_line_bytes> left;
  state_maker<Bits> maker;
  const byte_table table = load_table(section.codebook, 0);
  const std::byte* to_fetch = next == nullptr ? section.codes : next;
  for (index_t t = 0; t < count; t += sum_tokens) {
    const index_t num_tokens = std::min(sum_tokens, count - t);
    const index_t skip = t / sum_tokens * packed_order<Bits>::section_bytes(sum_tokens * g.head_dim);
    maker.start(section.codes + skip, to_fetch + skip, memory.data(), left.data(), g.head_dim, num_tokens);
    sum_trellis_rows<Bits, 4>(maker, memory.data(), table, g, scales + t, num_tokens, weights + t, num_rows, sums,
                              false);
  }
  return true;
}

inline bool trellis_accumulate(const packed_section& section, const block_geometry& g, const bfloat16* scales,
                               index_t count, const float* weights, index_t num_rows, float* sums,
                               const std::byte* next) {
  const auto run = section.bits == 4 ? sum_trellis<4> : section.bits == 3 ? sum_trellis<3> : sum_trellis<2>;
  return runs_here() && run(section, g, scales, count, weights, num_rows, sums, next);
}
