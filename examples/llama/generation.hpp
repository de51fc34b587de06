// SPDX-License-Identifier: MIT
// The loop that writes text: prefill the prompt in pieces, then one token a step. It prints nothing; the
// caller is told what happens as it happens.
#pragma once

#include "llama/decoder.hpp"
#include "llama/sampler.hpp"

#include <algorithm>
#include <chrono>
#include <functional>
#include <span>
#include <vector>

namespace llama {

/// Seconds since it was made.
class stopwatch {
 public:
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Row `row` of `logits` [rows, vocab].
[[nodiscard]] inline std::span<const float> row_of(const matrix& logits, index_t row) {
  return {logits.data() + row * logits.cols(), static_cast<std::size_t>(logits.cols())};
}

struct generation_options {
  index_t num_tokens = 400;     // to write, at least 1
  index_t prefill_piece = 128;  // tokens of the prompt per forward pass
  sampler_options sampling;
};

struct generation_events {
  std::function<void(index_t done, index_t total)> prefilled = [](index_t, index_t) {
  };                                                                                   // prompt tokens so far
  std::function<void(index_t previous, index_t id)> chosen = [](index_t, index_t) {};  // one more token
};

struct generation_result {
  std::vector<index_t> tokens;     // the prompt and what was written; the last one is not in the cache
  index_t num_prompt = 0;          // tokens
  double first_token_seconds = 0;  // prefill and the choice of the first token
  double later_seconds = 0;        // all other tokens, without the time `chosen` took
  matrix logits;                   // [kept, vocab], those after the last `kept` tokens of the cache

  [[nodiscard]] index_t num_written() const { return static_cast<index_t>(tokens.size()) - num_prompt; }
  [[nodiscard]] index_t num_cached() const { return static_cast<index_t>(tokens.size()) - 1; }
};

/// Appends the prompt to the cache piece by piece. \return logits after its last token, [1, vocab]
template <class Cache, class Executor>
matrix prefill(const decoder& model, std::span<const index_t> prompt, Cache& cache, index_t piece,
               Executor& executor, const generation_events& events = {}) {
  matrix logits;
  const auto total = static_cast<index_t>(prompt.size());
  for (index_t done = 0; done < total;) {
    const index_t count = std::min(piece, total - done);
    logits = model.forward(prompt.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count)),
                           cache, 1, executor);
    done += count;
    events.prefilled(done, total);
  }
  return logits;
}

/// Continues `prompt`, at least one token, until `num_tokens` are written or the model ends the text.
template <class Cache, class Executor>
generation_result generate(const decoder& model, std::span<const index_t> prompt, Cache& cache,
                           const generation_options& options, Executor& executor,
                           const generation_events& events) {
  constexpr index_t max_kept = index_t{1} << 24;  // floats of logits
  const auto& stops = model.config().stop_ids;
  const index_t vocab_size = model.config().vocab_size;
  const index_t kept_rows = std::clamp<index_t>(max_kept / vocab_size, 1, options.num_tokens);
  matrix kept(kept_rows, vocab_size);  // [kept, vocab], a ring

  generation_result result;
  result.tokens.assign(prompt.begin(), prompt.end());
  result.num_prompt = static_cast<index_t>(prompt.size());
  sampler choose(options.sampling);
  index_t num_steps = 0;
  while (num_steps < options.num_tokens) {
    const stopwatch watch;
    const matrix logits = num_steps == 0
                              ? prefill(model, prompt, cache, options.prefill_piece, executor, events)
                              : model.forward(std::span(&result.tokens.back(), 1), cache, 1, executor);
    const index_t id = choose.next(row_of(logits, 0));
    (num_steps == 0 ? result.first_token_seconds : result.later_seconds) += watch.seconds();
    kept.row(num_steps++ % kept_rows) = logits.row(0);

    const index_t previous = result.tokens.back();
    result.tokens.push_back(id);
    if (std::find(stops.begin(), stops.end(), id) != stops.end()) break;
    events.chosen(previous, id);
  }

  const index_t num_kept = std::min(num_steps, kept_rows);
  result.logits.resize(num_kept, vocab_size);
  for (index_t i = 0; i < num_kept; ++i)
    result.logits.row(i) = kept.row((num_steps - num_kept + i) % kept_rows);
  return result;
}

}  // namespace llama
