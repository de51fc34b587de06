// SPDX-License-Identifier: MIT
// low_rank in caches: every container and wrapper, the verbs, bases from a cache's own tokens; recoded in general.

#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/cache/recoded.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/interop/any_cache.hpp>

#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>
#include <vector>

using kvcache::cache_shape;
using kvcache::chunked_cache;
using kvcache::index_t;
using kvcache::recoded;
namespace codec = kvcache::codec;
using codec::low_rank_bases;

namespace {

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};
constexpr index_t token_floats = small.num_kv_heads * small.head_dim;

template <class Cache>
std::vector<float> all_of(const Cache& cache, index_t layer) {
  const index_t n = cache[layer].size();
  std::vector<float> k(static_cast<std::size_t>(n * token_floats));
  std::vector<float> v(k.size());
  cache[layer].copy_out(0, n, k, v);
  k.insert(k.end(), v.begin(), v.end());
  return k;
}

/// Appends the same random tokens to every layer.
template <class Cache>
void grow(Cache& cache, index_t tokens, test::random& random) {
  const std::vector<float> k = random.floats(tokens * token_floats);
  const std::vector<float> v = random.floats(tokens * token_floats);
  for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(k, v);
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(double{a[i]} - double{b[i]}, 2);
    size += std::pow(double{b[i]}, 2);
  }
  return std::sqrt(error / size);
}

std::shared_ptr<const low_rank_bases> some_bases(const codec::low_rank_options& options,
                                                 test::random& random) {
  const std::vector<float> rows = random.floats(small.num_layers * 100 * token_floats);
  return low_rank_bases::fit(small, options, {.k = rows, .v = rows});
}

/// Token by token or at once, forked, cloned and cut: always the same rows.
template <class Cache>
void run_verbs(Cache cache, test::random& random) {
  Cache one_by_one = cache.fork(0);
  const std::vector<float> k = random.floats(70 * token_floats);
  const std::vector<float> v = random.floats(70 * token_floats);
  for (index_t layer = 0; layer < small.num_layers; ++layer) {
    cache[layer].append(k, v);
    for (std::size_t t = 0; t < 70; ++t)
      one_by_one[layer].append(std::span(k).subspan(t * token_floats, token_floats),
                               std::span(v).subspan(t * token_floats, token_floats));
  }
  const std::vector<float> before = all_of(cache, 1);
  REQUIRE(all_of(one_by_one, 1) == before);
  const Cache clone = cache.clone();
  Cache fork = cache.fork(37);
  grow(fork, 30, random);
  REQUIRE(all_of(clone, 1) == before);
  REQUIRE(all_of(cache, 1) == before);
  REQUIRE(fork.size() == 67);
  cache.truncate(40);
  grow(cache, 5, random);
  const std::vector<float> cut = all_of(cache, 1);
  REQUIRE(std::equal(cut.begin(), cut.begin() + 40 * token_floats, before.begin()));
  {
    auto step = cache.begin(20);
    grow(cache, 20, random);
  }
  REQUIRE(all_of(cache, 1) == cut);
  cache.check();
  fork.check();
  REQUIRE(all_of(clone, 1) == before);
}

template <class Codec>
void run_in_containers(const Codec& stored, test::random& random) {
  run_verbs(kvcache::contiguous_cache<Codec>(small, stored), random);
  run_verbs(chunked_cache<Codec>(small, stored, {.blocks_per_chunk = 2}), random);
  kvcache::page_pool<Codec> pool(small, {}, stored);
  run_verbs(pool.sequence(), random);
  pool.check();
}

}  // namespace

TEST_CASE("low_rank in every container: append, fork, clone, truncate, steps", "[cache]") {
  test::random random;
  for (const codec::low_rank_options& options :
       {codec::low_rank_options{.rank = 7},
        codec::low_rank_options{.rank = 20, .store = codec::component_store::exact16},
        codec::low_rank_options{.layout = {.int8 = 3, .bits4 = 9, .bits2 = 5}}}) {
    run_in_containers(codec::low_rank(some_bases(options, random)), random);
  }
}

