// SPDX-License-Identifier: MIT
// openmp_executor: attention on OpenMP's threads. Compile with -fopenmp; without it everything runs on one thread.
#pragma once

#include <kvcache/core/executor.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace kvcache::inline v0 {

class openmp_executor {
 public:
  /// \param num_threads  0: as many as OpenMP would use
  explicit openmp_executor(index_t num_threads = 0) noexcept {
#if defined(_OPENMP)
    num_threads_ = num_threads > 0 ? num_threads : index_t{omp_get_max_threads()};
#else
    (void)num_threads;
#endif
  }

  [[nodiscard]] index_t num_workers() const noexcept { return num_threads_; }

  /// Rethrows the first exception a task threw, after all have ended.
  void run(index_t num_tasks, task_ref task) const {
#if defined(_OPENMP)
    std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast <int>(num_threads_))
    for (index_t i = 0; i < num_tasks; ++i) {
      try {
        task(i, omp_get_thread_num());
      } catch (...) {
#pragma omp critical(kvcache_openmp_executor)
        if (!failure) failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
#else
    serial_executor::run(num_tasks, task);
#endif
  }

 private:
  index_t num_threads_ = 1;
};

static_assert(executor<openmp_executor>);

}  // namespace kvcache::inline v0
