// SPDX-License-Identifier: MIT
// visibility: which keys a query sees, and what is added to its logits. The rule is spelled out in options.hpp.
#pragma once

#include <kvcache/attention/options.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

namespace kvcache::inline v0 {

/// Tokens [first, last).
struct token_range {
  index_t first = 0;
  index_t last = 0;
};

/// Calls body(segment, token_range) for each of `segments`, in order, with its share of `tokens`.
template <class Body>
void for_each_part(std::span<const position_segment> segments, token_range tokens, Body body) {
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const index_t end = s + 1 < segments.size() ? segments[s + 1].first_token : tokens.last;
    body(segments[s],
         token_range{std::max(tokens.first, segments[s].first_token), std::min(tokens.last, end)});
  }
}

/// The rule for one sequence. Tokens are counted by index; positions follow from a segment or from k_positions.
class visibility {
 public:
  visibility(const attend_options& options, index_t q_len, index_t kv_len, std::span<const std::uint8_t> mask,
             std::span<const index_t> k_positions) noexcept
      : options_(&options), q_len_(q_len), kv_len_(kv_len), mask_(mask), k_positions_(k_positions) {}

  /// Whether the query sees any of `tokens`, which lie in `segments`. May say yes where it should say no.
  [[nodiscard]] bool any(index_t query_position, std::span<const position_segment> segments,
                         token_range tokens) const noexcept {
    if (!k_positions_.empty()) return true;
    if (segments.size() == 1) return any_part(query_position, segments.front(), tokens);
    bool is_seen = false;
    for_each_part(segments, tokens, [&](const position_segment& segment, token_range part) {
      is_seen |= any_part(query_position, segment, part);
    });
    return is_seen;
  }

  /// Whether the query surely sees all of `tokens`. May say no where it should say yes.
  [[nodiscard]] bool all(index_t query_position, std::span<const position_segment> segments,
                         token_range tokens) const noexcept {
    if (!k_positions_.empty() || !mask_.empty() || segments.size() != 1) return false;
    const token_range seen = window_of(query_position, segments.front());
    return tokens.last <= seen.last && (tokens.first >= seen.first || tokens.last <= options_->sinks);
  }

  /// Sets scores that the query does not see to -infinity.
  /// \param scores  scores[t] belongs to token `base + t`; `num_scores` of them
  /// \param tokens  those of the block that count; they lie in `segments`
  void hide(index_t query, index_t query_position, std::span<const position_segment> segments,
            token_range tokens, index_t base, index_t num_scores, float* scores) const noexcept {
    std::fill(scores, scores + (tokens.first - base), hidden);
    for_each_part(segments, tokens, [&](const position_segment& segment, token_range part) {
      hide_part(query, query_position, segment, part, base, scores);
    });
    std::fill(scores + (tokens.last - base), scores + num_scores, hidden);
  }

  /// 0: none.
  [[nodiscard]] float soft_cap() const noexcept { return options_->soft_cap; }

  /// scores[t] += slope * (position of token base + t - query_position) for t in `tokens`.
  void add_alibi(index_t query_position, std::span<const position_segment> segments, float slope,
                 token_range tokens, index_t base, float* scores) const noexcept {
    if (slope == 0.0F) return;
    for_each_part(segments, tokens, [&](const position_segment& segment, token_range part) {
      for (index_t t = part.first; t < part.last; ++t) {
        const index_t position = k_positions_.empty() ? segment.first_position + (t - segment.first_token)
                                                      : k_positions_[static_cast<std::size_t>(t)];
        scores[t - base] += slope * static_cast<float>(position - query_position);
      }
    });
  }

 private:
  static constexpr float hidden = -std::numeric_limits<float>::infinity();

  [[nodiscard]] bool any_part(index_t query_position, const position_segment& segment,
                              token_range tokens) const noexcept {
    const token_range seen = window_of(query_position, segment);
    return tokens.first < seen.last && (tokens.last > seen.first || tokens.first < options_->sinks);
  }

  /// hide for tokens of one segment, and no others.
  void hide_part(index_t query, index_t query_position, const position_segment& segment, token_range tokens,
                 index_t base, float* scores) const noexcept {
    const bool by_token = !k_positions_.empty() || !mask_.empty();
    const token_range seen = k_positions_.empty() ? window_of(query_position, segment) : tokens;
    const index_t last = std::clamp(seen.last, tokens.first, tokens.last);
    const index_t sinks_last = std::clamp(options_->sinks, tokens.first, last);
    const index_t first = std::clamp(seen.first, sinks_last, last);
    std::fill(scores + (sinks_last - base), scores + (first - base), hidden);
    std::fill(scores + (last - base), scores + (tokens.last - base), hidden);
    if (!by_token) return;
    for (index_t t = tokens.first; t < last; ++t) {
      if (!sees(query, query_position, t)) scores[t - base] = hidden;
    }
  }

  /// At most so large that positions less it stay within index_t: it hides nothing then.
  [[nodiscard]] index_t window() const noexcept {
    return std::min(options_->window, std::numeric_limits<index_t>::max() / 2);
  }

  /// What causality and window leave of a segment without k_positions, mask and sinks left aside.
  [[nodiscard]] token_range window_of(index_t query_position,
                                      const position_segment& segment) const noexcept {
    const index_t self =
        segment.first_token + (query_position - segment.first_position);  // token at that position
    const bool causal = options_->causal && mask_.empty();
    return {options_->window > 0 ? self - window() + 1 : 0, causal ? self + 1 : kv_len_};
  }

  /// The whole rule for one key where it is not an interval: explicit key positions, or a mask.
  [[nodiscard]] bool sees(index_t query, index_t query_position, index_t token) const noexcept {
    if (!k_positions_.empty()) {
      const index_t position = k_positions_[static_cast<std::size_t>(token)];
      if (options_->causal && mask_.empty() && position > query_position) return false;
      if (options_->window > 0 && position <= query_position - window() && token >= options_->sinks)
        return false;
    }
    if (mask_.empty()) return true;
    const index_t columns = static_cast<index_t>(mask_.size()) / q_len_;
    const index_t column = token - (kv_len_ - columns);
    return column < 0 || mask_[static_cast<std::size_t>(query * columns + column)] != 0;
  }

  const attend_options* options_;
  index_t q_len_;
  index_t kv_len_;
  std::span<const std::uint8_t> mask_;
  std::span<const index_t> k_positions_;
};

}  // namespace kvcache::inline v0
