// SPDX-License-Identifier: MIT
// Which tokens stay: the selection against a plain model, scores against their formulas, and policies on real caches.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/attention/weights.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/eviction/evict_tokens.hpp>
#include <kvcache/eviction/h2o.hpp>
#include <kvcache/eviction/keydiff.hpp>
#include <kvcache/eviction/snapkv.hpp>
#include <kvcache/eviction/tova.hpp>
#include <kvcache/eviction/window.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

using namespace kvcache;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

/// The unit that a token belongs to: its first token. By definition.
index_t unit_of(index_t t, const eviction::token_selection& s) {
  const index_t width = t < s.whole_blocks ? std::max(s.unit, s.block_size) : s.unit;
  return t - t % width;
}

/// The same as select_tokens: the best unit that fits, again and again.
std::vector<index_t> plainly_selected(const std::vector<float>& scores, const eviction::token_selection& s) {
  const auto size = static_cast<index_t>(scores.size());
  std::set<index_t> stays;
  const auto add = [&](index_t unit) {
    for (index_t t = 0; t < size; ++t)
      if (unit_of(t, s) == unit) stays.insert(t);
  };
  for (index_t t = 0; t < size; ++t)
    if (t < s.sinks || t >= size - std::max<index_t>(s.recent, 1) || size <= s.budget) add(unit_of(t, s));
  while (true) {
    index_t best = -1;
    double best_score = 0;
    for (index_t t = 0; t < size; ++t) {
      if (unit_of(t, s) != t || stays.count(t) > 0) continue;
      index_t count = 0;
      double sum = 0;
      double max = -std::numeric_limits<double>::infinity();
      for (index_t n = t; n < size && unit_of(n, s) == t; ++n, ++count) {
        sum += static_cast<double>(scores[at(n)]);
        max = std::max(max, static_cast<double>(scores[at(n)]));
      }
      const double score = static_cast<double>(
          static_cast<float>(s.judged == eviction::unit_score::max ? max : sum / static_cast<double>(count)));
      if (static_cast<index_t>(stays.size()) + count > s.budget) continue;
      if (best < 0 || score >= best_score) {  // of equals the newer
        best = t;
        best_score = score;
      }
    }
    if (best < 0) break;
    add(best);
  }
  return {stays.begin(), stays.end()};
}

}  // namespace

TEST_CASE("the selection is the plain one", "[eviction]") {
  test::random random;
  for (int round = 0; round < 600; ++round) {
    std::vector<float> scores(at(random.between(1, 90)));
    for (float& x : scores) x = random.chance(0.5) ? static_cast<float>(random.below(4)) : random.normal();
    const auto size = static_cast<index_t>(scores.size());
    eviction::token_selection s{.budget = random.between(0, size + 3),
                                .sinks = random.chance(0.5) ? random.below(10) : 0,
                                .recent = random.below(20),
                                .unit = index_t{1} << random.below(5)};
    if (random.chance(0.3)) s.judged = eviction::unit_score::max;
    if (random.chance(0.4)) {
      s.block_size = 16;
      s.whole_blocks = 16 * random.below(size / 16 + 1);
    }
    CAPTURE(size, s.budget, s.sinks, s.recent, s.unit, s.whole_blocks);
    REQUIRE(eviction::select_tokens(scores, s) == plainly_selected(scores, s));
  }
}

TEST_CASE("scores that are not numbers go first, infinite ones last, and the newest token always stays",
          "[eviction]") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> scores{nan, infinity, -5, nan, 3, -infinity};
  REQUIRE(eviction::select_tokens(scores, {.budget = 4}) == std::vector<index_t>{1, 2, 4, 5});
  REQUIRE(eviction::select_tokens(scores, {.budget = 0, .recent = 0}) == std::vector<index_t>{5});
  REQUIRE(eviction::select_tokens(scores, {.budget = 3, .unit = 2}) == std::vector<index_t>{4, 5});
  REQUIRE(eviction::select_tokens({}, {.budget = 3}).empty());
}

