// SPDX-License-Identifier: MIT
// Writes text far past the model's context and the cache's budget, at constant memory and speed: whenever the cache is full, a
// policy says which tokens go.
//
//   stream_forever --policy sinks --tokens 20000
//   stream_forever --policy h2o --budget 512 --unit 1 --cache paged/int8
#include "common/program.hpp"
#include "llama/command_line.hpp"
#include "llama/console.hpp"
#include "llama/generation.hpp"
#include "llama/load_model.hpp"
#include "llama/sampler.hpp"
#include "llama/text_table.hpp"
#include "llama/tokenizer.hpp"
#include "streaming/token_stream.hpp"

#include <kvcache/interop/any_cache.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using llama::index_t;

struct options {
  std::filesystem::path model = llama::default_model();
  std::string policy = "sinks";
  std::string cache = "paged/bf16";
  std::string prompt = "ROMEO:\n";
  index_t num_tokens = 20000;
  index_t budget = 256;
  index_t unit = 16;
  index_t block_size = 16;
  double temperature = 0.8;
  std::uint64_t seed = 1;
  bool gaps = false;
  bool quiet = false;
};

/// One quarter of what was written.
struct quarter {
  index_t tokens = 0;  // written so far
  double seconds = 0;  // of the processor
  index_t cached = 0;  // tokens, at the end of the quarter
  index_t most = 0;    // at any time in it
  index_t bytes = 0;   // most at any time
  index_t segments = 0;
  index_t evictions = 0;  // so far
};

void check(const options& given) {
  if (!streaming::policy_named(given.policy))
    throw llama::usage_error("--policy: there is no policy '" + given.policy + "'; there is " +
                             streaming::policy_names());
  if (given.num_tokens < 4) throw llama::usage_error("--tokens: at least 4");
  if (!kvcache::is_block_size(given.block_size))
    throw llama::usage_error("--block-size: 16, 32, 64, 128 or 256");
  if (given.unit != 1 && given.unit != given.block_size)
    throw llama::usage_error("--unit: 1 or the block size, " + std::to_string(given.block_size));
  if (given.budget < 4 * given.block_size)
    throw llama::usage_error("--budget: at least four blocks, " + std::to_string(4 * given.block_size) +
                             " tokens");
  if (!(given.temperature >= 0) || given.temperature > 100)
    throw llama::usage_error("--temperature: 0 to 100");
  if (given.prompt.empty()) throw llama::usage_error("--prompt: at least one token");
  try {
    (void)kvcache::make_cache(given.cache, {.num_layers = 1, .num_kv_heads = 1, .head_dim = 2});
  } catch (const std::invalid_argument& error) {
    throw llama::usage_error("--cache: " + std::string(error.what()));
  }
}

std::optional<options> parse(int argc, char** argv, int& exit_code) {
  options given;
  CLI::App app{"Writes text past any budget: a policy evicts tokens from the cache."};
  app.add_option("--model", given.model, "Hugging Face folder or llama2.c checkpoint file")
      ->capture_default_str();
  app.add_option("--policy", given.policy, streaming::policy_names())->capture_default_str();
  app.add_option("--cache", given.cache, "container/codec, see kvcache::make_cache")->capture_default_str();
  app.add_option("--prompt", given.prompt, "text to continue");
  app.add_option("--tokens", given.num_tokens, "how many tokens to write")->capture_default_str();
  app.add_option("--budget", given.budget, "most tokens in the cache")->capture_default_str();
  app.add_option("--unit", given.unit, "tokens that go together: 1 or the block size")->capture_default_str();
  app.add_option("--block-size", given.block_size, "tokens")->capture_default_str();
  app.add_option("--temperature", given.temperature, "0 is greedy")->capture_default_str();
  app.add_option("--seed", given.seed, "of the random choices")
      ->check(llama::detail::unsigned_integer_error)
      ->capture_default_str();
  app.add_flag("--gaps", given.gaps, "tokens keep their positions; they close up unless given");
  app.add_flag("--quiet", given.quiet, "only the table");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  check(given);
  return given;
}

void write_table(const std::array<quarter, 4>& quarters, const options& given) {
  std::cout << (given.quiet ? "policy " : "\n\npolicy ") << given.policy << ", " << given.cache
            << ", at most " << given.budget << " tokens cached\n\n";
  llama::text_table table(
      {"tokens", "cached", "most cached", "most bytes", "segments", "evictions", "tokens/CPU s"});
  index_t before = 0;
  for (const quarter& q : quarters) {
    table.add({llama::with_commas(q.tokens), llama::with_commas(q.cached), llama::with_commas(q.most),
               llama::with_commas(q.bytes), llama::with_commas(q.segments), llama::with_commas(q.evictions),
               llama::rate_text(static_cast<double>(q.tokens - before) / std::max(q.seconds, 1e-9))});
    before = q.tokens;
  }
  std::cout << table;
}

void run(const options& given) {
  const llama::decoder model(llama::load_model(given.model));
  const auto text = llama::load_tokenizer(given.model, {}, model.config().vocab_size);
  const std::vector<index_t> prompt = text.encode(given.prompt);
  if (static_cast<index_t>(prompt.size()) > given.budget)
    throw llama::usage_error("--prompt: longer than the budget");
  streaming::token_stream stream(
      model,
      kvcache::make_cache(given.cache, llama::cache_shape_of(model.config(), given.block_size),
                          model.config().rope),
      *streaming::policy_named(given.policy),
      {.max_tokens = given.budget,
       .kept_tokens = given.budget - given.budget / 4,
       .unit = given.unit,
       .positions = given.gaps ? kvcache::keep_positions::original : kvcache::keep_positions::consecutive});

  llama::sampler choose({.temperature = given.temperature, .top_p = 0.95, .seed = given.seed});
  llama::matrix logits;
  for (const index_t token : prompt) logits = stream.next(token);
  std::array<quarter, 4> quarters;
  index_t previous = prompt.back();
  if (!given.quiet) std::cout << llama::shown(given.prompt);
  for (std::size_t part = 0; part < 4; ++part) {
    quarter& q = quarters[part];
    const index_t first = given.num_tokens * static_cast<index_t>(part) / 4;
    q.tokens = given.num_tokens * static_cast<index_t>(part + 1) / 4;
    const std::clock_t start = std::clock();
    for (index_t i = first; i < q.tokens; ++i) {
      const index_t token = choose.next(llama::row_of(logits, 0));
      if (!given.quiet) std::cout << llama::shown(text.decode(previous, token));
      logits = stream.next(token);
      previous = token;
      q.most = std::max(q.most, stream.cache().size());
      q.bytes = std::max(q.bytes, stream.cache().bytes().total);
    }
    q.seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    q.cached = stream.cache().size();
    q.segments = std::ssize(stream.cache().positions().segments());
    q.evictions = stream.num_evictions();
  }
  write_table(quarters, given);
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
}

}  // namespace

int main(int argc, char** argv) { return program::run("stream_forever", argc, argv, parse, run); }
