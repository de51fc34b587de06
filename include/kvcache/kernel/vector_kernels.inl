// SPDX-License-Identifier: MIT
// The kernels, written once over a few vector primitives and compiled for each instruction set: every header
// that has vectors includes this file inside its own namespace, after it defined
//
//   KVCACHE_TARGET      attribute of functions that use the instruction set; KVCACHE_INLINE: always inlined
//   vec, bits           16 floats; 16 words of 32 bits
//   zero, broadcast, load, store, add, sub, mul, div, fma (a * b + c), larger (a < b ? b : a),
//   smaller (b < a ? b : a)
//   rounded(a)         a product that is no part of a fused multiplication and addition
//   magnitude, with_sign(sign, size), either_below(x, limit, a, b)    |x|; x < limit ? a : b
//   times_power(p, n, shifted, x)      p * 2^n, n whole and in the low mantissa bits of shifted too; 0 where x < least_exp,
//                              NaN where x is
//   reaches(a, b)              not 0 if a >= b anywhere
//   sum_of, largest_of, all_finite
//   widened<n>, widen(const Element*)      one 64-byte line in block order -> `pack` vectors, .part[j]
//   half_line                  how halves are multiplied, as single_line in vector_lines.inl does it
//   narrow<Element>(vec)       rounded to 16 bits, in the low half of each word
//   load_bits, store_bits, store_low_halves, low_high(a, b): a | b << 16, with_half(word, slot, half)
//   load_low_halves, widen_low(words)      16 bf16 side by side, and as floats
//   store_bytes(p, x)          rounded to int8
//   with_byte(words, slot, x)  the same, as one of the four bytes of each word
//   zero_where_zero(w, x)      w == 0 ? 0 : x
//   fill(word), and_bits, or_bits, larger_words (none negative), sub_words, as_floats, as_bits, shifted<n>      words >> n, or << -n
//   load_codebook(const int8_t*)           16 bytes, in every 128 bits
//   look_up(codebook, codes)   byte by byte, codes below 16
//   eight_twice(const int8_t*)             8 bytes as floats, in either half
//   look_up(eight, x)          of such floats, the entry in the low mantissa bits of x
//   pick_above(x, limit, a, b)             x > limit ? a : b
//   count_if_above(place, x, limit, n)     adds n to the low mantissa bits of place where x > limit
//   store_places(p, places, sign, flip)    low mantissa bytes, xor flip where sign is negative
//   sum_of_whole               of whole numbers, as an integer
//   sum_everywhere, largest_everywhere     such a sum as a float, and the largest of words, in every lane; first_word(words)
//   interleave_low, interleave_high     a0 b0 a1 b1 ..., of the lower and of the upper eight lanes
//   smaller_words, broadcast_word, masked_or(a, mask, b): (a & mask) | b, store_low_bytes(p, words)
//   add_products(sum, a, b)      words: sum + a.low * b.low + a.high * b.high, of signed 16-bit halves
//   spread<n>(p)                 16 / n words, each n times side by side, n = 4, 8, 16
//   score_groups(rows), max_score_rows, sum_chunks(rows), max_sum_rows          tiles that fit the registers
//
// What returns a `vec` has to be inlined: g++ 12 clears the upper lanes (vzeroupper) before it returns a struct of one.
//
// A row's arithmetic never depends on the tile it is computed in: one chain of fused multiply-adds per number, in
// the order of dims (scores) or tokens (sums); two where a line has two sums, of even and of odd ones, added at the end.

inline constexpr index_t sum_tokens = 64;  // after which a weighted sum starts again at the latest

/// The first `count` of 16 floats, zeros behind them: what follows in memory is not theirs.
KVCACHE_INLINE vec load_first(const float* p, index_t count) {
  if (count >= key_lanes) return load(p);
  alignas(64) std::array<float, key_lanes> padded{};
  std::copy_n(p, count, padded.begin());
  return load(padded.data());
}

#include <kvcache/kernel/vector_softmax.inl>

#include <kvcache/kernel/vector_lines.inl>
#include <kvcache/kernel/vector_read_ahead.inl>

// ---- scores ---------------------------------------------------------------------------------------------------------

