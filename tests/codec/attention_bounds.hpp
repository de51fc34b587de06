// SPDX-License-Identifier: MIT
// Attention over coded blocks against exact attention over the rows they give back: within what attend says of the codec,
// on every instruction set.
#pragma once

#include <kvcache/block/view.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>

#include "attention/problem.hpp"
#include "support/integer_levels.hpp"
#include "support/kernels_on_tiles.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace attention_test {

/// number[t, d] = offsets[d] + scales[d] * whole number * token_scales[t]
struct stored_factors {
  std::vector<double> scales;        // [head_dim]
  std::vector<double> offsets;       // [head_dim]
  std::vector<double> token_scales;  // [block_size]; empty for int8, whose bound does not need them
};

/// Of one section of a side of rotated, trellis, channel, balanced or int8.
template <class Side>
stored_factors factors_of(const Side& side, const kvcache::block_geometry& g, const std::byte* section) {
  const auto dims = static_cast<std::size_t>(g.head_dim);
  stored_factors f{std::vector<double>(dims, 1.0), std::vector<double>(dims, 0.0), {}};
  const auto tokens_from = [&](const kvcache::bfloat16* scales) {
    for (index_t t = 0; t < g.block_size; ++t)
      f.token_scales.push_back(static_cast<double>(to_float(scales[t])));
  };
  if constexpr (std::is_same_v<Side, codec::int8_keys>) {
    if (side.mean != nullptr) f.offsets.assign(side.mean, side.mean + g.head_dim);
  } else if constexpr (std::is_same_v<Side, codec::int8_values>) {
    // nothing but scales
  } else if constexpr (Side::needs_whole_blocks) {
    struct opened : Side {
      using Side::channel_offsets;
      using Side::channel_scales;
      using Side::scales_of_tokens;
    };
    for (std::size_t d = 0; d < dims; ++d) {
      f.scales[d] = static_cast<double>(to_float(opened::channel_scales(g, section)[d]));
      f.offsets[d] = static_cast<double>(to_float(opened::channel_offsets(g, section)[d]));
    }
    tokens_from(opened::scales_of_tokens(g, section));
  } else {
    struct opened : Side {
      using Side::section_scales;
    };
    tokens_from(opened::section_scales(g, section));
  }
  return f;
}

/// The codec of a head, and how many of its blocks are the codec's.
template <class Layer>
auto codec_of(const Layer& layer, index_t head) {
  if constexpr (requires { layer.codec(head); }) {
    return layer.codec(head);
  } else {
    return layer.codec();
  }
}
template <class Layer>
index_t num_coded(const Layer& layer) {
  if constexpr (requires { layer.num_sealed(); }) {
    return layer.num_sealed();
  } else {
    return kvcache::ceil_div(layer.size(), layer.shape().block_size);
  }
}

/// What integer products add to the error, for each row of queries.
struct integer_loss {
  std::vector<double> logits;  // of each logit
  std::vector<double> sums;    // of the output, beyond what logits do
};

/// Norms of what one block of a head multiplies.
struct block_norms {
  double key = 0;          // of the largest key, less offsets, by its channels' scales
  double code = 0;         // of the largest value in units of its scale
  double token_scale = 0;  // the largest of a value
};

inline block_norms norms_of(const problem& p, const kvcache::block_geometry& g, index_t head, index_t block,
                            const stored_factors& keys, const stored_factors& values) {
  block_norms most;
  for (index_t t = block * g.block_size; t < std::min((block + 1) * g.block_size, p.n.kv_len); ++t) {
    double k_square = 0;
    double v_square = 0;
    for (std::size_t d = 0; d < keys.scales.size(); ++d) {
      const std::size_t at = static_cast<std::size_t>((t * p.n.num_kv_heads + head) * g.head_dim) + d;
      if (keys.scales[d] != 0) k_square += std::pow((double{p.k[at]} - keys.offsets[d]) / keys.scales[d], 2);
      v_square += std::pow(double{p.v[at]} - values.offsets[d], 2);
    }
    most.key = std::fmax(most.key, std::sqrt(k_square));
    if (values.token_scales.empty()) continue;
    const double own = values.token_scales[static_cast<std::size_t>(t % g.block_size)];
    most.token_scale = std::fmax(most.token_scale, own);
    if (own != 0) most.code = std::fmax(most.code, std::sqrt(v_square) / own);
  }
  return most;
}

