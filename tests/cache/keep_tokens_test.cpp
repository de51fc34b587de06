// SPDX-License-Identifier: MIT
// Tokens that stay when others between them are forgotten: bit by bit what they were, in every container, with forks alive;
// and attention over them is what it is over a cache that never had the others.

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/cache/recoded.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/low_rank_rows.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/trellis.hpp>

#include "attention/problem.hpp"
#include "conformance/caches.hpp"
#include "oracle/rope_oracle.hpp"
#include "support/heap.hpp"

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>

using conformance::chunked_by_3;
using conformance::contiguous;
using conformance::paged;
using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::keep_positions;
using kvcache::status;
namespace codec = kvcache::codec;

namespace {

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};

/// Ascending, the newest of `size` tokens among them; below `whole` by whole blocks, below `pinned` all.
std::vector<index_t> random_tokens(test::random& random, index_t size,
                                   const kvcache::keep_limits& limits = {}, double share = 0.6) {
  std::vector<index_t> tokens;
  bool stays = true;
  for (index_t t = 0; t < size; ++t) {
    const bool new_unit = t >= limits.whole_blocks || t % small.block_size == 0;
    if (new_unit) stays = random.chance(share);
    if (stays || t < limits.pinned || t == size - 1) tokens.push_back(t);
  }
  return tokens;
}

/// What a cache says of its tokens: rows of all layers, positions, and where keys were rotated for.
struct contents {
  std::vector<std::vector<float>> k, v;  // [num_layers][size, num_kv_heads, head_dim]
  std::vector<index_t> positions, rotations;
  index_t next_position = 0;

  friend bool operator==(const contents&, const contents&) = default;
};

template <class Cache>
contents read(const Cache& cache) {
  contents c;
  const cache_shape shape = cache.shape();
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    c.k.emplace_back(static_cast<std::size_t>(cache.size() * shape.num_kv_heads * shape.head_dim));
    c.v.push_back(c.k.back());
    cache[layer].copy_out(0, cache.size(), c.k.back(), c.v.back());
  }
  std::size_t s = 0;
  const auto segments = cache.positions().segments();
  for (index_t t = 0; t < cache.size(); ++t) {
    while (s + 1 < segments.size() && segments[s + 1].first_token <= t) ++s;
    c.positions.push_back(cache.positions()[t]);
    c.rotations.push_back(segments[s].rotation);
  }
  c.next_position = cache.positions()[cache.size()];
  return c;
}

/// The same after keep_tokens, by definition.
contents kept(const contents& all, const std::vector<index_t>& tokens, keep_positions mode) {
  contents c;
  const std::size_t width = all.k[0].size() / std::max(all.positions.size(), std::size_t{1});
  const auto rows = [&](const std::vector<float>& from) {
    std::vector<float> to;
    for (const index_t t : tokens)
      to.insert(to.end(), from.begin() + t * static_cast<index_t>(width),
                from.begin() + (t + 1) * static_cast<index_t>(width));
    return to;
  };
  for (std::size_t layer = 0; layer < all.k.size(); ++layer) {
    c.k.push_back(rows(all.k[layer]));
    c.v.push_back(rows(all.v[layer]));
  }
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const auto t = static_cast<std::size_t>(tokens[i]);
    const index_t now = mode == keep_positions::original
                            ? all.positions[t]
                            : all.positions.back() - static_cast<index_t>(tokens.size() - 1 - i);
    c.positions.push_back(now);
    c.rotations.push_back(all.rotations[t] + now - all.positions[t]);
  }
  c.next_position = all.next_position;
  return c;
}

template <class Cache>
void append(Cache& cache, index_t count, test::random& random) {
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer)
    REQUIRE(cache[layer].try_append(conformance::random_rows(random, cache.shape(), count),
                                    conformance::random_rows(random, cache.shape(), count)) == status::ok);
}

