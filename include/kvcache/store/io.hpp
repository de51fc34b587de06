// SPDX-License-Identifier: MIT
// byte_source and byte_sink: where stored bytes come from and go to. Memory and streams here, files in store/file.hpp.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

/// Bytes of known number that can be read anywhere.
class byte_source {
 public:
  byte_source() = default;
  byte_source(const byte_source&) = delete;
  byte_source& operator=(const byte_source&) = delete;
  virtual ~byte_source() = default;

  [[nodiscard]] virtual std::string name() const = 0;
  [[nodiscard]] virtual std::uint64_t size() const noexcept = 0;
  /// Reads [offset, offset + to.size()). Throws load_error if that is not there, or cannot be read.
  virtual void read(std::uint64_t offset, std::span<std::byte> to) const = 0;
};

/// Memory of the caller's.
class memory_source final : public byte_source {
 public:
  explicit memory_source(std::span<const std::byte> bytes, std::string name = "memory")
      : bytes_(bytes), name_(std::move(name)) {}

  [[nodiscard]] std::string name() const override { return name_; }
  [[nodiscard]] std::uint64_t size() const noexcept override { return bytes_.size(); }
  void read(std::uint64_t offset, std::span<std::byte> to) const override {
    if (offset > bytes_.size() || to.size() > bytes_.size() - offset)
      throw load_error(name_, bytes_.size(), "the data end too early");
    if (!to.empty()) std::memcpy(to.data(), bytes_.data() + offset, to.size());
  }

 private:
  std::span<const std::byte> bytes_;
  std::string name_;
};

/// Everything that is left of a stream. Memory grows with what really comes, to at most twice that.
/// Throws load_error if the stream fails.
inline std::vector<std::byte> read_all(std::istream& stream) {
  constexpr std::size_t least = std::size_t{64} << 10U;
  std::vector<std::byte> bytes;
  std::size_t size = 0;
  while (stream.good()) {
    bytes.resize(std::max(2 * size, least));
    stream.read(reinterpret_cast<char*>(bytes.data() + size),
                static_cast<std::streamsize>(bytes.size() - size));
    size += static_cast<std::size_t>(stream.gcount());
  }
  bytes.resize(size);
  if (stream.bad()) throw load_error("stream", size, "reading failed");
  return bytes;
}

/// A file or memory could not be written: no space, a limit, a device that fails.
class write_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Takes bytes in order.
class byte_sink {
 public:
  byte_sink() = default;
  byte_sink(const byte_sink&) = delete;
  byte_sink& operator=(const byte_sink&) = delete;
  virtual ~byte_sink() = default;

  /// Throws write_error.
  virtual void write(std::span<const std::byte> bytes) = 0;
};

class vector_sink final : public byte_sink {
 public:
  /// Appends to `to`, which must outlive it.
  explicit vector_sink(std::vector<std::byte>& to) noexcept : to_(&to) {}
  void write(std::span<const std::byte> bytes) override {
    to_->insert(to_->end(), bytes.begin(), bytes.end());
  }

 private:
  std::vector<std::byte>* to_;
};

class stream_sink final : public byte_sink {
 public:
  explicit stream_sink(std::ostream& to) noexcept : to_(&to) {}
  void write(std::span<const std::byte> bytes) override {
    to_->write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!to_->good()) throw write_error("kvcache: the stream cannot be written");
  }

 private:
  std::ostream* to_;
};

}  // namespace kvcache::inline v0::store
