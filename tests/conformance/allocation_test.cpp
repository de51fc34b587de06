// SPDX-License-Identifier: MIT
// Nothing allocates once it is warm: not append, not views, not attend. Every allocation of the process is
// counted, by replacing operator new, and those of the memory resource as well.

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/interop/any_cache.hpp>

#include "conformance/caches.hpp"
#include "support/heap.hpp"

#include <span>

using namespace conformance;

namespace {

constexpr cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 16, .block_size = 16};
constexpr index_t num_q_heads = 6;

/// Says that it has four workers, and has one.
struct four_workers {
  [[nodiscard]] index_t num_workers() const { return 4; }
  template <class Task>
  void run(index_t num_tasks, Task&& task) {
    for (index_t i = 0; i < num_tasks; ++i) task(i, i % 4);
  }
};

}  // namespace

TEST_CASE("the counter counts", "[conformance]") {
  REQUIRE(heap::allocations_in([] { const std::vector<int> x(3); }) == 1);
  REQUIRE(heap::allocations_in(
              [] { const kvcache::memory_block block(100, kvcache::huge_page_resource()); }) == 1);
  REQUIRE(heap::allocations_in([] {}) == 0);
}

TEMPLATE_TEST_CASE("append, views, steps and attend do not allocate in reserved room", "[conformance]",
                   ALL_CACHES) {
  test::random random;
  TestType source(shape);
  auto cache = source.make();
  REQUIRE(cache.reserve(200) == status::ok);
  const std::vector<float> k = random_rows(random, shape, 40);
  const std::vector<float> v = random_rows(random, shape, 40);
  const auto width = static_cast<std::size_t>(shape.num_kv_heads * shape.head_dim);
  bool all_well = true;

  const auto append = [&] {
    for (std::size_t t = 0; t < 30; ++t)  // one by one
      for (index_t layer = 0; layer < 2; ++layer)
        all_well &= cache[layer].try_append(std::span(k).subspan(t * width, width),
                                            std::span(v).subspan(t * width, width)) == status::ok;
    for (index_t layer = 0; layer < 2; ++layer) cache[layer].append(k, v);  // many
  };
  REQUIRE(heap::allocations_in(append) == 0);

  REQUIRE(heap::allocations_in([&] {
            auto step = cache.begin(40);
            for (index_t layer = 0; layer < 2; ++layer) cache[layer].append(k, v);
            step.commit();
          }) == 0);
  REQUIRE(cache.size() == 110);
  if (!TestType::shrinks) {  // elsewhere a dropped step may give reserved room back
    REQUIRE(heap::allocations_in([&] {
              auto step = cache.begin(40);
              cache[0].append(k, v);
            }) == 0);
  }

  std::vector<float> k_out(k.size());
  std::vector<float> v_out(v.size());
  index_t seen = 0;
  REQUIRE(heap::allocations_in([&] {
            for (index_t layer = 0; layer < 2; ++layer) {
              cache[layer].copy_out(3, 40, k_out, v_out, kv_layout::hnd);
              for (index_t head = 0; head < shape.num_kv_heads; ++head)
                for (const auto view : cache[layer].blocks(head)) seen += view.count;
            }
            all_well &= cache.size() == 110 && cache.bytes().payload > 0 && cache.positions()[5] == 5;
          }) == 0);
  REQUIRE(seen == 2 * 2 * 110);
  REQUIRE(all_well);

  for (const index_t q_len : {1, 20}) {
    const std::vector<float> q = random.floats(q_len * num_q_heads * shape.head_dim);
    std::vector<float> out(q.size());
    std::vector<float> lse(static_cast<std::size_t>(q_len * num_q_heads));
    const std::vector<float> slopes(static_cast<std::size_t>(num_q_heads), 0.1F);
    const std::vector<std::uint8_t> mask(static_cast<std::size_t>(q_len * q_len), 1);
    REQUIRE(heap::allocations_in([&] { kvcache::attend(q, cache[1], out, {.q_len = q_len}); }) == 0);
    REQUIRE(heap::allocations_in([&] {
              kvcache::attend(q, cache[1], out,
                              {.q_len = q_len,
                               .window = 30,
                               .sinks = 4,
                               .soft_cap = 5,
                               .alibi_slopes = slopes,
                               .mask = mask,
                               .lse = lse});
            }) == 0);
  }
}

