// SPDX-License-Identifier: MIT
// Must not compile: copying a cache is a named operation, clone() or fork().
#include <kvcache/cache/chunked.hpp>

int main() {
  kvcache::chunked_cache<> cache{kvcache::cache_shape{}};
  kvcache::chunked_cache<> copy = cache;
  return static_cast<int>(copy.size());
}
