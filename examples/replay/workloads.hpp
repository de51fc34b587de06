// SPDX-License-Identifier: MIT
// Traces made up from a seed, the same on every machine, for when there is no file.
#pragma once

#include "common/splitmix64.hpp"
#include "replay/trace.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace replay {

/// The few distributions needed.
class dice : program::splitmix64 {
 public:
  using splitmix64::splitmix64;

  bool chance(double p) { return unit() < p; }
  /// In [first, last].
  index_t between(index_t first, index_t last) {
    return first + static_cast<index_t>(next() % static_cast<std::uint64_t>(last - first + 1));
  }
  /// In [0, n), small numbers more often: about as 1 / (1 + number).
  index_t popular(index_t n) {
    const double u = std::exp2(unit() * std::log2(static_cast<double>(n + 1)));
    return std::min(static_cast<index_t>(u) - 1, n - 1);
  }
};

/// Gives out keys that were not there before.
class new_blocks {
 public:
  void append_to(request& chain, index_t count) {
    for (index_t i = 0; i < count; ++i) chain.push_back(next_++);
  }
  [[nodiscard]] request chain(index_t count) {
    request made;
    append_to(made, count);
    return made;
  }

 private:
  block_key next_ = 0;
};

/// Conversations that go on side by side: each begins with one of a few system prompts, and every turn sends
/// all of it again with a question and the last answer at its end.
[[nodiscard]] inline trace multi_turn(index_t num_requests, std::uint64_t seed) {
  dice random(seed);
  new_blocks blocks;
  std::vector<request> prompts;
  for (index_t i = 0; i < 8; ++i) prompts.push_back(blocks.chain(random.between(1, 12)));
  const auto begin = [&] { return prompts[static_cast<std::size_t>(random.popular(8))]; };

  std::vector<request> open(100);  // conversations, the one that spoke last in front
  for (request& chain : open) chain = begin();
  trace t{.name = "multi-turn", .requests = {}};
  for (index_t i = 0; i < num_requests; ++i) {
    const auto who = open.begin() + random.popular(static_cast<index_t>(open.size()));
    blocks.append_to(*who, random.between(1, 8));
    t.requests.push_back(*who);
    std::rotate(open.begin(), who, who + 1);
    if (random.chance(0.2)) open.front() = begin();  // that was the last turn; someone else comes
  }
  return t;
}

/// Questions about documents, some of which are asked about far more than others; what is popular changes.
[[nodiscard]] inline trace shared_documents(index_t num_requests, std::uint64_t seed) {
  dice random(seed);
  new_blocks blocks;
  const request prompt = blocks.chain(4);
  const auto write = [&] {
    request document = prompt;
    blocks.append_to(document, random.between(4, 60));
    return document;
  };
  std::vector<request> documents(200);  // the most popular in front
  for (request& document : documents) document = write();
  trace t{.name = "shared-documents", .requests = {}};
  for (index_t i = 0; i < num_requests; ++i) {
    const index_t count = static_cast<index_t>(documents.size());
    t.requests.push_back(documents[static_cast<std::size_t>(random.popular(count))]);
    blocks.append_to(t.requests.back(), random.between(1, 3));  // the question
    if (random.chance(0.02)) {  // news: a document nobody knew takes the place of another
      const auto place = documents.begin() + random.between(0, 20);
      std::rotate(place, documents.end() - 1, documents.end());
      *place = write();
    }
  }
  return t;
}

}  // namespace replay
