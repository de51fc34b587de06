// SPDX-License-Identifier: MIT
// Memory resources that count, run out, and fail on purpose.
#pragma once

#include <cstddef>
#include <map>
#include <memory_resource>
#include <new>

namespace conformance {

/// Hands out memory until told to stop, and knows what is out. A block that comes back with another size or
/// alignment, or twice, or never, shows up as `mistakes` or `bytes_out`.
class watched_memory final : public std::pmr::memory_resource {
 public:
  static constexpr std::ptrdiff_t never = -1;

  /// The allocation with this number from now on (0: the next) fails, and all after it.
  void fail_at(std::ptrdiff_t n) { fail_at_ = n < 0 ? never : allocations_ + n; }
  /// More than `bytes` at a time fails.
  void limit(std::size_t bytes) { limit_ = bytes; }

  [[nodiscard]] std::ptrdiff_t allocations() const { return allocations_; }
  [[nodiscard]] std::size_t bytes_out() const { return bytes_out_; }
  [[nodiscard]] std::ptrdiff_t mistakes() const { return mistakes_; }

 private:
  struct piece {
    std::size_t bytes;
    std::size_t alignment;
  };

  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (fail_at_ != never && allocations_ >= fail_at_) throw std::bad_alloc();
    if (bytes > limit_ || bytes_out_ > limit_ - bytes) throw std::bad_alloc();
    void* p = std::pmr::new_delete_resource()->allocate(bytes, alignment);
    pieces_[p] = {bytes, alignment};
    bytes_out_ += bytes;
    ++allocations_;
    return p;
  }

  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    const auto found = pieces_.find(p);
    if (found == pieces_.end() || found->second.bytes != bytes || found->second.alignment != alignment) {
      ++mistakes_;
      return;
    }
    pieces_.erase(found);
    bytes_out_ -= bytes;
    std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
  }

  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override {
    return this == &other;
  }

  std::map<void*, piece> pieces_;
  std::size_t bytes_out_ = 0;
  std::size_t limit_ = ~std::size_t{0};
  std::ptrdiff_t allocations_ = 0;
  std::ptrdiff_t fail_at_ = never;
  std::ptrdiff_t mistakes_ = 0;
};

}  // namespace conformance
