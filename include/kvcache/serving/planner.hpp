// SPDX-License-Identifier: MIT
// plan: which codec, block size and budget hold so many sequences of such a length in so much memory, what that costs in
// quality, and how long the sequences may become.
//
//   memory | weights | reserve | tails of all sequences |  pages of the pool: budget_bytes   | less than a page |
//
// All sizes are exact and those of a page_pool and its sequences (serving/cache_sizes.hpp): what sequences share, a
// system prompt say, is counted for each of them, so a plan never promises too much.
#pragma once

#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/serving/cache_sizes.hpp>
#include <kvcache/serving/codec_figures.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvcache::inline v0::serving {

/// What a plan has to know of a model.
struct model_shape {
  index_t num_layers = 1;
  index_t num_q_heads = 1;  ///< a multiple of num_kv_heads
  index_t num_kv_heads = 1;
  index_t head_dim = 64;     ///< 1 to 512
  index_t weight_bytes = 0;  ///< of the same memory; 0 where the memory is for the cache alone
  index_t max_context = 0;   ///< tokens that the model was made for; 0: no limit
};

/// A machine's memory, and the part that a plan leaves to the system, activations and the program: a guess that errs on
/// the side of leaving too much; measure your program and put your own figure into plan_options.
struct machine_preset {
  std::string_view name;
  index_t memory_bytes = 0;
  index_t reserve_bytes = 0;
};

/// Memory as it is sold: 1 GB is 2^30 bytes.
inline constexpr std::array machine_presets = {
    machine_preset{"8GB", 8_GiB, 2_GiB}, machine_preset{"16GB", 16_GiB, 3_GiB},
    machine_preset{"24GB", 24_GiB, 4_GiB}, machine_preset{"64GB", 64_GiB, 8_GiB}};

/// The preset of that name ("16GB"), or null.
inline const machine_preset* find_preset(std::string_view name) noexcept {
  const auto* found = std::find_if(machine_presets.begin(), machine_presets.end(),
                                   [name](const machine_preset& p) { return p.name == name; });
  return found == machine_presets.end() ? nullptr : found;
}

struct plan_options {
  index_t reserve_bytes = 0;  ///< of the memory, for all that is neither weights nor cache
  std::vector<codec_choice> codecs = default_choices();
  /// Of those that fit the one that takes least is taken, the first of those that take the same.
  std::vector<index_t> block_sizes = {64, 128};
  /// Sequences that are in an open step (`begin`) of more than block_size tokens at a time: behind a tail each keeps a copy.
  index_t long_steps = 0;
  /// Most divergence that is recommended, in multiples of that of int8 behind a bf16 tail; see quality_figures. The default
  /// leaves out 2 bits but for trellis, as values or centred.
  double worst_kl_ratio = 10;
  /// Whether trellis is recommended, which loses less and takes 11 to 23 times as long to encode (docs/codecs.md).
  bool slow_encoding = false;
  /// Whether the cache will be told how the model rotates keys, as a rope_config beside the spec or by rope= in it: without,
  /// codecs named centred_ lose more than what was measured, and are not recommended. Goes with default_choices(true).
  bool knows_rope = false;
};

/// One codec, with the block size that suits it best.
struct plan_row {
  codec_choice codec;
  std::string spec;   ///< for make_cache: "paged/int8,sinks=4,tail=128,exact=f16"
  cache_shape shape;  ///< for page_pool or make_cache, block size included
  index_t page_bytes = 0;
  index_t bytes_per_token = 0;  ///< of full pages, rounded up, in all layers and heads
  double bits_per_number = 0;   ///< scales and padding included
  index_t tail_bytes = 0;       ///< of each sequence, outside the pool
  index_t needed_bytes = 0;     ///< pages and tails of all sequences at the context asked for
  /// For pool_options::budget_bytes: whole pages, all that the memory has room for beside the tails.
  /// 0 where not even one page fits: such a pool cannot be made (and 0 would mean no limit there).
  index_t budget_bytes = 0;
  index_t max_context =
      0;  ///< most tokens of every sequence at once, within the memory and the model's own limit
  index_t memory_context = 0;   ///< the same whatever the model's limit
  bool fits = false;            ///< the sequences that were asked for, at the context that was asked for
  bool is_good_enough = false;  ///< worst_kl_ratio, slow_encoding and knows_rope admit it
  const quality_figures* quality = nullptr;  ///< null where it was not measured
  const speed_figures* speed = nullptr;      ///< null where it was not measured
};

struct cache_plan {
  index_t cache_bytes = 0;     ///< of the memory, what is left for pages and tails
  std::vector<plan_row> rows;  ///< one for each codec, in the order of plan_options::codecs
  /// The row that fits and loses least, of those that are good enough; of equals the smaller.
  /// Nothing where there is none.
  std::optional<std::size_t> recommended;
};

