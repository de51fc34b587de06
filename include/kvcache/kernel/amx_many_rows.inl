// SPDX-License-Identifier: MIT
// Attention of many query rows over whole bf16 blocks, several of them at once: element_kernels::attend. For 32 rows:
//
//   for each block    scores = queries * keys^T          tiles
//                     weights = exp(scores - max)        512-bit vectors, rounded to bf16 as they are made
//   then              sums += weights * values           tiles, of all blocks: sums are loaded and stored once
//
// Processors do not use their vector units and their tiles at the same time (bench/NOTES.md), so whatever vectors do beside the
// exponentials is left out or done once: nothing looks for NaN in sums, and a row's weights are added up as they are rounded, so
// that averages stay averages. What tiles load comes from the second-level cache as fast as they multiply; the blocks that come
// next are asked for all along.
//
// Accuracy: queries and weights enter as one bf16 each: off by up to 2^-8 of themselves. Included by amx.hpp.

inline constexpr index_t many_tokens = avx512::sum_tokens;  // of a block that goes this way
inline constexpr index_t rows_side_by_side = 4;             // that are weighed

/// Weights of 32 rows for the tokens of some blocks as left operands, in bf16.
class rounded_weights {
 public:
  static constexpr index_t stride_bytes = 2 * many_tokens;

  /// 32 weights of one row, from token `t` of a block on. \return sum + what they are rounded to: what sums are divided by
  KVCACHE_INLINE __m512 put(index_t block, index_t row, index_t t, __m512 first, __m512 second,
                            __m512 sum) noexcept {
    const __m512bh weights = _mm512_cvtne2ps_pbh(second, first);
    const auto one = _mm512_set1_epi32(0x3F803F80);  // two bf16
    _mm512_store_si512(at(block, row, t), reinterpret_cast<__m512i>(weights));
    return _mm512_dpbf16_ps(sum, weights, reinterpret_cast<__m512bh>(one));
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

/// exp(x) for x up to softmax_slack, within 1e-4 of itself near 1, a fortieth of what rounding it to bf16 costs: 2^y is a
/// polynomial with least error on [0, 1), of y less its floor, times a power of two.
KVCACHE_INLINE avx512::vec exp_roughly(avx512::vec x) {
  const avx512::vec y = avx512::mul(x, avx512::broadcast(1.44269504F));
  constexpr int less_floor = 0x09;  // no fraction bits, rounded down, no exceptions
  const avx512::vec f = {_mm512_maskz_reduce_ps(avx512::all, y.x, less_floor)};
  avx512::vec p = avx512::fma(f, avx512::broadcast(0.0780245227F), avx512::broadcast(0.226067155F));
  p = avx512::fma(p, f, avx512::broadcast(0.695833541F));
  p = avx512::fma(p, f, avx512::broadcast(0.999925219F));
  return {_mm512_maskz_scalef_ps(avx512::all, p.x, y.x)};
}

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
  for_tiles(n, [&]<int I>(index_t i) {
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

  /// Scores of rows [row, row + Rows) to weights of block b; as avx512::softmax_of_rows, but that sums of weights stay in lanes.
  template <int Rows>
  KVCACHE_TARGET void softmax_to_weights(index_t b, index_t row, float* rescales) noexcept {
    using avx512::vec;
    const float* scores = scores_of(row);
    vec shift[Rows];
    avx512::softmax_shifts<Rows>(scores, many_tokens, many_tokens, rows_ + row, rescales, shift);
    // NaN once a score is not finite: tiles may overflow to -infinity where others do not, and it would weigh nothing
    vec probe = avx512::zero();
    vec sum[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
      sum[r] = avx512::mul(avx512::load(weight_sums_of(row + r)), avx512::broadcast(rescales[r]));
#pragma GCC unroll 2
    for (index_t t = 0; t < many_tokens; t += tile_depth) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const float* at = scores + r * many_tokens + t;
        const vec scores_of_row[2] = {avx512::load(at), avx512::load(at + key_lanes)};
        probe = avx512::fma(scores_of_row[0], avx512::zero(), probe);
        probe = avx512::fma(scores_of_row[1], avx512::zero(), probe);
        const vec first = exp_roughly(avx512::sub(scores_of_row[0], shift[r]));
        const vec second = exp_roughly(avx512::sub(scores_of_row[1], shift[r]));
        sum[r].x = weights_.put(b, row + r, t, first.x, second.x, sum[r].x);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) avx512::store(weight_sums_of(row + r), avx512::add(sum[r], probe));
  }

  /// The same, and what has to be done where the maximum of a row has risen.
  template <int Rows>
  KVCACHE_INLINE void weigh(index_t b, index_t row) noexcept {
    std::array<float, Rows> rescales;
    softmax_to_weights<Rows>(b, row, rescales.data());
    for (std::size_t r = 0; r < Rows; ++r) {
      const float by = rescales[r];
      if (by == 1.0F) [[likely]]
        continue;
      add(b);  // what was weighed before it rose
      float* sums = sums_ + (row + static_cast<index_t>(r)) * g_.head_dim;
      lanes::transform(
          g_.head_dim, sums, [by](auto x) { return x * by; }, sums);
    }
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
