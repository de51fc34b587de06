// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include "oracle/eviction_oracle.hpp"

#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

using namespace kvcache;
using eviction::block_info;
using eviction::block_key;

namespace {

template <class Policy, class Model>
struct pair_of {
  using policy = Policy;
  using model = Model;
};
using lru_pair = pair_of<eviction::lru, oracle::naive_lru>;
using arc_pair = pair_of<eviction::arc, oracle::naive_arc>;
using s3_fifo_pair = pair_of<eviction::s3_fifo, oracle::naive_s3_fifo>;
using priority_pair = pair_of<eviction::priority, oracle::naive_priority>;

/// Chains over `num_keys` keys: the parent of a block is half its key, so heads are shared.
block_info random_info(test::random& random, block_key key) {
  block_info info{.priority = static_cast<int>(random.below(3)),
                  .recompute_cost = static_cast<double>(random.below(4))};
  if (key > 1 && random.chance(0.7)) info.parent = key / 2;
  return info;
}

oracle::block_facts facts_of(const block_info& info) {
  oracle::block_facts facts{std::nullopt, info.priority, info.recompute_cost};
  if (info.parent != eviction::no_block) facts.parent = info.parent;
  return facts;
}

template <class Policy>
void require_bounded(const Policy& policy) {
  REQUIRE(policy.size() <= policy.capacity());
  if constexpr (requires { policy.num_ghosts(); }) REQUIRE(policy.num_ghosts() <= policy.capacity());
  policy.check();
}

/// Evicts until nothing is left that may go.
template <class Policy>
std::vector<block_key> all_victims(Policy policy) {
  std::vector<block_key> victims;
  while (const auto victim = policy.evict()) victims.push_back(*victim);
  return victims;
}

template <class Policy>
Policy filled(index_t capacity, const std::vector<block_key>& chain) {
  Policy policy(capacity);
  for (std::size_t i = 0; i < chain.size(); ++i) {
    block_info info;
    if (i > 0) info.parent = chain[i - 1];
    REQUIRE(policy.insert(chain[i], info));
  }
  return policy;
}

}  // namespace

TEST_CASE("the concept takes the policies and turns near misses down", "[eviction]") {
  struct no_pins {
    explicit no_pins(index_t) {}
    bool insert(block_key, const block_info& = {}) { return true; }
    bool touch(block_key) { return true; }
    std::optional<block_key> evict() { return std::nullopt; }
  };
  STATIC_REQUIRE(eviction::block_policy<eviction::lru>);
  STATIC_REQUIRE(eviction::block_policy<eviction::arc>);
  STATIC_REQUIRE(eviction::block_policy<eviction::s3_fifo>);
  STATIC_REQUIRE(eviction::block_policy<eviction::priority>);
  STATIC_REQUIRE(!eviction::block_policy<no_pins>);
  STATIC_REQUIRE(!eviction::block_policy<eviction::block_directory>);
}

TEMPLATE_TEST_CASE("a policy picks the victims of its model over random scripts", "[eviction]", lru_pair,
                   arc_pair, s3_fifo_pair, priority_pair) {
  for (const index_t capacity : {0, 1, 2, 3, 10, 25, 60}) {
    test::random random(static_cast<std::uint64_t>(capacity));
    typename TestType::policy policy(capacity);
    typename TestType::model model(static_cast<std::size_t>(capacity));
    const index_t num_keys = 2 * capacity + 4;
    std::vector<block_key> pinned;
    for (int step = 0; step < 3000; ++step) {
      CAPTURE(capacity, step);
      const auto key = static_cast<block_key>(random.below(num_keys));
      const index_t verb = random.below(100);
      if (verb < 40) {
        const block_info info = random_info(random, key);
        if (!model.held().contains(key) && policy.size() == capacity) {
          const auto victim = policy.evict();
          REQUIRE(victim == model.evict());
          REQUIRE((!victim || std::find(pinned.begin(), pinned.end(), *victim) == pinned.end()));
        }
        REQUIRE(policy.insert(key, info) == model.insert(key, facts_of(info)));
      } else if (verb < 70) {
        REQUIRE(policy.touch(key) == model.touch(key));
      } else if (verb < 80 && model.held().contains(key)) {
        policy.pin(key);
        model.pin(key);
        pinned.push_back(key);
      } else if (verb < 92 && !pinned.empty()) {
        const auto at = pinned.begin() + random.below(static_cast<index_t>(pinned.size()));
        policy.unpin(*at);
        model.unpin(*at);
        pinned.erase(at);
      } else if (verb < 96 && std::find(pinned.begin(), pinned.end(), key) == pinned.end()) {
        REQUIRE(policy.erase(key) == model.erase(key));
      } else if (verb >= 96) {
        REQUIRE(policy.evict() == model.evict());
      }
      REQUIRE(policy.contains(key) == model.held().contains(key));
      REQUIRE(policy.size() == static_cast<index_t>(model.held().size()));
      REQUIRE(policy.num_pinned() == static_cast<index_t>(model.held().num_pinned()));
      if (step % 50 == 0) require_bounded(policy);
    }
    for (const block_key key : pinned) {
      policy.unpin(key);
      model.unpin(key);
    }
    while (const auto victim = policy.evict()) REQUIRE(victim == model.evict());
    REQUIRE(policy.size() == 0);
  }
}

