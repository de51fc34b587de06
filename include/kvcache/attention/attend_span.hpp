// SPDX-License-Identifier: MIT
// The inner part of attend: some query rows that read the same KV head, over one span of its blocks.
//
//   rows = queries x query heads of the group; for each block:
//     scores[r, t] = sum_d q[r, d] k[t, d]      codec
//     soft cap, ALiBi, mask                     visibility
//     weights, running max and sum              kernel
//     sums[r, d] += sum_t weights[r, t] v[t, d] codec
//
// A row's result depends on the keys it sees, the block size and the span length; not on which other rows are
// computed beside it, nor on where the blocks lie. That is what makes prefill equal decode bit for bit. On AMX there is an
// exception: how rows are multiplied with bf16 blocks depends on how many of them there are, whether all of them see all of a
// block, and whether what comes out is finite in all of them.
#pragma once

#include <kvcache/attention/rope.hpp>
#include <kvcache/attention/softmax_state.hpp>
#include <kvcache/attention/visibility.hpp>
#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/prefetch.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <span>

namespace kvcache::inline v0::detail {

/// Tokens after which partial results are merged. Fixed, so that how a sequence is split depends on nothing else.
inline constexpr index_t span_tokens = 2048;
inline constexpr index_t max_span_blocks = span_tokens / key_lanes;

/// Memory has to be asked some time before it answers: this many blocks ahead, so that some KiB lie between; fewer for one
/// row, which reads as fast as memory delivers.
inline constexpr index_t max_blocks_ahead = 4;
constexpr index_t blocks_ahead(index_t block_bytes, index_t num_rows) noexcept {
  const index_t least_bytes = num_rows > 1 ? index_t{12 * 1024} : index_t{8 * 1024};
  return std::clamp(ceil_div(least_bytes, std::max(block_bytes, index_t{1})), index_t{1}, max_blocks_ahead);
}

/// Rows that are computed at a time where a group has fewer: several queries share a block's way into the caches, and
/// its unpacking. More rows would make short prompts compute more keys that none of them sees; kernel::many_rows are worth that
/// where tiles compute them.
inline constexpr index_t tile_rows = 64;

/// Query rows that read one KV head; row = query * group_size + head within the group.
struct query_tile {
  index_t first_query = 0;
  index_t num_queries = 0;
  index_t group_size = 0;
  index_t first_head = 0;              ///< query head of row 0
  const float* queries = nullptr;      ///< [rows, head_dim], scaled
  const index_t* positions = nullptr;  ///< [num_queries]

  [[nodiscard]] index_t num_rows() const noexcept { return num_queries * group_size; }
};

/// Everything attend_span needs to know of a sequence, but its blocks.
struct span_context {
  const kernel::table* kernels;
  block_geometry geometry;
  visibility visible;
  std::span<const position_segment> segments;
  std::span<const float> alibi_slopes;  // [num_q_heads] or empty
  const rope_table* rope;
  bool at_once = true;  // element_kernels::attend may be taken
};

/// The blocks of one span and one head.
struct span_blocks {
  std::span<const std::byte* const>
      data;                 ///< in order, and max_blocks_ahead + 1 after them, null where there is none
  index_t first_exact = 0;  ///< token from which on blocks are exact, not the codec's
  codec::exact_tokens exact = {};  ///< the encoding of these
  exact_sinks_view sinks = {};     ///< exact tokens from token 0 on, in place of those in the first block
};

/// Sums of the rows of a tile, [rows, head_dim] each: as they are, and in the codec's own coordinates.
struct span_sums {
  float* plain;
  float* turned;  ///< null where the codec has none
};

/// Working memory of one tile, in floats: turned queries, prepared queries, turned sums, scores.
template <class Codec>
index_t span_scratch_floats(const Codec& codec, const block_geometry& g, index_t num_rows) noexcept {
  const index_t dim = round_up(g.head_dim, 16);
  return num_rows * (dim + codec.prepared_floats(g) + (codec.turns_sums() ? dim : 0) + g.block_size);
}

/// Where the scores of a tile lie in its working memory.
template <class Codec>
float* scores_in(float* scratch, const Codec& codec, const block_geometry& g, index_t num_rows) noexcept {
  return scratch + num_rows * (codec.prepared_floats(g) + round_up(g.head_dim, 16));
}

/// Tokens whose keys moved equally far since they were stored, in one block of which slots [0, count) are read.
struct block_tokens {
  const std::byte* block;
  const std::byte* const* listed;  ///< where it stands in span_blocks::data
  kernel::upcoming
      next_block;  ///< the one blocks_ahead blocks later, and the one behind this one; may be null
  token_range tokens;
  index_t base;                                ///< token of slot 0
  index_t num_scores;                          ///< count, rounded up to what kernels take
  std::span<const position_segment> segments;  ///< that the tokens lie in
  bool exact;                                  ///< in the encoding of codec::exact_tokens, whatever the codec

