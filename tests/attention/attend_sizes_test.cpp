// SPDX-License-Identifier: MIT
// attend at awkward sizes: around every block boundary, any head size and group, long sequences, batches.

#include "attention/problem.hpp"

#include <deque>
#include <functional>

using namespace attention_test;

namespace {

template <class Codec>
void check(const problem& p, index_t block_size) {
  CAPTURE(Codec::name, block_size, p.n.q_len, p.n.kv_len, p.n.num_q_heads, p.n.num_kv_heads, p.n.head_dim);
  require_close(computed(p, filled<kvcache::contiguous_cache<Codec>>(p, block_size)[0]),
                expected(p, Codec::name));
}

}  // namespace

TEST_CASE("sequences end before, at and after a block's end", "[attention]") {
  test::random random;
  for (const index_t block_size : {16, 32, 64, 128, 256}) {
    for (const index_t kv_len :
         {index_t{1}, index_t{2}, index_t{15}, index_t{16}, index_t{17}, block_size - 1, block_size,
          block_size + 1, 2 * block_size - 1, 2 * block_size, 2 * block_size + 1}) {
      for (const index_t q_len : {index_t{1}, index_t{2}, index_t{6}, index_t{17}, kv_len}) {
        if (q_len > kv_len || q_len * kv_len > 20000) continue;
        const problem p = make_problem(random, {q_len, kv_len, 3, 1, 5});
        check<codec::f32>(p, block_size);
        check<codec::bf16>(p, block_size);
      }
    }
  }
}

TEST_CASE("heads of any size are attended over", "[attention]") {
  test::random random;
  for (const index_t head_dim :
       {1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 64, 80, 100, 128, 129, 255, 256, 511, 512}) {
    for (const index_t q_len : {1, 4}) {
      const problem p = make_problem(random, {q_len, 35, 4, 2, head_dim});
      check<codec::f32>(p, 16);
      check<codec::f16>(p, 16);
      check<codec::bf16>(p, 16);
    }
  }
}

TEST_CASE("groups of any size read their own head", "[attention]") {
  test::random random;
  struct heads {
    index_t q, kv;
  };
  for (const heads h : {heads{1, 1},
                        {3, 3},
                        {3, 1},
                        {6, 2},
                        {8, 1},
                        {16, 2},
                        {17, 1},
                        {21, 3},
                        {32, 32},
                        {48, 1},
                        {64, 8},
                        {64, 1}}) {
    for (const index_t q_len : {1, 2, 7}) {
      const problem p = make_problem(random, {q_len, 50, h.q, h.kv, 12});
      check<codec::f32>(p, 32);
      check<codec::f16>(p, 32);
      check<codec::bf16>(p, 32);
    }
  }
}

TEST_CASE("working memory beyond the stack changes nothing", "[attention]") {
  test::random random;
  const problem p = make_problem(random, {2, 300, 40, 1, 512});  // 40 rows of 512: more than the stack has
  check<codec::f32>(p, 256);
  check<codec::bf16>(p, 64);
  const auto cache = filled<kvcache::contiguous_cache<codec::bf16>>(p, 64);
  const answer without = computed(p, cache[0]);
  kvcache::attend_workspace workspace;
  problem with = p;
  with.options.workspace = &workspace;
  require_same_bits(computed(with, cache[0]), without);
  require_same_bits(computed(with, cache[0]), without);
}

TEST_CASE("long sequences keep to the bound", "[attention]") {
  test::random random;
  for (const index_t kv_len : {2047, 2048, 2049, 4096, 6200}) {
    const problem p = make_problem(random, {2, kv_len, 4, 2, 24});
    check<codec::f32>(p, 64);
    check<codec::bf16>(p, 256);
    check<codec::f16>(p, 16);
  }
  // the longest that the bound is stated for
  const problem longest = make_problem(random, {1, 65536, 2, 1, 16});
  require_close(computed(longest, filled<kvcache::chunked_cache<codec::f32>>(longest, 256)[0]),
                expected(longest, "f32"));
  require_close(computed(longest, filled<kvcache::chunked_cache<codec::f16>>(longest, 64)[0]),
                expected(longest, "f16"));
  require_close(computed(longest, filled<kvcache::chunked_cache<codec::bf16>>(longest, 128)[0]),
                expected(longest, "bf16"));
  problem p = make_problem(random, {3, 5000, 2, 1, 16});
  p.options.window = 2500;
  p.options.sinks = 3;
  check<codec::f32>(p, 128);
}

TEST_CASE("random sizes keep to the bound", "[attention]") {
  test::random random;
  const index_t block_sizes[] = {16, 32, 64, 128, 256};
  for (int i = 0; i < 120; ++i) {
    const index_t kv_heads = random.between(1, 4);
    const index_t kv_len = random.between(1, random.chance(0.2) ? 600 : 140);
    const index_t q_len = random.chance(0.4) ? 1 : random.between(1, std::min<index_t>(kv_len, 40));
    const problem p = make_problem(
        random, {q_len, kv_len, kv_heads * random.between(1, 5), kv_heads, random.between(1, 70)});
    CAPTURE(i);
    const index_t block_size = block_sizes[random.below(5)];
    switch (i % 3) {
      case 0:
        check<codec::f32>(p, block_size);
        break;
      case 1:
        check<codec::f16>(p, block_size);
        break;
      default:
        check<codec::bf16>(p, block_size);
        break;
    }
  }
}

