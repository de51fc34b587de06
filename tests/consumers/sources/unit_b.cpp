// SPDX-License-Identifier: MIT
// See unit_a.cpp.
#include <kvcache/kvcache.hpp>

#include <vector>

const kvcache::kernel::table* kernels_of_unit_b() { return &kvcache::kernel::best(); }

kvcache::contiguous_cache<> cache_of_unit_b() {
  kvcache::contiguous_cache<> cache{{.num_layers = 1, .num_kv_heads = 1, .head_dim = 8}};
  const std::vector<float> row(8, 1.0f);
  cache[0].append(row, row);
  return cache;
}