TEMPLATE_TEST_CASE("several queries of 128 dims do not allocate either", "[conformance]", codec::f32,
                   codec::bf16, codec::int8) {
  test::random random;
  constexpr cache_shape wide{.num_kv_heads = 2, .head_dim = 128};
  kvcache::contiguous_cache<TestType> cache(wide);
  const std::vector<float> rows = random_rows(random, wide, 100);
  cache[0].append(rows, rows);
  for (const index_t group_size : {1, 4, 32}) {
    const index_t q_len = 64 / group_size;
    const std::vector<float> q = random.floats(q_len * group_size * wide.num_kv_heads * wide.head_dim);
    std::vector<float> out(q.size());
    CAPTURE(group_size);
    REQUIRE(heap::allocations_in([&] { kvcache::attend(q, cache[0], out, {.q_len = q_len}); }) == 0);
  }
}

TEMPLATE_TEST_CASE("decode on and on in a cache that was this long before does not allocate", "[conformance]",
                   contiguous<codec::bf16>, contiguous_in_memory<codec::f32>, paged<codec::bf16>) {
  test::random random;
  TestType source(shape);
  auto cache = source.make();
  const std::vector<float> rows = random_rows(random, shape, 1);
  const std::vector<float> q = random.floats(num_q_heads * shape.head_dim);
  std::vector<float> out(q.size());
  const auto decode = [&] {
    for (int t = 0; t < 150; ++t) {
      for (index_t layer = 0; layer < 2; ++layer) {
        cache[layer].append(rows, rows);
        kvcache::attend(q, cache[layer], out);
      }
    }
  };
  decode();
  cache.clear();
  REQUIRE(heap::allocations_in(decode) == 0);
  cache.truncate(7);
  REQUIRE(heap::allocations_in([&] {
            for (int t = 0; t < 100; ++t)
              for (index_t layer = 0; layer < 2; ++layer) cache[layer].append(rows, rows);
          }) == 0);
}

TEST_CASE("writing to a fork copies its page without allocating when the pool has free ones",
          "[conformance]") {
  test::random random;
  paged<codec::bf16> source(shape);
  auto parent = source.make();
  const std::vector<float> rows = random_rows(random, shape, 20);
  for (index_t layer = 0; layer < 2; ++layer) parent[layer].append(rows, rows);
  auto child = parent.fork();
  const std::vector<float> row = random_rows(random, shape, 1);
  REQUIRE(heap::allocations_in([&] { child[0].append(row, row); }) == 0);
}

TEST_CASE("a memory resource is asked once for each slab, chunk or doubling, and never by views",
          "[conformance]") {
  test::random random;
  const std::vector<float> row = random_rows(random, shape, 1);
  const auto count = [&](auto make_source) {
    watched_memory memory;
    auto source = make_source(&memory);
    auto cache = source.make();
    for (int t = 0; t < 16 * 30; ++t)
      for (index_t layer = 0; layer < 2; ++layer) cache[layer].append(row, row);
    const auto after = memory.allocations();
    std::vector<float> k(row.size());
    cache[1].copy_out(17, 1, k, k);
    REQUIRE(memory.allocations() == after);
    return after;
  };
  REQUIRE(count([](auto* m) { return chunked<codec::f32>(shape, m); }) == 30);
  REQUIRE(count([](auto* m) { return chunked_by_3<codec::f32>(shape, m); }) == 10);
  REQUIRE(count([](auto* m) { return contiguous_in_memory<codec::f32>(shape, m); }) ==
          6);  // 1, 2, 4, 8, 16, 32 blocks
  REQUIRE(count([](auto* m) { return paged<codec::f32>(shape, m); }) == 1);
}