TEST_CASE("either side of low_rank goes with any other, also chosen at run time", "[cache]") {
  test::random random;
  const auto bases = some_bases({.rank = 11}, random);
  codec::mixed<codec::low_rank, codec::rotated<4>> low_keys;
  low_keys.keys.bases = bases;
  run_in_containers(low_keys, random);
  codec::mixed<codec::int8, codec::low_rank> low_values;
  low_values.values.bases = bases;
  run_in_containers(low_values, random);

  kvcache::any_codec any;
  any.keys = codec::any_keys::of(low_keys.keys);
  any.values = codec::any_values::of(low_values.values);
  run_in_containers(any, random);
  chunked_cache<kvcache::any_codec> chosen(small, any);
  chunked_cache<codec::low_rank> typed(small, codec::low_rank(bases));
  const std::vector<float> rows = random.floats(40 * token_floats);
  for (index_t layer = 0; layer < small.num_layers; ++layer) {
    chosen[layer].append(rows, rows);
    typed[layer].append(rows, rows);
  }
  REQUIRE(all_of(chosen, 1) == all_of(typed, 1));
}

TEST_CASE("low_rank leaves a tail and sinks exact", "[cache]") {
  test::random random;
  using stored = codec::exact_sinks<codec::exact_tail<codec::low_rank, 20>, 3>;
  const stored settings{
      codec::exact_tail<codec::low_rank, 20>(codec::low_rank(some_bases({.rank = 4}, random)))};
  chunked_cache<stored> cache(small, settings);
  const std::vector<float> k = random.floats(100 * token_floats);
  for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(k, k);
  REQUIRE(cache[1].num_sealed() == 5);
  const std::vector<float> got = all_of(cache, 1);
  const auto error = [&](index_t first, index_t last) {
    return distance({got.begin() + first * token_floats, got.begin() + last * token_floats},
                    {k.begin() + first * token_floats, k.begin() + last * token_floats});
  };
  CHECK(error(0, 3) < 0x1p-8);
  CHECK(error(3, 80) > 0.5);  // 4 of 20 components
  CHECK(error(80, 100) < 0x1p-8);

  // attention over both kinds of block
  kvcache::contiguous_cache<codec::f32> plain(small);
  const std::size_t half = got.size() / 2;
  plain[1].append(std::span(got).first(half), std::span(got).subspan(half));
  const std::vector<float> q = random.floats(4 * token_floats);
  std::vector<float> out(q.size());
  std::vector<float> expected(q.size());
  attend(q, cache[1], out, {.q_len = 2});
  attend(q, plain[1], expected, {.q_len = 2});
  for (std::size_t i = 0; i < out.size(); ++i)
    REQUIRE(std::fabs(double{out[i]} - double{expected[i]}) < 0.01);
}

TEST_CASE("bases fitted to a cache's own tokens, then on with low_rank", "[cache]") {
  test::random random;
  // rows of rank 6, different in each layer and head
  std::vector<std::vector<float>> mixes;
  for (index_t i = 0; i < 2 * small.num_layers * small.num_kv_heads; ++i)
    mixes.push_back(random.floats(6 * 20));
  const auto tokens = [&](index_t layer, index_t count, index_t side) {
    std::vector<float> rows(static_cast<std::size_t>(count * token_floats));
    for (index_t t = 0; t < count * small.num_kv_heads; ++t) {
      const std::vector<float> y = random.floats(6);
      const auto& mix = mixes[static_cast<std::size_t>((side * 2 + layer) * 2 + t % 2)];
      for (std::size_t d = 0; d < 20; ++d) {
        for (std::size_t i = 0; i < 6; ++i)
          rows[static_cast<std::size_t>(t) * 20 + d] += y[i] * mix[i * 20 + d];
      }
    }
    return rows;
  };
  kvcache::contiguous_cache<> cache(small);
  for (index_t layer = 0; layer < small.num_layers; ++layer)
    cache[layer].append(tokens(layer, 300, 0), tokens(layer, 300, 1));

  const auto bases = low_rank_bases::fit_from(cache, {.energy = 0.999});
  REQUIRE(bases->key_layout().rank() == 6);
  auto lean = recoded(cache, chunked_cache<codec::low_rank>(small, codec::low_rank(bases)));
  REQUIRE(lean.size() == 300);
  const std::vector<float> k = tokens(1, 50, 0);
  const std::vector<float> v = tokens(1, 50, 1);
  lean[1].append(k, v);
  cache[1].append(k, v);
  CHECK(distance(all_of(lean, 1), all_of(cache, 1)) < 0.015);  // 8 bits
  CHECK(lean.bytes().payload * 4 < cache.bytes().payload);
  // the same through any_cache
  auto any = kvcache::make_cache("paged/bf16", small);
  any[0].append(k, v);
  any[1].append(k, v);
  const auto again = recoded(any, kvcache::contiguous_cache<codec::low_rank>(
                                      small, codec::low_rank(low_rank_bases::fit_from(any, {.rank = 6}))));
  CHECK(distance(all_of(again, 1), all_of(any, 1)) < 0.015);
}

