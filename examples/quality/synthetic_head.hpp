// SPDX-License-Identifier: MIT
// Keys, values and queries of a head that is hard to compress in the ways that real ones are, for want of a large model.
//
//   key[t]    = RoPE_t( mean + exp(.15 N) * (low rank, rank 16, AR(.9) in t  +  noise of a deviation per channel) )
//   value[t]  =         low rank, rank 16, AR(.9) in t  +  noise of a deviation per channel
//   query     = RoPE_n( query mean + 4.5 key / |key| of a token drawn at random, before RoPE  +  N )
//
// Deviations of noise are .6 exp(.5 N), of the low-rank part 1. Six channels of the keys, drawn at random, have a mean of
// 8 to 14, of either sign, and noise of 1.5; the others have none. RoPE has theta 5e5 and the half pairing.
// The query mean is N(0, query_mean_size^2): large enough that attention is as peaked as it is in models.
#pragma once

#include "quality/random_numbers.hpp"

#include <kvcache/attention/rope.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace quality {

using kvcache::index_t;

struct head_settings {
  index_t num_tokens = 4096;
  index_t head_dim = 128;
  index_t num_queries = 128;
  double query_mean_size = 0.85;
};

/// How keys and queries are rotated.
[[nodiscard]] inline kvcache::rope_config rope_of(const head_settings& settings) {
  return {.head_dim = settings.head_dim, .pairing = kvcache::rope_pairing::half, .theta = 5e5};
}

struct synthetic_head {
  std::vector<float> keys;     ///< [num_tokens, head_dim], rotated
  std::vector<float> values;   ///< [num_tokens, head_dim]
  std::vector<float> queries;  ///< [num_queries, head_dim], rotated and divided by sqrt(head_dim)
};

/// Makes one head; what it is made of, step by step.
class head_maker {
 public:
  head_maker(std::uint64_t seed, const head_settings& settings)
      : random_(seed), settings_(settings), dim_(static_cast<std::size_t>(settings.head_dim)) {}

  [[nodiscard]] synthetic_head make() {
    auto key_noise = noise_sizes();
    auto query_mean = random_.normals(dim_);
    for (double& x : query_mean) x *= settings_.query_mean_size;
    const auto key_mean = add_outliers(key_noise);
    const auto keys = make_keys(key_mean, key_noise);
    const auto values = make_values();
    const auto queries = make_queries(keys, query_mean);
    return rotated(keys, values, queries);
  }

 private:
  using numbers = std::vector<double>;

  [[nodiscard]] std::size_t num_tokens() const noexcept {
    return static_cast<std::size_t>(settings_.num_tokens);
  }

  numbers noise_sizes() {
    numbers sizes = random_.normals(dim_);
    for (double& x : sizes) x = 0.6 * std::exp(0.5 * x);
    return sizes;
  }

  /// \return the mean of each channel
  numbers add_outliers(numbers& noise) {
    constexpr int num_outliers = 6;
    numbers means(dim_, 0.0);
    for (int found = 0; found < num_outliers;) {
      const std::size_t channel = random_.below(dim_);
      if (means[channel] != 0) continue;
      const double sign = random_.unit() < 0.5 ? -1 : 1;
      means[channel] = sign * random_.uniform(8, 14);
      noise[channel] = 1.5;
      ++found;
    }
    return means;
  }

  /// Rows whose 16 coordinates follow an AR(.9) process, in a random basis; deviation 1. [num_tokens, head_dim]
  numbers low_rank_rows() {
    constexpr std::size_t rank = 16;
    constexpr double kept = 0.9;
    const double fresh = std::sqrt(1 - kept * kept);
    numbers state = random_.normals(rank);
    numbers basis = random_.normals(rank * dim_);
    for (double& x : basis) x /= std::sqrt(static_cast<double>(rank));
    numbers rows(num_tokens() * dim_, 0.0);
    for (std::size_t t = 0; t < num_tokens(); ++t) {
      for (std::size_t j = 0; j < rank; ++j) {
        if (t > 0) state[j] = kept * state[j] + fresh * random_.normal();
        for (std::size_t d = 0; d < dim_; ++d) rows[t * dim_ + d] += state[j] * basis[j * dim_ + d];
      }
    }
    return rows;
  }

  numbers make_keys(const numbers& mean, const numbers& noise) {
    numbers rows = low_rank_rows();
    for (std::size_t t = 0; t < num_tokens(); ++t) {
      const double size = std::exp(0.15 * random_.normal());
      for (std::size_t d = 0; d < dim_; ++d) {
        double& x = rows[t * dim_ + d];
        x = mean[d] + size * (x + noise[d] * random_.normal());
      }
    }
    return rows;
  }

  numbers make_values() {
    numbers rows = low_rank_rows();
    const numbers noise = noise_sizes();
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += noise[i % dim_] * random_.normal();
    return rows;
  }

  numbers make_queries(const numbers& keys, const numbers& mean) {
    constexpr double aim = 4.5;
    numbers rows;
    for (index_t q = 0; q < settings_.num_queries; ++q) {
      const double* target = keys.data() + random_.below(num_tokens()) * dim_;
      double squares = 0;
      for (std::size_t d = 0; d < dim_; ++d) squares += target[d] * target[d];
      const double scale = aim / std::sqrt(squares);
      for (std::size_t d = 0; d < dim_; ++d) rows.push_back(mean[d] + scale * target[d] + random_.normal());
    }
    return rows;
  }

  [[nodiscard]] synthetic_head rotated(const numbers& keys, const numbers& values,
                                       const numbers& queries) const {
    synthetic_head head{
        {keys.begin(), keys.end()}, {values.begin(), values.end()}, {queries.begin(), queries.end()}};
    const kvcache::rope_table table(rope_of(settings_));
    for (index_t t = 0; t < settings_.num_tokens; ++t)
      table.rotate(head.keys.data() + t * settings_.head_dim, 1, t);
    table.rotate(head.queries.data(), settings_.num_queries, settings_.num_tokens);
    const float scale = 1 / std::sqrt(static_cast<float>(settings_.head_dim));
    for (float& x : head.queries) x *= scale;
    return head;
  }

  random_numbers random_;
  head_settings settings_;
  std::size_t dim_;
};

[[nodiscard]] inline synthetic_head make_head(std::uint64_t seed, const head_settings& settings = {}) {
  return head_maker(seed, settings).make();
}

}  // namespace quality
