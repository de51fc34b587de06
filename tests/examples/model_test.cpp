// SPDX-License-Identifier: MIT
// The bundled model against another framework's output (reference.json, see the README beside it), through
// every cache.
#include "support/catch.hpp"

#include "llama/byte_tokenizer.hpp"
#include "llama/compare.hpp"
#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/load_model.hpp"
#include "llama/measure.hpp"

#include <kvcache/interop/any_cache.hpp>
#include <kvcache/kvcache.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

using llama::index_t;
using llama::matrix;
using ids = std::vector<index_t>;

const std::filesystem::path model_dir = KVCACHE_MODEL_DIR;

#ifdef __OPTIMIZE__
constexpr index_t max_steps = 200;  // all there are
constexpr std::size_t max_documents = 8;
#else
constexpr index_t max_steps = 24;  // without optimisation a token takes a hundred times as long
constexpr std::size_t max_documents = 1;
#endif

const llama::decoder& model() {
  static const llama::decoder loaded(llama::load_model(model_dir));
  return loaded;
}

const nlohmann::json& reference() {
  static const nlohmann::json parsed = [] {
    std::ifstream in(model_dir / "reference.json");
    return nlohmann::json::parse(in);
  }();
  return parsed;
}

/// A case of reference.json: a prompt, the greedy bytes after it, and the logits at both ends.
struct reference_case {
  ids prompt, greedy;
  std::vector<float> logits_after_prompt,
      logits_after_greedy;  // [vocab]; after all greedy bytes but the last
};

std::vector<reference_case> cases() {
  std::vector<reference_case> all;
  for (const auto& entry : reference().at("cases")) {
    all.push_back({llama::byte_tokenizer{}.encode(entry.at("prompt").get<std::string>()),
                   entry.at("greedy_ids").get<ids>(),
                   entry.at("logits_after_prompt").get<std::vector<float>>(),
                   entry.at("logits_after_greedy").get<std::vector<float>>()});
  }
  return all;
}

float difference(const matrix& logits, const std::vector<float>& expected) {
  const Eigen::Map<const Eigen::RowVectorXf> other(expected.data(),
                                                   static_cast<Eigen::Index>(expected.size()));
  return (logits.bottomRows(1) - other).cwiseAbs().maxCoeff();
}

ids joined(ids a, const ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// Decodes greedily through a cache; checks bytes and logits against the reference.
template <class Cache>
void require_reference(Cache& cache, const reference_case& expected) {
  matrix logits = model().forward(expected.prompt, cache);
  CHECK(difference(logits, expected.logits_after_prompt) < 1e-3f);
  const auto steps = std::min(max_steps, static_cast<index_t>(expected.greedy.size()));
  for (index_t step = 0; step < steps; ++step) {
    CAPTURE(step);
    const index_t id = llama::greedy_token(llama::row_of(logits, 0));
    REQUIRE(id == expected.greedy[static_cast<std::size_t>(step)]);
    logits = model().forward(std::span(&id, 1), cache);
  }
  if (steps == static_cast<index_t>(expected.greedy.size())) {
    CHECK(difference(logits, expected.logits_after_greedy) < 1e-3f);
  }
  CHECK(cache.size() == static_cast<index_t>(expected.prompt.size()) + steps);
}

}  // namespace

TEST_CASE("the model's sizes are those of its README", "[examples]") {
  const auto& c = model().config();
  CHECK(c.num_layers == 4);
  CHECK(c.hidden_size == 256);
  CHECK(c.num_q_heads == 4);
  CHECK(c.num_kv_heads == 2);
  CHECK(c.head_dim == 64);
  CHECK(c.mlp_size == 512);
  CHECK(c.vocab_size == 256);
  CHECK(c.max_context == 1024);
  CHECK(c.tied_embeddings);
}

TEST_CASE("greedy bytes and logits equal the reference through every container", "[examples]") {
  const auto shape = llama::cache_shape_of(model().config());
  for (const auto& expected : cases()) {
    SECTION("contiguous, prompt of " + std::to_string(expected.prompt.size())) {
      kvcache::contiguous_cache<kvcache::codec::f32> cache{shape};
      require_reference(cache, expected);
    }
    SECTION("chunked, prompt of " + std::to_string(expected.prompt.size())) {
      kvcache::chunked_cache<kvcache::codec::f32> cache{shape};
      require_reference(cache, expected);
    }
    SECTION("paged, prompt of " + std::to_string(expected.prompt.size())) {
      kvcache::page_pool<kvcache::codec::f32> pool{shape};
      auto cache = pool.sequence();
      require_reference(cache, expected);
      cache.check();
    }
    SECTION("any_cache, prompt of " + std::to_string(expected.prompt.size())) {
      auto cache = kvcache::make_cache("paged/f32", shape);
      require_reference(cache, expected);
    }
  }
}

