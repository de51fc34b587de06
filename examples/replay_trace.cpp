// SPDX-License-Identifier: MIT
// Which blocks should a full prefix cache drop? Replays requests and shows, for every eviction policy of the library,
// how many blocks would have been hit by capacity, beside the best that could have been done.
//
//   replay_trace
//   replay_trace conversation_trace.jsonl --capacity 1%,3%,10%,30% --svg conversation.svg
//   replay_trace --workload multi-turn --requests 20000 --seed 7 --capacity 500,5000
#include "common/program.hpp"
#include "llama/model_error.hpp"
#include "replay/command_line.hpp"
#include "replay/hit_rates.hpp"
#include "replay/svg_chart.hpp"
#include "replay/trace.hpp"
#include "replay/trace_file.hpp"
#include "replay/workloads.hpp"

#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void write_chart(const std::filesystem::path& file, const std::vector<replay::results>& all) {
  std::ofstream out(file, std::ios::binary);
  replay::write_svg(out, all);
  if (!out.flush()) throw std::runtime_error(file.string() + ": cannot be written");
  std::cout << "\nchart: " << file.filename().string() << '\n';
}

void run(const replay::command_line& options) {
  std::vector<replay::results> all;
  const auto show = [&](const replay::trace& t) {
    all.push_back(replay::measure(t, options.capacities, options.how));
    std::cout << (all.size() > 1 ? "\n" : "") << all.back() << std::flush;
  };
  for (const auto& file : options.traces) show(replay::read_trace(file));
  for (const std::string& name : options.workloads) {
    const auto make = name == "multi-turn" ? replay::multi_turn : replay::shared_documents;
    show(make(options.num_requests, options.seed));
  }
  if (!options.chart.empty()) write_chart(options.chart, all);
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
  return program::run("replay_trace", argc, argv, replay::parse_command_line, run);
}
