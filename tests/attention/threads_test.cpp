// SPDX-License-Identifier: MIT
// attend on threads: the tasks of one call side by side, and calls of different threads on one cache and on
// one pool.

#include "attention/problem.hpp"

#include <atomic>
#include <limits>
#include <span>
#include <thread>
#include <vector>

using namespace attention_test;

namespace {

/// Threads of its own, each taking the next task.
struct threads {
  index_t count;

  [[nodiscard]] index_t num_workers() const { return count; }
  void run(index_t num_tasks, kvcache::task_ref task) const {
    std::atomic<index_t> next{0};
    std::vector<std::thread> all;
    for (index_t w = 0; w < count; ++w)
      all.emplace_back([&, w] {
        for (index_t i = next++; i < num_tasks; i = next++) task(i, w);
      });
    for (std::thread& t : all) t.join();
  }
};

}  // namespace

TEST_CASE("any number of threads gives the same bits", "[attention][threads]") {
  test::random random;
  for (const problem& p : varied_problems(random)) {
    CAPTURE(p.n.q_len, p.n.kv_len, p.n.head_dim);
    const auto cache = filled<kvcache::contiguous_cache<codec::bf16>>(p, 64);
    const answer want = computed(p, cache[0]);
    for (const index_t n : {1, 2, 3, 8}) {
      CAPTURE(n);
      require_same_bits(computed(p, cache[0], threads{n}), want);
    }
    kvcache::attend_workspace workspace;
    problem with = p;
    with.options.workspace = &workspace;
    require_same_bits(computed(with, cache[0], threads{3}), want);
    require_same_bits(computed(with, cache[0], threads{2}), want);
  }
}

TEST_CASE("a batch on many workers gives the bits of single calls", "[attention][threads]") {
  test::random random;
  std::vector<kvcache::paged_cache<codec::bf16>> caches;
  std::vector<problem> all;
  kvcache::page_pool<codec::bf16> pool(
      {.num_layers = 1, .num_kv_heads = 2, .head_dim = 16, .block_size = 32});
  for (const index_t kv_len : {1, 64, 4100, 31, 2500, 700}) {
    all.push_back(make_problem(random, {.q_len = kv_len == 64 ? 9 : 1,
                                        .kv_len = kv_len,
                                        .num_q_heads = 4,
                                        .num_kv_heads = 2,
                                        .head_dim = 16}));
    caches.push_back(pool.sequence());
    caches.back()[0].append(all.back().k, all.back().v);
  }
  using layer_type = decltype(caches[0][0]);
  auto empty = pool.sequence();
  const std::vector<float> empty_q(4 * 16, 1.0F);
  const std::vector<index_t> empty_positions = {0};
  for (const index_t n : {2, 3, 16}) {
    std::vector<answer> got;
    std::vector<kvcache::attend_item<layer_type>> batch;
    for (const problem& p : all)
      got.push_back(
          {std::vector<float>(p.q.size()), std::vector<float>(static_cast<std::size_t>(p.n.q_len * 4))});
    for (std::size_t i = 0; i < all.size(); ++i)
      batch.push_back({.q = all[i].q,
                       .layer = caches[i][0],
                       .out = got[i].out,
                       .q_len = all[i].n.q_len,
                       .lse = got[i].lse});
    answer of_empty{std::vector<float>(empty_q.size(), 1.0F), std::vector<float>(4, 1.0F)};
    batch.insert(batch.begin() + 2, {.q = empty_q,
                                     .layer = empty[0],
                                     .out = of_empty.out,
                                     .q_positions = empty_positions,
                                     .lse = of_empty.lse});
    kvcache::attend(std::span<const kvcache::attend_item<layer_type>>(batch), {}, threads{n});
    for (std::size_t i = 0; i < all.size(); ++i) {
      CAPTURE(n, i);
      require_same_bits(got[i], computed(all[i], caches[i][0]));
    }
    CHECK(of_empty.out == std::vector<float>(empty_q.size(), 0.0F));
    CHECK(of_empty.lse == std::vector<float>(4, -std::numeric_limits<float>::infinity()));
  }
}

TEST_CASE("many threads may read one cache, and sequences of one pool, at the same time",
          "[attention][threads]") {
  test::random random;
  const problem p =
      make_problem(random, {.q_len = 2, .kv_len = 300, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 16});
  kvcache::page_pool<codec::f16> pool(shape_of(p, 16));
  auto first = pool.sequence();
  first[0].append(p.k, p.v);
  const auto second = first.fork();
  const answer want = computed(p, first[0]);
  std::vector<answer> got(6);
  std::vector<std::thread> all;
  for (std::size_t i = 0; i < got.size(); ++i)
    all.emplace_back([&, i] {
      const auto& cache = i % 2 == 0 ? std::as_const(first) : second;
      got[i] = computed(p, cache[0]);
      std::vector<float> k(p.k.size());
      cache[0].copy_out(0, cache.size(), k, k);
      (void)cache.bytes();
    });
  for (std::thread& t : all) t.join();
  for (const answer& a : got) require_same_bits(a, want);
}
