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
// next are asked for while vectors work.
//
// Accuracy: queries and weights enter as one bf16 each: off by up to 2^-8 of themselves. Included by amx.hpp.

inline constexpr index_t many_tokens = avx512::sum_tokens;  // of a block that goes this way

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

/// What the softmax of a pass, up to 32 rows, leaves: weights, and their sums in lanes, added up at the end.
struct pass_weights {
  rounded_weights weights;
  alignas(64) std::array<float, most_rows * key_lanes> sums{};

  [[nodiscard]] float* sum_of_row(index_t row) noexcept {
    return &sums[static_cast<std::size_t>(row * key_lanes)];
  }
};

/// Softmax of `Rows` rows of 64 scores, from `first_row` of a pass on, into its weights of a block; as avx512::softmax_of_rows, but
/// that sums stay in `to`.
template <int Rows>
KVCACHE_TARGET inline void softmax_to_weights(const float* scores, softmax_row* rows, float* rescales,
                                              pass_weights& to, index_t block, index_t first_row) {
  using avx512::vec;
  vec shift[Rows];
  avx512::softmax_shifts<Rows>(scores, many_tokens, many_tokens, rows, rescales, shift);
  vec probe = avx512::
      zero();  // NaN once a score is not finite: tiles may overflow to -infinity, which weighs nothing
  vec sum[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
    sum[r] = avx512::mul(avx512::load(to.sum_of_row(first_row + r)), avx512::broadcast(rescales[r]));
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
      sum[r].x = to.weights.put(block, first_row + r, t, first.x, second.x, sum[r].x);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) avx512::store(to.sum_of_row(first_row + r), avx512::add(sum[r], probe));
}

/// Rows that attend to blocks. Up to 32 of them are a pass.
struct rows_and_blocks {
  block_geometry g;
  block_run blocks;
  split_rows queries;  // of which the high parts are taken
  softmax_row* rows;
  float* sums;  // [rows, head_dim]
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
    // Tiles that are loaded for a block, and rows of softmax, four at a time.
    const index_t num_steps = 4 * g.head_dim / tile_depth * 2 + most_rows / 4;
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

/// scores[r, t] of the rows of a pass for one block. \param queries  of the pass
template <class Tiles>
KVCACHE_INLINE void score_many(const block_geometry& g, const std::byte* keys, split_rows queries,
                               const tile_shape& shape, float* scores, run_ahead& ahead) noexcept {
  const index_t group_bytes = block_order<bfloat16>::key_group_size(g) * index_t{sizeof(bfloat16)};
  const index_t at_once = most_operands(shape);
  for (index_t group = 0; group < many_tokens / key_lanes; group += at_once) {
    const std::byte* of_group = keys + group * group_bytes;
    begin_products<Tiles>();
    for (index_t d = 0; d < g.head_dim; d += tile_depth)
      multiply_rounded<Tiles>(shape, queries.part(d, false), queries.row(tile_rows).part(d, false),
                              queries.stride_bytes(), of_group + d * 2 * tile_rows, group_bytes, 64, at_once,
                              ahead);
    store_products<Tiles>(shape, at_once, scores + group * key_lanes, many_tokens);
  }
}

/// Adds weighted values of blocks [from, to) to the sums of a pass, which stay in tiles meanwhile.
template <class Tiles>
KVCACHE_INLINE void add_many(const rows_and_blocks& in, index_t first, const tile_shape& shape,
                             const rounded_weights& weights, index_t from, index_t to,
                             run_ahead& ahead) noexcept {
  const index_t dim = in.g.head_dim;
  const index_t step = most_operands(shape) * key_lanes;
  for (index_t d = 0; d < dim; d += step) {
    const index_t num_operands = std::min(step, dim - d) / key_lanes;
    float* sums = in.sums + first * dim + d;
    load_products<Tiles>(shape, num_operands, sums, dim);
    for (index_t b = from; b < to; ++b) {
      const std::byte* values = in.blocks.blocks[b] + in.blocks.values_offset;
      for (index_t t = 0; t < many_tokens; t += tile_depth)
        multiply_rounded<Tiles>(shape, weights.rows(b, 0, t), weights.rows(b, tile_rows, t),
                                rounded_weights::stride_bytes, values + 2 * t * dim + 4 * d, 4 * key_lanes,
                                4 * dim, num_operands, ahead);
    }
    store_products<Tiles>(shape, num_operands, sums, dim);
  }
}

/// Rows [first, first + n), n <= 32, over all blocks.
template <class Tiles>
class row_pass {
 public:
  row_pass(const rows_and_blocks& in, index_t first, index_t n, index_t num_rows) noexcept
      : in_(in),
        first_(first),
        num_rows_(n),
        shape_(tile_shape::of(n)),
        ahead_(in.blocks, in.g, first / most_rows, ceil_div(num_rows, most_rows)) {}

  KVCACHE_TARGET void attend() noexcept {
    const tiles_in_use<Tiles> in_use(shape_);
    alignas(64) std::array<float, most_rows * many_tokens> scores;
    const index_t whole = num_rows_ - num_rows_ % side_by_side;
    for (index_t b = 0; b < in_.blocks.count; ++b) {
      score_many<Tiles>(in_.g, in_.blocks.blocks[b], in_.queries.row(first_), shape_, scores.data(), ahead_);
      for (index_t r = 0; r < whole; r += side_by_side) weigh<side_by_side>(scores.data(), b, r);
      for (index_t r = whole; r < num_rows_; ++r) weigh<1>(scores.data(), b, r);
    }
    add(in_.blocks.count);
    for (index_t r = 0; r < num_rows_; ++r)
      in_.rows[first_ + r].sum += avx512::sum_of(avx512::load(weights_.sum_of_row(r)));
  }

 private:
  static constexpr index_t side_by_side = 4;  // rows of softmax

  /// Rows [row, row + Rows) of this pass for block b.
  template <int Rows>
  KVCACHE_INLINE void weigh(const float* scores, index_t b, index_t row) noexcept {
    std::array<float, Rows> rescales;
    softmax_to_weights<Rows>(scores + row * many_tokens, in_.rows + first_ + row, rescales.data(), weights_,
                             b, row);
    for (const float& by : rescales) {
      if (by == 1.0F) [[likely]]
        continue;
      add(b);  // what was weighed before the maximum rose
      float* sums = in_.sums + (first_ + row + (&by - rescales.data())) * in_.g.head_dim;
      lanes::transform(
          in_.g.head_dim, sums, [by](auto x) { return x * by; }, sums);
    }
    ahead_.fetch();
  }

  /// Values of the blocks before `end` that are not in the sums yet.
  KVCACHE_TARGET void add(index_t end) noexcept {
    if (added_ < end) add_many<Tiles>(in_, first_, shape_, weights_.weights, added_, end, ahead_);
    added_ = end;
  }

  rows_and_blocks in_;
  index_t first_;
  index_t num_rows_;
  tile_shape shape_;
  run_ahead ahead_;
  index_t added_ = 0;  // blocks
  pass_weights weights_;
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
  const rows_and_blocks in{g, blocks, queries, rows, sums};
  for (index_t first = 0; first < num_rows; first += most_rows)
    row_pass<Tiles>(in, first, std::min(num_rows - first, most_rows), num_rows).attend();
}
