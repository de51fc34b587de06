// SPDX-License-Identifier: MIT
// Memory that is kept and handed out again, so that a row which truncates and appends again measures the
// append and not the system's zeroing of new pages. (What fresh memory costs is the subject of
// layout_growth.)
#pragma once

#include <kvcache/core/memory.hpp>

#include <cstddef>
#include <map>
#include <memory_resource>
#include <utility>

namespace kvcache::bench {

class recycling_memory final : public std::pmr::memory_resource {
 public:
  recycling_memory() = default;
  recycling_memory(const recycling_memory&) = delete;
  recycling_memory& operator=(const recycling_memory&) = delete;
  ~recycling_memory() override {
    for (const auto& [size, p] : kept_) huge_page_resource()->deallocate(p, size.first, size.second);
  }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (const auto found = kept_.find({bytes, alignment}); found != kept_.end()) {
      void* p = found->second;
      kept_.erase(found);
      return p;
    }
    return huge_page_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    kept_.emplace(std::pair{bytes, alignment}, p);
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override {
    return this == &other;
  }

  std::multimap<std::pair<std::size_t, std::size_t>, void*> kept_;
};

}  // namespace kvcache::bench
