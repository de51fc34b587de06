// SPDX-License-Identifier: MIT
// The tables that `generate` ends with. Every number in them was measured in the same run.
#pragma once

#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/measure.hpp"
#include "llama/text_table.hpp"

#include <kvcache/interop/any_cache.hpp>

#include <algorithm>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace llama {

/// Bytes of one stored number, from the codec in "container/codec": what the memory formula multiplies with.
[[nodiscard]] inline index_t element_bytes_of(std::string_view spec) {
  return spec.ends_with("/f32") ? 4 : 2;
}

/// Lengths worth a row: 64, 128, ... 1024 as far as the context goes, and that of the run itself.
[[nodiscard]] inline std::vector<index_t> report_lengths(index_t max_context, index_t run_length) {
  std::vector<index_t> lengths{run_length};
  for (index_t length = 64; length <= std::min<index_t>(max_context, 1024); length *= 2)
    lengths.push_back(length);
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  return lengths;
}

/// What a run was, for its report.
struct run_summary {
  std::string spec;  // "paged/bf16"
  index_t num_threads = 1;
  const generation_result* result = nullptr;
  kvcache::memory_use memory;  // of the cache at the end
  measurements timings;
};

/// Writes the report of one run.
class run_report {
 public:
  run_report(const decoder& model, const run_summary& run) : model_(&model), run_(&run) {}

  template <class Executor>
  void write(std::ostream& out, Executor& executor) const {
    write_speed(out);
    write_lengths(out);
    write_memory(out);
    write_difference(out, executor);
  }

 private:
  void write_speed(std::ostream& out) const;
  void write_lengths(std::ostream& out) const;
  void write_memory(std::ostream& out) const;
  template <class Executor>
  void write_difference(std::ostream& out, Executor& executor) const;

  const decoder* model_;
  const run_summary* run_;
};

inline void run_report::write_speed(std::ostream& out) const {
  const generation_result& result = *run_->result;
  const index_t num_later = result.num_written() - 1;
  out << run_->spec << ", " << run_->num_threads << (run_->num_threads == 1 ? " thread" : " threads") << '\n';
  out << "time to first token    " << formatted("%.1f", result.first_token_seconds * 1e3)
      << " ms for a prompt of " << with_commas(result.num_prompt) << " tokens\n";
  if (num_later == 0) return;
  const double cached_rate = static_cast<double>(num_later) / result.later_seconds;
  out << "with the cache         " << rate_text(cached_rate) << " tokens/s over " << with_commas(num_later)
      << " tokens\n";
  const auto& timings = run_->timings.timings;
  if (timings.empty() || timings.back().length < result.num_cached()) return;
  const double seconds = recompute_seconds(timings, result.num_prompt + 1, result.num_cached());
  out << "recomputing everything " << rate_text(static_cast<double>(num_later) / seconds)
      << " tokens/s over the same tokens (timed at the lengths below, interpolated between them)\n"
      << "speed-up               " << rate_text(seconds / result.later_seconds) << "x\n";
}

inline void run_report::write_lengths(std::ostream& out) const {
  const auto& timings = run_->timings;
  if (!timings.timings.empty()) {
    text_table table({"length", "with the cache", "recomputing", "speed-up", "max logit difference"});
    for (const auto& t : timings.timings) {
      table.add({with_commas(t.length), rate_text(1 / t.cached_seconds) + " tok/s",
                 rate_text(1 / t.recompute_seconds) + " tok/s",
                 rate_text(t.recompute_seconds / t.cached_seconds) + "x",
                 formatted("%.1e", static_cast<double>(t.max_difference))});
    }
    out << "\nThe next token after so many, each the fastest of a few:\n" << table;
  }
  if (!timings.complete)
    out << "Longer texts are left out: recomputing them would take more than the time set aside.\n";
}

inline void run_report::write_memory(std::ostream& out) const {
  const model_config& c = model_->config();
  const index_t bytes_each = element_bytes_of(run_->spec), num_tokens = run_->result->num_cached();
  const index_t per_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * bytes_each;
  out << "\nbytes per token        " << with_commas(run_->memory.payload / num_tokens)
      << " in the cache; formula 2 x " << c.num_layers << " layers x " << c.num_kv_heads << " KV heads x "
      << c.head_dim << " head_dim x " << bytes_each << " bytes = " << with_commas(per_token) << '\n'
      << "cache                  " << with_commas(run_->memory.total) << " bytes for "
      << with_commas(num_tokens) << " tokens = formula " << with_commas(num_tokens * per_token) << " + slack "
      << with_commas(run_->memory.slack) << '\n';
}

/// Recomputes the whole text once more and compares the logits after each of its tokens.
template <class Executor>
void run_report::write_difference(std::ostream& out, Executor& executor) const {
  const auto& timings = run_->timings.timings;
  const generation_result& result = *run_->result;
  const auto measured = std::find_if(timings.begin(), timings.end(),
                                     [&](const auto& t) { return t.length == result.num_cached(); });
  if (measured == timings.end()) return;
  const auto text = std::span(result.tokens).first(static_cast<std::size_t>(result.num_cached()));
  const matrix recomputed = model_->recompute(text, result.logits.rows(), executor);  // [kept, vocab]
  const float difference = (recomputed - result.logits).cwiseAbs().maxCoeff();
  out << "logits                 differ by " << formatted("%.1e", static_cast<double>(difference))
      << " at most between the two, over all " << with_commas(result.logits.rows())
      << " steps of this run; they span "
      << formatted("%.1f", static_cast<double>(recomputed.maxCoeff() - recomputed.minCoeff())) << '\n';
}

}  // namespace llama
