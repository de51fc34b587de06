// SPDX-License-Identifier: MIT
// add_token_weights: how much attention each token of a sequence gets, for policies that evict by it. A second pass over the
// keys, asked for where it is needed: attend itself computes nothing for it.
//
//   std::vector<float> lse(q_len * num_q_heads);
//   attend(q, cache[layer], out, {.q_len = q_len, .lse = lse});
//   add_token_weights(q, cache[layer], lse, weights, {.q_len = q_len});      weights[t] += sum over rows of exp(s[t] - lse)
#pragma once

#include <kvcache/attention/item_plan.hpp>
#include <kvcache/attention/options.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/executor.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>

#include <cstddef>
#include <span>

namespace kvcache::inline v0 {

/// Adds up the attention weights of some queries, token by token.
///
/// \param q        queries as attend had them, [q_len, num_q_heads, head_dim]
/// \param lse      what attend said of them, [q_len, num_q_heads], natural logarithm; rows with -infinity add nothing
/// \param sums     added to: [num_kv_heads, kv_len], the sums over all queries and the query heads of a group; or [kv_len], those over
///                 all heads. Over its keys each row adds up to 1, as exactly as weights and lse are.
/// \param options  as attend had them, q_len and positions included; `lse` has no meaning here
/// \param executor runs a task for each KV head, one task where `sums` is [kv_len]; the result is the same
/// Numerics: attend's logits, masked the same; relative to itself a weight is off by less than 2e-6 * (4 + N), N = scale * max|q| *
/// max|k|, on AMX with bf16 blocks by eight times that. Where attend takes queries as one bf16 they are two here: all weights of
/// a row are off by what its lse is, 2^-7 + N / 250 (a factor of up to exp(N / 250) where that is large).
/// Complexity: O(q_len * num_q_heads * kv_len * head_dim), values are not read. Allocates only from options.workspace, or where
/// that is missing, what all workers need at once. Threads: reads the cache only. Throws: what allocation and the executor throw.
template <cache_layer Layer, executor Executor = serial_executor>
void add_token_weights(std::span<const float> q, const Layer& layer, std::span<const float> lse,
                       std::span<float> sums, const attend_options& options = {}, Executor&& executor = {}) {
  const attend_item<Layer> item{
      q, layer, {}, options.q_len, options.mask, options.q_positions, options.k_positions, {}};
  const kernel::table& kernels = options.kernel != nullptr ? *options.kernel : kernel::best();
  const detail::item_plan<Layer> plan(item, options, kernels);
  const index_t kv_len = layer.size();
  const index_t num_heads = layer.shape().num_kv_heads;
  [[maybe_unused]] const index_t num_rows = static_cast<index_t>(q.size()) / layer.shape().head_dim;
  const auto num_sums = static_cast<index_t>(sums.size());
  KVCACHE_ASSERT(static_cast<index_t>(lse.size()) == num_rows,
                 "add_token_weights: lse must be [q_len, num_q_heads]");
  KVCACHE_ASSERT(num_sums == kv_len || num_sums == num_heads * kv_len,
                 "add_token_weights: sums must be [num_kv_heads, kv_len] or [kv_len]");
  if (plan.num_tiles() == 0 || kv_len == 0) return;

  attend_workspace local;
  attend_workspace& workspace = options.workspace != nullptr ? *options.workspace : local;
  const index_t num_tasks = num_sums == kv_len ? 1 : num_heads;
  float* memory = workspace.floats(executor.num_workers() * plan.worker_floats());
  executor.run(num_tasks, [&](index_t task, index_t worker) {
    float* of_task = sums.data() + task * kv_len;
    // One task takes all tiles of a head, in order, so that sums depend on nothing else.
    const index_t num_tiles = plan.num_tiles() / num_tasks;
    for (index_t tile = task * num_tiles; tile < (task + 1) * num_tiles; ++tile)
      plan.weigh_tile(tile, lse, of_task, memory + worker * plan.worker_floats());
  });
}

}  // namespace kvcache::inline v0
