// SPDX-License-Identifier: MIT
// When memory or pages run out: a status comes back, nothing has changed, and with room again all goes on.

#include "conformance/caches.hpp"

using namespace conformance;

namespace {

constexpr cache_shape small{.num_layers = 3, .num_kv_heads = 2, .head_dim = 5, .block_size = 16};

/// A pool with room for `pages` pages.
template <class Codec>
kvcache::page_pool<Codec> pool_of(const cache_shape& shape, index_t pages) {
  const index_t page_bytes = kvcache::page_pool<Codec>(shape).page_bytes();
  return kvcache::page_pool<Codec>(shape, {.budget_bytes = pages * page_bytes});
}

}  // namespace

TEMPLATE_TEST_CASE("an append that finds no memory changes nothing, at whichever allocation it fails",
                   "[conformance]", EXHAUSTIBLE_CACHES) {
  test::random random;
  for (index_t failing = 0; failing < 4; ++failing) {
    CAPTURE(failing);
    watched_memory memory;
    {
      TestType source(small, &memory);
      auto cache = source.make();
      auto model = model_of<TestType>(small);
      append(cache, model, 13, random);
      const std::vector<float> k = random_rows(random, small, 200);
      const auto before = cache.bytes();
      memory.fail_at(failing);
      const status s = cache[1].try_append(k, k);
      if (s != status::ok) {
        REQUIRE(s == status::out_of_memory);
        require_same(cache, model);
        REQUIRE(cache.bytes() == before);
        try {
          cache[1].append(k, k);
          FAIL("append did not throw");
        } catch (const kvcache::capacity_error& error) {
          REQUIRE(error.code() == status::out_of_memory);
        }
        require_same(cache, model);
        memory.fail_at(watched_memory::never);
        REQUIRE(cache[1].try_append(k, k) == status::ok);
      }
      memory.fail_at(watched_memory::never);
      model.append(1, k, k);
      require_same(cache, model);
      append(cache, model, 30, random);
      require_same(cache, model);
    }
    REQUIRE(memory.bytes_out() == 0);
    REQUIRE(memory.mistakes() == 0);
  }
}

TEMPLATE_TEST_CASE("reserve, begin and clone that find no memory change nothing", "[conformance]",
                   EXHAUSTIBLE_CACHES) {
  test::random random;
  watched_memory memory;
  {
    TestType source(small, &memory);
    auto cache = source.make();
    auto model = model_of<TestType>(small);
    append(cache, model, 40, random);
    // Fill what is free, so that whatever comes next needs memory.
    while (true) {
      memory.fail_at(0);
      const std::vector<float> row = random_rows(random, small, 1);
      const status s = cache[0].try_append(row, row);
      if (s != status::ok) break;
      model.append(0, row, row);
      for (index_t layer = 1; layer < small.num_layers; ++layer) append(cache, model, layer, 1, random);
    }
    const auto before = cache.bytes();
    REQUIRE(cache.reserve(model.size() + 100) == status::out_of_memory);
    require_same(cache, model);
    REQUIRE_FALSE(cache.try_begin(100).has_value());
    require_same(cache, model);
    REQUIRE_THROWS_AS(cache.begin(100), kvcache::capacity_error);
    require_same(cache, model);
    REQUIRE_FALSE(cache.try_clone().has_value());
    REQUIRE_THROWS_AS((void)cache.clone(), kvcache::capacity_error);
    require_same(cache, model);
    REQUIRE(cache.bytes() == before);
    memory.fail_at(watched_memory::never);
    {
      auto step = cache.begin(100);
      append(cache, model, 100, random);
      step.commit();
    }
    require_same(cache.clone(), model);
    require_same(cache, model);
  }
  REQUIRE(memory.bytes_out() == 0);
  REQUIRE(memory.mistakes() == 0);
}

