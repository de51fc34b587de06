// SPDX-License-Identifier: MIT
// The same bits whatever holds the blocks, wherever they lie and however the tokens came in. Whoever
// computes: see executors_test and threads_test.

#include "attention/problem.hpp"

#include <string>

using namespace attention_test;

TEMPLATE_TEST_CASE("every container gives the same bits", "[attention]", codec::f32, codec::f16,
                   codec::bf16) {
  test::random random;
  for (const problem& p : varied_problems(random)) {
    if (p.n.head_dim > 100) continue;
    const answer want = computed(p, filled<kvcache::contiguous_cache<TestType>>(p, 32)[0]);
    CAPTURE(p.n.q_len, p.n.kv_len);
    require_same_bits(computed(p, filled<kvcache::chunked_cache<TestType>>(p, 32)[0]), want);
    require_same_bits(computed(p, filled<kvcache::paged_cache<TestType>>(p, 32)[0]), want);
    const auto again = filled<kvcache::paged_cache<TestType>>(p, 32);
    require_same_bits(computed(p, again[0]), want);
    require_same_bits(computed(p, again.clone()[0]), want);
    require_same_bits(computed(p, again.fork()[0]), want);
  }
}

TEMPLATE_TEST_CASE("wherever the pages lie, the bits are the same", "[attention]", codec::f32, codec::bf16) {
  test::random random;
  const problem p =
      make_problem(random, {.q_len = 4, .kv_len = 300, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 12});
  const answer want = computed(p, filled<kvcache::contiguous_cache<TestType>>(p, 16)[0]);
  for (int round = 0; round < 5; ++round) {
    kvcache::page_pool<TestType> pool(shape_of(p, 16));
    // Pages taken and given back in random order leave a shuffled free list.
    std::vector<kvcache::paged_cache<TestType>> others;
    const std::vector<float> page(static_cast<std::size_t>(16 * 2 * 12), 7.0F);
    for (int i = 0; i < 30; ++i) {
      others.push_back(pool.sequence());
      others.back()[0].append(page, page);
    }
    while (!others.empty()) others.erase(others.begin() + random.below(static_cast<index_t>(others.size())));
    auto cache = pool.sequence();
    cache[0].append(p.k, p.v);
    const auto table = cache.storage().page_table();
    bool shuffled = false;
    for (std::size_t i = 1; i < table.size(); ++i) shuffled |= table[i] != static_cast<kvcache::page_id>(i);
    REQUIRE(shuffled);
    require_same_bits(computed(p, cache[0]), want);
  }
}

TEMPLATE_TEST_CASE("prefill gives the bits of decoding token by token", "[attention]", codec::f32, codec::f16,
                   codec::bf16) {
  test::random random;
  for (const index_t tokens : {1, 2, 17, 70}) {
    for (const index_t group : {1, 3, 17}) {
      problem p = make_problem(
          random,
          {.q_len = tokens, .kv_len = tokens, .num_q_heads = 2 * group, .num_kv_heads = 2, .head_dim = 21});
      const int kind = static_cast<int>(random.below(3));
      if (kind == 1) p.options.window = 9, p.options.sinks = 2;
      if (kind == 2) p.options.soft_cap = 3;
      CAPTURE(tokens, group, kind);
      const answer prefill = computed(p, filled<kvcache::contiguous_cache<TestType>>(p, 16)[0]);

      auto cache = empty_cache<kvcache::paged_cache<TestType>>(shape_of(p, 16));
      const auto row = static_cast<std::size_t>(2 * 21);
      const auto q_row = static_cast<std::size_t>(2 * group * 21);
      for (index_t t = 0; t < tokens; ++t) {
        const auto at = static_cast<std::size_t>(t);
        cache[0].append(std::span<const float>(p.k).subspan(at * row, row),
                        std::span<const float>(p.v).subspan(at * row, row));
        problem one = p;
        one.n.q_len = 1;
        one.n.kv_len = t + 1;
        one.q.assign(p.q.begin() + t * static_cast<index_t>(q_row),
                     p.q.begin() + (t + 1) * static_cast<index_t>(q_row));
        const answer decoded = computed(one, cache[0]);
        CAPTURE(t);
        if (!rows_are_alone(TestType::name)) {
          one.k.resize(static_cast<std::size_t>(t + 1) * row),
              one.v.resize(static_cast<std::size_t>(t + 1) * row);
          require_close(decoded, expected(one, TestType::name));
          continue;
        }
        REQUIRE(same_bits(decoded.out, {prefill.out.begin() + t * static_cast<index_t>(q_row),
                                        prefill.out.begin() + (t + 1) * static_cast<index_t>(q_row)}));
        REQUIRE(same_bits(decoded.lse,
                          {prefill.lse.begin() + t * 2 * group, prefill.lse.begin() + (t + 1) * 2 * group}));
      }
    }
  }
}

TEST_CASE("decode beyond one span gives the bits of prefill", "[attention]") {
  test::random random;
  // on AMX as well: ten rows or two with bf16 blocks would be multiplied in another way
  const problem p =
      make_problem(random, {.q_len = 4, .kv_len = 4099, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 6});
  auto cache = filled<kvcache::contiguous_cache<codec::bf16>>(p, 64);
  const answer prefill = computed(p, cache[0]);
  for (index_t i = 3; i >= 0; --i) {  // query i is for token 4095 + i
    cache.truncate(4096 + i);
    problem one = p;
    one.n.q_len = 1;
    one.n.kv_len = 4096 + i;
    one.q.assign(p.q.begin() + i * 12, p.q.begin() + (i + 1) * 12);
    const answer decoded = computed(one, cache[0]);
    CAPTURE(i);
    REQUIRE(same_bits(decoded.out, {prefill.out.begin() + i * 12, prefill.out.begin() + (i + 1) * 12}));
    REQUIRE(same_bits(decoded.lse, {prefill.lse.begin() + i * 2, prefill.lse.begin() + (i + 1) * 2}));
  }
}

TEST_CASE("every instruction set there is keeps to the bound", "[attention]") {
  test::random random;
  for (problem& p : varied_problems(random)) {
    if (p.n.head_dim > 100) continue;
    const auto cache = filled<kvcache::contiguous_cache<codec::bf16>>(p, 64);
    for (const kvcache::kernel::isa level : kvcache::kernel::available()) {
      CAPTURE(std::string(kvcache::kernel::to_string(level)), p.n.kv_len);
      p.options.kernel = &kvcache::kernel::select(level);
      require_close(computed(p, cache[0]), expected(p, "bf16"));
    }
  }
}
