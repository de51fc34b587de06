// SPDX-License-Identifier: MIT
// What the operating system says this process has in memory: the most since a moment, to hold against what was counted.
//
// On Linux: VmHWM of /proc/self/status, set back to what is resident by writing 5 to /proc/self/clear_refs. Where that
// is not allowed, what is resident whenever somebody looks. Elsewhere, and under AddressSanitizer and its kin, which
// keep memory that was freed, nothing is known.
//
// Where files are mapped, those are apart: resident is also what the system has read ahead of them, which it takes back
// when it wants. Then it is RssAnon, whenever somebody looks, as the system keeps no mark of that; and RssFile.
#pragma once

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <memory_resource>
#include <new>
#include <optional>
#include <string>
#include <string_view>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace serving {

using kvcache::index_t;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool has_sanitizer = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr bool has_sanitizer = true;
#else
inline constexpr bool has_sanitizer = false;
#endif
#else
inline constexpr bool has_sanitizer = false;
#endif

/// A field of /proc/self/status in bytes; nothing where there is none.
[[nodiscard]] inline std::optional<index_t> status_bytes(std::string_view field) {
  std::ifstream status("/proc/self/status");
  std::string name;
  while (status >> name) {
    index_t kilobytes = 0;
    if (name == field && status >> kilobytes) return kilobytes * 1024;
    std::getline(status, name);
  }
  return std::nullopt;
}

/// Memory for the slabs of pools that goes back to the system at once when it is freed, whatever its size: malloc may
/// keep it, and what one cache has left behind would hide what the next one takes.
class mapped_memory final : public std::pmr::memory_resource {
 private:
#ifdef __linux__
  void* do_allocate(std::size_t num_bytes, std::size_t /*alignment: that of a page of memory*/) override {
    void* at = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    return at;
  }
  void do_deallocate(void* at, std::size_t num_bytes, std::size_t /*alignment*/) override {
    (void)munmap(at, num_bytes);
  }
#else
  void* do_allocate(std::size_t num_bytes, std::size_t alignment) override {
    return std::pmr::new_delete_resource()->allocate(num_bytes, alignment);
  }
  void do_deallocate(void* at, std::size_t num_bytes, std::size_t alignment) override {
    std::pmr::new_delete_resource()->deallocate(at, num_bytes, alignment);
  }
#endif
  [[nodiscard]] bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    return this == &other;
  }
};

/// Growth of the process's resident memory since it was made.
class process_memory {
 public:
  /// \param maps_files  while it is watched
  explicit process_memory(bool maps_files = false) : field_(maps_files ? "RssAnon:" : "VmRSS:") {
    if (has_sanitizer) return;
    if (maps_files) {
      files_before_ = status_bytes("RssFile:");
    } else {
      std::ofstream reset("/proc/self/clear_refs");
      reset << "5" << std::flush;
      marks_ = static_cast<bool>(reset);
    }
    before_ = status_bytes(field_);
  }

  /// To be called often where the system keeps no mark.
  void look() {
    if (!before_ || marks_) return;
    seen_ = std::max(seen_, status_bytes(field_).value_or(0));
    if (files_before_) files_seen_ = std::max(files_seen_, status_bytes("RssFile:").value_or(0));
  }

  /// The most so far, in bytes; without that of files where those are mapped.
  [[nodiscard]] std::optional<index_t> peak() const {
    if (!before_) return std::nullopt;
    const index_t most = marks_ ? status_bytes("VmHWM:").value_or(0) : seen_;
    return std::max(most - *before_, index_t{0});
  }

  /// The most so far of files, in bytes; nothing where they are not apart.
  [[nodiscard]] std::optional<index_t> files_peak() const {
    if (!files_before_) return std::nullopt;
    return std::max(files_seen_ - *files_before_, index_t{0});
  }

 private:
  std::string_view field_;
  bool marks_ = false;
  std::optional<index_t> before_, files_before_;
  index_t seen_ = 0, files_seen_ = 0;
};

}  // namespace serving