/// out[r, g * 16 + lane] for `Rows` rows and `Groups` groups of 16 keys. All sums stay in registers.
/// \tparam Way  ahead.way: known, it costs no registers
template <class Element, int Rows, int Groups, asking Way>
KVCACHE_TARGET inline void score_tile(const block_geometry& g, const Element* keys, const_rows queries,
                                      float* out, read_ahead& ahead) {
  using line = line_of<Element>;
  constexpr int pack = line::pack;
  const index_t group_size = block_order<Element>::key_group_size(g);
  const index_t head_dim = g.head_dim;
  const index_t out_stride = g.block_size;
  read_ahead next = ahead;  // in registers
  next.way = Way;
  vec sum[Rows][Groups][line::num_sums];
#pragma GCC unroll 16
  for (auto& row : sum) {
#pragma GCC unroll 16
    for (auto& of_group : row) {
#pragma GCC unroll 2
      for (vec& s : of_group) s = zero();
    }
  }
  row_column<Rows> column(queries.data, queries.stride);
  index_t d = 0;
  for (; d + pack <= head_dim; d += pack, keys += key_lanes * pack, column.go_on(pack)) {
    widened<pack> k[Groups];
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i) k[i] = line::load(keys + i * group_size);
#pragma GCC unroll 16
    for (int j = 0; j < line::num_factors; ++j) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        fetch_at<Groups, line::num_factors * Rows, (Rows > 1), asks_near<Element, Way>>(j * Rows + r, next);
        const vec q = line::factor(column.row(r), j);
#pragma GCC unroll 16
        for (int i = 0; i < Groups; ++i) line::add_products(sum[r][i], q, k[i], j);
      }
    }
  }
  ahead = next;
  vec total[Rows][Groups];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i) total[r][i] = line::total(sum[r][i]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < pack - 1; ++j) {  // the rest of the last pack is padding
    if (d + j >= head_dim) break;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const vec q = broadcast(queries.row(r)[d + j]);
#pragma GCC unroll 16
      for (int i = 0; i < Groups; ++i)
        total[r][i] = fma(q, widen(keys + i * group_size).part[j], total[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i) store(out + r * out_stride + i * key_lanes, total[r][i]);
  }
}

/// `Groups` groups of keys, in tiles, for as many times `Rows` rows as there are, then for fewer.
template <class Element, int Rows, int Groups>
KVCACHE_TARGET inline void score_rows(const block_geometry& g, const Element* keys, const_rows queries,
                                      index_t num_rows, float* out, read_ahead& next) {
  constexpr int tile_groups = std::min(Groups, score_groups(Rows) / line_of<Element>::num_sums);
  for (; num_rows >= Rows; num_rows -= Rows, queries.data = queries.row(Rows), out += Rows * g.block_size) {
    for (int i = 0; i < Groups; i += tile_groups) {
      const Element* at = keys + i * block_order<Element>::key_group_size(g);
      with_way_of(next, [&]<asking Way>() {
        score_tile<Element, Rows, tile_groups, Way>(g, at, queries, out + i * key_lanes, next);
      });
    }
  }
  if constexpr (Rows > 1) score_rows<Element, Rows / 2, Groups>(g, keys, queries, num_rows, out, next);
}

template <class Element>
KVCACHE_TARGET inline void score_blocks(const block_geometry& g, const std::byte* keys, index_t count,
                                        const_rows queries, index_t num_rows, float* out,
                                        const upcoming& next) {
  const auto* group = reinterpret_cast<const Element*>(keys);
  const index_t group_size = block_order<Element>::key_group_size(g);
  read_ahead ahead = ahead_of(next, keys, num_row_tiles(num_rows, max_score_rows));
  const index_t piece_groups = piece_tokens<Element>(g) / key_lanes;
  const index_t num_groups = ceil_div(count, key_lanes);
  for (index_t i = 0; i < num_groups; i += piece_groups) {
    const Element* behind = group + piece_groups * group_size;
    ahead.go_on(next, i + piece_groups < num_groups ? reinterpret_cast<const std::byte*>(behind) : nullptr);
    const index_t groups = std::min(piece_groups, num_groups - i);
    if (groups == 4) {
      score_rows<Element, max_score_rows, 4>(g, group, queries, num_rows, out, ahead);
    } else if (groups == 2) {
      score_rows<Element, max_score_rows, 2>(g, group, queries, num_rows, out, ahead);
    } else {
      for (index_t j = 0; j < groups; ++j)
        score_rows<Element, max_score_rows, 1>(g, group + j * group_size, queries, num_rows,
                                               out + j * key_lanes, ahead);
    }
    group = behind;
    out += piece_groups * key_lanes;
  }
}

