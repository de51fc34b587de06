// SPDX-License-Identifier: MIT
// Normally distributed rows through both sides of a codec: relative mean squared error and bits per number. No codec of
// b bits can be below 4^-b (Shannon).
#pragma once

#include "quality/coded_rows.hpp"
#include "quality/metrics.hpp"
#include "quality/random_numbers.hpp"

#include <kvcache/interop/codec_spec.hpp>

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace quality {

struct side_error {
  double bits = 0;   ///< per number, scales and padding included
  double error = 0;  ///< relative mean squared error

  /// Error times 4^bits: 1 is the bound.
  [[nodiscard]] double above_bound() const { return error * std::pow(4.0, bits); }
};

struct gaussian_quality {
  side_error keys;
  side_error values;

  [[nodiscard]] side_error both() const {
    return {(keys.bits + values.bits) / 2, (keys.error + values.error) / 2};
  }
};

struct gaussian_settings {
  index_t num_tokens = 8192;
  index_t head_dim = 128;
  index_t block_size = 128;  ///< tokens
  std::uint64_t seed = 1;
};

template <class Side>
[[nodiscard]] side_error error_of_side(const Side& side, const block_geometry& g,
                                       std::span<const float> rows) {
  const coded_rows<Side> coded(side, g, rows);
  return {coded.bits(), relative_squared_error(coded.decoded(), rows)};
}

/// Sinks and tail of the codec play no part.
[[nodiscard]] inline gaussian_quality measure_gaussian(const std::string& spec,
                                                       const gaussian_settings& settings = {}) {
  random_numbers random(settings.seed);
  const block_geometry g{settings.block_size, settings.head_dim};
  const auto whole_tokens = settings.num_tokens / g.block_size * g.block_size;
  const auto numbers = random.normals(static_cast<std::size_t>(whole_tokens * g.head_dim));
  const std::vector<float> rows(numbers.begin(), numbers.end());
  const auto codec = kvcache::make_codec(spec);
  return {error_of_side(codec.keys, g, rows), error_of_side(codec.values, g, rows)};
}

}  // namespace quality
