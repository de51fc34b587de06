// SPDX-License-Identifier: MIT
#include "support/kernels_on_tiles.hpp"

#include <kvcache/kernel/amx.hpp>

#include "support/emulated_tiles.hpp"

#if defined(__x86_64__) && defined(__linux__)

const kvcache::kernel::table& test::kernels_on_emulated_tiles() noexcept {
  return kvcache::kernel::amx::kernels_on<test::emulated_tiles>;
}

#endif
