// SPDX-License-Identifier: MIT
// Rotary position embedding: rows turned by their positions, in place. What turns how far: core/rope_config.hpp.
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

/// Frequencies of a configuration and, if asked for, cosines and sines computed ahead.
class rope_table {
 public:
  /// \param max_positions  positions [0, max_positions) are computed now, [max_positions, rotary_dim] floats;
  ///                       any other position works as well, its angles are computed when met
  /// Throws shape_error naming the field that cannot be. Angles are computed in double.
  explicit rope_table(const rope_config& config, index_t max_positions = 0);

  [[nodiscard]] const rope_config& config() const noexcept { return config_; }
  /// Radians per position, [rotary_dim/2], after scaling.
  [[nodiscard]] std::span<const double> frequencies() const noexcept { return frequencies_; }
  /// What cos and sin are multiplied by: 1 except for YaRN.
  [[nodiscard]] double attention_factor() const noexcept { return attention_factor_; }

  /// Rotates heads, [num_heads, head_dim], in place, for `position`. O(num_heads * head_dim).
  void rotate(float* heads, index_t num_heads, index_t position) const noexcept {
    angles scratch;
    const float* cos_sin = position >= 0 && position < max_positions_
                               ? &computed_[static_cast<std::size_t>(position * config_.rotary_dim)]
                               : fill(scratch, static_cast<double>(position), attention_factor_);
    turn(heads, num_heads, cos_sin);
  }

  /// Turns heads that are rotated already by `delta` positions more; no attention factor.
  void turn_by(float* heads, index_t num_heads, index_t delta) const noexcept {
    angles scratch;
    turn(heads, num_heads, fill(scratch, static_cast<double>(delta), 1.0));
  }

 private:
  using angles = std::array<float, max_head_dim>;

  /// [rotary_dim/2] cosines, then as many sines.
  const float* fill(std::span<float> out, double position, double factor) const noexcept {
    const std::size_t pairs = frequencies_.size();
    for (std::size_t i = 0; i < pairs; ++i) {
      const double angle = position * frequencies_[i];
      out[i] = static_cast<float>(std::cos(angle) * factor);
      out[pairs + i] = static_cast<float>(std::sin(angle) * factor);
    }
    return out.data();
  }

  void turn(float* heads, index_t num_heads, const float* cos_sin) const noexcept {
    const auto pairs = static_cast<index_t>(frequencies_.size());
    const bool half = config_.pairing == rope_pairing::half;
    const index_t step = half ? 1 : 2;         // from one pair to the next
    const index_t partner = half ? pairs : 1;  // from the first of a pair to the second
    for (float* head = heads; head != heads + num_heads * config_.head_dim; head += config_.head_dim) {
      for (index_t i = 0; i < pairs; ++i) {
        float& x = head[i * step];
        float& y = head[i * step + partner];
        const float c = cos_sin[i];
        const float s = cos_sin[pairs + i];
        const float turned = x * c - y * s;
        y = y * c + x * s;
        x = turned;
      }
    }
  }

  rope_config config_;
  std::vector<double> frequencies_;
  double attention_factor_ = 1;
  index_t max_positions_;
  std::vector<float> computed_;  // [max_positions, rotary_dim]
};

/// Rotates rows in place.
/// \param x          [tokens, heads, head_dim], row-major; the number of heads follows from the size
/// \param positions  [tokens]
inline void rope(std::span<float> x, std::span<const index_t> positions, const rope_table& table) {
  const auto num_tokens = static_cast<index_t>(positions.size());
  const index_t head_dim = table.config().head_dim;
  if (num_tokens == 0) return;
  const index_t num_heads = static_cast<index_t>(x.size()) / (num_tokens * head_dim);
  KVCACHE_ASSERT(static_cast<index_t>(x.size()) == num_tokens * num_heads * head_dim,
                 "rope: the span must be [tokens, heads, head_dim] with one position per token");
  for (index_t t = 0; t < num_tokens; ++t)
    table.rotate(x.data() + t * num_heads * head_dim, num_heads, positions[static_cast<std::size_t>(t)]);
}

/// Rotates queries and keys of tokens at positions pos, pos + 1, ... in place.
/// \param q  [num_tokens, num_q_heads, head_dim]
/// \param k  [num_tokens, num_kv_heads, head_dim]
inline void rope(std::span<float> q, std::span<float> k, index_t pos, const rope_table& table,
                 index_t num_tokens = 1) {
  for (const std::span<float> x : {q, k}) {
    const index_t token_size = num_tokens > 0 ? static_cast<index_t>(x.size()) / num_tokens : 0;
    KVCACHE_ASSERT(static_cast<index_t>(x.size()) == num_tokens * token_size &&
                       token_size % table.config().head_dim == 0,
                   "rope: the spans must be [num_tokens, heads, head_dim]");
    for (index_t t = 0; t < num_tokens; ++t)
      table.rotate(x.data() + t * token_size, token_size / table.config().head_dim, pos + t);
  }
}

inline rope_table::rope_table(const rope_config& config, index_t max_positions)
    : config_(config), max_positions_(max_positions) {
  rope_frequencies made = frequencies_of(config);
  if (max_positions < 0) throw shape_error("kvcache: rope max_positions must not be negative");
  if (config_.rotary_dim == 0) config_.rotary_dim = config.head_dim;
  frequencies_ = std::move(made.radians);
  attention_factor_ = made.attention_factor;
  computed_.resize(static_cast<std::size_t>(checked_mul(max_positions, config_.rotary_dim)));
  for (index_t p = 0; p < max_positions; ++p)
    fill(std::span(computed_).subspan(static_cast<std::size_t>(p * config_.rotary_dim)),
         static_cast<double>(p), attention_factor_);
}

}  // namespace kvcache::inline v0
