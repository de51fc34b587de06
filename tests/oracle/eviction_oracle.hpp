// SPDX-License-Identifier: MIT
// Models of the policies: plain vectors that are searched from end to end. What every policy has to agree with, victim
// by victim. Uses nothing of the library.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

namespace oracle {

using key = std::uint64_t;

struct block_facts {
  std::optional<key> parent;
  int priority = 0;
  double cost = 1;
};

inline bool has(const std::vector<key>& keys, key k) {
  return std::find(keys.begin(), keys.end(), k) != keys.end();
}
inline bool drop(std::vector<key>& keys, key k) {
  const auto at = std::find(keys.begin(), keys.end(), k);
  if (at == keys.end()) return false;
  keys.erase(at);
  return true;
}

/// Which blocks are there, what holds them: pins, and children that came while they were there.
class held_blocks {
 public:
  [[nodiscard]] bool contains(key k) const { return blocks_.count(k) != 0; }
  [[nodiscard]] std::size_t size() const { return blocks_.size(); }

  void add(key k, std::optional<key> parent) {
    const bool known = parent && *parent != k && contains(*parent);
    blocks_[k] = {++last_life_, known ? blocks_.at(*parent).life : 0, 0};
  }
  void remove(key k) { blocks_.erase(k); }
  void pin(key k) { ++blocks_.at(k).pins; }
  void unpin(key k) { --blocks_.at(k).pins; }
  [[nodiscard]] int pins(key k) const { return blocks_.at(k).pins; }
  [[nodiscard]] std::size_t num_pinned() const {
    return static_cast<std::size_t>(
        std::count_if(blocks_.begin(), blocks_.end(), [](const auto& b) { return b.second.pins > 0; }));
  }

  [[nodiscard]] bool may_go(key k) const {
    const block& b = blocks_.at(k);
    return b.pins == 0 && std::none_of(blocks_.begin(), blocks_.end(),
                                       [&](const auto& other) { return other.second.parent_life == b.life; });
  }
  [[nodiscard]] bool is_parent_of(key parent, key child) const {
    return contains(parent) && contains(child) && blocks_.at(child).parent_life == blocks_.at(parent).life;
  }

 private:
  struct block {
    std::uint64_t life = 0;
    std::uint64_t parent_life = 0;
    int pins = 0;
  };
  std::map<key, block> blocks_;
  std::uint64_t last_life_ = 0;
};

/// A line, oldest first, and those who were passed over.
struct line {
  std::vector<key> waiting;
  std::vector<key> parked;

  void leave(key k) { drop(waiting, k) || drop(parked, k); }
  [[nodiscard]] bool has_member(key k) const { return has(waiting, k) || has(parked, k); }
  [[nodiscard]] std::size_t size() const { return waiting.size() + parked.size(); }

  /// Right before its parent if that waits here, else at the end.
  void join(key k, std::optional<key> before) {
    const auto at = before ? std::find(waiting.begin(), waiting.end(), *before) : waiting.end();
    waiting.insert(at, k);
  }
  void park_front() {
    parked.push_back(waiting.front());
    waiting.erase(waiting.begin());
  }
  /// Those who may go by now are first.
  void unpark(const held_blocks& held) {
    for (const key k : std::vector<key>(parked)) {
      if (!held.may_go(k)) continue;
      drop(parked, k);
      waiting.insert(waiting.begin(), k);
    }
  }
  std::optional<key> first(const held_blocks& held) {
    while (!waiting.empty() && !held.may_go(waiting.front())) park_front();
    return waiting.empty() ? std::nullopt : std::optional(waiting.front());
  }
};

/// What the models share. A model says `use`, `add`, `leave`, `choose` and `unpark`.
template <class Model>
class naive_policy {
 public:
  explicit naive_policy(std::size_t capacity) : capacity_(capacity) {}

  bool insert(key k, const block_facts& facts) {
    if (held_.contains(k)) {
      model().retell(k, facts);
      model().use(k);
      return true;
    }
    if (held_.size() >= capacity_) return false;
    held_.add(k, facts.parent);
    model().add(k, facts);
    return true;
  }
  bool touch(key k) {
    if (!held_.contains(k)) return false;
    model().use(k);
    return true;
  }
  std::optional<key> evict() {
    const auto chosen = model().choose();
    if (!chosen) return std::nullopt;
    held_.remove(*chosen);
    model().leave(*chosen, true);
    model().unpark();
    return chosen;
  }
  bool erase(key k) {
    const bool there = held_.contains(k);
    held_.remove(k);
    model().leave(k, false);
    model().unpark();
    return there;
  }
  void pin(key k) { held_.pin(k); }
  void unpin(key k) {
    held_.unpin(k);
    model().unpark();
  }
  [[nodiscard]] const held_blocks& held() const { return held_; }

  void retell(key, const block_facts&) {}

 protected:
  /// The parent of a block if it may be the one to stand before.
  [[nodiscard]] std::optional<key> parent_of(key k, const block_facts& facts) const {
    return facts.parent && held_.is_parent_of(*facts.parent, k) ? facts.parent : std::nullopt;
  }

  std::size_t capacity_;
  held_blocks held_;

 private:
  Model& model() { return static_cast<Model&>(*this); }
};

class naive_lru : public naive_policy<naive_lru> {
 public:
  using naive_policy::naive_policy;

  void add(key k, const block_facts&) { line_.join(k, std::nullopt); }
  void use(key k) {
    line_.leave(k);
    line_.join(k, std::nullopt);
  }
  void leave(key k, bool) { line_.leave(k); }
  std::optional<key> choose() { return line_.first(held_); }
  void unpark() { line_.unpark(held_); }

