// SPDX-License-Identifier: MIT
// Threads that stay where they are: unpinned, two threads often share one processor and halve every figure.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/interop/eigen_thread_pool.hpp>

#include <algorithm>
#include <barrier>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace kvcache::bench {

/// The processors this process may use; one of each core first, then their siblings. Empty where unknown.
inline std::vector<int> usable_cpus() {
  std::vector<int> cores;
  std::vector<int> siblings;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return {};
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    int first = cpu;
    file >> first;
    (first == cpu || !CPU_ISSET(first, &set) ? cores : siblings).push_back(cpu);
  }
#endif
  cores.insert(cores.end(), siblings.begin(), siblings.end());
  return cores;
}

/// Binds the calling thread to the processor with this index in usable_cpus(), as that was at the first call.
inline void pin_this_thread(index_t index) {
  static const std::vector<int> cpus = usable_cpus();
  if (cpus.empty()) return;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus[static_cast<std::size_t>(index) % cpus.size()], &set);
  (void)pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
#else
  (void)index;
#endif
}

/// Thread counts to measure with: one, and two where there are two processors.
inline std::vector<index_t> thread_counts() {
  static const bool two = usable_cpus().size() != 1;  // before anything is pinned
  return two ? std::vector<index_t>{1, 2} : std::vector<index_t>{1};
}

/// `num_threads` pinned workers, kept for the life of the process. The calling thread is one of them.
inline eigen_thread_pool_executor& pinned_workers(index_t num_threads) {
  static std::map<index_t, std::unique_ptr<eigen_thread_pool_executor>> pools;
  auto& pool = pools[num_threads];
  if (pool == nullptr) {
    pool = std::make_unique<eigen_thread_pool_executor>(num_threads);
    std::barrier all_here(num_threads);  // no worker may take two of the tasks
    pool->run(num_threads, [&](index_t, index_t worker) {
      pin_this_thread(worker);
      all_here.arrive_and_wait();
    });
  }
  return *pool;
}

}  // namespace kvcache::bench
