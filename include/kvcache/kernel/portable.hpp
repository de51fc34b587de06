// SPDX-License-Identifier: MIT
// The portable kernels: plain C++ that compilers vectorise, and what every other instruction set is tested
// against. Inner loops run over exactly 16 lanes and carry no branches, which is all a vectoriser needs.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/portable_channel.hpp>
#include <kvcache/kernel/portable_low_bit.hpp>
#include <kvcache/kernel/portable_trellis.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace kvcache::inline v0::kernel::portable {

inline constexpr index_t lanes = 16;
static_assert(lanes == key_lanes);

/// e^r = 1 + r + r^2 * (terms[0] + terms[1] * r + ..), off by 3e-9 on |r| <= ln(2)/2: the least largest relative error.
inline constexpr float exp_terms[5] = {0.49999993432F, 0.16666520399F, 0.041668390786F, 0.0083687451077F,
                                       0.0013814540075F};

/// exp is zero below, so never subnormal.
inline constexpr float least_exp = -87.3F;

/// exp(x) for x <= softmax_slack: relative error below 2e-7, zero below least_exp, NaN stays NaN.
/// Source: argument reduction by Cody and Waite 1980.
inline float exp_below_slack(float x) noexcept {
  constexpr float round_to_integer = 0x1.8p23F;  // adding it leaves the integer in the low mantissa bits
  const float shifted = x * 1.44269504F + round_to_integer;
  const float n = shifted - round_to_integer;
  const float r = (x - n * 0x1.62e4p-1F) - n * 0x1.7f7d1cp-20F;  // ln(2) in two parts, n * first is exact
  float p = exp_terms[4];
  for (int i = 3; i >= 0; --i) p = p * r + exp_terms[i];
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const std::uint32_t exponent = std::bit_cast<std::uint32_t>(shifted) << 23;
  const float scaled = std::bit_cast<float>(std::bit_cast<std::uint32_t>(p) + exponent);
  return x != x ? x : (x < least_exp ? 0.0F : scaled);
}

inline bool is_nan(float x) noexcept { return x != x; }

using lane_array = std::array<float, lanes>;

/// Combines 16 lanes in a fixed tree, so that the result does not depend on how the loop was vectorised.
template <class Combine>
float fold(lane_array& lane, Combine combine) noexcept {
  for (std::size_t width = lanes / 2; width > 0; width /= 2) {
    for (std::size_t i = 0; i < width; ++i) lane[i] = combine(lane[i], lane[i + width]);
  }
  return lane[0];
}

/// Raises row.max where `largest` passes it by too much, and scales row.sum with it. \return the scale
/// Never inlined: where multiply-adds are one instruction, the same numbers would round differently from caller to caller.
[[gnu::noinline]] inline float raise_max(softmax_row& row, float largest) noexcept {
  if (!(largest - row.max > softmax_slack)) return 1.0F;  // their sum might be rounded up to `largest`
  const bool first = row.max == -std::numeric_limits<float>::infinity();
  const float rescale = first ? 1.0F : exp_below_slack(row.max - largest);  // all sums are zero so far
  row.max = largest;
  row.sum *= rescale;
  return rescale;
}
/// What is taken off the scores: zero where all are -infinity so far, since -inf - -inf would be NaN.
inline float softmax_shift(const softmax_row& row) noexcept {
  return row.max == -std::numeric_limits<float>::infinity() ? 0.0F : row.max;
}

inline float softmax_of_row(float* scores, index_t count, softmax_row& row) {
  const auto larger = [](float a, float b) { return a < b ? b : a; };

  // pass 1: the largest score
  lane_array lane;
  lane.fill(-std::numeric_limits<float>::infinity());
  for (index_t t = 0; t < count; t += lanes) {
    for (std::size_t i = 0; i < lanes; ++i) lane[i] = larger(lane[i], scores[t + static_cast<index_t>(i)]);
  }
  const float rescale = raise_max(row, fold(lane, larger));
  const float shift = softmax_shift(row);

  // pass 2: weights and their sum
  lane.fill(0.0F);
  for (index_t t = 0; t < count; t += lanes) {
    float* weights = scores + t;
    for (index_t i = 0; i < lanes; ++i) weights[i] = exp_below_slack(weights[i] - shift);
    for (std::size_t i = 0; i < lanes; ++i) lane[i] += weights[i];
  }
  row.sum += fold(lane, [](float x, float y) { return x + y; });
  return rescale;
}

inline void softmax(float* scores, index_t stride, index_t count, index_t num_rows, softmax_row* rows,
                    float* rescales) {
  for (index_t r = 0; r < num_rows; ++r) rescales[r] = softmax_of_row(scores + r * stride, count, rows[r]);
}