TEST_CASE("windows keep the newest, with sinks the first as well", "[eviction]") {
  std::vector<float> scores(20);
  const auto kept_by = [&](const auto& policy) {
    policy.score(scores);
    return eviction::select_tokens(scores, policy.selection(6));
  };
  REQUIRE(kept_by(eviction::sliding_window{}) == std::vector<index_t>{14, 15, 16, 17, 18, 19});
  REQUIRE(kept_by(eviction::sinks_window{}) == std::vector<index_t>{0, 1, 2, 3, 18, 19});
  REQUIRE(kept_by(eviction::sinks_window{{}, 1}) == std::vector<index_t>{0, 15, 16, 17, 18, 19});
}

TEST_CASE("h2o adds up, tova and snapkv see the newest queries only, and all follow what is kept",
          "[eviction]") {
  eviction::h2o heavy;
  heavy.observe(std::vector<float>{1, 2, 3});
  heavy.observe(std::vector<float>{1, 0, 0, 5});
  std::vector<float> scores(4);
  heavy.score(scores);
  REQUIRE(scores == std::vector<float>{2, 2, 3, 5});
  heavy.keep(std::vector<index_t>{0, 2, 3});
  heavy.observe(std::vector<float>{0, 1, 0, 7});
  heavy.score(scores);
  REQUIRE(scores == std::vector<float>{2, 4, 5, 7});
  REQUIRE(heavy.selection(10).recent == 5);

  eviction::tova newest;
  newest.observe(std::vector<float>{9, 9, 9});
  newest.observe(std::vector<float>{.1F, .2F, .3F, .4F});
  newest.score(scores);
  REQUIRE(scores == std::vector<float>{.1F, .2F, .3F, .4F});

  eviction::snapkv snap(2, 3);
  snap.observe(std::vector<float>{3, 6, 0, 9, 100, 100});
  scores.resize(6);
  snap.score(scores);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  REQUIRE(scores == std::vector<float>{3, 3, 5, 3, infinity, infinity});
  REQUIRE(eviction::snapkv{}.num_queries() == 64);
  REQUIRE(eviction::snapkv{}.selection(100).recent == 50);
}

TEST_CASE("keydiff is the likeness to the mean direction, averaged over heads and layers", "[eviction]") {
  test::random random;
  const index_t size = 37, heads = 2, dim = 10, layers = 3;
  eviction::keydiff policy;
  std::vector<double> want(at(size), 0.0);
  for (index_t layer = 0; layer < layers; ++layer) {
    std::vector<float> k = random.floats(size * heads * dim);
    for (float& x : k) x += 0.3F;
    std::fill_n(k.begin(), heads * dim, 0.0F);  // a key of zeros is like none
    policy.observe(k, heads, dim);
    for (index_t h = 0; h < heads; ++h) {
      const auto x = [&](index_t t, index_t d) {
        return static_cast<double>(k[at((t * heads + h) * dim + d)]);
      };
      const auto norm = [&](index_t t) {
        double sum = 0;
        for (index_t d = 0; d < dim; ++d) sum += x(t, d) * x(t, d);
        return std::sqrt(sum);
      };
      std::vector<double> mean(at(dim), 0.0);
      for (index_t t = 1; t < size; ++t)
        for (index_t d = 0; d < dim; ++d) mean[at(d)] += x(t, d) / norm(t) / static_cast<double>(size);
      double mean_norm = 0;
      for (const double m : mean) mean_norm += m * m;
      for (index_t t = 1; t < size; ++t) {
        double dot = 0;
        for (index_t d = 0; d < dim; ++d) dot += x(t, d) * mean[at(d)];
        want[at(t)] -= dot / norm(t) / std::sqrt(mean_norm) / static_cast<double>(heads * layers);
      }
    }
  }
  std::vector<float> scores(at(size));
  policy.score(scores);
  for (index_t t = 0; t < size; ++t)
    REQUIRE(std::fabs(static_cast<double>(scores[at(t)]) - want[at(t)]) < 1e-6);
}

namespace {

constexpr cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 16, .block_size = 16};

