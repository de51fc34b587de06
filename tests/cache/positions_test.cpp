// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/cache/positions.hpp>

#include <vector>

using namespace kvcache;

namespace {

/// The same, token by token.
struct plain_positions {
  std::vector<index_t> position, rotation;

  void grow(index_t size) {
    while (static_cast<index_t>(position.size()) < size) {
      position.push_back(position.empty() ? 0 : position.back() + 1);
      rotation.push_back(0);
    }
  }
  void shift(index_t first, index_t last, index_t delta) {
    for (index_t t = first; t < last; ++t) {
      position[static_cast<std::size_t>(t)] += delta;
      rotation[static_cast<std::size_t>(t)] += delta;
    }
  }
};

void check_same(const position_map& map, const plain_positions& plain) {
  const auto segments = map.segments();
  REQUIRE(!segments.empty());
  CHECK(segments.front().first_token == 0);
  std::size_t s = 0;
  for (index_t t = 0; t < static_cast<index_t>(plain.position.size()); ++t) {
    while (s + 1 < segments.size() && segments[s + 1].first_token <= t) ++s;
    CHECK(map[t] == plain.position[static_cast<std::size_t>(t)]);
    CHECK(segments[s].rotation == plain.rotation[static_cast<std::size_t>(t)]);
  }
  if (!plain.position.empty())
    CHECK(map[static_cast<index_t>(plain.position.size())] == plain.position.back() + 1);
}

}  // namespace

TEST_CASE("positions count up from zero until something is shifted", "[cache]") {
  const position_map map;
  CHECK(map.segments().size() == 1);
  CHECK(map[0] == 0);
  CHECK(map[1234] == 1234);
}

TEST_CASE("a context shift moves the kept tokens and new ones continue after them", "[cache]") {
  position_map map;
  map.shift(40, 100, -36, 100);
  CHECK(map[39] == 39);
  CHECK(map[40] == 4);
  CHECK(map[99] == 63);
  CHECK(map[100] == 64);  // the next token
  CHECK(map.segments().size() == 3);
  CHECK(map.segments()[1].rotation == -36);
  CHECK(map.segments()[2].rotation == 0);  // keys appended from now on are rotated for where they are
  map.shift(40, 100, 36, 100);
  CHECK(map.segments().size() == 1);  // and back
}

TEST_CASE("random shifts, growth and truncation equal token by token bookkeeping", "[cache]") {
  test::random random;
  for (int round = 0; round < 200; ++round) {
    position_map map;
    plain_positions plain;
    index_t size = 0;
    for (int i = 0; i < 12; ++i) {
      size += random.below(30);
      plain.grow(size);
      if (size > 0 && random.chance(0.7)) {
        const index_t first = random.below(size);
        const index_t last = random.between(first, size);
        const index_t delta = random.between(-20, 20);
        map.shift(first, last, delta, size);
        plain.shift(first, last, delta);
      }
      if (random.chance(0.4)) {
        size = random.between(0, size);
        map.truncate(size);
        plain.position.resize(static_cast<std::size_t>(size));
        plain.rotation.resize(static_cast<std::size_t>(size));
      }
      check_same(map, plain);
    }
  }
}
