// SPDX-License-Identifier: MIT
// Sequences to store, and what must hold of two that should be the same.
#pragma once

#include "support/catch.hpp"
#include "support/random.hpp"

#include "store/repair.hpp"

#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>

#include <cstddef>
#include <span>
#include <vector>

namespace stored {

using kvcache::cache_shape;
using kvcache::index_t;

/// Appends `count` random tokens to every layer.
template <class Cache>
void append(Cache& cache, index_t count, test::random& random) {
  const cache_shape& shape = cache.shape();
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const auto k = random.floats(count * shape.num_kv_heads * shape.head_dim);
    const auto v = random.floats(count * shape.num_kv_heads * shape.head_dim);
    cache[layer].append(k, v);
  }
}

/// Keys and values of tokens [first, last) of a layer, as floats.
template <class Cache>
std::vector<float> rows(const Cache& cache, index_t layer, index_t first, index_t last) {
  const cache_shape& shape = cache.shape();
  const auto size = static_cast<std::size_t>((last - first) * shape.num_kv_heads * shape.head_dim);
  std::vector<float> all(2 * size);
  cache[layer].copy_out(first, last - first, std::span(all).first(size), std::span(all).last(size));
  return all;
}

/// The same tokens, to the bit, at the same positions.
template <class A, class B>
void require_same(const A& a, const B& b) {
  REQUIRE(a.shape() == b.shape());
  for (index_t layer = 0; layer < a.shape().num_layers; ++layer) {
    REQUIRE(a[layer].size() == b[layer].size());
    REQUIRE(rows(a, layer, 0, a[layer].size()) == rows(b, layer, 0, b[layer].size()));
  }
  for (index_t token = 0; token <= a.size(); ++token) REQUIRE(a.positions()[token] == b.positions()[token]);
  const auto sa = a.positions().segments();
  const auto sb = b.positions().segments();
  REQUIRE(std::vector(sa.begin(), sa.end()) == std::vector(sb.begin(), sb.end()));
}

/// Numbers that bfloat16 has, the same on every machine and in every run: what fixtures are made of.
template <class Cache>
void append_exactly(Cache& cache, index_t count) {
  const cache_shape& shape = cache.shape();
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const auto n = static_cast<std::size_t>(layer);
    std::vector<float> k(static_cast<std::size_t>(count * shape.num_kv_heads * shape.head_dim));
    std::vector<float> v(k.size());
    for (std::size_t i = 0; i < k.size(); ++i) {
      k[i] = static_cast<float>(static_cast<int>((i * 37 + n * 11) % 61) - 30) / 16;
      v[i] = static_cast<float>(static_cast<int>((i * 23 + n * 7) % 53) - 26) / 32;
    }
    cache[layer].append(k, v);
  }
}

}  // namespace stored