TEMPLATE_TEST_CASE("a chain goes from its tail, the shared head last", "[eviction]", eviction::lru,
                   eviction::arc, eviction::s3_fifo, eviction::priority) {
  auto policy = filled<TestType>(8, {1, 2, 3, 4});
  CHECK(all_victims(policy) == std::vector<block_key>{4, 3, 2, 1});

  REQUIRE(policy.insert(5, {.parent = 2}));  // a second chain on the same head
  auto victims = all_victims(policy);
  REQUIRE(victims.size() == 5);
  CHECK(victims[3] == 2);
  CHECK(victims[4] == 1);

  for (const block_key used_alone : {4, 3, 2}) REQUIRE(policy.touch(used_alone));  // in the wrong order
  victims = all_victims(policy);
  CHECK(victims[3] == 2);
  CHECK(victims[4] == 1);
}

TEMPLATE_TEST_CASE("a pin holds a block and all before it", "[eviction]", eviction::lru, eviction::arc,
                   eviction::s3_fifo, eviction::priority) {
  auto policy = filled<TestType>(8, {1, 2, 3, 4});
  policy.pin(3);
  policy.pin(3);
  CHECK(policy.num_pinned() == 1);
  CHECK(policy.evict() == block_key{4});
  CHECK(policy.evict() == std::nullopt);
  policy.unpin(3);
  CHECK(policy.evict() == std::nullopt);  // two users, one left
  policy.unpin(3);
  CHECK(policy.num_pinned() == 0);
  CHECK(all_victims(policy) == std::vector<block_key>{3, 2, 1});
}

TEMPLATE_TEST_CASE("a block that was passed over is next once it may go, unless it was used", "[eviction]",
                   eviction::lru, eviction::arc, eviction::s3_fifo, eviction::priority) {
  auto policy = filled<TestType>(40, {1});
  policy.pin(1);
  for (block_key key = 2; key <= 20; ++key) REQUIRE(policy.insert(key));
  CHECK(policy.evict() == block_key{2});
  auto used = policy;
  policy.unpin(1);
  CHECK(policy.evict() == block_key{1});
  REQUIRE(used.touch(1));
  REQUIRE(used.touch(1));
  used.unpin(1);
  CHECK(used.evict() == block_key{3});
}

TEMPLATE_TEST_CASE("a full policy takes nothing until it evicts", "[eviction]", eviction::lru, eviction::arc,
                   eviction::s3_fifo, eviction::priority) {
  TestType none(0);
  CHECK(!none.insert(1));
  CHECK(none.evict() == std::nullopt);
  CHECK(!none.touch(1));
  CHECK(!none.erase(1));
  none.check();

  TestType one(1);
  CHECK(one.evict() == std::nullopt);
  CHECK(one.insert(7));
  CHECK(one.insert(7));  // there already
  CHECK(!one.insert(8));
  CHECK(one.size() == 1);
  CHECK(one.evict() == block_key{7});
  CHECK(one.insert(8, {.parent = 7}));  // a parent that is gone
  CHECK(one.contains(8));
  CHECK(!one.contains(7));
  for (block_key key = 9; key < 50; ++key) {
    CHECK(one.evict() == key - 1);
    CHECK(one.insert(key, {.parent = key - 1}));
    require_bounded(one);
  }
  CHECK_THROWS_AS(TestType(-1), shape_error);
  CHECK_THROWS_AS(TestType((index_t{1} << 30) + 1), shape_error);
}

