// SPDX-License-Identifier: MIT
// Which levels multiply blocks of bytes as integers here.
#pragma once

#include <kvcache/kernel/neon.hpp>
#include <kvcache/kernel/table.hpp>

namespace test {

/// On ARM it depends on the processor.
inline bool multiplies_integers(kvcache::kernel::isa level) {
#if defined(__aarch64__)
  if (level == kvcache::kernel::isa::neon) return kvcache::kernel::neon::has_dot_products();
#endif
  return level == kvcache::kernel::isa::avx512 || level == kvcache::kernel::isa::amx;
}

}  // namespace test