TEST_CASE("no queries are no work", "[attention]") {
  test::random random;
  const problem p = make_problem(random, {0, 20, 2, 1, 4});
  const auto cache = filled<kvcache::contiguous_cache<codec::f32>>(p, 16);
  const answer a = computed(p, cache[0]);
  REQUIRE(a.out.empty());
  using item = kvcache::attend_item<decltype(cache[0])>;
  kvcache::attend(std::span<const item>{});
}

TEST_CASE("more queries than keys, where no position is causal", "[attention]") {
  test::random random;
  for (const index_t q_len : {3, 20}) {
    problem p = make_problem(random, {q_len, 2, 2, 1, 4});
    p.options.causal = false;
    check<codec::f32>(p, 16);
    p.q_positions.resize(static_cast<std::size_t>(q_len));
    for (index_t i = 0; i < q_len; ++i) p.q_positions[static_cast<std::size_t>(i)] = i;
    p.options.causal = true;
    check<codec::f32>(p, 16);
  }
}

TEMPLATE_TEST_CASE("a batch of different lengths is its single calls", "[attention]",
                   kvcache::contiguous_cache<codec::f32>, kvcache::chunked_cache<codec::f16>,
                   kvcache::paged_cache<codec::bf16>) {
  test::random random;
  using cache_type = TestType;
  using codec_type = typename TestType::codec_type;
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 18, .block_size = 16};
  std::deque<cache_type> caches;
  std::vector<problem> problems;
  std::vector<answer> answers;
  // Of different lengths, an empty one among them; the first two are forks of one sequence.
  for (const problem_size& n : {problem_size{1, 40, 6, 2, 18},
                                {3, 40, 6, 2, 18},
                                {1, 1, 6, 2, 18},
                                {17, 33, 6, 2, 18},
                                {0, 5, 6, 2, 18},
                                {1, 2100, 6, 2, 18},
                                {5, 16, 6, 2, 18}}) {
    problems.push_back(make_problem(random, n));
    if (problems.size() == 2) {
      problems[1].k = problems[0].k;
      problems[1].v = problems[0].v;
      caches.push_back(caches.front().fork(0));
    } else {
      caches.push_back(empty_cache<cache_type>(shape));
    }
    caches.back()[1].append(problems.back().k, problems.back().v);
    answers.push_back({std::vector<float>(problems.back().q.size()),
                       std::vector<float>(static_cast<std::size_t>(n.q_len * n.num_q_heads))});
  }
  // Item-wise settings differ.
  problems[1].q_positions = {37, 5, 38};
  problems[3].mask.assign(17 * 33, 1);
  for (std::size_t i = 0; i < problems[3].mask.size(); i += 3) problems[3].mask[i] = 0;
  problems[6].k_positions = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  problems[6].q_positions = {22, 24, 26, 28, 30};

  kvcache::attend_options common;
  common.window = 25;
  common.sinks = 2;
  common.soft_cap = 4;
  std::vector<float> slopes{0.5F, 0.25F, 0.125F, 0.0625F, 0.03F, 0.01F};
  common.alibi_slopes = slopes;
  using layer_type = decltype(caches.front()[1]);
  std::vector<kvcache::attend_item<layer_type>> batch;
  for (std::size_t i = 0; i < problems.size(); ++i) {
    problem& p = problems[i];
    p.options = common;
    p.alibi_slopes = slopes;
    batch.push_back({.q = p.q,
                     .layer = caches[i][1],
                     .out = answers[i].out,
                     .q_len = p.n.q_len,
                     .mask = p.mask,
                     .q_positions = p.q_positions,
                     .k_positions = p.k_positions,
                     .lse = answers[i].lse});
  }
  common.kernel = &kernels_under_test();
  kvcache::attend(std::span<const kvcache::attend_item<layer_type>>(batch), common);
  for (std::size_t i = 0; i < problems.size(); ++i) {
    CAPTURE(i);
    require_same_bits(answers[i], computed(problems[i], caches[i][1]));
    require_close(answers[i], expected(problems[i], codec_type::name));
  }
}

TEST_CASE("a batch of many sequences is its single calls, with empty ones among them", "[attention]") {
  test::random random;
  using cache_type = kvcache::paged_cache<codec::bf16>;
  kvcache::page_pool<codec::bf16> pool({.num_layers = 1, .num_kv_heads = 2, .head_dim = 5, .block_size = 16});
  std::deque<cache_type> caches;
  std::vector<problem> problems;
  for (index_t i = 0; i < 70; ++i) {
    const index_t q_len = i % 9 == 4 ? 0 : 1 + i % 3;
    problems.push_back(make_problem(
        random, {.q_len = q_len, .kv_len = 3 + 37 * i, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 5}));
    caches.push_back(pool.sequence());
    caches.back()[0].append(problems.back().k, problems.back().v);
  }
  using layer_type = decltype(caches.front()[0]);
  std::vector<answer> answers;
  answers.reserve(problems.size());
  std::vector<kvcache::attend_item<layer_type>> batch;
  for (std::size_t i = 0; i < problems.size(); ++i) {
    const problem& p = problems[i];
    answers.push_back({std::vector<float>(p.q.size()),
                       std::vector<float>(static_cast<std::size_t>(p.n.q_len * p.n.num_q_heads))});
    batch.push_back(
        {.q = p.q, .layer = caches[i][0], .out = answers[i].out, .q_len = p.n.q_len, .lse = answers[i].lse});
  }
  kvcache::attend(std::span<const kvcache::attend_item<layer_type>>(batch),
                  {.kernel = &kernels_under_test()});
  for (std::size_t i = 0; i < problems.size(); ++i) {
    CAPTURE(i);
    require_same_bits(answers[i], computed(problems[i], caches[i][0]));
  }
}
