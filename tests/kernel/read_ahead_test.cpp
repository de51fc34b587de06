// SPDX-License-Identifier: MIT
// The order in which lines of the next block are asked for: every one once, whatever sections share the work.
#include "support/catch.hpp"

#if defined(__x86_64__)
#include <kvcache/kernel/avx2.hpp>
#include <kvcache/kernel/avx512.hpp>
#elif defined(__aarch64__)
#include <kvcache/kernel/neon.hpp>
#endif

#include <algorithm>
#include <vector>

namespace kvcache {
namespace {

#if defined(__x86_64__)
namespace vectors = kernel::avx2;
#elif defined(__aarch64__)
namespace vectors = kernel::neon;
#endif

#if defined(__x86_64__) || defined(__aarch64__)

/// How often each line of a block is asked for by sections of these sizes, each in so many passes over its own lines.
std::vector<int> times_asked(const std::vector<index_t>& sections, index_t passes) {
  index_t block_bytes = 0;
  for (const index_t bytes : sections) block_bytes += bytes;
  const std::vector<std::byte> block(static_cast<std::size_t>(block_bytes) + 4096);
  std::vector<int> asked(static_cast<std::size_t>(block_bytes / 64));
  index_t offset = 0;
  for (const index_t bytes : sections) {
    const std::byte* section = block.data() + offset;
    auto ahead = vectors::page_beside_page(section, section, offset, block_bytes, 64 / passes);
    for (index_t i = 0; i < bytes / 64 * passes; ++i, ahead.step()) {
      const index_t at = ahead.at - block.data();
      REQUIRE(at >= 0);
      REQUIRE(at < block_bytes + 512);  // streams are whole lines: some may end a line late
      if (at < block_bytes) ++asked[static_cast<std::size_t>(at / 64)];
    }
    offset += bytes;
  }
  return asked;
}

TEST_CASE("sections that fetch a block together ask for every line of it once in a pass") {
  const index_t passes = GENERATE(1, 2, 4);
  const index_t section = GENERATE(1024, 4096, 8192, 16384, 32768);
  CAPTURE(passes, section);
  const auto asked = times_asked({section, section}, passes);
  CHECK(std::all_of(asked.begin(), asked.end(), [&](int n) { return n == passes; }));
}

TEST_CASE("sections of other sizes leave out a few lines of a block at most") {
  const auto sections = GENERATE(std::vector<index_t>{8320, 8320}, std::vector<index_t>{12800, 12800},
                                 std::vector<index_t>{32768, 16384}, std::vector<index_t>{8320, 16384},
                                 std::vector<index_t>{64, 64}, std::vector<index_t>{2624, 2624});
  CAPTURE(sections);
  const auto asked = times_asked(sections, 1);
  CHECK(std::count(asked.begin(), asked.end(), 0) <= 8);
  CHECK(*std::max_element(asked.begin(), asked.end()) <= 2);
}

TEST_CASE("pages of a block are asked for beside one another") {
  const std::vector<std::byte> block(32768);
  auto ahead = vectors::page_beside_page(block.data(), block.data(), 0, 32768, 64);
  for (const index_t line : {0, 1, 2}) {
    for (index_t page = 0; page < 8; ++page, ahead.step())
      CHECK(ahead.at - block.data() == 4096 * page + 64 * line);
  }
}

#endif

#if defined(__x86_64__)
TEST_CASE("every line of a packed section is asked for once, in two streams or in order") {
  const index_t num_lines = GENERATE(1, 2, 3, 16, 33, 64);
  const bool by_levels = prefetch::by_levels;
  CAPTURE(num_lines, by_levels);
  const std::vector<std::byte> section(static_cast<std::size_t>(64 * num_lines));
  kernel::avx512::lines_ahead ahead({section.data(), section.data()}, 64 * num_lines);
  std::vector<int> asked(static_cast<std::size_t>(num_lines));
  for (index_t i = 0; i < num_lines; ++i, ahead.step()) {
    const index_t half = ceil_div(num_lines, 2);
    const index_t expected = !by_levels ? i : i % 2 == 0 ? i / 2 : half + i / 2;
    CHECK(ahead.far - section.data() == 64 * expected);
    CHECK(ahead.near - section.data() == 64 * i);
    ++asked.at(static_cast<std::size_t>((ahead.far - section.data()) / 64));
  }
  CHECK(std::all_of(asked.begin(), asked.end(), [](int n) { return n == 1; }));
}
#endif

}  // namespace
}  // namespace kvcache