 private:
  line line_;
};

class naive_arc : public naive_policy<naive_arc> {
 public:
  using naive_policy::naive_policy;

  void add(key k, const block_facts& facts) {
    const auto g1 = ghosts_of_once_.size(), g2 = ghosts_of_again_.size();
    line* to = &again_;
    if (drop(ghosts_of_once_, k)) {
      target_ = std::min(target_ + std::max(g2 / g1, std::size_t{1}), capacity_);
    } else if (drop(ghosts_of_again_, k)) {
      target_ -= std::min(target_, std::max(g1 / g2, std::size_t{1}));
    } else {
      to = &once_;
    }
    to->join(k, parent_of(k, facts));
    forget();
  }
  void use(key k) {
    once_.leave(k);
    again_.leave(k);
    again_.join(k, std::nullopt);
  }
  void leave(key k, bool evicted) {
    if (evicted) (once_.has_member(k) ? ghosts_of_once_ : ghosts_of_again_).push_back(k);
    once_.leave(k);
    again_.leave(k);
    if (!evicted) drop(ghosts_of_once_, k) || drop(ghosts_of_again_, k);
    forget();
  }
  std::optional<key> choose() {
    const bool once_first = once_.waiting.size() > target_;
    const auto chosen = (once_first ? once_ : again_).first(held_);
    return chosen ? chosen : (once_first ? again_ : once_).first(held_);
  }
  void unpark() {
    once_.unpark(held_);
    again_.unpark(held_);
  }

 private:
  void forget() {
    while (!ghosts_of_once_.empty() && ghosts_of_once_.size() + once_.size() > capacity_)
      ghosts_of_once_.erase(ghosts_of_once_.begin());
    while (ghosts_of_once_.size() + ghosts_of_again_.size() > capacity_)
      ghosts_of_again_.erase(ghosts_of_again_.begin());
  }

  line once_, again_;
  std::vector<key> ghosts_of_once_, ghosts_of_again_;
  std::size_t target_ = 0;
};

class naive_s3_fifo : public naive_policy<naive_s3_fifo> {
 public:
  using naive_policy::naive_policy;

  void add(key k, const block_facts& facts) {
    auto before = parent_of(k, facts);
    if (before && uses_[*before] > 0) before.reset();
    (drop(ghosts_, k) ? main_ : small_).join(k, before);
    uses_[k] = 0;
  }
  void use(key k) { uses_[k] = std::min(uses_[k] + 1, 3); }
  void leave(key k, bool evicted) {
    if (evicted && small_.has_member(k)) {
      if (ghosts_.size() >= capacity_) ghosts_.erase(ghosts_.begin());
      ghosts_.push_back(k);
    }
    small_.leave(k);
    main_.leave(k);
    if (!evicted) drop(ghosts_, k);
  }
  std::optional<key> choose() {
    const bool small_first = small_.waiting.size() >= std::max(capacity_ / 10, std::size_t{1});
    auto chosen = small_first ? from_small() : from_main();
    if (!chosen) chosen = small_first ? from_main() : from_small();
    return chosen ? chosen : from_main();
  }
  void unpark() {
    small_.unpark(held_);
    main_.unpark(held_);
  }

 private:
  std::optional<key> from_small() {
    while (!small_.waiting.empty()) {
      const key k = small_.waiting.front();
      if (uses_[k] >= 2) {
        small_.leave(k);
        main_.join(k, std::nullopt);
        uses_[k] = 0;
      } else if (held_.may_go(k)) {
        return k;
      } else {
        small_.park_front();
      }
    }
    return std::nullopt;
  }
  std::optional<key> from_main() {
    while (!main_.waiting.empty()) {
      const key k = main_.waiting.front();
      if (uses_[k] > 0) {
        main_.leave(k);
        main_.join(k, std::nullopt);
        --uses_[k];
      } else if (held_.may_go(k)) {
        return k;
      } else {
        main_.park_front();
      }
    }
    return std::nullopt;
  }

  line small_, main_;
  std::vector<key> ghosts_;
  std::map<key, int> uses_;
};

class naive_priority : public naive_policy<naive_priority> {
 public:
  using naive_policy::naive_policy;

  void add(key k, const block_facts& facts) {
    retell(k, facts);
    use(k);
  }
  void retell(key k, const block_facts& facts) { ranks_[k] = {facts.priority, 0, 0, facts.cost}; }
  void use(key k) {
    ranks_[k].score = clock_ + ranks_[k].cost;
    ranks_[k].last_use = ++num_uses_;
  }
  void leave(key k, bool evicted) {
    if (evicted) clock_ = std::max(clock_, ranks_.at(k).score);
    ranks_.erase(k);
  }
  std::optional<key> choose() const {
    std::optional<key> best;
    for (const auto& [k, r] : ranks_) {
      if (held_.may_go(k) && (!best || r.order() < ranks_.at(*best).order())) best = k;
    }
    return best;
  }
  void unpark() {}

 private:
  struct rank {
    int priority = 0;
    double score = 0;
    std::uint64_t last_use = 0;
    double cost = 0;
    [[nodiscard]] std::tuple<int, double, std::uint64_t> order() const { return {priority, score, last_use}; }
  };
  std::map<key, rank> ranks_;
  double clock_ = 0;
  std::uint64_t num_uses_ = 0;
};

}  // namespace oracle
