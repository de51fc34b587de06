// SPDX-License-Identifier: MIT
// What every container does as a whole: clone, fork and diverge, steps, shifted positions, moves.

#include "conformance/caches.hpp"

#include <type_traits>
#include <utility>

using namespace conformance;

namespace {

constexpr cache_shape small{.num_layers = 3, .num_kv_heads = 2, .head_dim = 5, .block_size = 16};

}  // namespace

TEMPLATE_TEST_CASE("a clone has the same tokens and a life of its own", "[conformance]", ALL_CACHES) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 41, random);
  auto copy = cache.clone();
  auto copy_model = model;
  require_same(copy, copy_model);
  REQUIRE(copy.bytes().shared == 0);
  append(cache, model, 9, random);
  append(copy, copy_model, 30, random);
  cache.truncate(20);
  model.truncate(20);
  append(cache, model, 1, random);
  require_same(cache, model);
  require_same(copy, copy_model);
  auto again = copy.try_clone();
  REQUIRE(again.has_value());
  require_same(*again, copy_model);
}

TEMPLATE_TEST_CASE("forks at any position diverge without touching each other", "[conformance]", ALL_CACHES) {
  test::random random;
  TestType source(small);
  auto parent = source.make();
  auto parent_model = model_of<TestType>(small);
  append(parent, parent_model, 49, random);
  for (index_t at = 0; at <= 49; at += at % 16 == 2 ? 12 : 1) {
    CAPTURE(at);
    auto child = parent.fork(at);
    auto child_model = parent_model.fork(at);
    require_same(child, child_model);
    auto grandchild = child.fork();
    auto grandchild_model = child_model;
    append(child, child_model, 1, random);
    append(grandchild, grandchild_model, 18, random);
    require_same(child, child_model);
    require_same(grandchild, grandchild_model);
    require_same(parent, parent_model);
    // The parent writes where it still shares.
    parent.truncate(at / 2 + 20 < 49 ? 48 : 47);
    parent_model.truncate(at / 2 + 20 < 49 ? 48 : 47);
    append(parent, parent_model, 49 - parent_model.size(), random);
    require_same(parent, parent_model);
    require_same(child, child_model);
    require_same(grandchild, grandchild_model);
  }
}

TEMPLATE_TEST_CASE("a fork outlives the cache it came from", "[conformance]", ALL_CONTAINERS) {
  test::random random;
  auto model = model_of<TestType>(small);
  auto orphan = [&] {
    TestType source(small);  // a pool, where there is one, goes too
    auto parent = source.make();
    append(parent, model, 40, random);
    return parent.fork(33);
  }();
  model.truncate(33);
  require_same(orphan, model);
  append(orphan, model, 20, random);
  require_same(orphan, model);
}

TEMPLATE_TEST_CASE("a step takes effect when it is committed and not before", "[conformance]",
                   ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 14, random);

  SECTION("committed") {
    auto step = cache.begin(5);
    append(cache, model, 5, random);
    step.commit();
    require_same(cache, model);
  }
  SECTION("committed with less than announced") {
    auto step = cache.try_begin(100);
    REQUIRE(step.has_value());
    append(cache, model, 2, random);
    step->commit();
    require_same(cache, model);
    if (TestType::shrinks)
      REQUIRE(cache.bytes().slack < 16 * 4 * kvcache::bytes_per_token(small, cache.codec()));
  }
  SECTION("dropped") {
    const auto before = cache.bytes();
    auto scratch = model;
    {
      auto step = cache.begin(70);
      append(cache, scratch, 70, random);
    }
    require_same(cache, model);
    REQUIRE(cache.bytes().payload == before.payload);
    if (TestType::shrinks) REQUIRE(cache.bytes() == before);
  }
  SECTION("dropped part of the way through the layers") {
    auto scratch = model;
    {
      auto step = cache.begin(3);
      append(cache, scratch, 0, 3, random);
      append(cache, scratch, 1, 1, random);
    }
    require_same(cache, model);
  }
  SECTION("a step that was moved acts once") {
    auto scratch = model;
    {
      auto step = cache.begin(3);
      auto moved = std::move(step);
      append(cache, scratch, 3, random);
      moved.commit();
    }
    require_same(cache, scratch);
    model = scratch;
  }
  append(cache, model, 20, random);
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("a step dropped over a shared block leaves both sequences alone", "[conformance]",
                   ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto parent = source.make();
  auto model = model_of<TestType>(small);
  append(parent, model, 21, random);
  auto child = parent.fork();
  auto scratch = model;
  {
    auto step = child.begin(30);
    append(child, scratch, 0, 30, random);
    append(child, scratch, 1, 30, random);
  }
  require_same(child, model);
  require_same(parent, model);
  auto child_model = model;
  append(child, child_model, 4, random);
  append(parent, model, 4, random);
  require_same(child, child_model);
  require_same(parent, model);
}

TEMPLATE_TEST_CASE("shifted tokens report their new positions", "[conformance]", ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  const auto shift = [&](index_t first, index_t last, index_t delta) {
    CAPTURE(first, last, delta);
    cache.shift(first, last, delta);
    model.shift(first, last, delta);
    require_same(cache, model);
  };
  append(cache, model, 30, random);
  shift(10, 20, 100);
  shift(15, 30, -3);
  shift(0, 30, 7);
  shift(4, 4, 50);
  append(cache, model, 6, random);
  require_same(cache, model);
  shift(30, 36, 2);
  shift(10, 20, -100);
  append(cache, model, 1, random);
  auto child = cache.fork(17);
  require_same(child, model.fork(17));
  cache.truncate(18);
  model.truncate(18);
  append(cache, model, 5, random);
  require_same(cache, model);
  cache.clear();
  model.clear();
  append(cache, model, 2, random);
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("a moved cache keeps its tokens and its blocks", "[conformance]", ALL_CONTAINERS) {
  test::random random;
  using cache_type = typename TestType::cache;
  STATIC_REQUIRE(std::is_nothrow_move_constructible_v<cache_type>);
  STATIC_REQUIRE(std::is_nothrow_move_assignable_v<cache_type>);
  STATIC_REQUIRE(!std::is_copy_constructible_v<cache_type>);
  STATIC_REQUIRE(!std::is_copy_assignable_v<cache_type>);
  TestType source(small);
  auto first = source.make();
  auto model = model_of<TestType>(small);
  append(first, model, 35, random);
  const std::byte* block = first[1].block(1, 1);

  cache_type second = std::move(first);
  require_same(second, model);
  REQUIRE(second[1].block(1, 1) == block);
  append(second, model, 1, random);

  auto third = source.make();
  auto other_model = model_of<TestType>(small);
  append(third, other_model, 50, random);
  third = std::move(second);  // what third had is given back
  require_same(third, model);
  REQUIRE(third[1].block(1, 1) == block);
  first = source.make();  // a moved-from cache may be assigned to
  auto fresh = model_of<TestType>(small);
  append(first, fresh, 3, random);
  require_same(first, fresh);

  std::vector<cache_type> many;
  many.reserve(5);
  for (int i = 0; i < 5; ++i) many.push_back(third.fork(10 + i));
  for (int i = 0; i < 5; ++i) require_same(many[static_cast<std::size_t>(i)], model.fork(10 + i));
}