/// Bytes that this sequence alone takes: what freed_bytes counts.
template <class Cache>
index_t unshared(const Cache& cache) {
  return cache.bytes().total - cache.bytes().shared;
}

/// Keeps random tokens; everything must be as it was. \return what the cache has now
template <class Cache>
contents keep_some(Cache& cache, test::random& random) {
  const contents before = read(cache);
  const index_t bytes_before = unshared(cache);
  const index_t size_before = cache.size();
  const auto tokens = random_tokens(random, cache.size(), cache.keep_limits(), random.unit());
  const auto mode = random.chance(0.5) ? keep_positions::original : keep_positions::consecutive;
  const auto result = cache.keep_tokens(tokens, mode);
  REQUIRE(result.code == status::ok);
  cache.check();
  contents after = read(cache);
  REQUIRE(after == kept(before, tokens, mode));
  REQUIRE(result.num_forgotten == size_before - cache.size());
  REQUIRE(result.freed_bytes == bytes_before - unshared(cache));
  return after;
}

}  // namespace

TEMPLATE_TEST_CASE("kept tokens are bit by bit what they were, and forks keep theirs", "[cache]",
                   contiguous<codec::bf16>, chunked_by_3<codec::bf16>, paged<codec::bf16>,
                   (paged<codec::rotated<3>>), (chunked_by_3<codec::mixed<codec::int8, codec::rotated<4>>>)) {
  test::random random;
  for (int round = 0; round < 15; ++round) {
    TestType source(small);
    auto cache = source.make();
    std::optional<decltype(source.make())> fork;
    contents of_fork;
    for (int step = 0; step < 6; ++step) {
      append(cache, random.between(1, 90), random);
      if (random.chance(0.5)) {
        fork.emplace(cache.fork(random.between(0, cache.size())));
        of_fork = read(*fork);
      }
      keep_some(cache, random);
      if (random.chance(0.3)) cache.truncate(random.between(1, cache.size()));
      if (fork) REQUIRE(read(*fork) == of_fork);
      if (fork && random.chance(0.3) && fork->size() > 0) of_fork = keep_some(*fork, random);
    }
    const contents last = read(cache);
    REQUIRE(read(cache.clone()) == last);
    REQUIRE(read(kvcache::recoded(cache, source.make())).positions == last.positions);
    REQUIRE(read(kvcache::recoded(cache, source.make())).rotations == last.rotations);
  }
}

TEST_CASE("whole blocks go without a row being moved", "[cache]") {
  test::random random;
  kvcache::page_pool<codec::bf16> pool(small);
  auto cache = pool.sequence();
  append(cache, 100, random);  // 7 pages
  const std::vector<kvcache::page_id> before(cache.storage().page_table().begin(),
                                             cache.storage().page_table().end());
  auto fork = cache.fork();
  std::vector<index_t> tokens(100);
  std::iota(tokens.begin(), tokens.end(), 0);
  tokens.erase(tokens.begin() + 16, tokens.begin() + 64);  // pages 1, 2, 3
  auto result = cache.keep_tokens(tokens);
  REQUIRE(result.code == status::ok);
  REQUIRE(result.num_forgotten == 48);
  REQUIRE(result.freed_bytes == 0);  // the fork has them
  REQUIRE(pool.num_in_use() == 7);
  const auto table = cache.storage().page_table();
  REQUIRE(std::vector<kvcache::page_id>(table.begin(), table.end()) ==
          std::vector<kvcache::page_id>{before[0], before[4], before[5], before[6]});
  result = fork.keep_tokens(tokens);
  REQUIRE(result.freed_bytes == 3 * pool.page_bytes());
  REQUIRE(pool.num_in_use() == 4);

  kvcache::chunked_cache<codec::bf16> chunked(small, {}, {.blocks_per_chunk = 1});
  append(chunked, 100, random);
  const std::byte* last = chunked[1].block(1, 6);
  const index_t held = chunked.bytes().total;
  REQUIRE(chunked.keep_tokens(tokens).freed_bytes == held / 7 * 3);
  REQUIRE(chunked[1].block(1, 3) == last);  // the chunk itself moved down

  kvcache::contiguous_cache<codec::bf16> flat(small);
  append(flat, 100, random);
  REQUIRE(flat.keep_tokens(tokens).freed_bytes == 0);  // as a vector does
  REQUIRE(flat.size() == 52);
}

