// SPDX-License-Identifier: MIT
// Text as it comes on standard output, progress on standard error.
#pragma once

#include "llama/generation.hpp"
#include "llama/tokenizer.hpp"

#include <cstdio>
#include <iostream>
#include <string>
#include <string_view>

#ifdef _WIN32
#include <io.h>
#else
#include <unistd.h>
#endif

namespace llama {

[[nodiscard]] inline bool stderr_is_terminal() {
#ifdef _WIN32
  return _isatty(_fileno(stderr)) != 0;
#else
  return isatty(STDERR_FILENO) != 0;
#endif
}

/// Control characters other than tab and new line could drive a terminal, so they are left out.
[[nodiscard]] inline std::string shown(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n' || c == '\t' || (byte >= 0x20 && byte != 0x7f)) out += c;
  }
  return out;
}

/// Prints every token when it is chosen; says how far a long prompt is.
[[nodiscard]] inline generation_events console_events(const tokenizer& text) {
  constexpr index_t long_prompt = 256;  // tokens
  generation_events events;
  events.chosen = [&text](index_t previous, index_t id) {
    std::cout << shown(text.decode(previous, id)) << std::flush;
  };
  events.prefilled = [terminal = stderr_is_terminal()](index_t done, index_t total) {
    if (total < long_prompt) return;
    std::cerr << (terminal ? "\r" : "") << "prefill " << done << " of " << total << " tokens"
              << (!terminal || done == total ? "\n" : "") << std::flush;
  };
  return events;
}

}  // namespace llama
