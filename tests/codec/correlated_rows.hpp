// SPDX-License-Identifier: MIT
// Rows whose neighbouring dims go together, differently in each head and layer, and what a calibration sees of them.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>

#include "support/random.hpp"

#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace test {

using kvcache::cache_shape;
using kvcache::index_t;

/// How rows are correlated.
struct correlation {
  float neighbours = 0.9F;  ///< x[d] = neighbours * x[d - 1] + what is new
  float heads_apart = 0;    ///< head h has neighbours - h * heads_apart
};

/// [tokens, heads, head_dim], deviation 1, each dim's sign turned by the head it is in.
inline std::vector<float> correlated_rows(const cache_shape& shape, index_t tokens, const correlation& with,
                                          random& random) {
  std::vector<float> rows;
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t head = 0; head < shape.num_kv_heads; ++head) {
      const float factor = with.neighbours - static_cast<float>(head) * with.heads_apart;
      const float rest = std::sqrt(1 - factor * factor);
      float x = random.normal();
      for (index_t d = 0; d < shape.head_dim; ++d) {
        rows.push_back(d % (head + 2) == 1 ? -x : x);
        x = factor * x + rest * random.normal();
      }
    }
  }
  return rows;
}

/// Of layer `layer` neighbours are less alike than of the one before.
inline correlation of_layer(index_t layer) { return {0.95F - 0.25F * static_cast<float>(layer), 0.1F}; }

/// Keys and values of every layer, and queries as long as rows.
inline kvcache::codec::low_rank_calibration calibrated(const cache_shape& shape, random& random,
                                                       bool queries = false) {
  kvcache::codec::low_rank_calibration seen(shape);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const index_t tokens = 20 * shape.head_dim;
    const auto k = correlated_rows(shape, tokens, of_layer(layer), random);
    const auto v = correlated_rows(shape, tokens, of_layer(layer), random);
    seen.add(layer, k, v);
    if (!queries) continue;
    seen.add_queries(layer, correlated_rows(shape, tokens, {0.5F, 0.1F}, random), shape.num_kv_heads);
    seen.add_output_weights(layer, correlated_rows(shape, tokens, {0.4F, 0.2F}, random), shape.num_kv_heads);
  }
  return seen;
}

/// The rows of one head, [tokens, head_dim].
inline std::vector<float> rows_of_head(const std::vector<float>& rows, const cache_shape& shape,
                                       index_t head) {
  std::vector<float> own;
  const index_t stride = shape.num_kv_heads * shape.head_dim;
  for (auto at = rows.begin() + head * shape.head_dim; at < rows.end();) {
    own.insert(own.end(), at, at + shape.head_dim);
    if (rows.end() - at <= stride) break;
    at += stride;
  }
  return own;
}

}  // namespace test
