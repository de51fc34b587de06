// SPDX-License-Identifier: MIT
// Which codec, block size and budget fit a machine? Prints the choices as a table, with what they cost in quality and how
// long the sequences may become.
//
//   plan config.json --preset 16GB --sequences 8 --context 32768
//   plan --layers 32 --q-heads 32 --kv-heads 8 --head-dim 128 --weights 4.6GB --memory 16GB --sequences 8 --context 32768
#include "common/program.hpp"
#include "llama/model_error.hpp"
#include "plan/command_line.hpp"
#include "plan/report.hpp"

#include <kvcache/serving/planner.hpp>

#include <iostream>
#include <stdexcept>

namespace {

int run(int argc, char** argv) {
  int exit_code = 0;
  const auto asked = planning::parse_command_line(argc, argv, exit_code);
  if (!asked) return exit_code;
  planning::write_report(std::cout, *asked,
                         kvcache::serving::plan(asked->shape, asked->memory_bytes, asked->num_sequences,
                                                asked->context, asked->options));
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return program::exit_code_of("plan", [&] {
    try {
      return run(argc, argv);
    } catch (const llama::model_error& error) {
      throw planning::usage_error(error.what());
    } catch (const kvcache::shape_error& error) {  // numbers that no cache can have
      throw planning::usage_error(error.what());
    }
  });
}
