// SPDX-License-Identifier: MIT
// Every option of attend, alone and together, against the oracle.

#include "attention/problem.hpp"

#include <algorithm>
#include <functional>
#include <string>

using namespace attention_test;

namespace {

/// Problems of several sizes, their options set by `change`, over a cache of each codec.
void check_option(const std::string& what, const std::function<void(problem&, test::random&)>& change) {
  std::uint64_t stream = 0;
  for (const char c : what) stream = stream * 31 + static_cast<unsigned char>(c);
  test::random random(stream);
  const problem_size sizes[] = {
      {.q_len = 1, .kv_len = 1, .num_q_heads = 1, .num_kv_heads = 1, .head_dim = 4},
      {.q_len = 1, .kv_len = 77, .num_q_heads = 6, .num_kv_heads = 2, .head_dim = 20},
      {.q_len = 5, .kv_len = 64, .num_q_heads = 4, .num_kv_heads = 4, .head_dim = 33},
      {.q_len = 9, .kv_len = 100, .num_q_heads = 8, .num_kv_heads = 1, .head_dim = 10},
      {.q_len = 24, .kv_len = 24, .num_q_heads = 3, .num_kv_heads = 3, .head_dim = 7},
      {.q_len = 6, .kv_len = 70, .num_q_heads = 6, .num_kv_heads = 3, .head_dim = 64},
  };
  for (const problem_size& n : sizes) {
    problem p = make_problem(random, n);
    change(p, random);
    CAPTURE(what, n.q_len, n.kv_len, n.num_q_heads, n.num_kv_heads, n.head_dim);
    require_close(computed(p, filled<kvcache::contiguous_cache<codec::f32>>(p, 16)[0]), expected(p, "f32"));
    require_close(computed(p, filled<kvcache::chunked_cache<codec::f16>>(p, 64)[0]), expected(p, "f16"));
    require_close(computed(p, filled<kvcache::paged_cache<codec::bf16>>(p, 32)[0]), expected(p, "bf16"));
  }
}

std::vector<float> alibi(index_t heads) {
  std::vector<float> slopes;
  for (index_t h = 1; h <= heads; ++h)
    slopes.push_back(std::exp2(-8.0F * static_cast<float>(h) / static_cast<float>(heads)));
  return slopes;
}

/// A random mask; a row may be left with nothing.
std::vector<std::uint8_t> random_mask(index_t rows, index_t columns, double share, test::random& random) {
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(rows * columns));
  for (auto& bit : mask)
    bit = random.chance(share) ? static_cast<std::uint8_t>(random.between(1, 255)) : std::uint8_t{0};
  return mask;
}

/// Positions that jump, and repeat where `repeat`.
std::vector<index_t> random_positions(index_t n, bool repeat, test::random& random) {
  std::vector<index_t> positions;
  index_t p = random.below(5);
  for (index_t i = 0; i < n; ++i) {
    positions.push_back(p);
    p += repeat ? random.below(3) : random.between(1, 4);
  }
  return positions;
}

void set_positions(problem& p, test::random& random, bool repeat = false) {
  p.k_positions = random_positions(p.n.kv_len, repeat, random);
  p.q_positions.assign(p.k_positions.end() - p.n.q_len, p.k_positions.end());
}

}  // namespace

TEST_CASE("causal attention is the definition", "[attention]") {
  check_option("causal", [](problem&, test::random&) {});
}

TEST_CASE("without causality every key is seen", "[attention]") {
  check_option("not causal", [](problem& p, test::random&) { p.options.causal = false; });
}

TEST_CASE("a scale of one's own replaces 1/sqrt(head_dim)", "[attention]") {
  check_option("scale",
               [](problem& p, test::random& random) { p.options.scale = random.uniform(0.01F, 1.0F); });
  check_option("scale zero", [](problem& p, test::random&) { p.options.scale = 0.0F; });
  check_option("scale negative", [](problem& p, test::random&) { p.options.scale = -0.3F; });
}

TEST_CASE("a window hides what lies further back", "[attention]") {
  for (const index_t window : {1, 2, 7, 15, 16, 17, 64, 1000}) {
    check_option("window " + std::to_string(window),
                 [&](problem& p, test::random&) { p.options.window = window; });
    check_option("open window " + std::to_string(window), [&](problem& p, test::random&) {
      p.options.window = window;
      p.options.causal = false;
    });
  }
}

TEST_CASE("sinks stay visible outside the window", "[attention]") {
  for (const index_t window : {1, 5, 16, 40}) {
    for (const index_t sinks : {1, 4, 16, 17, 60, 500}) {
      check_option("window " + std::to_string(window) + ", sinks " + std::to_string(sinks),
                   [&](problem& p, test::random&) {
                     p.options.window = window;
                     p.options.sinks = sinks;
                   });
    }
  }
  check_option("sinks without a window", [](problem& p, test::random&) { p.options.sinks = 4; });
}

TEST_CASE("a soft cap bounds the logits", "[attention]") {
  for (const float cap : {0.5F, 3.0F, 50.0F})
    check_option("soft cap " + std::to_string(cap), [&](problem& p, test::random&) {
      p.options.soft_cap = cap;
      p.options.scale = 1.0F;
    });
}

