// SPDX-License-Identifier: MIT
// What sets the three containers apart; what they share is in tests/conformance.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/core/address_space.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <memory_resource>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define KVCACHE_TEST_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#define KVCACHE_TEST_ADDRESS_SANITIZER __has_feature(address_sanitizer)
#else
#define KVCACHE_TEST_ADDRESS_SANITIZER 0
#endif

using namespace kvcache;

namespace {

constexpr cache_shape shape{.num_layers = 2, .num_kv_heads = 3, .head_dim = 8, .block_size = 16};
constexpr index_t token_size = 3 * 8;

/// Appends `count` random tokens to every layer.
template <class Cache>
void append(Cache& cache, index_t count, test::random& random) {
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    cache[layer].append(random.floats(count * token_size), random.floats(count * token_size));
  }
  cache.check();
}

template <class Cache>
std::vector<float> keys(const Cache& cache, index_t layer) {
  std::vector<float> k(static_cast<std::size_t>(cache.size() * token_size)), v(k.size());
  cache[layer].copy_out(0, cache.size(), k, v);
  return k;
}

/// Whether this system makes huge pages when asked to.
bool joins_pages() {
  const address_space space = address_space::reserve(address_space::huge_page);
  if (!space || !space.grant(0, address_space::huge_page)) return false;
  std::memset(space.data(), 1, static_cast<std::size_t>(address_space::huge_page));
  return space.join(0, address_space::huge_page);
}

/// Bytes of huge pages in the mapping around an address, as Linux tells; 0 where it does not.
index_t huge_bytes_at(const std::byte* address) {
  std::ifstream maps("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    unsigned long long first = 0, last = 0;
    unsigned long long kib = 0;
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (std::sscanf(line.c_str(), "%llx-%llx ", &first, &last) == 2) here = first <= at && at < last;
    if (here && std::sscanf(line.c_str(), "AnonHugePages: %llu kB", &kib) == 1)
      return static_cast<index_t>(kib) * 1024;
  }
  return 0;
}

}  // namespace

TEST_CASE("a contiguous cache grows in place", "[cache]") {
  test::random random;
  contiguous_cache<> cache(shape, {}, {.max_tokens = 4096});
  append(cache, 1, random);
  if (!cache.storage().grows_in_place()) return;  // a system without reserved addresses
  const std::byte* first = cache[0].block(0, 0);
  const std::byte* last = cache[1].block(2, 0);
  append(cache, 4000, random);
  CHECK(cache[0].block(0, 0) == first);
  CHECK(cache[1].block(2, 0) == last);
  CHECK(cache[0].block(0, 7) == first + 7 * codec::bf16{}.block_bytes({16, 8}));
}

TEST_CASE("a contiguous cache outgrows what it reserved and keeps its tokens", "[cache]") {
  test::random random;
  for (const index_t max_tokens : {0, 16, 40}) {
    contiguous_cache<codec::f32> cache(shape, {}, {.max_tokens = max_tokens});
    append(cache, 30, random);
    const std::vector<float> before = keys(cache, 1);
    append(cache, 500, random);
    std::vector<float> after = keys(cache, 1);
    after.resize(before.size());
    CHECK(after == before);
  }
}

