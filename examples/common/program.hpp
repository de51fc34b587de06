// SPDX-License-Identifier: MIT
// How the programs end: 0, 1 for what went wrong, 2 for a request that cannot be met; with one line on standard error.
#pragma once

#include <exception>
#include <iostream>
#include <stdexcept>

namespace program {

/// A request that cannot be met as it was put. Exit code 2, like an unknown argument.
struct usage_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What main returns: what `body` does, or the code of what it throws, which is printed behind the program's name.
template <class Body>
int exit_code_of(const char* name, Body body) {
  try {
    return body();
  } catch (const usage_error& error) {
    std::cerr << name << ": " << error.what() << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << '\n';
    return 1;
  }
}

/// The usual main: `parse(argc, argv, exit_code)` gives the options, or none where the program is to end with exit_code;
/// `run(options)` does the work.
template <class Parse, class Run>
int run(const char* name, int argc, char** argv, Parse parse, Run run) {
  return exit_code_of(name, [&] {
    int exit_code = 0;
    if (const auto options = parse(argc, argv, exit_code)) run(*options);
    return exit_code;
  });
}

}  // namespace program
