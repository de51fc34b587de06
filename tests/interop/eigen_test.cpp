// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/cache/paged.hpp>
#include <kvcache/interop/eigen.hpp>

#include <vector>

using namespace kvcache;

TEST_CASE("matrices are appended and read back without loops", "[interop]") {
  constexpr index_t heads = 3;
  constexpr index_t dim = 5;
  test::random random;
  matrix k(40, heads * dim);
  matrix v(40, heads * dim);
  random.fill(as_span(k));
  random.fill(as_span(v));
  page_pool<codec::f32> pool({.num_layers = 1, .num_kv_heads = heads, .head_dim = dim, .block_size = 16});
  auto cache = pool.sequence();
  cache[0].append(as_span(std::as_const(k)), as_span(std::as_const(v)));
  for (index_t head = 0; head < heads; ++head) {
    const head_rows rows = rows_of(cache[0], head, 7, 30);
    CHECK(rows.keys == k.block(7, head * dim, 30, dim));
    CHECK(rows.values == v.block(7, head * dim, 30, dim));
  }
}

TEST_CASE("a span is seen as a matrix in place", "[interop]") {
  const std::vector<float> floats{1, 2, 3, 4, 5, 6};
  const auto rows = as_matrix(floats, 3);
  CHECK(rows.rows() == 2);
  CHECK(rows(1, 0) == 4);
  CHECK(rows.data() == floats.data());
}
