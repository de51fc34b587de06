// SPDX-License-Identifier: MIT
// The kernels, written once over a few vector primitives and compiled for each instruction set: every header
// that has vectors includes this file inside its own namespace, after it defined
//
//   KVCACHE_TARGET      attribute of functions that use the instruction set; KVCACHE_INLINE: always inlined
//   vec, bits           16 floats; 16 words of 32 bits
//   zero, broadcast, load, store, add, sub, mul, div, fma (a * b + c), larger (a < b ? b : a)
//   magnitude, with_sign(sign, size), either_below(x, limit, a, b)    |x|; x < limit ? a : b
//   times_power(p, n, shifted, x)      p * 2^n, n whole and in the low mantissa bits of shifted too; 0 where x < least_exp,
//                              NaN where x is
//   reaches(a, b)              not 0 if a >= b anywhere
//   sum_of, largest_of, all_finite
//   widened<n>, widen(const Element*)      one 64-byte line in block order -> `pack` vectors, .part[j]
//   narrow<Element>(vec)       rounded to 16 bits, in the low half of each word
//   load_bits, store_bits, store_low_halves, low_high(a, b): a | b << 16, with_half(word, slot, half)
//   load_low_halves, widen_low(words)      16 bf16 side by side, and as floats
//   store_bytes(p, x)          whole numbers as int8; zero_where_zero(w, x): w == 0 ? 0 : x
//   fill(word), and_bits, or_bits, shifted<n>      words >> n, or << -n
//   load_codebook(const int8_t*)           16 bytes, in every 128 bits
//   look_up(codebook, codes)   byte by byte, codes below 16; look_up(eight, x): entry in the low mantissa bits of x
//   pick_above(x, limit, a, b)             x > limit ? a : b
//   count_if_above(place, x, limit, n)     adds n to the low mantissa bits of place where x > limit
//   store_places(p, places, sign, flip)    low mantissa bytes, xor flip where sign is negative
//   sum_of_whole               of whole numbers, as an integer
//   interleave_low, interleave_high     a0 b0 a1 b1 ..., of the lower and of the upper eight lanes
//   smaller_words, broadcast_word, masked_or(a, mask, b): (a & mask) | b, store_low_bytes(p, words)
//   add_products(sum, a, b)      words: sum + a.low * b.low + a.high * b.high, of signed 16-bit halves
//   spread<n>(p)                 16 / n words, each n times side by side, n = 4, 8, 16
//   score_groups(rows), max_score_rows, sum_chunks(rows), max_sum_rows          tiles that fit the registers
//
// What returns a `vec` has to be inlined: g++ 12 clears the upper lanes (vzeroupper) before it returns a struct of one.
//
// A row's arithmetic never depends on the tile it is computed in: one chain of fused multiply-adds per number, in
// the order of dims (scores) or tokens (sums).

inline constexpr index_t sum_tokens = 64;  // after which a weighted sum starts again at the latest

/// The first `count` of 16 floats, zeros behind them: what follows in memory is not theirs.
KVCACHE_INLINE vec load_first(const float* p, index_t count) {
  if (count >= key_lanes) return load(p);
  alignas(64) std::array<float, key_lanes> padded{};
  std::copy_n(p, count, padded.begin());
  return load(padded.data());
}

#include <kvcache/kernel/vector_softmax.inl>

// ---- reading ahead --------------------------------------------------------------------------------------------------

/// Fetches, while a kernel reads n lines, the n lines at `at` that are wanted next: the memory stays busy during the softmax
/// and across blocks. `stride` is less than a line where the kernel passes over its own lines more often than once.
/// By levels (core/prefetch.hpp), those at `at` come into L2, and those at `near`, which are wanted before them, into L1.
struct read_ahead {
  const std::byte* at;
  const std::byte* first;
  const std::byte* near;
  index_t stride;
  bool by_levels;

