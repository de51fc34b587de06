// SPDX-License-Identifier: MIT
// A step that must not half-happen: what all layers append is kept by commit, or taken back.
#include <kvcache/kvcache.hpp>

#include <cstdio>
#include <stdexcept>
#include <vector>

namespace {

using kvcache::index_t;

/// A forward pass that may fail in the middle of the model.
void forward(kvcache::chunked_cache<>& cache, bool fails) {
  const std::vector<float> kv(2 * 64, 1.0f);  // one token, [2 KV heads, 64]
  auto step = cache.begin(1);                 // room for one token in every layer is set aside here
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer) {
    if (fails && layer == 17) throw std::runtime_error("layer 17 failed");
    cache[layer].append(kv, kv);
  }
  step.commit();
}  // without commit, the step takes everything back here

void print(const char* when, const kvcache::chunked_cache<>& cache) {
  std::printf("%-15s %td tokens, layer 0 has %td, layer 31 has %td\n", when, cache.size(), cache[0].size(),
              cache[31].size());
}

}  // namespace

int main() {
  kvcache::chunked_cache<> cache{{.num_layers = 32, .num_kv_heads = 2, .head_dim = 64}};
  forward(cache, false);
  print("one step", cache);
  try {
    forward(cache, true);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
  print("after that", cache);
  forward(cache, false);
  print("tried again", cache);
}
