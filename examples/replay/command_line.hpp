// SPDX-License-Identifier: MIT
// The arguments of `replay_trace`.
#pragma once

#include "common/program.hpp"
#include "replay/hit_rates.hpp"
#include "replay/policies.hpp"

#include <kvcache/core/types.hpp>

#include <CLI/CLI.hpp>

#include <charconv>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace replay {

using program::usage_error;

struct command_line {
  std::vector<std::filesystem::path> traces;
  std::vector<std::string> workloads;  // both, where nothing else is asked for
  index_t num_requests = 5000;
  std::uint64_t seed = 1;
  std::vector<capacity> capacities;
  std::filesystem::path chart = "hit_rates.svg";  // empty: none
  style how = style::server;
};

namespace detail {

/// The whole of `text` as a number, or nothing.
template <class Number>
std::optional<Number> number_in(std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

inline std::string unsigned_number_error(const std::string& text) {
  return number_in<std::uint64_t>(text) ? "" : "'" + text + "' is not a number from 0 to 2^64 - 1";
}

}  // namespace detail

/// "3%" or "500". Throws usage_error.
[[nodiscard]] inline capacity parse_capacity(const std::string& text) {
  std::string_view digits = text;
  if (digits.ends_with('%')) {
    digits.remove_suffix(1);
    const auto value = detail::number_in<double>(digits);
    if (value && *value > 0 && *value <= 100) return {.text = text, .part = *value / 100};
  } else {
    const auto value = detail::number_in<index_t>(digits);
    if (value && *value > 0 && *value <= index_t{1} << 30) return {.text = text, .blocks = *value};
  }
  throw usage_error("--capacity: '" + text + "' is neither a number of blocks nor a percentage such as 3%");
}

/// \return the options, or the exit code when there is nothing to run: 0 after --help, 2 after a bad argument
[[nodiscard]] inline std::optional<command_line> parse_command_line(int argc, char** argv, int& exit_code) {
  command_line options;
  std::vector<std::string> capacities{"1%", "2%", "3%", "5%", "10%", "20%", "30%", "50%"};
  bool tail_first = false;
  bool no_chart = false;
  CLI::App app{
      "Replays requests against a prefix cache: hit rate by capacity for every eviction policy of the "
      "library, "
      "beside the best that could have been done."};
  app.add_option("traces", options.traces, "files in the Mooncake format; without one, built-in workloads");
  app.add_option("--workload", options.workloads, "built in: multi-turn, shared-documents")
      ->check(CLI::IsMember({"multi-turn", "shared-documents"}));
  app.add_option("--requests", options.num_requests, "of a built-in workload")->capture_default_str();
  app.add_option("--seed", options.seed, "of a built-in workload")
      ->check(detail::unsigned_number_error)
      ->capture_default_str();
  app.add_option("--capacity", capacities, "blocks, or percent of the different blocks")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--svg", options.chart, "the chart")->capture_default_str();
  app.add_flag("--no-chart", no_chart, "only the table");
  app.add_flag(
      "--tail-first", tail_first,
      "as simulators do: blocks are used from the tail after each request, without parents and pins");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  if (options.num_requests < 1 || options.num_requests > 10'000'000)
    throw usage_error("--requests: 1 to 10000000");
  for (const std::string& text : capacities) options.capacities.push_back(parse_capacity(text));
  if (no_chart) options.chart.clear();
  if (tail_first) options.how = style::tail_first;
  if (options.traces.empty() && options.workloads.empty())
    options.workloads = {"multi-turn", "shared-documents"};
  return options;
}

}  // namespace replay