TEST_CASE("a contiguous cache that grows token by token comes to lie in huge pages", "[cache]") {
  test::random random;
  constexpr cache_shape large{.num_layers = 2, .num_kv_heads = 2, .head_dim = 128};
  contiguous_cache<codec::f32> cache(large);
  chunked_cache<codec::f32> expected(large);
  const auto grow_to = [&](index_t size) {
    while (cache.size() < size) {
      const index_t count = std::min(index_t{50}, size - cache.size());
      const std::vector<float> k = random.floats(count * 2 * 128);
      const std::vector<float> v = random.floats(count * 2 * 128);
      for (index_t layer = 0; layer < large.num_layers; ++layer) {
        cache[layer].append(k, v);
        expected[layer].append(k, v);
      }
      cache.check();
    }
  };
  const auto same = [&](const auto& other) {
    for (index_t layer = 0; layer < large.num_layers; ++layer) {
      for (index_t head = 0; head < large.num_kv_heads; ++head) {
        for (index_t b = 0; b < cache.size() / 64; ++b) {
          const auto bytes = static_cast<std::size_t>(codec::f32{}.block_bytes({64, 128}));
          if (std::memcmp(other[layer].block(head, b), expected[layer].block(head, b), bytes) != 0)
            return false;
        }
      }
    }
    return true;
  };
  grow_to(9000);  // regions of 8.8 MiB
  CHECK(same(cache));
  if (joins_pages() && cache.storage().grows_in_place())
    CHECK(huge_bytes_at(cache[0].block(0, 0)) >= 4 << 20);
  cache.truncate(3000);
  cache.shrink_to_fit();
  expected.truncate(3000);
  grow_to(7000);
  CHECK(same(cache));
  const contiguous_cache<codec::f32> moved = std::move(cache);
  cache = moved.clone();
  CHECK(same(moved));
  grow_to(12000);
  CHECK(same(cache));
}

TEST_CASE("a contiguous cache with a memory resource doubles and copies", "[cache]") {
  test::random random;
  std::pmr::monotonic_buffer_resource memory;
  contiguous_cache<codec::f32> cache(shape, {}, {.memory = &memory});
  CHECK(!cache.storage().grows_in_place());
  std::vector<float> before;
  for (int i = 0; i < 40; ++i) {
    append(cache, 7, random);
    std::vector<float> now = keys(cache, 0);
    CHECK(std::equal(before.begin(), before.end(), now.begin()));
    before = std::move(now);
  }
  CHECK(cache.storage().num_blocks() >= 18);
  CHECK(cache.storage().num_blocks() <= 36);
}

TEST_CASE("shrink_to_fit gives memory back and keeps the tokens", "[cache]") {
  test::random random;
  std::pmr::memory_resource* memory =
      GENERATE(values<std::pmr::memory_resource*>({nullptr, huge_page_resource()}));
  contiguous_cache<codec::f32> cache(shape, {}, {.memory = memory});
  append(cache, 2000, random);
  cache.truncate(20);
  const std::vector<float> before = keys(cache, 1);
  const index_t held = cache.bytes().total;
  CHECK(held >= 2000 * bytes_per_token<codec::f32>(shape));  // truncate keeps memory
  cache.shrink_to_fit();
  cache.check();
  CHECK(cache.bytes().total < held / 10);
  CHECK(keys(cache, 1) == before);
  append(cache, 100, random);
  std::vector<float> after = keys(cache, 1);
  after.resize(before.size());
  CHECK(after == before);
  cache.clear();
  cache.shrink_to_fit();
  CHECK(cache.bytes().total == 0);
  append(cache, 3, random);
}

TEST_CASE("a chunked cache never moves a block and frees chunks on truncate", "[cache]") {
  test::random random;
  chunked_cache<> cache(shape, {}, {.blocks_per_chunk = 2});
  append(cache, 1, random);
  const std::byte* first = cache[1].block(2, 0);
  const index_t chunk = cache.bytes().total;
  CHECK(chunk == 2 * 3 * 2 * codec::bf16{}.block_bytes({16, 8}));
  append(cache, 99, random);  // 100 tokens, 7 blocks, 4 chunks
  CHECK(cache[1].block(2, 0) == first);
  CHECK(cache.bytes().total == 4 * chunk);
  cache.truncate(33);  // 3 blocks, 2 chunks
  CHECK(cache.bytes().total == 2 * chunk);
  cache.truncate(32);
  CHECK(cache.bytes().total == chunk);
  cache.clear();
  CHECK(cache.bytes().total == 0);
}