/// tanh(x), relative error below 4e-7, NaN stays NaN: the Taylor series near zero, where the quotient would cancel.
inline float tanh(float x) noexcept {
  const float size = std::fabs(x);
  const float x2 = x * x;
  float p = -1382.0F / 155925.0F;
  p = p * x2 + 62.0F / 2835.0F;
  p = p * x2 - 17.0F / 315.0F;
  p = p * x2 + 2.0F / 15.0F;
  p = p * x2 - 1.0F / 3.0F;
  const float near_zero = size + size * x2 * p;
  const float e = exp_below_slack(-2.0F * size);
  const float far = (1.0F - e) / (1.0F + e);
  return std::copysign(size < 0.35F ? near_zero : far, x);
}

inline void soft_cap(float* scores, index_t count, float cap) {
  for (index_t t = 0; t < count; ++t) scores[t] = cap * tanh(scores[t] / cap);
}

/// sum[i] += sum_j weights[j] * rows[j, i], in the order of j. rows: [num_rows, 16 lanes].
/// Eight rows at a time: each lane is one chain of additions that stays in a register.
inline void add_rows(const float* __restrict weights, const float* __restrict rows, index_t num_rows,
                     float* __restrict sum) noexcept {
  index_t j = 0;
  for (; j + 8 <= num_rows; j += 8) {
    const float* w = weights + j;
    const float* r = rows + j * lanes;
    for (index_t i = 0; i < lanes; ++i) {
      sum[i] = (((((((sum[i] + w[0] * r[i]) + w[1] * r[lanes + i]) + w[2] * r[2 * lanes + i]) +
                   w[3] * r[3 * lanes + i]) +
                  w[4] * r[4 * lanes + i]) +
                 w[5] * r[5 * lanes + i]) +
                w[6] * r[6 * lanes + i]) +
               w[7] * r[7 * lanes + i];
    }
  }
  for (; j < num_rows; ++j) {
    for (index_t i = 0; i < lanes; ++i) sum[i] += weights[j] * rows[j * lanes + i];
  }
}

/// Widens 16 packs of 32 bits: element j of pack i goes to out[j][i].
template <class Element>
inline void unpack_lanes(const Element* in, std::array<float*, block_order<Element>::pack> out) noexcept {
  if constexpr (sizeof(Element) == 4) {
    std::memcpy(out[0], in, lanes * sizeof(float));
  } else if constexpr (sizeof(Element) == 1) {
    for (std::size_t j = 0; j < 4; ++j) {
      for (std::size_t i = 0; i < lanes; ++i) out[j][i] = static_cast<float>(in[4 * i + j]);
    }
  } else {
    std::array<std::uint32_t, lanes> packs;
    std::memcpy(packs.data(), in, sizeof(packs));
    float* __restrict even = out[0];
    float* __restrict odd = out[1];
    for (std::size_t i = 0; i < lanes; ++i) {
      even[i] = to_float(Element{static_cast<std::uint16_t>(packs[i])});
      odd[i] = to_float(Element{static_cast<std::uint16_t>(packs[i] >> 16)});
    }
  }
}

template <class Element>
struct element {
  using order = block_order<Element>;
  static constexpr index_t pack = order::pack;

  static void encode_keys(const block_geometry& g, std::byte* keys, index_t first, index_t count,
                          const_rows rows) {
    auto* out = reinterpret_cast<Element*>(keys);
    const index_t last = first + count;
    for (index_t group = first / lanes * lanes; group < last; group += lanes) {
      const index_t from = std::max(first, group);
      const index_t to = std::min(last, group + lanes);
      for (index_t p = 0; p < order::key_packs(g) * pack; p += pack) {
        for (index_t t = from; t < to; ++t) {
          const float* row = rows.row(t - first);
          for (index_t j = 0; j < pack; ++j) {
            const float x = p + j < g.head_dim ? row[p + j] : 0.0F;
            out[order::key_index(g, t, p) + j] = from_float<Element>(x);
          }
        }
      }
    }
  }

  static void encode_values(const block_geometry& g, std::byte* values, index_t first, index_t count,
                            const_rows rows) {
    auto* out = reinterpret_cast<Element*>(values);
    for (index_t t = first; t < first + count; ++t) {
      const float* row = rows.row(t - first);
      for (index_t d = 0; d < g.head_dim; ++d) out[order::value_index(g, t, d)] = from_float<Element>(row[d]);
    }
  }

  static void decode_keys(const block_geometry& g, const std::byte* keys, index_t first, index_t count,
                          mutable_rows rows) {
    const auto* in = reinterpret_cast<const Element*>(keys);
    for (index_t t = first; t < first + count; ++t) {
      float* row = rows.row(t - first);
      const Element* from = in + order::key_index(g, t, 0);  // the next pack lies a line further
      index_t d = 0;
      for (; d + order::pack <= g.head_dim; d += order::pack, from += key_lanes * order::pack) {
        for (index_t i = 0; i < order::pack; ++i) row[d + i] = to_float(from[i]);
      }
      for (; d < g.head_dim; ++d) row[d] = to_float(*from++);
    }
  }

