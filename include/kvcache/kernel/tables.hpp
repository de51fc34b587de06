// SPDX-License-Identifier: MIT
// The kernels of all instruction sets. A new one is one header and one line in `tables`.
//
// Included by kernel/select.hpp, or, where KVCACHE_SEPARATE_KERNELS is defined, by one source file of the program.
#pragma once

#include <kvcache/kernel/amx.hpp>
#include <kvcache/kernel/avx2.hpp>
#include <kvcache/kernel/avx512.hpp>
#include <kvcache/kernel/neon.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/table.hpp>

#include <array>
#include <span>

namespace kvcache::inline v0::kernel::detail {

// clang-format off
inline constexpr std::array all_tables = {
    entry{&portable::kernels, [] { return true; }},
#if defined(__x86_64__)
    entry{&avx2::kernels, avx2::runs_here},
    entry{&avx512::kernels, avx512::runs_here},
#if defined(__linux__)
    entry{&amx::kernels, amx::runs_here},
#endif
#endif
#if defined(__aarch64__)
    entry{&neon::kernels, neon::runs_here},
#endif
};
// clang-format on
static_assert(all_tables.size() <= max_tables);

#ifndef KVCACHE_SEPARATE_KERNELS
inline
#endif
    std::span<const entry>
    tables() noexcept {
  return all_tables;
}

}  // namespace kvcache::inline v0::kernel::detail
