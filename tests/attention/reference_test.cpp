// SPDX-License-Identifier: MIT
// The library's reference against the oracle: two definitions, written apart, that have to agree.

#include <kvcache/attention/reference.hpp>

#include "attention/problem.hpp"
#include "golden/golden.hpp"

#include <cmath>
#include <vector>

using namespace attention_test;

namespace {

struct exact_answer {
  std::vector<double> out;
  std::vector<double> lse;
};

exact_answer reference(const problem& p) {
  exact_answer a{std::vector<double>(p.q.size(), std::nan("")),
                 std::vector<double>(static_cast<std::size_t>(p.n.q_len * p.n.num_q_heads), std::nan(""))};
  const kvcache::attention_shape shape{.q_len = p.n.q_len,
                                       .kv_len = p.n.kv_len,
                                       .num_q_heads = p.n.num_q_heads,
                                       .num_kv_heads = p.n.num_kv_heads,
                                       .head_dim = p.n.head_dim};
  kvcache::reference_attention(shape, p.q, p.k, p.v, a.out, options_of(p, {}), a.lse);
  return a;
}

bool close(const std::vector<double>& a, const std::vector<double>& b, double bound) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i] && !(std::abs(a[i] - b[i]) <= bound * (1 + std::abs(b[i])))) return false;
  return true;
}

}  // namespace

TEST_CASE("the reference and the oracle agree in double precision", "[attention]") {
  test::random random;
  for (int i = 0; i < 400; ++i) {
    const index_t kv_heads = random.between(1, 3);
    const index_t kv_len = random.between(1, 60);
    const index_t q_len = random.between(1, std::min<index_t>(kv_len, 12));
    problem p = make_problem(
        random, {q_len, kv_len, kv_heads * random.between(1, 4), kv_heads, random.between(1, 24)});
    if (random.chance(0.3)) p.options.causal = false;
    if (random.chance(0.3)) p.options.scale = random.uniform(0.0F, 1.5F);
    if (random.chance(0.4)) p.options.window = random.between(1, 40);
    if (random.chance(0.4)) p.options.sinks = random.below(10);
    if (random.chance(0.3)) p.options.soft_cap = random.uniform(0.5F, 20.0F);
    if (random.chance(0.3)) {
      p.alibi_slopes = random.floats(p.n.num_q_heads);
      for (float& slope : p.alibi_slopes) slope = std::abs(slope);
    }
    if (random.chance(0.4)) {
      p.mask.resize(static_cast<std::size_t>(q_len * (random.chance(0.5) ? q_len : kv_len)));
      for (auto& bit : p.mask) bit = random.chance(0.6) ? 1 : 0;
    }
    if (random.chance(0.4)) {
      for (index_t t = 0; t < kv_len; ++t) p.k_positions.push_back(random.below(80));
      for (index_t t = 0; t < q_len; ++t) p.q_positions.push_back(random.below(80));
    }
    CAPTURE(i, q_len, kv_len, p.n.num_q_heads, p.n.num_kv_heads, p.n.head_dim);
    const exact_answer got = reference(p);
    const auto want = expected(p, "f32");
    REQUIRE(close(got.out, want.out, 1e-12));
    REQUIRE(close(got.lse, want.lse, 1e-12));
  }
}

TEST_CASE("the reference never reads what is hidden", "[attention]") {
  test::random random;
  problem p = make_problem(random, {2, 20, 2, 1, 4});
  p.options.window = 5;
  const exact_answer want = reference(p);
  for (std::size_t i = 0; i < 10 * 4; ++i) p.k[i] = p.v[i] = std::nanf("");
  const exact_answer got = reference(p);
  REQUIRE(got.out == want.out);
  REQUIRE(got.lse == want.lse);
}