  /// A piece of the section at hand begins, `offset` bytes in it. \param piece  the one behind it, or null
  void go_on(const upcoming& then, index_t offset, const std::byte* piece) {
    if (stride == 0) return;
    const std::byte* soon = piece != nullptr ? piece : by_levels ? then.soon : then.next;
    if (by_levels) {
      at = then.next + offset;
      if (soon != nullptr) near = soon;
    } else if (soon != at) {
      at = first = soon;
    }
  }
};

/// Tokens of a section that are read while as many are fetched. Lines that wait in L1 are the least recently used ones:
/// twice as many bytes must find room there.
template <class Element>
inline index_t piece_tokens(const block_geometry& g) {
  constexpr index_t most_bytes = 16 * 1024;
  index_t tokens = 4 * key_lanes;
  while (tokens > key_lanes && tokens * g.head_dim * index_t{sizeof(Element)} > most_bytes) tokens /= 2;
  return tokens;
}

/// `Lines` lines, and, if `Twice`, once more those some way back: when the miss buffers are full, processors drop prefetches.
/// Few at a time, between multiplications: of many at once always the same ones would be dropped.
template <int Lines, bool Twice = true>
[[gnu::always_inline]] inline void fetch(read_ahead& next) {
  if (next.by_levels) {
#pragma GCC unroll 16
    for (int i = 0; i < Lines; ++i, next.at += next.stride, next.near += next.stride) {
      __builtin_prefetch(next.at, 0, 2);
      __builtin_prefetch(next.near, 0, 3);
    }
    return;
  }
  constexpr index_t second_chance =
      34 * 64;  // bytes; what was dropped at one place of a turn comes up at another
  const std::byte* again = next.at - std::min(next.at - next.first, second_chance);
#pragma GCC unroll 16
  for (int i = 0; i < Lines; ++i, next.at += next.stride, again += next.stride) {
    __builtin_prefetch(next.at, 0, 3);
    if constexpr (Twice) __builtin_prefetch(again, 0, 3);
  }
}

/// `next` may be null; then a line that is at hand anyway is asked for. Unless told otherwise, those at hand are near.
inline read_ahead ahead_of(const std::byte* next, const std::byte* at_hand, index_t passes) {
  const index_t stride = next == nullptr ? 0 : 64 / passes;
  if (next == nullptr) next = at_hand;
  return {next, next, at_hand, stride, prefetch::by_levels};
}

/// Tiles that `num_rows` rows are cut into: as many of `max_rows` as there are, then smaller powers of two.
inline index_t num_row_tiles(index_t num_rows, index_t max_rows) {
  index_t tiles = num_rows / max_rows;
  for (index_t rest = num_rows % max_rows; rest != 0; rest &= rest - 1) ++tiles;
  return std::max(tiles, index_t{1});
}

// ---- scores ---------------------------------------------------------------------------------------------------------

/// out[r, g * 16 + lane] for `Rows` rows and `Groups` groups of 16 keys. All sums stay in registers.
template <class Element, int Rows, int Groups>
KVCACHE_TARGET inline void score_tile(const block_geometry& g, const Element* keys, const_rows queries,
                                      float* out, read_ahead& ahead) {
  constexpr index_t pack = block_order<Element>::pack;
  const index_t group_size = block_order<Element>::key_group_size(g);
  // `Groups` lines are fetched in `pack * Rows` turns
  constexpr int turns = static_cast<int>(pack) * Rows;
  constexpr int lines_each = std::max(Groups / turns, 1);
  constexpr int turns_each = std::max(turns / Groups, 1);
  static_assert(lines_each * (turns / turns_each) == Groups);
  read_ahead next = ahead;  // in a register
  vec sum[Rows][Groups];
#pragma GCC unroll 16
  for (auto& row : sum) {
#pragma GCC unroll 16
    for (vec& s : row) s = zero();
  }
  index_t d = 0;
  for (; d + pack <= g.head_dim; d += pack, keys += key_lanes * pack) {
    widened<pack> k[Groups];
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i) {
      k[i] = widen(keys + i * group_size);
    }
#pragma GCC unroll 16
    for (int j = 0; j < pack; ++j) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        if ((j * Rows + r) % turns_each == 0) fetch<lines_each, (Rows > 1)>(next);
        const vec q = broadcast(queries.row(r)[d + j]);
#pragma GCC unroll 16
        for (int i = 0; i < Groups; ++i) sum[r][i] = fma(q, k[i].part[j], sum[r][i]);
      }
    }
  }
  ahead = next;
