// SPDX-License-Identifier: MIT
// One row per container and codec, all against the same text: the greedy one of recomputing everything.
#pragma once

#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/sampler.hpp"
#include "llama/text_table.hpp"

#include <kvcache/interop/any_cache.hpp>

#include <algorithm>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace llama {

/// A text that recomputing everything writes greedily, and the logits on the way.
struct greedy_text {
  std::vector<index_t> tokens;  // prompt, then what was written
  index_t num_prompt = 0;
  matrix logits;  // [tokens written, vocab], those that chose each
};

/// Finds that text without recomputing it at every step. A cache proposes the text; one recomputation of all
/// of it gives the logits after each prefix, and so proves every choice or corrects the first that differs.
template <class Executor>
greedy_text write_greedy_text(const decoder& model, std::span<const index_t> prompt, index_t num_tokens,
                              Executor& executor) {
  greedy_text text{.tokens = {prompt.begin(), prompt.end()},
                   .num_prompt = static_cast<index_t>(prompt.size())};
  const auto length = static_cast<index_t>(prompt.size()) + num_tokens;
  while (true) {
    auto cache = kvcache::make_cache("contiguous/f32", cache_shape_of(model.config()));
    const generation_options options{.num_tokens = length - static_cast<index_t>(text.tokens.size()),
                                     .sampling = {.temperature = 0}};
    if (options.num_tokens > 0) {
      text.tokens = generate(model, text.tokens, cache, options, executor, {}).tokens;
    }
    const auto known = std::span(text.tokens).first(text.tokens.size() - 1);
    const auto num_written = static_cast<index_t>(text.tokens.size()) - text.num_prompt;
    text.logits = model.recompute(known, num_written, executor);
    index_t row = 0;
    const auto written = [&](index_t r) -> index_t& {
      return text.tokens[static_cast<std::size_t>(text.num_prompt + r)];
    };
    while (row < num_written && greedy_token(row_of(text.logits, row)) == written(row)) ++row;
    if (row == num_written) return text;
    written(row) = greedy_token(row_of(text.logits, row));
    text.tokens.resize(static_cast<std::size_t>(text.num_prompt + row + 1));
  }
}

struct comparison {
  double tokens_per_second = 0;
  kvcache::memory_use memory;
  index_t num_tokens = 0;    // in the cache at the end
  float max_difference = 0;  // of the logits, over all steps
  bool same_text = true;  // every greedy choice along the text is the text's own, so it writes the same one
};

/// Follows `text` with a cache, making its own greedy choice at every step.
template <class Cache, class Executor>
comparison follow(const decoder& model, const greedy_text& text, Cache& cache, Executor& executor) {
  comparison result;
  const auto prompt = std::span(text.tokens).first(static_cast<std::size_t>(text.num_prompt));
  matrix logits = prefill(model, prompt, cache, 128, executor);  // [1, vocab]
  double seconds = 0;
  for (index_t row = 0;; ++row) {
    const index_t& token = text.tokens[static_cast<std::size_t>(text.num_prompt + row)];
    result.max_difference =
        std::max(result.max_difference, (logits - text.logits.row(row)).cwiseAbs().maxCoeff());
    result.same_text = result.same_text && greedy_token(row_of(logits, 0)) == token;
    if (row + 1 == text.logits.rows()) break;
    const stopwatch watch;
    logits = model.forward(std::span(&token, 1), cache, 1, executor);
    seconds += watch.seconds();
  }
  result.tokens_per_second = seconds > 0 ? static_cast<double>(text.logits.rows() - 1) / seconds : 0;
  result.memory = cache.bytes();
  result.num_tokens = cache.size();
  return result;
}

/// Writes the table.
template <class Executor>
void write_comparison(std::ostream& out, const decoder& model, const greedy_text& text, Executor& executor) {
  text_table table(
      {"cache", "tokens/s", "bytes/token", "cache bytes", "slack", "max logit difference", "same text"},
      text_table::names_first);
  for (const auto& spec : kvcache::cache_specs()) {
    auto cache = kvcache::make_cache(spec, cache_shape_of(model.config()), model.config().rope);
    const comparison c = follow(model, text, cache, executor);
    table.add({std::string(spec), rate_text(c.tokens_per_second),
               with_commas(c.memory.payload / c.num_tokens), with_commas(c.memory.total),
               with_commas(c.memory.slack), formatted("%.1e", static_cast<double>(c.max_difference)),
               c.same_text ? "yes" : "no"});
  }
  out << table;
}

}  // namespace llama
