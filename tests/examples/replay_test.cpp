// SPDX-License-Identifier: MIT
// What `replay_trace` is made of: reading traces, the workloads, the optimum, and hit rates on published traces.
// KVCACHE_REAL_DIR names the folder with traces/mooncake_*.jsonl; without them the published traces are not tested.
#include "support/catch.hpp"
#include "support/random.hpp"

#include "oracle/optimum_oracle.hpp"
#include "replay/hit_rates.hpp"
#include "replay/optimum.hpp"
#include "replay/policies.hpp"
#include "replay/svg_chart.hpp"
#include "replay/trace_file.hpp"
#include "replay/workloads.hpp"
#include "temporary_folder.hpp"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

using replay::index_t;

namespace {

/// Chains in a random tree of `num_blocks` blocks: every block has one parent.
replay::trace random_trace(test::random& random, index_t num_blocks, index_t num_requests) {
  std::vector<index_t> parents{-1};
  for (index_t i = 1; i < num_blocks; ++i) parents.push_back(random.chance(0.2) ? -1 : random.below(i));
  replay::trace t{.name = "random", .requests = {}};
  for (index_t i = 0; i < num_requests; ++i) {
    replay::request chain;
    for (index_t at = random.below(num_blocks); at >= 0; at = parents[static_cast<std::size_t>(at)])
      chain.push_back(static_cast<replay::block_key>(at));
    std::reverse(chain.begin(), chain.end());
    t.requests.push_back(std::move(chain));
  }
  return t;
}

std::string refusal(const std::string& text) {
  const model_files::temporary_folder folder;
  try {
    (void)replay::read_trace(folder.write("trace.jsonl", text));
  } catch (const llama::model_error& error) {
    const std::string what = error.what();
    return what.substr(what.find("trace.jsonl"));
  }
  return "";
}

std::optional<replay::trace> published_trace(const std::string& name) {
  const char* set = std::getenv("KVCACHE_REAL_DIR");
  const auto real = set != nullptr ? std::filesystem::path(set)
                                   : std::filesystem::path(KVCACHE_SOURCE_DIR) / "../shared/real";
  const auto file = real / "traces" / ("mooncake_" + name + "_trace.jsonl");
  if (std::filesystem::exists(file)) return replay::read_trace(file);
  WARN("skipped: no " << file.string() << "; set KVCACHE_REAL_DIR");
  return std::nullopt;
}

struct expected_rates {
  std::string name;
  std::vector<double> rates;  // at 1, 3, 10 and 30 % of the different blocks
};

void require_at_least(const replay::trace& t, replay::style how, double margin,
                      const std::vector<expected_rates>& expected) {
  const auto measured = replay::measure(t, {{"1%", 0.01}, {"3%", 0.03}, {"10%", 0.1}, {"30%", 0.3}}, how);
  for (const auto& [name, rates] : expected) {
    const auto row = std::find_if(measured.rows.begin(), measured.rows.end(),
                                  [&, &wanted = name](const auto& r) { return r.name == wanted; });
    REQUIRE(row != measured.rows.end());
    for (std::size_t i = 0; i < rates.size(); ++i) {
      CAPTURE(t.name, name, measured.titles[i]);
      CHECK(row->rates[i] >= rates[i] - margin);
      CHECK(row->rates[i] <= measured.rows.back().rates[i]);
    }
  }
}

}  // namespace

TEST_CASE("the optimum is the best that any choice of blocks could give", "[examples]") {
  test::random random;
  for (int round = 0; round < 40; ++round) {
    const auto t = random_trace(random, 5, 4);
    for (const index_t capacity : {0, 1, 2, 3}) {
      const index_t best = oracle::exhaustive_hits(t.requests, static_cast<std::size_t>(capacity));
      CAPTURE(round, capacity);
      REQUIRE(replay::optimum(t).hits(capacity) == best);
      REQUIRE(oracle::belady_hits(t.requests, static_cast<std::size_t>(capacity)) == best);
    }
  }
  for (int round = 0; round < 10; ++round) {
    const auto t = random_trace(random, 30, 60);
    for (const index_t capacity : {1, 5, 13, 29, 30})
      REQUIRE(replay::optimum(t).hits(capacity) ==
              oracle::belady_hits(t.requests, static_cast<std::size_t>(capacity)));
  }
}

TEST_CASE("no policy hits more than the optimum", "[examples]") {
  test::random random;
  for (int round = 0; round < 10; ++round) {
    const auto t = random_trace(random, 60, 300);
    const auto sum = replay::summarize(t);
    for (const index_t capacity : {0, 1, 2, 7, 20, 60}) {
      const index_t best = replay::optimum(t).hits(capacity);
      REQUIRE(best <= sum.most_hits);
      for (const auto how : {replay::style::server, replay::style::tail_first}) {
        for (const auto& policy : replay::policies()) {
          CAPTURE(round, capacity, std::string(policy.name));
          const index_t hits = policy.hits(t, capacity, how);
          REQUIRE(hits <= best);
          if (capacity >= sum.num_different) REQUIRE(hits == sum.most_hits);
        }
      }
    }
  }
}

