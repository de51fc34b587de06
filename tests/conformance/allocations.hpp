// SPDX-License-Identifier: MIT
// Replaces the global allocation functions of a test, and counts. Include it in one file of an executable.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace conformance {

inline std::atomic<std::ptrdiff_t> allocations{0};

inline void* counted(std::size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes == 0 ? 1 : bytes)) return p;
  throw std::bad_alloc();
}

inline void* counted(std::size_t bytes, std::align_val_t alignment) {
  ++allocations;
  const auto unit = static_cast<std::size_t>(alignment);
  if (void* p = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit)) return p;
  throw std::bad_alloc();
}

/// Not inlined: compilers that see free() behind operator new take it for a mistake.
[[gnu::noinline]] inline void released(void* p) noexcept { std::free(p); }

/// Allocations while `work` runs. Nothing in `work` may be a test macro: those allocate.
template <class Work>
std::ptrdiff_t allocations_in(Work work) {
  const std::ptrdiff_t before = allocations;
  work();
  return allocations - before;
}

}  // namespace conformance

void* operator new(std::size_t bytes) { return conformance::counted(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes); }
void* operator new[](std::size_t bytes) { return conformance::counted(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return conformance::counted(bytes, alignment);
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return conformance::counted(bytes, alignment);
}
void operator delete(void* p) noexcept { conformance::released(p); }
void operator delete[](void* p) noexcept { conformance::released(p); }
void operator delete(void* p, std::size_t) noexcept { conformance::released(p); }
void operator delete[](void* p, std::size_t) noexcept { conformance::released(p); }
void operator delete(void* p, std::align_val_t) noexcept { conformance::released(p); }
void operator delete[](void* p, std::align_val_t) noexcept { conformance::released(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { conformance::released(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { conformance::released(p); }
