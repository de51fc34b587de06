// SPDX-License-Identifier: MIT
// The arguments of `compare_codecs`, checked as far as they can be before anything is measured.
#pragma once

#include "llama/command_line.hpp"
#include "quality/model.hpp"

#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/kernel/select.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace quality {

using kvcache::index_t;

struct options {
  std::vector<std::string> codecs;
  std::vector<std::string> parts;  ///< empty: all
  std::filesystem::path model;
  std::filesystem::path svg;
  index_t num_tokens = 1024;
  index_t num_texts = 8;
  index_t num_documents = 64;
  index_t num_heads = 40;
  index_t head_tokens = 4096;
  index_t block_size = 128;
  std::uint64_t seed = 1;

  /// Those that need no model to be calibrated on.
  [[nodiscard]] std::vector<std::string> codecs_but_klt() const {
    std::vector<std::string> specs = codecs;
    std::erase_if(specs, [](const std::string& spec) { return is_klt_spec(spec); });
    return specs;
  }
  [[nodiscard]] bool wants(const std::string& part) const {
    return parts.empty() || std::find(parts.begin(), parts.end(), part) != parts.end();
  }
};

/// Every codec there is but f32, which all are compared with, and some pairs.
[[nodiscard]] inline std::vector<std::string> default_codecs() {
  std::vector<std::string> specs = kvcache::codec_names();
  specs.erase(std::remove(specs.begin(), specs.end(), "f32"), specs.end());
  for (const char* pair :
       {"k=channel4,v=rotated4", "k=channel3,v=rotated3", "k=balanced2,v=rotated2", "k=int8,v=rotated4"})
    specs.emplace_back(pair);
  return specs;
}

/// "int8;k=channel4,v=rotated4" as two specs; spaces separate as well.
[[nodiscard]] inline std::vector<std::string> split_specs(const std::string& list) {
  std::vector<std::string> specs;
  for (std::size_t at = 0; at <= list.size();) {
    const std::size_t end = std::min(list.find_first_of("; ", at), list.size());
    specs.push_back(list.substr(at, end - at));
    at = end + 1;
  }
  return specs;
}

namespace detail {

inline void check_range(const char* name, index_t value, index_t low, index_t high) {
  if (value < low || value > high)
    throw llama::usage_error(std::string(name) + ": " + std::to_string(low) + " to " + std::to_string(high));
}

/// Throws llama::usage_error for values that parse and still make no sense.
inline void check(const options& given) {
  for (const std::string& spec : given.codecs) {
    try {
      if (is_klt_spec(spec)) {
        (void)klt_bits_in(spec);
        (void)klt_tail_in(spec);
        continue;
      }
      (void)kvcache::make_codec(spec);
    } catch (const std::invalid_argument& error) {
      throw llama::usage_error("--codecs: " + std::string(error.what()));
    }
  }
  if (!kvcache::is_block_size(given.block_size))
    throw llama::usage_error("--block-size: 16, 32, 64, 128 or 256");
  check_range("--tokens", given.num_tokens, 2, 1 << 20);
  check_range("--texts", given.num_texts, 1, 1 << 20);
  check_range("--documents", given.num_documents, 0, 1 << 20);
  check_range("--heads", given.num_heads, 1, 1 << 20);
  check_range("--head-tokens", given.head_tokens, given.block_size, 1 << 20);
  if (given.head_tokens % given.block_size != 0)
    throw llama::usage_error("--head-tokens: a multiple of --block-size");
  (void)kvcache::kernel::best();  // KVCACHE_ISA may name kernels that are not there
}

}  // namespace detail

/// \return the options, or the exit code when there is nothing to run: 0 after --help, 2 after a bad argument
[[nodiscard]] inline std::optional<options> parse_options(int argc, char** argv, int& exit_code) {
  options given{.model = llama::default_model()};
  std::string codecs;
  std::string part = "all";
  CLI::App app{
      "Measures what codecs cost in quality: errors of normally distributed rows, attention over synthetic "
      "heads, and a model that decodes through them."};
  app.add_option(
      "--codecs", codecs,
      "specs of codecs, with ; or spaces between them; klt3.4[,tail=128,sinks=4] is klt of 3.4 bits, for "
      "the model only (default: all that have names, and some pairs)");
  app.add_option("--part", part, "gaussian, heads, model or all")
      ->check(CLI::IsMember({"gaussian", "heads", "model", "all"}))
      ->capture_default_str();
  app.add_option("--model", given.model, "Hugging Face folder or llama2.c checkpoint file")
      ->capture_default_str();
  app.add_option("--tokens", given.num_tokens, "length of each text, at most the model's context")
      ->capture_default_str();
  app.add_option("--texts", given.num_texts, "how many texts")->capture_default_str();
  app.add_option("--documents", given.num_documents, "most documents whose facts are to be recalled")
      ->capture_default_str();
  app.add_option("--heads", given.num_heads, "how many synthetic heads")->capture_default_str();
  app.add_option("--head-tokens", given.head_tokens, "tokens of each synthetic head")->capture_default_str();
  app.add_option("--seed", given.seed, "of the first synthetic head")
      ->check(llama::detail::unsigned_integer_error)
      ->capture_default_str();
  app.add_option("--block-size", given.block_size, "tokens of a block")->capture_default_str();
  app.add_option("--svg", given.svg, "file for a chart of errors against bits");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  if (part != "all") given.parts = {part};
  given.codecs = app.count("--codecs") == 0 ? default_codecs() : split_specs(codecs);
  detail::check(given);
  return given;
}

}  // namespace quality
