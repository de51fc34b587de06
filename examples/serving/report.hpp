// SPDX-License-Identifier: MIT
// One line that changes while conversations are served, and the table at the end.
#pragma once

#include "llama/console.hpp"
#include "llama/text_table.hpp"
#include "serving/server.hpp"
#include "serving/spill_folder.hpp"

#include <kvcache/serving/metrics.hpp>
#include <kvcache/serving/observer.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace serving {

/// Nothing unless standard error is a terminal.
class live_line {
 public:
  explicit live_line(const char* title) : title_(title), shown_(llama::stderr_is_terminal()) {}
  live_line(const live_line&) = delete;
  live_line& operator=(const live_line&) = delete;
  ~live_line() {
    if (shown_) std::fputs("\r\033[K", stderr);
  }

  void operator()(const serving_figures& f) {
    constexpr double every = 0.1;  // seconds
    if (!shown_ || f.seconds < next_) return;
    next_ = f.seconds + every;
    std::fprintf(stderr,
                 "\r\033[K%s: %td finished, %td in the batch, %td waiting | %.1f of %.1f MiB | %.0f tokens/s "
                 "| %.0f %% reused",
                 title_, f.finished, f.active, f.waiting, mib(f.held), mib(f.budget),
                 static_cast<double>(f.written) / std::max(f.seconds, 1e-9), 100 * f.hit_rate());
    std::fflush(stderr);
  }

  static double mib(index_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

 private:
  const char* title_;
  bool shown_;
  double next_ = 0;
};

/// One way of serving: what the server and what the manager has seen.
struct served {
  std::string name;
  serving_figures figures;
  kvcache::serving::metrics metrics;
  std::optional<spill_figures> spilled{};  ///< nothing without a tier
};

/// The value that `part` of `values` do not exceed. \pre values is not empty
[[nodiscard]] inline double quantile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  const auto last = static_cast<double>(values.size() - 1);
  return values[static_cast<std::size_t>(std::lround(part * last))];
}

/// A column for each way of serving.
inline void write_table(std::ostream& out, const std::vector<served>& ways) {
  using kvcache::serving::rung;
  std::vector<std::string> titles{""};
  for (const served& way : ways) titles.push_back(way.name);
  llama::text_table table(std::move(titles), llama::text_table::names_first);
  const auto row = [&](const char* name, auto value) {
    std::vector<std::string> cells{name};
    for (const served& way : ways) cells.push_back(value(way));
    table.add(std::move(cells));
  };
  const auto milliseconds = [](double seconds) { return llama::formatted("%.1f", 1e3 * seconds); };
  const auto count = [](std::uint64_t n) { return llama::with_commas(static_cast<index_t>(n)); };
  row("tokens written / CPU s", [](const served& w) {
    return llama::rate_text(static_cast<double>(w.figures.written) / std::max(w.figures.seconds, 1e-9));
  });
  row("tokens computed", [](const served& w) { return llama::with_commas(w.figures.rows); });
  row("first token, ms, median",
      [&](const served& w) { return milliseconds(quantile(w.figures.first_token, 0.5)); });
  row("first token, ms, 95 %",
      [&](const served& w) { return milliseconds(quantile(w.figures.first_token, 0.95)); });
  row("  with waiting, ms, median",
      [&](const served& w) { return milliseconds(quantile(w.figures.first_token_waited, 0.5)); });
  row("hit rate, % of prompt tokens",
      [](const served& w) { return llama::formatted("%.1f", 100 * w.figures.hit_rate()); });
  row("evictions", [&](const served& w) {
    return count(w.metrics.at(rung::drop).count + w.metrics.at(rung::recode).count +
                 w.metrics.at(rung::spill).count);
  });
  row("  re-encoded", [&](const served& w) { return count(w.metrics.recodes); });
  row("  re-encoded, bytes before", [&](const served& w) { return count(w.metrics.recoded_bytes_before); });
  row("  re-encoded, bytes after", [&](const served& w) { return count(w.metrics.recoded_bytes_after); });
  if (std::any_of(ways.begin(), ways.end(), [](const served& w) { return w.spilled.has_value(); })) {
    const auto through = [&](const char* name, index_t spill_figures::*what) {
      row(name, [&](const served& w) { return w.spilled ? llama::with_commas((*w.spilled).*what) : "-"; });
    };
    through("  spilled, blocks", &spill_figures::blocks_out);
    through("  spilled, bytes", &spill_figures::bytes_out);
    through("brought back, blocks", &spill_figures::blocks_back);
    through("brought back, bytes", &spill_figures::bytes_back);
  }
  row("refused", [&](const served& w) { return count(w.metrics.at(rung::refuse).count); });
  row("budget, bytes", [](const served& w) { return llama::with_commas(w.figures.budget); });
  row("peak, counted, bytes", [](const served& w) { return llama::with_commas(w.figures.peak_counted); });
  row("peak, of the process, bytes", [](const served& w) {
    return w.figures.peak_process ? llama::with_commas(*w.figures.peak_process) : std::string("not known");
  });
  row("  part of the budget, %", [](const served& w) {
    return w.figures.peak_process
               ? llama::formatted("%.1f", 100.0 * static_cast<double>(*w.figures.peak_process) /
                                              static_cast<double>(w.figures.budget))
               : std::string("-");
  });
  if (std::any_of(ways.begin(), ways.end(), [](const served& w) { return w.figures.peak_files.has_value(); }))
    row("peak, of mapped files, bytes", [](const served& w) {
      return w.figures.peak_files ? llama::with_commas(*w.figures.peak_files) : std::string("-");
    });
  out << table;
}

}  // namespace serving