TEMPLATE_TEST_CASE("a step that fails in layer 17 leaves all layers as before", "[conformance]",
                   EXHAUSTIBLE_CACHES) {
  const cache_shape deep{.num_layers = 24, .num_kv_heads = 1, .head_dim = 3, .block_size = 16};
  test::random random;
  watched_memory memory;
  TestType source(deep, &memory);
  auto cache = source.make();
  auto model = model_of<TestType>(deep);
  append(cache, model, 14, random);
  const auto before = cache.bytes();

  // More is appended to layer 17 than the step announced, when there is no more memory to be had.
  auto scratch = model;
  {
    auto step = cache.begin(2);
    memory.fail_at(0);
    for (index_t layer = 0; layer < 17; ++layer) append(cache, scratch, layer, 2, random);
    const std::vector<float> rows = random_rows(random, deep, 12000);
    REQUIRE(cache[17].try_append(rows, rows) == status::out_of_memory);
    cache.check();
    REQUIRE(cache.size() == 14);
    REQUIRE(cache[16].size() == 16);
    REQUIRE(cache[17].size() == 14);
  }
  require_same(cache, model);
  REQUIRE(cache.bytes().payload == before.payload);

  // The same by way of an exception, with the step left open around it.
  memory.fail_at(watched_memory::never);
  try {
    auto step = cache.begin(2);
    memory.fail_at(0);
    for (index_t layer = 0; layer < deep.num_layers; ++layer) {
      const std::vector<float> rows = random_rows(random, deep, layer == 17 ? 12000 : 2);
      cache[layer].append(rows, rows);
    }
    FAIL("layer 17 found memory");
  } catch (const kvcache::capacity_error&) {
  }
  require_same(cache, model);
  memory.fail_at(watched_memory::never);
  append(cache, model, 20, random);
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("within an announced step appends cannot run out", "[conformance]", EXHAUSTIBLE_CACHES) {
  test::random random;
  watched_memory memory;
  TestType source(small, &memory);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 9, random);
  auto sibling = cache.fork();
  auto sibling_model = model;
  {
    auto step = cache.begin(90);
    memory.fail_at(0);
    for (int i = 0; i < 9; ++i) append(cache, model, 10, random);
    step.commit();
  }
  require_same(cache, model);
  require_same(sibling, sibling_model);
}

TEMPLATE_TEST_CASE("shrinking to fit without memory to move into keeps every token", "[conformance]",
                   EXHAUSTIBLE_CACHES) {
  test::random random;
  watched_memory memory;
  {
    TestType source(small, &memory);
    auto cache = source.make();
    auto model = model_of<TestType>(small);
    append(cache, model, 200, random);
    cache.truncate(20);
    model.truncate(20);
    memory.fail_at(0);
    cache.shrink_to_fit();
    require_same(cache, model);
    memory.fail_at(watched_memory::never);
    append(cache, model, 100, random);
    require_same(cache, model);
  }
  REQUIRE(memory.bytes_out() == 0);
  REQUIRE(memory.mistakes() == 0);
}

TEMPLATE_TEST_CASE("within reserved room appends cannot run out", "[conformance]", EXHAUSTIBLE_CACHES) {
  test::random random;
  watched_memory memory;
  TestType source(small, &memory);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 9, random);
  REQUIRE(cache.reserve(99) == status::ok);
  memory.fail_at(0);
  for (int i = 0; i < 9; ++i) append(cache, model, 10, random);
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("a pool out of pages says so and changes nothing", "[conformance]", codec::f32, codec::f16,
                   codec::bf16) {
  test::random random;
  auto pool = pool_of<TestType>(small, 5);
  REQUIRE(pool.num_pages() == 5);
  auto a = pool.sequence();
  auto b = pool.sequence();
  auto a_model = model_of<paged<TestType>>(small);
  auto b_model = a_model;
  append(a, a_model, 40, random);  // 3 pages
  append(b, b_model, 32, random);  // 2 pages
  REQUIRE(pool.num_free() == 0);
  REQUIRE(pool.num_in_use() == 5);

  const std::vector<float> row = random_rows(random, small, 1);
  const std::vector<float> rows = random_rows(random, small, 9);
  REQUIRE(b[0].try_append(row, row) == status::out_of_pages);
  REQUIRE(a[2].try_append(rows, rows) == status::out_of_pages);
  REQUIRE(b.reserve(33) == status::out_of_pages);
  REQUIRE(b.reserve(32) == status::ok);
  REQUIRE_FALSE(b.try_begin(1).has_value());
  REQUIRE_FALSE(a.try_clone().has_value());
  try {
    b[1].append(row, row);
    FAIL("append found a page");
  } catch (const kvcache::capacity_error& error) {
    REQUIRE(error.code() == status::out_of_pages);
  }
  require_same(a, a_model);
  require_same(b, b_model);
  pool.check();

  append(a, a_model, 8, random);  // the rest of its last page
  require_same(a, a_model);
  a.truncate(32);
  a_model.truncate(32);
  REQUIRE(pool.num_free() == 1);
  append(b, b_model, 1, random);
  require_same(b, b_model);
  REQUIRE(pool.num_free() == 0);
  REQUIRE(pool.bytes().total == 5 * pool.page_bytes());
}