#pragma GCC unroll 4
  for (int j = 0; j < pack - 1; ++j) {  // the rest of the last pack is padding
    if (d + j >= g.head_dim) break;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const vec q = broadcast(queries.row(r)[d + j]);
#pragma GCC unroll 16
      for (int i = 0; i < Groups; ++i) sum[r][i] = fma(q, widen(keys + i * group_size).part[j], sum[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < Groups; ++i) store(out + r * g.block_size + i * key_lanes, sum[r][i]);
  }
}

/// `Groups` groups of keys, in tiles, for as many times `Rows` rows as there are, then for fewer.
template <class Element, int Rows, int Groups>
KVCACHE_TARGET inline void score_rows(const block_geometry& g, const Element* keys, const_rows queries,
                                      index_t num_rows, float* out, read_ahead& next) {
  constexpr int tile_groups = std::min(Groups, score_groups(Rows));
  for (; num_rows >= Rows; num_rows -= Rows, queries.data = queries.row(Rows), out += Rows * g.block_size) {
    for (int i = 0; i < Groups; i += tile_groups) {
      score_tile<Element, Rows, tile_groups>(g, keys + i * block_order<Element>::key_group_size(g), queries,
                                             out + i * key_lanes, next);
    }
  }
  if constexpr (Rows > 1) score_rows<Element, Rows / 2, Groups>(g, keys, queries, num_rows, out, next);
}

template <class Element>
KVCACHE_TARGET inline void score_blocks(const block_geometry& g, const std::byte* keys, index_t count,
                                        const_rows queries, index_t num_rows, float* out, upcoming next) {
  const auto* group = reinterpret_cast<const Element*>(keys);
  const index_t group_size = block_order<Element>::key_group_size(g);
  read_ahead ahead = ahead_of(next, keys, num_row_tiles(num_rows, max_score_rows));
  const index_t piece_groups = piece_tokens<Element>(g) / key_lanes;
  const index_t num_groups = ceil_div(count, key_lanes);
  for (index_t i = 0; i < num_groups; i += piece_groups) {
    const Element* behind = group + piece_groups * group_size;
    ahead.go_on(next, reinterpret_cast<const std::byte*>(group) - keys,
                i + piece_groups < num_groups ? reinterpret_cast<const std::byte*>(behind) : nullptr);
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
                                  const float* queries, index_t num_rows, float* out, upcoming next) {
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
  vec sum = zero();
  for (index_t i = 0; i < in.num_packs; ++i) {
    const auto v = widen(in.values + i * in.stride);
    for (index_t j = 0; j < pack; ++j) {
      const float w = in.weights[i * pack + j];
      if (w != 0.0F) sum = fma(broadcast(w), v.part[j], sum);
    }
  }
  result = sum;
}

/// sums[r, d] += sum_t weights[r, t] * values[t, d] for `Rows` rows and 16 * `Chunks` dims. The inner sum starts
/// from zero: adding thousands of terms to one number would let its rounding drift.
template <class Element, int Rows, int Chunks>
KVCACHE_TARGET inline void sum_tile(const weighted_values<Element>& in, float* sums, index_t sum_stride,
                                    read_ahead& ahead) {
  constexpr index_t pack = block_order<Element>::pack;
  constexpr index_t width = key_lanes * pack;
  read_ahead next = ahead;
  vec sum[Rows][Chunks];
#pragma GCC unroll 16
  for (auto& row : sum) {
#pragma GCC unroll 16
    for (vec& s : row) s = zero();
  }
  const Element* values = in.values;
  const float* weights = in.weights;
  for (index_t i = 0; i < in.num_packs; ++i, values += in.stride, weights += pack) {
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) {
      fetch<1, (Rows > 1)>(next);
      const auto v = widen(values + c * width);
#pragma GCC unroll 16
      for (int j = 0; j < pack; ++j) {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
          sum[r][c] = fma(broadcast(weights[r * in.weight_stride + j]), v.part[j], sum[r][c]);
      }
    }
  }
  ahead = next;
  vec probe = zero();
#pragma GCC unroll 16
  for (const auto& row : sum) {
#pragma GCC unroll 16
    for (const vec& s : row) probe = add(probe, s);
  }
  const bool finite = all_finite(probe);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < Chunks; ++c) {
      float* to = sums + r * sum_stride + c * key_lanes;
      if (!finite) [[unlikely]] {
        vec again;  // its address is taken, which would keep `sum` out of the registers
        sum_visible<Element>({in.values + c * width, in.stride, in.num_packs,
                              in.weights + r * in.weight_stride, in.weight_stride},
                             again);
        sum[r][c] = again;
      }
      store(to, add(load(to), sum[r][c]));
    }
  }
}

