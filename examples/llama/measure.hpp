// SPDX-License-Identifier: MIT
// What the cache saves: the time of the next token with it and without it, at several lengths.
#pragma once

#include "llama/generation.hpp"

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

namespace llama {

/// The next token after `length` tokens, both ways.
struct length_timing {
  index_t length = 0;            // tokens
  double cached_seconds = 0;     // one forward pass of one token, the fastest of nine
  double recompute_seconds = 0;  // one forward pass of all tokens, the fastest of three, of one when slow
  float max_difference = 0;      // between the logits of the two
};

/// Lengths and how long recomputing may take in all.
struct measure_options {
  std::vector<index_t> lengths;     // ascending
  double budget_seconds = 10;       // for recomputing; a length that would not fit is left out
  double seconds_per_token = 1e-3;  // first guess, for the budget
};

struct measurements {
  std::vector<length_timing> timings;  // ascending in length
  bool complete = true;                // false: the budget left the longer ones out
  double seconds_left = 0;             // of the budget
};

/// `tokens`, repeated until there are `length`. Only their number matters to the time. \pre not empty
[[nodiscard]] inline std::vector<index_t> repeated(std::span<const index_t> tokens, index_t length) {
  std::vector<index_t> out(static_cast<std::size_t>(length));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = tokens[i % tokens.size()];
  return out;
}

/// Times the last of `tokens` with the cache: the tokens before are prefilled, the last few go one by one.
template <class Cache, class Executor>
length_timing time_cached(const decoder& model, std::span<const index_t> tokens, Cache& cache, matrix& logits,
                          Executor& executor) {
  constexpr std::size_t max_steps = 9;
  const std::size_t num_steps = std::min(max_steps, tokens.size());
  const auto before = tokens.first(tokens.size() - num_steps);
  if (!before.empty()) (void)prefill(model, before, cache, 128, executor);
  double fastest = std::numeric_limits<double>::infinity();
  for (const index_t& token : tokens.last(num_steps)) {
    const stopwatch watch;
    logits = model.forward(std::span(&token, 1), cache, 1, executor);
    fastest = std::min(fastest, watch.seconds());
  }
  return {.length = static_cast<index_t>(tokens.size()), .cached_seconds = fastest};
}

/// Measures each length within the budget. \param make_cache  returns an empty cache for each
template <class MakeCache, class Executor>
measurements measure(const decoder& model, std::span<const index_t> tokens, const measure_options& options,
                     MakeCache make_cache, Executor& executor) {
  constexpr double slow = 1.0;  // seconds: not worth repeating
  measurements result;
  double left = options.budget_seconds;
  double per_token = options.seconds_per_token;
  for (const index_t length : options.lengths) {
    const auto text = repeated(tokens, length);
    if (per_token * static_cast<double>(length) > left) {
      result.complete = false;
      break;
    }
    auto cache = make_cache();
    matrix logits;  // [1, vocab], with the cache
    length_timing timing = time_cached(model, text, cache, logits, executor);
    timing.recompute_seconds = std::numeric_limits<double>::infinity();
    for (int run = 0; run < 3 && (run == 0 || timing.recompute_seconds < slow); ++run) {
      const stopwatch watch;
      const matrix recomputed = model.recompute(text, 1, executor);  // [1, vocab]
      const double seconds = watch.seconds();
      left -= seconds;
      timing.recompute_seconds = std::min(timing.recompute_seconds, seconds);
      timing.max_difference = (recomputed - logits).cwiseAbs().maxCoeff();
    }
    per_token = timing.recompute_seconds / static_cast<double>(length);
    result.timings.push_back(timing);
  }
  result.seconds_left = left;
  return result;
}

/// Time to recompute everything for each of the steps at lengths `first` to `last`: between the measured
/// lengths the time is interpolated, below the first one towards a single token, which costs what a cached
/// step costs.
/// \pre the longest measured length is at least `last`
[[nodiscard]] inline double recompute_seconds(std::span<const length_timing> timings, index_t first,
                                              index_t last) {
  double total = 0;
  for (index_t length = first; length <= last; ++length) {
    length_timing low{.length = 1, .recompute_seconds = timings.front().cached_seconds};
    for (const auto& high : timings) {
      if (length <= high.length) {
        const double span = static_cast<double>(std::max<index_t>(1, high.length - low.length));
        const double part = static_cast<double>(length - low.length) / span;
        total += low.recompute_seconds + part * (high.recompute_seconds - low.recompute_seconds);
        break;
      }
      low = high;
    }
  }
  return total;
}

}  // namespace llama
