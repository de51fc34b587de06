// SPDX-License-Identifier: MIT
// Inputs meant to break attention: extreme logits, equal and huge keys, rows that see nothing, denormals, and
// NaN or infinity wherever a query must not look.

#include "attention/problem.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

using namespace attention_test;

namespace {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

template <class F>
void for_each_codec(const problem& p, F check) {
  for (const index_t block_size : {16, 64}) {
    CAPTURE(block_size);
    check(computed(p, filled<kvcache::contiguous_cache<codec::f32>>(p, block_size)[0]), "f32");
    check(computed(p, filled<kvcache::contiguous_cache<codec::f16>>(p, block_size)[0]), "f16");
    check(computed(p, filled<kvcache::contiguous_cache<codec::bf16>>(p, block_size)[0]), "bf16");
  }
}

void check_all(const problem& p, double slack = 1) {
  for_each_codec(p, [&](const answer& a, const char* codec) {
    CAPTURE(codec);
    require_close(a, expected(p, codec), slack);
  });
}

/// Overwrites one number in each row of keys and values that `poisoned(token)` picks.
template <class Pick>
problem with_poison(problem p, float poison, Pick poisoned) {
  const index_t width = p.n.num_kv_heads * p.n.head_dim;
  for (index_t t = 0; t < p.n.kv_len; ++t) {
    if (!poisoned(t)) continue;
    for (index_t i = 0; i < width; ++i) {
      p.k[static_cast<std::size_t>(t * width + i)] = i % 3 == 0 ? poison : 1.0F;
      p.v[static_cast<std::size_t>(t * width + i)] = i % 2 == 0 ? poison : -1.0F;
    }
  }
  return p;
}

}  // namespace

TEST_CASE("large logits do not overflow", "[attention]") {
  test::random random;
  for (const float size : {30.0F, 300.0F, 6000.0F}) {
    problem p =
        make_problem(random, {.q_len = 3, .kv_len = 70, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 16});
    for (float& x : p.q) x *= size;
    CAPTURE(size);
    check_all(p);
    for (float& x : p.k) x *= 10;
    check_all(p);
  }
}

TEST_CASE("logits that are all very negative count like any others", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 2, .kv_len = 40, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 8});
  for (float& x : p.q) x = -100;
  for (float& x : p.k) x = std::abs(x) + 20;
  check_all(p);
}

TEST_CASE("equal keys average the values, and lse counts them", "[attention]") {
  test::random random;
  for (const index_t kv_len : {1, 16, 37, 300}) {
    problem p = make_problem(
        random, {.q_len = 1, .kv_len = kv_len, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 8});
    for (std::size_t i = 0; i < p.k.size(); ++i) p.k[i] = static_cast<float>(i % 8);
    check_all(p);
    std::fill(p.k.begin(), p.k.end(), 0.0F);
    check_all(p);
    for_each_codec(p, [&](const answer& a, const char*) {
      for (const float lse : a.lse) REQUIRE(std::abs(lse - std::log(static_cast<float>(kv_len))) < 2e-6F);
    });
    std::fill(p.v.begin(), p.v.end(), 1.5F);
    for_each_codec(p, [&](const answer& a, const char*) {
      for (const float x : a.out) REQUIRE(std::abs(x - 1.5F) < 1e-6F);
    });
  }
}

TEST_CASE("equal values average to themselves, however many", "[attention]") {
  test::random random;
  for (const index_t kv_len : {64, 2048, 5000}) {
    for (const float value : {1.1F, 1.3F, -1.9F}) {  // rounding errors of such sums all go the same way
      problem p = make_problem(
          random, {.q_len = 1, .kv_len = kv_len, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 20});
      std::fill(p.k.begin(), p.k.end(), 0.0F);
      std::fill(p.v.begin(), p.v.end(), value);
      CAPTURE(kv_len, value);
      check_all(p);
    }
  }
}

TEST_CASE("one huge key takes all the weight", "[attention]") {
  test::random random;
  for (const index_t huge : {0, 15, 16, 40, 69}) {
    problem p =
        make_problem(random, {.q_len = 1, .kv_len = 70, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 4});
    for (float& x : p.q) x = std::abs(x) + 1;
    for (index_t d = 0; d < 4; ++d) p.k[static_cast<std::size_t>(huge * 4 + d)] = 3000;
    CAPTURE(huge);
    check_all(p);
    for_each_codec(p, [&](const answer& a, const char* codec) {
      for (std::size_t i = 0; i < a.out.size(); ++i)
        REQUIRE(a.out[i] == oracle::stored(p.v[static_cast<std::size_t>(huge * 4) + i % 4], codec));
    });
  }
}

