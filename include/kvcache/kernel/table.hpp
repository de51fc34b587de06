// SPDX-License-Identifier: MIT
// kernel::table: the functions that do arithmetic on blocks, one table per instruction set.
//
// Kernels see raw sections of one block in the order of block/order.hpp and know nothing of containers, masks
// or positions. Rows are query heads: all that read the same KV head go through one call, so that a block is
// read once. Slots that hold no token, or a masked one, may contain anything, NaN included: they never matter.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/upcoming.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <string_view>
#include <type_traits>

namespace kvcache::inline v0::kernel {

/// Instruction sets that have a table.
enum class isa { portable, avx2, avx512, amx, neon };

/// Running softmax of one query row: weights seen so far are exp(score - max), `sum` is their sum. `max` is -infinity
/// before the first score that is not; afterwards no score is larger by more than softmax_slack.
struct softmax_row {
  float max;
  float sum;
};

/// How far scores may pass `max` before it is raised: sums seldom need rescaling, weights stay below 3000.
inline constexpr float softmax_slack = 8.0F;

/// How many rows softmax takes at a time.
inline constexpr index_t max_softmax_rows = 16;

/// How many blocks `attend` takes at once, and for how many query rows it is best called where there is one.
inline constexpr index_t max_blocks_at_once = 4;
inline constexpr index_t many_rows = 128;

/// Whole blocks that are read one after the other.
struct block_run {
  const std::byte* const*
      blocks;     ///< [2 * count]: these, and as many that come next, fetched meanwhile, which may be null
  index_t count;  ///< at most max_blocks_at_once
  index_t values_offset;  ///< where values begin in a block: bytes of its keys
};

/// Arithmetic on blocks of one stored element type.
struct element_kernels {
  /// Narrows rows into slots [first, first + count) of a keys section; other slots are untouched.
  void (*encode_keys)(const block_geometry&, std::byte* keys, index_t first, index_t count, const_rows rows);
  void (*encode_values)(const block_geometry&, std::byte* values, index_t first, index_t count,
                        const_rows rows);

  /// Widens slots [first, first + count) back to float rows. A signalling NaN of a foreign block may come out quiet.
  void (*decode_keys)(const block_geometry&, const std::byte* keys, index_t first, index_t count,
                      mutable_rows rows);
  void (*decode_values)(const block_geometry&, const std::byte* values, index_t first, index_t count,
                        mutable_rows rows);

  /// scores[r, t] = sum_d queries[r, d] * keys[t, d] for slots t in [0, round_up(count, 16)).
  /// \param queries  [num_rows, head_dim], or as `prepare` made them
  /// \param scores   [num_rows, block_size]; slots from `count` on get indeterminate values
  void (*scores)(const block_geometry&, const std::byte* keys, index_t count, const float* queries,
                 index_t num_rows, float* scores, const upcoming& next);

  /// sums[r, d] += sum_t weights[r, t] * values[t, d] over slots t in [0, count), in a fixed order.
  /// A weight of exactly zero leaves its value row out, whatever it holds.
  /// \param weights  [num_rows, block_size]; zero from slot `count` to the next multiple of 16
  /// \param sums     [num_rows, head_dim]
  void (*accumulate)(const block_geometry&, const std::byte* values, index_t count, const float* weights,
                     index_t num_rows, float* sums, const upcoming& next);

  /// Turns queries into what `scores` takes for just as many rows, once for many blocks. Null on levels where it takes them as they
  /// are.
  /// \param queries   [num_rows, head_dim]
  /// \param prepared  [num_rows, prepared_element_floats(head_dim)]; 64-byte aligned, for these kernels only
  /// \return `prepared`, or `queries` where nothing has to be done
  const float* (*prepare)(index_t head_dim, const float* queries, index_t num_rows,
                          float* prepared) = nullptr;

