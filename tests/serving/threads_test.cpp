// SPDX-License-Identifier: MIT
// A file of its own: the thread sanitizer does not let a test replace the allocation functions.
#include "serving/tokens.hpp"

#include <kvcache/attention/attend.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/serving/cache_manager.hpp>

#include <cmath>
#include <mutex>
#include <thread>

using namespace serving_test;

namespace {

template <class Manager>
status compute(Manager& manager, serving::sequence_id id, std::span<const token_id> path) {
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const index_t have = manager.cache(id)[layer].size();
    const status s = manager.try_append(id, layer, rows(spaces[0], path, layer, have, false),
                                        rows(spaces[0], path, layer, have, true));
    if (s != status::ok) return s;
  }
  return status::ok;
}

}  // namespace

TEST_CASE("threads share a manager behind one lock, and attend without it", "[serving][threads]") {
  using manager_type = serving::cache_manager<page_pool<codec::bf16>, eviction::lru, page_pool<codec::int8>>;
  manager_type manager(page_pool<codec::bf16>(shape, {.slab_bytes = 4096}), {.budget_bytes = 160'000},
                       page_pool<codec::int8>(shape, {.slab_bytes = 4096}));
  std::mutex lock;
  index_t failures[3] = {}, done[3] = {};
  const auto work = [&](std::size_t me) {
    std::vector<float> q(row_size), out(row_size), k, v;
    for (index_t round = 0; round < 60; ++round) {
      const tokens path = [&] {
        tokens t = counted(100 * (round % 5), 40);
        for (const token_id x : counted(static_cast<index_t>(1000 * me), 20 + round % 7)) t.push_back(x);
        return t;
      }();
      const auto size = static_cast<std::size_t>(path.size());
      serving::acquired got;
      const manager_type::cache_type* cache = nullptr;
      bool computed = false;
      {
        const std::lock_guard guard(lock);
        got = manager.acquire(spaces[0], path);
        if (got.code != status::ok) continue;
        computed = compute(manager, got.id, path) == status::ok;
        cache = &manager.cache(got.id);
      }
      if (computed) {
        // No lock: others fork, append, evict and re-encode meanwhile.
        q.assign(row_size, 1.0F);
        for (int i = 0; i < 3; ++i) attend(std::span<const float>(q), (*cache)[0], std::span<float>(out));
        k.resize(size * row_size);
        v.resize(k.size());
        (*cache)[1].copy_out(0, cache->size(), k, v);
        const auto want = rows(spaces[0], path, 1, 0, false);
        for (std::size_t i = 0; i < k.size(); ++i) failures[me] += std::abs(k[i] - want[i]) > 1.5F ? 1 : 0;
        ++done[me];
      }
      const std::lock_guard guard(lock);
      manager.release(got.id);
    }
  };
  std::thread a(work, 0), b(work, 1), c(work, 2);
  a.join();
  b.join();
  c.join();
  manager.check();
  for (int i = 0; i < 3; ++i) {
    CHECK(failures[i] == 0);
    CHECK(done[i] > 30);
  }
  CHECK(manager.num_live() == 0);
}
