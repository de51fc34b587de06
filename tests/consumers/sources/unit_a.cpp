// SPDX-License-Identifier: MIT
// Two translation units with every header in both: all of it is inline, and both see one set of functions.
#include <kvcache/kvcache.hpp>

const kvcache::kernel::table* kernels_of_unit_b();
kvcache::contiguous_cache<> cache_of_unit_b();

int main() {
  const kvcache::contiguous_cache<> cache = cache_of_unit_b();
  return kernels_of_unit_b() == &kvcache::kernel::best() && cache.size() == 1 ? 0 : 1;
}