namespace detail {

struct plan_request {
  index_t cache_bytes;
  index_t num_sequences;
  index_t context;
  index_t max_context;  // of the model, 0: no limit
  index_t long_steps;
};

/// Pages that the memory has room for beside `num_sequences` tails.
inline index_t pages_beside_tails(const cache_sizes& sizes, const plan_request& request) {
  const index_t outside = checked_add(checked_mul(request.num_sequences, sizes.tail_bytes()),
                                      checked_mul(request.long_steps, sizes.long_step_bytes()));
  if (outside > request.cache_bytes) return -1;
  return std::min((request.cache_bytes - outside) / sizes.page_bytes(), cache_sizes::most_pages);
}

inline plan_row make_row(const model_shape& model, const codec_choice& codec, index_t block_size,
                         const plan_request& request) {
  plan_row row;
  row.codec = codec;
  row.spec = "paged/" + codec.spec();
  row.shape = {model.num_layers, model.num_kv_heads, model.head_dim, block_size};
  const cache_sizes sizes(row.shape, codec);
  row.page_bytes = sizes.page_bytes();
  row.bytes_per_token = ceil_div(row.page_bytes, block_size);
  row.bits_per_number = sizes.bits_per_number();
  row.tail_bytes = sizes.tail_bytes();
  row.needed_bytes = checked_add(checked_mul(request.num_sequences, sizes.sequence_bytes(request.context)),
                                 checked_mul(request.long_steps, sizes.long_step_bytes()));
  row.quality = find_quality(codec);
  row.speed = find_speed(codec);

  const index_t pages = pages_beside_tails(sizes, request);
  if (pages < 1) return row;  // a pool has one page at least
  row.budget_bytes = pages * row.page_bytes;
  row.memory_context = sizes.tokens(pages / request.num_sequences);
  row.max_context =
      request.max_context == 0 ? row.memory_context : std::min(row.memory_context, request.max_context);
  row.fits = row.memory_context >= request.context;
  return row;
}

/// Whether a row would be recommended if it fits and no other does.
inline bool is_good_enough(const plan_row& row, const plan_options& options) noexcept {
  const auto is_any = [&row](std::string_view name) {
    return row.codec.keys.find(name) != std::string::npos || row.codec.values.find(name) != std::string::npos;
  };
  if (!options.knows_rope && is_any("centred_")) return false;
  const bool is_slow = is_any("trellis");
  return row.quality != nullptr && row.quality->kl_ratio() <= options.worst_kl_ratio &&
         (options.slow_encoding || !is_slow);
}

/// \return whether `a` should be recommended rather than `b`
inline bool is_better(const plan_row& a, const plan_row& b) noexcept {
  const double loss_a = a.quality->kl_ratio();
  const double loss_b = b.quality->kl_ratio();
  return loss_a != loss_b ? loss_a < loss_b : a.needed_bytes < b.needed_bytes;
}

/// Throws shape_error naming what cannot be.
inline void plan_require(bool holds, const char* rule) {
  if (!holds) throw shape_error(std::string("kvcache: plan: ") + rule);
}

inline void validate(const model_shape& model, index_t memory_bytes, index_t num_sequences, index_t context,
                     const plan_options& options) {
  kvcache::validate(cache_shape{model.num_layers, model.num_kv_heads, model.head_dim});
  plan_require(model.num_q_heads >= 1 && model.num_q_heads % model.num_kv_heads == 0,
               "num_q_heads must be a multiple of num_kv_heads");
  plan_require(model.weight_bytes >= 0, "weight_bytes must not be negative");
  plan_require(model.max_context >= 0, "max_context must not be negative");
  plan_require(memory_bytes >= 0, "memory_bytes must not be negative");
  plan_require(num_sequences >= 1, "there must be a sequence");
  plan_require(context >= 1, "context must be at least 1");
  plan_require(model.max_context == 0 || context <= model.max_context, "context must be at most max_context");
  plan_require(options.reserve_bytes >= 0, "reserve_bytes must not be negative");
  plan_require(options.long_steps >= 0 && options.long_steps <= num_sequences,
               "long_steps must be 0 to the number of sequences");
  plan_require(!options.block_sizes.empty(), "there must be a block size");
}

}  // namespace detail

/// What of `memory_bytes` weights and reserve leave for the cache; 0 where they take it all. \pre none is negative
inline index_t cache_memory(index_t memory_bytes, index_t weight_bytes, index_t reserve_bytes) {
  return std::max(memory_bytes - std::min(checked_add(weight_bytes, reserve_bytes), memory_bytes),
                  index_t{0});
}

/// Weighs every codec of `options` with the block size that takes least memory for `num_sequences` of `context` tokens.
///
/// \param memory_bytes  what weights, reserve and cache take together; with weight_bytes and reserve_bytes 0, what the
///                      cache alone may take
/// \return rows that fit and rows that do not; allocates for the rows only
/// Throws shape_error naming what cannot be (negative numbers, a context above the model's, sizes that overflow),
/// std::invalid_argument for a codec that there is not. Complexity: O(codecs * block sizes).
inline cache_plan plan(const model_shape& model, index_t memory_bytes, index_t num_sequences, index_t context,
                       const plan_options& options = {}) {
  detail::validate(model, memory_bytes, num_sequences, context, options);
  cache_plan result;
  result.cache_bytes = cache_memory(memory_bytes, model.weight_bytes, options.reserve_bytes);
  const detail::plan_request request{result.cache_bytes, num_sequences, context, model.max_context,
                                     options.long_steps};
  for (const codec_choice& codec : options.codecs) {
    std::optional<plan_row> best;
    for (const index_t block_size : options.block_sizes) {
      plan_row row = detail::make_row(model, codec, block_size, request);
      const bool is_smaller = best && row.needed_bytes < best->needed_bytes;
      if (!best || (row.fits != best->fits ? row.fits : is_smaller)) best = std::move(row);
    }
    best->is_good_enough = detail::is_good_enough(*best, options);
    result.rows.push_back(*std::move(best));
  }
  for (std::size_t i = 0; i < result.rows.size(); ++i) {
    const plan_row& row = result.rows[i];
    if (!row.fits || !row.is_good_enough) continue;
    if (!result.recommended || detail::is_better(row, result.rows[*result.recommended]))
      result.recommended = i;
  }
  return result;
}

}  // namespace kvcache::inline v0::serving
