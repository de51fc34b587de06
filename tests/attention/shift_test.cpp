// SPDX-License-Identifier: MIT
// Segments whose positions moved: stored keys stay, and attention is as if they had been rotated for where
// they are now. The oracle gets keys that were never rotated, and true positions.

#include <kvcache/attention/rope.hpp>

#include "attention/problem.hpp"
#include "oracle/rope_oracle.hpp"

#include <algorithm>
#include <optional>

using namespace attention_test;

namespace {

struct move {
  index_t first, last, delta;
};

/// A problem with unrotated q and k, and what happened to its tokens.
struct shifted_problem {
  problem p;
  kvcache::rope_config rope;
  oracle::rope exact_rope;
  std::vector<move> moves;  // made after all but the last `later` tokens were stored
  index_t later = 0;
};

/// Runs it over a cache. The positions it ends up with go to `positions`.
template <class Cache>
answer run(const shifted_problem& s, std::vector<index_t>& positions) {
  const kvcache::rope_table table(s.rope, 64);
  const index_t width = s.p.n.num_kv_heads * s.p.n.head_dim;
  const index_t early = s.p.n.kv_len - s.later;
  auto cache = empty_cache<Cache>(shape_of(s.p, 16));
  const auto append = [&](index_t first, index_t last) {
    std::vector<float> k(s.p.k.begin() + first * width, s.p.k.begin() + last * width);
    const std::vector<float> v(s.p.v.begin() + first * width, s.p.v.begin() + last * width);
    std::vector<index_t> at;
    for (index_t t = first; t < last; ++t) at.push_back(cache.positions()[t]);
    kvcache::rope(k, at, table);
    cache[0].append(k, v);
  };
  append(0, early);
  for (const move& m : s.moves) cache.shift(m.first, m.last, m.delta);
  append(early, s.p.n.kv_len);

  positions.clear();
  for (index_t t = 0; t < s.p.n.kv_len; ++t) positions.push_back(cache.positions()[t]);
  problem turned = s.p;
  turned.options.rope = &table;
  std::vector<index_t> at(positions.end() - s.p.n.q_len, positions.end());
  if (!s.p.q_positions.empty()) at = s.p.q_positions;
  kvcache::rope(turned.q, at, table);
  return computed(turned, cache[0]);
}

/// The same by definition.
oracle::attention_result exact(const shifted_problem& s, const std::vector<index_t>& positions) {
  oracle::attention a = exact_problem(s.p, "f32");
  a.k_positions = positions;
  a.rotation = s.exact_rope;
  return oracle::attend(a);
}

void check(const shifted_problem& s) {
  std::vector<index_t> positions;
  const answer got = run<kvcache::contiguous_cache<codec::f32>>(s, positions);
  const auto want = exact(s, positions);
  require_close(got, want, 2);  // rotation in float adds some 1e-7 of the norms
  require_same_bits(run<kvcache::chunked_cache<codec::f32>>(s, positions), got);
  require_same_bits(run<kvcache::paged_cache<codec::f32>>(s, positions), got);

  // 16-bit codecs round the rotated keys: an error of 2^-8 of the norms.
  const answer rounded = run<kvcache::paged_cache<codec::bf16>>(s, positions);
  require_close(rounded, want, 2 * 4000);
}

shifted_problem make(test::random& random, const problem_size& n, kvcache::rope_pairing pairing) {
  shifted_problem s{.p = make_problem(random, n),
                    .rope = {.head_dim = n.head_dim, .pairing = pairing},
                    .exact_rope = {.head_dim = n.head_dim, .rotary_dim = n.head_dim},
                    .moves = {},
                    .later = n.q_len};
  s.exact_rope.pairing =
      pairing == kvcache::rope_pairing::half ? oracle::rope::pairs::half : oracle::rope::pairs::interleaved;
  return s;
}

}  // namespace

