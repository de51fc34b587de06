// SPDX-License-Identifier: MIT
// Writes text with a model through the cache, as it comes, and ends with a table of what the cache saved.
//
//   generate --prompt "JULIET:" --tokens 200 --cache paged/bf16
//   generate --compare
//   generate --model stories15M.bin --tokenizer tokenizer.bin --prompt "Once upon a time"
#include "common/program.hpp"
#include "llama/command_line.hpp"
#include "llama/compare.hpp"
#include "llama/console.hpp"
#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/load_model.hpp"
#include "llama/measure.hpp"
#include "llama/report.hpp"
#include "llama/tokenizer.hpp"

#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/eigen_thread_pool.hpp>

#include <iostream>
#include <vector>

namespace {

using llama::index_t;

/// Ids of the prompt. An empty one becomes the token that starts a text.
std::vector<index_t> prompt_ids(const llama::command_line& options, const llama::tokenizer& text,
                                const llama::model_config& config) {
  std::vector<index_t> ids = text.encode(options.prompt);
  if (ids.empty() && config.bos_id) ids.push_back(*config.bos_id);
  if (ids.empty()) throw llama::usage_error("--prompt: empty, and the model has no token that starts a text");
  if (static_cast<index_t>(ids.size()) > config.max_context) {
    throw llama::usage_error("--prompt: " + std::to_string(ids.size()) + " tokens, the model's context has " +
                             std::to_string(config.max_context));
  }
  return ids;
}

/// The tokens to write: as many as asked for, or as the context has room for. The last one is not read again.
index_t tokens_to_write(const llama::command_line& options, index_t num_prompt,
                        const llama::model_config& config) {
  const index_t room = config.max_context - num_prompt + 1;
  if (options.num_tokens <= room) return options.num_tokens;
  std::cerr << "--tokens " << options.num_tokens << ": writing " << room << ", where the model's context of "
            << config.max_context << " ends\n";
  return room;
}

/// Writes the text, then the report.
template <class Executor>
void write_text(const llama::command_line& options, const llama::decoder& model, const llama::tokenizer& text,
                const std::vector<index_t>& prompt, index_t num_tokens, Executor& executor) {
  const auto new_cache = [&] {
    return kvcache::make_cache(options.cache, llama::cache_shape_of(model.config()), model.config().rope);
  };
  auto cache = new_cache();
  std::cout << llama::shown(options.prompt) << std::flush;
  const auto result = llama::generate(
      model, prompt, cache,
      {.num_tokens = num_tokens,
       .sampling = {.temperature = options.temperature, .top_p = options.top_p, .seed = options.seed}},
      executor, llama::console_events(text));
  std::cout << '\n';
  if (!options.report) return;

  const llama::measure_options lengths{
      .lengths = llama::report_lengths(model.config().max_context, result.num_cached()),
      .seconds_per_token = result.first_token_seconds / static_cast<double>(prompt.size())};
  const llama::run_summary run{.spec = options.cache,
                               .num_threads = options.num_threads,
                               .result = &result,
                               .memory = cache.bytes(),
                               .timings = llama::measure(model, result.tokens, lengths, new_cache, executor)};
  std::cout << '\n';
  llama::run_report(model, run).write(std::cout, executor);
}

/// Writes the greedy text, then one row per container and codec.
template <class Executor>
void write_comparison(const llama::command_line& options, const llama::decoder& model,
                      const llama::tokenizer& text, const std::vector<index_t>& prompt, index_t num_tokens,
                      Executor& executor) {
  const auto greedy = llama::write_greedy_text(model, prompt, num_tokens, executor);
  std::cout << llama::shown(options.prompt);
  for (std::size_t i = prompt.size(); i < greedy.tokens.size(); ++i) {
    std::cout << llama::shown(text.decode(greedy.tokens[i - 1], greedy.tokens[i]));
  }
  std::cout
      << "\n\nThe greedy text above, written again through each cache; logits against recomputing in f32:\n";
  llama::write_comparison(std::cout, model, greedy, executor);
}

void run(const llama::command_line& options) {
  const llama::decoder model(llama::load_model(options.model));
  const auto text = llama::load_tokenizer(options.model, options.tokenizer, model.config().vocab_size);
  const auto prompt = prompt_ids(options, text, model.config());
  const index_t num_tokens = tokens_to_write(options, static_cast<index_t>(prompt.size()), model.config());
  kvcache::eigen_thread_pool_executor executor(options.num_threads);
  if (options.compare) {
    write_comparison(options, model, text, prompt, num_tokens, executor);
  } else {
    write_text(options, model, text, prompt, num_tokens, executor);
  }
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
  return program::run("generate", argc, argv, llama::parse_command_line, run);
}
