// SPDX-License-Identifier: MIT
// The tables of `compare_codecs`, and the panels of its chart. Every number in them was measured in the same run.
#pragma once

#include "llama/text_table.hpp"
#include "quality/chart.hpp"
#include "quality/gaussian.hpp"
#include "quality/heads.hpp"
#include "quality/model.hpp"
#include "quality/options.hpp"

#include <cmath>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

namespace quality {

namespace detail {

/// Three significant digits, without an exponent down to .0001.
[[nodiscard]] inline std::string short_number(double x) {
  if (x == 0) return "0";
  return llama::formatted(std::fabs(x) < 1e-4 ? "%.1e" : (std::fabs(x) < 0.1 ? "%.5f" : "%.3f"), x);
}

[[nodiscard]] inline std::string bits_text(double bits) { return llama::formatted("%.3f", bits); }

}  // namespace detail

[[nodiscard]] inline chart_panel report_gaussian(std::ostream& out, const options& given) {
  out << "Normally distributed rows, head_dim 128, blocks of " << given.block_size
      << " tokens: relative mean squared error, and how many times 4^-bits it is\n";
  llama::text_table table(
      {"codec", "bits", "keys: bits", "error", "x bound", "values: bits", "error", "x bound"},
      llama::text_table::names_first);
  chart_panel panel{.title = "Normally distributed rows: keys of each codec",
                    .error_axis = "relative mean squared error",
                    .bits_axis = "bits per number of the keys, scales included (head_dim 128)",
                    .hollow_means = "",
                    .shannon_bound = true};
  for (const std::string& spec : given.codecs_but_klt()) {
    const gaussian_quality q = measure_gaussian(spec, {.block_size = given.block_size});
    const auto times = [](double x) { return llama::formatted(x < 100 ? "%.2f" : "%.0f", x); };
    table.add({spec, detail::bits_text(q.both().bits), detail::bits_text(q.keys.bits),
               detail::short_number(q.keys.error), times(q.keys.above_bound()),
               detail::bits_text(q.values.bits), detail::short_number(q.values.error),
               times(q.values.above_bound())});
    panel.add({label_of(spec), family_of(spec), q.keys.bits, q.keys.error});
  }
  out << table << '\n' << std::flush;
  return panel;
}

[[nodiscard]] inline chart_panel report_heads(std::ostream& out, const options& given) {
  const heads_settings settings{.head = {.num_tokens = given.head_tokens},
                                .num_heads = given.num_heads,
                                .block_size = given.block_size,
                                .first_seed = given.seed};
  const std::vector<std::string> specs = given.codecs_but_klt();
  const heads_result heads = measure_heads(specs, settings);
  out << "Synthetic heads with outlier channels: " << given.num_heads << " of " << given.head_tokens
      << " tokens, head_dim 128, blocks of " << given.block_size << "; entropy of the weights "
      << llama::formatted("%.1f", heads.shape.entropy) << " nats, largest "
      << llama::formatted("%.2f", heads.shape.largest_weight) << "\n";
  llama::text_table table({"codec", "keys: bits", "KL of weights", "output error", "values: output error"},
                          llama::text_table::names_first);
  chart_panel panel{.title = "Synthetic heads: only the keys are stored in the codec",
                    .error_axis = "KL divergence of attention weights, nats",
                    .bits_axis = "bits per number of the keys, scales included (head_dim 128)"};
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const std::string& spec = specs[i];
    const attention_quality& q = heads.codecs[i];
    const double bits = key_bits(spec, settings);
    table.add({spec, detail::bits_text(bits), detail::short_number(q.key_divergence),
               llama::formatted("%.4f", q.key_output), llama::formatted("%.4f", q.value_output)});
    panel.add({label_of(spec), family_of(spec), bits, q.key_divergence});
  }
  out << table << '\n' << std::flush;
  return panel;
}

namespace detail {

/// Rows of the model's table; remembers the medians of int8 without a tail and with one of bf16.
class model_table {
 public:
  /// \param tail  "0", "128", "128 f16", or "own" for a spec that says it itself
  void add(const std::string& spec, const std::string& tail, double bits, const model_quality& q) {
    double& of_int8 = int8_medians_[tail == "0" ? 0 : 1];
    if (spec == "int8" && (tail == "0" || tail == "128")) of_int8 = q.median;
    const std::string times = of_int8 > 0 ? llama::formatted("%.2f", q.median / of_int8) : "-";
    const std::string recalled =
        q.questions == 0 ? "-" : std::to_string(q.correct) + "/" + std::to_string(q.questions);
    table_.add({spec, tail, bits_text(bits), scientific(q.median), scientific(q.mean), scientific(q.extreme),
                times, llama::formatted("%.2f %%", 100 * q.same_first), recalled});
  }
  friend std::ostream& operator<<(std::ostream& out, const model_table& t) { return out << t.table_; }

 private:
  static std::string scientific(double x) { return llama::formatted("%.2e", x); }

  llama::text_table table_{
      {"codec", "tail", "bits", "median KL", "mean", "99.9 %", "x int8", "same first", "recalled"},
      llama::text_table::names_first};
  double int8_medians_[2] = {0, 0};
};

/// Whether a spec says itself which tokens stay exact.
[[nodiscard]] inline bool has_tail(std::string_view spec) {
  return spec.find("tail=") != std::string_view::npos || spec.find("sinks=") != std::string_view::npos;
}

}  // namespace detail

[[nodiscard]] inline chart_panel report_model(std::ostream& out, const options& given) {
  const model_reference model(given.model, {.num_tokens = given.num_tokens,
                                            .num_texts = given.num_texts,
                                            .num_documents = given.num_documents,
                                            .block_size = given.block_size});
  const llama::model_config& c = model.config();
  out << "A model of " << c.num_layers << " layers, " << c.num_kv_heads << " KV heads and head_dim "
      << c.head_dim
      << " that decodes token by token: KL divergence of its next-token distribution, in nats, at "
      << model.num_positions() << " positions\n"
      << "in the second half of texts of " << std::min(given.num_tokens, c.max_context)
      << " tokens, against an f32 cache; same likeliest token; facts recalled. Blocks of " << given.block_size
      << ". Tail 128: the last 128 tokens and the first 4 exact,\n"
      << "in bf16 or f16. x int8: times the median of int8, without a tail or with one in bf16.\n"
      << "Bigger models were not measured.\n";
  detail::model_table table;
  chart_panel panel{.title = "A small model, decoding token by token; tails in f16",
                    .error_axis = "median KL divergence of the next token, nats",
                    .bits_axis = "bits per number, keys and values, scales included (head_dim " +
                                 std::to_string(c.head_dim) + ")",
                    .hollow_means = "no exact tail"};
  for (const std::string& spec : given.codecs) {
    const double bits = model.bits(spec);
    const bool only_itself = detail::has_tail(spec);
    const model_quality plain = model.measure(spec);
    table.add(spec, only_itself ? "own" : "0", bits, plain);
    panel.add({only_itself ? label_of(spec) : "", family_of(spec), bits, plain.median, !only_itself});
    if (only_itself) continue;
    const std::string with_tail = spec + ",sinks=4,tail=128";
    table.add(spec, "128", bits, model.measure(with_tail));
    const model_quality in_f16 = model.measure(with_tail + ",exact=f16");
    table.add(spec, "128 f16", bits, in_f16);
    panel.add({label_of(spec), family_of(spec), bits, in_f16.median});
  }
  out << table << '\n' << std::flush;
  return panel;
}

}  // namespace quality
