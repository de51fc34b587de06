// SPDX-License-Identifier: MIT
// Must not compile, and the message must name the concept.
#include <kvcache/cache/contiguous.hpp>

struct not_a_codec {};

int main() {
  kvcache::contiguous_cache<not_a_codec> cache{kvcache::cache_shape{}};
  return static_cast<int>(cache.size());
}
