// SPDX-License-Identifier: MIT
// Writes text beside a journal. Stopped at any moment, by kill -9 too, and started again, it goes on where it was and prints
// what it would have printed undisturbed.
//
//   resume --journal chat.kvj --prompt "JULIET:" --tokens 200
#include "common/program.hpp"
#include "llama/command_line.hpp"
#include "llama/console.hpp"
#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/load_model.hpp"
#include "llama/model_identity.hpp"
#include "llama/sampler.hpp"
#include "llama/tokenizer.hpp"

#include <kvcache/cache/contiguous.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/store/journal.hpp>
#include <kvcache/store/recover.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace {

using kvcache::token_id;
using llama::index_t;
using cache_type = kvcache::contiguous_cache<kvcache::codec::bf16>;

struct options {
  std::filesystem::path model = llama::default_model();
  std::filesystem::path journal;
  std::string prompt = "ROMEO:\n";
  index_t num_tokens = 200;
  index_t every = 16;
  double temperature = 0.8;
  std::uint64_t seed = 1;
  bool shows_times = false;
};

using steady = std::chrono::steady_clock;

/// A text, the cache of its tokens, and their journal. The same steps at any time: a prompt in pieces, then token by token.
class session {
 public:
  session(const options& from, const llama::decoder& model, std::vector<index_t> prompt)
      : options_(from),
        model_(model),
        tokens_(std::move(prompt)),
        prompt_size_(static_cast<index_t>(tokens_.size())),
        cache_(llama::cache_shape_of(model.config())) {
    const kvcache::store::identity who = llama::identity_of(from.model, model.config());
    const kvcache::store::journal_options settings{.every = from.every};
    if (!std::filesystem::exists(from.journal)) {
      log_.emplace(from.journal, cache_, who, settings);
      return;
    }
    const auto found = kvcache::store::recover_into(
        cache_, from.journal, {.expect = {.model = who.model, .tokenizer = {}, .rope = who.rope}});
    take(found.about.who.tokens);
    log_.emplace(from.journal, cache_, found.at, settings);
    std::cerr << "going on after " << cache_.size() << " tokens";
    if (found.lost_tokens) std::cerr << ", " << *found.lost_tokens << " more were damaged";
    std::cerr << '\n';
  }

  /// All tokens of the text, as many as were asked for.
  std::vector<index_t> write() {
    const index_t size = prompt_size_ + options_.num_tokens;
    llama::matrix logits = newest_logits();
    while (true) {
      while (cache_.size() < static_cast<index_t>(tokens_.size())) logits = forward(cache_, cache_.size());
      if (static_cast<index_t>(tokens_.size()) >= size) break;
      tokens_.push_back(choose(logits));
      if (static_cast<index_t>(tokens_.size()) == size) break;  // nobody reads what follows it
    }
    log_->sync();
    return tokens_;
  }

  /// What the journal took of decoding.
  void show_times(std::ostream& to) const {
    if (num_decoded_ == 0) return;
    const auto milliseconds = [&](steady::duration time) {
      return std::chrono::duration<double, std::milli>(time).count() / static_cast<double>(num_decoded_);
    };
    to << "a token takes " << milliseconds(decoding_) << " ms, its journal " << milliseconds(logging_)
       << " ms, " << 100 * milliseconds(logging_) / milliseconds(decoding_) << " %\n";
  }

 private:
  static constexpr index_t piece = 32;  // tokens of the prompt that are read at a time

  /// The tokens that a journal had.
  void take(const std::vector<token_id>& known) {
    const auto common = static_cast<std::ptrdiff_t>(std::min(known.size(), tokens_.size()));
    if (!std::equal(known.begin(), known.begin() + common, tokens_.begin()))
      throw llama::usage_error("--journal: it is of another prompt");
    if (known.size() > tokens_.size()) tokens_.assign(known.begin(), known.end());
  }

  /// Tokens that are read together with token `first`.
  [[nodiscard]] index_t count_from(index_t first) const {
    return first < prompt_size_ ? std::min(piece, prompt_size_ - first) : 1;
  }

  /// Reads the tokens from `first` on that belong together.
  llama::matrix forward(cache_type& cache, index_t first) {
    const index_t count = count_from(first);
    const auto now =
        std::span(tokens_).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    const auto start = steady::now();
    llama::matrix logits = model_.forward(now, cache);
    const auto middle = steady::now();
    if (&cache != &cache_) return logits;
    log_->append(std::vector<token_id>(now.begin(), now.end()));
    if (first < prompt_size_) return logits;
    ++num_decoded_;
    decoding_ += middle - start;
    logging_ += steady::now() - middle;
    return logits;
  }

  /// Those after the newest token of the cache, if all known tokens are in it: computed once more, beside it.
  llama::matrix newest_logits() {
    if (cache_.size() == 0 || cache_.size() < static_cast<index_t>(tokens_.size())) return {};
    index_t first = cache_.size() - 1;
    if (first < prompt_size_) first = first / piece * piece;
    cache_type before = cache_.fork(first);
    return forward(before, first);
  }

  /// Its random numbers depend on the place in the text, not on what was drawn before.
  index_t choose(const llama::matrix& logits) const {
    llama::splitmix64 seeds(options_.seed + tokens_.size());
    llama::sampler sampler({.temperature = options_.temperature, .seed = seeds.next()});
    return sampler.next(llama::row_of(logits, 0));
  }

  options options_;
  const llama::decoder& model_;
  std::vector<index_t> tokens_;
  index_t prompt_size_;
  cache_type cache_;
  std::optional<kvcache::store::journal<cache_type>> log_;
  index_t num_decoded_ = 0;
  steady::duration decoding_{};
  steady::duration logging_{};
};

void run(const options& from) {
  const llama::decoder model(llama::load_model(from.model));
  const auto text = llama::load_tokenizer(from.model, {}, model.config().vocab_size);
  std::vector<index_t> prompt = text.encode(from.prompt);
  if (prompt.empty()) throw llama::usage_error("--prompt: it must not be empty");
  const index_t num_tokens = static_cast<index_t>(prompt.size()) + from.num_tokens;
  if (num_tokens > model.config().max_context)
    throw llama::usage_error("--tokens: the model has not that much context");
  session text_of(from, model, prompt);
  const std::vector<index_t> tokens = text_of.write();
  std::string shown = from.prompt;
  for (std::size_t i = prompt.size(); i < tokens.size(); ++i) shown += text.decode(tokens[i - 1], tokens[i]);
  std::cout << llama::shown(shown) << '\n';
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
  if (from.shows_times) text_of.show_times(std::cerr);
}

}  // namespace

int main(int argc, char** argv) {
  options from;
  CLI::App app{
      "Writes text beside a journal; started again after kill -9, it goes on as if nothing had happened."};
  app.add_option("--journal", from.journal, "made if it is not there")->required();
  app.add_option("--model", from.model, "Hugging Face folder or llama2.c checkpoint file")
      ->capture_default_str();
  app.add_option("--prompt", from.prompt, "text to continue (default: \"ROMEO:\" and a new line)");
  app.add_option("--tokens", from.num_tokens, "to write")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--every", from.every, "tokens that may be lost")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--temperature", from.temperature, "0 is greedy")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--seed", from.seed, "of the random choices")->capture_default_str();
  app.add_flag("--times", from.shows_times, "say what the journal took of decoding");
  CLI11_PARSE(app, argc, argv);
  return program::exit_code_of("resume", [&] {
    run(from);
    return 0;
  });
}
