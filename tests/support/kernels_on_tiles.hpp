// SPDX-License-Identifier: MIT
// The kernels for AMX on emulated tiles (support/emulated_tiles.hpp), compiled once for all tests.
#pragma once

#include <kvcache/kernel/select.hpp>
#include <kvcache/kernel/table.hpp>

#include <vector>

namespace test {

/// Null where they do not run: they need AVX-512 with BF16 and VBMI, and are compiled on Linux only.
#if defined(__x86_64__) && defined(__linux__)
const kvcache::kernel::table* kernels_on_emulated_tiles() noexcept;
#else
inline const kvcache::kernel::table* kernels_on_emulated_tiles() noexcept { return nullptr; }
#endif

/// Every table that runs here, and that for AMX on emulated tiles.
inline std::vector<const kvcache::kernel::table*> every_table() {
  namespace kernel = kvcache::kernel;
  std::vector<const kernel::table*> all;
  for (const kernel::isa level : kernel::available()) all.push_back(&kernel::select(level));
  if (const kernel::table* tiles = kernels_on_emulated_tiles()) all.push_back(tiles);
  return all;
}

}  // namespace test
