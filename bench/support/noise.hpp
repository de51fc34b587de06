// SPDX-License-Identifier: MIT
// Keys, values and queries without end: windows into one buffer of normally distributed numbers, so that
// filling a ring costs no random numbers and any row can be looked up again for checking.
#pragma once

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvcache::bench {

class noise {
 public:
  /// Rows of `row_size` floats: all heads of one token.
  explicit noise(index_t row_size)
      : row_size_(row_size), chunk_(std::max(max_chunk / row_size, index_t{1})) {}

  /// Most tokens that `keys` and `values` can hand out in one piece, starting at a multiple of it.
  [[nodiscard]] index_t chunk() const noexcept { return chunk_; }

  /// Rows [first, first + count), [count, row_size]. \pre they lie in one chunk
  [[nodiscard]] std::span<const float> keys(index_t first, index_t count) const {
    return rows(first, count, 1);
  }
  [[nodiscard]] std::span<const float> values(index_t first, index_t count) const {
    return rows(first, count, period / 2 + 1);
  }

  /// Numbers for queries; out of step with the rows, so that no query equals a key.
  [[nodiscard]] static std::span<const float> queries(index_t count) {
    return std::span(buffer()).subspan(period + 4158, static_cast<std::size_t>(count));
  }

 private:
  static constexpr index_t period = index_t{1} << 20;
  static constexpr index_t max_chunk = index_t{1} << 21;  // floats

  [[nodiscard]] std::span<const float> rows(index_t first, index_t count, index_t offset) const {
    const index_t chunk = first / chunk_;
    const index_t start = (offset + chunk * 40503) % period + first % chunk_ * row_size_;
    return std::span(buffer()).subspan(static_cast<std::size_t>(start),
                                       static_cast<std::size_t>(count * row_size_));
  }

  /// Sums of four uniform numbers, scaled to variance 1.
  static const std::vector<float>& buffer() {
    static const std::vector<float> numbers = [] {
      std::vector<float> made(period + max_chunk + 8192);
      std::uint64_t state = 0x9e3779b97f4a7c15U;
      for (float& x : made) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        int sum = -2 * 0xffff;
        for (unsigned shift = 0; shift < 64; shift += 16) sum += static_cast<int>(state >> shift & 0xffffU);
        x = static_cast<float>(sum) * (1.7320508F / 65536.0F);
      }
      return made;
    }();
    return numbers;
  }

  index_t row_size_;
  index_t chunk_;
};

}  // namespace kvcache::bench
