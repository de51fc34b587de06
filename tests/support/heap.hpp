// SPDX-License-Identifier: MIT
// Replaces the global allocation functions of a test: counts allocations, knows to the byte what is out, and fails on
// purpose. Include it in one file of an executable.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace heap {

inline std::atomic<std::ptrdiff_t> allocations{0};
inline std::atomic<std::ptrdiff_t> bytes_out{0};
inline std::atomic<std::ptrdiff_t> most_out{0};  // since it was last set
inline std::atomic<int> uncounted_depth{0};
inline std::atomic<std::ptrdiff_t> until_failure{
    -1};  // allocations that still succeed; negative: all of them

/// What is allocated while it lives is not counted: it belongs to the test, not to what is tested.
struct uncounted {
  uncounted() { ++uncounted_depth; }
  uncounted(const uncounted&) = delete;
  uncounted& operator=(const uncounted&) = delete;
  ~uncounted() { --uncounted_depth; }
};

/// Fails the allocation with this number from now on (0: the next), and all after it, while it lives.
struct failing {
  explicit failing(std::ptrdiff_t n) { until_failure = n; }
  failing(const failing&) = delete;
  failing& operator=(const failing&) = delete;
  ~failing() { until_failure = -1; }
  /// Whether it came to that.
  [[nodiscard]] static bool happened() { return until_failure == 0; }
};

/// Allocations while `work` runs. Nothing in `work` may be a test macro: those allocate.
template <class Work>
std::ptrdiff_t allocations_in(Work work) {
  const std::ptrdiff_t before = allocations;
  work();
  return allocations - before;
}

inline void* allocate(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  if (until_failure == 0) throw std::bad_alloc();
  if (until_failure > 0) --until_failure;
  if (alignment < 16) alignment = 16;
  const std::size_t whole = (bytes + alignment - 1) / alignment * alignment + alignment;
  auto* p = static_cast<std::byte*>(std::aligned_alloc(alignment, whole));
  if (p == nullptr) throw std::bad_alloc();
  p += alignment;
  const std::size_t counted = uncounted_depth > 0 ? 0 : bytes;
  *reinterpret_cast<std::size_t*>(p - 16) = counted;
  *reinterpret_cast<std::size_t*>(p - 8) = alignment;
  const std::ptrdiff_t out = bytes_out += static_cast<std::ptrdiff_t>(counted);
  std::ptrdiff_t most = most_out;
  while (most < out && !most_out.compare_exchange_weak(most, out)) continue;
  return p;
}
inline void* try_allocate(std::size_t bytes) noexcept {
  try {
    return allocate(bytes, 16);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
inline void release(void* p) noexcept {
  if (p == nullptr) return;
  auto* user = static_cast<std::byte*>(p);
  bytes_out -= static_cast<std::ptrdiff_t>(*reinterpret_cast<std::size_t*>(user - 16));
  std::free(user - *reinterpret_cast<std::size_t*>(user - 8));
}

}  // namespace heap

void* operator new(std::size_t n) { return heap::allocate(n, 16); }
void* operator new[](std::size_t n) { return heap::allocate(n, 16); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return heap::try_allocate(n); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return heap::try_allocate(n); }
void* operator new(std::size_t n, std::align_val_t a) {
  return heap::allocate(n, static_cast<std::size_t>(a));
}
void* operator new[](std::size_t n, std::align_val_t a) {
  return heap::allocate(n, static_cast<std::size_t>(a));
}
void operator delete(void* p) noexcept { heap::release(p); }
void operator delete[](void* p) noexcept { heap::release(p); }
void operator delete(void* p, std::size_t) noexcept { heap::release(p); }
void operator delete[](void* p, std::size_t) noexcept { heap::release(p); }
void operator delete(void* p, std::align_val_t) noexcept { heap::release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { heap::release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { heap::release(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { heap::release(p); }
