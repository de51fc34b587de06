// SPDX-License-Identifier: MIT
// Attention weights, added up token by token: against the oracle, which knows nothing of lse, spans or blocks.

#include <kvcache/attention/weights.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>

#include "attention/problem.hpp"

#include <algorithm>

using namespace attention_test;

namespace {

/// Weights by definition, [num_kv_heads, kv_len]: what attention makes of values of which one is 1 and the others are 0.
std::vector<double> expected_sums(const oracle::attention& problem) {
  oracle::attention a = problem;
  const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
  const index_t group = a.num_q_heads / a.num_kv_heads;
  std::vector<double> sums(at(a.num_kv_heads * a.kv_len), 0.0);
  // head_dim tokens at a time: dim d of the output is the weight of token first + d.
  for (index_t first = 0; first < a.kv_len; first += a.head_dim) {
    std::fill(a.v.begin(), a.v.end(), 0.0);
    const index_t count = std::min(a.head_dim, a.kv_len - first);
    for (index_t d = 0; d < count; ++d) {
      for (index_t g = 0; g < a.num_kv_heads; ++g)
        a.v[at(((first + d) * a.num_kv_heads + g) * a.head_dim + d)] = 1;
    }
    const auto r = oracle::attend(a);
    for (index_t row = 0; row < a.q_len * a.num_q_heads; ++row) {
      const index_t g = row % a.num_q_heads / group;
      for (index_t d = 0; d < count; ++d)
        sums[at(g * a.kv_len + first + d)] += r.out[at(row * a.head_dim + d)];
    }
  }
  return sums;
}

template <class Layer, class Executor = kvcache::serial_executor>
std::vector<float> computed_sums(const problem& p, const Layer& layer, bool by_head,
                                 Executor&& executor = {}) {
  const answer a = computed(p, layer);
  attend_options options = options_of(p, {});
  std::vector<float> sums(static_cast<std::size_t>((by_head ? p.n.num_kv_heads : 1) * p.n.kv_len), 0.0F);
  kvcache::add_token_weights(p.q, layer, a.lse, sums, options, executor);
  return sums;
}

void require_close_sums(const problem& p, const std::vector<float>& got, const std::vector<double>& want,
                        double logits) {
  REQUIRE(got.size() == want.size());
  const double amx = kernels_under_test().level == kvcache::kernel::isa::amx ? 8 : 1;
  const double relative = amx * 2e-6 * (4 + logits) + 1e-7 * static_cast<double>(p.n.q_len * p.n.num_q_heads);
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(static_cast<double>(got[i]) - want[i]);
    if (error > relative * want[i] + 1e-30) {
      CAPTURE(i, got[i], want[i], relative);
      REQUIRE(error <= relative * want[i] + 1e-30);
    }
  }
}

double largest(const std::vector<double>& x) { return *std::max_element(x.begin(), x.end()); }

void check(const problem& p) {
  const oracle::attention a = exact_problem(p, "bf16");
  const auto r = oracle::attend(a);
  const double logits = std::max(largest(r.max_norms), largest(r.max_logit));
  const std::vector<double> want = expected_sums(a);
  auto cache = filled<kvcache::paged_cache<codec::bf16>>(p, 16);
  const std::vector<float> got = computed_sums(p, cache[0], true);
  require_close_sums(p, got, want, logits);

  std::vector<double> total(static_cast<std::size_t>(p.n.kv_len), 0.0);
  for (std::size_t i = 0; i < want.size(); ++i) total[i % total.size()] += want[i];
  require_close_sums(p, computed_sums(p, cache[0], false), total, logits);
}

/// Says that it has three workers, and runs tasks backwards.
struct three_workers {
  [[nodiscard]] index_t num_workers() const { return 3; }
  template <class Task>
  void run(index_t num_tasks, Task&& task) {
    for (index_t i = num_tasks; i-- > 0;) task(i, i % 3);
  }
};

}  // namespace

TEST_CASE("attention weights are those of the definition", "[attention]") {
  test::random random;
  for (const problem_size& n : {problem_size{1, 33, 4, 2, 20},
                                {7, 130, 6, 3, 33},
                                {40, 40, 2, 2, 8},
                                {3, 2100, 4, 2, 8},
                                {1, 1, 1, 1, 4}}) {
    problem p = make_problem(random, n);
    CAPTURE(n.q_len, n.kv_len);
    check(p);
    p.options.window = 9;
    p.options.sinks = 3;
    check(p);
    p.options.soft_cap = 3;
    for (index_t h = 0; h < n.num_q_heads; ++h) p.alibi_slopes.push_back(0.01F * static_cast<float>(h));
    check(p);
    for (index_t t = 0; t < n.kv_len; ++t) p.k_positions.push_back(2 * t);
    check(p);
    p.mask.assign(static_cast<std::size_t>(n.q_len * n.kv_len), 0);
    for (auto& bit : p.mask) bit = random.chance(0.6) ? 1 : 0;  // some rows may see nothing
    check(p);
  }
}

