// SPDX-License-Identifier: MIT
// attend: softmax(q k^T) v over a cache, for the newest tokens of one sequence or of a batch.
//
// Decode is q_len == 1, prefill q_len > 1: a size, not a mode. All query heads of a group are served from one
// read of each block. Work is cut into tiles (sequence, KV head, some queries) and, where that leaves workers
// idle, into spans of 2048 tokens, whose results merge in order. Results are bit-identical across containers,
// page placement, executors and numbers of workers, for one instruction set and block size.
#pragma once

#include <kvcache/attention/item_plan.hpp>
#include <kvcache/attention/options.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/executor.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>

namespace kvcache::inline v0 {

namespace detail {

/// 224 KiB on the stack of the thread that runs a task (kernels and codecs take up to 160 KiB more), enough for 64 rows of exact
/// codecs of 128 dims in blocks of 64 tokens; larger shapes, and the 128 rows that AMX takes of prompts, have theirs in the workspace.
inline constexpr index_t stack_floats = 896 * tile_rows;

/// The tasks of one call: all tiles of all items, or all their spans.
/// \tparam Items  size() and operator[], which may make an item anew each time
template <cache_layer Layer, class Items = std::span<const attend_item<Layer>>>
class batch_plan {
 public:
  batch_plan(Items batch, const attend_options& options)
      : batch_(batch),
        options_(&options),
        kernels_(options.kernel != nullptr ? options.kernel : &kernel::best()) {
    for (index_t i = 0; i < num_items(); ++i) {
      const auto plan = plan_of(i);
      plan.check_outputs();
      num_tiles_ += plan.num_tiles();
      num_parts_ += plan.num_tiles() * plan.num_spans();
      longest_tile_ = std::max(longest_tile_, plan.num_spans());
      part_floats_ = std::max(part_floats_, plan.state_floats());
      worker_floats_ = std::max(worker_floats_, plan.worker_floats());
    }
  }

  template <class Executor>
  void run(Executor& executor) {
    // Spans become tasks of their own where tiles alone would leave workers idle: few tiles, or one sequence so long
    // that its tiles outlast everybody else's. The arithmetic is the same.
    const index_t num_workers = executor.num_workers();
    const bool uneven = num_tiles_ < 4 * num_workers || longest_tile_ * 4 * num_workers > num_parts_;
    const bool split = num_workers > 1 && uneven && num_parts_ > num_tiles_;
    const index_t parts_floats = split ? num_parts_ * part_floats_ : 0;
    const index_t scratch_floats = worker_floats_ > stack_floats ? num_workers * worker_floats_ : 0;

    const index_t offsets_floats =
        num_items() <= few_items ? 0
                                 : round_up(2 * num_items() * index_t{sizeof(index_t) / sizeof(float)}, 16);

    attend_workspace local;
    attend_workspace& workspace = options_->workspace != nullptr ? *options_->workspace : local;
    if (offsets_floats + parts_floats + scratch_floats > 0) {
      float* memory = workspace.floats(offsets_floats + parts_floats + scratch_floats);
      if (offsets_floats > 0) first_tiles_ = reinterpret_cast<index_t*>(memory);
      parts_ = memory + offsets_floats;
      scratches_ = parts_ + parts_floats;
    }
    first_parts_ = first_tiles_ + num_items();
    count_items();
    if (split) {
      executor.run(num_parts_, [this](index_t task, index_t worker) { run_part(task, worker); });
      executor.run(num_tiles_, [this](index_t task, index_t worker) { run_tile(task, worker, true); });
    } else {
      executor.run(num_tiles_, [this](index_t task, index_t worker) { run_tile(task, worker, false); });
    }
  }

 private:
  [[nodiscard]] item_plan<Layer> plan_of(index_t item) const noexcept {
    return item_plan<Layer>(batch_[static_cast<std::size_t>(item)], *options_, *kernels_);
  }

  [[nodiscard]] index_t num_items() const noexcept { return static_cast<index_t>(batch_.size()); }

  /// Fills first_tiles_ and first_parts_.
  void count_items() noexcept {
    index_t tiles = 0;
    index_t parts = 0;
    for (index_t i = 0; i < num_items(); ++i) {
      first_tiles_[i] = tiles;
      first_parts_[i] = parts;
      const auto plan = plan_of(i);
      tiles += plan.num_tiles();
      parts += plan.num_tiles() * plan.num_spans();
    }
  }

  /// The last item whose first task is not after `task`: items without tasks share their first with the next one.
  [[nodiscard]] index_t item_of(index_t task, const index_t* first_tasks) const noexcept {
    return std::upper_bound(first_tasks, first_tasks + num_items(), task) - first_tasks - 1;
  }

  /// One span of one tile, into its place among the parts.
  void run_part(index_t task, index_t worker) const {
    const index_t item = item_of(task, first_parts_);
    const index_t part = task - first_parts_[item];
    const auto plan = plan_of(item);
    with_scratch(worker, [&](float* scratch) {
      plan.run_span(part / plan.num_spans(), part % plan.num_spans(), scratch, parts_ + task * part_floats_);
    });
  }

