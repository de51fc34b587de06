// SPDX-License-Identifier: MIT
// Attention of many query rows over one bf16 block: element_kernels::attend. Processors do not use their 512-bit vector units and
// their tiles at the same time (bench/NOTES.md), so whatever vectors do beside the exponentials is left out or done once:
//
//   weights   rounded to bf16 as they come from the softmax; their sum is that of the rounded ones, so that averages stay averages
//   sums      loaded into tiles, added to there, and stored; nothing looks for NaN in between
//
// Accuracy: queries enter as the sum of two bf16, as in amx_bf16.inl, weights as one: off by up to 2^-8 of themselves.
// Included by amx.hpp.

inline constexpr index_t many_tokens = avx512::sum_tokens;  // of a block that goes this way
inline constexpr index_t many_rows = 64;  // that share a block's way into the first-level cache

/// Weights of up to 64 rows for 64 tokens as a left operand, in bf16.
class rounded_weights {
 public:
  static constexpr index_t stride_bytes = 2 * many_tokens;

  /// 32 weights of one row, from token `t` on. \return sum + what they are rounded to: that is what sums are divided by
  KVCACHE_INLINE avx512::vec put(index_t row, index_t t, avx512::vec first, avx512::vec second,
                                 avx512::vec sum) noexcept {
    const __m512i a = rounded(first.x);
    const __m512i b = rounded(second.x);
    store_high_halves(&data_[static_cast<std::size_t>(row * many_tokens + t)], a, b);
    return avx512::add(avx512::add(sum, high_half(a)), high_half(b));
  }
  [[nodiscard]] const void* rows(index_t first, index_t t) const noexcept {
    return &data_[static_cast<std::size_t>(first * many_tokens + t)];
  }

 private:
  alignas(64) std::array<std::uint16_t, many_rows * many_tokens> data_;
};

/// exp(x) for x up to softmax_slack, within 5e-6 of itself near 1, a hundredth of what rounding it to bf16 costs: 2^y is a
/// polynomial with least error on [0, 1), of y less its floor, times a power of two.
KVCACHE_INLINE avx512::vec exp_roughly(avx512::vec x) {
  const avx512::vec y = avx512::mul(x, avx512::broadcast(1.44269504F));
  constexpr int less_floor = 0x09;  // no fraction bits, rounded down, no exceptions
  const avx512::vec f = {_mm512_maskz_reduce_ps(avx512::all, y.x, less_floor)};
  avx512::vec p = avx512::fma(f, avx512::broadcast(0.0135341681F), avx512::broadcast(0.0520114603F));
  p = avx512::fma(p, f, avx512::broadcast(0.241442757F));
  p = avx512::fma(p, f, avx512::broadcast(0.693003834F));
  p = avx512::fma(p, f, avx512::broadcast(1.00000259F));
  return {_mm512_maskz_scalef_ps(avx512::all, p.x, y.x)};
}