  [[nodiscard]] index_t count() const noexcept { return tokens.last - base; }
};

/// Whether dot products are logits already for all rows: a block full of tokens that all of them see, as most are.
inline bool scores_are_logits(const span_context& c, const query_tile& tile,
                              const block_tokens& in) noexcept {
  if (c.visible.soft_cap() != 0.0F || !c.alibi_slopes.empty()) return false;
  if (in.tokens.first != in.base || in.count() != in.num_scores) return false;
  const auto sees = [&](index_t position) { return c.visible.all(position, in.segments, in.tokens); };
  return std::all_of(tile.positions, tile.positions + tile.num_queries, sees);
}

/// Dot products to logits: soft cap, ALiBi, mask.
inline void finish_scores(const span_context& c, const query_tile& tile, index_t row, const block_tokens& in,
                          float* scores) noexcept {
  const index_t query = row / tile.group_size;
  const index_t position = tile.positions[query];
  const auto head = static_cast<std::size_t>(tile.first_head + row % tile.group_size);
  const float slope = c.alibi_slopes.empty() ? 0.0F : c.alibi_slopes[head];
  if (c.visible.soft_cap() != 0.0F) c.kernels->soft_cap(scores, in.num_scores, c.visible.soft_cap());
  c.visible.add_alibi(position, in.segments, slope, in.tokens, in.base, scores);
  c.visible.hide(tile.first_query + query, position, in.segments, in.tokens, in.base, in.num_scores, scores);
}

/// The maximum of a row has grown.
inline void rescale_row(const span_sums& sums, index_t head_dim, index_t row, float by) noexcept {
  if (by == 1.0F) return;
  for (float* all : {sums.plain, sums.turned}) {
    if (all == nullptr) continue;
    float* of_row = all + row * head_dim;
    lanes::transform(
        head_dim, of_row, [by](auto x) { return x * by; }, of_row);
  }
}

/// \param queries   as the codec prepared them
/// \param finished  scores_are_logits
/// \param sums      where the codec's weighted sum goes
template <class Codec>
void attend_block(const Codec& codec, const span_context& c, const block_geometry& g, const query_tile& tile,
                  const float* queries, const block_tokens& in, bool finished, float* scores,
                  const softmax_state& state, const span_sums& all_sums, float* sums) {
  codec.scores(*c.kernels, g, in.block, in.count(), queries, tile.num_rows(), scores, in.next_block);
  std::array<float, kernel::max_softmax_rows> rescales;
  for (index_t first = 0; first < tile.num_rows(); first += kernel::max_softmax_rows) {
    const index_t num_rows = std::min(tile.num_rows() - first, kernel::max_softmax_rows);
    for (index_t r = first; !finished && r < first + num_rows; ++r)
      finish_scores(c, tile, r, in, scores + r * g.block_size);
    c.kernels->softmax(scores + first * g.block_size, g.block_size, in.num_scores, num_rows,
                       state.rows.data() + first, rescales.data());
    for (index_t r = 0; r < num_rows; ++r)
      rescale_row(all_sums, c.geometry.head_dim, first + r, rescales[static_cast<std::size_t>(r)]);
  }
  codec.accumulate(*c.kernels, g, in.block, in.count(), scores, tile.num_rows(), sums, in.next_block);
}

/// Whole blocks one behind the other that wait to be attended to at once, where the codec has an `attend`.
template <class Codec>
class waiting_blocks {
 public:
  waiting_blocks(const Codec& codec, const span_context& c, const query_tile& tile,
                 const softmax_state& state, float* sums) noexcept
      : codec_(&codec), context_(&c), state_(&state), sums_(sums), num_rows_(tile.num_rows()) {
    if constexpr (requires { &Codec::attends; })
      takes_any_ = c.at_once && codec.attends(*c.kernels, c.geometry, num_rows_);
  }
  /// \return false for what has to be attended to by itself
  bool take(const block_tokens& in, const float* queries) {
    if (!takes_any_ || in.exact || in.count() != context_->geometry.block_size) return false;
    if (count_ == kernel::max_blocks_at_once || in.listed != blocks_ + count_) attend();
    if (count_ == 0) blocks_ = in.listed;
    queries_ = queries;
    ++count_;
    return true;
  }
  /// Those that wait. To be called before queries are prepared anew, and before a block is attended to by itself.
  void attend() {
    if (count_ == 0) return;
    if constexpr (requires { &Codec::attends; })
      codec_->attend(*context_->kernels, context_->geometry, blocks_, count_, queries_, num_rows_,
                     state_->rows.data(), sums_);
    count_ = 0;
    attended_ = true;
  }
  [[nodiscard]] bool attended() const noexcept { return attended_; }

