// SPDX-License-Identifier: MIT
// Chooses the next token from the logits: greedy, or at random by temperature and top-p. The random numbers
// are our own, so a seed gives the same text with every standard library.
#pragma once

#include "common/splitmix64.hpp"

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

namespace llama {

using kvcache::index_t;
using program::splitmix64;

/// The largest logit; the first of equal ones. NaN is never chosen over a number. \pre not empty
[[nodiscard]] inline index_t greedy_token(std::span<const float> logits) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < logits.size(); ++i) {
    if (logits[i] > logits[best] || std::isnan(logits[best])) best = i;
  }
  return static_cast<index_t>(best);
}

struct sampler_options {
  double temperature = 0.8;  // 0: greedy
  double top_p = 0.95;       // keep the likeliest tokens that together have this probability, 1: all
  std::uint64_t seed = 1;
};

class sampler {
 public:
  explicit sampler(const sampler_options& options) : options_(options), random_(options.seed) {}

  /// \param logits  [vocab], finite
  [[nodiscard]] index_t next(std::span<const float> logits);

 private:
  struct candidate {
    double probability;
    index_t id;
  };

  sampler_options options_;
  splitmix64 random_;
  std::vector<candidate> candidates_;  // scratch, the likeliest first
};

inline index_t sampler::next(std::span<const float> logits) {
  const index_t likeliest = greedy_token(logits);
  if (options_.temperature <= 0) return likeliest;

  // Pass 1: softmax without its denominator, relative to the largest logit.
  const double largest = logits[static_cast<std::size_t>(likeliest)];
  double total = 0;
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double p = std::exp((static_cast<double>(logits[i]) - largest) / options_.temperature);
    if (!(p > 0)) continue;
    candidates_.push_back({p, static_cast<index_t>(i)});
    total += p;
  }
  if (candidates_.empty()) return likeliest;
  std::sort(candidates_.begin(), candidates_.end(), [](const candidate& a, const candidate& b) {
    return a.probability != b.probability ? a.probability > b.probability : a.id < b.id;
  });

  // Pass 2: the nucleus, the shortest prefix that reaches top_p.
  double kept = 0;
  std::size_t count = 0;
  while (count < candidates_.size() && (count == 0 || kept < options_.top_p * total)) {
    kept += candidates_[count++].probability;
  }

  // Pass 3: the token under a random point of it.
  double point = random_.unit() * kept;
  for (std::size_t i = 0; i + 1 < count; ++i) {
    point -= candidates_[i].probability;
    if (point < 0) return candidates_[i].id;
  }
  return candidates_[count - 1].id;
}

}  // namespace llama