TEST_CASE("a huge value weighs what its key says", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 2, .kv_len = 50, .num_q_heads = 2, .num_kv_heads = 2, .head_dim = 4});
  p.v[20] = 60000;
  p.v[61] = -60000;
  check_all(p);
}

TEST_CASE("a row that sees nothing is zero, and its lse minus infinity", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 4, .kv_len = 40, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 6});
  const auto check_row = [&](index_t row) {
    check_all(p);
    for_each_codec(p, [&](const answer& a, const char*) {
      for (index_t h = 0; h < 4; ++h) {
        REQUIRE(a.lse[static_cast<std::size_t>(row * 4 + h)] == -infinity);
        for (index_t d = 0; d < 6; ++d)
          REQUIRE(a.out[static_cast<std::size_t>((row * 4 + h) * 6 + d)] == 0.0F);
      }
    });
  };
  SECTION("by a mask") {
    p.mask.assign(4 * 40, 1);
    std::fill(p.mask.begin() + 2 * 40, p.mask.begin() + 3 * 40, std::uint8_t{0});
    check_row(2);
  }
  SECTION("by positions before all keys") {
    p.q_positions = {50, -1, 3, 20};
    check_row(1);
  }
  SECTION("by a window that lies before all keys") {
    p.q_positions = {39, 38, 37, 100};
    p.options.window = 10;
    check_row(3);
  }
  SECTION("by everything, in every row") {
    p.mask.assign(4 * 40, 0);
    for (const index_t row : {0, 1, 2, 3}) check_row(row);
  }
}

TEST_CASE("an empty cache is attended over without causality", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 2, .kv_len = 0, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 6});
  p.options.causal = false;
  check_all(p);
}

TEST_CASE("denormals go through", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 2, .kv_len = 40, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 8});
  SECTION("in the queries") {
    for (float& x : p.q) x *= 1e-40F;
  }
  SECTION("in the keys") {
    for (float& x : p.k) x *= 1e-40F;
  }
  SECTION("in all") {
    for (float& x : p.q) x *= 1e-40F;
    for (float& x : p.k) x *= 1e-40F;
  }
  SECTION("of half precision") {
    for (float& x : p.k) x *= 1e-6F;
    for (float& x : p.v) x *= 1e-6F;
  }
  check_all(p);
}

TEST_CASE("NaN and infinity in keys and values that are not seen do not leak", "[attention]") {
  test::random random;
  const float poison =
      GENERATE(values<float>({not_a_number, infinity, -infinity, std::numeric_limits<float>::max()}));
  CAPTURE(poison);
  problem p =
      make_problem(random, {.q_len = 6, .kv_len = 90, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 10});

  const auto same_as_without = [&](auto hidden) {
    const problem poisoned = with_poison(p, poison, hidden);
    for (const index_t block_size : {16, 64}) {
      CAPTURE(block_size);
      require_same_bits(
          computed(poisoned, filled<kvcache::contiguous_cache<codec::f32>>(poisoned, block_size)[0]),
          computed(p, filled<kvcache::contiguous_cache<codec::f32>>(p, block_size)[0]));
      require_same_bits(computed(poisoned, filled<kvcache::paged_cache<codec::f16>>(poisoned, block_size)[0]),
                        computed(p, filled<kvcache::paged_cache<codec::f16>>(p, block_size)[0]));
      require_same_bits(
          computed(poisoned, filled<kvcache::chunked_cache<codec::bf16>>(poisoned, block_size)[0]),
          computed(p, filled<kvcache::chunked_cache<codec::bf16>>(p, block_size)[0]));
    }
    check_all(poisoned);
  };

  SECTION("later tokens") {
    p.q_positions = {80, 81, 82, 83, 84, 85};
    same_as_without([](index_t t) { return t > 85; });
  }
  SECTION("before the window") {
    p.options.window = 20;
    same_as_without([](index_t t) { return t < 65; });
  }
  SECTION("between sinks and window") {
    p.options.window = 20;
    p.options.sinks = 5;
    same_as_without([](index_t t) { return t >= 5 && t < 65; });
  }
  SECTION("masked for all") {
    p.mask.assign(6 * 90, 1);
    for (std::size_t i = 0; i < p.mask.size(); ++i)
      if (i % 90 % 7 == 3) p.mask[i] = 0;
    same_as_without([](index_t t) { return t % 7 == 3; });
  }
  SECTION("everything but one token") {
    p.mask.assign(6 * 90, 0);
    for (std::size_t i = 0; i < p.mask.size(); ++i)
      if (i % 90 == 47) p.mask[i] = 1;
    same_as_without([](index_t t) { return t != 47; });
  }
  SECTION("with soft cap and ALiBi") {
    p.options.window = 20;
    p.options.soft_cap = 5;
    p.alibi_slopes = {0.5F, 0.25F, 0.1F, 0.01F};
    same_as_without([](index_t t) { return t < 65; });
  }
}

