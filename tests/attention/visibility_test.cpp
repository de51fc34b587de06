// SPDX-License-Identifier: MIT
// What visibility says of a whole block, against what it hides of it.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/attention/visibility.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

using namespace kvcache;

namespace {

struct counts {
  int all = 0;
  int some = 0;
  int none = 0;
};

/// Every block of 16 tokens of one sequence, for every query position.
void require_like_hide(const visibility& visible, std::span<const position_segment> segments, index_t kv_len,
                       counts& seen) {
  constexpr index_t block = 16;
  for (index_t first = 0; first < kv_len; first += block) {
    const token_range tokens{first, std::min(first + block, kv_len)};
    std::size_t begin = 0;
    while (begin + 1 < segments.size() && segments[begin + 1].first_token <= tokens.first) ++begin;
    std::size_t end = begin + 1;
    while (end < segments.size() && segments[end].first_token < tokens.last) ++end;
    const auto in_block = segments.subspan(begin, end - begin);
    for (index_t position = 0; position < kv_len + 40; ++position) {
      std::vector<float> scores(block, 1.0F);
      visible.hide(0, position, in_block, tokens, first, block, scores.data());
      const auto num_seen = std::count(scores.begin(), scores.end(), 1.0F);
      const bool all = visible.all(position, in_block, tokens);
      if (all) REQUIRE(num_seen == tokens.last - tokens.first);
      if (num_seen > 0) REQUIRE(visible.any(position, in_block, tokens));
      (all ? seen.all : num_seen == 0 ? seen.none : seen.some) += 1;
    }
  }
}

}  // namespace

TEST_CASE("a block that is seen whole is one of which nothing is hidden", "[attention]") {
  constexpr index_t kv_len = 100;
  counts seen;
  for (const bool causal : {true, false}) {
    for (const index_t window : {0, 1, 5, 16, 40, 200}) {
      for (const index_t sinks : {0, 3, 16, 20}) {
        const attend_options options{.causal = causal, .window = window, .sinks = sinks};
        CAPTURE(causal, window, sinks);
        const visibility visible(options, 1, kv_len, {}, {});
        const std::vector<position_segment> segments[] = {
            {{}}, {{0, 7, 0}}, {{0, 0, 0}, {20, 50, 30}}, {{0, 0, 0}, {32, 60, 28}, {64, 120, 0}}};
        for (const auto& s : segments) require_like_hide(visible, s, kv_len, seen);
      }
    }
  }
  REQUIRE(seen.all > 100);
  REQUIRE(seen.some > 100);
  REQUIRE(seen.none > 100);
}

TEST_CASE("no block is surely seen whole where there is a mask or keys have positions of their own",
          "[attention]") {
  const attend_options options{};
  const std::vector<std::uint8_t> mask(32, 1);
  const std::vector<index_t> positions(32, 0);
  const std::vector<position_segment> segments(1);
  REQUIRE(visibility(options, 1, 32, {}, {}).all(31, segments, {0, 16}));
  REQUIRE_FALSE(visibility(options, 1, 32, mask, {}).all(31, segments, {0, 16}));
  REQUIRE_FALSE(visibility(options, 1, 32, {}, positions).all(31, segments, {0, 16}));
}