TEST_CASE("options that cannot be are refused", "[cache]") {
  CHECK_THROWS_AS((chunked_cache<>(shape, {}, {.blocks_per_chunk = 0})), shape_error);
  CHECK_THROWS_AS((contiguous_cache<>(shape, {}, {.max_tokens = -1})), shape_error);
  CHECK_THROWS_AS((page_pool<>(shape, {.budget_bytes = 100})), shape_error);  // not even one page
  CHECK_THROWS_AS((page_pool<>(shape, {.budget_bytes = -1})), shape_error);
  CHECK_THROWS_AS((contiguous_cache<>({.head_dim = 1000})), shape_error);
  CHECK_THROWS_AS((chunked_cache<>(shape, {}, {.blocks_per_chunk = index_t{1} << 62})), shape_error);
  CHECK_THROWS_AS((contiguous_cache<>(shape, {}, {.max_tokens = index_t{1} << 62})), shape_error);
}

TEST_CASE("forked sequences share pages until one of them writes", "[cache]") {
  test::random random;
  page_pool<> pool(shape);
  auto a = pool.sequence();
  append(a, 40, random);  // 3 pages, the last with 8 tokens
  CHECK(pool.num_in_use() == 3);
  auto b = a.fork();
  CHECK(pool.num_in_use() == 3);
  CHECK(a.bytes().shared == 3 * pool.page_bytes());
  CHECK(pool.bytes().shared == 3 * pool.page_bytes());
  CHECK(a[0].block(0, 2) == b[0].block(0, 2));

  append(b, 1, random);  // copies the last page only
  CHECK(pool.num_in_use() == 4);
  CHECK(a[0].block(0, 1) == b[0].block(0, 1));
  CHECK(a[0].block(0, 2) != b[0].block(0, 2));
  append(a, 1, random);  // nobody else has that page any more
  CHECK(pool.num_in_use() == 4);
  CHECK(pool.ref_count(a.storage().page_table()[0]) == 2);
  CHECK(pool.ref_count(a.storage().page_table()[2]) == 1);

  auto c = a.fork(20);  // in the middle of the second page
  CHECK(pool.num_in_use() == 4);
  CHECK(pool.ref_count(a.storage().page_table()[1]) == 3);
  append(c, 30, random);
  CHECK(pool.num_in_use() == 7);
  { const auto gone = std::move(c); }
  CHECK(pool.num_in_use() == 4);
  pool.check();
}

TEST_CASE("a pool keeps to its budget, and the budget can be changed", "[cache]") {
  test::random random;
  const index_t page = page_pool<>(shape).page_bytes();
  page_pool<> pool(shape, {.budget_bytes = 3 * page + page / 2});
  CHECK(pool.num_pages() == 3);
  auto a = pool.sequence();
  append(a, 48, random);
  CHECK(pool.num_free() == 0);
  const std::vector<float> one = random.floats(token_size);
  CHECK(a[0].try_append(one, one) == status::out_of_pages);
  CHECK(a.reserve(49) == status::out_of_pages);
  CHECK(!a.try_clone());
  CHECK(a.try_fork(48));
  CHECK(a.size() == 48);
  pool.check();

  pool.set_budget(4 * page);
  CHECK(a[0].try_append(one, one) == status::ok);
  CHECK_THROWS_AS(pool.set_budget(3 * page), shape_error);  // more is allocated
  a.clear();
  CHECK(pool.num_free() == 4);
  CHECK(pool.bytes() == pool_use{4 * page, 0, 4 * page, 0});
}

TEST_CASE("a copy on write that finds no page changes nothing", "[cache]") {
  test::random random;
  const index_t page = page_pool<codec::f32>(shape).page_bytes();
  page_pool<codec::f32> pool(shape, {.budget_bytes = 2 * page});
  auto a = pool.sequence();
  append(a, 20, random);
  auto b = a.fork();
  const std::vector<float> before = keys(b, 0);
  const std::vector<float> one = random.floats(token_size);
  CHECK(b[0].try_append(one, one) == status::out_of_pages);
  CHECK(b.size() == 20);
  CHECK(keys(b, 0) == before);
  CHECK(!b.try_begin(1));
  CHECK_THROWS_AS(b.begin(1), capacity_error);
  b.check();
  a.clear();
  CHECK(b[0].try_append(one, one) == status::ok);  // alone now: no copy needed
}