TEMPLATE_TEST_CASE("a fork takes no page until it writes, and then one", "[conformance]", codec::f32,
                   codec::bf16) {
  test::random random;
  auto pool = pool_of<TestType>(small, 4);
  auto a = pool.sequence();
  auto a_model = model_of<paged<TestType>>(small);
  append(a, a_model, 40, random);  // 3 pages
  auto b = a.fork(39);
  auto b_model = a_model.fork(39);
  auto c = b.fork(33);
  auto c_model = b_model.fork(33);
  REQUIRE(pool.num_in_use() == 3);
  REQUIRE(a.bytes().shared == a.bytes().total);
  REQUIRE(pool.bytes().shared == 3 * pool.page_bytes());

  append(b, b_model, 0, 1, random);  // copies the page
  append(b, b_model, 1, 1, random);  // has it already
  append(b, b_model, 2, 1, random);
  REQUIRE(pool.num_in_use() == 4);
  REQUIRE(b.bytes().shared == 2 * pool.page_bytes());

  const std::vector<float> row = random_rows(random, small, 1);
  REQUIRE(c[0].try_append(row, row) == status::out_of_pages);
  REQUIRE(a[0].try_append(row, row) == status::out_of_pages);
  REQUIRE_FALSE(c.try_begin(1).has_value());
  require_same(a, a_model);
  require_same(b, b_model);
  require_same(c, c_model);

  c.clear();
  c_model.clear();
  append(a, a_model, 1, random);  // the page is its own again
  REQUIRE(pool.num_in_use() == 4);
  require_same(a, a_model);
  require_same(b, b_model);
  {
    const auto d = a.fork(16);
    REQUIRE(pool.ref_count(a.storage().page_table()[0]) == 3);
  }
  REQUIRE(pool.ref_count(a.storage().page_table()[0]) == 2);
  pool.check();
}

TEMPLATE_TEST_CASE("room reserved by a fork stays its own", "[conformance]", codec::bf16) {
  test::random random;
  auto pool = pool_of<TestType>(small, 3);
  auto a = pool.sequence();
  auto model = model_of<paged<TestType>>(small);
  append(a, model, 20, random);
  auto b = a.fork();
  auto b_model = model;
  // Room for 30 tokens, so that appends up to there cannot fail: the shared page has to be copied for that.
  REQUIRE(b.reserve(30) == status::ok);
  auto c = pool.sequence();
  auto c_model = model_of<paged<TestType>>(small);
  const std::vector<float> row = random_rows(random, small, 1);
  if (c[0].try_append(row, row) == status::ok) {
    c.check();
  }
  append(b, b_model, 10, random);
  require_same(b, b_model);
  require_same(a, model);
}

TEMPLATE_TEST_CASE("a pool is given back page by page and whole", "[conformance]", codec::f16) {
  test::random random;
  watched_memory memory;
  {
    kvcache::page_pool<TestType> pool(small, {.memory = &memory});
    auto a = pool.sequence();
    auto model = model_of<paged<TestType>>(small);
    append(a, model, 100, random);
    const auto use = pool.bytes();
    REQUIRE(use.total == use.in_use + use.free);
    REQUIRE(use.in_use == 7 * pool.page_bytes());
    REQUIRE(memory.bytes_out() == static_cast<std::size_t>(use.total));
    {
      std::vector<kvcache::paged_cache<TestType>> forks;
      for (index_t i = 0; i < 20; ++i) {
        forks.push_back(a.fork(i * 5));
        auto fork_model = model.fork(i * 5);
        append(forks.back(), fork_model, 3, random);
        require_same(forks.back(), fork_model);
      }
      REQUIRE(pool.num_in_use() > 7);
    }
    REQUIRE(pool.num_in_use() == 7);
    a.clear();
    REQUIRE(pool.num_in_use() == 0);
    pool.check();
  }
  REQUIRE(memory.bytes_out() == 0);
  REQUIRE(memory.mistakes() == 0);
}

TEST_CASE("a pool's budget must hold a page and keep what is allocated", "[conformance]") {
  using pool_type = kvcache::page_pool<codec::bf16>;
  const index_t page = pool_type(small).page_bytes();
  REQUIRE(page % 64 == 0);
  REQUIRE_THROWS_AS(pool_type(small, {.budget_bytes = page - 1}), kvcache::shape_error);
  REQUIRE_THROWS_AS(pool_type(small, {.budget_bytes = -1}), kvcache::shape_error);
  pool_type pool(small, {.budget_bytes = 3 * page - 1});
  REQUIRE(pool.num_pages() == 2);

  test::random random;
  auto a = pool.sequence();
  const std::vector<float> rows = random_rows(random, small, 33);
  REQUIRE(a[0].try_append(rows, rows) == status::out_of_pages);
  pool.set_budget(3 * page);
  REQUIRE(a[0].try_append(rows, rows) == status::ok);
  REQUIRE_THROWS_AS(pool.set_budget(page), kvcache::shape_error);
  REQUIRE(pool.num_pages() == 3);
  pool.check();
}

TEST_CASE("absurd reservations are answered with a status", "[conformance]") {
  constexpr index_t absurd = index_t{1} << 58;
  SECTION("contiguous") {
    auto cache = contiguous<codec::bf16>(small).make();
    REQUIRE(cache.reserve(absurd) == status::out_of_memory);
    cache.check();
  }
  SECTION("a pool with a budget") {
    auto pool = pool_of<codec::bf16>(small, 4);
    auto cache = pool.sequence();
    REQUIRE(cache.reserve(absurd) == status::out_of_pages);
    pool.check();
  }
}
