// SPDX-License-Identifier: MIT
// eigen_thread_pool_executor: attention on Eigen's thread pool. Link with -pthread.
#pragma once

#include <kvcache/core/executor.hpp>
#include <kvcache/core/types.hpp>

#if __has_include(<Eigen/ThreadPool>)
#include <Eigen/ThreadPool>  // Eigen 5
#else
#include <unsupported/Eigen/CXX11/ThreadPool>  // Eigen 3.4
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>

namespace kvcache::inline v0 {

/// Owns its pool. One `run` at a time; the calling thread works along as worker 0.
class eigen_thread_pool_executor {
 public:
  /// \param num_threads  threads in all, at least 1; the calling thread is one of them
  explicit eigen_thread_pool_executor(index_t num_threads)
      : num_threads_(std::max(num_threads, index_t{1})),
        pool_(num_threads_ > 1 ? std::make_unique<Eigen::ThreadPool>(static_cast<int>(num_threads_ - 1))
                               : nullptr) {}

  [[nodiscard]] index_t num_workers() const noexcept { return num_threads_; }

  /// Rethrows the first exception a task threw, after all have ended.
  void run(index_t num_tasks, task_ref task) {
    const index_t helpers = std::min(num_threads_, num_tasks) - 1;
    if (helpers < 1) return serial_executor::run(num_tasks, task);

    std::atomic<index_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    const auto work = [&](index_t worker) {
      for (index_t i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) {
        try {
          task(i, worker);
        } catch (...) {
          const std::lock_guard lock(failure_mutex);
          if (!failure) failure = std::current_exception();
        }
      }
    };
    Eigen::Barrier done(static_cast<unsigned>(helpers));
    for (index_t w = 1; w <= helpers; ++w) {
      try {
        pool_->Schedule([&work, &done, w] {
          work(w);
          done.Notify();
        });
      } catch (...) {  // one helper less; its tasks go to the others
        done.Notify();
      }
    }
    work(0);
    done.Wait();
    if (failure) std::rethrow_exception(failure);
  }

 private:
  index_t num_threads_;
  std::unique_ptr<Eigen::ThreadPool> pool_;
};

static_assert(executor<eigen_thread_pool_executor>);

}  // namespace kvcache::inline v0
