// SPDX-License-Identifier: MIT
// The machine under the benchmarks, as far as it says: processor, caches, memory.
#pragma once

#include <kvcache/core/types.hpp>

#include <string>

namespace kvcache::bench {

/// "Intel(R) Xeon(R) ..." or what the system calls it.
std::string cpu_model();

/// Whether the processor says that it is a virtual one.
bool is_virtual_machine();

/// "always [madvise] never"; empty where the system has no such setting.
std::string huge_page_mode();

index_t last_level_cache_bytes();  ///< of one processor; 32 MiB where unknown
index_t total_memory_bytes();      ///< 0 where unknown
index_t available_memory_bytes();  ///< what can be had without swapping; 0 where unknown

/// Bytes that a ring of copies should have: KVCACHE_BENCH_RING_MIB, or the larger of 1 GiB and four times the
/// last-level cache, but at most a quarter of the available memory.
index_t ring_bytes();

}  // namespace kvcache::bench
