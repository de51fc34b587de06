// SPDX-License-Identifier: MIT
// Attention of many query rows over whole bf16 blocks, several of them at once: element_kernels::attend. For 32 rows:
//
//   for each block    scores = queries * keys^T          tiles
//                     weights = exp(scores - max)        512-bit vectors, 32 at a time, as bf16
//   then              sums += weights * values           tiles, of all blocks: sums are loaded and stored once
//
// Processors do not use their vector units and their tiles at the same time (bench/NOTES.md), so whatever vectors do beside the
// exponentials is left out or done once: nothing looks for NaN in sums, maxima are looked for only where a score is larger than
// they leave room for, and a row's weights are added up as they are multiplied, so that averages stay averages. What tiles load comes from the second-level cache as fast as they multiply; the blocks that come
// next are asked for all along.
//
// Accuracy: queries and weights enter as one bf16 each: queries off by up to 2^-8 of themselves, weights by 0.0061. Included by
// amx.hpp.

inline constexpr index_t many_tokens = avx512::sum_tokens;  // of a block that goes this way
inline constexpr index_t rows_side_by_side = 4;             // that are weighed

/// Weights of 32 rows for the tokens of some blocks as left operands, in bf16.
class rounded_weights {
 public:
  static constexpr index_t stride_bytes = 2 * many_tokens;

  /// 32 weights of one row, from token `t` of a block on. \return sum + all of them, in lanes
  KVCACHE_INLINE avx512::vec put(index_t block, index_t row, index_t t, __m512i weights,
                                 avx512::vec sum) noexcept {
    const auto one = _mm512_set1_epi32(0x3F803F80);  // two bf16
    _mm512_store_si512(at(block, row, t), weights);
    return {_mm512_dpbf16_ps(sum.x, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(one))};
  }
  [[nodiscard]] const void* rows(index_t block, index_t first, index_t t) const noexcept {
    return &data_[index_of(block, first, t)];
  }

 private:
  [[nodiscard]] void* at(index_t block, index_t row, index_t t) noexcept {
    return &data_[index_of(block, row, t)];
  }
  static std::size_t index_of(index_t block, index_t row, index_t t) noexcept {
    return static_cast<std::size_t>((block * most_rows + row) * many_tokens + t);
  }
  // no bfloat16, which would start as zero
  alignas(64) std::array<std::uint16_t, max_blocks_at_once * most_rows * many_tokens> data_;
};

/// exp(score - max) as bf16, in integers of 16 bits: the steps, 1/256 of an octave, that a score lies below the maximum, taken off
/// those of one, are a bf16 and a bit more, as if powers of two lay on straight lines between the whole ones. A table bends them.
/// Off by at most 0.0061 of itself, 0.0019 in the mean square; rounding exact powers is off by 0.0039 and 0.0017.
struct exponentials {
  static constexpr float steps = 256.0F * 1.44269504F;  // for a score lower by one
  static constexpr float steps_of_max = 12 * 256;       // so many for scores up to 8.3 above the maximum
  static constexpr int least_steps = static_cast<int>(steps_of_max - softmax_slack * steps) + 1;
  static constexpr int bend_of_one = 39;
  static constexpr int steps_of_zero = 256 * (12 + 127) - bend_of_one - 1;
  /// For the upper six bits of what is left of an octave, as found by trying all: the least worst error.
  alignas(64) static constexpr std::array<std::uint8_t, 64> bends{
      39, 37, 36, 35, 33, 32, 31, 30, 29, 27, 27, 26, 25, 24, 23, 23, 22, 21, 21, 20, 20, 19,
      19, 19, 18, 18, 18, 18, 18, 17, 17, 18, 18, 18, 18, 18, 18, 19, 19, 19, 20, 20, 21, 21,
      22, 22, 23, 24, 24, 25, 26, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 38, 39};