TEMPLATE_TEST_CASE("sealed blocks go whole, none is encoded again, and exact tokens stay one by one",
                   "[cache]", (chunked_by_3<codec::exact_sinks<codec::exact_tail<codec::channel<4>, 40>, 3>>),
                   (paged<codec::exact_tail<codec::rotated<4>, 16>>)) {
  test::random random;
  for (int round = 0; round < 25; ++round) {
    TestType source(small);
    auto cache = source.make();
    std::optional<decltype(source.make())> fork;
    contents of_fork;
    for (int step = 0; step < 6; ++step) {
      append(cache, random.between(1, 60), random);
      if (random.chance(0.5)) {
        fork.emplace(cache.fork(random.between(0, cache.size())));
        of_fork = read(*fork);
      }
      const contents now = keep_some(cache, random);
      if (fork) REQUIRE(read(*fork) == of_fork);

      // What is sealed reads the same for ever, however much more comes.
      const index_t sealed = cache[0].num_sealed() * small.block_size;
      append(cache, random.between(1, 70), random);
      const contents later = read(cache);
      const auto floats = sealed * small.num_kv_heads * small.head_dim;
      for (std::size_t layer = 0; layer < 2; ++layer) {
        REQUIRE(std::equal(now.k[layer].begin(), now.k[layer].begin() + floats, later.k[layer].begin()));
        REQUIRE(std::equal(now.v[layer].begin(), now.v[layer].begin() + floats, later.v[layer].begin()));
      }
      if (random.chance(0.4)) cache.truncate(random.between(1, cache.size()));
      cache.check();
    }
  }
}

// ---- one row of every codec -----------------------------------------------------------------------------------------

namespace {

/// Moves tokens between blocks and within one; slots that are not written to stay.
template <class Codec>
void check_moves(const Codec& given, index_t head_dim, test::random& random) {
  const kvcache::block_geometry g{.block_size = 32, .head_dim = head_dim};
  const auto codec = kvcache::codec_at(given, 0, 0);
  const auto& kernels = kvcache::kernel::best();
  const kvcache::memory_block memory(2 * codec.block_bytes(g), kvcache::huge_page_resource());
  std::memset(memory.data(), 0, static_cast<std::size_t>(memory.size()));
  const auto block = [&](index_t i) { return memory.data() + i * codec.block_bytes(g); };
  const auto rows_of = [&](index_t i) {
    std::vector<float> k(static_cast<std::size_t>(g.block_size * head_dim)), v(k.size());
    codec.decode(kernels, g, block(i), 0, g.block_size, {k.data(), head_dim}, {v.data(), head_dim});
    k.insert(k.end(), v.begin(), v.end());
    return k;
  };
  for (const index_t i : {0, 1}) {
    const auto k = random.floats(g.block_size * head_dim);
    const auto v = random.floats(g.block_size * head_dim);
    REQUIRE(codec.encode(kernels, g, block(i), 0, g.block_size, {k.data(), head_dim}, {v.data(), head_dim}) ==
            status::ok);
  }
  REQUIRE(kvcache::moves_tokens(given));
  std::vector<float> rows[2] = {rows_of(0), rows_of(1)};
  for (int i = 0; i < 40; ++i) {
    const index_t from = random.below(2), to = random.below(2);
    const index_t from_slot = random.below(g.block_size), to_slot = random.below(g.block_size);
    codec.move_token(g, block(from), from_slot, block(to), to_slot);
    for (const index_t side : {index_t{0}, g.block_size})
      std::copy_n(rows[from].begin() + (side + from_slot) * head_dim, head_dim,
                  rows[to].begin() + (side + to_slot) * head_dim);
    REQUIRE(rows_of(0) == rows[0]);
    REQUIRE(rows_of(1) == rows[1]);
  }
}

}  // namespace