TEST_CASE("attend with a workspace allocates for the largest call and no more", "[conformance]") {
  test::random random;
  const cache_shape wide{.num_layers = 1, .num_kv_heads = 1, .head_dim = 512, .block_size = 64};
  auto cache = contiguous<codec::bf16>(wide).make();
  const std::vector<float> rows = random_rows(random, wide, 20);
  cache[0].append(rows, rows);
  const std::vector<float> q = random.floats(40 * 512);
  std::vector<float> out(q.size());
  kvcache::attend_workspace workspace;
  const auto decode = [&] { kvcache::attend(q, cache[0], out, {.workspace = &workspace}); };
  decode();
  REQUIRE(heap::allocations_in(decode) == 0);
}

TEST_CASE("attend with an executor and a workspace does not allocate once warm", "[conformance]") {
  test::random random;
  const cache_shape long_shape{.num_layers = 1, .num_kv_heads = 2, .head_dim = 16, .block_size = 64};
  auto cache = contiguous<codec::bf16>(long_shape).make();
  const std::vector<float> rows = random_rows(random, long_shape, 4100);  // three spans
  cache[0].append(rows, rows);
  const std::vector<float> q = random.floats(4 * 16);
  std::vector<float> out(q.size());
  kvcache::attend_workspace workspace;
  four_workers executor;
  const auto split = [&] { kvcache::attend(q, cache[0], out, {.workspace = &workspace}, executor); };
  split();
  REQUIRE(heap::allocations_in(split) == 0);

  using layer = decltype(cache[0]);
  std::vector<float> outs(50 * out.size());
  std::vector<kvcache::attend_item<layer>> batch;
  for (std::size_t i = 0; i < 50; ++i)
    batch.push_back({q, cache[0], std::span(outs).subspan(i * out.size(), out.size())});
  const auto many = [&] {
    kvcache::attend(std::span<const kvcache::attend_item<layer>>(batch), {.workspace = &workspace}, executor);
  };
  many();
  REQUIRE(heap::allocations_in(many) == 0);
  for (std::size_t i = 0; i < outs.size(); ++i) REQUIRE(outs[i] == out[i % out.size()]);
}

TEST_CASE("a batch of any_cache allocates for as many items of typed caches, and nothing else",
          "[conformance]") {
  test::random random;
  std::vector<kvcache::any_cache> caches;
  caches.emplace_back("contiguous", contiguous<codec::bf16>(shape).make());
  caches.emplace_back("chunked", chunked<codec::int8>(shape).make());
  const std::vector<float> rows = random_rows(random, shape, 40);
  for (const auto& cache : caches) cache[0].append(rows, rows);
  const std::vector<float> q = random.floats(num_q_heads * shape.head_dim);
  std::vector<float> outs(50 * q.size());
  std::vector<kvcache::attend_item<kvcache::any_layer>> batch;
  for (std::size_t i = 0; i < 50; ++i)
    batch.push_back({q, caches[i % 2][0], std::span(outs).subspan(i * q.size(), q.size())});
  const std::span<const kvcache::attend_item<kvcache::any_layer>> many(batch);
  REQUIRE(heap::allocations_in([&] { kvcache::attend(many.first(32)); }) == 0);
  REQUIRE(heap::allocations_in([&] { kvcache::attend(many); }) == 2);  // the offsets of tasks, for each type
  kvcache::attend_workspace workspace;
  four_workers executor;
  const auto warm = [&] { kvcache::attend(many, {.workspace = &workspace}, executor); };
  warm();
  REQUIRE(heap::allocations_in(warm) == 0);
}

TEST_CASE("rotation does not allocate", "[conformance]") {
  test::random random;
  const kvcache::rope_table table({.head_dim = 16, .pairing = kvcache::rope_pairing::half}, 32);
  std::vector<float> q = random.floats(4 * 6 * 16);
  std::vector<float> k = random.floats(4 * 2 * 16);
  REQUIRE(heap::allocations_in([&] { kvcache::rope(q, k, 30, table, 4); }) == 0);
}
