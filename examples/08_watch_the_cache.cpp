// SPDX-License-Identifier: MIT
// Watching a manager of many sequences: its observer counts, Prometheus scrapes the counts, and recommend() says what to
// change. Twelve users ask about one of three documents under a budget that does not hold them all.
#include <kvcache/cache/paged.hpp>
#include <kvcache/serving/cache_manager.hpp>
#include <kvcache/serving/gauges.hpp>
#include <kvcache/serving/metrics.hpp>
#include <kvcache/serving/prometheus.hpp>
#include <kvcache/serving/recommend.hpp>

#include <cstdio>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

using namespace kvcache;
using namespace kvcache::serving;

using manager_type = cache_manager<page_pool<>, eviction::lru, no_cold_pool, no_spill_tier, metrics_recorder>;

/// A clock that ticks a tenth of a millisecond whenever it is read, so that this prints the same everywhere.
double ticking_clock() {
  static int ticks = 0;
  return ++ticks / 10000.0;
}

/// 96 tokens of a document, then 32 of a question of the user's own.
std::vector<token_id> prompt_of(token_id user) {
  std::vector<token_id> prompt(96 + 32);
  std::iota(prompt.begin(), prompt.begin() + 96, 1000 * (user % 3));
  std::iota(prompt.begin() + 96, prompt.end(), 10000 * (user + 1));
  return prompt;
}

void serve(manager_type& manager, token_id user) {
  const auto prompt = prompt_of(user);
  // The last token is always computed: its row of the output is what the next token is drawn from.
  const acquired got = manager.acquire({.model = "example"}, prompt, 127);
  if (got.code != status::ok) return;
  const auto new_tokens = static_cast<index_t>(prompt.size()) - got.reused;
  // A model would compute them.
  const std::vector<float> rows(static_cast<std::size_t>(new_tokens * 2 * 32), 0.5F);
  for (index_t layer = 0; layer < 2; ++layer) {
    if (manager.try_append(got.id, layer, rows, rows) != status::ok) break;
  }
  manager.attended(128, 0.001);
  manager.release(got.id);
}

/// Serves for a while and tells what was seen.
void watch(index_t budget_bytes) {
  const page_pool<> pool({.num_layers = 2, .num_kv_heads = 2, .head_dim = 32, .block_size = 32},
                         {.slab_bytes = 1});  // one page at a time
  manager_type manager(pool, {.budget_bytes = budget_bytes, .clock = ticking_clock});
  const auto look = [&] {
    manager.observer().values.memory = gauges_of(manager, pool);
    return manager.observer().values;
  };
  for (token_id user = 0; user < 6; ++user) serve(manager, user);
  const metrics before = look();
  for (int round = 0; round < 20; ++round) {
    for (token_id user = 0; user < 12; ++user) serve(manager, user);
  }
  const metrics interval = look() - before;  // what happened since
  std::printf("== %td KiB\nhit rate of the last 240 requests: %.0f %%\n", budget_bytes / 1024,
              100 * interval.hit_rate().value_or(0));
  for (const recommendation& r : recommend(interval))
    std::printf("- %s: %s\n", r.what.c_str(), r.why.c_str());

  std::stringstream scraped;
  write_prometheus(scraped, manager.observer().values, {{"model", "example"}});
  for (std::string line; std::getline(scraped, line);) {  // a few lines; the rest is bytes and buckets
    if (line.find("tokens_total") != std::string::npos || line.find("evictions_total") != std::string::npos)
      std::printf("%s\n", line.c_str());
  }
}

int main() {
  watch(192_KiB);
  watch(252_KiB);  // as recommended
}
