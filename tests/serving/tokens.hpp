// SPDX-License-Identifier: MIT
// Keys and values that follow from a space and the tokens up to them, so that a row shared wrongly shows.
#pragma once

#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/cache/paged.hpp>
#include <kvcache/serving/prefix_index.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace serving_test {

using namespace kvcache;
using serving::prefix_space;
using tokens = std::vector<token_id>;

inline constexpr cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 16, .block_size = 16};
inline constexpr index_t row_size = 16;

/// Spaces that differ in one string each, and where strings end.
inline constexpr prefix_space spaces[] = {{"m", "", ""},  {"m", "a", ""}, {"m", "", "a"},
                                          {"ma", "", ""}, {"", "ma", ""}, {"m", "a", "t"}};

/// Rows [first, tokens.size()) of a layer, each from all the tokens up to it; exact in bf16.
inline std::vector<float> rows(const prefix_space& space, std::span<const token_id> path, index_t layer,
                               index_t first, bool values) {
  std::uint64_t h = 0x1234567U + static_cast<std::uint64_t>(layer * 2 + (values ? 1 : 0));
  const auto mix = [&h](std::uint64_t x) {
    h = (h ^ x) * 0x9E3779B97F4A7C15U;
    h ^= h >> 29;
  };
  for (const std::string_view text : {space.model, space.adapter, space.tenant}) {
    for (const char c : text) mix(static_cast<unsigned char>(c));
    mix(0x100);
  }
  std::vector<float> out;
  for (std::size_t t = 0; t < path.size(); ++t) {
    mix(static_cast<std::uint32_t>(path[t]) + 1000U);
    for (int d = 0; static_cast<index_t>(t) >= first && d < row_size; ++d)
      out.push_back(static_cast<float>(static_cast<int>((h >> (4 * d)) & 127U) - 64));
  }
  return out;
}

/// Appends the rows that a cache lacks of these tokens.
template <class Cache>
void compute(Cache& cache, const prefix_space& space, std::span<const token_id> path) {
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const index_t have = cache[layer].size();
    cache[layer].append(rows(space, path, layer, have, false), rows(space, path, layer, have, true));
  }
}

/// Whether a cache holds the rows of these tokens, with errors up to `tolerance`.
template <class Cache>
bool holds(const Cache& cache, const prefix_space& space, std::span<const token_id> path,
           float tolerance = 0) {
  if (cache.size() != static_cast<index_t>(path.size())) return false;
  std::vector<float> k(path.size() * row_size), v(k.size());
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    cache[layer].copy_out(0, cache.size(), k, v);
    const auto want_k = rows(space, path, layer, 0, false), want_v = rows(space, path, layer, 0, true);
    for (std::size_t i = 0; i < k.size(); ++i)
      if (std::abs(k[i] - want_k[i]) > tolerance || std::abs(v[i] - want_v[i]) > tolerance) return false;
  }
  return true;
}

inline index_t common(std::span<const token_id> a, std::span<const token_id> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

/// first, first + 1, ...
inline tokens counted(index_t first, index_t count) {
  tokens path;
  for (index_t i = 0; i < count; ++i) path.push_back(static_cast<token_id>(first + i));
  return path;
}

/// A prompt that often begins like one before it.
inline tokens some_prompt(test::random& random, const std::vector<tokens>& earlier, index_t longest) {
  tokens path;
  if (!earlier.empty() && random.chance(0.8)) {
    const tokens& like =
        earlier[static_cast<std::size_t>(random.below(static_cast<std::ptrdiff_t>(earlier.size())))];
    path.assign(like.begin(), like.begin() + random.between(0, static_cast<std::ptrdiff_t>(like.size())));
    if (random.chance(0.3)) path.resize(path.size() / 16 * 16);
  }
  const index_t add = random.chance(0.3) ? 16 * random.between(0, 2) : random.between(0, 40);
  for (index_t i = 0; i < add && static_cast<index_t>(path.size()) < longest; ++i)
    path.push_back(static_cast<token_id>(random.below(3)) - 1);  // any bits are an id
  return path;
}

}  // namespace serving_test
