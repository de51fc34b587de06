// SPDX-License-Identifier: MIT
// Conversations and random verbs for a cache_manager, and what they prove after each.
#pragma once

#include "serving/tokens.hpp"
#include "support/heap.hpp"

#include <kvcache/codec/int8.hpp>
#include <kvcache/serving/cache_manager.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <map>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace serving_test {

using serving::cache_manager;
using serving::decision;
using serving::rung;
using serving::sequence_id;

using warm_pool = page_pool<codec::bf16>;
using cold_pool = page_pool<codec::int8>;

/// A spill tier in memory that counts, and may be told to fail.
struct map_tier {
  using key = std::tuple<std::string, std::string, std::string, tokens>;
  std::map<key, std::vector<std::byte>> stored;
  std::map<key, index_t> puts;
  bool full = false;
  index_t gets = 0;

  static key key_of(const prefix_space& s, std::span<const token_id> t) {
    return {std::string(s.model), std::string(s.adapter), std::string(s.tenant), tokens(t.begin(), t.end())};
  }
  bool put(const prefix_space& s, std::span<const token_id> t, std::span<const std::byte> bytes) {
    if (full) return false;
    const heap::uncounted own;
    stored[key_of(s, t)].assign(bytes.begin(), bytes.end());
    ++puts[key_of(s, t)];
    return true;
  }
  index_t get(const prefix_space& s, std::span<const token_id> t, std::span<std::byte> out) {
    const heap::uncounted own;
    const auto found = stored.find(key_of(s, t));
    if (found == stored.end() || found->second.size() > out.size()) return -1;
    std::copy(found->second.begin(), found->second.end(), out.begin());
    ++gets;
    return std::ssize(found->second);
  }
  bool contains(const prefix_space& s, std::span<const token_id> t) {
    const heap::uncounted own;
    return stored.contains(key_of(s, t));
  }
  void erase(const prefix_space& s, std::span<const token_id> t) {
    const heap::uncounted own;
    stored.erase(key_of(s, t));
  }
};

struct recorder {
  index_t asked = 0, hit = 0, appended = 0, recoded = 0, refused = 0, spilled = 0, reused = 0;
  double seconds = 0, attended = 0;
  std::array<index_t, 8> of{};  // by decision; no container, so that it allocates nothing
  serving::ladder_counts taken{};

  [[nodiscard]] index_t decided(decision d) const { return of[static_cast<std::size_t>(d)]; }

  void on_lookup(index_t a, index_t h) { asked += a, hit += h; }
  void on_append(index_t n, double s) { appended += n, seconds += s; }
  void on_attend(index_t, double s) { attended += s; }
  void on_evict(rung r, index_t freed, index_t age) { taken.add(r, freed), reused += age < 0 ? 1000000 : 0; }
  void on_reuse(index_t distance) { reused += distance > 0 ? 1 : 1000000; }
  void on_recode(index_t before, index_t after) { recoded += before > after ? 1 : 1000000; }
  void on_refuse(index_t bytes) { taken.add(rung::refuse, bytes), refused += bytes > 0 ? 1 : 1000000; }
  void on_spill(index_t bytes) { spilled += bytes; }
  void on_decision(decision d, index_t, double) { ++of[static_cast<std::size_t>(d)]; }
};

template <class Manager>
status compute(Manager& manager, sequence_id id, const prefix_space& space, std::span<const token_id> path) {
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const index_t have = manager.cache(id)[layer].size();
    const auto k = rows(space, path, layer, have, false), v = rows(space, path, layer, have, true);
    if (const status s = manager.try_append(id, layer, k, v); s != status::ok) return s;
  }
  return status::ok;
}

/// One conversation from beginning to end. \return tokens reused, or -1 where it was refused
template <class Manager>
index_t converse(Manager& manager, const prefix_space& space, const tokens& path, float tolerance = 0) {
  const auto got = manager.acquire(space, path);
  if (got.code != status::ok) return -1;
  REQUIRE(holds(manager.cache(got.id), space, std::span(path).first(static_cast<std::size_t>(got.reused)),
                tolerance));
  const bool computed = compute(manager, got.id, space, path) == status::ok;
  manager.release(got.id);
  return computed ? got.reused : -1;
}

/// Calls a verb, and proves that bytes() changes as the heap does, and that it stays within the budget, also while the
/// verb works.
template <class Manager>
class watched {
 public:
  explicit watched(Manager& m) : manager_(m) {}
  template <class Verb>
  auto operator()(Verb verb) {
    const auto heap = heap::bytes_out.load();
    const index_t bytes = manager_.bytes();
    heap::most_out = heap;
    const auto result = verb();
    const auto most = heap::most_out - heap + bytes;
    REQUIRE(manager_.bytes() - bytes == heap::bytes_out - heap);
    REQUIRE(manager_.bytes() + manager_.use().work <= manager_.budget());
    REQUIRE(most <= manager_.budget());
    return result;
  }

 private:
  Manager& manager_;
};

struct outcome {
  index_t reused = 0, refused = 0;
};

