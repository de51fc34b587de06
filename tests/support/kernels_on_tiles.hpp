// SPDX-License-Identifier: MIT
// The kernels for AMX on emulated tiles (support/emulated_tiles.hpp), compiled once for all tests.
#pragma once

#include <kvcache/kernel/select.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <vector>

namespace test {

#if defined(__x86_64__) && defined(__linux__)
const kvcache::kernel::table& kernels_on_emulated_tiles() noexcept;
#endif

/// Every table that runs here, and that for AMX on emulated tiles.
inline std::vector<const kvcache::kernel::table*> every_table() {
  namespace kernel = kvcache::kernel;
  std::vector<const kernel::table*> all;
  for (const kernel::isa level : kernel::available()) all.push_back(&kernel::select(level));
#if defined(__x86_64__) && defined(__linux__)
  if (std::ranges::count(kernel::available(), kernel::isa::avx512) > 0)
    all.push_back(&kernels_on_emulated_tiles());
#endif
  return all;
}

}  // namespace test