TEST_CASE("sequences outlive the pool object", "[cache]") {
  test::random random;
  auto pool = std::make_unique<page_pool<codec::f32>>(shape);
  auto a = pool->sequence();
  append(a, 20, random);
  auto b = a.fork(10);
  pool.reset();
  append(b, 50, random);
  CHECK(a.size() == 20);
  a = std::move(b);
  CHECK(a.size() == 60);
}

TEST_CASE("a page that goes from one sequence to another brings nothing along", "[cache]") {
  test::random random;
  page_pool<codec::f32> pool(shape, {.budget_bytes = page_pool<codec::f32>(shape).page_bytes()});
  {
    auto first = pool.sequence();
    append(first, 16, random);
  }
  auto second = pool.sequence();
  append(second, 1, random);
  const auto* floats = reinterpret_cast<const float*>(second[0].block(0, 0));
  const auto count = static_cast<std::size_t>(codec::f32{}.block_bytes({16, 8})) / sizeof(float);
  index_t not_zero = 0;
  for (std::size_t i = 0; i < count; ++i) not_zero += floats[i] != 0 ? 1 : 0;
  CHECK(not_zero <= 2 * 8);  // the one key and the one value
}

TEST_CASE("a contiguous cache of very many regions copies instead of running out of mappings", "[cache]") {
  const cache_shape many{.num_layers = 128, .num_kv_heads = 256, .head_dim = 8, .block_size = 16};
  contiguous_cache<> cache(many);
  const std::vector<float> one(256 * 8, 1.0F);
  for (index_t layer = 0; layer < many.num_layers; ++layer)
    REQUIRE(cache[layer].try_append(one, one) == status::ok);
  cache.check();
  CHECK(!cache.storage().grows_in_place());

  // Fewer regions each, but many caches: the mappings run out at some point, the memory does not.
  const cache_shape wide{.num_layers = 32, .num_kv_heads = 32, .head_dim = 8, .block_size = 16};
  std::vector<contiguous_cache<>> caches;
  for (int i = 0; i < 50; ++i) {
    caches.emplace_back(wide);
    REQUIRE(caches.back()[31].try_append(std::span(one).first(256), std::span(one).first(256)) == status::ok);
  }
}

#if !KVCACHE_TEST_ADDRESS_SANITIZER  // which stops the program where such an allocation ought to fail
TEST_CASE("room for more than the machine has is refused at once", "[cache]") {
  constexpr index_t absurd = index_t{1} << 50;
  contiguous_cache<> contiguous(shape);
  chunked_cache<> chunked(shape);
  page_pool<> pool(shape);
  auto paged = pool.sequence();
  CHECK(contiguous.reserve(absurd) == status::out_of_memory);
  CHECK(chunked.reserve(absurd) == status::out_of_memory);
  CHECK(paged.reserve(absurd) != status::ok);
  CHECK(chunked.reserve(std::numeric_limits<index_t>::max()) == status::out_of_memory);
  CHECK(!chunked.try_begin(std::numeric_limits<index_t>::max()));
  CHECK(chunked.bytes().total == 0);
  CHECK(pool.bytes().total == 0);
}
#endif

