// SPDX-License-Identifier: MIT
// byte_writer and byte_reader: numbers and texts as files have them, little-endian and without padding. The reader
// trusts nothing: whatever is not there, or is too long, is a load_error that says where.
#pragma once

#include <kvcache/core/half.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

static_assert(std::endian::native == std::endian::little);  // numbers are stored as they lie in memory

/// The longest text in a file, in bytes.
inline constexpr std::size_t max_text_bytes = 4096;

class byte_writer {
 public:
  /// Appends to `out`, which must outlive it.
  explicit byte_writer(std::vector<std::byte>& out) noexcept : out_(&out) {}

  template <class Number>
  requires(std::is_arithmetic_v<Number>) void number(Number value) {
    raw(std::as_bytes(std::span(&value, 1)));
  }
  void count(index_t value) { number(static_cast<std::int64_t>(value)); }
  /// Its length in 32 bits, then its bytes. Throws shape_error beyond max_text_bytes.
  void text(std::string_view value) {
    if (value.size() > max_text_bytes)
      throw shape_error("kvcache: names and fingerprints may have at most 4096 bytes");
    number(static_cast<std::uint32_t>(value.size()));
    raw(std::as_bytes(std::span(value.data(), value.size())));
  }
  void raw(std::span<const std::byte> bytes) { out_->insert(out_->end(), bytes.begin(), bytes.end()); }
  /// Zeros up to a multiple of `unit` bytes.
  void pad(std::size_t unit) { out_->resize((out_->size() + unit - 1) / unit * unit); }

 private:
  std::vector<std::byte>* out_;
};

class byte_reader {
 public:
  /// \param offset  where in `source` the bytes lie, for errors
  byte_reader(std::span<const std::byte> bytes, std::string source, std::uint64_t offset)
      : bytes_(bytes), source_(std::move(source)), offset_(offset) {}

  template <class Number>
  requires(std::is_arithmetic_v<Number>) [[nodiscard]] Number number() {
    Number value;
    std::memcpy(&value, raw(sizeof(Number)).data(), sizeof(Number));
    return value;
  }
  /// A count of tokens, bytes and the like: 0 to 2^56.
  [[nodiscard]] index_t count() {
    const auto value = number<std::int64_t>();
    if (value < 0 || value > (std::int64_t{1} << 56)) refuse("a size is out of range", 8);
    return static_cast<index_t>(value);
  }
  [[nodiscard]] std::string text() {
    const auto size = number<std::uint32_t>();
    if (size > max_text_bytes) refuse("a text is too long", 4);
    const auto bytes = raw(size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  [[nodiscard]] std::span<const std::byte> raw(std::size_t size) {
    if (size > bytes_.size() - at_) refuse("the data end too early");
    const auto taken = bytes_.subspan(at_, size);
    at_ += size;
    return taken;
  }
  /// Throws unless all has been read.
  void finish() const {
    if (at_ != bytes_.size()) refuse("there are more data than belong here");
  }
  [[nodiscard]] std::size_t left() const noexcept { return bytes_.size() - at_; }

  /// Throws load_error for what ended `before` bytes before here.
  [[noreturn]] void refuse(const std::string& reason, std::size_t before = 0) const {
    throw load_error(source_, offset_ + at_ - before, reason);
  }

 private:
  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  std::string source_;
  std::uint64_t offset_;
};

}  // namespace kvcache::inline v0::store
