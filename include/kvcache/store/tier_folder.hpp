// SPDX-License-Identifier: MIT
// What directory_tier does with the file system: descriptors, whole reads and writes, a lock among processes, and the
// books of how many bytes are there. Nothing here throws for what the system refuses.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/store/crc32c.hpp>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace kvcache::inline v0::store::detail {

/// An open file, or none. Closes it.
class descriptor {
 public:
  descriptor() = default;
  /// Follows no symbolic link, waits for no pipe. Empty on failure, which errno names.
  descriptor(const std::string& path, int flags, unsigned mode = 0) noexcept {
    do {
      fd_ = ::open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, mode);
    } while (fd_ < 0 && errno == EINTR);
  }
  descriptor(descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor() {
    if (fd_ >= 0) (void)::close(fd_);
  }

  [[nodiscard]] int get() const noexcept { return fd_; }
  [[nodiscard]] explicit operator bool() const noexcept { return fd_ >= 0; }

  /// Size in bytes, unless it is no plain file.
  [[nodiscard]] std::optional<std::uint64_t> size() const noexcept {
    struct ::stat about {};
    if (::fstat(fd_, &about) != 0 || !S_ISREG(about.st_mode) || about.st_size < 0) return std::nullopt;
    return static_cast<std::uint64_t>(about.st_size);
  }

  /// False unless all of `to` is there.
  [[nodiscard]] bool read(std::uint64_t offset, std::span<std::byte> to) const noexcept {
    while (!to.empty()) {
      const auto n = ::pread(fd_, to.data(), std::min(to.size(), most_at_once), static_cast<::off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      offset += static_cast<std::uint64_t>(n);
      to = to.subspan(static_cast<std::size_t>(n));
    }
    return true;
  }

  [[nodiscard]] bool write(std::uint64_t offset, std::span<const std::byte> bytes) const noexcept {
    while (!bytes.empty()) {
      const auto n =
          ::pwrite(fd_, bytes.data(), std::min(bytes.size(), most_at_once), static_cast<::off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      offset += static_cast<std::uint64_t>(n);
      bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
    return true;
  }

 private:
  static constexpr std::size_t most_at_once = std::size_t{1} << 30U;

  int fd_ = -1;
};

/// Bytes on disk that a file of this size is charged.
constexpr std::uint64_t charged_bytes(std::uint64_t size) noexcept { return (size + 4095) / 4096 * 4096; }

/// The lock of a folder, held while the object lives, and the books that lie in the lock file. The system takes the lock
/// from a process that dies.
class folder_books {
 public:
  /// Waits for the lock at most `patience`; does not hold it then.
  folder_books(const std::string& path, unsigned mode, std::chrono::milliseconds patience) noexcept
      : file_(path, O_RDWR | O_CREAT, mode) {
    const auto give_up = std::chrono::steady_clock::now() + patience;
    while (file_ && ::flock(file_.get(), LOCK_EX | LOCK_NB) != 0) {
      if ((errno != EWOULDBLOCK && errno != EINTR) || std::chrono::steady_clock::now() >= give_up) {
        file_ = descriptor();
        return;
      }
      const std::timespec pause{0, 500'000};
      (void)::nanosleep(&pause, nullptr);
    }
  }

  [[nodiscard]] bool held() const noexcept { return static_cast<bool>(file_); }

  /// Bytes charged in all; nothing if the books are not sound, and have to be made anew from the files.
  [[nodiscard]] std::optional<std::uint64_t> total() const noexcept {
    page now{};
    if (!file_.read(0, std::as_writable_bytes(std::span(&now, 1))) || now.crc != checksum(now))
      return std::nullopt;
    return now.total;
  }

  /// False if it could not be written; then total() has nothing or the old number.
  bool set_total(std::uint64_t total) const noexcept {
    page next{magic, total, 0, 0};
    next.crc = checksum(next);
    return file_.write(0, std::as_bytes(std::span(&next, 1)));
  }

 private:
  struct page {
    std::uint64_t magic;
    std::uint64_t total;
    std::uint32_t crc;
    std::uint32_t zero;
  };
  static constexpr std::uint64_t magic = 0x0a424b4552544956U;  // not zero, so that an empty page is not sound

  static std::uint32_t checksum(const page& p) noexcept {
    const std::uint64_t covered[2] = {p.magic, p.total};
    return crc32c(std::as_bytes(std::span(covered))) ^ p.zero ^ (p.magic == magic ? 0U : ~0U);
  }

  descriptor file_;
};

}  // namespace kvcache::inline v0::store::detail