  /// `scores`, `table::softmax` and `accumulate` of whole blocks in one, for rows that all see all of them. Queries may be
  /// rounded to bf16, weights be a bf16 that is off by 0.0061 of itself; sums are of weights as they are then. Null on levels that
  /// have no such thing.
  /// \param prepared  as `prepare` made them for num_rows
  /// \param rows      [num_rows]; sums are rescaled where their max is raised. Where scores or sums are not finite, sums or rows
  ///                  may hold NaN or infinity that the three kernels would not give: whoever calls computes again without this
  /// \pre attends(geometry, num_rows)
  void (*attend)(const block_geometry&, const block_run&, const float* prepared, index_t num_rows,
                 softmax_row* rows, float* sums) = nullptr;
  /// Whether there is an `attend` for such blocks and so many rows; null where there is none.
  bool (*attends)(const block_geometry&, index_t num_rows) = nullptr;
};

/// Floats of one query row prepared for blocks of elements.
constexpr index_t prepared_element_floats(index_t head_dim) { return round_up(head_dim, 32); }

/// Floats of one prepared query row.
constexpr index_t prepared_query_floats(index_t head_dim) { return 16 + round_up(head_dim, 16); }

/// Arithmetic on blocks of bytes with one scale per token: a number is scale[token] * int8. Byte order as in
/// block/order.hpp. What queries and weights are taken as is said in `table`.
struct int8_kernels {
  /// The largest magnitude of a row, [count]; NaN if it holds NaN or infinity.
  float (*largest)(const float* row, index_t count);

  /// A row as bytes, where it lies in blocks: row[i] / scale, rounded to nearest even; zeros for scale 0. The same bits on every
  /// level. \pre |row[i] / scale| < 127.5
  /// \param scale  a bfloat16, or 5 / 127
  /// \param words  of the token, a line apart; zeros behind the row up to the end of the last
  /// \param slot   which byte of the quads is the token's; the others stay
  void (*put_key)(const float* row, index_t count, float scale, std::int8_t* words);
  void (*put_value)(const float* row, index_t count, float scale, index_t slot, std::int8_t* quads);

  /// Turns queries into what `scores` takes, once for many blocks.
  /// \param queries   [num_rows, head_dim]
  /// \param prepared  [num_rows, prepared_query_floats(head_dim)]; 64-byte aligned, for these kernels only
  void (*prepare)(index_t head_dim, const float* queries, index_t num_rows, float* prepared);

  /// As in element_kernels, of prepared queries. A query that is not finite has scores that are NaN or infinite.
  /// \param scales   [block_size], not negative where there is a token, as the weights are not
  void (*scores)(const block_geometry&, const std::byte* keys, const bfloat16* scales, index_t count,
                 const float* prepared, index_t num_rows, float* scores, const upcoming& next);
  void (*accumulate)(const block_geometry&, const std::byte* values, const bfloat16* scales, index_t count,
                     const float* weights, index_t num_rows, float* sums, const upcoming& next);

  /// `prepare` of what channel_kernels.fold makes of queries; their scores get its dots added. Null on levels where both
  /// one after the other are no slower.
  void (*prepare_folded)(index_t head_dim, const float* queries, index_t num_rows, const bfloat16* scales,
                         const bfloat16* offsets, float* prepared) = nullptr;
};

/// A scalar quantiser for numbers with a symmetric distribution.
struct scalar_codebook {
  int bits;                     ///< 2, 3 or 4: there are 2^bits levels
  std::int8_t levels[16] = {};  ///< ascending, none zero, levels[2^bits - 1 - i] == -levels[i]
  /// Between neighbouring positive levels, in units of the row's rms; ascending, then infinite.
  float thresholds[16];

