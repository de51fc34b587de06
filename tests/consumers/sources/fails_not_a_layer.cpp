// SPDX-License-Identifier: MIT
// Must not compile, and the message must name the concept: attention reads one layer, not a whole cache.
#include <kvcache/kvcache.hpp>

#include <vector>

int main() {
  kvcache::contiguous_cache<> cache{kvcache::cache_shape{}};
  const std::vector<float> q(64);
  std::vector<float> out(64);
  kvcache::attend(q, cache, out);
}
