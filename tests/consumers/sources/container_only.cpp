// SPDX-License-Identifier: MIT
// Storing tokens needs no Eigen: compiled without its include path.
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>

#include <vector>

int main() {
  const kvcache::cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 8};
  const std::vector<float> row(8, 1.0f);

  kvcache::contiguous_cache<> contiguous{shape};
  kvcache::chunked_cache<> chunked{shape};
  kvcache::page_pool<> pool{shape};
  auto paged = pool.sequence();
  for (kvcache::index_t layer = 0; layer < shape.num_layers; ++layer) {
    contiguous[layer].append(row, row);
    chunked[layer].append(row, row);
    paged[layer].append(row, row);
  }
  return contiguous.size() + chunked.size() + paged.size() == 3 ? 0 : 1;
}