  constexpr scalar_codebook(int num_bits, std::initializer_list<std::int8_t> all_levels,
                            std::initializer_list<float> between) noexcept
      : bits(num_bits) {
    std::copy(all_levels.begin(), all_levels.end(), levels);
    std::fill(std::copy(between.begin(), between.end(), thresholds), std::end(thresholds),
              std::numeric_limits<float>::infinity());
  }
};

/// Codes of 1 to 4 bits that are packed as in block/packed.hpp, and the 16 bytes that they index, or the 256 that their
/// states do.
struct packed_section {
  int bits;
  const std::byte* codes;
  const std::int8_t* codebook;
};

/// Arithmetic on numbers of less than 8 bits. Every level gives the same bits.
struct low_bit_kernels {
  /// Codes to bytes: out[64 * line + i] = codebook[code at line, i], for `num_lines` lines of 64 bytes that are packed as
  /// in block/packed.hpp.
  /// \param bits        1 to 4
  /// \param packed      the section, from its line 0 on
  /// \param first_line  where to start, a multiple of packed_order<bits>::lines_per_unit
  /// \param codebook    [16], of which 2^bits are used
  /// \param out         [num_lines, 64], from `first_line` on
  /// \param next        what will be unpacked after this section, the same part of it is fetched meanwhile; may be null
  void (*unpack)(int bits, const std::byte* packed, index_t first_line, index_t num_lines,
                 const std::int8_t* codebook, std::int8_t* out, const std::byte* next);

  /// Walsh-Hadamard transform in natural order, in place, not normalised: twice is `size` times the row.
  /// log2(size) rounds of y[2i] = x[i] + x[i + size/2], y[2i+1] = x[i] - x[i + size/2], nothing else.
  /// \param row  [size]; `size` is a power of two from 1 to 512
  void (*hadamard)(float* row, index_t size);

  /// Each number's nearest level after scaling, and the scale with the least squared error: row[i] ~ scale * level.
  /// The row enters with ten bits: whole numbers, the largest in [256, 512]. All sums are exact.
  /// \param row    [count], finite; `count` from 1 to 512
  /// \param codes  [count], indices of levels
  /// \return the scale, finite and not negative; zero for a row of zeros, with codes of the smallest positive level
  float (*nearest)(const float* row, index_t count, const scalar_codebook& book, std::uint8_t* codes);

  /// `coarse.scores` and `coarse.accumulate` of a packed section without unpacking it first; null on levels where that is
  /// no faster. \return false, with nothing done, where unpacking first is better: many rows, odd head_dims
  bool (*scores)(const packed_section&, const block_geometry&, const bfloat16* scales, index_t count,
                 const float* prepared, index_t num_rows, float* scores, const upcoming& next) = nullptr;
  bool (*accumulate)(const packed_section&, const block_geometry&, const bfloat16* scales, index_t count,
                     const float* weights, index_t num_rows, float* sums, const upcoming& next) = nullptr;
};

/// Rows times factors of their dims. A number of a block with scales and offsets of channels (dims) is
/// offset[dim] + scale[dim] * whatever is stored.
struct channel_kernels {
  /// out[d] = row[d] * factors[d] * factor; `out` may be `row`.
  void (*multiply)(const float* row, const float* factors, float factor, index_t count, float* out);

  /// scores[t] += constant.
  void (*shift)(float* scores, index_t count, float constant);

  /// sums[i] += part[i]; they do not overlap.
  void (*add_to)(const float* part, index_t count, float* sums);

  /// folded[r, d] = queries[r, d] * scales[d]; dots[r] = sum_d queries[r, d] * offsets[d].
  void (*fold)(const float* queries, index_t num_rows, index_t head_dim, const bfloat16* scales,
               const bfloat16* offsets, float* folded, float* dots);

  /// sums[d] += part[d] * scales[d] + offset_weight * offsets[d].
  void (*unfold)(const float* part, index_t head_dim, const bfloat16* scales, const bfloat16* offsets,
                 float offset_weight, float* sums);

  /// Products of queries with a row that turns, as sums over what turns (codec/rope_turns.hpp). With a = [0, pairs) and
  /// b = [pairs, 2 pairs) of a row: out[r, a] = q[a] means[a] + q[b] means[b], out[r, b] = q[b] means[a] - q[a] means[b].
  /// \param queries  [num_rows, stride], the first 2 * num_pairs of each
  /// \param out      [num_rows, 2 * num_pairs]
  void (*couple)(const float* queries, index_t num_rows, index_t stride, index_t num_pairs,
                 const bfloat16* means, float* out);

