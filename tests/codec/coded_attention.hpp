// SPDX-License-Identifier: MIT
// Attention over a cache against attention over the rows that it gives back.
#pragma once

#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace test {

/// The worst difference between attention over a cache and over an f32 cache of the rows it gives back.
template <class Cache>
double attention_error(const Cache& cache, kvcache::index_t layer, const kvcache::kernel::table& kernels,
                       kvcache::index_t q_len, random& random) {
  const kvcache::cache_shape shape = cache.shape();
  const kvcache::index_t size = cache[layer].size();
  const auto n = static_cast<std::size_t>(size * shape.num_kv_heads * shape.head_dim);
  std::vector<float> k(n);
  std::vector<float> v(n);
  cache[layer].copy_out(0, size, k, v);
  kvcache::contiguous_cache<kvcache::codec::f32> plain(shape);
  plain[layer].append(k, v);
  constexpr kvcache::index_t group = 5;
  const std::vector<float> q = random.floats(q_len * group * shape.num_kv_heads * shape.head_dim);
  std::vector<float> got(q.size());
  std::vector<float> expected(q.size());
  const kvcache::attend_options options{.q_len = q_len, .kernel = &kernels};
  attend(q, cache[layer], got, options);
  attend(q, plain[layer], expected, options);
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::fabs(double{got[i]} - double{expected[i]}));
  return worst;
}

}  // namespace test