TEST_CASE("a request longer than the cache keeps its head and never evicts its own blocks", "[examples]") {
  replay::trace t{.name = "long", .requests = {}};
  for (int i = 0; i < 3; ++i) t.requests.push_back({1, 2, 3, 4, 5, 6});
  for (const auto& policy : replay::policies()) {
    CAPTURE(std::string(policy.name));
    CHECK(policy.hits(t, 4, replay::style::server) == 8);
  }
  CHECK(replay::optimum(t).hits(4) == 8);
}

TEST_CASE("a trace file is read line by line", "[examples]") {
  const model_files::temporary_folder folder;
  const auto t = replay::read_trace(folder.write(
      "a.jsonl",
      "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [7, 8]}\r\n\n"
      "{\"hash_ids\": []}\n{\"timestamp\": 1, \"hash_ids\": [7, 9]}"));
  CHECK(t.name == "a.jsonl");
  CHECK(t.requests == std::vector<replay::request>{{7, 8}, {}, {7, 9}});
  const auto sum = replay::summarize(t);
  CHECK(sum.num_blocks == 4);
  CHECK(sum.num_different == 3);
  CHECK(sum.most_hits == 1);
}

TEST_CASE("a bad trace file is refused by file, line and field", "[examples]") {
  const std::string good = "{\"hash_ids\": [1]}\n";
  CHECK(refusal("") == "trace.jsonl: no request with a block in it");
  CHECK(refusal("{\"hash_ids\": []}") == "trace.jsonl: no request with a block in it");
  CHECK(refusal(good + "{\"hash_ids\": [1, 2").find("trace.jsonl: line 2: not valid JSON") == 0);
  CHECK(refusal(good + "[1]") == "trace.jsonl: line 2: not a JSON object");
  CHECK(refusal(good + good + "{}") == "trace.jsonl: line 3: hash_ids: missing");
  CHECK(refusal("{\"hash_ids\": 3}") == "trace.jsonl: line 1: hash_ids: not an array");
  CHECK(refusal("{\"hash_ids\": [1, -2]}") == "trace.jsonl: line 1: hash_ids: -2 is not a block id");
  CHECK(refusal("{\"hash_ids\": [\"x\"]}") == "trace.jsonl: line 1: hash_ids: \"x\" is not a block id");
  CHECK(refusal("{\"hash_ids\": [4, 5, 4]}") == "trace.jsonl: line 1: hash_ids: 4 appears twice");
  CHECK(refusal("{\"timestamp\": -1, \"hash_ids\": [4]}").find("line 1: timestamp: ") != std::string::npos);
  CHECK_THROWS_AS(replay::read_trace("no/such/trace.jsonl"), llama::model_error);
  CHECK_THROWS_AS(replay::read_trace(std::filesystem::temp_directory_path()), llama::model_error);
}

TEST_CASE("a workload is the same for the same seed, and made of chains", "[examples]") {
  for (const auto make : {replay::multi_turn, replay::shared_documents}) {
    const auto t = make(300, 5);
    CHECK(t.requests == make(300, 5).requests);
    CHECK(t.requests != make(300, 6).requests);
    std::vector<std::optional<replay::block_key>> parent(static_cast<std::size_t>(t.num_blocks()));
    std::set<replay::block_key> seen;
    for (const auto& chain : t.requests) {
      for (std::size_t i = 0; i < chain.size(); ++i) {
        std::optional<replay::block_key> before;
        if (i > 0) before = chain[i - 1];
        if (seen.insert(chain[i]).second) parent[chain[i]] = before;
        REQUIRE(parent[chain[i]] == before);
      }
    }
    const auto sum = replay::summarize(t);
    CHECK(2 * sum.most_hits > sum.num_blocks);
  }
}

TEST_CASE("the chart is drawn for any capacity, and names are escaped", "[examples]") {
  const replay::trace t{.name = "<a & b>", .requests = {{1, 2}, {1, 3}}};
  const auto measured = replay::measure(t, {{"1", 0, 1}}, replay::style::server);
  std::ostringstream out;
  replay::write_svg(out, {measured, measured});
  CHECK(out.str().find("&lt;a &amp; b>") != std::string::npos);
  CHECK(out.str().find("nan") == std::string::npos);
  CHECK(out.str().find("inf") == std::string::npos);
}

TEST_CASE("hit rates on published traces are those known for the policies", "[examples]") {
  // What a simulator of each policy gave for the same trace, blocks used from the tail.
  const std::vector<expected_rates> conversation{{"lru", {.053, .126, .279, .358}},
                                                 {"arc", {.065, .136, .284, .349}},
                                                 {"s3_fifo", {.075, .145, .245, .353}},
                                                 {"optimum", {.246, .348, .366, .366}}};
  const std::vector<expected_rates> synthetic{{"lru", {.038, .107, .262, .488}},
                                              {"arc", {.042, .111, .265, .508}},
                                              {"s3_fifo", {.038, .110, .261, .485}},
                                              {"optimum", {.185, .314, .506, .640}}};
  for (const auto& [name, expected] : {std::pair("conversation", conversation), {"synthetic", synthetic}}) {
    const auto t = published_trace(name);
    if (!t) continue;
    require_at_least(*t, replay::style::tail_first, 0.001, expected);
    // A cache of 1 % hardly holds the longest request that is pinned while it runs.
    require_at_least(*t, replay::style::server, 0.0035, expected);
  }
}