/// 16 * `Chunks` dims, in tiles, for as many times `Rows` rows as there are, then for fewer.
template <class Element, int Rows, int Chunks>
KVCACHE_TARGET inline void sum_rows(weighted_values<Element> in, index_t num_rows, float* sums,
                                    index_t sum_stride, read_ahead& next) {
  constexpr int tile_chunks = std::min(Chunks, sum_chunks(Rows));
  for (; num_rows >= Rows; num_rows -= Rows, in.weights += Rows * in.weight_stride) {
    for (int c = 0; c < Chunks; c += tile_chunks) {
      weighted_values<Element> tile = in;
      tile.values += c * key_lanes * block_order<Element>::pack;
      sum_tile<Element, Rows, tile_chunks>(tile, sums + c * key_lanes, sum_stride, next);
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
    sum_tile<Element, 1, 1>(in, sum.data(), key_lanes, nothing);
    for (index_t d = 0; d < num_dims; ++d) sums[d] += sum[static_cast<std::size_t>(d)];
  }
}

template <class Element>
KVCACHE_TARGET inline void accumulate(const block_geometry& g, const std::byte* values, index_t count,
                                      const float* weights, index_t num_rows, float* sums, upcoming next) {
  constexpr index_t pack = block_order<Element>::pack;
  constexpr index_t wide = 8 * key_lanes;
  read_ahead ahead = ahead_of(next, values, num_row_tiles(num_rows, max_sum_rows));
  const index_t piece = piece_tokens<Element>(g);
  const index_t row_bytes = g.head_dim * index_t{sizeof(Element)};
  for (index_t t = 0; t < count; t += piece) {
    ahead.go_on(next, t * row_bytes, t + piece < count ? values + (t + piece) * row_bytes : nullptr);
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

// ---- encoding, and the table ----------------------------------------------------------------------------------------

#include <kvcache/kernel/vector_channel.inl>
#include <kvcache/kernel/vector_encode.inl>
#include <kvcache/kernel/vector_int8.inl>
#include <kvcache/kernel/vector_low_bit.inl>
#include <kvcache/kernel/vector_trellis.inl>

template <class Element>
inline constexpr element_kernels kernels_for = {
    encode_keys<Element>,
    encode_values<Element>,
    portable::element<Element>::decode_keys,
    portable::element<Element>::decode_values,
    scores<Element>,
    accumulate<Element>,
};

inline constexpr int8_kernels kernels_for_int8 = {largest, quantize, portable::prepare, scores_int8,
                                                  accumulate_int8};
inline constexpr low_bit_kernels kernels_for_low_bits = {unpack, hadamard, nearest};
