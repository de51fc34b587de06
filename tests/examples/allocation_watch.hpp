// SPDX-License-Identifier: MIT
// The largest single allocation while a watch is alive, and one that fails on purpose. Include in exactly one file of a test: it replaces
// the global operator new. Eigen allocates past it, so what it allocates is bounded by the sizes the loaders
// have checked.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace model_files {

inline std::size_t largest_allocation = 0;   // bytes
inline long allocations_until_failure = -1;  // that succeed, then one fails; negative: all succeed

class allocation_watch {
 public:
  allocation_watch() { largest_allocation = 0; }
  [[nodiscard]] std::size_t largest() const { return largest_allocation; }
};

}  // namespace model_files

// Not inlined, or g++ sees malloc and delete meet and warns.
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (model_files::allocations_until_failure >= 0 && model_files::allocations_until_failure-- == 0)
    throw std::bad_alloc();
  model_files::largest_allocation = std::max(model_files::largest_allocation, size);
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  model_files::largest_allocation = std::max(model_files::largest_allocation, size);
  return std::malloc(size == 0 ? 1 : size);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
