// SPDX-License-Identifier: MIT
// evict_tokens: a sequence brought down to a budget, by a policy.
//
//   eviction::h2o policy;
//   ... attend, add_token_weights, policy.observe(weights) ...
//   if (cache.size() >= 1024) (void)eviction::evict_tokens(cache, policy, policy.selection(512), keep_positions::consecutive);
//
// A budget well below what the sequence may grow to makes evictions rare, and their cost small.
#pragma once

#include <kvcache/cache/keep_tokens.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/select_tokens.hpp>
#include <kvcache/eviction/token_policy.hpp>

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

namespace kvcache::inline v0::eviction {

/// What the cache can do of a selection: sealed blocks go whole, and blocks with exact sinks stay.
template <class Cache>
[[nodiscard]] token_selection within_limits(const Cache& cache, token_selection selection) {
  const keep_limits limits = cache.keep_limits();
  selection.sinks = std::max(selection.sinks, limits.pinned);
  selection.whole_blocks = limits.whole_blocks;
  selection.block_size = cache.shape().block_size;
  return selection;
}

/// Keeps what `policy` scores highest and forgets the rest; nothing to do where the sequence is within the budget.
///
/// \param cache   any cache with keep_tokens: a container's or any_cache
/// \param policy  has seen what it wants of all of the cache's tokens
/// \return        as keep_tokens; on any code but ok neither cache nor policy changed
/// O(size log size) and what keep_tokens costs.
template <class Cache, token_policy Policy>
[[nodiscard]] keep_result evict_tokens(Cache& cache, Policy& policy, const token_selection& selection,
                                       keep_positions mode = keep_positions::original) {
  if (cache.size() <= selection.budget) return {};
  try {
    std::vector<float> scores(static_cast<std::size_t>(cache.size()));
    policy.score(scores);
    const std::vector<index_t> tokens = select_tokens(scores, within_limits(cache, selection));
    const keep_result result = cache.keep_tokens(tokens, mode);
    if (result.code == status::ok) policy.keep(tokens);
    return result;
  } catch (const std::bad_alloc&) {
    return {status::out_of_memory, 0, 0};
  }
}

}  // namespace kvcache::inline v0::eviction
