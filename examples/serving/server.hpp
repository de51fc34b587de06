// SPDX-License-Identifier: MIT
// Continuous batching over a cache_manager: whoever has a turn to answer waits until there is room, joins the batch
// between two steps, and leaves it with the last token of the answer, which leaves the cache to whoever begins alike.
//
//   waiting -> acquire: what is stored; reserve: room for the rest -> active: some rows of a step -> release -> waiting
//
// System prompts are read before the first user comes; the manager stores a prefix when a sequence is released.
// A step gives one row to each sequence that is writing, and the rows that are left to prompts that are being read.
#pragma once

#include "serving/batch_decoder.hpp"
#include "serving/conversation.hpp"
#include "serving/process_memory.hpp"

#include <kvcache/core/status.hpp>
#include <kvcache/serving/cache_manager.hpp>
#include <kvcache/serving/prefix_node.hpp>

#include <algorithm>
#include <cstddef>
#include <ctime>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace serving {

/// Seconds of the processor that this process has used: it has one thread, and other programs do not count.
[[nodiscard]] inline double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

struct server_options {
  index_t max_active = 16;  ///< sequences in the batch
  index_t max_rows = 64;    ///< tokens of a step, at least max_active
  bool reuse = true;        ///< false: every prompt is computed from its beginning
  bool maps_files = false;  ///< whether the manager has a tier in files
  std::uint64_t seed = 1;   ///< of how long users think
};

/// What was seen, so far or at the end.
struct serving_figures {
  double seconds = 0;
  index_t steps = 0;
  index_t rows = 0;                          ///< tokens computed
  index_t written = 0;                       ///< tokens of answers
  index_t asked = 0;                         ///< tokens of prompts
  index_t reused = 0;                        ///< of those, found in the cache
  std::vector<double> first_token{};         ///< seconds from acquire to the first token, of each turn
  std::vector<double> first_token_waited{};  ///< the same from when the user had finished
  index_t peak_counted = 0;                  ///< bytes of the manager
  std::optional<index_t> peak_process{};     ///< bytes, growth of the process
  std::optional<index_t> peak_files{};       ///< bytes of mapped files, where those are not in peak_process
  index_t finished = 0;                      ///< conversations
  index_t active = 0, waiting = 0;
  index_t budget = 0, held = 0;  ///< bytes

  /// 0 to 1; system prompts that were read ahead are not asked for.
  [[nodiscard]] double hit_rate() const noexcept {
    return asked > 0 ? static_cast<double>(reused) / static_cast<double>(asked) : 0;
  }
};

template <class Manager>
class server {
 public:
  /// \param systems  prompts that conversations begin with
  server(const batch_decoder& model, Manager& manager, std::span<const std::vector<token_id>> systems,
         std::span<conversation> conversations, const server_options& options)
      : model_(model),
        manager_(manager),
        systems_(systems),
        conversations_(conversations),
        options_(options),
        think_(options.seed),
        memory_(options.maps_files) {
    figures_.budget = manager.budget();
  }

  /// Serves all conversations to their ends. \param watch  called after every step with what was seen so far
  /// Throws std::runtime_error if the budget does not hold one of them.
  serving_figures run(const std::function<void(const serving_figures&)>& watch) {
    start_ = cpu_seconds();
    if (options_.reuse)
      for (const auto& system : systems_) read(system);
    for (std::size_t i = 0; i < conversations_.size(); ++i) waiting_.push_back({i, start_});
    while (!waiting_.empty() || !active_.empty()) {
      admit();
      step();
      leave();
      note();
      watch(figures_);
    }
    return figures_;
  }

  /// Looks at the memory of the process; run() does it after every step.
  void look() { memory_.look(); }

 private:
  using id_type = kvcache::serving::sequence_id;

  static constexpr kvcache::serving::prefix_space space{.model = "the one there is"};

  struct turn {
    std::size_t who;
    double ready;  // when the user had finished
  };

  /// A sequence of the batch, as batch_decoder takes it.
  struct active_turn {
    Manager* manager;
    id_type id;
    turn of;
    double begun;

    [[nodiscard]] const auto& cache() const { return manager->cache(id); }
    void append(index_t layer, std::span<const float> k, std::span<const float> v) {
      if (manager->try_append(id, layer, k, v) != kvcache::status::ok)
        throw std::logic_error("a reserved place is not there");
    }
  };

  /// Computes a prompt, and leaves it to whoever begins with it.
  void read(std::span<const token_id> prompt) {
    const auto got = manager_.acquire(space, prompt);
    if (got.code != kvcache::status::ok) return;  // then those who need it compute it
    if (manager_.reserve(got.id, std::ssize(prompt) - got.reused) != kvcache::status::ok)
      return manager_.drop(got.id);
    active_turn alone{&manager_, got.id, {}, 0};
    while (alone.cache().size() < std::ssize(prompt)) {
      const auto left = prompt.subspan(static_cast<std::size_t>(alone.cache().size()));
      std::vector<batch_row> rows;
      for (const token_id t : left.first(std::min(left.size(), static_cast<std::size_t>(options_.max_rows))))
        rows.push_back({.token = t});
      (void)model_.step(std::span(&alone, 1), std::span<const batch_row>(rows));
      figures_.rows += std::ssize(rows);
    }
    manager_.release(got.id);
  }

