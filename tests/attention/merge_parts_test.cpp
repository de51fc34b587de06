// SPDX-License-Identifier: MIT
// Parts of a sequence, each attended over by itself, merge into the whole; in the order that is documented.

#include <kvcache/attention/merge_parts.hpp>

#include "attention/problem.hpp"

#include <numeric>
#include <vector>

using namespace attention_test;

namespace {

/// The documented order, from its picture: fold what is over a power of two, then halves of halves.
answer merged_by_picture(std::vector<answer> parts) {
  std::size_t whole = 1;
  while (2 * whole <= parts.size()) whole *= 2;
  const auto join = [](answer a, const answer& b) {
    kvcache::merge(a.out, a.lse, b.out, b.lse);
    return a;
  };
  std::vector<answer> leaves;
  for (std::size_t i = 0; i < parts.size();) {
    const bool folds = i < 2 * (parts.size() - whole);
    leaves.push_back(folds ? join(parts[i], parts[i + 1]) : parts[i]);
    i += folds ? 2 : 1;
  }
  REQUIRE(leaves.size() == whole);
  while (leaves.size() > 1) {
    std::vector<answer> next;
    for (std::size_t i = 0; i < leaves.size(); i += 2) next.push_back(join(leaves[i], leaves[i + 1]));
    leaves = next;
  }
  return leaves[0];
}

/// Share `part` of the keys of a causal problem, with queries placed relative to its first token.
answer attended_part(const problem& p, index_t part, index_t num_parts) {
  const auto [first, last] = kvcache::share_of(p.n.kv_len, part, num_parts);
  const index_t width = p.n.num_kv_heads * p.n.head_dim;
  problem share = p;
  share.n.kv_len = last - first;
  share.k.assign(p.k.begin() + first * width, p.k.begin() + last * width);
  share.v.assign(p.v.begin() + first * width, p.v.begin() + last * width);
  share.q_positions.resize(static_cast<std::size_t>(p.n.q_len));
  std::iota(share.q_positions.begin(), share.q_positions.end(), p.n.kv_len - p.n.q_len - first);
  return computed(share, filled<kvcache::chunked_cache<codec::bf16>>(share, 16)[0]);
}

}  // namespace

TEST_CASE("shares are consecutive, cover everything once, and differ by one at most", "[attention]") {
  for (index_t count = 0; count < 40; ++count) {
    for (index_t num_parts = 1; num_parts < 12; ++num_parts) {
      index_t next = 0;
      index_t size_before = count;
      for (index_t part = 0; part < num_parts; ++part) {
        const auto share = kvcache::share_of(count, part, num_parts);
        const index_t size = share.last - share.first;
        REQUIRE(share.first == next);
        REQUIRE((size == count / num_parts || size == count / num_parts + 1));
        REQUIRE(size <= size_before);
        size_before = size;
        next = share.last;
      }
      REQUIRE(next == count);
    }
  }
}

TEST_CASE("a causal sequence in parts is the sequence, whatever the number of parts", "[attention]") {
  test::random random;
  for (const problem_size& n : {problem_size{1, 100, 4, 2, 16}, {9, 60, 2, 1, 20}, {5, 5, 2, 2, 8}}) {
    const problem p = make_problem(random, n);
    const auto want = expected(p, "bf16");
    for (index_t num_parts = 1; num_parts <= 9; ++num_parts) {
      std::vector<answer> parts;
      for (index_t part = 0; part < num_parts; ++part) parts.push_back(attended_part(p, part, num_parts));
      const answer by_picture = merged_by_picture(parts);

      std::vector<kvcache::partial_result> results;
      for (answer& a : parts) results.push_back({a.out, a.lse});
      kvcache::merge_parts(results);
      INFO(num_parts << " parts of " << n.kv_len << " tokens");
      require_same_bits(parts[0], by_picture);
      require_close(parts[0], want, 3);
    }
  }
}

TEST_CASE("no part and one part are left alone", "[attention]") {
  kvcache::merge_parts({});
  answer one{{1.0F, -2.0F}, {3.0F}};
  const kvcache::partial_result result{one.out, one.lse};
  kvcache::merge_parts({&result, 1});
  require_same_bits(one, {{1.0F, -2.0F}, {3.0F}});
}
