// SPDX-License-Identifier: MIT
// item_plan: one sequence of an attend call, cut into tiles of query rows and spans of tokens.
//
//   tile = (KV head, some queries): num_kv_heads * ceil(q_len / queries per tile) of them
//   span = 2048 tokens: each tile's spans are computed one by one and merged in order
#pragma once

#include <kvcache/attention/attend_span.hpp>
#include <kvcache/attention/options.hpp>
#include <kvcache/attention/softmax_state.hpp>
#include <kvcache/attention/visibility.hpp>
#include <kvcache/block/order.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/prefetch.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <type_traits>

namespace kvcache::inline v0::detail {

/// The arithmetic of one item, cut into tiles of query rows and spans of tokens.
template <cache_layer Layer>
class item_plan {
 public:
  item_plan(const attend_item<Layer>& item, const attend_options& options,
            const kernel::table& kernels) noexcept
      : item_(item),
        options_(&options),
        kernels_(&kernels),
        shape_(item.layer.shape()),
        kv_len_(item.layer.size()) {
    const index_t row_size = item.q_len * shape_.head_dim;
    num_q_heads_ = row_size == 0 ? 0 : static_cast<index_t>(item.q.size()) / row_size;
    group_size_ = num_q_heads_ / shape_.num_kv_heads;
    queries_per_tile_ = group_size_ == 0 ? 1 : std::max(rows_of_a_tile() / group_size_, index_t{1});
    check_sizes();
  }

  /// Of what attend writes.
  void check_outputs() const noexcept {
    KVCACHE_ASSERT(item_.out.size() == item_.q.size(), "attend: out must have the size of q");
    KVCACHE_ASSERT(item_.lse.empty() || static_cast<index_t>(item_.lse.size()) == item_.q_len * num_q_heads_,
                   "attend: lse must be [q_len, num_q_heads]");
  }

  [[nodiscard]] index_t num_tiles() const noexcept {
    return num_q_heads_ == 0 ? 0 : shape_.num_kv_heads * tiles_per_head();
  }
  [[nodiscard]] index_t num_spans() const noexcept { return ceil_div(kv_len_, span_tokens); }
  [[nodiscard]] index_t max_rows() const noexcept {
    return std::min(queries_per_tile_, item_.q_len) * group_size_;
  }

  /// Floats of a softmax state of one tile, and of everything a worker needs.
  [[nodiscard]] index_t state_floats() const noexcept {
    return max_rows() * round_up(shape_.head_dim, 16) + round_up(2 * max_rows(), 16);
  }
  [[nodiscard]] index_t worker_floats() const noexcept {
    return positions_floats() + max_rows() * round_up(shape_.head_dim, 16) +
           span_scratch_floats(item_.layer.codec(), geometry(), max_rows()) + 2 * state_floats();
  }

  /// A whole tile, span by span. \param scratch  [worker_floats()]
  void run_tile(index_t tile_index, float* scratch) const {
    const query_tile tile = make_tile(tile_index, scratch);
    const softmax_state all = state_in(scratch, tile.num_rows());
    const softmax_state part = state_in(scratch, tile.num_rows());
    all.reset();
    for (index_t s = 0; s < num_spans(); ++s) {
      run(tile, tile_index, s, scratch, s == 0 ? all : part);
      if (s > 0) all.merge(part);
    }
    write(tile, all);
  }

  /// Adds the weights that the rows of a tile give to each token.
  /// \param lse      [q_len, num_q_heads], as attend gave it
  /// \param weights  [kv_len]
  /// \param scratch  [worker_floats()]
  void weigh_tile(index_t tile_index, std::span<const float> lse, float* weights, float* scratch) const {
    const query_tile tile = make_tile(tile_index, scratch);
    float* row_lse = state_in(scratch, tile.num_rows()).sums.data();  // at least a float for each row
    for (index_t r = 0; r < tile.num_rows(); ++r) row_lse[r] = lse[static_cast<std::size_t>(row_of(tile, r))];
    for (index_t s = 0; s < num_spans(); ++s) {
      with_span(tile_index, s,
                [&](auto seals, const auto& codec, const span_context& context, const span_blocks& blocks,
                    token_range tokens) {
                  weigh_span<seals()>(codec, context, tile, blocks, tokens, scratch, row_lse, weights);
                });
    }
  }

  /// One span of a tile into `partial`, [state_floats()].
  void run_span(index_t tile_index, index_t span, float* scratch, float* partial) const {
    const query_tile tile = make_tile(tile_index, scratch);
    run(tile, tile_index, span, scratch, state_in(partial, tile.num_rows()));
  }

