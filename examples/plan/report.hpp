// SPDX-License-Identifier: MIT
// A plan as people read it: where the memory goes, a table of the choices, and what to do.
#pragma once

#include "llama/text_table.hpp"
#include "plan/command_line.hpp"

#include <kvcache/core/types.hpp>
#include <kvcache/serving/planner.hpp>

#include <optional>
#include <ostream>
#include <string>

namespace planning {

using kvcache::serving::cache_plan;
using kvcache::serving::plan_row;

/// 1,610,612,736 as "1.50 GiB".
[[nodiscard]] inline std::string bytes_text(index_t bytes) {
  const auto number = static_cast<double>(bytes);
  if (bytes >= index_t{1} << 30) return llama::formatted("%.2f GiB", number / 0x1p30);
  if (bytes >= index_t{1} << 20) return llama::formatted("%.1f MiB", number / 0x1p20);
  return llama::with_commas(bytes) + " bytes";
}

namespace detail {

inline std::string counted(index_t number, const std::string& what) {
  return llama::with_commas(number) + " " + what + (number == 1 ? "" : "s");
}

inline const char* source_text(weight_source source) {
  switch (source) {
    case weight_source::given:
      return "";
    case weight_source::files:
      return " (of the files)";
    case weight_source::estimate:
      return " (estimated from the sizes)";
    case weight_source::unknown:
      return " (not known, taken as none; say --weights)";
  }
  return "";
}

inline void write_question(std::ostream& out, const command_line& asked, const cache_plan& made) {
  const model_shape& m = asked.shape;
  out << "model: " << counted(m.num_layers, "layer") << ", " << counted(m.num_q_heads, "query head") << ", "
      << counted(m.num_kv_heads, "KV head") << " of " << m.head_dim;
  if (m.max_context > 0) out << ", made for " << llama::with_commas(m.max_context) << " tokens";
  out << "\nmemory: " << bytes_text(asked.memory_bytes) << " - weights " << bytes_text(m.weight_bytes)
      << source_text(asked.weights) << " - reserve " << bytes_text(asked.options.reserve_bytes) << " = "
      << bytes_text(made.cache_bytes)
      << " for the cache\nasked for: " << counted(asked.num_sequences, "sequence") << " of "
      << counted(asked.context, "token") << "\n\n";
}

inline std::string context_text(const plan_row& row) {
  return llama::with_commas(row.max_context) + (row.memory_context > row.max_context ? "+" : " ");
}

inline std::string recalled_text(const plan_row& row) {
  return row.quality == nullptr ? "-" : std::to_string(row.quality->recalled) + "/320";
}

inline void write_table(std::ostream& out, const command_line& asked, const cache_plan& made) {
  llama::text_table table({"codec", "bits", "block", "bytes/token", "needed", "max context ", "fits", "loss",
                           "recalled", "decode", "encode us"},
                          llama::text_table::names_first);
  const index_t group_size = asked.shape.num_q_heads / asked.shape.num_kv_heads;
  for (const plan_row& row : made.rows) {
    const auto* q = row.quality;
    const auto* s = row.speed;
    table.add({row.codec.spec(), llama::formatted("%.2f", row.bits_per_number),
               std::to_string(row.shape.block_size), llama::with_commas(row.bytes_per_token),
               bytes_text(row.needed_bytes), context_text(row), row.fits ? "yes" : "no",
               q == nullptr ? "-" : llama::formatted(q->kl_ratio() < 100 ? "%.2f" : "%.0f", q->kl_ratio()),
               recalled_text(row), s == nullptr ? "-" : llama::formatted("%.1f x", s->decode_at(group_size)),
               s == nullptr || !s->encode_us ? "-" : llama::formatted("%.1f", *s->encode_us)});
  }
  out << table;
}

inline void write_legend(std::ostream& out) {
  out << "\nneeded: pages and exact tails of all sequences. max context: of every sequence at once; + where\n"
         "only the model sets the limit. loss: KL divergence in times that of int8 behind a bf16 tail; "
         "bf16 is 0.98.\n"
         "recalled: facts of 320. decode: times as fast as bf16. encode: one token of 8 heads of 128. -: "
         "not\n"
         "measured. trellis encodes ten times slower than rotated; it is recommended with --slow-encoding "
         "only.\n"
         "Loss is that of a model of 2.4 million parameters. Bigger ones were not measured: "
         "docs/planning.md.\n";
}

inline void write_answer(std::ostream& out, const cache_plan& made) {
  if (made.recommended) {
    const plan_row& row = made.rows[*made.recommended];
    out << "\nrecommended: " << row.spec << " with block_size " << row.shape.block_size
        << " and budget_bytes " << llama::with_commas(row.budget_bytes) << '\n';
    if (row.tail_bytes > 0)
      out << "beside that budget: exact tails of " << bytes_text(row.tail_bytes) << " a sequence\n";
    if (row.codec.keys.starts_with("centred_")) out << "give make_cache the model's rope_config, too\n";
    return;
  }
  const plan_row* longest = nullptr;
  for (const plan_row& row : made.rows) {
    if (row.is_good_enough && (longest == nullptr || row.memory_context > longest->memory_context))
      longest = &row;
  }
  out << "\nrecommended: nothing. ";
  if (longest == nullptr) {
    out << "No codec loses little enough (--worst, --slow-encoding).\n";
  } else if (longest->max_context == 0) {
    out << "Not one token of so many sequences fits.\n";
  } else {
    out << "Of what loses little enough, " << longest->spec
        << " holds most: " << llama::with_commas(longest->max_context) << " tokens of every sequence.\n";
  }
}

}  // namespace detail

/// \pre `made` is the plan for what was asked
inline void write_report(std::ostream& out, const command_line& asked, const cache_plan& made) {
  detail::write_question(out, asked, made);
  detail::write_table(out, asked, made);
  detail::write_legend(out);
  detail::write_answer(out, made);
}

}  // namespace planning
