// SPDX-License-Identifier: MIT
// gauges_of: the memory_gauges of a manager, for metrics.
//
//   manager.observer().values.memory = gauges_of(manager, pool);        with a cold pool: gauges_of(manager, pool, cold)
//   write_prometheus(out, manager.observer().values);
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/serving/metrics.hpp>

#include <concepts>

namespace kvcache::inline v0::serving {

/// \tparam M  tells its bytes as cache_manager does
template <class M>
concept tells_bytes = requires(const M& manager) {
  { manager.use().total } -> std::convertible_to<index_t>;
  { manager.use().free } -> std::convertible_to<index_t>;
  { manager.budget() } -> std::same_as<index_t>;
};

/// Bytes of a manager now.
///
/// \param pools  all pools that the manager was given: page_pool, of any codec
/// `live` is everything, books and tails included; `slack` the pages that are allocated and not in use (unused slots of
/// pages that are in use are not known here); `exact` counts those pages as bf16 pages and all else as it is.
/// O(pages), for what is shared. Threads: as a verb of the manager.
template <tells_bytes Manager, class... Pools>
memory_gauges gauges_of(const Manager& manager, const Pools&... pools) {
  const auto use = manager.use();
  memory_gauges gauges{.live = use.total, .slack = use.free, .budget = manager.budget()};
  gauges.exact = use.total - use.free;
  const auto add = [&](const auto& pool) {
    const auto& shape = pool.shape();
    const index_t heads = shape.num_layers * shape.num_kv_heads;
    const index_t exact_page = heads * codec::bf16{}.block_bytes(geometry_of(shape));
    gauges.exact += pool.num_in_use() * (exact_page - pool.page_bytes());
    gauges.shared += pool.bytes().shared;
  };
  (add(pools), ...);
  return gauges;
}

}  // namespace kvcache::inline v0::serving