  /// means[d] = sum_t rows[t, d] / num_rows, in the order of t. \param rows  [num_rows, count], finite; 0 < num_rows <= 256
  void (*means)(const_rows rows, index_t num_rows, index_t count, float* means);

  /// The least and the largest number of each channel. \param rows  [num_rows, count], finite; num_rows > 0
  void (*ranges)(const_rows rows, index_t num_rows, index_t count, float* least, float* largest);

  /// Of x[t, d] = (rows[t, d] - means[d]) * factor, for rows of `count`: squares[d] = sum_t weights[t] * x^2, in the order of t;
  /// sums[t] = sum_d x^2 * weights[d], every 16th dim in order, and these 16 sums.
  void (*squares_of_channels)(const_rows rows, index_t num_rows, index_t count, const float* means,
                              float factor, const float* weights, float* squares);
  void (*squares_of_tokens)(const_rows rows, index_t num_rows, index_t count, const float* means,
                            float factor, const float* weights, float* sums);

  /// codes[d] = below + (row[d] - middles[d]) * inverse_steps[d], rounded to nearest even and within [0, 2 * below).
  /// \param below  even, at most 128
  void (*to_codes)(const float* row, const float* middles, const float* inverse_steps, int below,
                   index_t count, std::uint8_t* codes);
};

/// What a row's root mean square is in numbers of a trellis table.
inline constexpr int trellis_unit = 36;
inline constexpr index_t trellis_states = 256;

/// Arithmetic of the codec trellis<b>, see portable_trellis.hpp. Bits are 2 to 6, tables have 256 entries from -127 to
/// 127, for all but `encode` with table[s + 128] = -table[s]. The same on every instruction set, bit by bit.
struct trellis_kernels {
  /// The codes, [count], nearest to a row in its own units, and the scale of least squares: row[i] ~ scale *
  /// table[state[i]]. A row of zeros gets zeros. The scale of a row of a few numbers may be negative.
  /// \param unit  0: the row's root mean square is trellis_unit; else the number that is, and codes are those nearest to the
  ///              row in these units, of zeros too
  /// \pre 1 <= count <= 512, the row is finite; unit is 0, or |row[i]| <= 127 / trellis_unit * unit
  float (*encode)(int bits, const float* row, index_t count, const std::int8_t* table, float unit,
                  std::uint8_t* codes);

  /// Turns codes into the table's numbers, both in the block order of bytes: `num_groups` groups of 16 keys. What stands
  /// in the padding of the last dims is indeterminate.
  /// \param out         a group is `out_stride` bytes behind the one before; may be `codes` where that is their stride too
  /// \pre every byte of `codes` is below 2^bits, that of slots without a token too
  void (*decode_keys)(int bits, index_t head_dim, index_t num_groups, const std::uint8_t* codes,
                      const std::int8_t* table, std::int8_t* out, index_t out_stride);

  /// The same for `num_packs` packs of 4 values. Up to 63 bytes behind the last code are read.
  void (*decode_values)(int bits, index_t head_dim, index_t num_packs, const std::uint8_t* codes,
                        const std::int8_t* table, std::int8_t* out, index_t out_stride);

  /// decode_keys and decode_values of a packed section, whose codebook is the table, without unpacking it to codes first;
  /// codes of 3, 5 and 6 bits are packed as their low 2, 4 and 4, and the others behind them. Null on levels where that is no
  /// faster.
  /// \param token  the first, a multiple of 64; of `num_tokens`
  /// \param next   another section like this one, the same part of it is fetched meanwhile; may be null
  /// \return false, with nothing done, where unpacking first is better: values that are no whole lines
  bool (*unpack_keys)(const packed_section&, const block_geometry&, index_t token, index_t num_tokens,
                      std::int8_t* out, index_t out_stride, const std::byte* next) = nullptr;
  bool (*unpack_values)(const packed_section&, const block_geometry&, index_t token, index_t num_tokens,
                        std::int8_t* out, index_t out_stride, const std::byte* next) = nullptr;

