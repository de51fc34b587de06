// SPDX-License-Identifier: MIT
// The arguments of `generate`, checked as far as they can be before a model is loaded.
#pragma once

#include "common/program.hpp"

#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_cache.hpp>

#include <CLI/CLI.hpp>

#include <charconv>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>

namespace llama {

using kvcache::index_t;

using program::usage_error;

struct command_line {
  std::filesystem::path model;
  std::filesystem::path tokenizer;  // empty: what goes with the model
  std::string prompt = "ROMEO:\n";
  index_t num_tokens = 400;
  std::string cache = "paged/bf16";
  double temperature = 0.8;
  double top_p = 0.95;
  std::uint64_t seed = 1;
  index_t num_threads = 1;
  bool compare = false;
  bool report = true;
};

/// The bundled model: where the build found it, or below the current folder.
[[nodiscard]] inline std::filesystem::path default_model() {
#ifdef KVCACHE_MODEL_DIR
  if (std::error_code error; std::filesystem::is_directory(KVCACHE_MODEL_DIR, error))
    return KVCACHE_MODEL_DIR;
#endif
  return "examples/models/tiny-shakespeare-recall";
}

namespace detail {

/// For CLI11: an empty string when `text` is an unsigned 64-bit integer, else what is wrong. (Its own
/// conversion wraps negative numbers and clamps large ones.)
inline std::string unsigned_integer_error(const std::string& text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size()
             ? ""
             : "'" + text + "' is not a number from 0 to 2^64 - 1";
}

/// Throws usage_error for values that parse and still make no sense.
inline void check(const command_line& options) {
  if (options.num_tokens < 1 || options.num_tokens > 1'000'000'000)
    throw usage_error("--tokens: 1 to 1000000000");
  if (options.num_threads < 1 || options.num_threads > 1024) throw usage_error("--threads: 1 to 1024");
  if (!std::isfinite(options.temperature) || options.temperature < 0) {
    throw usage_error("--temperature: a finite number, 0 (greedy) or more");
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) throw usage_error("--top-p: more than 0, at most 1");
  (void)kvcache::kernel::best();  // KVCACHE_ISA may name kernels that are not there
  try {
    (void)kvcache::make_cache(options.cache, {.num_layers = 1, .num_kv_heads = 1, .head_dim = 2});
  } catch (const std::invalid_argument& error) {
    throw usage_error("--cache: " + std::string(error.what()));
  }
}

}  // namespace detail

/// \return the options, or the exit code when there is nothing to run: 0 after --help, 2 after a bad argument
[[nodiscard]] inline std::optional<command_line> parse_command_line(int argc, char** argv, int& exit_code) {
  command_line options{.model = default_model()};
  std::string specs;
  for (const auto& spec : kvcache::cache_specs()) specs += (specs.empty() ? "" : " ") + std::string(spec);

  CLI::App app{
      "Writes text with a Llama-architecture model through a kvcache, then measures what the cache saves."};
  bool no_report = false;
  app.add_option("--model", options.model, "Hugging Face folder or llama2.c checkpoint file")
      ->capture_default_str();
  app.add_option("--tokenizer", options.tokenizer,
                 "llama2.c tokenizer file; found beside a checkpoint when not given");
  app.add_option("--prompt", options.prompt, "text to continue (default: \"ROMEO:\" and a new line)");
  app.add_option("--tokens", options.num_tokens, "how many tokens to write")->capture_default_str();
  app.add_option("--cache", options.cache, "container/codec: " + specs)->capture_default_str();
  app.add_option("--temperature", options.temperature, "0 is greedy")->capture_default_str();
  app.add_option("--top-p", options.top_p, "likeliest tokens to choose from, by probability")
      ->capture_default_str();
  app.add_option("--seed", options.seed, "of the random choices")
      ->check(detail::unsigned_integer_error)
      ->capture_default_str();
  app.add_option("--threads", options.num_threads, "workers of the thread pool")->capture_default_str();
  app.add_flag("--compare", options.compare, "one row per container and codec, along the greedy text");
  app.add_flag("--no-report", no_report, "only the text");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  options.report = !no_report;
  detail::check(options);
  return options;
}

}  // namespace llama
