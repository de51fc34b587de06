// SPDX-License-Identifier: MIT
// Partial results over disjoint keys merge into the result over all of them, in any order.

#include <kvcache/attention/softmax_state.hpp>

#include "attention/problem.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

using namespace attention_test;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

/// The tokens [first, last) of a problem as a problem of their own, without causality.
problem part_of(const problem& p, index_t first, index_t last) {
  problem part = p;
  const index_t width = p.n.num_kv_heads * p.n.head_dim;
  part.n.kv_len = last - first;
  part.k.assign(p.k.begin() + first * width, p.k.begin() + last * width);
  part.v.assign(p.v.begin() + first * width, p.v.begin() + last * width);
  part.options.causal = false;
  part.q_positions.assign(static_cast<std::size_t>(p.n.q_len), 0);
  return part;
}

/// Memory for a softmax_state of some rows.
struct state_memory {
  state_memory(std::size_t rows, std::size_t dim) : row(rows), sum(rows * dim) { view().reset(); }
  [[nodiscard]] kvcache::softmax_state view() { return {row, sum}; }

  std::vector<kvcache::kernel::softmax_row> row;
  std::vector<float> sum;
};

}  // namespace

TEST_CASE("parts merge into the whole, in any order", "[attention]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 3, .kv_len = 200, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 9});
  for (float& x : p.q) x *= 4;  // parts of very different weight
  p.options.causal = false;
  const auto want = expected(p, "f32");

  const index_t cuts[] = {0, 1, 17, 64, 65, 130, 199, 200};
  std::vector<answer> parts;
  for (std::size_t i = 0; i + 1 < std::size(cuts); ++i) {
    const problem part = part_of(p, cuts[i], cuts[i + 1]);
    parts.push_back(computed(part, filled<kvcache::contiguous_cache<codec::f32>>(part, 16)[0]));
    require_close(parts.back(), expected(part, "f32"));
  }
  const answer nothing{std::vector<float>(p.q.size(), 0.0F),
                       std::vector<float>(parts[0].lse.size(), -infinity)};

  std::vector<std::size_t> order(parts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (int round = 0; round < 20; ++round) {
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[static_cast<std::size_t>(random.below(static_cast<index_t>(i)))]);
    // One after the other, from nothing, an empty part in between.
    answer all = nothing;
    for (const std::size_t i : order) {
      kvcache::merge(all.out, all.lse, parts[i].out, parts[i].lse);
      kvcache::merge(all.out, all.lse, nothing.out, nothing.lse);
    }
    require_close(all, want, 3);
    // As a tree.
    std::vector<answer> level;
    for (const std::size_t i : order) level.push_back(parts[i]);
    while (level.size() > 1) {
      std::vector<answer> next;
      for (std::size_t i = 0; i + 1 < level.size(); i += 2) {
        kvcache::merge(level[i].out, level[i].lse, level[i + 1].out, level[i + 1].lse);
        next.push_back(level[i]);
      }
      if (level.size() % 2 == 1) next.push_back(level.back());
      level = next;
    }
    require_close(level[0], want, 3);
  }
}

TEST_CASE("merging nothing leaves the same bits, and nothing with nothing is zero, not NaN", "[attention]") {
  test::random random;
  const std::vector<float> out = random.floats(12);
  const std::vector<float> lse{0.5F, -200.0F, 3e8F};
  const std::vector<float> no_out(12, 0.0F);
  const std::vector<float> no_lse(3, -infinity);

  answer a{out, lse};
  kvcache::merge(a.out, a.lse, no_out, no_lse);
  require_same_bits(a, {out, lse});

  answer b{no_out, no_lse};
  kvcache::merge(b.out, b.lse, out, lse);
  require_same_bits(b, {out, lse});

  answer c{no_out, no_lse};
  kvcache::merge(c.out, c.lse, no_out, no_lse);
  require_same_bits(c, {no_out, no_lse});

  answer none;
  kvcache::merge(none.out, none.lse, {}, {});
  REQUIRE(none.out.empty());
}

TEST_CASE("lse is a natural logarithm", "[attention]") {
  // Two parts of equal weight: the outputs average and lse grows by ln 2.
  answer a{{1.0F, 3.0F}, {5.0F}};
  const answer b{{2.0F, -1.0F}, {5.0F}};
  kvcache::merge(a.out, a.lse, b.out, b.lse);
  REQUIRE(std::abs(a.lse[0] - (5.0F + std::log(2.0F))) < 1e-6F);
  REQUIRE(std::abs(a.out[0] - 1.5F) < 1e-6F);
  REQUIRE(std::abs(a.out[1] - 1.0F) < 1e-6F);
}

