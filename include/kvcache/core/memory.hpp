// SPDX-License-Identifier: MIT
// Where blocks live: 64-byte aligned memory, huge pages advised for large pieces, through std::pmr so that any
// container takes any allocator.
#pragma once

#include <kvcache/core/types.hpp>

#include <cstddef>
#include <cstring>
#include <memory_resource>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kvcache::inline v0 {

/// Every block and every section of a block starts on such a boundary, in bytes.
inline constexpr index_t block_alignment = 64;

namespace detail {

inline constexpr std::size_t huge_page_bytes = std::size_t{2} << 20;

/// Aligned operator new; pieces of 2 MiB and more start on a huge-page boundary and advise the kernel so.
class huge_page_memory_resource final : public std::pmr::memory_resource {
  static std::size_t alignment_for(std::size_t bytes, std::size_t alignment) noexcept {
    return bytes >= huge_page_bytes ? huge_page_bytes : alignment < 64 ? std::size_t{64} : alignment;
  }

  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* p = ::operator new (bytes, std::align_val_t{alignment_for(bytes, alignment)});
#if defined(__linux__)
    // Whole huge pages only, so that no neighbour's memory is advised. Advice: a refusal changes nothing.
    if (bytes >= huge_page_bytes)
      (void)::madvise(p, bytes / huge_page_bytes * huge_page_bytes, MADV_HUGEPAGE);
#endif
    return p;
  }

  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    ::operator delete (p, std::align_val_t{alignment_for(bytes, alignment)});
  }

  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override {
    return dynamic_cast<const huge_page_memory_resource*>(&other) != nullptr;
  }
};

}  // namespace detail

/// The default memory of chunks and pages. Thread-safe, stateless, never destroyed before its users.
inline std::pmr::memory_resource* huge_page_resource() noexcept {
  // In storage that is never destroyed: caches of static lifetime may outlive anything else.
  alignas(
      detail::huge_page_memory_resource) static std::byte storage[sizeof(detail::huge_page_memory_resource)];
  static std::pmr::memory_resource* const resource = ::new (storage) detail::huge_page_memory_resource;
  return resource;
}

/// Whether `count` pieces of `num_bytes` are more than this machine has, and so not worth asking the default
/// resource for; systems that promise memory freely would stop the process instead. Of other resources: no.
inline bool exceeds_memory(index_t count, index_t num_bytes,
                           const std::pmr::memory_resource* resource) noexcept {
#if defined(__linux__)
  static const index_t physical = index_t{::sysconf(_SC_PHYS_PAGES)} * ::sysconf(_SC_PAGESIZE);
  return resource == huge_page_resource() && physical > 0 && count > physical / num_bytes;
#else
  (void)count, (void)num_bytes, (void)resource;
  return false;
#endif
}

/// One piece of block-aligned memory and the resource it goes back to. Move-only, may be empty.
class memory_block {
 public:
  memory_block() = default;

  /// Throws what the resource throws, std::bad_alloc as a rule. The contents are indeterminate.
  memory_block(index_t num_bytes, std::pmr::memory_resource* resource)
      : resource_(resource),
        data_(static_cast<std::byte*>(
            resource->allocate(static_cast<std::size_t>(num_bytes), block_alignment))),
        bytes_(num_bytes) {}

  memory_block(memory_block&& other) noexcept
      : resource_(other.resource_),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}

  memory_block& operator=(memory_block&& other) noexcept {
    memory_block(std::move(other)).swap(*this);
    return *this;
  }

  ~memory_block() {
    if (data_ != nullptr) resource_->deallocate(data_, static_cast<std::size_t>(bytes_), block_alignment);
  }

  void swap(memory_block& other) noexcept {
    std::swap(resource_, other.resource_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] index_t size() const noexcept { return bytes_; }  ///< bytes

 private:
  std::pmr::memory_resource* resource_ = nullptr;
  std::byte* data_ = nullptr;
  index_t bytes_ = 0;
};

}  // namespace kvcache::inline v0
