// SPDX-License-Identifier: MIT
// Bytes of a file whose size is known before anything is read, so that every offset and every allocation can
// be checked against it first.
#pragma once

#include "llama/model_error.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

namespace llama {

/// Product of two sizes; the largest value instead of a wrap, so that a comparison with a file size still
/// refuses it.
[[nodiscard]] constexpr std::uint64_t saturating_multiply(std::uint64_t a, std::uint64_t b) noexcept {
  constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  return b != 0 && a > most / b ? most : a * b;
}

/// Sum of two sizes; the largest value instead of a wrap.
[[nodiscard]] constexpr std::uint64_t saturating_add(std::uint64_t a, std::uint64_t b) noexcept {
  constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  return a > most - b ? most : a + b;
}

/// An unsigned integer stored with the least significant byte first.
template <class Unsigned>
[[nodiscard]] constexpr Unsigned load_little_endian(const unsigned char* bytes) noexcept {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < sizeof(Unsigned); ++i) value |= std::uint64_t{bytes[i]} << (8 * i);
  return static_cast<Unsigned>(value);
}

/// A regular file opened for reading.
class input_file {
 public:
  explicit input_file(std::filesystem::path path);

  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }  // bytes

  /// Fills `out` from the bytes at `offset`. Throws model_error naming `field` when the file ends before
  /// that.
  void read(std::uint64_t offset, std::span<unsigned char> out, std::string_view field);

  /// `num_bytes` bytes from `offset` as text. Throws before it allocates when the file is shorter.
  [[nodiscard]] std::string read_text(std::uint64_t offset, std::uint64_t num_bytes, std::string_view field);

  /// Throws model_error naming `field` unless `[offset, offset + num_bytes)` lies in the file.
  void require(std::uint64_t offset, std::uint64_t num_bytes, std::string_view field) const;

  [[noreturn]] void fail(std::string_view field, std::string_view reason) const {
    throw model_error(path_, field, reason);
  }

 private:
  std::filesystem::path path_;
  std::ifstream stream_;
  std::uint64_t size_ = 0;  // bytes, when it was opened
};

inline input_file::input_file(std::filesystem::path path) : path_(std::move(path)) {
  std::error_code error;
  const auto kind = std::filesystem::status(path_, error).type();
  if (kind == std::filesystem::file_type::not_found) fail("", "no such file");
  if (kind != std::filesystem::file_type::regular) fail("", "not a regular file");
  size_ = std::filesystem::file_size(path_, error);
  if (error) fail("", "its size cannot be read");
  stream_.open(path_, std::ios::binary);
  if (!stream_) fail("", "cannot be opened for reading");
}

inline void input_file::require(std::uint64_t offset, std::uint64_t num_bytes, std::string_view field) const {
  const std::uint64_t end = saturating_add(offset, num_bytes);
  if (end <= size_) return;
  fail(field, "needs bytes " + std::to_string(offset) + " to " + std::to_string(end) + ", but the file has " +
                  std::to_string(size_));
}

inline void input_file::read(std::uint64_t offset, std::span<unsigned char> out, std::string_view field) {
  require(offset, out.size(), field);
  stream_.clear();
  stream_.seekg(static_cast<std::streamoff>(offset));
  stream_.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(out.size()));
  if (static_cast<std::uint64_t>(stream_.gcount()) != out.size()) fail(field, "reading failed");
}

inline std::string input_file::read_text(std::uint64_t offset, std::uint64_t num_bytes,
                                         std::string_view field) {
  require(offset, num_bytes, field);
  std::string text(static_cast<std::size_t>(num_bytes), '\0');
  read(offset, {reinterpret_cast<unsigned char*>(text.data()), text.size()}, field);
  return text;
}

}  // namespace llama
