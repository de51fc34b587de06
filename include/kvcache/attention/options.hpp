// SPDX-License-Identifier: MIT
// What attention is to compute: the options of one call, one sequence of a batch, and memory kept between calls.
#pragma once

#include <kvcache/core/memory.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>

namespace kvcache::inline v0 {

class rope_table;

/// Memory that attend works in, kept between calls so that none is allocated once it is large enough.
/// Threads: one attend call at a time.
class attend_workspace {
 public:
  attend_workspace() = default;

  /// At least `num_floats` floats, 64-byte aligned; the contents are lost. Throws std::bad_alloc.
  float* floats(index_t num_floats) {
    const index_t bytes = num_floats * static_cast<index_t>(sizeof(float));
    if (bytes > memory_.size())
      memory_ = memory_block(std::max(bytes, 2 * memory_.size()), huge_page_resource());
    return reinterpret_cast<float*>(memory_.data());
  }

 private:
  memory_block memory_;
};

/// A query at position p sees a key at position c iff all of these hold:
///   - c <= p, when `causal` and there is no mask
///   - c > p - window, when window > 0, or the key is one of the first `sinks` tokens
///   - the mask, when there is one, is not zero there
/// Its logit is soft_cap(scale * q.k) + alibi_slope * (c - p), soft_cap(x) = cap * tanh(x / cap).
/// In a batch, the fields marked [item] come from each attend_item instead and must be left alone here.
struct attend_options {
  index_t q_len = 1;                ///< [item] query tokens; queries are for the newest ones
  std::optional<float> scale = {};  ///< 1 / sqrt(head_dim) unless given
  bool causal = true;
  index_t window = 0;                        ///< tokens; 0: no window
  index_t sinks = 0;                         ///< first tokens that the window never hides
  float soft_cap = 0;                        ///< 0: none
  std::span<const float> alibi_slopes = {};  ///< [num_q_heads]; empty: none
  std::span<const std::uint8_t> mask =
      {};  ///< [item] [q_len, q_len] over the newest tokens, or [q_len, kv_len]
  std::span<const index_t> q_positions = {};  ///< [item] [q_len]; else those of the newest tokens
  std::span<const index_t> k_positions = {};  ///< [item] [kv_len]; else layer.positions()
  const rope_table* rope = nullptr;           ///< needed if segments of the sequence were shifted
  std::span<float> lse = {};  ///< [item] out, [q_len, num_q_heads], natural logarithm; empty: not wanted
  const kernel::table* kernel = nullptr;  ///< kernel::best() unless given
  attend_workspace* workspace = nullptr;  ///< see there
};

/// One sequence of a batch; the fields are those of `attend` and attend_options.
template <class Layer>
struct attend_item {
  std::span<const float> q;  ///< [q_len, num_q_heads, head_dim]
  Layer layer;
  std::span<float> out;  ///< [q_len, num_q_heads, head_dim]
  index_t q_len = 1;
  std::span<const std::uint8_t> mask = {};
  std::span<const index_t> q_positions = {};
  std::span<const index_t> k_positions = {};
  std::span<float> lse = {};
};

}  // namespace kvcache::inline v0
