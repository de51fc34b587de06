// SPDX-License-Identifier: MIT
// reference_attention: what attention is, in double precision and plain loops. Everything else is tested against it.
#pragma once

#include <kvcache/attention/options.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

namespace kvcache::inline v0 {

struct attention_shape {
  index_t q_len;
  index_t kv_len;
  index_t num_q_heads;
  index_t num_kv_heads;
  index_t head_dim;
};

/// Position of a query: given, or that of the token it belongs to.
inline index_t reference_position(const attend_options& options, const attention_shape& n, index_t query) {
  const index_t token = n.kv_len - n.q_len + query;
  if (!options.q_positions.empty()) return options.q_positions[static_cast<std::size_t>(query)];
  if (!options.k_positions.empty() && token >= 0) return options.k_positions[static_cast<std::size_t>(token)];
  return token;
}

/// The rule of options.hpp for one query and one key.
inline bool reference_sees(const attend_options& options, const attention_shape& n, index_t query,
                           index_t token) {
  const index_t p = reference_position(options, n, query);
  const index_t c =
      options.k_positions.empty() ? token : options.k_positions[static_cast<std::size_t>(token)];
  if (options.window > 0 && c <= p - options.window && token >= options.sinks) return false;
  if (options.mask.empty()) return !options.causal || c <= p;
  const index_t columns = static_cast<index_t>(options.mask.size()) / n.q_len;
  const index_t column = token - (n.kv_len - columns);
  return column < 0 || options.mask[static_cast<std::size_t>(query * columns + column)] != 0;
}

/// Attention of one sequence, O(q_len * num_q_heads * kv_len * head_dim), in double precision.
///
/// \param q    [q_len, num_q_heads, head_dim], rotated
/// \param k,v  [kv_len, num_kv_heads, head_dim], keys rotated
/// \param out  [q_len, num_q_heads, head_dim]; zero where nothing is seen
/// \param lse  [q_len, num_q_heads] or empty; natural logarithm, -infinity where nothing is seen
/// Of `options`, what has to do with speed and with shifted segments has no meaning here.
inline void reference_attention(const attention_shape& n, std::span<const float> q, std::span<const float> k,
                                std::span<const float> v, std::span<double> out,
                                const attend_options& options = {}, std::span<double> lse = {}) {
  const index_t group_size = n.num_q_heads / n.num_kv_heads;
  const double scale =
      options.scale ? double{*options.scale} : 1.0 / std::sqrt(static_cast<double>(n.head_dim));
  std::vector<double> weights(static_cast<std::size_t>(n.kv_len));

  for (index_t i = 0; i < n.q_len; ++i) {
    for (index_t h = 0; h < n.num_q_heads; ++h) {
      const index_t kv_head = h / group_size;
      const float* query = &q[static_cast<std::size_t>((i * n.num_q_heads + h) * n.head_dim)];
      const auto row = [&](std::span<const float> x, index_t token) {
        return &x[static_cast<std::size_t>((token * n.num_kv_heads + kv_head) * n.head_dim)];
      };

      // logits[t] = soft_cap(scale * sum_d q[d] k[t, d]) + slope * (position of t - position of i)
      double max = -std::numeric_limits<double>::infinity();
      for (index_t t = 0; t < n.kv_len; ++t) {
        double logit = -std::numeric_limits<double>::infinity();
        if (reference_sees(options, n, i, t)) {
          double dot = 0;
          for (index_t d = 0; d < n.head_dim; ++d) dot += double{query[d]} * double{row(k, t)[d]};
          logit = dot * scale;
          if (options.soft_cap != 0) logit = options.soft_cap * std::tanh(logit / options.soft_cap);
          if (!options.alibi_slopes.empty()) {
            const index_t p = reference_position(options, n, i);
            const index_t c =
                options.k_positions.empty() ? t : options.k_positions[static_cast<std::size_t>(t)];
            logit += double{options.alibi_slopes[static_cast<std::size_t>(h)]} * static_cast<double>(c - p);
          }
        }
        weights[static_cast<std::size_t>(t)] = logit;
        max = std::max(max, logit);
      }

      // out[d] = sum_t softmax(logits)[t] v[t, d]
      const auto out_row = out.subspan(static_cast<std::size_t>((i * n.num_q_heads + h) * n.head_dim),
                                       static_cast<std::size_t>(n.head_dim));
      std::fill(out_row.begin(), out_row.end(), 0.0);
      double sum = 0;
      for (index_t t = 0; t < n.kv_len; ++t) {
        const double logit = weights[static_cast<std::size_t>(t)];
        if (logit == -std::numeric_limits<double>::infinity()) continue;  // hidden: its value does not matter
        const double weight = std::exp(logit - max);
        sum += weight;
        for (index_t d = 0; d < n.head_dim; ++d)
          out_row[static_cast<std::size_t>(d)] += weight * double{row(v, t)[d]};
      }
      if (sum != 0) {
        for (double& x : out_row) x /= sum;
      }
      if (!lse.empty())
        lse[static_cast<std::size_t>(i * n.num_q_heads + h)] =
            sum == 0 ? -std::numeric_limits<double>::infinity() : max + std::log(sum);
    }
  }
}

}  // namespace kvcache::inline v0
