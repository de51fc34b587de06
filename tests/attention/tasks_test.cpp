// SPDX-License-Identifier: MIT
// Which kernels attend takes, and into how many tasks it cuts its work: nothing that results would show.

#include "attention/problem.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

using namespace attention_test;

namespace {

/// Remembers how many tasks it was given, by call.
struct counting_executor {
  index_t workers = 1;
  std::vector<index_t> calls;

  [[nodiscard]] index_t num_workers() const noexcept { return workers; }
  void run(index_t num_tasks, kvcache::task_ref task) {
    calls.push_back(num_tasks);
    kvcache::serial_executor::run(num_tasks, task);
  }
};

constexpr index_t num_kv_heads = 2;
constexpr index_t head_dim = 16;

/// The tasks of decoding one token behind each of these lengths, in one batch.
std::vector<index_t> tasks_of(const std::vector<index_t>& lengths, index_t workers) {
  test::random random;
  std::vector<kvcache::contiguous_cache<codec::f32>> caches;
  std::vector<std::vector<float>> rows;  // queries, then outputs
  for (const index_t length : lengths) {
    const problem p = make_problem(random, {1, length, num_kv_heads, num_kv_heads, head_dim});
    caches.push_back(filled<kvcache::contiguous_cache<codec::f32>>(p, 64));
    rows.push_back(p.q);
  }
  using layer = decltype(caches[0][0]);
  std::vector<kvcache::attend_item<layer>> batch;
  for (std::size_t i = 0; i < lengths.size(); ++i) batch.push_back({rows[i], caches[i][0], rows[i]});
  counting_executor executor{workers, {}};
  kvcache::attend(std::span<const kvcache::attend_item<layer>>(batch), {}, executor);
  return executor.calls;
}

}  // namespace

TEST_CASE("attend runs on the kernels that KVCACHE_ISA names, and names those that there are",
          "[attention]") {
  const char* const forced = std::getenv("KVCACHE_ISA");
  const std::string name = forced != nullptr ? forced : "";
  REQUIRE(setenv("KVCACHE_ISA", "sse9", 1) == 0);
  std::string refusal;
  try {
    (void)kvcache::kernel::best();  // nothing in this program has asked before
  } catch (const std::invalid_argument& e) {
    refusal = e.what();
  }
  const bool was_set = forced != nullptr;
  REQUIRE((was_set ? setenv("KVCACHE_ISA", name.c_str(), 1) : unsetenv("KVCACHE_ISA")) == 0);
  REQUIRE(refusal.find("sse9") != std::string::npos);
  REQUIRE(refusal.find("portable") != std::string::npos);

  const kvcache::kernel::isa last = kvcache::kernel::available().back();
  REQUIRE(to_string(kvcache::kernel::best().level) == (name.empty() ? to_string(last) : name));
}

TEST_CASE("work is cut into spans where its tiles would leave workers idle", "[attention]") {
  using calls = std::vector<index_t>;
  REQUIRE(tasks_of({9000}, 1) == calls{2});      // KV heads
  REQUIRE(tasks_of({9000}, 2) == calls{10, 2});  // spans of 2048 tokens, then their sums
  REQUIRE(tasks_of({2000}, 2) == calls{2});      // nothing to cut
  REQUIRE(tasks_of({300, 400, 500, 600}, 2) == calls{8});
  REQUIRE(tasks_of({300, 400, 500, 600, 9000}, 2) == calls{18, 10});  // one outlasts the others
}
