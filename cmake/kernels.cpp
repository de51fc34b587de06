// SPDX-License-Identifier: MIT
// The kernels, compiled once for all tests, examples and benchmarks: they define KVCACHE_SEPARATE_KERNELS.
#ifndef KVCACHE_SEPARATE_KERNELS
#define KVCACHE_SEPARATE_KERNELS
#endif
#include <kvcache/kernel/tables.hpp>