  /// Steps of 16 scores; fewer than `least_steps` where there are too few, too many or none to count.
  KVCACHE_INLINE static __m512i steps_below(avx512::vec max, const float* scores) noexcept {
    return _mm512_maskz_cvtps_epi32(avx512::all, uncounted(max, scores).x);
  }
  /// The same, but as many as fit where there are too many to count, or none.
  KVCACHE_INLINE static __m512i steps_below_in_range(avx512::vec max, const float* scores) noexcept {
    const __m512 most = avx512::broadcast(65535.0F).x;
    return _mm512_maskz_cvtps_epi32(avx512::all,
                                    _mm512_maskz_min_ps(avx512::all, uncounted(max, scores).x, most));
  }
  /// Steps of 32 scores in order.
  KVCACHE_INLINE static __m512i together(__m512i first, __m512i second) noexcept {
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_maskz_permutexvar_epi64(0xFF, in_order, _mm512_packus_epi32(first, second));
  }
  KVCACHE_INLINE static __m512i of(__m512i n) noexcept {
    constexpr __mmask64 low_bytes = 0x5555555555555555;
    const __m512i bend =
        _mm512_maskz_permutexvar_epi8(low_bytes, _mm512_srli_epi16(n, 2), _mm512_load_si512(bends.data()));
    const __m512i straight = _mm512_subs_epu16(_mm512_set1_epi16(static_cast<short>(steps_of_zero)), n);
    return _mm512_avg_epu16(straight, bend);
  }

 private:
  KVCACHE_INLINE static avx512::vec uncounted(avx512::vec max, const float* scores) noexcept {
    return avx512::fma(avx512::sub(avx512::load(scores), max), avx512::broadcast(-steps),
                       avx512::broadcast(steps_of_max));
  }
};

/// The blocks of the next run on their way into the second-level cache: each pass asks for its share of each of them, a few lines at
/// a time all along, since processors have room for few lines that are asked for at once.
class run_ahead {
 public:
  run_ahead(const block_run& blocks, const block_geometry& g, index_t pass, index_t num_passes) noexcept
      : block_(blocks.blocks + blocks.count), last_(block_ + blocks.count) {
    const index_t block_bytes = 2 * blocks.values_offset;
    share_bytes_ = ceil_div(block_bytes / 64, num_passes) * 64;
    offset_ = std::min(pass * share_bytes_, block_bytes);
    share_bytes_ = std::min(share_bytes_, block_bytes - offset_);
    // Tiles that are loaded of a block, and groups of rows that are weighed.
    const index_t num_steps =
        2 * many_tokens * g.head_dim / (tile_rows * tile_depth) + most_rows / rows_side_by_side;
    step_bytes_ = ceil_div(share_bytes_ / 64, num_steps) * 64;
    begin_block();
  }

  [[gnu::always_inline]] void fetch() noexcept {
    if (at_ == end_) return;
    const std::byte* stop = end_ - at_ < step_bytes_ ? end_ : at_ + step_bytes_;
    __asm__ volatile("1: prefetcht1 (%0)\n\tadd $64, %0\n\tcmp %1, %0\n\tjb 1b"
                     : "+r"(at_)
                     : "r"(stop)
                     : "cc");
    if (at_ == end_) begin_block();
  }

 private:
  void begin_block() noexcept {
    at_ = end_ = nullptr;
    if (block_ == last_ || *block_ == nullptr || share_bytes_ == 0) return;
    at_ = *block_++ + offset_;
    end_ = at_ + share_bytes_;
  }

  const std::byte* const* block_;
  const std::byte* const* last_;
  index_t share_bytes_;
  index_t offset_;
  index_t step_bytes_;
  const std::byte* at_;
  const std::byte* end_;
};

/// C += A * B: 32 columns of all rows of a pass times n right operands, `step` bytes apart.
template <class Tiles>
KVCACHE_INLINE void multiply_rounded(const tile_shape& shape, const void* rows, const void* second_rows,
                                     index_t stride, const std::byte* right, index_t step,
                                     index_t right_stride, index_t n, run_ahead& ahead) noexcept {
  Tiles::template load<4>(rows, stride);
  if (shape.second != 0) Tiles::template load<5>(second_rows, stride);
  for_tiles(
      n, [&]<int I>(index_t i) __attribute__((always_inline)) {
        ahead.fetch();
        Tiles::template load<6 + I % 2>(right + i * step, right_stride);
        Tiles::template multiply<I, 4, 6 + I % 2>();
        if constexpr (I < 2) {
          if (shape.second != 0) Tiles::template multiply<I + 2, 5, 6 + I % 2>();
        }
      });
}

