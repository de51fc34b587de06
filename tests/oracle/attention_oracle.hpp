// SPDX-License-Identifier: MIT
// Attention in double precision, one sum per definition. Uses nothing of the library.
//
//   out[i, h] = sum_j w_j v[j, g],   w_j = exp(s_j - lse),   lse = ln sum_j exp(s_j)
//   s_j = cap(scale * <q[i, h], k[j, g]>) - slope_h * (p_i - c_j),   cap(x) = soft_cap * tanh(x / soft_cap)
//   g = h / (num_q_heads / num_kv_heads)
//
// over the visible keys j only: key token j sits at position c_j, query i at p_i. A key is visible if the
// causal rule c_j <= p_i holds (or the mask, which stands in its place, says so) and it lies in the window,
// c_j > p_i - window, or is one of the first `sinks` tokens. Invisible keys and values are never read. No
// visible key: out = 0, lse = -infinity.
#pragma once

#include "rope_oracle.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace oracle {

struct attention {
  std::ptrdiff_t q_len = 1;
  std::ptrdiff_t kv_len = 1;
  std::ptrdiff_t num_q_heads = 1;
  std::ptrdiff_t num_kv_heads = 1;
  std::ptrdiff_t head_dim = 1;

  std::vector<double> q;  // [q_len, num_q_heads, head_dim]
  std::vector<double> k;  // [kv_len, num_kv_heads, head_dim]
  std::vector<double> v;  // as k

  std::optional<double> scale;  // else 1 / sqrt(head_dim)
  bool causal = true;
  std::ptrdiff_t window = 0;  // 0: no window
  std::ptrdiff_t sinks = 0;
  double soft_cap = 0;               // 0: none
  std::vector<double> alibi_slopes;  // [num_q_heads] or empty
  std::vector<std::uint8_t> mask;    // [q_len, q_len] over the newest tokens, [q_len, kv_len], or empty
  std::vector<std::ptrdiff_t> q_positions;  // [q_len]; empty: the queries are the newest tokens
  std::vector<std::ptrdiff_t> k_positions;  // [kv_len]; empty: 0, 1, 2, ...
  std::optional<rope> rotation;  // q and k are not rotated yet: each is turned to its position first
};

struct attention_result {
  std::vector<double> out;  // [q_len, num_q_heads, head_dim]
  std::vector<double> lse;  // [q_len, num_q_heads], natural log

  // What error bounds are made of, over the visible keys of a row; [q_len, num_q_heads].
  std::vector<double> max_logit;  // largest |s_j|
  std::vector<double>
      max_norms;  // largest |scale| * |q| * |k|, Euclidean: what rounding in the dot product grows with
  std::vector<double> max_value;  // largest |v|
  double weight_rounding = 0;     // of each weight, relative; set by who knows how they are multiplied
  double query_rounding = 0;      // of each number of a query, likewise
};

inline attention_result attend(const attention& a) {
  const auto at = [](std::ptrdiff_t i) { return static_cast<std::size_t>(i); };
  const std::ptrdiff_t group = a.num_q_heads / a.num_kv_heads;

  std::vector<std::ptrdiff_t> c = a.k_positions;
  if (c.empty())
    for (std::ptrdiff_t j = 0; j < a.kv_len; ++j) c.push_back(j);
  std::vector<std::ptrdiff_t> p = a.q_positions;
  if (p.empty()) {
    for (std::ptrdiff_t i = 0; i < a.q_len; ++i) {
      const std::ptrdiff_t token = a.kv_len - a.q_len + i;  // negative where there are more queries than keys
      p.push_back(token >= 0 ? c[at(token)] : token + (c.empty() ? 0 : c[0]));
    }
  }

  const std::vector<double> q = a.rotation ? rotated(a.q, p, *a.rotation) : a.q;
  const std::vector<double> k = a.rotation ? rotated(a.k, c, *a.rotation) : a.k;
  const double scale = a.scale ? *a.scale : 1 / std::sqrt(static_cast<double>(a.head_dim));

  const auto visible = [&](std::ptrdiff_t i, std::ptrdiff_t j) {
    if (!a.mask.empty()) {
      const std::ptrdiff_t columns = static_cast<std::ptrdiff_t>(a.mask.size()) / a.q_len;
      const std::ptrdiff_t column = j - (a.kv_len - columns);
      if (column >= 0 && a.mask[at(i * columns + column)] == 0) return false;
    } else if (a.causal && c[at(j)] > p[at(i)]) {
      return false;
    }
    return a.window == 0 || c[at(j)] > p[at(i)] - a.window || j < a.sinks;
  };

  attention_result r;
  r.out.assign(at(a.q_len * a.num_q_heads * a.head_dim), 0.0);
  r.lse.assign(at(a.q_len * a.num_q_heads), -std::numeric_limits<double>::infinity());
  r.max_logit.assign(r.lse.size(), 0.0);
  r.max_norms.assign(r.lse.size(), 0.0);
  r.max_value.assign(r.lse.size(), 0.0);
  for (std::ptrdiff_t i = 0; i < a.q_len; ++i) {
    for (std::ptrdiff_t h = 0; h < a.num_q_heads; ++h) {
      const std::size_t row = at(i * a.num_q_heads + h);
      const std::ptrdiff_t g = h / group;
      std::vector<std::ptrdiff_t> seen;
      std::vector<double> s;
      double top = -std::numeric_limits<double>::infinity();
      for (std::ptrdiff_t j = 0; j < a.kv_len; ++j) {
        if (!visible(i, j)) continue;
        double dot = 0;
        double q_square = 0;
        double k_square = 0;
        for (std::ptrdiff_t d = 0; d < a.head_dim; ++d) {
          const double q_d = q[row * at(a.head_dim) + at(d)];
          const double k_d = k[at((j * a.num_kv_heads + g) * a.head_dim + d)];
          dot += q_d * k_d;
          q_square += q_d * q_d;
          k_square += k_d * k_d;
          r.max_value[row] =
              std::fmax(r.max_value[row], std::fabs(a.v[at((j * a.num_kv_heads + g) * a.head_dim + d)]));
        }
        double score = dot * scale;
        if (a.soft_cap != 0) score = a.soft_cap * std::tanh(score / a.soft_cap);
        if (!a.alibi_slopes.empty())
          score -= a.alibi_slopes[at(h)] * static_cast<double>(p[at(i)] - c[at(j)]);
        seen.push_back(j);
        s.push_back(score);
        top = std::fmax(top, score);
        r.max_logit[row] = std::fmax(r.max_logit[row], std::fabs(score));
        r.max_norms[row] =
            std::fmax(r.max_norms[row], std::fabs(scale) * std::sqrt(q_square) * std::sqrt(k_square));
      }
      if (seen.empty()) continue;
      double sum = 0;
      for (const double score : s) sum += std::exp(score - top);
      const double lse = top + std::log(sum);
      r.lse[row] = lse;
      for (std::size_t n = 0; n < seen.size(); ++n) {
        const double weight = std::exp(s[n] - lse);
        for (std::ptrdiff_t d = 0; d < a.head_dim; ++d)
          r.out[row * at(a.head_dim) + at(d)] +=
              weight * a.v[at((seen[n] * a.num_kv_heads + g) * a.head_dim + d)];
      }
    }
  }
  return r;
}

}  // namespace oracle