TEST_CASE("a pool gives back any slab whose pages are free, and takes memory again", "[cache]") {
  test::random random;
  page_pool<codec::f32> pool(shape, {.slab_bytes = 1});  // a page each
  auto a = pool.sequence();
  append(a, 16, random);
  auto b = pool.sequence();
  append(b, 16 * 5, random);
  auto c = pool.sequence();
  append(c, 16, random);
  const auto keys_of_a = keys(a, 0);
  const auto keys_of_c = keys(c, 0);
  const index_t pages = pool.allocated_bytes() / pool.page_bytes();
  b.truncate(16);  // its pages lie between those of the others
  pool.release_free();
  pool.check();
  CHECK(pool.allocated_bytes() == (pages - 4) * pool.page_bytes());
  CHECK(pool.bytes().total == pool.allocated_bytes());
  CHECK(keys(a, 0) == keys_of_a);
  CHECK(keys(c, 0) == keys_of_c);
  for (index_t more = 1; more < 7; ++more) {
    const index_t before = pool.allocated_bytes() + pool.books_bytes();
    const index_t most = pool.growth_bytes(1, 1 + more, false);
    append(b, 16, random);
    pool.check();
    CHECK(pool.allocated_bytes() + pool.books_bytes() <= before + most);
  }
  CHECK(pool.allocated_bytes() == (pages + 2) * pool.page_bytes());
  const index_t books = pool.books_bytes();
  b = pool.sequence();
  pool.release_free();
  CHECK(pool.allocated_bytes() == 2 * pool.page_bytes());
  CHECK(pool.books_bytes() < books);
  pool.check();
}

TEST_CASE("a pool gives unused memory back, and its budget can be lowered then", "[cache]") {
  test::random random;
  page_pool<codec::f32> pool(shape);
  auto a = pool.sequence();
  append(a, 64, random);
  auto b = pool.sequence();
  append(b, 16 * 400, random);
  CHECK_THROWS_AS(pool.set_budget(4 * pool.page_bytes()), shape_error);  // b is there
  b.clear();
  pool.release_free();
  CHECK(pool.bytes().total < 400 * pool.page_bytes());
  CHECK(keys(a, 0).size() == 64 * token_size);
  a.clear();
  pool.set_budget(4 * pool.page_bytes());
  CHECK(pool.bytes().total == 0);
  CHECK(pool.num_free() == 4);
  append(a, 64, random);
  pool.check();
}

TEST_CASE("nothing to write needs no page of its own", "[cache]") {
  test::random random;
  page_pool<> pool(shape, {.budget_bytes = 2 * page_pool<>(shape).page_bytes()});
  auto a = pool.sequence();
  append(a, 20, random);
  auto b = a.fork();
  CHECK(b.try_begin(0));
  CHECK(b.reserve(5) == status::ok);
  CHECK(b.reserve(21) == status::out_of_pages);
}

TEST_CASE("truncating to more than there is changes nothing, shifted or not", "[cache]") {
  test::random random;
  chunked_cache<> cache(shape);
  append(cache, 20, random);
  cache.shift(0, 10, 5);
  cache.shift(10, 20, 100);
  const index_t next = cache.positions()[20];
  cache.truncate(std::numeric_limits<index_t>::max());
  CHECK(cache.size() == 20);
  CHECK(cache.positions()[20] == next);
}

TEST_CASE("nothing of a page's last owner stays in blocks that are written whole", "[cache]") {
  // their bytes are those of so many tokens, and yet codes have padding
  const kvcache::cache_shape five_dims{.num_layers = 1, .num_kv_heads = 1, .head_dim = 5, .block_size = 32};
  using codec_type = kvcache::codec::rotated<2>;
  const auto bytes = static_cast<std::size_t>(codec_type{}.block_bytes(kvcache::geometry_of(five_dims)));
  kvcache::page_pool<codec_type> pool(five_dims);
  const std::vector<float> rows(32 * 5, 0.5F);
  const auto written = [&](int value) {
    {
      auto owner = pool.sequence();
      owner[0].append(rows, rows);
      std::memset(const_cast<std::byte*>(owner[0].block(0, 0)), value, bytes);
    }
    auto next = pool.sequence();
    next[0].append(rows, rows);
    return std::vector<std::byte>(next[0].block(0, 0), next[0].block(0, 0) + bytes);
  };
  CHECK(written(0) == written(0xab));
}