template <class Element>
KVCACHE_TARGET inline void scores(const block_geometry& g, const std::byte* keys, index_t count,
                                  const float* queries, index_t num_rows, float* out, const upcoming& next) {
  score_blocks<Element>(g, keys, count, {queries, g.head_dim}, num_rows, out, next);
}

// ---- weighted sums --------------------------------------------------------------------------------------------------

/// Values of some tokens and the weights of some rows for them.
template <class Element>
struct weighted_values {
  const Element* values;  // [num_packs, stride]
  index_t stride;         // elements from one pack of tokens to the next
  index_t num_packs;
  const float* weights;  // [rows, weight_stride]
  index_t weight_stride;
};

/// One row and 16 dims again, leaving out tokens of weight zero: for when what they hold is not finite.
template <class Element>
[[gnu::cold, gnu::noinline]] KVCACHE_TARGET inline void sum_visible(const weighted_values<Element>& in,
                                                                    vec& result) {
  constexpr index_t pack = block_order<Element>::pack;
  constexpr int num_sums = line_of<Element>::num_sums;  // of a token each, or one of all
  vec sum[num_sums] = {};
  for (index_t i = 0; i < in.num_packs; ++i) {
    const auto v = widen(in.values + i * in.stride);
    for (index_t j = 0; j < pack; ++j) {
      const float w = in.weights[i * pack + j];
      vec& of = sum[j % num_sums];
      if (w != 0.0F) of = fma(broadcast(w), v.part[j], of);
    }
  }
  result = sum[0];
  if constexpr (num_sums == 2) result = add(sum[0], sum[1]);
}

/// sums[r, d] += sum_t weights[r, t] * values[t, d] for `Rows` rows and 16 * `Chunks` dims. The inner sum starts
/// from zero: adding thousands of terms to one number would let its rounding drift.
template <class Element, int Rows, int Chunks, asking Way>
KVCACHE_TARGET inline void sum_tile(const weighted_values<Element>& in, float* sums, index_t sum_stride,
                                    read_ahead& ahead) {
  using line = line_of<Element>;
  constexpr int pack = line::pack;
  constexpr index_t width = key_lanes * pack;
  read_ahead next = ahead;
  next.way = Way;
  vec sum[Rows][Chunks][line::num_sums];
#pragma GCC unroll 16
  for (auto& row : sum) {
#pragma GCC unroll 16
    for (auto& of_chunk : row) {
#pragma GCC unroll 2
      for (vec& s : of_chunk) s = zero();
    }
  }
  const Element* values = in.values;
  row_column<Rows> weights(in.weights, in.weight_stride);
  for (index_t i = 0; i < in.num_packs; ++i, values += in.stride, weights.go_on(pack)) {
    widened<pack> v[Chunks];
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) v[c] = line::load(values + c * width);
#pragma GCC unroll 16
    for (int j = 0; j < line::num_factors; ++j) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        fetch_at<Chunks, line::num_factors * Rows, (Rows > 1), asks_near<Element, Way>>(j * Rows + r, next);
        const vec w = line::factor(weights.row(r), j);
#pragma GCC unroll 16
        for (int c = 0; c < Chunks; ++c) line::add_products(sum[r][c], w, v[c], j);
      }
    }
  }
  ahead = next;
  vec total[Rows * Chunks];
  vec probe[Rows * Chunks];  // added in pairs, which takes few steps
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Chunks; ++i) probe[i] = total[i] = line::total(sum[i / Chunks][i % Chunks]);
#pragma GCC unroll 4
  for (int width_left = Rows * Chunks / 2; width_left > 0; width_left /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < width_left; ++i) probe[i] = add(probe[i], probe[width_left + i]);
  }
  const bool finite = all_finite(probe[0]);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) {
      vec result = total[r * Chunks + c];
      if (!finite) [[unlikely]] {
        vec again;  // its address is taken, which would keep `result` out of the registers
        sum_visible<Element>({in.values + c * width, in.stride, in.num_packs,
                              in.weights + r * in.weight_stride, in.weight_stride},
                             again);
        result = again;
      }
      float* to = sums + r * sum_stride + c * key_lanes;
      store(to, add(load(to), result));
    }
  }
}

