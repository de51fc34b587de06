// SPDX-License-Identifier: MIT
// What every consumer builds: one token through each container, and attention over it.
#include <kvcache/kvcache.hpp>

#include <cstdio>
#include <vector>

namespace {

// Over a single token the softmax is 1, so the output is the value that was stored.
template <class Cache>
bool writes_and_attends(Cache& cache) {
  const std::vector<float> k(32, 0.5f);
  const std::vector<float> v(32, 0.25f);
  std::vector<float> out(64);
  cache[0].append(k, v);
  kvcache::attend(std::vector<float>(64, 1.0f), cache[0], out);
  for (const float x : out)
    if (x != 0.25f) return false;
  return cache.size() == 1;
}

}  // namespace

int main() {
  const kvcache::cache_shape shape{.num_layers = 1, .num_kv_heads = 2, .head_dim = 16};

  kvcache::contiguous_cache<> contiguous{shape};
  kvcache::chunked_cache<kvcache::codec::f16> chunked{shape};
  kvcache::page_pool<kvcache::codec::f32> pool{shape};
  auto paged = pool.sequence();

  const bool works =
      writes_and_attends(contiguous) && writes_and_attends(chunked) && writes_and_attends(paged);
  std::printf("kvcache %d.%d.%d: %s\n", kvcache::version_major, kvcache::version_minor,
              kvcache::version_patch, works ? "works" : "does not work");
  return works ? 0 : 1;
}
