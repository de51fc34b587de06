// SPDX-License-Identifier: MIT
// Sequences to store, and what must hold of two that should be the same.
#pragma once

#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/crc32c.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
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

/// Makes every checksum of a file right for what it has now: what damage alone never does, and malice may.
inline void repair(std::vector<std::byte>& file) {
  const auto number = [&]<class Number>(std::size_t at, Number) {
    Number value{};
    if (at <= file.size() && sizeof(value) <= file.size() - at)
      std::memcpy(&value, file.data() + at, sizeof(value));
    return value;
  };
  const auto put = [&](std::size_t at, std::uint32_t value) {
    if (at + 4 <= file.size()) std::memcpy(file.data() + at, &value, 4);
  };
  const auto bytes = std::span<const std::byte>(file);
  const std::uint64_t table_end = number(24, std::uint64_t{});
  for (std::size_t entry = 64; entry + 64 <= table_end && entry + 64 <= file.size(); entry += 64) {
    const std::uint64_t offset = number(entry + 8, std::uint64_t{});
    const std::uint64_t size = number(entry + 16, std::uint64_t{});
    if (offset <= file.size() && size <= file.size() - offset)
      put(entry + 32, kvcache::store::crc32c(bytes.subspan(offset, size)));
  }
  put(60, 0);
  if (table_end <= file.size()) put(60, kvcache::store::crc32c(bytes.first(table_end)));
}

}  // namespace stored
