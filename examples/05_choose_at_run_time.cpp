// SPDX-License-Identifier: MIT
// Container and codec from a string, as a configuration file or a command line would give it.
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/kvcache.hpp>

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

using kvcache::index_t;

int main() {
  const kvcache::cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 64};
  std::vector<float> kv(70 * 2 * 64), q(8 * 64), out(q.size());  // 70 tokens; 8 query heads
  for (std::size_t i = 0; i < kv.size(); ++i) kv[i] = static_cast<float>(i * 37 % 101) / 50.0f - 1.0f;
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i * 53 % 97) / 48.0f - 1.0f;

  std::vector<float> exact;
  for (const std::string spec : {"contiguous/f32", "chunked/f32", "paged/f32", "paged/f16", "paged/bf16"}) {
    auto cache = kvcache::make_cache(spec, shape);
    for (index_t layer = 0; layer < shape.num_layers; ++layer) cache[layer].append(kv, kv);
    attend(q, cache[0], out);

    if (exact.empty()) exact = out;
    float difference = 0;
    for (std::size_t i = 0; i < out.size(); ++i)
      difference = std::fmax(difference, std::fabs(out[i] - exact[i]));
    const char* verdict = difference == 0      ? "the same bits"
                          : difference < 0.01f ? "within 0.01"
                                               : "different";
    std::printf("%-15s %td tokens, %4td bytes each, output: %s\n", spec.c_str(), cache.size(),
                cache.bytes().payload / cache.size(), verdict);
  }
  try {
    (void)kvcache::make_cache("paged/bf61", shape);
  } catch (const std::invalid_argument&) {
    std::printf("paged/bf61      refused\n");
  }
}
