// SPDX-License-Identifier: MIT
// address_space: addresses reserved now, memory granted later, so that a region can grow without moving.
//
//   |<------------------- reserved ------------------->|     no memory behind it, no access
//   |<-- granted -->|                                        zero-filled when first touched
//
// Memory granted little by little comes in small pages; `join` makes huge ones of it.
//
// Where the system cannot reserve (not Linux, or a limit on address space), `reserve` answers an empty object
// and the caller falls back to copying growth.
#pragma once

#include <kvcache/core/types.hpp>

#include <cstddef>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kvcache::inline v0 {

class address_space {
 public:
  address_space() = default;

  /// Bytes of a page of the system: what `grant` and `revoke` count in.
  [[nodiscard]] static index_t granularity() noexcept {
#if defined(__linux__)
    static const index_t bytes = ::sysconf(_SC_PAGESIZE);
    return bytes;
#else
    return 4096;
#endif
  }

  /// Reserves `num_bytes` of addresses, on a huge-page boundary; empty if the system refuses. O(1), no memory.
  [[nodiscard]] static address_space reserve(index_t num_bytes) noexcept {
    address_space space;
#if defined(__linux__)
    if (num_bytes <= 0 || num_bytes > (index_t{1} << 46)) return space;
    void* p = ::mmap(nullptr, static_cast<std::size_t>(num_bytes + huge_page), PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return space;
    space.mapping_ = static_cast<std::byte*>(p);
    space.mapped_bytes_ = num_bytes + huge_page;
    const auto misalignment = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(p) % huge_page);
    space.data_ = space.mapping_ + (misalignment == 0 ? 0 : huge_page - misalignment);
    (void)::madvise(p, static_cast<std::size_t>(space.mapped_bytes_), MADV_HUGEPAGE);
#else
    (void)num_bytes;
#endif
    return space;
  }

  /// Makes bytes [first, last) readable and writable; they read as zero until written. Both are multiples of
  /// granularity(). \return false if the system has no memory; then nothing changed.
  [[nodiscard]] bool grant(index_t first, index_t last) const noexcept {
#if defined(__linux__)
    return first >= last ||
           ::mprotect(data_ + first, static_cast<std::size_t>(last - first), PROT_READ | PROT_WRITE) == 0;
#else
    (void)first, (void)last;
    return false;
#endif
  }

  /// Bytes of a huge page, and what joined ranges are multiples of.
  static constexpr index_t huge_page = index_t{2} << 20;

  /// Asks the system to move granted bytes [first, last), multiples of huge_page, into huge pages: 0.5 ms each, several where the
  /// memory is a virtual machine's and new to it, a microsecond where they are that already. \return false if it did not do so
  /// for all of them; they hold what they held either way
  [[nodiscard]] bool join(index_t first, index_t last) const noexcept {
#if defined(__linux__)
    constexpr int collapse = 25;  // MADV_COLLAPSE, of Linux 6.1, which older headers do not have
    return first >= last || ::madvise(data_ + first, static_cast<std::size_t>(last - first), collapse) == 0;
#else
    (void)first, (void)last;
    return false;
#endif
  }

  /// Gives the memory behind [first, last) back and takes the access away. Same units as `grant`.
  void revoke(index_t first, index_t last) const noexcept {
#if defined(__linux__)
    if (first >= last) return;
    (void)::madvise(data_ + first, static_cast<std::size_t>(last - first), MADV_DONTNEED);
    (void)::mprotect(data_ + first, static_cast<std::size_t>(last - first), PROT_NONE);
#else
    (void)first, (void)last;
#endif
  }

  address_space(address_space&& other) noexcept { swap(other); }
  address_space& operator=(address_space&& other) noexcept {
    address_space(std::move(other)).swap(*this);
    return *this;
  }
  ~address_space() {
#if defined(__linux__)
    if (mapping_ != nullptr) (void)::munmap(mapping_, static_cast<std::size_t>(mapped_bytes_));
#endif
  }

  void swap(address_space& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(data_, other.data_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
  }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] explicit operator bool() const noexcept { return data_ != nullptr; }

 private:
  std::byte* mapping_ = nullptr;  // what munmap gets
  std::byte* data_ = nullptr;     // the same, on a huge-page boundary
  index_t mapped_bytes_ = 0;
};

}  // namespace kvcache::inline v0