  /// Takes in whoever fits, in the order of waiting.
  void admit() {
    while (!waiting_.empty() && std::ssize(active_) < options_.max_active) {
      if (!try_begin(waiting_.front())) break;
      waiting_.pop_front();
    }
    if (!active_.empty()) return;
    const conversation& c = conversations_[waiting_.front().who];
    throw std::runtime_error("--budget: " + std::to_string(manager_.budget()) +
                             " bytes do not hold one sequence of " +
                             std::to_string(std::ssize(c.tokens()) + c.answer_size()) + " tokens");
  }

  /// With room for all of the prompt and the answer, so that no step can run out.
  bool try_begin(const turn& next) {
    const conversation& c = conversations_[next.who];
    const auto size = std::ssize(c.tokens());
    if (!manager_.fits(size, c.answer_size())) return false;
    const double now = cpu_seconds();
    // The last token is always computed: its logits are what the answer begins with.
    const auto got = manager_.acquire(space, c.tokens(), options_.reuse ? size - 1 : index_t{0});
    if (got.code != kvcache::status::ok) return false;
    if (manager_.reserve(got.id, size - got.reused + c.answer_size()) != kvcache::status::ok) {
      manager_.release(got.id);
      return false;
    }
    active_.push_back({&manager_, got.id, next, now});
    figures_.asked += size;
    figures_.reused += got.reused;
    return true;
  }

  /// One pass over the next tokens of all that are active.
  void step() {
    std::vector<index_t> missing;
    index_t left = options_.max_rows;
    for (const active_turn& a : active_) {
      missing.push_back(std::ssize(conversations_[a.of.who].tokens()) - a.cache().size());
      left -= missing.back() == 1 ? 1 : 0;
    }
    std::vector<batch_row> rows;
    for (std::size_t s = 0; s < active_.size(); ++s) {
      const index_t count = missing[s] == 1 ? 1 : std::min(missing[s], left);
      left -= missing[s] == 1 ? 0 : count;
      const auto& tokens = conversations_[active_[s].of.who].tokens();
      const auto first = tokens.size() - static_cast<std::size_t>(missing[s]);
      for (index_t i = 0; i < count; ++i)
        rows.push_back({tokens[first + static_cast<std::size_t>(i)], s, i + 1 == missing[s]});
    }
    const double begun = cpu_seconds();
    const matrix logits = model_.step(std::span(active_), std::span<const batch_row>(rows));
    manager_.attended(std::ssize(rows), cpu_seconds() - begun);
    for (index_t i = 0, row = 0; i < std::ssize(rows); ++i) {
      const batch_row& r = rows[static_cast<std::size_t>(i)];
      if (r.wants_logits) speak(active_[r.sequence], llama::row_of(logits, row++));
    }
    figures_.rows += std::ssize(rows);
    ++figures_.steps;
  }

  void speak(active_turn& a, std::span<const float> logits) {
    conversation& c = conversations_[a.of.who];
    const token_id token = c.speak(logits);
    if (c.answered() == 1) {
      figures_.first_token.push_back(cpu_seconds() - a.begun);
      figures_.first_token_waited.push_back(cpu_seconds() - a.of.ready);
    }
    ++figures_.written;
    if (manager_.extend(a.id, {&token, 1}) != kvcache::status::ok)
      throw std::logic_error("a reserved place is not there");
  }

  /// Those whose turn is over leave the batch. Users think for a while: others come between.
  void leave() {
    std::erase_if(active_, [&](const active_turn& a) {
      conversation& c = conversations_[a.of.who];
      if (!c.turn_is_over()) return false;
      options_.reuse ? manager_.release(a.id) : manager_.drop(a.id);
      if (c.is_over()) {
        ++figures_.finished;
        return true;
      }
      c.hear();
      const auto place = static_cast<std::ptrdiff_t>(think_.next() % (waiting_.size() + 1));
      waiting_.insert(waiting_.begin() + place, {a.of.who, cpu_seconds()});
      return true;
    });
  }

  void note() {
    memory_.look();
    figures_.seconds = cpu_seconds() - start_;
    figures_.active = std::ssize(active_);
    figures_.waiting = std::ssize(waiting_);
    figures_.held = manager_.bytes();
    figures_.peak_counted = std::max(figures_.peak_counted, figures_.held);
    if (!active_.empty() || !waiting_.empty()) return;
    figures_.peak_process = memory_.peak();
    figures_.peak_files = memory_.files_peak();
  }

  const batch_decoder& model_;
  Manager& manager_;
  std::span<const std::vector<token_id>> systems_;
  std::span<conversation> conversations_;
  server_options options_;
  llama::splitmix64 think_;
  std::deque<turn> waiting_;
  std::vector<active_turn> active_;
  double start_ = 0;
  serving_figures figures_;
  process_memory memory_;
};

}  // namespace serving
