// SPDX-License-Identifier: MIT
// counted_memory: a memory resource that knows how many bytes are out.
#pragma once

#include <kvcache/core/types.hpp>

#include <cstddef>
#include <memory_resource>

namespace kvcache::inline v0::serving {

/// Hands on what another resource gives, and counts it. Must outlive what is allocated from it. As safe for threads as
/// a container: not by itself.
class counted_memory final : public std::pmr::memory_resource {
 public:
  explicit counted_memory(std::pmr::memory_resource* upstream = std::pmr::new_delete_resource()) noexcept
      : upstream_(upstream) {}

  counted_memory(const counted_memory&) = delete;  // what was allocated refers to it
  counted_memory& operator=(const counted_memory&) = delete;

  /// Bytes asked for and not given back yet.
  [[nodiscard]] index_t bytes() const noexcept { return bytes_; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* p = upstream_->allocate(bytes, alignment);
    bytes_ += static_cast<index_t>(bytes);
    return p;
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    upstream_->deallocate(p, bytes, alignment);
    bytes_ -= static_cast<index_t>(bytes);
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override {
    return this == &other;
  }

  std::pmr::memory_resource* upstream_;
  index_t bytes_ = 0;
};

}  // namespace kvcache::inline v0::serving
