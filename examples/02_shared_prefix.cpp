// SPDX-License-Identifier: MIT
// One prompt, three continuations: sequences of a pool share the pages of what they have in common, and a
// pool that is full says so and changes nothing.
#include <kvcache/kvcache.hpp>

#include <cstdio>
#include <vector>

using kvcache::index_t;

int main() {
  const kvcache::cache_shape shape{.num_layers = 1, .num_kv_heads = 2, .head_dim = 64, .block_size = 64};
  constexpr index_t page_bytes = 2 * 64 * 2 * 64 * 2;  // keys and values, tokens, heads, dimensions, bf16
  kvcache::page_pool<> pool{shape, {.budget_bytes = 8 * page_bytes}};
  const auto rows = [](index_t num_tokens) {
    return std::vector<float>(static_cast<std::size_t>(num_tokens * 2 * 64), 0.5f);
  };
  const auto report = [&](const char* what) {
    std::printf("%-34s %td of %td pages in use\n", what, pool.num_in_use(), pool.num_pages());
  };

  auto prompt = pool.sequence();
  prompt[0].append(rows(100), rows(100));  // 100 tokens: one full page and one partly filled
  report("a prompt of 100 tokens");

  auto first = prompt.fork();  // nothing is copied yet
  auto second = prompt.fork();
  auto third = prompt.fork(64);  // only the first 64 tokens
  report("three forks of it");

  first[0].append(rows(1), rows(1));  // writes into a shared page, so that page is copied
  report("one token more in the first");
  second[0].append(rows(1), rows(1));
  report("one token more in the second");
  third[0].append(rows(64), rows(64));
  report("64 tokens more in the third");

  const auto status = first[0].try_append(rows(300), rows(300));  // needs more pages than are free
  std::printf("300 tokens more in the first: %s, size still %td\n", kvcache::to_string(status), first.size());
  { const auto gone = std::move(third); }  // a sequence gives its pages back when it goes
  report("the third is gone");
}