  /// Merges the partial states of a tile, [num_spans(), stride] floats, in order.
  void finish_tile(index_t tile_index, float* partials, index_t stride, float* scratch) const {
    const query_tile tile = make_tile(tile_index, scratch);
    float* first = num_spans() > 0 ? partials : scratch;
    const softmax_state all = state_in(first, tile.num_rows());
    if (num_spans() == 0) all.reset();
    for (index_t s = 1; s < num_spans(); ++s) {
      float* partial = partials + s * stride;
      all.merge(state_in(partial, tile.num_rows()));
    }
    write(tile, all);
  }

 private:
  /// Rows that are computed at a time where a group has fewer.
  [[nodiscard]] index_t rows_of_a_tile() const noexcept {
    if constexpr (requires { item_.layer.codec().attends(*kernels_, geometry(), kernel::many_rows); }) {
      if (item_.layer.codec().attends(*kernels_, geometry(), kernel::many_rows)) return kernel::many_rows;
    }
    return tile_rows;
  }

  /// The positions of a tile's queries; everything that follows stays 64-byte aligned.
  [[nodiscard]] index_t positions_floats() const noexcept { return round_up(2 * max_rows(), 16); }

  /// Tiles of one head come one after the other: what they read is nearer the second time.
  [[nodiscard]] index_t tiles_per_head() const noexcept { return ceil_div(item_.q_len, queries_per_tile_); }
  [[nodiscard]] index_t head_of(index_t tile_index) const noexcept { return tile_index / tiles_per_head(); }

  [[nodiscard]] block_geometry geometry() const noexcept { return {shape_.block_size, shape_.head_dim}; }

  /// Index of a row of a tile in [q_len, num_q_heads].
  [[nodiscard]] index_t row_of(const query_tile& tile, index_t row) const noexcept {
    return (tile.first_query + row / group_size_) * num_q_heads_ + tile.first_head + row % group_size_;
  }

  /// Position of a query: given, or that of the token it belongs to.
  [[nodiscard]] index_t position_of(index_t query) const noexcept {
    const index_t token = kv_len_ - item_.q_len + query;
    if (!item_.q_positions.empty()) return item_.q_positions[static_cast<std::size_t>(query)];
    if (!item_.k_positions.empty() && token >= 0) return item_.k_positions[static_cast<std::size_t>(token)];
    return item_.layer.positions()[token];
  }

  void check_sizes() const noexcept {
    if (item_.q_len == 0) return;
    KVCACHE_ASSERT(item_.q_len >= 0, "attend: q_len must not be negative");
    KVCACHE_ASSERT(
        static_cast<index_t>(item_.q.size()) == item_.q_len * num_q_heads_ * shape_.head_dim &&
            num_q_heads_ % shape_.num_kv_heads == 0,
        "attend: q must be [q_len, num_q_heads, head_dim], num_q_heads a multiple of num_kv_heads");
    KVCACHE_ASSERT(
        item_.q_len <= kv_len_ || !item_.q_positions.empty() || !options_->causal || !item_.mask.empty(),
        "attend: causal queries are for tokens in the cache; append before you attend");
    KVCACHE_ASSERT(item_.q_positions.empty() || static_cast<index_t>(item_.q_positions.size()) == item_.q_len,
                   "attend: q_positions must be [q_len]");
    KVCACHE_ASSERT(item_.k_positions.empty() || static_cast<index_t>(item_.k_positions.size()) == kv_len_,
                   "attend: k_positions must be [kv_len]");
    [[maybe_unused]] const auto mask_size = static_cast<index_t>(item_.mask.size());
    KVCACHE_ASSERT(mask_size == 0 || mask_size == item_.q_len * kv_len_ ||
                       (mask_size == item_.q_len * item_.q_len && item_.q_len <= kv_len_),
                   "attend: mask must be [q_len, q_len] or [q_len, kv_len]");
    KVCACHE_ASSERT(
        options_->alibi_slopes.empty() || static_cast<index_t>(options_->alibi_slopes.size()) == num_q_heads_,
        "attend: alibi_slopes must be [num_q_heads]");
  }

  /// Gathers and scales the rows of a tile; takes its memory from the front of `scratch`.
  query_tile make_tile(index_t tile_index, float*& scratch) const noexcept {
    const index_t first_query = tile_index % tiles_per_head() * queries_per_tile_;
    const index_t num_queries = std::min(queries_per_tile_, item_.q_len - first_query);
    const index_t first_head = head_of(tile_index) * group_size_;
    const index_t dim = shape_.head_dim;
    const float scale = options_->scale.value_or(1.0F / std::sqrt(static_cast<float>(dim)));
    auto* positions = reinterpret_cast<index_t*>(scratch);
    scratch += positions_floats();
    float* queries = scratch;
    scratch += max_rows() * round_up(dim, 16);
    for (index_t i = 0; i < num_queries; ++i) {
      const index_t query = first_query + i;
      positions[i] = position_of(query);
      const float* from = item_.q.data() + (query * num_q_heads_ + first_head) * dim;
      if (i + queries_ahead < num_queries) fetch_rows(from + queries_ahead * num_q_heads_ * dim);
      float* to = queries + i * group_size_ * dim;
      lanes::transform(
          group_size_ * dim, to, [scale](auto x) { return x * scale; }, from);
    }
    return {first_query, num_queries, group_size_, first_head, queries, positions};
  }