TEST_CASE("tokens that moved are attended over at their new positions", "[attention]") {
  test::random random;
  for (const auto pairing : {kvcache::rope_pairing::half, kvcache::rope_pairing::interleaved}) {
    for (const problem_size& n : {problem_size{1, 60, 4, 2, 16}, {5, 90, 3, 1, 32}}) {
      for (const std::vector<move>& moves : std::vector<std::vector<move>>{
               {{0, 20, 7}},                            // a prefix
               {{20, 40, -20}},                         // the middle, over others' positions
               {{0, 50, 1000}},                         // far
               {{10, 55, -6}},                          // up to the end
               {{0, 55, -30}},                          // all
               {{0, 16, 5}, {16, 32, 5}, {3, 40, -9}},  // again and again
               {{5, 6, 3}, {7, 8, -3}, {30, 31, 100}},  // single tokens
           }) {
        shifted_problem s = make(random, n, pairing);
        s.moves = moves;
        CAPTURE(n.q_len, moves.size(), moves[0].first, moves[0].last, moves[0].delta);
        check(s);
      }
    }
  }
}

TEST_CASE("shifted segments go with every other option", "[attention]") {
  test::random random;
  for (int i = 0; i < 30; ++i) {
    const index_t q_len = random.chance(0.5) ? 1 : random.between(2, 20);
    const index_t kv_len = q_len + random.between(1, 120);
    shifted_problem s =
        make(random, {q_len, kv_len, 4, 2, 12},
             random.chance(0.5) ? kvcache::rope_pairing::half : kvcache::rope_pairing::interleaved);
    for (index_t m = random.between(1, 4); m > 0; --m) {
      const index_t first = random.below(kv_len - q_len);
      s.moves.push_back({first, random.between(first, kv_len - q_len), random.between(-50, 50)});
    }
    if (random.chance(0.3)) s.p.options.window = random.between(1, 60);
    if (random.chance(0.3)) s.p.options.sinks = random.below(8);
    if (random.chance(0.3)) s.p.options.soft_cap = 5;
    if (random.chance(0.3)) s.p.alibi_slopes = {0.5F, 0.1F, 0.02F, 0.0F};
    if (random.chance(0.3)) s.p.options.causal = false;
    if (random.chance(0.3)) {
      s.p.mask.assign(static_cast<std::size_t>(q_len * kv_len), 1);
      for (auto& bit : s.p.mask) bit = random.chance(0.7) ? 1 : 0;
    }
    if (random.chance(0.3)) {
      s.rope.rotary_dim = s.exact_rope.rotary_dim = 8;
    } else if (random.chance(0.3)) {
      s.rope.scaling = kvcache::rope_scaling_yarn{4, 32};
      s.exact_rope.kind = oracle::rope::scaling::yarn;
      s.exact_rope.factor = 4;
      s.exact_rope.original_context = 32;
    }
    if (random.chance(0.3))
      for (index_t t = 0; t < q_len; ++t) s.p.q_positions.push_back(random.below(2 * kv_len));
    CAPTURE(i, q_len, kv_len, s.moves.size());
    check(s);
  }
}

TEST_CASE("moving back is as if nothing had moved", "[attention]") {
  test::random random;
  shifted_problem s = make(random, {3, 50, 2, 1, 8}, kvcache::rope_pairing::half);
  std::vector<index_t> positions;
  const answer still = run<kvcache::contiguous_cache<codec::bf16>>(s, positions);
  s.moves = {{10, 30, 12}, {10, 30, -12}};
  const answer back = run<kvcache::contiguous_cache<codec::bf16>>(s, positions);
  require_same_bits(back, still);
}

TEST_CASE("a fork and a truncated cache remember what moved", "[attention]") {
  test::random random;
  const problem p = make_problem(random, {1, 40, 2, 1, 8});
  const kvcache::rope_table table({.head_dim = 8, .pairing = kvcache::rope_pairing::half});
  problem q = p;
  q.options.rope = &table;
  auto cache = filled<kvcache::paged_cache<codec::bf16>>(p, 16);
  cache.shift(4, 20, 9);
  auto fork = cache.fork(30);
  auto copy = cache.clone();
  cache.truncate(30);
  copy.truncate(30);
  q.n.kv_len = 30;
  const answer want = computed(q, cache[0]);
  require_same_bits(computed(q, fork[0]), want);
  require_same_bits(computed(q, copy[0]), want);
}