TEST_CASE("tokens of every per-token codec move as they are stored", "[cache]") {
  test::random random;
  for (const index_t head_dim : {20, 33}) {
    check_moves(codec::f32{}, head_dim, random);
    check_moves(codec::f16{}, head_dim, random);
    check_moves(codec::bf16{}, head_dim, random);
    check_moves(codec::int8{}, head_dim, random);
    check_moves(codec::rotated<2>{}, head_dim, random);
    check_moves(codec::rotated<3>{}, head_dim, random);
    check_moves(codec::rotated<4>{}, head_dim, random);
    check_moves(codec::trellis<3>{}, head_dim, random);

    codec::low_rank_matrices m{.key_layout = {.bf16 = 3, .int8 = 5, .bits4 = 4},
                               .value_layout = {.int8 = 7, .bits2 = 4}};
    m.keys_in = random.floats(12 * head_dim);
    m.values = random.floats(11 * head_dim);
    m.key_spreads.assign(12, 1.0F);
    m.value_spreads.assign(11, 0.5F);
    const auto bases =
        std::make_shared<const codec::low_rank_bases>(cache_shape{.head_dim = head_dim, .block_size = 32}, m);
    codec::sides<codec::low_rank_keys, codec::low_rank_values> lean;
    lean.keys.bases = bases;
    lean.values.bases = bases;
    check_moves(lean, head_dim, random);
  }
  REQUIRE(!kvcache::moves_tokens(codec::channel<4>{}));
}

// ---- failure --------------------------------------------------------------------------------------------------------

TEST_CASE("a pool without room for copies says so and changes nothing", "[cache]") {
  test::random random;
  kvcache::page_pool<codec::bf16> pool(small);
  pool.set_budget(5 * pool.page_bytes());
  auto cache = pool.sequence();
  append(cache, 80, random);  // all five
  auto fork = cache.fork(64);
  const contents before = read(cache);
  std::vector<index_t> tokens(80);
  std::iota(tokens.begin(), tokens.end(), 0);
  tokens.erase(tokens.begin() + 20);  // pages 1 to 3 are shared, and would have to be copied
  REQUIRE(cache.keep_tokens(tokens, keep_positions::consecutive).code == status::out_of_pages);
  REQUIRE(read(cache) == before);
  cache.check();
  pool.check();
  tokens.erase(tokens.begin() + 16,
               tokens.begin() + 79 - 3);  // frees page 4 alone ... and copies page 1 into it
  REQUIRE(tokens.size() == 19);
  tokens.erase(tokens.begin() + 1);
  const auto result = cache.keep_tokens(tokens);
  REQUIRE(result.code == status::out_of_pages);  // page 0 is shared, page 4 in use until it has moved
  tokens.insert(tokens.begin() + 1, 1);
  REQUIRE(cache.keep_tokens(tokens).code == status::ok);
  REQUIRE(read(cache) == kept(before, tokens, keep_positions::original));
  REQUIRE(read(fork).k[0] == std::vector<float>(before.k[0].begin(), before.k[0].begin() + 64 * 40));
  pool.check();
}

