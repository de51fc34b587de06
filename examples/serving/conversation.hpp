// SPDX-License-Identifier: MIT
// Conversations: one of a few system prompts, then what a user says and what the model answers, in turns.
#pragma once

#include "llama/generation.hpp"
#include "llama/sampler.hpp"

#include <kvcache/core/types.hpp>
#include <kvcache/serving/prefix_node.hpp>

#include <bit>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace serving {

using kvcache::index_t;
using kvcache::token_id;

/// All sizes in tokens.
struct workload_options {
  index_t num_conversations = 48;
  index_t num_turns = 3;
  index_t num_system_prompts = 4;
  index_t system_size = 384;
  index_t user_size = 48;
  index_t answer_size = 32;
  std::uint64_t seed = 1;

  /// Of a conversation at its end.
  [[nodiscard]] index_t total_size() const noexcept {
    return system_size + num_turns * (user_size + answer_size);
  }
};

/// What happens in a conversation, whoever runs it. The random numbers of an answer depend on the conversation and the
/// place in it, so a text depends on the model alone.
class conversation {
 public:
  conversation(std::vector<token_id> system, std::vector<std::vector<token_id>> user_turns,
               index_t answer_size, std::uint64_t seed)
      : tokens_(std::move(system)),
        user_turns_(std::move(user_turns)),
        answer_size_(answer_size),
        seed_(seed) {
    hear();
  }

  /// Everything so far.
  [[nodiscard]] const std::vector<token_id>& tokens() const noexcept { return tokens_; }
  /// Tokens of each answer.
  [[nodiscard]] index_t answer_size() const noexcept { return answer_size_; }
  /// Of the answer that is being written.
  [[nodiscard]] index_t answered() const noexcept { return answered_; }
  [[nodiscard]] bool turn_is_over() const noexcept { return answered_ == answer_size_; }
  [[nodiscard]] bool is_over() const noexcept { return turn_is_over() && turn_ == user_turns_.size(); }
  [[nodiscard]] index_t turn() const noexcept { return static_cast<index_t>(turn_); }
  /// Of all bits of all logits that were drawn from.
  [[nodiscard]] std::uint64_t fingerprint() const noexcept { return fingerprint_; }

  /// Takes what the user says next. \pre turn_is_over() and not is_over()
  void hear() {
    const auto& said = user_turns_.at(turn_++);
    tokens_.insert(tokens_.end(), said.begin(), said.end());
    answered_ = 0;
  }

  /// Draws the next token of the answer. \param logits  [vocab], after all tokens so far
  token_id speak(std::span<const float> logits) {
    for (const float x : logits)
      fingerprint_ = (fingerprint_ ^ std::bit_cast<std::uint32_t>(x)) * 0x100000001B3U;  // FNV-1a, by words
    llama::splitmix64 seeds(seed_ + tokens_.size());
    llama::sampler choose({.temperature = 0.8, .seed = seeds.next()});
    tokens_.push_back(static_cast<token_id>(choose.next(logits)));
    ++answered_;
    return tokens_.back();
  }

  friend bool operator==(const conversation&, const conversation&) = default;

 private:
  std::vector<token_id> tokens_;
  std::vector<std::vector<token_id>> user_turns_;
  index_t answer_size_;
  std::uint64_t seed_;
  std::size_t turn_ = 0;
  index_t answered_ = 0;
  std::uint64_t fingerprint_ = 0xCBF29CE484222325U;
};

struct workload {
  std::vector<std::vector<token_id>> systems;
  std::vector<conversation> conversations;
};

/// Pieces of `text`, which has at least one token.
[[nodiscard]] inline workload make_workload(const workload_options& options, std::span<const index_t> text) {
  llama::splitmix64 random(options.seed);
  const auto piece = [&](index_t size) {
    std::vector<token_id> tokens;
    std::size_t at = random.next() % text.size();
    for (index_t i = 0; i < size; ++i) tokens.push_back(static_cast<token_id>(text[at++ % text.size()]));
    return tokens;
  };
  workload made;
  for (index_t i = 0; i < options.num_system_prompts; ++i) made.systems.push_back(piece(options.system_size));
  for (index_t i = 0; i < options.num_conversations; ++i) {
    std::vector<std::vector<token_id>> turns;
    for (index_t t = 0; t < options.num_turns; ++t) turns.push_back(piece(options.user_size));
    made.conversations.emplace_back(made.systems[static_cast<std::size_t>(i % options.num_system_prompts)],
                                    std::move(turns), options.answer_size, random.next());
  }
  return made;
}

}  // namespace serving
