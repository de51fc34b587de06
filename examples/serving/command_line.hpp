// SPDX-License-Identifier: MIT
// The arguments of `serve_many`, checked before a model is loaded.
#pragma once

#include "llama/command_line.hpp"
#include "serving/conversation.hpp"
#include "serving/server.hpp"

#include <kvcache/core/types.hpp>

#include <CLI/CLI.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace serving {

using llama::usage_error;

struct command_line {
  std::filesystem::path model = llama::default_model();
  workload_options workload;
  server_options server;
  std::string policy = "lru";
  std::string budget = "24MiB";
  index_t budget_bytes = 0;
  bool recode = false;          ///< re-encode what was not used for long as int8, before anything is dropped
  std::filesystem::path spill;  ///< folder for what is evicted; empty: it is dropped
  bool verify = false;          ///< run every conversation alone as well
  bool compare = true;          ///< serve once more without reuse
};

namespace detail {

inline void check(const command_line& given) {
  const auto within = [](const char* name, index_t value, index_t low, index_t high) {
    if (value < low || value > high)
      throw usage_error(std::string(name) + ": " + std::to_string(low) + " to " + std::to_string(high));
  };
  const workload_options& w = given.workload;
  within("--conversations", w.num_conversations, 1, 100'000);
  within("--turns", w.num_turns, 1, 1000);
  within("--system-prompts", w.num_system_prompts, 1, 100'000);
  within("--system-tokens", w.system_size, 0, 1'000'000);
  within("--user-tokens", w.user_size, 1, 1'000'000);
  within("--answer-tokens", w.answer_size, 1, 1'000'000);
  within("--batch", given.server.max_active, 1, 4096);
  within("--budget", given.budget_bytes, 1 << 16, index_t{1} << 50);
}

}  // namespace detail

/// \return nothing when the program is to end, with `exit_code`. Throws usage_error.
[[nodiscard]] inline std::optional<command_line> parse_command_line(int argc, char** argv, int& exit_code) {
  command_line given;
  workload_options& w = given.workload;
  std::uint64_t budget = 0;
  CLI::App app{"Serves many conversations at once under a budget that does not hold them all."};
  app.add_option("--model", given.model, "Hugging Face folder or llama2.c checkpoint file")
      ->capture_default_str();
  app.add_option("--conversations", w.num_conversations, "how many")->capture_default_str();
  app.add_option("--turns", w.num_turns, "of each conversation")->capture_default_str();
  app.add_option("--system-prompts", w.num_system_prompts, "that they share")->capture_default_str();
  app.add_option("--system-tokens", w.system_size, "of a system prompt")->capture_default_str();
  app.add_option("--user-tokens", w.user_size, "of what a user says in a turn")->capture_default_str();
  app.add_option("--answer-tokens", w.answer_size, "of an answer")->capture_default_str();
  app.add_option("--budget", budget, "bytes of keys, values and books, as 24MiB")
      ->transform(CLI::AsSizeValue(false))
      ->default_str(given.budget);
  app.add_option("--batch", given.server.max_active, "most sequences in a step")->capture_default_str();
  app.add_option("--policy", given.policy, "which block goes")
      ->check(CLI::IsMember({"lru", "arc", "s3_fifo", "priority"}))
      ->capture_default_str();
  app.add_flag("--recode", given.recode,
               "re-encode cold sequences as int8 before dropping any: texts may then differ");
  app.add_option(
      "--spill", given.spill,
      "put what is evicted into files in this folder, and bring it back; they go when the run ends");
  app.add_flag("--verify,!--no-verify", given.verify, "run every conversation alone as well, and compare");
  app.add_flag("--compare,!--no-compare", given.compare, "serve once more without reuse (default: yes)");
  app.add_option("--seed", w.seed, "of texts, answers and thinking times")
      ->check(llama::detail::unsigned_integer_error)
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  given.budget_bytes = budget == 0 && app.count("--budget") == 0
                           ? index_t{24} << 20
                           : static_cast<index_t>(std::min(budget, std::uint64_t{1} << 60));
  given.server.max_rows = std::max(given.server.max_rows, given.server.max_active);
  given.server.seed = w.seed;
  detail::check(given);
  return given;
}

}  // namespace serving
