// SPDX-License-Identifier: MIT
// The kernels for AMX on emulated tiles (support/emulated_tiles.hpp), compiled once for all tests.
#pragma once

#include <kvcache/kernel/table.hpp>

#if defined(__x86_64__) && defined(__linux__)

namespace test {

const kvcache::kernel::table& kernels_on_emulated_tiles() noexcept;

}  // namespace test

#endif
