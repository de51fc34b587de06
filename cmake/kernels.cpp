// SPDX-License-Identifier: MIT
// The kernels, compiled once for all tests, examples and benchmarks: they define KVCACHE_SEPARATE_KERNELS.
#include <kvcache/kernel/tables.hpp>
