// SPDX-License-Identifier: MIT
// cache_step: appends to many layers that take effect together or not at all.
#pragma once

#include <kvcache/core/types.hpp>

#include <utility>

namespace kvcache::inline v0 {

/// An open step, from `cache.begin(tokens)`. Appends to the cache as usual; destroyed without `commit()`, every
/// layer is as it was at `begin`. The cache must not be moved, nor a second step begun, while it is open.
template <class Cache>
class [[nodiscard]] cache_step {
 public:
  explicit cache_step(Cache& cache) noexcept : cache_(&cache) {}
  cache_step(cache_step&& other) noexcept : cache_(std::exchange(other.cache_, nullptr)) {}
  cache_step& operator=(cache_step&&) = delete;
  ~cache_step() { rollback(); }

  /// Keeps what was appended since `begin`, and gives back chunks and pages that were reserved but not used.
  void commit() noexcept {
    if (cache_ != nullptr) std::exchange(cache_, nullptr)->end_step(true);
  }

  /// Takes back what was appended since `begin`; what the destructor does.
  void rollback() noexcept {
    if (cache_ != nullptr) std::exchange(cache_, nullptr)->end_step(false);
  }

 private:
  Cache* cache_;
};

}  // namespace kvcache::inline v0
