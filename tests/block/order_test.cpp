// SPDX-License-Identifier: MIT
// The block order against its definition in words: stored blocks must never change place.
#include "support/catch.hpp"

#include <kvcache/block/order.hpp>

#include <cstdint>
#include <set>
#include <vector>

using namespace kvcache;

namespace {

/// Walks keys and values in the order they are stored and checks that the index formulas count up.
template <class Element>
void check_order(index_t block_size, index_t head_dim) {
  using order = block_order<Element>;
  const block_geometry g{block_size, head_dim};
  const index_t pack = 4 / static_cast<index_t>(sizeof(Element));
  CAPTURE(block_size, head_dim, pack);

  index_t expected = 0;  // [block/16][dim/pack][16 tokens][pack dims]
  bool keys_in_order = true;
  for (index_t group = 0; group < block_size; group += 16) {
    for (index_t d = 0; d < head_dim; d += pack) {
      for (index_t t = group; t < group + 16; ++t) {
        for (index_t j = 0; j < pack; ++j, ++expected) {
          if (d + j < head_dim) keys_in_order = keys_in_order && order::key_index(g, t, d + j) == expected;
        }
      }
    }
  }
  CHECK(keys_in_order);
  CHECK(order::key_size(g) == expected);

  expected = 0;  // [token/pack][dim][pack tokens]
  bool values_in_order = true;
  for (index_t t = 0; t < block_size; t += pack) {
    for (index_t d = 0; d < head_dim; ++d) {
      for (index_t j = 0; j < pack; ++j, ++expected) {
        values_in_order = values_in_order && order::value_index(g, t + j, d) == expected;
      }
    }
  }
  CHECK(values_in_order);
  CHECK(order::value_size(g) == expected);
}

}  // namespace

TEST_CASE("elements of every width lie in the documented order", "[block]") {
  const index_t block_size = GENERATE(16, 32, 64, 128, 256);
  const index_t head_dim = GENERATE(1, 2, 3, 5, 64, 80, 127, 512);
  check_order<std::uint8_t>(block_size, head_dim);
  check_order<std::uint16_t>(block_size, head_dim);
  check_order<float>(block_size, head_dim);
}

TEST_CASE("a few places, spelled out", "[block]") {
  constexpr block_geometry g{64, 128};
  STATIC_REQUIRE(block_order<float>::key_index(g, 0, 0) == 0);
  STATIC_REQUIRE(block_order<float>::key_index(g, 1, 0) == 1);
  STATIC_REQUIRE(block_order<float>::key_index(g, 0, 1) == 16);
  STATIC_REQUIRE(block_order<float>::key_index(g, 16, 0) == 16 * 128);
  STATIC_REQUIRE(block_order<std::uint16_t>::key_index(g, 1, 1) == 3);
  STATIC_REQUIRE(block_order<std::uint16_t>::key_index(g, 0, 2) == 32);
  STATIC_REQUIRE(block_order<std::uint16_t>::value_index(g, 1, 0) == 1);
  STATIC_REQUIRE(block_order<std::uint16_t>::value_index(g, 2, 0) == 256);
  STATIC_REQUIRE(block_order<std::uint8_t>::value_index(g, 3, 1) == 7);
}