/// Up to 32 rows that attend to the blocks of a run.
template <class Tiles>
class row_pass {
 public:
  /// \param queries  of which the high parts are taken; these, rows and sums from the pass's first row on
  row_pass(const block_geometry& g, const block_run& blocks, split_rows queries, index_t num_rows,
           softmax_row* rows, float* sums, const run_ahead& ahead) noexcept
      : g_(g),
        blocks_(blocks),
        queries_(queries),
        num_rows_(num_rows),
        rows_(rows),
        sums_(sums),
        shape_(tile_shape::of(num_rows)),
        ahead_(ahead) {}

  KVCACHE_TARGET void attend() noexcept {
    const tiles_in_use<Tiles> in_use(shape_);
    const index_t whole = num_rows_ - num_rows_ % rows_side_by_side;
    for (index_t b = 0; b < blocks_.count; ++b) {
      score(b);
      for (index_t r = 0; r < whole; r += rows_side_by_side) weigh<rows_side_by_side>(b, r);
      for (index_t r = whole; r < num_rows_; ++r) weigh<1>(b, r);
    }
    add(blocks_.count);
    for (index_t r = 0; r < num_rows_; ++r) rows_[r].sum += avx512::sum_of(avx512::load(weight_sums_of(r)));
  }

 private:
  [[nodiscard]] float* scores_of(index_t row) noexcept {
    return &scores_[static_cast<std::size_t>(row * many_tokens)];
  }
  [[nodiscard]] float* weight_sums_of(index_t row) noexcept {
    return &weight_sums_[static_cast<std::size_t>(row * key_lanes)];
  }

  /// Scores of block b.
  KVCACHE_INLINE void score(index_t b) noexcept {
    const index_t group_bytes = block_order<bfloat16>::key_group_size(g_) * index_t{sizeof(bfloat16)};
    const index_t at_once = most_operands(shape_);
    for (index_t group = 0; group < many_tokens / key_lanes; group += at_once) {
      const std::byte* keys = blocks_.blocks[b] + group * group_bytes;
      begin_products<Tiles>();
      for (index_t d = 0; d < g_.head_dim; d += tile_depth)
        multiply_rounded<Tiles>(shape_, queries_.part(d, false), queries_.row(tile_rows).part(d, false),
                                queries_.stride_bytes(), keys + d * 2 * tile_rows, group_bytes, 64, at_once,
                                ahead_);
      store_products<Tiles>(shape_, at_once, scores_.data() + group * key_lanes, many_tokens);
    }
  }

