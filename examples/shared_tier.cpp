// SPDX-License-Identifier: MIT
// Two processes and one prompt: the first computes its keys and values and puts them into a tier, the second finds them
// there, and shows how long each way takes to the first token.
//
//   shared_tier --tier directory --at prefixes
//   shared_tier --tier lmdb --at prefixes
//   shared_tier --tier redis --at 127.0.0.1:6379            several addresses, with commas, are a cluster
#include "common/program.hpp"
#include "llama/command_line.hpp"
#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/load_model.hpp"
#include "llama/model_identity.hpp"
#include "llama/sampler.hpp"
#include "llama/tokenizer.hpp"

#include <kvcache/cache/contiguous.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/store/directory_tier.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/save.hpp>
#ifdef SHARED_TIER_LMDB
#include <kvcache/store/lmdb_tier.hpp>
#endif
#ifdef SHARED_TIER_REDIS
#include <kvcache/store/redis_tier.hpp>
#endif

#include <CLI/CLI.hpp>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

namespace {

using llama::index_t;
using cache_type = kvcache::contiguous_cache<kvcache::codec::bf16>;

struct options {
  std::filesystem::path model = llama::default_model();
  std::string tier = "directory";
  std::string at = "prefixes";
  index_t num_tokens = 768;  // of the prompt
};

/// The model, and a prompt that both processes have.
struct task {
  explicit task(const options& from)
      : model(llama::load_model(from.model)),
        who(llama::identity_of(from.model, model.config())),
        space(who.model + "/bf16") {
    std::string text = "ROMEO:\n";
    if (std::ifstream sample(from.model / "sample.txt"); sample)
      text.assign(std::istreambuf_iterator<char>(sample), {});
    prompt = llama::load_tokenizer(from.model, {}, model.config().vocab_size).encode(text);
    prompt.resize(static_cast<std::size_t>(
        std::min({from.num_tokens, static_cast<index_t>(prompt.size()), model.config().max_context})));
    if (prompt.size() < 2) throw llama::usage_error("the prompt must have at least two tokens");
    path.assign(prompt.begin(), prompt.end() - 1);
  }

  /// All of the prompt but its last token, which is what gives the first new one.
  [[nodiscard]] std::span<const index_t> prefix() const { return std::span(prompt).first(path.size()); }

  llama::decoder model;
  kvcache::store::identity who;
  std::string space;
  std::vector<index_t> prompt;
  std::vector<kvcache::token_id> path;  // the prefix, as tiers have it
};

/// The logits after the whole prompt, with a cache that has its prefix.
llama::matrix last_step(const task& t, cache_type& cache) {
  return t.model.forward(std::span(t.prompt).last(1), cache);
}

cache_type computed(const task& t) {
  cache_type cache(llama::cache_shape_of(t.model.config()));
  kvcache::serial_executor executor;
  (void)llama::prefill(t.model, t.prefix(), cache, 128, executor);
  return cache;
}

std::string milliseconds(double seconds) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(2) << seconds * 1e3 << " ms";
  return text.str();
}

template <class Tier>
void compute_and_put(const task& t, Tier& tier) {
  const llama::stopwatch computing;
  const cache_type cache = computed(t);
  const double compute_seconds = computing.seconds();
  const std::vector<std::byte> bytes = kvcache::store::save(cache, t.who);
  const llama::stopwatch putting;
  const bool kept = tier.put(t.space, t.path, bytes);
  std::cout << "first process:  " << t.path.size() << " tokens computed in " << milliseconds(compute_seconds)
            << ", " << bytes.size() << " bytes " << (kept ? "put" : "not kept") << " in "
            << milliseconds(putting.seconds()) << std::endl;
}

template <class Tier>
void find_and_compare(const task& t, Tier& tier) {
  const llama::stopwatch without;
  cache_type own = computed(t);
  const llama::matrix expected = last_step(t, own);
  std::cout << "second process: first token after " << milliseconds(without.seconds()) << ", computed"
            << std::endl;

  const llama::stopwatch with;
  std::vector<std::byte> bytes;
  if (!tier.get(t.space, t.path, bytes)) {
    const auto& s = tier.stats();
    std::cout << "second process: not found (" << s.errors << " errors, " << s.damaged + s.foreign
              << " bad records): goes on with what it computed" << std::endl;
    return;
  }
  const double get_seconds = with.seconds();
  auto loaded = kvcache::store::load<cache_type>(
      std::span<const std::byte>(bytes),
      {.expect = {.model = t.who.model, .tokenizer = {}, .rope = t.who.rope}});
  const llama::matrix logits = last_step(t, loaded.cache);
  std::cout << "second process: first token after " << milliseconds(with.seconds()) << ", from the tier ("
            << milliseconds(get_seconds) << " to get it)\n"
            << "logits:         " << (logits == expected ? "the same" : "DIFFERENT") << std::endl;
  if (logits != expected) throw std::runtime_error("the tier gave something else");
}

/// Calls use(tier) with the one that was asked for.
template <class Use>
void with_tier(const options& from, Use use) {
  if (from.tier == "directory") {
    kvcache::store::directory_tier tier(from.at);
    return use(tier);
  }
#ifdef SHARED_TIER_LMDB
  if (from.tier == "lmdb") {
    kvcache::store::lmdb_tier tier(from.at);
    return use(tier);
  }
#endif
#ifdef SHARED_TIER_REDIS
  if (from.tier == "redis") {
    kvcache::store::redis_options settings{.servers = {}};
    std::istringstream list(from.at);
    for (std::string address; std::getline(list, address, ',');) {
      const auto colon = address.rfind(':');
      if (colon == std::string::npos) throw llama::usage_error("--at: host:port, or several with commas");
      settings.servers.push_back({address.substr(0, colon), std::stoi(address.substr(colon + 1))});
    }
    settings.is_cluster = settings.servers.size() > 1;
    kvcache::store::redis_tier tier(settings);
    return use(tier);
  }
#endif
  throw llama::usage_error("--tier " + from.tier + ": not built in");
}

/// Runs `body` in a process of its own. \return its exit code
template <class Body>
int in_a_process(Body body) {
  const ::pid_t child = ::fork();
  if (child == 0) {
    const int code = program::exit_code_of("shared_tier", [&] {
      body();
      return 0;
    });
    std::cout.flush();
    ::_exit(code);
  }
  int status = 0;
  if (child < 0 || ::waitpid(child, &status, 0) != child) return 1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

int main(int argc, char** argv) {
  options from;
  CLI::App app{"Two processes share the keys and values of a prompt through a tier."};
  app.add_option("--tier", from.tier, "directory, lmdb or redis")
      ->check(CLI::IsMember({"directory", "lmdb", "redis"}))
      ->capture_default_str();
  app.add_option("--at", from.at, "its folder, or host:port of the server")->capture_default_str();
  app.add_option("--model", from.model, "Hugging Face folder or llama2.c checkpoint file")
      ->capture_default_str();
  app.add_option("--tokens", from.num_tokens, "of the prompt")
      ->check(CLI::Range(2, 1'000'000))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const auto run = [&](auto step) {
    return in_a_process([&] {
      const task t(from);
      with_tier(from, [&](auto& tier) { step(t, tier); });
    });
  };
  const int first = run([](const task& t, auto& tier) { compute_and_put(t, tier); });
  return first != 0 ? first : run([](const task& t, auto& tier) { find_and_compare(t, tier); });
}