/// Appends tokens of a stream, attends, and shows each query's weights to the policy that wants them.
template <class Cache, class Policy>
void grow(Cache& cache, Policy& policy, index_t count, test::random& random) {
  const rope_table rope({.head_dim = 16, .pairing = rope_pairing::half});
  for (index_t n = 0; n < count; ++n) {
    std::vector<float> weights(at(cache.size() + 1), 0.0F);
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      cache[layer].append(random.floats(32), random.floats(32));
      const auto q = random.floats(64);
      std::vector<float> out(64);
      std::vector<float> lse(4);
      attend(q, cache[layer], out, {.rope = &rope, .lse = lse});
      add_token_weights(q, cache[layer], lse, weights, {.rope = &rope});
    }
    if constexpr (Policy::evidence == eviction::token_evidence::weights) policy.observe(weights);
  }
  if constexpr (Policy::evidence == eviction::token_evidence::keys) eviction::observe_keys(cache, policy);
}

}  // namespace

TEMPLATE_TEST_CASE("a stream stays within its budget, in whole blocks too", "[eviction]",
                   eviction::sliding_window, eviction::sinks_window, eviction::h2o, eviction::tova,
                   eviction::snapkv, eviction::keydiff) {
  test::random random;
  page_pool<codec::bf16> pool(shape);
  for (const index_t unit : {index_t{1}, shape.block_size}) {
    TestType policy;
    auto cache = pool.sequence();
    for (int round = 0; round < 4; ++round) {
      grow(cache, policy, 40, random);
      const index_t in_use = pool.num_in_use();
      const index_t before = cache.size();
      auto selection = policy.selection(50);
      selection.unit = unit;
      const auto result = eviction::evict_tokens(cache, policy, selection, keep_positions::consecutive);
      REQUIRE(result.code == status::ok);
      REQUIRE(result.num_forgotten == before - cache.size());
      REQUIRE(result.freed_bytes == (in_use - pool.num_in_use()) * pool.page_bytes());
      REQUIRE(cache.size() <= 50 + (unit > 1 ? 2 * unit : 0));  // protected tokens may bring their blocks
      REQUIRE(cache.size() >= std::min<index_t>(before, 50 - unit));
      REQUIRE(cache.positions()[0] == cache.positions()[cache.size()] - cache.size());
      cache.check();
    }
  }
}

TEST_CASE("a sealing cache is asked only for what it can do", "[eviction]") {
  test::random random;
  using sealed = codec::exact_sinks<codec::exact_tail<codec::channel<4>, 32>, 4>;
  chunked_cache<sealed> cache(shape, {}, {.blocks_per_chunk = 1});
  eviction::h2o policy;
  for (int round = 0; round < 6; ++round) {
    grow(cache, policy, 50, random);
    const auto limits = cache.keep_limits();
    REQUIRE(limits.whole_blocks >= 16);
    REQUIRE(limits.pinned == 16);
    REQUIRE(eviction::evict_tokens(cache, policy, {.budget = 80, .recent = 20}).code == status::ok);
    REQUIRE(cache.size() <= 80);
    REQUIRE((round == 0 || cache.size() > 80 - 16));
    cache.check();
  }
}

TEST_CASE("what cannot be evicted leaves cache and policy alone", "[eviction]") {
  test::random random;
  page_pool<codec::bf16> pool(shape);
  pool.set_budget(8 * pool.page_bytes());
  auto cache = pool.sequence();
  eviction::h2o policy;
  grow(cache, policy, 64, random);
  const auto fork = cache.fork();
  auto filler = pool.sequence();
  REQUIRE(filler.reserve(pool.num_free() * shape.block_size) == status::ok);
  std::vector<float> before(64);
  std::vector<float> after(64);
  policy.score(before);
  REQUIRE(eviction::evict_tokens(cache, policy, policy.selection(40)).code == status::out_of_pages);
  REQUIRE(cache.size() == 64);
  policy.score(after);
  REQUIRE(before == after);
  REQUIRE(eviction::evict_tokens(cache, policy, policy.selection(64)).num_forgotten == 0);
}