  /// A tile from beginning to end, or from the parts that run_part left.
  void run_tile(index_t task, index_t worker, bool from_parts) const {
    const index_t item = item_of(task, first_tiles_);
    const index_t tile = task - first_tiles_[item];
    const auto plan = plan_of(item);
    with_scratch(worker, [&](float* scratch) {
      if (!from_parts) return plan.run_tile(tile, scratch);
      float* parts = parts_ + (first_parts_[item] + tile * plan.num_spans()) * part_floats_;
      plan.finish_tile(tile, parts, part_floats_, scratch);
    });
  }

  template <class Body>
  void with_scratch(index_t worker, Body body) const {
    if (worker_floats_ > stack_floats) return body(scratches_ + worker * worker_floats_);
    alignas(64) std::array<std::byte, stack_floats * sizeof(float)> stack;
    body(reinterpret_cast<float*>(stack.data()));
  }

  Items batch_;
  const attend_options* options_;
  const kernel::table* kernels_;
  index_t num_tiles_ = 0;
  index_t num_parts_ = 0;     // tiles times spans
  index_t longest_tile_ = 0;  // spans
  index_t part_floats_ = 0;
  index_t worker_floats_ = 0;
  static constexpr index_t few_items = 32;  // whose offsets lie here
  std::array<index_t, 2 * few_items> few_offsets_;
  index_t* first_tiles_ = few_offsets_.data();  // [num_items], of all tasks
  index_t* first_parts_ = nullptr;
  float* parts_ = nullptr;      // [num_parts, part_floats]
  float* scratches_ = nullptr;  // [num_workers, worker_floats]
};

inline void check_batch_options([[maybe_unused]] const attend_options& options) noexcept {
  KVCACHE_ASSERT(options.q_len == 1 && options.mask.empty() && options.q_positions.empty() &&
                     options.k_positions.empty() && options.lse.empty(),
                 "attend: in a batch, what is marked [item] in attend_options comes from the items");
}

}  // namespace detail

/// Attention of a batch of sequences, of different lengths if need be, in one call.
///
/// \param batch     see attend_item; outputs may not alias anything else
/// \param options   what holds for all of them
/// \param executor  runs the tasks; see core/executor.hpp
/// Rows that see no key get a zero output and lse = -infinity.
/// Numerics: float accumulation. Against exact arithmetic on the stored numbers, those that copy_out gives, outputs over blocks
/// of f32, f16 or bf16 are off by less than 1e-6 * (4 + N) * max|v|, N = scale * max|q| * max|k|, with Euclidean norms, up to
/// head_dim 512 and kv_len 65536. On AMX, with bf16 blocks and more than 8 rows at a time (queries x query heads of a KV head, up to
/// 128), eight times that: queries and weights enter as two bf16 each. With more than 16, both enter as one in blocks of 64 tokens
/// that all rows see all of: outputs are off by (2^-6 + N / 250) * max|v| more, lse by 2^-7 + N / 250, and numbers below
/// 1.2e-38 count as zero. For float operands there, set options.kernel to &kernel::select(kernel::isa::avx512).
/// Blocks of fewer bits add what is lost where they are multiplied as integers (kernel/table.hpp), at most
///   int8                                 N * sqrt(head_dim) / 32000 * max|v| + 5e-4 * max|v|
///   rotated, trellis, channel, balanced  N * sqrt(head_dim) / 250 * max|v| + 0.11 * V
/// The first term is what queries lose in each score, and lse with it; of outputs it takes 2 * max|v| at most. Its N is of rows
/// as they are multiplied: keys less their means, if those are given; for channel and balanced q times a block's channel
/// scales, and k less its offsets, divided by them. The second is what weights lose: V is the norm that the largest codes of a
/// block's values (less offsets) have with the largest of their scales; for normally distributed rows in 2 bits some 1.2 *
/// max|v| with 80 dims, 1.8 * max|v| with 16. These are worst cases, and hold where the largest numbers of scaled queries and
/// of values are 1e-16 or more. None is stated for centred, klt and low_rank, whose scores are sums of several products.
/// Complexity: O(sum of q_len * num_q_heads * kv_len * head_dim); blocks nobody sees are skipped.
/// Allocates only where a tile's rows (64, on AMX with bf16 blocks 128, or one query's) exceed 224 KiB of working memory, workers
/// share one tile's spans (then head_dim + 2 floats per query head and 2048 tokens of the batch) or a batch has more than 32
/// items, and then from options.workspace if given. An executor may allocate tasks of its own, as Eigen's pool does. Threads: reads the
/// caches only. Throws: what allocation and the executor throw.
template <cache_layer Layer, executor Executor = serial_executor>
void attend(std::span<const attend_item<Layer>> batch, const attend_options& options = {},
            Executor&& executor = {}) {
  detail::check_batch_options(options);
  detail::batch_plan<Layer>(batch, options).run(executor);
}

/// Attention of one sequence.
///
/// \param q    queries of the newest options.q_len tokens, [q_len, num_q_heads, head_dim], row-major, rotated;
///             num_q_heads follows from the size, query head h reads KV head h / (num_q_heads / num_kv_heads)
/// \param out  same shape; may be q itself
/// The rest as for a batch.
template <cache_layer Layer, executor Executor = serial_executor>
void attend(std::span<const float> q, const Layer& layer, std::span<float> out,
            const attend_options& options = {}, Executor&& executor = {}) {
  const attend_item<Layer> item{
      q, layer, out, options.q_len, options.mask, options.q_positions, options.k_positions, options.lse};
  detail::batch_plan<Layer>({&item, 1}, options).run(executor);
}

}  // namespace kvcache::inline v0
