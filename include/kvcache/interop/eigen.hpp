// SPDX-License-Identifier: MIT
// Eigen matrices over the rows that caches take and give, without copying.
#pragma once

#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>

#include <Eigen/Core>

#include <cstddef>
#include <span>

namespace kvcache::inline v0 {

/// The floats of a row-major matrix, to be appended or attended with. The span must not outlive the matrix.
inline std::span<const float> as_span(const matrix& m) {
  return {m.data(), static_cast<std::size_t>(m.size())};
}
inline std::span<float> as_span(matrix& m) { return {m.data(), static_cast<std::size_t>(m.size())}; }

/// Rows of `num_cols` floats as a matrix, [rows, num_cols]. \pre the size is a multiple of `num_cols`
inline Eigen::Map<const matrix> as_matrix(std::span<const float> floats, index_t num_cols) {
  KVCACHE_ASSERT(num_cols > 0 && static_cast<index_t>(floats.size()) % num_cols == 0,
                 "as_matrix: rows must be whole");
  return {floats.data(), static_cast<index_t>(floats.size()) / num_cols, num_cols};
}

/// Keys and values of one head as the cache holds them, [count, head_dim] each.
struct head_rows {
  matrix keys;
  matrix values;
};

/// Tokens [first, first + count) of one KV head. Decodes all heads; for looking, not for the hot path.
template <class Layer>
head_rows rows_of(const Layer& layer, index_t head, index_t first, index_t count) {
  const index_t heads = layer.shape().num_kv_heads;
  const index_t dim = layer.shape().head_dim;
  KVCACHE_ASSERT(0 <= head && head < heads, "rows_of: the head must exist");
  matrix k(heads * count, dim);
  matrix v(heads * count, dim);
  layer.copy_out(first, count, as_span(k), as_span(v), kv_layout::hnd);
  return {k.middleRows(head * count, count), v.middleRows(head * count, count)};
}

}  // namespace kvcache::inline v0
