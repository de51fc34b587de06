// SPDX-License-Identifier: MIT
// How a row is measured: the operation and what it is compared with alternate, and medians are reported.
//
//   compare(0) op(0) restore(0)   compare(1) op(1) restore(1)   ...   until the row's time is used up
//   untimed    timed untimed
//
// Google Benchmark counts and times the operations only; it is told to be content with one round of this
// loop, because manual times would put "/manual_time" behind every name.
#pragma once

#include <kvcache/core/types.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

namespace kvcache::bench {

/// Seconds a row may take; set by --benchmark_min_time.
inline double row_seconds = 0.25;

/// Where the number of samples of the running row is kept: the framework wants repetitions of one length.
/// Zero until known; set by register_row.
inline index_t* samples_of_row = nullptr;

template <class F>
double seconds_of(F&& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The value below which `part` of the samples lie. \pre not empty
inline double quantile(std::vector<double> samples, double part) {
  const auto at = std::lround(part * static_cast<double>(samples.size() - 1));
  std::nth_element(samples.begin(), samples.begin() + at, samples.end());
  return samples[static_cast<std::size_t>(at)];
}
inline double median(std::vector<double> samples) { return quantile(std::move(samples), 0.5); }

using sample_function = std::function<void(index_t sample)>;

struct measured {
  sample_function op;
  std::vector<sample_function> compare = {};  ///< each is timed right before every op
  sample_function restore = [](index_t) {};   ///< puts back what op changed, untimed
  index_t ops_per_sample = 1;                 ///< how often one call of `op` does the operation
};

struct medians {
  double op = 0;                ///< seconds of one operation
  std::vector<double> compare;  ///< seconds of one call each
};

/// Samples that fit into the row's time, given the seconds of one; slow ones still get two to five.
inline index_t num_samples(double seconds) {
  const index_t at_least = row_seconds < 0.05 ? 1 : seconds < 0.5 ? 5 : seconds < 2 ? 3 : 2;
  const double fitting = std::min(row_seconds / std::max(seconds, 1e-9), 2000.0);
  return std::max(static_cast<index_t>(fitting), at_least);
}

/// Runs the row. Sets the counters `median_ns`, `spread_pct` (interquartile range over the median) and
/// `samples`.
inline medians measure(benchmark::State& state, const measured& what) {
  const auto once = [&](index_t i) {
    for (const auto& compare : what.compare) compare(i);
    what.op(i);
    what.restore(i);
  };
  double seconds = seconds_of([&] { once(0); });  // warm: memory touched, buffers grown, threads awake
  if (seconds < 0.5) seconds = seconds_of([&] { once(1); });
  if (*samples_of_row == 0) *samples_of_row = num_samples(seconds);
  const index_t samples = *samples_of_row;

  std::vector<double> op_seconds;
  std::vector<std::vector<double>> compare_seconds(what.compare.size());
  while (state.KeepRunningBatch(samples * what.ops_per_sample)) {
    state.PauseTiming();
    for (index_t i = 0; i < samples; ++i) {
      for (std::size_t c = 0; c < what.compare.size(); ++c)
        compare_seconds[c].push_back(seconds_of([&] { what.compare[c](i + 2); }));
      state.ResumeTiming();
      op_seconds.push_back(seconds_of([&] { what.op(i + 2); }));
      state.PauseTiming();
      what.restore(i + 2);
    }
    state.ResumeTiming();
  }

  const double middle = median(op_seconds);
  medians result{middle / static_cast<double>(what.ops_per_sample), {}};
  for (const auto& samples_of : compare_seconds) result.compare.push_back(median(samples_of));
  state.counters["median_ns"] = result.op * 1e9;
  state.counters["spread_pct"] = 100 * (quantile(op_seconds, 0.75) - quantile(op_seconds, 0.25)) / middle;
  state.counters["samples"] = static_cast<double>(op_seconds.size());
  return result;
}

}  // namespace kvcache::bench