TEMPLATE_TEST_CASE("any key can be erased, and comes back as new", "[eviction]", eviction::lru, eviction::arc,
                   eviction::s3_fifo, eviction::priority) {
  for (const block_key erased : {1, 2, 3}) {
    auto policy = filled<TestType>(4, {1, 2, 3});
    CHECK(policy.erase(erased));
    CHECK(!policy.erase(erased));
    CHECK(!policy.contains(erased));
    CHECK(policy.insert(erased));
    CHECK(policy.size() == 3);
    require_bounded(policy);
    CHECK(all_victims(policy).size() == 3);
  }
  auto policy = filled<TestType>(4, {1, 2, 3});
  CHECK(policy.evict() == block_key{3});
  CHECK(!policy.erase(3));  // whether or not it is remembered
  require_bounded(policy);
}

TEMPLATE_TEST_CASE("a capacity can change while blocks are there", "[eviction]", eviction::lru, eviction::arc,
                   eviction::s3_fifo, eviction::priority) {
  auto policy = filled<TestType>(4, {1, 2, 3, 4});
  policy.set_capacity(9);
  for (block_key key = 5; key <= 9; ++key) REQUIRE(policy.insert(key, {.parent = key - 1}));
  CHECK(!policy.insert(10));
  require_bounded(policy);
  for (int i = 0; i < 7; ++i) REQUIRE(policy.evict());
  policy.set_capacity(2);
  require_bounded(policy);
  CHECK(all_victims(policy) == std::vector<block_key>{2, 1});
}

TEST_CASE("a low class goes first, whatever it costs, and a high cost stays longer", "[eviction]") {
  eviction::priority policy(10);
  REQUIRE(policy.insert(1, {.priority = 1, .recompute_cost = 1}));
  REQUIRE(policy.insert(2, {.priority = 0, .recompute_cost = 100}));
  REQUIRE(policy.insert(3, {.priority = 0, .recompute_cost = 5}));
  REQUIRE(policy.insert(4, {.priority = -1, .recompute_cost = 1000}));
  CHECK(all_victims(policy) == std::vector<block_key>{4, 3, 2, 1});
  REQUIRE(policy.insert(1, {.priority = -2}));  // the conversation has ended
  CHECK(all_victims(policy) == std::vector<block_key>{1, 4, 3, 2});

  eviction::priority aging(2);  // a costly block goes in the end when it is not used
  REQUIRE(aging.insert(0, {.recompute_cost = 3}));
  std::vector<block_key> victims;
  for (block_key key = 1; key < 8; ++key) {
    if (aging.size() == 2) victims.push_back(*aging.evict());
    REQUIRE(aging.insert(key));
  }
  CHECK(victims == std::vector<block_key>{1, 2, 0, 3, 4, 5});
}

TEST_CASE("blocks used twice outlive a scan in arc and s3_fifo, not in lru", "[eviction]") {
  const auto survivors = [](auto policy) {
    for (block_key key = 1; key <= 5; ++key) {
      REQUIRE(policy.insert(key));
      for (int use = 0; use < 2; ++use) policy.touch(key);
    }
    for (block_key key = 100; key < 200; ++key) {
      if (policy.size() == policy.capacity()) REQUIRE(policy.evict());
      REQUIRE(policy.insert(key));
    }
    index_t count = 0;
    for (block_key key = 1; key <= 5; ++key) count += policy.contains(key) ? 1 : 0;
    return count;
  };
  CHECK(survivors(eviction::lru(20)) == 0);
  CHECK(survivors(eviction::arc(20)) == 5);
  CHECK(survivors(eviction::s3_fifo(20)) == 5);
}

TEST_CASE("keys that differ little or much are all found", "[eviction]") {
  for (const block_key stride :
       {block_key{1}, block_key{1} << 20, block_key{1} << 58, (block_key{1} << 63) + 1}) {
    eviction::arc policy(500);
    for (block_key i = 0; i < 500; ++i) REQUIRE(policy.insert(i * stride + i));
    for (block_key i = 0; i < 500; i += 3) REQUIRE(policy.erase(i * stride + i));
    for (block_key i = 0; i < 500; ++i) REQUIRE(policy.contains(i * stride + i) == (i % 3 != 0));
    policy.check();
  }
}