TEMPLATE_TEST_CASE("keep_tokens that runs out of memory changes nothing", "[cache]", (paged<codec::bf16>),
                   (paged<codec::exact_tail<codec::channel<4>, 20>>)) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  append(cache, 90, random);
  cache.shift(10, 50, 7);
  const auto fork = cache.fork();
  const auto tokens = random_tokens(random, cache.size(), cache.keep_limits());
  const contents before = read(cache);
  const kvcache::memory_use use = cache.bytes();
  for (std::ptrdiff_t n = 0;; ++n) {
    REQUIRE(n < 100);
    const auto result = [&] {
      const heap::failing from_here(n);
      return cache.keep_tokens(tokens, keep_positions::consecutive);
    }();
    cache.check();
    if (result.code == status::ok) {
      REQUIRE(n > 2);
      break;
    }
    REQUIRE(result.code == status::out_of_memory);
    REQUIRE(read(cache) == before);
    REQUIRE(cache.bytes() == use);
  }
  REQUIRE(read(cache) == kept(before, tokens, keep_positions::consecutive));
  REQUIRE(read(fork) == before);
}

// ---- attention ------------------------------------------------------------------------------------------------------

using namespace attention_test;

namespace {

/// Rows [size, heads, dim] of these tokens only.
std::vector<float> rows_of(const std::vector<float>& all, const std::vector<index_t>& tokens,
                           const problem& p) {
  const index_t width = p.n.num_kv_heads * p.n.head_dim;
  std::vector<float> rows;
  for (const index_t t : tokens)
    rows.insert(rows.end(), all.begin() + t * width, all.begin() + (t + 1) * width);
  return rows;
}

/// Keeps tokens of a cache that has `p`, with a fork of before alive, and attends; against a fresh cache of what is left.
template <class Cache>
answer attended(const problem& p, const std::vector<index_t>& first, const std::vector<index_t>& second) {
  auto cache = filled<Cache>(p, 16);
  const auto fork = cache.fork();
  REQUIRE(cache.keep_tokens(first).code == status::ok);
  const auto fork_of_kept = cache.fork();
  REQUIRE(cache.keep_tokens(second).code == status::ok);
  problem left = p;
  left.n.kv_len = cache.size();
  return computed(left, cache[0]);
}

}  // namespace

TEST_CASE("attention over kept tokens is that of a fresh cache of them, bit by bit", "[cache]") {
  test::random random;
  for (int i = 0; i < 24; ++i) {
    const index_t q_len = random.chance(0.5) ? 1 : random.between(2, 12);
    problem p = make_problem(random, {q_len, random.between(q_len, 200), 4, 2, 20});
    const std::vector<index_t> first = [&] {
      auto tokens = random_tokens(random, p.n.kv_len - q_len + 1, {}, 0.7);
      for (index_t t = p.n.kv_len - q_len + 1; t < p.n.kv_len; ++t)
        tokens.push_back(t);  // those of the queries
      return tokens;
    }();
    const auto num_first = static_cast<index_t>(first.size());
    std::vector<index_t> second = random_tokens(random, num_first - q_len + 1, {}, 0.8);
    for (index_t t = num_first - q_len + 1; t < num_first; ++t) second.push_back(t);
    std::vector<index_t> left;
    for (const index_t t : second) left.push_back(first[static_cast<std::size_t>(t)]);
    if (random.chance(0.4)) p.options.window = random.between(1, 100);
    if (random.chance(0.4)) p.options.sinks = random.below(20);
    if (random.chance(0.3)) p.options.soft_cap = 5;
    if (random.chance(0.3)) p.alibi_slopes = {0.5F, 0.1F, 0.02F, 0.0F};
    if (random.chance(0.2)) p.options.causal = false;

    problem fresh = p;
    fresh.n.kv_len = static_cast<index_t>(left.size());
    fresh.k = rows_of(p.k, left, p);
    fresh.v = rows_of(p.v, left, p);
    fresh.k_positions = left;
    const answer want = computed(fresh, filled<kvcache::contiguous_cache<codec::bf16>>(fresh, 16)[0]);
    require_close(want, expected(fresh, "bf16"));
    require_same_bits(attended<kvcache::contiguous_cache<codec::bf16>>(p, first, second), want);
    require_same_bits(attended<kvcache::chunked_cache<codec::bf16>>(p, first, second), want);
    require_same_bits(attended<kvcache::paged_cache<codec::bf16>>(p, first, second), want);
  }
}

