// SPDX-License-Identifier: MIT
// What is left of facts when tokens were evicted: a model reads a document, tokens go by a policy, then it is asked.
//
// The honest setting chooses tokens before the question is known, once for all questions of a document. The other one lets the
// policy see the question first, as if it were asked twice: an upper bound that no cache of a conversation reaches.
#pragma once

#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/model_error.hpp"
#include "streaming/attention_watch.hpp"
#include "streaming/policies.hpp"

#include <kvcache/core/executor.hpp>
#include <kvcache/eviction/evict_tokens.hpp>
#include <kvcache/eviction/keydiff.hpp>
#include <kvcache/interop/any_cache.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

namespace streaming {

/// Token ids; questions are asked from `first_question` on: key, value, key, value ...
struct recall_document {
  std::vector<index_t> ids;
  index_t first_question = 0;

  [[nodiscard]] index_t num_questions() const { return (std::ssize(ids) - first_question) / 2; }
};

/// The documents in a model's reference.json, the shortest first. Throws llama::model_error.
[[nodiscard]] inline std::vector<recall_document> read_documents(const std::filesystem::path& folder) {
  const auto file = folder / "reference.json";
  std::ifstream in(file);
  if (!in) throw llama::model_error(file, "", "no such file");
  try {
    const auto reference = nlohmann::json::parse(in);
    std::vector<recall_document> documents;
    for (const auto& document : reference.at("recall_documents"))
      documents.push_back(
          {document.at("ids").get<std::vector<index_t>>(), document.at("first_question").get<index_t>()});
    std::sort(documents.begin(), documents.end(),
              [](const auto& a, const auto& b) { return a.ids.size() < b.ids.size(); });
    if (documents.empty()) throw llama::model_error(file, "recall_documents", "there are none");
    return documents;
  } catch (const nlohmann::json::exception& error) {
    throw llama::model_error(file, "recall_documents", llama::printable(error.what()));
  }
}

/// How tokens are chosen.
struct recall_setting {
  double share = 1;               ///< of a document's tokens that are kept
  index_t unit = 1;               ///< tokens that go together
  bool question_visible = false;  ///< to the policy
};

/// Keeps tokens at random: what a policy has to beat.
struct random_tokens : eviction::no_token_books {
  static constexpr const char* name = "random";
  static constexpr eviction::token_evidence evidence = eviction::token_evidence::none;

  static void score(std::span<float> scores) noexcept {
    std::uint64_t state = scores.size();
    for (float& x : scores) {
      state = state * 6364136223846793005U + 1442695040888963407U;
      x = static_cast<float>(state >> 40U);
    }
  }
  [[nodiscard]] static eviction::token_selection selection(index_t budget) noexcept {
    return {.budget = budget};
  }
};

static_assert(eviction::token_policy<random_tokens>);

/// A document that was read once, with all that policies want to see of it.
class document_reader {
 public:
  document_reader(const llama::decoder& model, const recall_document& document, const std::string& spec,
                  index_t block_size)
      : model_(&model),
        document_(&document),
        cache_(kvcache::make_cache(spec, llama::cache_shape_of(model.config(), block_size),
                                   model.config().rope)),
        watch_(model.config().num_layers, 64, true) {
    constexpr index_t piece = 128;
    for (index_t at = 0; at < document.first_question; at += piece) {
      const auto count = std::min(piece, document.first_question - at);
      read(cache_, watch_,
           std::span(document.ids).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count)));
    }
    sums_ = watch_.take_sums();
  }

  /// Right answers, of document.num_questions().
  template <class Policy>
  [[nodiscard]] index_t count_answers(const Policy& policy, const recall_setting& setting) const {
    std::optional<kvcache::any_cache> evicted;
    if (!setting.question_visible) evicted = without_question(policy, setting);
    index_t correct = 0;
    for (index_t i = 0; i < document_->num_questions(); ++i) {
      const index_t* key = &document_->ids[static_cast<std::size_t>(document_->first_question + 2 * i)];
      auto cache = evicted ? evicted->fork() : with_question(policy, setting, *key);
      const llama::matrix logits = model_->forward(std::span(key, 1), cache);
      if (llama::greedy_token(llama::row_of(logits, 0)) == key[1]) ++correct;
    }
    return correct;
  }

 private:
  void read(kvcache::any_cache& cache, attention_watch& watch, std::span<const index_t> ids) const {
    kvcache::serial_executor serial;
    (void)model_->forward_watched(ids, cache, 1, serial, watch.of(cache));
  }

  [[nodiscard]] index_t budget(const recall_setting& setting) const {
    return static_cast<index_t>(setting.share * static_cast<double>(document_->first_question));
  }

  /// Shows a policy what it wants.
  template <class Policy>
  static void show(Policy& policy, const kvcache::any_cache& cache, const attention_watch& watch,
                   const std::vector<float>& sums) {
    if constexpr (Policy::evidence == eviction::token_evidence::keys) {
      observe_keys(cache, policy);
    } else if constexpr (Policy::evidence == eviction::token_evidence::weights) {
      policy.observe(policy.num_queries() == eviction::every_query
                         ? sums
                         : watch.newest_weights(cache, policy.num_queries()));
    }
  }

  template <class Policy>
  static void evict(kvcache::any_cache& cache, Policy& policy, const recall_setting& setting, index_t budget,
                    index_t recent) {
    auto selection = policy.selection(budget);
    selection.unit = setting.unit;
    selection.recent = std::max(selection.recent, recent);
    const auto result = eviction::evict_tokens(cache, policy, selection);
    if (result.code != kvcache::status::ok) throw kvcache::capacity_error("evict_tokens", result.code);
  }

  template <class Policy>
  [[nodiscard]] kvcache::any_cache without_question(Policy policy, const recall_setting& setting) const {
    auto cache = cache_.fork();
    show(policy, cache, watch_, sums_);
    evict(cache, policy, setting, budget(setting), 1);
    return cache;
  }

  /// The question is read, tokens are chosen, and the question is taken back.
  template <class Policy>
  [[nodiscard]] kvcache::any_cache with_question(Policy policy, const recall_setting& setting,
                                                 index_t key) const {
    auto cache = cache_.fork();
    attention_watch watch = watch_;
    read(cache, watch, std::span(&key, 1));
    std::vector<float> sums = watch.take_sums();
    for (std::size_t t = 0; t < sums_.size(); ++t) sums[t] += sums_[t];
    show(policy, cache, watch, sums);
    evict(cache, policy, setting, budget(setting) + 1,
          2);  // the last token of the document says where the next one is
    cache.truncate(cache.size() - 1);
    return cache;
  }

  const llama::decoder* model_;
  const recall_document* document_;
  kvcache::any_cache cache_;
  attention_watch watch_;
  std::vector<float> sums_;
};

}  // namespace streaming
