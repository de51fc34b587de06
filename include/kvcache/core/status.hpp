// SPDX-License-Identifier: MIT
// How failure is told: exhaustion is a status, a bad setup an exception, misuse an assert (core/assert.hpp).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace kvcache::inline v0 {

/// What a `try_` function answers. Whenever it is not `ok`, nothing has changed.
enum class [[nodiscard]] status{
    ok,
    out_of_pages,   ///< the pool's budget is used up
    out_of_memory,  ///< the system or the memory resource gave no more
    not_finite,     ///< a lossy codec was given NaN or infinity
};

constexpr const char* to_string(status s) noexcept {
  switch (s) {
    case status::ok:
      return "ok";
    case status::out_of_pages:
      return "out of pages";
    case status::out_of_memory:
      return "out of memory";
    case status::not_finite:
      return "not finite";
  }
  return "unknown status";
}

/// A shape, option or size that cannot be: negative, unsupported, or overflowing when multiplied out.
class shape_error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// Thrown by `append` where `try_append` returns a status, and by `begin`, `clone` and `fork` where their `try_` twins return
/// nothing; also by what appends or copies: load, recover, recoded.
class capacity_error : public std::runtime_error {
 public:
  capacity_error(const char* what_failed, status code)
      : std::runtime_error(std::string("kvcache: ") + what_failed + ": " + to_string(code)), code_(code) {}

  /// Never `status::ok`.
  [[nodiscard]] status code() const noexcept { return code_; }

 private:
  status code_;
};

/// Bytes from outside that cannot be what they claim to be: a file, a stream, a value of a store. Whoever throws it has
/// changed nothing.
class load_error : public std::runtime_error {
 public:
  load_error(std::string source, std::uint64_t offset, std::string reason)
      : std::runtime_error("kvcache: " + source + ": byte " + std::to_string(offset) + ": " + reason),
        source_(std::move(source)),
        offset_(offset),
        reason_(std::move(reason)) {}

  /// The file, or what stands for one.
  [[nodiscard]] const std::string& source() const noexcept { return source_; }
  /// Where in it what is wrong begins, in bytes.
  [[nodiscard]] std::uint64_t offset() const noexcept { return offset_; }
  [[nodiscard]] const std::string& reason() const noexcept { return reason_; }

 private:
  std::string source_;
  std::uint64_t offset_;
  std::string reason_;
};

/// Thrown by `check()` when a container's own books do not add up; the text names the rule that is broken.
class invariant_error : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

namespace detail {

/// What `check()` members prove. Throws invariant_error with the rule where it does not hold.
inline void require(bool holds, const char* rule) {
  if (!holds) throw invariant_error(std::string("kvcache: ") + rule);
}

}  // namespace detail

}  // namespace kvcache::inline v0