namespace {

/// A stream that forgets again and again while it grows, keys rotated for where they are when they come. The oracle
/// gets unrotated rows and positions.
template <class Cache>
void check_stream(test::random& random, keep_positions mode) {
  const kvcache::rope_config rope{.head_dim = 16, .pairing = kvcache::rope_pairing::half, .theta = 100};
  const kvcache::rope_table table(rope, 32);
  const problem_size n{.q_len = 1, .kv_len = 0, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 16};
  problem p = make_problem(random, n);  // k and v: unrotated, of the tokens there are
  Cache cache = empty_cache<Cache>(shape_of(p, 16));
  for (int step = 0; step < 5; ++step) {
    const index_t count = random.between(1, 70);
    const auto k = random.floats(count * 32);
    const auto v = random.floats(count * 32);
    p.k.insert(p.k.end(), k.begin(), k.end());
    p.v.insert(p.v.end(), v.begin(), v.end());
    std::vector<float> turned = k;
    std::vector<index_t> at;
    for (index_t t = 0; t < count; ++t) at.push_back(cache.positions()[cache.size() + t]);
    kvcache::rope(turned, at, table);
    cache[0].append(turned, v);
    const auto tokens = random_tokens(random, cache.size());
    const auto fork = cache.fork();
    REQUIRE(cache.keep_tokens(tokens, mode).code == status::ok);
    p.k = rows_of(p.k, tokens, p);
    p.v = rows_of(p.v, tokens, p);

    p.n.kv_len = cache.size();
    oracle::attention a = exact_problem(p, "f32");
    for (index_t t = 0; t < cache.size(); ++t) a.k_positions.push_back(cache.positions()[t]);
    a.rotation = oracle::rope{.head_dim = 16, .rotary_dim = 16, .theta = 100};
    problem asked = p;
    asked.options.rope = &table;
    const std::vector<index_t> newest{a.k_positions.back()};
    kvcache::rope(asked.q, newest, table);
    require_close(computed(asked, cache[0]), oracle::attend(a), 4);  // turning there and back adds some 1e-7
    if (mode == keep_positions::consecutive)
      REQUIRE(a.k_positions.front() == a.k_positions.back() - (cache.size() - 1));
  }
}

}  // namespace

TEST_CASE("positions that close up are served by turning the query", "[cache]") {
  test::random random;
  for (int round = 0; round < 6; ++round) {
    for (const auto mode : {keep_positions::original, keep_positions::consecutive}) {
      check_stream<kvcache::contiguous_cache<codec::f32>>(random, mode);
      check_stream<kvcache::chunked_cache<codec::f32>>(random, mode);
      check_stream<kvcache::paged_cache<codec::f32>>(random, mode);
    }
  }
}

TEST_CASE("sinks and a window stay two segments however long the stream gets", "[cache]") {
  test::random random;
  kvcache::chunked_cache<codec::bf16> cache(small);
  append(cache, 64, random);
  for (int i = 0; i < 50; ++i) {
    append(cache, 16, random);
    std::vector<index_t> tokens;
    for (index_t t = 0; t < 80; ++t)
      if (t < 16 || t >= 32) tokens.push_back(t);
    REQUIRE(cache.keep_tokens(tokens, keep_positions::consecutive).code == status::ok);
  }
  REQUIRE(cache.size() == 64);
  REQUIRE(cache.positions().segments().size() == 2);
  REQUIRE(cache.positions()[63] == 863);
  REQUIRE(cache.positions()[0] == 800);
  cache.shift(0, 64, -800);  // and from zero, if positions have to be small
  REQUIRE(cache.positions()[0] == 0);
  REQUIRE(cache.positions()[64] == 64);
}