TEST_CASE("NaN in a key that some rows see stays with those rows and that head", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 6, .kv_len = 40, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 10});
  const problem clean = p;
  p.k[static_cast<std::size_t>((37 * 2 + 1) * 10 + 4)] =
      not_a_number;  // token 37: rows 3, 4, 5 of query heads 2 and 3
  const answer got = computed(p, filled<kvcache::contiguous_cache<codec::bf16>>(p, 16)[0]);
  const answer want = computed(clean, filled<kvcache::contiguous_cache<codec::bf16>>(clean, 16)[0]);
  for (std::size_t i = 0; i < 6; ++i) {
    for (std::size_t h = 0; h < 4; ++h) {
      CAPTURE(i, h);
      const bool hit = i >= 3 && h >= 2;
      REQUIRE(std::isnan(got.lse[i * 4 + h]) == hit);
      for (std::size_t d = 0; d < 10; ++d) {
        const std::size_t at = (i * 4 + h) * 10 + d;
        if (hit)
          REQUIRE(std::isnan(got.out[at]));
        else
          REQUIRE(got.out[at] == want.out[at]);
      }
    }
  }
}

TEMPLATE_TEST_CASE("what truncated tokens left behind is never read", "[attention]",
                   kvcache::contiguous_cache<codec::f32>, kvcache::chunked_cache<codec::f16>,
                   kvcache::paged_cache<codec::bf16>) {
  test::random random;
  const problem p =
      make_problem(random, {.q_len = 3, .kv_len = 37, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 5});
  const std::vector<float> poison(60 * 5, not_a_number);
  auto dirty = empty_cache<TestType>(shape_of(p, 64));
  dirty[0].append(poison, poison);
  dirty.truncate(0);
  dirty[0].append(poison, poison);
  dirty.truncate(1);
  dirty.truncate(0);
  const std::span<const float> k = p.k;
  const std::span<const float> v = p.v;
  dirty[0].append(k.first(10 * 5), v.first(10 * 5));
  dirty[0].append(poison, poison);
  dirty.truncate(10);
  dirty[0].append(k.subspan(10 * 5), v.subspan(10 * 5));
  require_same_bits(computed(p, dirty[0]), computed(p, filled<TestType>(p, 64)[0]));
}

TEST_CASE("visible infinities act as in exact arithmetic", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 1, .kv_len = 70, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 20});
  for (float& x : p.q) x = 1;
  SECTION("a key of minus infinity has no weight") {
    p.k[5 * 40 + 3] = -infinity;
    const answer a = computed(p, filled<kvcache::contiguous_cache<codec::bf16>>(p, 64)[0]);
    for (const float x : a.out) REQUIRE(std::isfinite(x));
    problem without = p;
    without.mask.assign(70, 1);
    without.mask[5] = 0;
    without.options.causal = false;
    const answer b = computed(without, filled<kvcache::contiguous_cache<codec::bf16>>(without, 64)[0]);
    REQUIRE(
        same_bits({a.out.begin(), a.out.begin() + 40}, {b.out.begin(), b.out.begin() + 40}));  // KV head 0
  }
  SECTION("an infinite value stays in its dim") {
    p.v[5 * 40 + 3] = infinity;
    const answer a = computed(p, filled<kvcache::contiguous_cache<codec::bf16>>(p, 64)[0]);
    for (std::size_t i = 0; i < a.out.size(); ++i) {
      const bool hit = i < 40 && i % 20 == 3;
      REQUIRE((hit ? a.out[i] == infinity : std::isfinite(a.out[i])));
    }
  }
}
