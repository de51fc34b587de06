// SPDX-License-Identifier: MIT
// Decoding of the codec trellis<b>: codes, one per byte in the block order of bytes, become the numbers of a table. Included
// where there are
//
//   bits              64 bytes; load_bits, store_bits, store_words(p, a, n): the first n words, broadcast_word,
//                     or_bits(a, b): a | b, and_bits(a, b): a & b
//   shifted_left<n>   words
//   funnel::shift<n>(a, b)   words: a << n | b >> (32 - n)
//   words_before<n>(a, b)    the 16 words that lie n before those of a, b what lies before a
//   byte_table(const std::int8_t*), .at(bits)       256 bytes, of which the second half is the first one negated; that of
//                                                   each index
//
// Every byte of a line shifts in the codes of the dims before it. No code runs over its byte, or it is masked.

/// The codes `N` dims ago, shifted left by `Shift`: of keys, where four dims are the bytes of a word ...
struct dims_in_bytes {
  template <int N, int Shift>
  KVCACHE_INLINE static bits earlier(bits now, bits before) {
    return funnel::shift<8 * N + Shift>(now, before);
  }
};

/// ... and of values, where a dim is a word.
struct dims_in_words {
  template <int N, int Shift>
  KVCACHE_INLINE static bits earlier(bits now, bits before) {
    return shifted_left<Shift>(words_before<N>(now, before));
  }
};

/// The line before: its codes, and for two bits also its pairs of codes.
struct line_before {
  bits codes, pairs;
};

template <int Bits, class Dims>
KVCACHE_INLINE bits states(bits codes, line_before& before) {
  const bits highest = broadcast_word(static_cast<std::int32_t>(Bits == 5 ? 0xe0e0e0e0U : 0xc0c0c0c0U));
  bits earlier = Dims::template earlier<1, Bits>(codes, before.codes);
  if constexpr (Bits > 4) earlier = and_bits(earlier, highest);
  bits s = or_bits(codes, earlier);
  if constexpr (Bits == 3) {
    s = or_bits(s, and_bits(Dims::template earlier<2, 6>(codes, before.codes), highest));
  } else if constexpr (Bits == 2) {
    const bits pairs = s;
    s = or_bits(pairs, Dims::template earlier<2, 4>(pairs, before.pairs));
    before.pairs = pairs;
  }
  before.codes = codes;
  return s;
}

template <int Bits>
KVCACHE_TARGET inline void decode_key_codes(index_t head_dim, index_t num_groups, const std::uint8_t* codes,
                                            const byte_table& table, std::int8_t* out, index_t out_stride) {
  const index_t num_lines = ceil_div(head_dim, block_order<std::int8_t>::pack);
  for (index_t g = 0; g < num_groups; ++g, out += out_stride) {
    line_before before{broadcast_word(0), broadcast_word(0)};
    for (index_t i = 0; i < num_lines; ++i, codes += 64)
      store_bits(out + 64 * i, table.at(states<Bits, dims_in_bytes>(load_bits(codes), before)));
  }
}

template <int Bits>
KVCACHE_TARGET inline void decode_value_codes(index_t head_dim, index_t num_packs, const std::uint8_t* codes,
                                              const byte_table& table, std::int8_t* out, index_t out_stride) {
  const index_t size = 4 * head_dim;
  for (index_t p = 0; p < num_packs; ++p, codes += size, out += out_stride) {
    line_before before{broadcast_word(0), broadcast_word(0)};
    index_t i = 0;
    for (; i + 64 <= size; i += 64)
      store_bits(out + i, table.at(states<Bits, dims_in_words>(load_bits(codes + i), before)));
    if (i < size)  // the pack ends here; what follows belongs to others
      store_words(out + i, table.at(states<Bits, dims_in_words>(load_bits(codes + i), before)),
                  (size - i) / 4);
  }
}

KVCACHE_TARGET inline void decode_trellis_keys(int num_bits, index_t head_dim, index_t num_groups,
                                               const std::uint8_t* codes, const std::int8_t* table,
                                               std::int8_t* out, index_t out_stride) {
  const byte_table numbers(table);
  if (num_bits == 2) decode_key_codes<2>(head_dim, num_groups, codes, numbers, out, out_stride);
  if (num_bits == 3) decode_key_codes<3>(head_dim, num_groups, codes, numbers, out, out_stride);
  if (num_bits == 4) decode_key_codes<4>(head_dim, num_groups, codes, numbers, out, out_stride);
  if (num_bits == 5) decode_key_codes<5>(head_dim, num_groups, codes, numbers, out, out_stride);
  if (num_bits == 6) decode_key_codes<6>(head_dim, num_groups, codes, numbers, out, out_stride);
}

KVCACHE_TARGET inline void decode_trellis_values(int num_bits, index_t head_dim, index_t num_packs,
                                                 const std::uint8_t* codes, const std::int8_t* table,
                                                 std::int8_t* out, index_t out_stride) {
  const byte_table numbers(table);
  if (num_bits == 2) decode_value_codes<2>(head_dim, num_packs, codes, numbers, out, out_stride);
  if (num_bits == 3) decode_value_codes<3>(head_dim, num_packs, codes, numbers, out, out_stride);
  if (num_bits == 4) decode_value_codes<4>(head_dim, num_packs, codes, numbers, out, out_stride);
  if (num_bits == 5) decode_value_codes<5>(head_dim, num_packs, codes, numbers, out, out_stride);
  if (num_bits == 6) decode_value_codes<6>(head_dim, num_packs, codes, numbers, out, out_stride);
}
