// SPDX-License-Identifier: MIT
// Executors only run tasks: results are the serial one's, bit for bit, and what a task throws comes out.

#include <kvcache/interop/eigen_thread_pool.hpp>
#include <kvcache/interop/openmp.hpp>

#include "attention/problem.hpp"

#include <memory>
#include <stdexcept>

using namespace attention_test;

namespace {

/// Runs tasks last to first, and pretends to be several workers.
struct backwards {
  [[nodiscard]] static index_t num_workers() { return 5; }
  static void run(index_t num_tasks, kvcache::task_ref task) {
    for (index_t i = num_tasks; i-- > 0;) task(i, i % 5);
  }
};

template <class Executor>
void check_runs_each_task_once(Executor&& executor) {
  for (const index_t num_tasks : {0, 1, 2, 7, 100}) {
    std::vector<int> runs(static_cast<std::size_t>(num_tasks), 0);
    std::vector<int> worker_fits(static_cast<std::size_t>(num_tasks), 0);
    const index_t num_workers = executor.num_workers();
    REQUIRE(num_workers >= 1);
    executor.run(num_tasks, [&](index_t task, index_t worker) {
      ++runs[static_cast<std::size_t>(task)];
      worker_fits[static_cast<std::size_t>(task)] = worker >= 0 && worker < num_workers ? 1 : 0;
    });
    REQUIRE(runs == std::vector<int>(runs.size(), 1));
    REQUIRE(worker_fits == std::vector<int>(runs.size(), 1));
  }
}

template <class Executor>
void check_passes_exceptions_on(Executor&& executor) {
  const auto throwing = [&](index_t at) {
    executor.run(20, [at](index_t task, index_t) {
      if (task == at) throw std::runtime_error("task");
    });
  };
  for (const index_t at : {0, 7, 19}) REQUIRE_THROWS_AS(throwing(at), std::runtime_error);
  check_runs_each_task_once(executor);  // and is as good as new
}

}  // namespace

TEST_CASE("every executor runs each task once", "[attention]") {
  check_runs_each_task_once(kvcache::serial_executor{});
  for (const index_t n : {1, 2, 5}) {
    check_runs_each_task_once(kvcache::openmp_executor(n));
    check_runs_each_task_once(kvcache::eigen_thread_pool_executor(n));
  }
  REQUIRE(kvcache::openmp_executor(1).num_workers() == 1);
  REQUIRE(kvcache::openmp_executor().num_workers() >= 1);
  REQUIRE(kvcache::eigen_thread_pool_executor(3).num_workers() == 3);
}

TEST_CASE("what a task throws leaves the executor that ran it", "[attention]") {
  check_passes_exceptions_on(kvcache::serial_executor{});
  check_passes_exceptions_on(kvcache::openmp_executor(2));
  check_passes_exceptions_on(kvcache::eigen_thread_pool_executor(3));
}

TEST_CASE("whoever computes, the bits are the same", "[attention]") {
  test::random random;
  kvcache::eigen_thread_pool_executor pool(3);
  for (const problem& p : varied_problems(random)) {
    CAPTURE(p.n.q_len, p.n.kv_len, p.n.head_dim);
    const auto cache = filled<kvcache::contiguous_cache<codec::bf16>>(p, 64);
    const answer want = computed(p, cache[0]);
    require_same_bits(computed(p, cache[0], backwards{}), want);
    require_same_bits(computed(p, cache[0], kvcache::openmp_executor(2)), want);
    require_same_bits(computed(p, cache[0], pool), want);
    kvcache::attend_workspace workspace;
    problem with = p;
    with.options.workspace = &workspace;
    require_same_bits(computed(with, cache[0], backwards{}), want);
    require_same_bits(computed(with, cache[0], pool), want);
    require_same_bits(computed(with, cache[0]), want);
  }
}