  static void decode_values(const block_geometry& g, const std::byte* values, index_t first, index_t count,
                            mutable_rows rows) {
    const auto* in = reinterpret_cast<const Element*>(values);
    for (index_t t = first; t < first + count; ++t) {
      float* row = rows.row(t - first);
      const Element* from = in + order::value_index(g, t, 0);
      for (index_t d = 0; d < g.head_dim; ++d, from += order::pack) row[d] = to_float(*from);
    }
  }

  /// Unpacks 16 tokens at a time into L1, then serves every row from there.
  static void scores(const block_geometry& g, const std::byte* keys, index_t count, const float* queries,
                     index_t num_rows, float* out, const upcoming& /*next*/) {
    score_rows(g, keys, count, {queries, g.head_dim}, num_rows, out);
  }

  static void score_rows(const block_geometry& g, const std::byte* keys, index_t count, const_rows queries,
                         index_t num_rows, float* out) {
    alignas(64) std::array<float, max_head_dim * lanes> unpacked;  // [dim, 16 tokens]
    const auto* group = reinterpret_cast<const Element*>(keys);
    for (index_t t = 0; t < count; t += lanes, group += order::key_group_size(g)) {
      for (index_t p = 0; p < order::key_packs(g); ++p) {
        std::array<float*, pack> to;
        for (index_t j = 0; j < pack; ++j)
          to[static_cast<std::size_t>(j)] = &unpacked[static_cast<std::size_t>((p * pack + j) * lanes)];
        unpack_lanes<Element>(group + p * lanes * pack, to);
      }
      for (index_t r = 0; r < num_rows; ++r) {
        lane_array sum{};
        add_rows(queries.row(r), unpacked.data(), g.head_dim, sum.data());
        std::memcpy(out + r * g.block_size + t, sum.data(), sizeof(sum));
      }
    }
  }

  /// The same for values, 32 tokens at a time.
  static void accumulate(const block_geometry& g, const std::byte* values, index_t count,
                         const float* weights, index_t num_rows, float* sums, const upcoming& /*next*/) {
    alignas(64) std::array<float, max_head_dim * value_chunk> unpacked;  // [dim/16, 32 tokens, 16 dims]
    for (index_t t = 0; t < count; t += value_chunk) {
      const index_t num_tokens = std::min(value_chunk, count - t);
      unpack_values(g, values, t, num_tokens, unpacked.data());
      for (index_t r = 0; r < num_rows; ++r) {
        add_visible(g, unpacked.data(), weights + r * g.block_size + t, num_tokens, sums + r * g.head_dim);
      }
    }
  }

 private:
  static constexpr index_t value_chunk = 32;  // tokens; their floats stay in L1 up to head_dim 256

  /// out[dim/16, token, dim%16] for `num_tokens` tokens from `t`, rounded up to whole packs.
  static void unpack_values(const block_geometry& g, const std::byte* values, index_t t, index_t num_tokens,
                            float* out) {
    const auto* in = reinterpret_cast<const Element*>(values);
    for (index_t i = 0; i < num_tokens; i += pack) {
      for (index_t d = 0; d < g.head_dim; d += lanes) {
        std::array<float*, pack> to;
        for (index_t j = 0; j < pack; ++j) {
          to[static_cast<std::size_t>(j)] = out + (d / lanes * value_chunk + i + j) * lanes;
        }
        const Element* from = in + order::value_index(g, t + i, d);
        const index_t num_dims = std::min(lanes, g.head_dim - d);
        if (num_dims == lanes) {
          unpack_lanes<Element>(from, to);
        } else {  // the row ends here; what follows belongs to other tokens
          std::array<Element, lanes * pack> padded{};
          std::copy_n(from, num_dims * pack, padded.begin());
          unpack_lanes<Element>(padded.data(), to);
        }
      }
    }
  }

  /// sums[d] += sum_t weights[t] * values[t, d] over the runs of tokens whose weight is not zero. The inner sum
  /// starts from zero: adding thousands of terms to one number would let its rounding drift.
  static void add_visible(const block_geometry& g, const float* values, const float* weights,
                          index_t num_tokens, float* sums) {
    const auto hidden = [](float w) { return w == 0.0F; };
    const float* end = weights + num_tokens;
    const float* first_run = std::find_if_not(weights, end, hidden);
    for (index_t d = 0; d < g.head_dim; d += lanes) {
      const float* rows = values + d * value_chunk;
      lane_array sum{};
      for (const float* run = first_run; run != end;) {
        const float* run_end = std::find_if(run, end, hidden);
        add_rows(run, rows + (run - weights) * lanes, run_end - run, sum.data());
        run = std::find_if_not(run_end, end, hidden);
      }
      const auto num_dims = static_cast<std::size_t>(std::min(lanes, g.head_dim - d));
      for (std::size_t i = 0; i < num_dims; ++i) sums[d + static_cast<index_t>(i)] += sum[i];
    }
  }
};