  /// Scores of rows [row, row + Rows) to weights of block b, less the maxima as they are.
  /// \param sum  what weights of the rows add up to with those before
  /// \return whether the weights are right: not where a score is above its maximum by more than softmax_slack, or is not finite,
  ///         or where there is no maximum yet. In range they are if maxima have risen since
  template <int Rows, bool InRange>
  KVCACHE_INLINE bool softmax_to_weights(index_t b, index_t row, avx512::vec (&sum)[Rows]) noexcept {
    avx512::vec max[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      max[r] = avx512::broadcast(rows_[row + r].max);
      sum[r] = avx512::load(weight_sums_of(row + r));
    }
    __m512i least = _mm512_set1_epi16(-1);
#pragma GCC unroll 2
    for (index_t t = 0; t < many_tokens; t += tile_depth) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const float* scores = scores_of(row + r) + t;
        constexpr auto steps_below = InRange ? exponentials::steps_below_in_range : exponentials::steps_below;
        const __m512i n =
            exponentials::together(steps_below(max[r], scores), steps_below(max[r], scores + key_lanes));
        least = _mm512_min_epu16(least, n);
        sum[r] = weights_.put(b, row + r, t, exponentials::of(n), sum[r]);
      }
    }
    return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(exponentials::least_steps)) == 0;
  }

  /// Raises the maxima of rows [row, row + Rows), and rescales what was weighed with those before. Marks rows with a score that is
  /// not finite by a sum that is not: tiles may overflow to -infinity where others do not, and it would weigh nothing.
  template <int Rows>
  KVCACHE_TARGET [[gnu::noinline]] void raise_maxima(index_t b, index_t row) noexcept {
    std::array<float, Rows> rescales;
    avx512::vec max[Rows];
    avx512::softmax_shifts<Rows>(scores_of(row), many_tokens, many_tokens, rows_ + row, rescales.data(), max);
    for (index_t r = row; r < row + Rows; ++r) {
      float* weight_sums = weight_sums_of(r);
      if (!all_finite(scores_of(r), 1, many_tokens, many_tokens))
        weight_sums[0] = std::numeric_limits<float>::quiet_NaN();
      const float by = rescales[static_cast<std::size_t>(r - row)];
      if (by == 1.0F) continue;
      add(b);  // what was weighed before it rose
      const auto rescale = [by](float* sums, index_t count) {
        lanes::transform(
            count, sums, [by](auto x) { return x * by; }, sums);
      };
      rescale(weight_sums, key_lanes);
      rescale(sums_ + r * g_.head_dim, g_.head_dim);
    }
  }

  /// Weights of rows [row, row + Rows) for block b.
  template <int Rows>
  KVCACHE_TARGET void weigh(index_t b, index_t row) noexcept {
    avx512::vec sum[Rows];
    if (!softmax_to_weights<Rows, false>(b, row, sum)) [[unlikely]] {
      raise_maxima<Rows>(b, row);
      softmax_to_weights<Rows, true>(b, row, sum);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) avx512::store(weight_sums_of(row + r), sum[r]);
    ahead_.fetch();
  }

  /// Adds weighted values of the blocks before `end` that are not in the sums yet. These stay in tiles meanwhile.
  KVCACHE_TARGET void add(index_t end) noexcept {
    if (added_ >= end) return;
    const index_t dim = g_.head_dim;
    const index_t step = most_operands(shape_) * key_lanes;
    for (index_t d = 0; d < dim; d += step) {
      const index_t num_operands = std::min(step, dim - d) / key_lanes;
      load_products<Tiles>(shape_, num_operands, sums_ + d, dim);
      for (index_t b = added_; b < end; ++b) {
        const std::byte* values = blocks_.blocks[b] + blocks_.values_offset;
        for (index_t t = 0; t < many_tokens; t += tile_depth)
          multiply_rounded<Tiles>(shape_, weights_.rows(b, 0, t), weights_.rows(b, tile_rows, t),
                                  rounded_weights::stride_bytes, values + 2 * t * dim + 4 * d, 4 * key_lanes,
                                  4 * dim, num_operands, ahead_);
      }
      store_products<Tiles>(shape_, num_operands, sums_ + d, dim);
    }
    added_ = end;
  }

  block_geometry g_;
  block_run blocks_;
  split_rows queries_;
  index_t num_rows_;
  softmax_row* rows_;
  float* sums_;  // [num_rows, head_dim]
  tile_shape shape_;
  run_ahead ahead_;
  index_t added_ = 0;                                                   // blocks whose values are in sums_
  alignas(64) std::array<float, most_rows * key_lanes> weight_sums_{};  // folded at the end
  alignas(64) std::array<float, most_rows * many_tokens> scores_;       // of one block
  rounded_weights weights_;
};

/// element_kernels::attends
inline bool attends_many(const block_geometry& g, index_t num_rows) noexcept {
  return g.block_size == many_tokens && g.head_dim % tile_depth == 0 && num_rows > tile_rows;
}

/// element_kernels::attend
template <class Tiles>
inline void attend_many(const block_geometry& g, const block_run& blocks, const float* prepared,
                        index_t num_rows, softmax_row* rows, float* sums) {
  const split_rows queries{reinterpret_cast<const std::uint16_t*>(prepared), g.head_dim};
  const index_t num_passes = ceil_div(num_rows, most_rows);
  for (index_t pass = 0; pass < num_passes; ++pass) {
    const index_t first = pass * most_rows;
    row_pass<Tiles>(g, blocks, queries.row(first), std::min(num_rows - first, most_rows), rows + first,
                    sums + first * g.head_dim, {blocks, g, pass, num_passes})
        .attend();
  }
}