  /// As in low_bit_kernels, of packed codes of 2, 3 or 4 bits whose codebook is a table of 256 entries.
  bool (*scores)(const packed_section&, const block_geometry&, const bfloat16* scales, index_t count,
                 const float* prepared, index_t num_rows, float* scores, const std::byte* next) = nullptr;
  bool (*accumulate)(const packed_section&, const block_geometry&, const bfloat16* scales, index_t count,
                     const float* weights, index_t num_rows, float* sums, const std::byte* next) = nullptr;
};

struct table {
  isa level;
  element_kernels f32;
  element_kernels f16;
  element_kernels bf16;

  /// Where bytes are multiplied as integers, queries are taken as 15 bits, weights as 16 bits relative to the largest of
  /// a row, and the results are the same bit by bit: avx512, amx, and neon on a processor with dot products. Elsewhere
  /// both are floats.
  int8_kernels int8;

  /// The same with half the multiplications: queries of 8 bits, off by at most 1/254 of the row's largest number, weights
  /// (times their tokens' scales) of 8 bits, off by at most 1/510 of the largest of 64 tokens. Elsewhere as int8.
  ///
  /// So a score is off by sqrt(head_dim) / 254 * |q| * |k| at most (Cauchy-Schwarz; int8: 32512, not 254), and 64 weights
  /// together by 63 / (510 + 63) = 0.11 of their sum: the largest not at all, the others by no more than themselves (int8:
  /// 130560, not 510). attend states both; tests reach 0.57 and 0.89 of its bounds with rows made for it.
  int8_kernels coarse;

  low_bit_kernels low_bit;

  channel_kernels channel;

  trellis_kernels trellis;

  /// One step of the online softmax over rows of scores; -infinity marks a masked slot.
  /// Replaces each score by exp(score - max of its row) (relative error below 2e-7; under 1e-38 becomes zero).
  /// \param scores    the first `count` of each row, [num_rows, stride]; `count` is a multiple of 16
  /// \param rows      [num_rows], at most max_softmax_rows
  /// \param rescales  [num_rows]: what the sums gathered so far must be multiplied by; 1 before the first score, where they are zero
  /// Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
  void (*softmax)(float* scores, index_t stride, index_t count, index_t num_rows, softmax_row* rows,
                  float* rescales);

  /// scores[t] = cap * tanh(scores[t] / cap), relative error below 5e-7; NaN stays NaN.
  /// \param scores  [count]; `count` is a multiple of 16
  void (*soft_cap)(float* scores, index_t count, float cap);

  /// What kernels have to set up, and may keep for each other between these two calls on one thread, or null. Without them
  /// every kernel does it by itself. In between, nobody else may use the tiles of AMX on this thread.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
};

/// Kernels of a table are called while it lives.
class in_use {
 public:
  explicit in_use(const table& kernels) noexcept : leave_(kernels.leave) {
    if (kernels.enter != nullptr) kernels.enter();
  }
  in_use(const in_use&) = delete;
  in_use& operator=(const in_use&) = delete;
  ~in_use() {
    if (leave_ != nullptr) leave_();
  }

 private:
  void (*leave_)();
};

/// The kernels of a table for one element type: float, half or bfloat16.
template <class Element>
constexpr const element_kernels& for_element(const table& t) noexcept {
  if constexpr (std::is_same_v<Element, float>) {
    return t.f32;
  } else if constexpr (std::is_same_v<Element, half>) {
    return t.f16;
  } else {
    static_assert(std::is_same_v<Element, bfloat16>, "an element is float, half or bfloat16");
    return t.bf16;
  }
}

namespace detail {

/// A table that was compiled, and whether this processor can run it.
struct entry {
  const table* kernels;
  bool (*runs_here)();
};

inline constexpr std::size_t max_tables = 8;

}  // namespace detail

}  // namespace kvcache::inline v0::kernel