// ---- bytes with a scale per token --------------------------------------------------------------------------------------

inline float largest(const float* row, index_t count) {
  float max = 0.0F;
  float nothing = 0.0F;  // x - x is zero for finite x, else NaN
  for (index_t i = 0; i < count; ++i) {
    max = std::max(max, std::fabs(row[i]));
    nothing += row[i] - row[i];
  }
  return max + nothing;
}

/// How many scales a number is, rounded to nearest even.
inline std::int8_t to_byte(float x, float scale) noexcept {
  constexpr float round_to_integer = 0x1.8p23F;
  const float steps = scale == 0.0F ? 0.0F : x / scale;
  return static_cast<std::int8_t>((steps + round_to_integer) - round_to_integer);
}

/// \param bytes  [count], zeros behind it up to a multiple of four
inline void put_key_words(const std::int8_t* bytes, index_t count, std::int8_t* words) {
  constexpr index_t pack = block_order<std::int8_t>::pack;
  for (index_t d = 0; d < count; d += pack, words += pack * key_lanes) std::memcpy(words, bytes + d, pack);
}

inline void put_key(const float* row, index_t count, float scale, std::int8_t* words) {
  std::array<std::int8_t, max_head_dim + 4> bytes{};
  for (index_t d = 0; d < count; ++d) bytes[static_cast<std::size_t>(d)] = to_byte(row[d], scale);
  put_key_words(bytes.data(), count, words);
}

inline void put_value(const float* row, index_t count, float scale, index_t slot, std::int8_t* quads) {
  for (index_t d = 0; d < count; ++d)
    quads[d * block_order<std::int8_t>::pack + slot] = to_byte(row[d], scale);
}

/// Prepared queries are the queries, further apart.
inline void prepare(index_t head_dim, const float* queries, index_t num_rows, float* prepared) {
  for (index_t r = 0; r < num_rows; ++r)
    std::copy_n(queries + r * head_dim, head_dim, prepared + r * prepared_query_floats(head_dim));
}

inline void scores_int8(const block_geometry& g, const std::byte* keys, const bfloat16* scales, index_t count,
                        const float* prepared, index_t num_rows, float* out, const upcoming& /*next*/) {
  const const_rows queries{prepared, prepared_query_floats(g.head_dim)};
  element<std::int8_t>::score_rows(g, keys, count, queries, num_rows, out);
  for (index_t r = 0; r < num_rows; ++r) {
    for (index_t t = 0; t < count; ++t) out[r * g.block_size + t] *= to_float(scales[t]);
  }
}

/// Rows whose weights are scaled at a time, for the stack's sake.
inline constexpr index_t scaled_rows = 16;

inline void accumulate_int8(const block_geometry& g, const std::byte* values, const bfloat16* scales,
                            index_t count, const float* weights, index_t num_rows, float* sums,
                            const upcoming& next) {
  std::array<float, scaled_rows * max_block_size> scaled;
  const index_t num_weights = std::min(g.block_size, ceil_div(count, lanes) * lanes);
  for (index_t first = 0; first < num_rows; first += scaled_rows) {
    const index_t rows = std::min(scaled_rows, num_rows - first);
    for (index_t r = 0; r < rows; ++r) {
      for (index_t t = 0; t < num_weights; ++t) {
        const float w = weights[(first + r) * g.block_size + t];
        scaled[static_cast<std::size_t>(r * g.block_size + t)] = w == 0.0F ? 0.0F : w * to_float(scales[t]);
      }
    }
    element<std::int8_t>::accumulate(g, values, count, scaled.data(), rows, sums + first * g.head_dim, next);
  }
}

inline constexpr int8_kernels kernels_for_int8 = {largest, put_key,     put_value,
                                                  prepare, scores_int8, accumulate_int8};

template <class Element>
inline constexpr element_kernels kernels_for = {
    element<Element>::encode_keys,   element<Element>::encode_values, element<Element>::decode_keys,
    element<Element>::decode_values, element<Element>::scores,        element<Element>::accumulate,
};

inline constexpr table kernels = {
    isa::portable,    kernels_for<float>,   kernels_for<half>,    kernels_for<bfloat16>, kernels_for_int8,
    kernels_for_int8, kernels_for_low_bits, kernels_for_channels, kernels_for_trellis,   softmax,
    soft_cap};

}  // namespace kvcache::inline v0::kernel::portable
