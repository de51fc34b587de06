// SPDX-License-Identifier: MIT
// A manager with each block policy: the budget, the pins and the counts do not depend on which one it is.
#include "serving/manager_script.hpp"

#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>

using namespace serving_test;

namespace {

template <class Policy>
using manager_with = cache_manager<warm_pool, Policy, cold_pool, map_tier, recorder>;

template <class Manager>
void check_counts(const Manager& manager, const outcome& out) {
  CHECK(manager.counts().times == manager.observer().taken.times);
  CHECK(manager.counts().bytes == manager.observer().taken.bytes);
  CHECK(manager.counts().of(rung::refuse) == out.refused);
  CHECK(manager.observer().recoded == manager.counts().of(rung::recode));
}

}  // namespace

TEMPLATE_TEST_CASE("budget, pins and counts are kept with every block policy", "[serving]", eviction::lru,
                   eviction::arc, eviction::s3_fifo, eviction::priority) {
  const auto make = [](index_t budget, const serving::ladder_options& ladder, map_tier* tier) {
    return manager_with<TestType>(warm_pool(shape, {.slab_bytes = 1}),
                                  {.budget_bytes = budget, .ladder = ladder},
                                  cold_pool(shape, {.slab_bytes = 1}), tier);
  };
  SECTION("blocks are dropped") {
    auto manager = make(90'000, {.rungs = {rung::drop, rung::refuse}, .adapt = false}, nullptr);
    const outcome out = run_script(manager, 700, 0, 6);
    check_counts(manager, out);
    CHECK(out.reused > 40);
    CHECK(manager.counts().of(rung::drop) > 20);
    CHECK(manager.counts().of(rung::recode) + manager.counts().of(rung::spill) == 0);
  }
  SECTION("the whole ladder is climbed") {
    map_tier tier;
    auto manager = make(110'000, {}, &tier);
    const outcome out = run_script(manager, 700, 1.5F, 5, &tier);
    check_counts(manager, out);
    CHECK(out.reused > 40);
    CHECK(manager.counts().of(rung::recode) > 5);
    CHECK(manager.counts().of(rung::spill) > 5);
    CHECK(tier.gets > 0);
  }
}

TEST_CASE("a class given at release outlives all of a lower one", "[serving]") {
  manager_with<eviction::priority> manager(
      warm_pool(shape, {.slab_bytes = 1}),
      {.budget_bytes = 120'000, .ladder = {.rungs = {rung::drop, rung::refuse}, .adapt = false}},
      cold_pool(shape, {.slab_bytes = 1}));
  const tokens first = counted(0, 100), second = counted(5000, 100);
  for (const tokens* path : {&first, &second}) {
    const auto got = manager.acquire(spaces[0], *path);
    REQUIRE(compute(manager, got.id, spaces[0], *path) == status::ok);
    manager.release(got.id, {.priority = path == &first ? 1 : 0});
  }
  for (index_t i = 2; i < 40; ++i) REQUIRE(converse(manager, spaces[0], counted(5000 * i, 100)) == 0);
  CHECK(manager.counts().of(rung::drop) > 100);
  CHECK(converse(manager, spaces[0], first) == 100);
  CHECK(converse(manager, spaces[0], second) == 0);
}