TEST_CASE("weights are the same in every container, for every executor, and are added to what is there",
          "[attention]") {
  test::random random;
  const problem p = make_problem(random, {20, 300, 8, 4, 16});
  auto contiguous = filled<kvcache::contiguous_cache<codec::bf16>>(p, 16);
  const auto want = computed_sums(p, contiguous[0], true);
  REQUIRE(same_bits(computed_sums(p, contiguous[0], true, three_workers{}), want));
  REQUIRE(same_bits(computed_sums(p, filled<kvcache::paged_cache<codec::bf16>>(p, 16)[0], true), want));

  std::vector<float> sums(want.size(), 1.0F);
  const answer a = computed(p, contiguous[0]);
  kvcache::attend_workspace workspace;
  attend_options options = options_of(p, {});
  options.workspace = &workspace;
  kvcache::add_token_weights(p.q, contiguous[0], a.lse, sums, options);
  double all = 0;
  for (const float x : sums) all += static_cast<double>(x) - 1;
  REQUIRE(std::fabs(all - 20 * 8) < 1e-3);  // every row adds up to 1
}

TEST_CASE("weights go to the head that gave them, however many tiles it has", "[attention]") {
  test::random random;
  for (const index_t q_len : {65, 130, 200}) {
    CAPTURE(q_len);
    const problem p = make_problem(random, {q_len, 260, 3, 3, 16});
    const auto sums = computed_sums(p, filled<kvcache::chunked_cache<codec::bf16>>(p, 64)[0], true);
    for (std::size_t head = 0; head < 3; ++head) {
      double all = 0;
      for (std::size_t t = 0; t < 260; ++t) all += static_cast<double>(sums[head * 260 + t]);
      CHECK(std::fabs(all / static_cast<double>(q_len) - 1) < 0.02);
    }
  }
}

TEST_CASE("rows add up to 1 within what is stated, where attend rounds queries by as much as it can",
          "[attention]") {
  test::random random;
  problem p = make_problem(random, {64, 128, 1, 1, 128});
  std::fill(p.q.begin(), p.q.end(), 1.0F + 0x1.01p-8F);  // in one bf16 all of a query moves the same way
  std::fill(p.k.begin(), p.k.end(), 2.0F);
  p.options.causal = false;
  p.options.scale = 0.25F;  // rounds nothing
  const double norms = (1 + 0x1.01p-8) * 2 * 128 / 4;
  const auto sums = computed_sums(p, filled<kvcache::chunked_cache<codec::bf16>>(p, 64)[0], true);
  double all = 0;
  for (const float x : sums) all += static_cast<double>(x);
  const bool on_amx = kernels_under_test().level == kvcache::kernel::isa::amx;
  const double bound = (on_amx ? 16e-6 * (4 + norms) + 0x1p-7 + std::expm1(norms / 250) : 2e-6 * (4 + norms));
  CHECK(std::fabs(all / 64 - 1) < bound);
}

TEST_CASE("weights over sealed blocks and exact tokens are those that attention used", "[attention]") {
  using sealed = codec::exact_sinks<codec::exact_tail<codec::rotated<4>, 20>, 3>;
  test::random random;
  problem p = make_problem(random, {2, 120, 4, 2, 16});
  std::fill(p.v.begin(), p.v.end(), 0.0F);
  kvcache::chunked_cache<sealed> cache(shape_of(p, 16));
  cache[0].append(p.k, p.v);
  std::vector<float> k(p.k.size());
  std::vector<float> v(p.v.size());
  cache[0].copy_out(0, 120, k, v);
  problem stored = p;
  stored.k = k;
  const auto want = expected_sums(exact_problem(stored, "f32"));
  const auto got = computed_sums(p, cache[0], true);
  for (std::size_t i = 0; i < got.size(); ++i)
    REQUIRE(std::fabs(static_cast<double>(got[i]) - want[i]) < 0.03 * want[i] + 1e-3);  // queries of 8 bits
}
