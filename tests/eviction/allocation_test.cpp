// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include "examples/allocation_watch.hpp"

#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>

#include <cstddef>

using namespace kvcache;

TEMPLATE_TEST_CASE("a policy allocates when it is made and never after", "[eviction]", eviction::lru,
                   eviction::arc, eviction::s3_fifo, eviction::priority) {
  test::random random;
  TestType policy(300);
  bool all_inserted = true;
  const model_files::allocation_watch watch;
  for (int step = 0; step < 20000; ++step) {
    const auto key = static_cast<eviction::block_key>(random.below(900));
    if (random.chance(0.3)) policy.touch(key);
    if (random.chance(0.05)) policy.erase(key);
    if (policy.contains(key)) {
      policy.pin(key);
      policy.unpin(key);
    }
    if (policy.size() == policy.capacity()) (void)policy.evict();
    all_inserted =
        policy.insert(key, {.parent = key / 2, .priority = static_cast<int>(key % 3)}) && all_inserted;
  }
  const std::size_t largest = watch.largest();
  CHECK(largest == 0);
  CHECK(all_inserted);
}