/// 16 * `Chunks` dims, in tiles, for as many times `Rows` rows as there are, then for fewer.
template <class Element, int Rows, int Chunks>
KVCACHE_TARGET inline void sum_rows(weighted_values<Element> in, index_t num_rows, float* sums,
                                    index_t sum_stride, read_ahead& next) {
  constexpr int tile_chunks = std::min(Chunks, sum_chunks(Rows) / line_of<Element>::num_sums);
  for (; num_rows >= Rows; num_rows -= Rows, in.weights += Rows * in.weight_stride) {
    for (int c = 0; c < Chunks; c += tile_chunks) {
      weighted_values<Element> tile = in;
      tile.values += c * key_lanes * block_order<Element>::pack;
      with_way_of(next, [&]<asking Way>() {
        sum_tile<Element, Rows, tile_chunks, Way>(tile, sums + c * key_lanes, sum_stride, next);
      });
    }
    sums += Rows * sum_stride;
  }
  if constexpr (Rows > 1) sum_rows<Element, Rows / 2, Chunks>(in, num_rows, sums, sum_stride, next);
}

/// The last dims of rows that are not a multiple of 16: on a padded copy, since what follows in memory is not theirs.
template <class Element>
KVCACHE_TARGET inline void sum_last_dims(weighted_values<Element> in, index_t num_dims, index_t num_rows,
                                         float* sums, index_t sum_stride) {
  constexpr index_t pack = block_order<Element>::pack;
  constexpr index_t width = key_lanes * pack;
  alignas(64) std::array<Element, sum_tokens * key_lanes> padded{};
  for (index_t i = 0; i < in.num_packs; ++i)
    std::copy_n(in.values + i * in.stride, num_dims * pack, padded.data() + i * width);
  in.values = padded.data();
  in.stride = width;
  for (index_t r = 0; r < num_rows; ++r, in.weights += in.weight_stride, sums += sum_stride) {
    alignas(64) std::array<float, key_lanes> sum{};
    read_ahead nothing = ahead_of(nullptr, reinterpret_cast<const std::byte*>(padded.data()), 1);
    sum_tile<Element, 1, 1, asking::twice>(in, sum.data(), key_lanes, nothing);
    for (index_t d = 0; d < num_dims; ++d) sums[d] += sum[static_cast<std::size_t>(d)];
  }
}

template <class Element>
KVCACHE_TARGET inline void accumulate(const block_geometry& g, const std::byte* values, index_t count,
                                      const float* weights, index_t num_rows, float* sums,
                                      const upcoming& next) {
  constexpr index_t pack = block_order<Element>::pack;
  constexpr index_t wide = 8 * key_lanes;
  read_ahead ahead = ahead_of(next, values, num_row_tiles(num_rows, max_sum_rows));
  const index_t piece = piece_tokens<Element>(g);
  const index_t row_bytes = g.head_dim * index_t{sizeof(Element)};
  for (index_t t = 0; t < count; t += piece) {
    ahead.go_on(next, t + piece < count ? values + (t + piece) * row_bytes : nullptr);
    weighted_values<Element> in{reinterpret_cast<const Element*>(values) + t * g.head_dim, g.head_dim * pack,
                                ceil_div(std::min(piece, count - t), pack), weights + t, g.block_size};
    index_t d = 0;
    for (; d + wide <= g.head_dim; d += wide, in.values += wide * pack)
      sum_rows<Element, max_sum_rows, 8>(in, num_rows, sums + d, g.head_dim, ahead);
    for (; d + key_lanes <= g.head_dim; d += key_lanes, in.values += key_lanes * pack)
      sum_rows<Element, max_sum_rows, 1>(in, num_rows, sums + d, g.head_dim, ahead);
    if (d < g.head_dim) sum_last_dims(in, g.head_dim - d, num_rows, sums + d, g.head_dim);
  }
}

// ---- encoding, decoding, and the table --------------------------------------------------------------------------------

#include <kvcache/kernel/vector_encode.inl>

// after what they build on
#include <kvcache/kernel/vector_channel.inl>
#include <kvcache/kernel/vector_decode.inl>
#include <kvcache/kernel/vector_int8.inl>
#include <kvcache/kernel/vector_low_bit.inl>
#include <kvcache/kernel/vector_trellis.inl>

template <class Element>
inline constexpr element_kernels kernels_for = {
    encode_keys<Element>,   encode_values<Element>, decode_keys<Element>,
    decode_values<Element>, scores<Element>,        accumulate<Element>,
};

inline constexpr int8_kernels kernels_for_int8 = {largest,           put_key,     put_value,
                                                  portable::prepare, scores_int8, accumulate_int8};
inline constexpr low_bit_kernels kernels_for_low_bits = {unpack, hadamard, nearest};