/// Softmax of `Rows` rows of 64 scores into weights; as avx512::softmax_of_rows.
template <int Rows>
KVCACHE_TARGET inline void softmax_to_weights(const float* scores, softmax_row* rows, float* rescales,
                                              rounded_weights& weights, index_t first_row) {
  using avx512::vec;
  vec shift[Rows];
  avx512::softmax_shifts<Rows>(scores, many_tokens, many_tokens, rows, rescales, shift);
  vec sum[Rows];
#pragma GCC unroll 4
  for (vec& s : sum) s = avx512::zero();
  vec probe = avx512::zero();  // NaN once a product with zero was
#pragma GCC unroll 2
  for (index_t t = 0; t < many_tokens; t += tile_depth) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const float* at = scores + r * many_tokens + t;
      const vec scores_of[2] = {avx512::load(at), avx512::load(at + key_lanes)};
      probe = avx512::fma(scores_of[0], avx512::zero(), probe);
      probe = avx512::fma(scores_of[1], avx512::zero(), probe);
      const vec first = exp_roughly(avx512::sub(scores_of[0], shift[r]));
      const vec second = exp_roughly(avx512::sub(scores_of[1], shift[r]));
      sum[r] = weights.put(first_row + r, t, first, second, sum[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) rows[r].sum += avx512::sum_of(avx512::add(sum[r], probe));
}

/// A block, and the rows that attend to it.
struct rows_and_block {
  block_geometry g;
  const std::byte* keys;
  const std::byte* values;
  split_rows queries;
  softmax_row* rows;
  float* sums;  // [rows, head_dim]
};

/// Rows [first, first + n) of the weights from scores; n <= 32.
template <class Tiles>
KVCACHE_INLINE void weigh_many(const rows_and_block& in, index_t first, index_t n, rounded_weights& weights,
                               sections_ahead& ahead) noexcept {
  alignas(64) std::array<float, most_rows * many_tokens> scores;
  const index_t group_size = block_order<bfloat16>::key_group_size(in.g);
  const tile_shape shape = tile_shape::of(n);
  const tiles_in_use<Tiles> in_use(shape);
  const index_t at_once = most_operands(shape);
  for (index_t group = 0; group < many_tokens / key_lanes; group += at_once) {
    begin_products<Tiles>();
    for (index_t d = 0; d < in.g.head_dim; d += tile_depth) {
      const bfloat16* at = reinterpret_cast<const bfloat16*>(in.keys) + group * group_size + d * tile_rows;
      multiply_columns<Tiles>(shape, in.queries.row(first), d, at_once, ahead, [&](index_t i) {
        return right_operand{at + i * group_size, 64};
      });
    }
    store_products<Tiles>(shape, at_once, scores.data() + group * key_lanes, many_tokens);
  }
  for (index_t r = 0; r < n; r += 4) {
    std::array<float, 4> rescales;
    softmax_row* rows = in.rows + first + r;
    const float* of_rows = scores.data() + r * many_tokens;
    const index_t count = std::min(index_t{4}, n - r);
    if (count == 4) {
      softmax_to_weights<4>(of_rows, rows, rescales.data(), weights, first + r);
    } else {
      for (index_t i = 0; i < count; ++i)
        softmax_to_weights<1>(of_rows + i * many_tokens, rows + i, &rescales[static_cast<std::size_t>(i)],
                              weights, first + r + i);
    }
    for (index_t i = 0; i < count; ++i) {
      const float by = rescales[static_cast<std::size_t>(i)];
      if (by == 1.0F) [[likely]]
        continue;
      float* sums = in.sums + (first + r + i) * in.g.head_dim;
      lanes::transform(
          in.g.head_dim, sums, [by](auto x) { return x * by; }, sums);
    }
  }
}

/// Adds weighted values to the sums of rows [first, first + n); n <= 32. Sums stay in tiles meanwhile.
template <class Tiles>
KVCACHE_INLINE void add_many(const rows_and_block& in, index_t first, index_t n,
                             const rounded_weights& weights, sections_ahead& ahead) noexcept {
  const tile_shape shape = tile_shape::of(n);
  const tiles_in_use<Tiles> in_use(shape);
  const index_t dim = in.g.head_dim;
  const index_t step = most_operands(shape) * key_lanes;
  for (index_t d = 0; d < dim; d += step) {
    const index_t num_operands = std::min(step, dim - d) / key_lanes;
    float* sums = in.sums + first * dim + d;
    load_products<Tiles>(shape, num_operands, sums, dim);
    for (index_t t = 0; t < many_tokens; t += tile_depth) {
      const bfloat16* at = reinterpret_cast<const bfloat16*>(in.values) + t * dim + 2 * d;
      Tiles::template load<4>(weights.rows(first, t), weights.stride_bytes);
      if (shape.second != 0)
        Tiles::template load<5>(weights.rows(first + tile_rows, t), weights.stride_bytes);
      for_tiles(num_operands, [&]<int I>(index_t i) {
        ahead.fetch();
        Tiles::template load<6 + I % 2>(at + 2 * i * key_lanes, 4 * dim);
        Tiles::template multiply<I, 4, 6 + I % 2>();
        if constexpr (I < 2) {
          if (shape.second != 0) Tiles::template multiply<I + 2, 5, 6 + I % 2>();
        }
      });
    }
    store_products<Tiles>(shape, num_operands, sums, dim);
  }
}

/// element_kernels::attend
template <class Tiles>
KVCACHE_TARGET inline bool attend_many(const block_geometry& g, const std::byte* keys,
                                       const std::byte* values, const float* prepared, index_t num_rows,
                                       softmax_row* rows, float* sums, const upcoming& next) {
  if (g.block_size != many_tokens || g.head_dim % tile_depth != 0 || num_rows <= tile_rows) return false;
  const index_t section_bytes = values - keys;
  const index_t passes = ceil_div(num_rows, most_rows);
  const std::byte* next_values = next.next == nullptr ? nullptr : next.next + section_bytes;
  sections_ahead keys_ahead({next.next, values}, keys, section_bytes, passes);
  sections_ahead values_ahead({next_values, next.soon}, values, section_bytes, passes);
  rounded_weights weights;
  for (index_t row = 0; row < num_rows; row += many_rows) {
    const split_rows queries{reinterpret_cast<const std::uint16_t*>(prepared), g.head_dim};
    const rows_and_block in{g, keys, values, queries.row(row), rows + row, sums + row * g.head_dim};
    const index_t n = std::min(num_rows - row, many_rows);
    for (index_t first = 0; first < n; first += most_rows)
      weigh_many<Tiles>(in, first, std::min(n - first, most_rows), weights, keys_ahead);
    for (index_t first = 0; first < n; first += most_rows)
      add_many<Tiles>(in, first, std::min(n - first, most_rows), weights, values_ahead);
  }
  return true;
}