  /// Asks for the rows of a query that belong to one tile. They are some KiB, far from those of the next query.
  [[gnu::always_inline]] void fetch_rows(const float* rows) const noexcept {
    for (index_t i = 0; i < group_size_ * shape_.head_dim; i += 16) prefetch::line(rows + i);
  }
  static constexpr index_t queries_ahead = 4;

  /// A softmax state in memory from the front of `floats`.
  softmax_state state_in(float*& floats, index_t num_rows) const noexcept {
    static_assert(sizeof(kernel::softmax_row) == 2 * sizeof(float));
    auto* rows = reinterpret_cast<kernel::softmax_row*>(floats);
    float* sums = floats + round_up(2 * max_rows(), 16);
    floats += state_floats();
    return {{rows, static_cast<std::size_t>(num_rows)},
            {sums, static_cast<std::size_t>(num_rows * shape_.head_dim)}};
  }

  void run(const query_tile& tile, index_t tile_index, index_t span, float* scratch,
           const softmax_state& state) const {
    const auto attend = [&](bool at_once) {
      bool used = false;
      state.reset();
      with_span(tile_index, span,
                [&](auto seals, const auto& codec, span_context context, const span_blocks& blocks,
                    token_range tokens) {
                  context.at_once = at_once;
                  used = attend_span<seals()>(codec, context, tile, blocks, tokens, scratch, state);
                });
      return used;
    };
    if (attend(true) && !state.all_finite()) attend(false);
  }

  /// Calls body(does it seal, codec, span_context, span_blocks, token_range) for one span of the head of a tile.
  template <class Body>
  void with_span(index_t tile_index, index_t span, Body body) const {
    const token_range tokens{span * span_tokens, std::min(kv_len_, (span + 1) * span_tokens)};
    const index_t head = head_of(tile_index);
    std::array<const std::byte*, max_span_blocks + max_blocks_ahead + 1> blocks;
    const index_t first_block = tokens.first / shape_.block_size;
    const index_t num_blocks = ceil_div(tokens.last - tokens.first, shape_.block_size);
    const index_t num_entries = num_blocks + max_blocks_ahead + 1;
    for (index_t b = 0; b < num_entries; ++b) {
      const bool exists = (first_block + b) * shape_.block_size < kv_len_;
      blocks[static_cast<std::size_t>(b)] = exists ? item_.layer.block(head, first_block + b) : nullptr;
    }
    const span_context context{kernels_,
                               geometry(),
                               visibility(*options_, item_.q_len, kv_len_, item_.mask, item_.k_positions),
                               item_.layer.positions().segments(),
                               options_->alibi_slopes,
                               options_->rope};
    span_blocks in{{blocks.data(), static_cast<std::size_t>(num_entries)}};
    constexpr bool seals = requires { item_.layer.num_sealed(); }
    &&sealing_codec<std::remove_cvref_t<decltype(item_.layer.codec())>>;
    if constexpr (seals) {
      in.first_exact = item_.layer.num_sealed() * shape_.block_size;
      in.exact = {exact_element_of(item_.layer.codec())};
      in.sinks = item_.layer.sinks(head);
    }
    if constexpr (requires { item_.layer.codec(head); }) {
      body(std::bool_constant<seals>{}, item_.layer.codec(head), context, in, tokens);
    } else {
      body(std::bool_constant<seals>{}, item_.layer.codec(), context, in, tokens);
    }
  }

  void write(const query_tile& tile, const softmax_state& state) const noexcept {
    for (index_t r = 0; r < tile.num_rows(); ++r) {
      const index_t row = row_of(tile, r);
      const float lse = state.finish(static_cast<std::size_t>(r),
                                     item_.out.subspan(static_cast<std::size_t>(row * shape_.head_dim),
                                                       static_cast<std::size_t>(shape_.head_dim)));
      if (!item_.lse.empty()) item_.lse[static_cast<std::size_t>(row)] = lse;
    }
  }

  attend_item<Layer> item_;
  const attend_options* options_;
  const kernel::table* kernels_;
  cache_shape shape_;
  index_t kv_len_;
  index_t num_q_heads_ = 0;
  index_t group_size_ = 0;
  index_t queries_per_tile_ = 1;
};

}  // namespace kvcache::inline v0::detail