TEST_CASE("recomputing everything gives the reference too", "[examples]") {
  for (const auto& expected : cases()) {
    const ids text =
        joined(expected.prompt, ids(expected.greedy.begin(), expected.greedy.begin() + max_steps));
    const matrix logits = model().recompute(text, max_steps + 1);  // [max_steps + 1, vocab]
    CHECK(difference(logits.topRows(1), expected.logits_after_prompt) < 1e-3f);
    for (index_t step = 0; step < max_steps; ++step) {
      CAPTURE(step);
      REQUIRE(llama::greedy_token(llama::row_of(logits, step)) ==
              expected.greedy[static_cast<std::size_t>(step)]);
    }
    if (max_steps == static_cast<index_t>(expected.greedy.size())) {
      CHECK(difference(logits, expected.logits_after_greedy) < 1e-3f);
    }
  }
}

TEST_CASE("16-bit caches stay close to the reference along its own bytes", "[examples]") {
  const auto shape = llama::cache_shape_of(model().config());
  const auto expected = cases().front();
  const ids text = joined(expected.prompt, ids(expected.greedy.begin(), expected.greedy.begin() + max_steps));
  const matrix exact = model().recompute(text, static_cast<index_t>(text.size()));
  for (const auto& [spec, bound] :
       {std::pair("contiguous/f16", 0.03f), {"chunked/bf16", 0.2f}, {"paged/bf16", 0.2f}}) {
    auto cache = kvcache::make_cache(spec, shape);
    const matrix logits = model().forward(text, cache, static_cast<index_t>(text.size()));
    CAPTURE(spec);
    CHECK((logits - exact).cwiseAbs().maxCoeff() < bound);
  }
}

TEST_CASE("facts scattered through a document are recalled", "[examples]") {
  const auto shape = llama::cache_shape_of(model().config());
  const auto& documents = reference().at("recall_documents");
  for (std::size_t d = 0; d < std::min(max_documents, documents.size()); ++d) {
    const auto& document = documents[d];
    const auto text = document.at("ids").get<ids>();
    const auto first = document.at("first_question").get<std::size_t>();
    for (const std::string spec : {"paged/f32", "contiguous/bf16"}) {
      if (d > 0 && spec != "paged/f32") continue;  // one is enough to show that 16 bits do not forget
      CAPTURE(d, spec);
      auto cache = kvcache::make_cache(spec, shape);
      const matrix logits = model().forward(text, cache, static_cast<index_t>(text.size()));
      index_t correct = 0, questions = 0;
      for (std::size_t key = first; key + 1 < text.size(); key += 2, ++questions) {
        correct +=
            llama::greedy_token(llama::row_of(logits, static_cast<index_t>(key))) == text[key + 1] ? 1 : 0;
      }
      CHECK(questions == document.at("questions").get<index_t>());
      CHECK(correct == document.at("correct_in_float32").get<index_t>());
    }
  }
}

TEST_CASE("prefill in pieces of any size, token by token and recomputing agree", "[examples]") {
  const auto shape = llama::cache_shape_of(model().config());
  const auto expected = cases().back();
  const ids text = joined(expected.prompt, ids(expected.greedy.begin(), expected.greedy.begin() + max_steps));
  const matrix whole = model().recompute(text, 1);
  kvcache::serial_executor serial;
  for (const index_t piece : {index_t{1}, index_t{7}, index_t{64}, index_t{65}, index_t{1000}}) {
    CAPTURE(piece);
    auto cache = kvcache::make_cache("chunked/f32", shape);
    const matrix logits = llama::prefill(model(), text, cache, piece, serial);
    CHECK((logits - whole).cwiseAbs().maxCoeff() < 1e-4f);
    CHECK(cache.size() == static_cast<index_t>(text.size()));
  }
}

