// SPDX-License-Identifier: MIT
// How failure is told: exhaustion is a status, a bad setup an exception, misuse an assert (core/assert.hpp).
#pragma once

#include <stdexcept>
#include <string>

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

/// Thrown by `append`, `begin` and `clone` where their `try_` twins return a status.
class capacity_error : public std::runtime_error {
 public:
  capacity_error(const char* what_failed, status code)
      : std::runtime_error(std::string("kvcache: ") + what_failed + ": " + to_string(code)), code_(code) {}

  /// Never `status::ok`.
  [[nodiscard]] status code() const noexcept { return code_; }

 private:
  status code_;
};

/// Thrown by `check()` when a container's own books do not add up; the text names the rule that is broken.
class invariant_error : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace kvcache::inline v0
