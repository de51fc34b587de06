// SPDX-License-Identifier: MIT
// log_output: a file that grows at its end, as a journal writes it.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/io.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#if defined(KVCACHE_STORE_POSIX)
#include <sys/file.h>
#endif

namespace kvcache::inline v0::store {

class log_output {
 public:
  log_output() = default;
  log_output(const log_output&) = delete;
  log_output& operator=(const log_output&) = delete;
  virtual ~log_output() = default;

  /// Writes the pieces at the end, one after the other. Throws write_error; any part of them may be there then.
  virtual void append(std::span<const std::span<const std::byte>> pieces) = 0;
  /// Begins to write to disk what was appended, without waiting for it.
  virtual void start_sync() = 0;
  /// Returns when all that was appended is on disk. Throws write_error.
  virtual void sync() = 0;
  /// Cuts the file to so many bytes. Throws write_error.
  virtual void cut(std::uint64_t bytes) = 0;
};

#if defined(KVCACHE_STORE_POSIX)

/// A file that one writer at a time may have open.
class log_file final : public log_output {
 public:
  /// Throws std::system_error, with std::errc::resource_unavailable_try_again if another journal has it open.
  log_file(file_handle handle, const std::filesystem::path& path)
      : handle_(std::move(handle)), name_(path.string()) {
    if (::flock(handle_.get(), LOCK_EX | LOCK_NB) == 0) return;
    const int error = errno;
    const char* why = error == EWOULDBLOCK ? ": another journal has it open" : "";
    throw std::system_error(error, std::generic_category(), "kvcache: " + name_ + why);
  }
  /// An existing file, cut to `bytes`, which are on disk then.
  static std::unique_ptr<log_file> open(const std::filesystem::path& path, std::uint64_t bytes) {
    auto file = std::make_unique<log_file>(file_handle(path, O_RDWR), path);
    file->cut(bytes);
    return file;
  }

  void append(std::span<const std::span<const std::byte>> pieces) override {
    std::array<::iovec, 256> vectors;
    std::size_t skipped = 0;  // bytes of the first piece that are written already
    while (!pieces.empty()) {
      const std::size_t count = std::min(pieces.size(), vectors.size());
      for (std::size_t i = 0; i < count; ++i)
        vectors[i] = {const_cast<std::byte*>(pieces[i].data()), pieces[i].size()};
      vectors[0].iov_base = const_cast<std::byte*>(pieces[0].data()) + skipped;
      vectors[0].iov_len -= skipped;
      auto written = ::writev(handle_.get(), vectors.data(), static_cast<int>(count));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) detail::throw_write_error(name_);
      auto done = static_cast<std::size_t>(written) + skipped;
      while (!pieces.empty() && done >= pieces.front().size()) {
        done -= pieces.front().size();
        pieces = pieces.subspan(1);
      }
      skipped = done;
    }
  }

  void start_sync() override {
#if defined(__linux__)
    (void)::sync_file_range(handle_.get(), 0, 0, SYNC_FILE_RANGE_WRITE);  // a hint
#endif
  }
  void sync() override {
#if defined(__APPLE__)
    detail::sync_file(handle_.get(), name_);
#else
    while (::fdatasync(handle_.get()) != 0) {
      if (errno != EINTR) detail::throw_write_error(name_);
    }
#endif
  }
  void cut(std::uint64_t bytes) override {
    const auto size = static_cast<::off_t>(bytes);
    if (::ftruncate(handle_.get(), size) != 0 || ::lseek(handle_.get(), size, SEEK_SET) != size)
      detail::throw_write_error(name_);
    sync();
  }

 private:
  file_handle handle_;
  std::string name_;
};

#endif

}  // namespace kvcache::inline v0::store
