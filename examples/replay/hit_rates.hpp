// SPDX-License-Identifier: MIT
// Hit rates of every policy at every capacity: measured, as a table, as a chart.
#pragma once

#include "llama/text_table.hpp"
#include "replay/optimum.hpp"
#include "replay/policies.hpp"
#include "replay/trace.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace replay {

/// So many blocks, or a part of the different blocks of a trace.
struct capacity {
  std::string text;  ///< "500" or "3%"
  double part = 0;   ///< of the different blocks; 0: `blocks` counts
  index_t blocks = 0;

  [[nodiscard]] index_t of(const trace_summary& sum) const {
    return part > 0 ? static_cast<index_t>(part * static_cast<double>(sum.num_different)) : blocks;
  }
};

/// Hits in parts of the blocks that were asked for.
struct hit_rates {
  std::string name;
  std::vector<double> rates;  ///< [capacities]
};

struct results {
  std::string trace_name;
  index_t num_requests = 0;
  trace_summary sum;
  std::vector<std::string> titles;  ///< of the capacities
  std::vector<index_t> blocks;      ///< [capacities]
  std::vector<hit_rates> rows;      ///< the policies, then the optimum
};

[[nodiscard]] inline results measure(const trace& t, const std::vector<capacity>& capacities, style how) {
  results r{.trace_name = t.name,
            .num_requests = static_cast<index_t>(t.requests.size()),
            .sum = summarize(t),
            .titles = {},
            .blocks = {},
            .rows = {}};
  for (const capacity& c : capacities) {
    r.titles.push_back(c.text);
    r.blocks.push_back(c.of(r.sum));
  }
  const auto add_row = [&](std::string name, auto hits) {
    r.rows.push_back({std::move(name), {}});
    for (const index_t blocks : r.blocks)
      r.rows.back().rates.push_back(static_cast<double>(hits(blocks)) /
                                    static_cast<double>(r.sum.num_blocks));
  };
  for (const named_policy& policy : policies())
    add_row(std::string(policy.name), [&](index_t blocks) { return policy.hits(t, blocks, how); });
  const optimum best(t);
  add_row("optimum", [&](index_t blocks) { return best.hits(blocks); });
  return r;
}

[[nodiscard]] inline std::string percent(double part) { return llama::formatted("%.1f", 100 * part); }

inline std::ostream& operator<<(std::ostream& out, const results& r) {
  using llama::with_commas;
  const double infinite = static_cast<double>(r.sum.most_hits) / static_cast<double>(r.sum.num_blocks);
  out << r.trace_name << ": " << with_commas(r.num_requests) << " requests, " << with_commas(r.sum.num_blocks)
      << " blocks, " << with_commas(r.sum.num_different) << " of them different; " << percent(infinite)
      << " % hits without a limit\n\n";
  std::vector<std::string> titles{"hits in %, capacity"};
  titles.insert(titles.end(), r.titles.begin(), r.titles.end());
  llama::text_table table(std::move(titles), llama::text_table::names_first);
  for (const hit_rates& row : r.rows) {
    std::vector<std::string> cells{row.name};
    for (const double rate : row.rates) cells.push_back(percent(rate));
    table.add(std::move(cells));
  }
  return out << table;
}

}  // namespace replay
