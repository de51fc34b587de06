// SPDX-License-Identifier: MIT
// Measures what codecs cost in quality, and draws it against their bits.
//
//   compare_codecs --svg codecs.svg
//   compare_codecs --codecs "int8;rotated4;k=channel4,v=rotated4" --part heads
//   compare_codecs --part model --model stories260K.bin --tokens 256
#include "common/program.hpp"
#include "llama/command_line.hpp"
#include "quality/chart.hpp"
#include "quality/options.hpp"
#include "quality/report.hpp"

#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <vector>

namespace {

[[noreturn]] void refuse(const std::filesystem::path& file) {
  throw std::runtime_error(file.string() + ": cannot be written");
}

void write_chart(const std::filesystem::path& file, const std::vector<quality::chart_panel>& panels) {
  std::ofstream out(file);
  quality::chart_writer(out).write(panels);
  if (!out.flush()) refuse(file);
}

void run(const quality::options& given) {
  // Asked before anything that takes long.
  if (!given.svg.empty() && !std::ofstream(given.svg, std::ios::app)) refuse(given.svg);
  std::vector<quality::chart_panel> panels;
  if (given.wants("gaussian")) panels.push_back(quality::report_gaussian(std::cout, given));
  if (given.wants("heads")) panels.push_back(quality::report_heads(std::cout, given));
  if (given.wants("model")) panels.push_back(quality::report_model(std::cout, given));
  if (!given.svg.empty()) write_chart(given.svg, panels);
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
  return program::run("compare_codecs", argc, argv, quality::parse_options, run);
}
