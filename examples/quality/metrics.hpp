// SPDX-License-Identifier: MIT
// The numbers that a codec is judged by, in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace quality {

/// sum (got - expected)^2 / sum expected^2.
[[nodiscard]] inline double relative_squared_error(std::span<const float> got,
                                                   std::span<const float> expected) {
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double x = expected[i];
    error += (got[i] - x) * (got[i] - x);
    size += x * x;
  }
  return error / size;
}

/// |got - expected| / |expected|.
[[nodiscard]] inline double relative_error(std::span<const float> got, std::span<const float> expected) {
  return std::sqrt(relative_squared_error(got, expected));
}

/// Natural logarithms of the softmax of one row.
[[nodiscard]] inline std::vector<double> log_softmax(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - largest);
  const double all = largest + std::log(sum);
  std::vector<double> logs;
  logs.reserve(logits.size());
  for (const float x : logits) logs.push_back(x - all);
  return logs;
}

/// The weights whose logarithms these are.
[[nodiscard]] inline std::vector<float> weights_of(std::span<const double> logs) {
  std::vector<float> weights(logs.size());
  std::transform(logs.begin(), logs.end(), weights.begin(),
                 [](double x) { return static_cast<float>(std::exp(x)); });
  return weights;
}

/// Kullback-Leibler divergence of softmax(got) from softmax(exact), in nats; both in logarithms.
[[nodiscard]] inline double divergence(std::span<const double> exact, std::span<const double> got) {
  double sum = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) sum += std::exp(exact[i]) * (exact[i] - got[i]);
  return std::max(sum, 0.0);
}

[[nodiscard]] inline double mean(std::span<const double> values) {
  double sum = 0;
  for (const double x : values) sum += x;
  return values.empty() ? std::numeric_limits<double>::quiet_NaN() : sum / static_cast<double>(values.size());
}

/// The value that a share `q` of all values does not exceed: 0.5 is the median. NaN if there are none.
[[nodiscard]] inline double quantile(std::vector<double> values, double q) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto rank = static_cast<std::size_t>(std::ceil(q * static_cast<double>(values.size())));
  const auto at =
      values.begin() + static_cast<std::ptrdiff_t>(std::clamp<std::size_t>(rank, 1, values.size()) - 1);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

}  // namespace quality