TEST_CASE("ALiBi lowers logits with distance", "[attention]") {
  check_option("alibi", [](problem& p, test::random&) { p.alibi_slopes = alibi(p.n.num_q_heads); });
  check_option("alibi, some slopes zero", [](problem& p, test::random&) {
    p.alibi_slopes = alibi(p.n.num_q_heads);
    p.alibi_slopes[0] = 0;
  });
  check_option("alibi without causality", [](problem& p, test::random&) {
    p.alibi_slopes = alibi(p.n.num_q_heads);
    p.options.causal = false;
  });
}

TEST_CASE("a mask over the newest tokens leaves older ones visible", "[attention]") {
  for (const double share : {0.1, 0.5, 1.0})
    check_option("square mask", [&](problem& p, test::random& random) {
      p.mask = random_mask(p.n.q_len, p.n.q_len, share, random);
    });
}

TEST_CASE("a mask over all tokens decides alone, also about later tokens and empty rows", "[attention]") {
  for (const double share : {0.0, 0.03, 0.5, 1.0})
    check_option("full mask", [&](problem& p, test::random& random) {
      p.mask = random_mask(p.n.q_len, p.n.kv_len, share, random);
    });
}

TEST_CASE("a tree of drafted tokens sees its ancestors", "[attention]") {
  check_option("tree", [](problem& p, test::random& random) {
    const index_t n = p.n.q_len;
    p.mask.assign(static_cast<std::size_t>(n * n), 0);
    std::vector<index_t> depth(static_cast<std::size_t>(n), 0);
    for (index_t i = 0; i < n; ++i) {
      p.mask[static_cast<std::size_t>(i * n + i)] = 1;
      if (i == 0) continue;
      const index_t parent = random.below(i);
      depth[static_cast<std::size_t>(i)] = depth[static_cast<std::size_t>(parent)] + 1;
      for (index_t j = 0; j < n; ++j)
        p.mask[static_cast<std::size_t>(i * n + j)] |= p.mask[static_cast<std::size_t>(parent * n + j)];
    }
    // Tokens of one depth share a position.
    for (index_t j = 0; j < p.n.kv_len - n; ++j) p.k_positions.push_back(j);
    for (index_t i = 0; i < n; ++i)
      p.k_positions.push_back(p.n.kv_len - n + depth[static_cast<std::size_t>(i)]);
    p.q_positions.assign(p.k_positions.end() - n, p.k_positions.end());
    p.options.window = random.chance(0.5) ? 20 : 0;
  });
}

TEST_CASE("explicit positions decide what is seen", "[attention]") {
  check_option("positions", [](problem& p, test::random& random) { set_positions(p, random); });
  check_option("positions of the keys alone, those of the queries are the newest tokens'",
               [](problem& p, test::random& random) {
                 set_positions(p, random);
                 p.q_positions.clear();
               });
  check_option("positions that repeat",
               [](problem& p, test::random& random) { set_positions(p, random, true); });
  check_option("positions in any order", [](problem& p, test::random& random) {
    set_positions(p, random);
    for (std::size_t i = p.k_positions.size(); i > 1; --i)
      std::swap(p.k_positions[i - 1],
                p.k_positions[static_cast<std::size_t>(random.below(static_cast<index_t>(i)))]);
    p.options.window = 30;
    p.options.sinks = 3;
  });
  check_option("queries at positions of their own", [](problem& p, test::random& random) {
    for (index_t i = 0; i < p.n.q_len; ++i) p.q_positions.push_back(random.below(p.n.kv_len + 10) - 3);
  });
  check_option("queries at positions of their own, window", [](problem& p, test::random& random) {
    for (index_t i = 0; i < p.n.q_len; ++i) p.q_positions.push_back(random.below(p.n.kv_len + 10) - 3);
    p.options.window = 12;
    p.options.sinks = 2;
    p.alibi_slopes = alibi(p.n.num_q_heads);
  });
}

TEST_CASE("all options work together", "[attention]") {
  for (int i = 0; i < 30; ++i) {
    check_option("together " + std::to_string(i), [](problem& p, test::random& random) {
      if (random.chance(0.3)) p.options.causal = false;
      if (random.chance(0.5)) p.options.window = random.between(1, 100);
      if (random.chance(0.5)) p.options.sinks = random.below(20);
      if (random.chance(0.4)) p.options.soft_cap = random.uniform(0.5F, 20.0F);
      if (random.chance(0.4)) p.options.scale = random.uniform(0.05F, 1.0F);
      if (random.chance(0.4)) p.alibi_slopes = alibi(p.n.num_q_heads);
      if (random.chance(0.4)) set_positions(p, random, random.chance(0.5));
      if (random.chance(0.4))
        p.mask = random_mask(p.n.q_len, random.chance(0.5) ? p.n.q_len : p.n.kv_len, 0.6, random);
    });
  }
}

TEST_CASE("the output may take the place of the queries", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 20, .kv_len = 90, .num_q_heads = 6, .num_kv_heads = 2, .head_dim = 24});
  const auto cache = filled<kvcache::contiguous_cache<codec::f32>>(p, 16);
  const answer apart = computed(p, cache[0]);
  std::vector<float> x = p.q;
  std::vector<float> lse(apart.lse.size());
  kvcache::attend(x, cache[0], x, options_of(p, lse));
  require_same_bits({x, lse}, apart);
}

TEST_CASE("lse is asked for or not, the output is the same", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 3, .kv_len = 40, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 8});
  const auto cache = filled<kvcache::contiguous_cache<codec::f32>>(p, 16);
  const answer with = computed(p, cache[0]);
  std::vector<float> out(p.q.size());
  kvcache::attend(p.q, cache[0], out, options_of(p, {}));
  REQUIRE(same_bits(out, with.out));
}