/// Random verbs; contents, bytes and books are proved after each.
///
/// \param tolerance  of what is found; 0: nothing is re-encoded or spilled, so that what live sequences began with is there
template <class Manager>
outcome run_script(Manager& manager, int num_steps, float tolerance, index_t most_live,
                   map_tier* tier = nullptr) {
  test::random random;
  watched<Manager> watch(manager);
  struct live {
    sequence_id id;
    std::size_t space;
    tokens path;
    tokens held;  // what it was given
  };
  std::vector<live> lives;
  std::vector<tokens> earlier;
  std::map<std::size_t, std::vector<tokens>> released;
  outcome out;
  for (int step = 0; step < num_steps; ++step) {
    CAPTURE(step);
    if (tier != nullptr) tier->full = random.chance(0.2);
    const double what = random.unit();
    const auto pick = [&]() -> live& {
      return lives[static_cast<std::size_t>(random.below(std::ssize(lives)))];
    };
    if (lives.empty() || (what < 0.3 && std::ssize(lives) < most_live)) {
      const auto s = static_cast<std::size_t>(random.below(2));
      const tokens path = some_prompt(random, earlier, 150);
      const index_t most = random.chance(0.3) ? std::max(std::ssize(path) - 1, index_t{0}) : Manager::all;
      const auto got = watch([&] { return manager.acquire(spaces[s], path, most); });
      if (got.code == status::ok) {
        index_t longest = 0, held = 0;
        for (const tokens& t : released[s]) longest = std::max(longest, common(t, path));
        for (const live& l : lives)
          if (l.space == s && tolerance == 0) held = std::max(held, common(l.held, path));
        REQUIRE(got.reused <= std::min(longest, most));
        REQUIRE(got.reused >= std::min(held, most));  // a pin is respected
        REQUIRE(holds(manager.cache(got.id), spaces[s],
                      std::span(path).first(static_cast<std::size_t>(got.reused)), tolerance));
        out.reused += got.reused;
        lives.push_back({got.id, s, path, tokens(path.begin(), path.begin() + got.reused)});
        earlier.push_back(path);
      } else {
        ++out.refused;
      }
    } else if (what < 0.7) {
      live& l = pick();
      tokens more = l.path;
      if (manager.cache(l.id).size() == std::ssize(l.path)) {
        const auto added = counted(random.below(3), random.between(1, 20));
        if (watch([&] { return manager.extend(l.id, added); }) != status::ok) {
          ++out.refused;
          continue;
        }
        l.path.insert(l.path.end(), added.begin(), added.end());
      } else if (random.chance(0.2)) {
        out.refused += watch([&] { return manager.reserve(l.id, random.below(40)); }) != status::ok ? 1 : 0;
      }
      for (index_t layer = 0; layer < shape.num_layers; ++layer) {
        const index_t have = manager.cache(l.id)[layer].size();
        const auto k = rows(spaces[l.space], l.path, layer, have, false);
        const auto v = rows(spaces[l.space], l.path, layer, have, true);
        const status s = watch([&] { return manager.try_append(l.id, layer, k, v); });
        if (s != status::ok) {
          REQUIRE(manager.cache(l.id)[layer].size() == have);
          manager.truncate(l.id, manager.cache(l.id).size());
          l.path.resize(static_cast<std::size_t>(manager.cache(l.id).size()));
          ++out.refused;
          break;
        }
      }
      REQUIRE(holds(manager.cache(l.id), spaces[l.space], l.path, tolerance));
    } else if (what < 0.75) {
      live& l = pick();
      const index_t to = random.between(0, std::ssize(l.path));
      manager.truncate(l.id, to);
      l.path.resize(static_cast<std::size_t>(to));
      if (manager.cache(l.id).size() < to)
        l.path.resize(static_cast<std::size_t>(manager.cache(l.id).size()));
      manager.truncate(l.id, std::ssize(l.path));
    } else {
      live& l = pick();
      const auto size = manager.cache(l.id).size();
      l.path.resize(static_cast<std::size_t>(std::min(size, std::ssize(l.path))));
      if (random.chance(0.9)) {
        watch([&] { return manager.release(l.id), 0; });
        released[l.space].push_back(l.path);
      } else {
        watch([&] { return manager.drop(l.id), 0; });
      }
      REQUIRE_FALSE(manager.contains(l.id));
      std::swap(l, lives.back());
      lives.pop_back();
    }
    manager.check();
    struct viewed {
      const typename Manager::cache_type& cache;
    };
    std::map<sequence_id, viewed> tables;
    std::set<page_id> pages;
    for (const live& l : lives) {
      const auto table =
          tables.try_emplace(l.id, viewed{manager.cache(l.id)}).first->second.cache.storage().page_table();
      pages.insert(table.begin(), table.end());
    }
    REQUIRE(serving::detail::live_pages(tables) == std::ssize(pages));  // what fits() counts by
  }
  for (const live& l : lives) manager.drop(l.id);
  manager.check();
  return out;
}

}  // namespace serving_test
