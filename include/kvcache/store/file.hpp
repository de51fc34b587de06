// SPDX-License-Identifier: MIT
// Files: read at any place, replaced as a whole, appended to, mapped. What POSIX has; elsewhere plain streams, which
// neither map nor wait for the disk.
//
// atomic_file: a new file appears under its name complete and on disk, or not at all. It is written under another name in
// the same folder, synced, renamed, and the folder synced.
#pragma once

#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/io.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#define KVCACHE_STORE_POSIX 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#else
#include <fstream>
#endif

namespace kvcache::inline v0::store {

#if defined(KVCACHE_STORE_POSIX)

/// A file descriptor, closed with the object. Move-only, may be empty.
class file_handle {
 public:
  file_handle() = default;
  /// Throws std::system_error naming the file.
  file_handle(const std::filesystem::path& path, int flags, unsigned mode = 0666) {
    do {
      fd_ = ::open(path.c_str(), flags | O_CLOEXEC, mode);
    } while (fd_ < 0 && errno == EINTR);
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "kvcache: " + path.string());
  }
  file_handle(file_handle&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  file_handle& operator=(file_handle&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~file_handle() { close(); }

  [[nodiscard]] int get() const noexcept { return fd_; }
  [[nodiscard]] explicit operator bool() const noexcept { return fd_ >= 0; }
  void close() noexcept {
    if (fd_ >= 0) (void)::close(std::exchange(fd_, -1));
  }

 private:
  int fd_ = -1;
};

namespace detail {

[[noreturn]] inline void throw_write_error(const std::string& what) {
  throw write_error("kvcache: " + what + ": " + std::generic_category().message(errno));
}

/// All of `bytes`, however the system cuts it up.
inline void write_fully(int fd, std::span<const std::byte> bytes, const std::string& name) {
  while (!bytes.empty()) {
    const auto n = ::write(fd, bytes.data(), std::min(bytes.size(), std::size_t{1} << 30U));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw_write_error(name);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

inline void sync_file(int fd, const std::string& name) {
  while (::fsync(fd) != 0) {
    if (errno != EINTR) throw_write_error(name);
  }
}

/// Makes the names in a folder durable. File systems that cannot say so are taken at their word.
inline void sync_folder_of(const std::filesystem::path& path) {
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  const file_handle handle(folder, O_RDONLY | O_DIRECTORY);
  if (::fsync(handle.get()) != 0 && errno != EINVAL && errno != EROFS) throw_write_error(folder.string());
}

}  // namespace detail

/// A file that is read, or mapped.
class file_source final : public byte_source {
 public:
  /// Throws std::system_error if it cannot be opened, load_error if it is no plain file.
  explicit file_source(const std::filesystem::path& path) : path_(path), handle_(path, O_RDONLY) {
    struct ::stat about {};
    if (::fstat(handle_.get(), &about) != 0 || !S_ISREG(about.st_mode) || about.st_size < 0)
      throw load_error(path.string(), 0, "this is no plain file");
    size_ = static_cast<std::uint64_t>(about.st_size);
  }

  [[nodiscard]] std::string name() const override { return path_.string(); }
  [[nodiscard]] std::uint64_t size() const noexcept override { return size_; }
  [[nodiscard]] int descriptor() const noexcept { return handle_.get(); }

  void read(std::uint64_t offset, std::span<std::byte> to) const override {
    while (!to.empty()) {
      const auto n = ::pread(handle_.get(), to.data(), std::min(to.size(), std::size_t{1} << 30U),
                             static_cast<::off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0)
        throw load_error(name(), offset, "reading failed: " + std::generic_category().message(errno));
      if (n == 0) throw load_error(name(), offset, "the data end too early");
      offset += static_cast<std::uint64_t>(n);
      to = to.subspan(static_cast<std::size_t>(n));
    }
  }

 private:
  std::filesystem::path path_;
  file_handle handle_;
  std::uint64_t size_ = 0;
};

/// A file's bytes in memory, read-only: the pages of the file themselves. A file that is cut short while it is mapped
/// ends the process that reads what is gone (SIGBUS); files that are replaced, as save does, stay what they were.
class file_mapping {
 public:
  file_mapping() = default;
  /// Throws load_error if the system cannot.
  explicit file_mapping(const file_source& source) : size_(static_cast<std::size_t>(source.size())) {
    if (size_ == 0) return;
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, source.descriptor(), 0);
    if (mapped == MAP_FAILED)
      throw load_error(source.name(), 0, "mapping failed: " + std::generic_category().message(errno));
    data_ = static_cast<const std::byte*>(mapped);
  }
  file_mapping(file_mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  file_mapping& operator=(file_mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~file_mapping() {
    if (data_ != nullptr) (void)::munmap(const_cast<std::byte*>(data_), size_);
  }

  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// A file that replaces `path` on commit(); destroyed before that, it leaves no trace.
class atomic_file final : public byte_sink {
 public:
  /// Throws std::system_error.
  explicit atomic_file(const std::filesystem::path& path) : path_(path) {
    static std::atomic<unsigned> count{0};
    for (int attempt = 0;; ++attempt) {
      temporary_ = path_;
      temporary_ += ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(count.fetch_add(1));
      try {
        handle_ = file_handle(temporary_, O_RDWR | O_CREAT | O_EXCL);
        return;
      } catch (const std::system_error& error) {
        if (error.code() != std::errc::file_exists || attempt == 100) throw;
      }
    }
  }
  ~atomic_file() override {
    if (handle_) (void)::unlink(temporary_.c_str());
  }

  void write(std::span<const std::byte> bytes) override {
    detail::write_fully(handle_.get(), bytes, temporary_.string());
  }

  /// The file takes the place of what had its name, in one step; the step itself is not yet on disk.
  /// \return the file, open at its end. Throws write_error, then nothing changed.
  file_handle replace() {
    detail::sync_file(handle_.get(), temporary_.string());
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) detail::throw_write_error(path_.string());
    return std::move(handle_);
  }

  /// replace(), and waits until that is on disk. Throws write_error or std::system_error.
  void commit() {
    (void)replace();
    detail::sync_folder_of(path_);
  }

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  file_handle handle_;
};

#else

class file_source final : public byte_source {
 public:
  explicit file_source(const std::filesystem::path& path) : path_(path), stream_(path, std::ios::binary) {
    std::error_code error;
    size_ = std::filesystem::file_size(path, error);
    if (error || !stream_) throw std::system_error(error, "kvcache: " + path.string());
  }
  [[nodiscard]] std::string name() const override { return path_.string(); }
  [[nodiscard]] std::uint64_t size() const noexcept override { return size_; }
  void read(std::uint64_t offset, std::span<std::byte> to) const override {
    stream_.clear();
    stream_.seekg(static_cast<std::streamoff>(offset));
    stream_.read(reinterpret_cast<char*>(to.data()), static_cast<std::streamsize>(to.size()));
    if (!stream_) throw load_error(name(), offset, "the data end too early");
  }

 private:
  std::filesystem::path path_;
  mutable std::ifstream stream_;
  std::uint64_t size_ = 0;
};

/// The whole file, read into memory.
class file_mapping {
 public:
  file_mapping() = default;
  explicit file_mapping(const file_source& source)
      : memory_(static_cast<index_t>(std::max<std::uint64_t>(source.size(), 1)), huge_page_resource()),
        size_(static_cast<std::size_t>(source.size())) {
    source.read(0, {memory_.data(), size_});
  }
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {memory_.data(), size_}; }

 private:
  memory_block memory_;
  std::size_t size_ = 0;
};

class atomic_file final : public byte_sink {
 public:
  explicit atomic_file(const std::filesystem::path& path) : path_(path), temporary_(path) {
    temporary_ += ".tmp";
    stream_.open(temporary_, std::ios::binary | std::ios::trunc);
  }
  ~atomic_file() override {
    std::error_code ignored;
    stream_.close();
    if (!done_) std::filesystem::remove(temporary_, ignored);
  }
  void write(std::span<const std::byte> bytes) override {
    stream_.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!stream_) throw write_error("kvcache: " + temporary_.string() + " cannot be written");
  }
  void commit() {
    stream_.close();
    if (!stream_) throw write_error("kvcache: " + temporary_.string() + " cannot be written");
    std::filesystem::rename(temporary_, path_);
    done_ = true;
  }

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::ofstream stream_;
  bool done_ = false;
};

#endif

}  // namespace kvcache::inline v0::store
