// SPDX-License-Identifier: MIT
// Who runs the tasks of an attention call. The library starts no threads; the caller's executor may.
//
// An executor runs `task(index, worker)` once for every index in [0, num_tasks) and returns when all are done.
// `worker` is in [0, num_workers()); two calls that run at the same time have different workers. Results do not
// depend on the order, nor on how many workers there are.
#pragma once

#include <kvcache/core/types.hpp>

#include <concepts>
#include <memory>
#include <type_traits>
#include <utility>

namespace kvcache::inline v0 {

/// A reference to a callable `void(task, worker)`: two pointers, no allocation. The callable must outlive it.
class task_ref {
 public:
  // NOLINTBEGIN(google-explicit-constructor,bugprone-forwarding-reference-overload): a view of any callable
  template <class F, class = std::enable_if_t<!std::is_same_v<std::remove_cvref_t<F>, task_ref> &&
                                              std::is_invocable_v<F&, index_t, index_t>>>
  task_ref(F&& f) noexcept
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, index_t task, index_t worker) {
          (*static_cast<std::remove_reference_t<F>*>(object))(task, worker);
        }) {}
  // NOLINTEND(google-explicit-constructor,bugprone-forwarding-reference-overload)

  void operator()(index_t task, index_t worker) const { call_(object_, task, worker); }

 private:
  void* object_;
  void (*call_)(void*, index_t, index_t);
};

template <class E>
concept executor = requires(E& e, index_t n, task_ref f) {
  { e.num_workers() } -> std::convertible_to<index_t>;
  e.run(n, f);
};

/// Runs every task in order on the calling thread. The default everywhere.
struct serial_executor {
  [[nodiscard]] static constexpr index_t num_workers() noexcept { return 1; }

  static void run(index_t num_tasks, task_ref task) {
    for (index_t i = 0; i < num_tasks; ++i) task(i, 0);
  }
};

/// A reference to any executor, for interfaces that cannot be templates. It must not outlive the executor.
class executor_ref {
 public:
  template <executor Executor>
  requires(!std::is_same_v<Executor, executor_ref>) explicit executor_ref(Executor& executor) noexcept
      : executor_(const_cast<void*>(static_cast<const void*>(std::addressof(executor)))),
        num_workers_(executor.num_workers()),
        run_([](void* self, index_t num_tasks, task_ref task) {
          static_cast<Executor*>(self)->run(num_tasks, task);
        }) {}

  [[nodiscard]] index_t num_workers() const noexcept { return num_workers_; }
  void run(index_t num_tasks, task_ref task) const { run_(executor_, num_tasks, task); }

 private:
  void* executor_;
  index_t num_workers_;
  void (*run_)(void*, index_t, task_ref);
};

static_assert(executor<serial_executor> && executor<executor_ref>);

}  // namespace kvcache::inline v0