 private:
  const Codec* codec_;
  const span_context* context_;
  const softmax_state* state_;
  float* sums_;
  index_t num_rows_;
  const std::byte* const* blocks_ = nullptr;
  const float* queries_ = nullptr;
  index_t count_ = 0;
  bool takes_any_ = false;
  bool attended_ = false;
};

/// The blocks of a span that any query of the tile sees, in order: visit(codec, geometry, queries, block_tokens), where
/// codec is blocks.exact for exact blocks, and queries are turned and prepared for it. `queries_end()` before they are anew.
/// \tparam Seals   some of the blocks may be exact, not the codec's
/// \param scratch  [num_rows, round_up(head_dim, 16) + codec.prepared_floats], 64-byte aligned
template <bool Seals, class Codec, class Visit, class QueriesEnd>
void for_each_block(const Codec& codec, const span_context& c, const query_tile& tile,
                    const span_blocks& blocks, token_range span, float* scratch, Visit visit,
                    QueriesEnd queries_end) {
  const block_geometry& g = c.geometry;
  const index_t num_rows = tile.num_rows();
  const index_t num_floats = num_rows * g.head_dim;
  float* prepared = scratch;
  float* turned = prepared + num_rows * codec.prepared_floats(g);
  const auto ahead_in = [&](const auto& of) {
    return static_cast<std::size_t>(blocks_ahead(of.block_bytes(g), num_rows));
  };
  const std::size_t ahead = ahead_in(codec);
  // Elsewhere than behind the one before, as a rule in another page.
  const index_t block_bytes = codec.block_bytes(g);
  const auto lies_apart = [block_bytes](const std::byte* before, const std::byte* block) {
    return block != nullptr && block != before + block_bytes;
  };
  const auto& data = blocks.data;
  const bool apart =
      prefetch::by_levels && std::adjacent_find(data.begin(), data.end(), lies_apart) != data.end();
  const auto& segments = c.segments;
  const auto starts_later = [](index_t t, const position_segment& s) { return t < s.first_token; };
  auto s = static_cast<std::size_t>(
      std::upper_bound(segments.begin() + 1, segments.end(), span.first, starts_later) - segments.begin() -
      1);

  while (s < segments.size()) {
    // Segments whose keys moved equally far are one run: the same query serves them all.
    std::size_t end = s + 1;
    while (end < segments.size() && segments[end].rotation == segments[s].rotation) ++end;
    const index_t first = std::max(span.first, segments[s].first_token);
    const index_t last = end < segments.size() ? std::min(span.last, segments[end].first_token) : span.last;
    if (first >= span.last) return;

    // Keys that moved by `rotation` positions since they were stored: turn the query back by as much instead.
    const float* queries = tile.queries;
    if (segments[s].rotation != 0 && first < last) {
      KVCACHE_ASSERT(c.rope != nullptr, "attend: options.rope must be set where segments were shifted");
      KVCACHE_ASSERT(c.rope->config().head_dim == g.head_dim, "attend: options.rope is for another head_dim");
      std::copy_n(tile.queries, num_floats, turned);
      c.rope->turn_by(turned, num_rows, -segments[s].rotation);
      queries = turned;
    }
    const float* codec_queries = nullptr;  // prepared when the first of the codec's blocks is seen
    for (index_t t = first; t < last;) {
      const index_t index = t / g.block_size;
      const index_t base = index * g.block_size;
      token_range tokens{t, std::min(last, base + g.block_size)};
      const bool in_sinks = t < blocks.sinks.count;
      if (in_sinks) tokens.last = std::min(tokens.last, blocks.sinks.count);
      t = tokens.last;
      while (s + 1 < end && segments[s + 1].first_token <= tokens.first) ++s;
      std::size_t after = s + 1;
      while (after < end && segments[after].first_token < tokens.last) ++after;
      const auto in_block = segments.subspan(s, after - s);
      const auto sees = [&](index_t position) { return c.visible.any(position, in_block, tokens); };
      if (std::none_of(tile.positions, tile.positions + tile.num_queries, sees)) continue;
      const auto b = static_cast<std::size_t>(index - span.first / g.block_size);
      // The block behind those that are fetched: its pages, new to the processor's table, are looked up before the rest.
      if (apart && lies_apart(data[b + ahead], data[b + ahead + 1]))
        prefetch::first_pages(data[b + ahead + 1], block_bytes);
      block_tokens in{data[b],  &data[b], {data[b + ahead], data[b + 1], apart},
                      tokens,   base,     round_up(tokens.last - base, key_lanes),
                      in_block, false};
      if constexpr (Seals) {
        if (in_sinks || base >= blocks.first_exact) {
          in.exact = true;
          in.next_block.next = data[b + ahead_in(blocks.exact)];
          if (in_sinks) in.block = blocks.sinks.data;
          visit(blocks.exact, in_sinks ? blocks.sinks.geometry : g, queries, in);
          continue;
        }
      }
      if (codec_queries == nullptr) codec_queries = codec.prepare(*c.kernels, g, queries, num_rows, prepared);
      visit(codec, g, codec_queries, in);
    }
    s = end;
    queries_end();
  }
}

/// Adds tokens [span.first, span.last) to `state`. At most span_tokens of them, starting at a multiple of that.
/// \tparam Seals   as for_each_block
/// \param codec    as it is for this head
/// \param scratch  [span_scratch_floats], 64-byte aligned
/// \return whether element_kernels::attend was taken: then sums that are not finite have to be computed again without it
template <bool Seals, class Codec>
bool attend_span(const Codec& codec, const span_context& c, const query_tile& tile, const span_blocks& blocks,
                 token_range span, float* scratch, const softmax_state& state) {
  const block_geometry& g = c.geometry;
  const index_t num_floats = tile.num_rows() * g.head_dim;
  const kernel::in_use kernels(*c.kernels);
  float* scores = scores_in(scratch, codec, g, tile.num_rows());
  span_sums sums{state.sums.data(), nullptr};
  if (codec.turns_sums()) {
    sums.turned = scores + tile.num_rows() * g.block_size;
    std::fill_n(sums.turned, num_floats, 0.0F);
  }
  float* codec_sums = codec.turns_sums() ? sums.turned : sums.plain;
  waiting_blocks<Codec> waiting(codec, c, tile, state, codec_sums);
  for_each_block<Seals>(
      codec, c, tile, blocks, span, scratch,
      [&](const auto& of, const block_geometry& shape, const float* queries, const block_tokens& in) {
        const bool finished = scores_are_logits(c, tile, in);
        if (finished && waiting.take(in, queries)) return;
        waiting.attend();
        attend_block(of, c, shape, tile, queries, in, finished, scores, state, sums,
                     in.exact ? sums.plain : codec_sums);
      },
      [&] { waiting.attend(); });
  if (codec.turns_sums()) {
    codec.finish(*c.kernels, g, tile.num_rows(), sums.turned);
    lanes::transform(
        num_floats, sums.plain, [](auto a, auto b) { return a + b; }, sums.plain, sums.turned);
  }
  return waiting.attended();
}

/// Adds what the rows of a tile give to each token of a span: weights[t] += sum over rows of exp(logit - lse).
/// \param lse      [num_rows], of all that a row sees, natural logarithm
/// \param weights  weights[t] belongs to token t of the sequence
/// The rest as for attend_span.
template <bool Seals, class Codec>
void weigh_span(const Codec& codec, const span_context& c, const query_tile& tile, const span_blocks& blocks,
                token_range span, float* scratch, const float* lse, float* weights) {
  const kernel::in_use kernels(*c.kernels);
  float* scores = scores_in(scratch, codec, c.geometry, tile.num_rows());
  for_each_block<Seals>(
      codec, c, tile, blocks, span, scratch,
      [&](const auto& of, const block_geometry& g, const float* queries, const block_tokens& in) {
        of.scores(*c.kernels, g, in.block, in.count(), queries, tile.num_rows(), scores, in.next_block);
        const bool finished = scores_are_logits(c, tile, in);
        for (index_t r = 0; r < tile.num_rows(); ++r) {
          if (lse[r] == -std::numeric_limits<float>::infinity()) continue;  // sees nothing
          float* row = scores + r * g.block_size;
          if (!finished) finish_scores(c, tile, r, in, row);
          kernel::softmax_row all{lse[r], 0.0F};
          float rescale = 1;  // not 1 where the key is far more than lse says
          c.kernels->softmax(row, g.block_size, in.num_scores, 1, &all, &rescale);
          for (index_t t = in.tokens.first; t < in.tokens.last; ++t) weights[t] += row[t - in.base] / rescale;
        }
      },
      [] {});
}

}  // namespace kvcache::inline v0::detail