/// \param row  [head_dim]
inline double norm_of(const float* row, const std::vector<double>& factors) {
  double square = 0;
  for (std::size_t d = 0; d < factors.size(); ++d) square += std::pow(double{row[d]} * factors[d], 2);
  return std::sqrt(square);
}

/// \param p  with the keys and values that the layer gives back
template <class Layer>
integer_loss loss_of(const problem& p, const Layer& layer, const oracle::attention_result& want) {
  const kvcache::block_geometry g = kvcache::geometry_of(layer.shape());
  const index_t group = p.n.num_q_heads / p.n.num_kv_heads;
  const double root = std::sqrt(static_cast<double>(g.head_dim));
  const double scale = p.options.scale ? double{*p.options.scale} : 1 / root;
  integer_loss loss{std::vector<double>(want.lse.size()), std::vector<double>(want.lse.size())};
  for (index_t head = 0; head < p.n.num_kv_heads; ++head) {
    const auto coded = codec_of(layer, head);
    constexpr bool int8_keys = std::is_same_v<std::remove_cvref_t<decltype(coded.keys)>, codec::int8_keys>;
    for (index_t b = 0; b < num_coded(layer); ++b) {
      const std::byte* block = layer.block(head, b);
      const stored_factors keys = factors_of(coded.keys, g, block);
      const stored_factors values = factors_of(coded.values, g, block + coded.keys.section_bytes(g));
      const block_norms most = norms_of(p, g, head, b, keys, values);
      for (index_t r = head * group; r < p.n.q_len * p.n.num_q_heads; ++r) {
        if (r % p.n.num_q_heads / group != head) continue;
        const auto row = static_cast<std::size_t>(r);
        const float* query = p.q.data() + r * g.head_dim;
        const double norms = scale * norm_of(query, keys.scales) * most.key;
        loss.logits[row] = std::fmax(loss.logits[row], root / (int8_keys ? 32000 : 250) * norms);
        loss.sums[row] =
            std::fmax(loss.sums[row], values.token_scales.empty() ? 5e-4 * want.max_value[row]
                                                                  : 0.11 * most.token_scale * most.code);
      }
    }
  }
  return loss;
}

/// The largest error on one level, in units of the bound.
inline double worst_of(const answer& got, const oracle::attention_result& want, const integer_loss& loss,
                       double slack) {
  double worst = 0;
  const auto add = [&worst](double error, double bound) {
    if (error == 0) return;
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::fmax(worst, error / bound);
  };
  const std::size_t rows = want.lse.size();
  const std::size_t dim = want.out.size() / rows;
  for (std::size_t r = 0; r < rows; ++r) {
    const double base = slack * 1e-6 * (4 + std::fmax(want.max_norms[r], want.max_logit[r]));
    const double lse = static_cast<double>(got.lse[r]);
    if (lse != want.lse[r]) add(std::fabs(lse - want.lse[r]), 2 * base + loss.logits[r]);
    const double bound = (base + std::fmin(loss.logits[r], 2)) * want.max_value[r] + loss.sums[r];
    for (std::size_t d = r * dim; d < (r + 1) * dim; ++d)
      add(std::fabs(static_cast<double>(got.out[d]) - want.out[d]), bound);
  }
  return worst;
}

/// Checks a problem over a layer that holds its keys and values, on every level.
/// \return the largest error on those that multiply integers, in units of the bound
template <class Layer>
double require_within_bounds(problem p, const Layer& layer) {
  layer.copy_out(0, p.n.kv_len, p.k, p.v);
  const oracle::attention_result want = expected(p, "f32");
  const integer_loss loss = loss_of(p, layer, want);
  double worst = 0;
  for (const auto* kernels : test::every_table()) {
    // What sealing codecs keep exact is bf16.
    const bool in_two_bf16 =
        kernels->level == kvcache::kernel::isa::amx && layer.codec().needs_whole_blocks();
    p.options.kernel = kernels;
    const double error = worst_of(computed(p, layer), want, loss, in_two_bf16 ? 8 : 1);
    CAPTURE(std::string(kvcache::kernel::to_string(kernels->level)), p.n.q_len, p.n.kv_len, p.n.head_dim,
            layer.shape().block_size, error);
    REQUIRE(error <= 1);
    if (test::multiplies_integers(kernels->level)) worst = std::fmax(worst, error);
  }
  return worst;
}

}  // namespace attention_test