TEST_CASE("a token outside the vocabulary or a full pool leaves the cache as it was", "[examples]") {
  const auto shape = llama::cache_shape_of(model().config());
  kvcache::page_pool<kvcache::codec::f32> pool{shape, {.budget_bytes = 4 * 2 * 2 * 64 * 64 * 4}};  // one page
  auto cache = pool.sequence();
  const ids prompt(60, 65);
  const matrix before = model().forward(prompt, cache);
  CHECK_THROWS_AS(model().forward(ids{65, 256}, cache), std::out_of_range);
  CHECK_THROWS_AS(model().forward(ids{-1}, cache), std::out_of_range);
  CHECK_THROWS_AS(model().forward(ids{}, cache), std::out_of_range);
  CHECK_THROWS_AS(model().forward(ids(5, 65), cache), kvcache::capacity_error);
  CHECK(cache.size() == 60);
  cache.check();
  const matrix after = model().forward(ids(4, 66), cache);
  CHECK(cache.size() == 64);
  auto fresh = kvcache::make_cache("contiguous/f32", shape);
  CHECK((model().forward(joined(prompt, ids(4, 66)), fresh) - after).cwiseAbs().maxCoeff() < 1e-4f);
}

TEST_CASE("a generation keeps its text, times and logits", "[examples]") {
  const auto shape = llama::cache_shape_of(model().config());
  const auto expected = cases().front();
  kvcache::serial_executor serial;
  auto cache = kvcache::make_cache("contiguous/f32", shape);
  ids streamed;
  std::vector<index_t> progress;
  llama::generation_events events;
  events.chosen = [&](index_t, index_t id) { streamed.push_back(id); };
  events.prefilled = [&](index_t done, index_t total) {
    progress.push_back(done);
    CHECK(total == 7);
  };
  const auto result =
      llama::generate(model(), expected.prompt, cache,
                      {.num_tokens = 20, .prefill_piece = 4, .sampling = {.temperature = 0}}, serial, events);
  CHECK(progress == std::vector<index_t>{4, 7});
  CHECK(result.num_written() == 20);
  CHECK(result.num_cached() == cache.size());
  CHECK(streamed == ids(expected.greedy.begin(), expected.greedy.begin() + 20));
  CHECK(result.tokens == joined(expected.prompt, streamed));
  CHECK(result.logits.rows() == 20);
  CHECK(difference(result.logits.topRows(1), expected.logits_after_prompt) < 1e-3f);
  CHECK(result.first_token_seconds > 0);
  CHECK(result.later_seconds > 0);
}

TEST_CASE("the comparison follows the greedy text of recomputing", "[examples]") {
  kvcache::serial_executor serial;
  const auto expected = cases().front();
  const auto text = llama::write_greedy_text(model(), expected.prompt, 12, serial);
  CHECK(text.tokens == joined(expected.prompt, ids(expected.greedy.begin(), expected.greedy.begin() + 12)));
  auto exact = kvcache::make_cache("paged/f32", llama::cache_shape_of(model().config()));
  const auto result = llama::follow(model(), text, exact, serial);
  CHECK(result.same_text);
  CHECK(result.max_difference < 1e-4f);
  CHECK(result.num_tokens == 7 + 11);
  CHECK(result.memory.payload == result.num_tokens * 2 * 4 * 2 * 64 * 4);

  auto other = text;
  other.tokens.back() = 0;  // not what the model would choose
  auto again = kvcache::make_cache("paged/f32", llama::cache_shape_of(model().config()));
  CHECK_FALSE(llama::follow(model(), other, again, serial).same_text);
}

TEST_CASE("the time of recomputing a run is interpolated between measured lengths", "[examples]") {
  const std::vector<llama::length_timing> timings{
      {.length = 11, .cached_seconds = 1, .recompute_seconds = 11},
      {.length = 21, .cached_seconds = 1, .recompute_seconds = 31}};
  CHECK(llama::recompute_seconds(timings, 1, 1) == 1);  // one token: a cached step
  CHECK(llama::recompute_seconds(timings, 11, 11) == 11);
  CHECK(llama::recompute_seconds(timings, 6, 6) == 6);
  CHECK(llama::recompute_seconds(timings, 16, 16) == 21);
  CHECK(llama::recompute_seconds(timings, 20, 21) == 60);
  CHECK(llama::recompute_seconds(timings, 12, 11) == 0);
}
