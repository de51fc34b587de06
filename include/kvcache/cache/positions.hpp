// SPDX-License-Identifier: MIT
// position_map: which position each token of a sequence has, and how far that is from where its key was rotated.
//
// Keys are stored rotated by RoPE. When tokens move (a prefix is dropped, a segment is shifted) the stored keys
// stay as they are: the segment remembers how far it moved, and attention rotates the query back by as much.
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

/// Tokens from `first_token` up to the next segment have consecutive positions.
struct position_segment {
  index_t first_token = 0;     ///< index in the sequence
  index_t first_position = 0;  ///< position of that token
  index_t rotation = 0;        ///< position now, less the position the keys were rotated for

  friend bool operator==(const position_segment&, const position_segment&) = default;
};

/// Token index -> position, as a list of segments. New tokens continue after the newest one, unrotated.
/// Moved from, it may only be destroyed or assigned to.
class position_map {
 public:
  position_map() : segments_(1) {}

  /// These segments, as segments() gave them for a sequence of `size` tokens. Throws shape_error if they cannot be.
  position_map(std::vector<position_segment> segments, index_t size) : segments_(std::move(segments)) {
    const auto near = [](index_t n) { return -max_shift < n && n < max_shift; };
    bool possible = !segments_.empty() && segments_.front().first_token == 0 &&
                    segments_.back().rotation == 0 && segments_.back().first_token <= size;
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      const position_segment& s = segments_[i];
      possible = possible && near(s.first_position) && near(s.rotation) &&
                 (i == 0 || segments_[i - 1].first_token < s.first_token);
    }
    if (!possible)
      throw shape_error("kvcache: position segments must be in order, and the last one not rotated");
  }

  /// At least one, ordered by first_token; the first starts at token 0. The last may be empty so far.
  [[nodiscard]] std::span<const position_segment> segments() const noexcept { return segments_; }

  /// Position of a token, also of one that is yet to come or, below 0, before the first. O(log segments).
  [[nodiscard]] index_t operator[](index_t token) const noexcept {
    const position_segment& s = segments_[static_cast<std::size_t>(segment_of(token))];
    return s.first_position + (token - s.first_token);
  }

  /// Moves tokens [first, last) of a sequence of `size` tokens by `delta` positions.
  /// \pre `0 <= first <= last <= size`   O(segments). Throws std::bad_alloc, then nothing changed.
  void shift(index_t first, index_t last, index_t delta, index_t size) {
    KVCACHE_ASSERT(0 <= first && first <= last && last <= size, "shift: the tokens must lie in the sequence");
    KVCACHE_ASSERT(-max_shift < delta && delta < max_shift,
                   "shift: the positions must stay far from overflowing");
    if (first == last || delta == 0) return;
    std::vector<position_segment> moved;
    moved.reserve(segments_.size() + 3);
    const auto add = [&moved](position_segment s) {
      if (!moved.empty()) {
        const position_segment& b = moved.back();
        const bool continues =
            b.rotation == s.rotation && s.first_position - b.first_position == s.first_token - b.first_token;
        if (continues) return;
      }
      moved.push_back(s);
    };
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      const position_segment& s = segments_[i];
      const index_t end = i + 1 < segments_.size() ? segments_[i + 1].first_token : size;
      add_part(s, s.first_token, std::min(end, first), 0, add);
      add_part(s, std::max(s.first_token, first), std::min(end, last), delta, add);
      add_part(s, std::max(s.first_token, last), end, 0, add);
    }
    segments_.swap(moved);
    continue_unrotated(size);
  }

  /// Forgets everything from token `size` on. Never allocates.
  void truncate(index_t size) noexcept {
    if (size == 0) {
      segments_.assign(1, position_segment{});
      return;
    }
    const index_t next = (*this)[size - 1] + 1;
    while (segments_.back().first_token >= size) segments_.pop_back();
    // A trailing segment was dropped whenever this adds one, so there is room for it.
    if (segments_.back().rotation != 0) segments_.push_back({size, next, 0});
  }

 private:
  static constexpr index_t max_shift = index_t{1} << 40;

  [[nodiscard]] index_t segment_of(index_t token) const noexcept {
    const auto after =
        std::upper_bound(segments_.begin(), segments_.end(), token,
                         [](index_t t, const position_segment& s) { return t < s.first_token; });
    return std::max(after - segments_.begin() - 1, std::ptrdiff_t{0});
  }

  /// Adds tokens [from, to) of segment `s`, moved by `delta`.
  template <class Add>
  static void add_part(const position_segment& s, index_t from, index_t to, index_t delta, Add add) {
    if (from < to) add({from, s.first_position + (from - s.first_token) + delta, s.rotation + delta});
  }

  /// Tokens appended after a rotated segment are rotated for where they are: they need a segment of their own.
  void continue_unrotated(index_t size) {
    const index_t next = (*this)[size - 1] + 1;
    if (segments_.back().rotation != 0) segments_.push_back({size, next, 0});
  }

  std::vector<position_segment> segments_;
};

}  // namespace kvcache::inline v0