TEST_CASE("parts of weights far apart merge without overflow", "[attention]") {
  for (const float gap : {50.0F, 100.0F, 1000.0F, 1e30F}) {
    for (const float base : {0.0F, -1e4F, 1e4F}) {
      CAPTURE(gap, base);
      answer a{{1.0F}, {base}};
      const answer b{{7.0F}, {base + gap}};
      kvcache::merge(a.out, a.lse, b.out, b.lse);
      REQUIRE(a.lse[0] == base + gap);
      REQUIRE(a.out[0] == 7.0F);
      answer c = b;
      kvcache::merge(c.out, c.lse, std::vector<float>{1.0F}, std::vector<float>{base});
      REQUIRE(c.lse[0] == base + gap);
      REQUIRE(c.out[0] == 7.0F);
    }
  }
}

TEST_CASE("softmax states that are fed block by block merge in any order", "[attention]") {
  test::random random;
  constexpr std::size_t dim = 5;
  constexpr std::size_t num_tokens = 96;  // six groups of 16
  const auto& kernels = kvcache::kernel::best();
  for (int round = 0; round < 20; ++round) {
    std::vector<float> logits = random.floats(num_tokens);
    for (float& x : logits) x = random.chance(0.2) ? -infinity : 20 * x;
    if (round == 0) std::fill(logits.begin(), logits.begin() + 32, -infinity);  // two states that see nothing
    if (round == 1) std::fill(logits.begin(), logits.end(), -infinity);
    const std::vector<float> values = random.floats(static_cast<index_t>(num_tokens * dim));

    double top = -std::numeric_limits<double>::infinity();
    for (const float x : logits) top = std::max(top, static_cast<double>(x));
    double sum = 0;
    std::vector<double> want(dim, 0.0);
    for (std::size_t t = 0; t < num_tokens; ++t) {
      if (logits[t] == -infinity) continue;
      const double w = std::exp(static_cast<double>(logits[t]) - top);
      sum += w;
      for (std::size_t d = 0; d < dim; ++d) want[d] += w * static_cast<double>(values[t * dim + d]);
    }

    std::vector<state_memory> states;
    for (std::size_t first = 0; first < num_tokens; first += 16) {
      states.emplace_back(1, dim);
      std::vector<float> scores(logits.begin() + static_cast<index_t>(first),
                                logits.begin() + static_cast<index_t>(first) + 16);
      float rescale = 0;
      kernels.softmax(scores.data(), 16, 16, 1, states.back().row.data(), &rescale);
      for (std::size_t t = 0; t < 16; ++t)
        for (std::size_t d = 0; d < dim; ++d)
          states.back().sum[d] += scores[t] * values[(first + t) * dim + d];
    }
    while (states.size() > 1) {
      const auto from = static_cast<std::size_t>(random.below(static_cast<index_t>(states.size()) - 1)) + 1;
      states[0].view().merge(states[from].view());
      states.erase(states.begin() + static_cast<index_t>(from));
      std::swap(states[0],
                states[static_cast<std::size_t>(random.below(static_cast<index_t>(states.size())))]);
    }
    std::vector<float> out(dim, std::numeric_limits<float>::quiet_NaN());
    const float lse = states[0].view().finish(0, out);
    CAPTURE(round);
    if (sum == 0) {
      REQUIRE(lse == -infinity);
      for (const float x : out) REQUIRE(x == 0.0F);
      continue;
    }
    REQUIRE(std::abs(static_cast<double>(lse) - (top + std::log(sum))) < 1e-5);
    for (std::size_t d = 0; d < dim; ++d)
      REQUIRE(std::abs(static_cast<double>(out[d]) - want[d] / sum) < 1e-5);
  }
}

TEST_CASE("a reset state has seen nothing", "[attention]") {
  state_memory memory(3, 4);
  std::fill(memory.sum.begin(), memory.sum.end(), 3.0F);
  memory.row[1] = {2.0F, 5.0F};
  memory.view().reset();
  state_memory other(3, 4);
  memory.view().merge(other.view());
  for (std::size_t r = 0; r < 3; ++r) {
    std::array<float, 4> out{1, 1, 1, 1};
    REQUIRE(memory.view().finish(r, out) == -infinity);
    REQUIRE(out == std::array<float, 4>{});
  }
}
