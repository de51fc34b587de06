// SPDX-License-Identifier: MIT
// The error beside the speed: attention of a row against reference_attention on the floats that were
// appended, so that what the codec rounded away counts as error too.
//
// To stay cheap only the query heads of the first and the last KV head are checked, for up to four query
// tokens spread over the row, each over the full length. The figure is |out - reference| / |reference|,
// Euclidean norms.
#pragma once

#include <kvcache/attention/reference.hpp>
#include <kvcache/core/types.hpp>

#include "support/noise.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <span>
#include <string_view>
#include <vector>

namespace kvcache::bench {

/// Tokens and queries of the checked attention; the queries are for the newest tokens.
using checked_shape = attention_shape;

namespace detail {

/// Rows of one KV head out of the noise, [kv_len, head_dim].
template <class Rows>
std::vector<float> one_head(const checked_shape& n, index_t kv_head, Rows rows) {
  std::vector<float> head;
  head.reserve(static_cast<std::size_t>(n.kv_len * n.head_dim));
  for (index_t t = 0; t < n.kv_len; ++t) {
    const auto row =
        rows(t).subspan(static_cast<std::size_t>(kv_head * n.head_dim), static_cast<std::size_t>(n.head_dim));
    head.insert(head.end(), row.begin(), row.end());
  }
  return head;
}

/// The rows of some queries and of the query heads of one KV head out of [q_len, num_q_heads, head_dim].
inline std::vector<float> some_rows(const checked_shape& n, const std::set<index_t>& queries, index_t kv_head,
                                    std::span<const float> all) {
  const index_t group_floats = n.num_q_heads / n.num_kv_heads * n.head_dim;
  std::vector<float> some;
  for (const index_t query : queries) {
    const float* from = all.data() + query * n.num_q_heads * n.head_dim + kv_head * group_floats;
    some.insert(some.end(), from, from + group_floats);
  }
  return some;
}

}  // namespace detail

/// \param q,out  [q_len, num_q_heads, head_dim]; keys and values are the first kv_len rows of `rows`
inline double error_against_reference(const checked_shape& n, const noise& rows, std::span<const float> q,
                                      std::span<const float> out) {
  const std::set<index_t> queries{0, n.q_len / 3, 2 * n.q_len / 3, n.q_len - 1};
  std::vector<index_t> positions;
  positions.reserve(queries.size());
  for (const index_t query : queries) positions.push_back(n.kv_len - n.q_len + query);

  double error = 0;
  double norm = 0;
  for (const index_t kv_head : std::set<index_t>{0, n.num_kv_heads - 1}) {
    const auto k = detail::one_head(n, kv_head, [&](index_t t) { return rows.keys(t, 1); });
    const auto v = detail::one_head(n, kv_head, [&](index_t t) { return rows.values(t, 1); });
    const auto some_q = detail::some_rows(n, queries, kv_head, q);
    const auto some_out = detail::some_rows(n, queries, kv_head, out);
    const checked_shape part{static_cast<index_t>(queries.size()), n.kv_len, n.num_q_heads / n.num_kv_heads,
                             1, n.head_dim};
    std::vector<double> expected(some_q.size());
    reference_attention(part, some_q, k, v, expected, {.q_positions = positions});
    for (std::size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(static_cast<double>(some_out[i]) - expected[i], 2);
      norm += std::pow(expected[i], 2);
    }
  }
  return std::sqrt(error / norm);
}

/// Above this a row is not slow or fast but wrong. A rounding of 2^-8 in keys and values ends up well below
/// 1e-2.
inline double largest_error(std::string_view codec) {
  return codec == "f32" ? 1e-5 : codec == "f16" ? 2e-3 : codec == "bf16" ? 1e-2 : 0.5;
}

}  // namespace kvcache::bench