TEST_CASE("what a codec gives back beyond f16 is cut to it, and taken", "[cache]") {
  const std::vector<float> rows(static_cast<std::size_t>(90 * token_floats), 65504.0F);
  std::vector<float> other = rows;
  for (std::size_t i = 0; i < other.size(); i += 2) other[i] = -55000.0F + static_cast<float>(i % 97);
  for (const std::string name : {"int8", "rotated4", "rotated2", "trellis2"}) {
    for (const auto& k : {rows, other}) {
      CAPTURE(name);
      auto cache = kvcache::make_cache("chunked/" + name + ",tail=20,exact=f16", small);
      for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(k, k);
      const auto any = recoded(cache, kvcache::make_cache(cache.spec(), small));
      CHECK(any.size() == 90);
      using typed = codec::exact_tail<codec::rotated<4>, 20, codec::exact_element::f16>;
      CHECK(recoded(cache, chunked_cache<typed>(small)).size() == 90);
    }
  }
}

TEST_CASE("where no tokens are kept apart, the largest floats stay what they are", "[cache]") {
  const std::vector<float> rows(static_cast<std::size_t>(3 * token_floats),
                                std::numeric_limits<float>::max());
  kvcache::contiguous_cache<codec::f32> cache(small);
  for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(rows, rows);
  CHECK(all_of(recoded(cache, chunked_cache<codec::f32>(small)), 1) == all_of(cache, 1));
  CHECK(all_of(recoded(cache, kvcache::make_cache("chunked/f32", small)), 1) == all_of(cache, 1));
}

TEST_CASE("recoded tokens keep rows and positions", "[cache]") {
  test::random random;
  for (int script = 0; script < 40; ++script) {
    CAPTURE(script);
    kvcache::contiguous_cache<codec::f32> cache(small);
    for (int verb = 0; verb < 8; ++verb) {
      grow(cache, random.between(1, 30), random);
      const index_t first = random.between(0, cache.size());
      const index_t last = random.between(first, cache.size());
      if (random.chance(0.7)) cache.shift(first, last, random.between(-50, 50));
      if (random.chance(0.2)) cache.truncate(random.between(0, cache.size()));
    }
    if (random.chance(0.5)) {
      const std::vector<float> more = random.floats(7 * token_floats);
      cache[1].append(more, more);  // layers in the middle of a pass
    }
    cache_shape wider = small;
    wider.block_size = 64;
    const auto copy = recoded(cache, chunked_cache<codec::f32>(wider));
    copy.check();
    for (index_t layer = 0; layer < small.num_layers; ++layer)
      REQUIRE(all_of(copy, layer) == all_of(cache, layer));
    const auto rotation_at = [](const auto& positions, index_t token) {
      index_t rotation = 0;
      for (const auto& s : positions.segments()) rotation = s.first_token <= token ? s.rotation : rotation;
      return rotation;
    };
    for (index_t t = 0; t < cache.size(); ++t) {
      CAPTURE(t);
      REQUIRE(copy.positions()[t] == cache.positions()[t]);
      REQUIRE(rotation_at(copy.positions(), t) == rotation_at(cache.positions(), t));
    }
  }
  cache_shape other = small;
  other.head_dim = 21;
  const kvcache::contiguous_cache<> cache(small);
  REQUIRE_THROWS_AS(recoded(cache, kvcache::contiguous_cache<>(other)), kvcache::shape_error);
}
