// SPDX-License-Identifier: MIT
// What every tier must do, whatever it is made of. A place is where records are kept; it makes tiers that open it, and
// reads and writes what is stored there behind their backs:
//
//   auto tier = place.open();                    // a std::unique_ptr
//   place.raw(key), place.set_raw(key, bytes)    // the record of a key, nothing if there is none
#pragma once

#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/store/tier.hpp>
#include <kvcache/store/tier_record.hpp>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace tiers {

using kvcache::index_t;
using kvcache::store::tier_key;
using bytes = std::vector<std::byte>;
using kvcache::token_id;
using path = std::vector<token_id>;

/// Bytes that tell whose they are: any mixture with others is found out by is_payload_of().
inline bytes payload_of(std::uint64_t who, std::uint64_t version, std::size_t size) {
  bytes result(size);
  std::uint64_t z = who * 0x9E3779B97F4A7C15U + version;
  for (std::size_t i = 0; i < size; ++i) {
    if (i % 8 == 0) z = (z ^ (z >> 29)) * 0xBF58476D1CE4E5B9U + 1;
    result[i] = static_cast<std::byte>(z >> (8 * (i % 8)));
  }
  return result;
}
inline std::size_t size_of(std::uint64_t who, std::uint64_t version) {
  return (who * 7919 + version * 104729) % 9000;
}

/// Paths that tell whose they are: one of a single token, and one of four.
inline path token_path(std::uint32_t who) { return {static_cast<token_id>(who)}; }
inline path path_of(std::uint32_t who) {
  return {static_cast<token_id>(who), 7, static_cast<token_id>(who * 3), 11};
}

/// Every payload is one of versions 0 to 3.
inline bool is_payload_of(std::uint64_t who, const bytes& payload) {
  for (std::uint64_t version = 0; version < 4; ++version) {
    if (payload == payload_of(who, version, size_of(who, version))) return true;
  }
  return false;
}

/// Runs `body` in a process of its own, which ends with its result. \return the process
template <class Body>
::pid_t start(Body body) {
  const ::pid_t child = ::fork();
  if (child == 0) {
    int result = 99;
    try {
      result = body();
    } catch (...) {
    }
    ::_exit(result);
  }
  return child;
}
inline int result_of(::pid_t child) {
  int status = 0;
  if (::waitpid(child, &status, 0) != child) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/// Random verbs against a map. The tier must have room for everything.
template <class Place>
void agrees_with_a_map(Place& place) {
  test::random random;
  auto tier = place.open();
  std::map<std::pair<std::string, path>, bytes> model;
  // Keys that are one when their parts are joined carelessly, and such with odd bytes.
  const std::vector<std::pair<std::string, path>> keys{
      {"", {}},
      {"a", {}},
      {"", {0x61}},
      {"a", {1, 2}},
      {"a", {1}},
      {"a", {1, 2, 3}},
      {"a\1", {}},
      {"ab", {1}},
      {"a", {0x62, 1}},
      {std::string("a\0b", 3), {1}},
      {std::string("a\0c", 3), {1}},
      {"{x}:1", {9}},
      {"../../x", {9}},
      {std::string(4096, 's'), path(300, 5)},
  };
  const std::size_t sizes[] = {0, 1, 63, 64, 65, 4095, 4096, 20'000};
  for (int step = 0; step < 400; ++step) {
    const auto& key = keys[static_cast<std::size_t>(random.below(static_cast<std::ptrdiff_t>(keys.size())))];
    const auto& [space, tokens] = key;
    const bool known = model.count(key) != 0;
    switch (random.below(5)) {
      case 0:
      case 1: {
        const bytes payload = payload_of(random(), 0, sizes[random.below(8)]);
        REQUIRE(tier->put(space, tokens, payload));
        model[key] = payload;
        break;
      }
      case 2:
        REQUIRE(tier->contains(space, tokens) == known);
        break;
      case 3:
        if (!random.chance(0.3)) break;
        REQUIRE(tier->erase(space, tokens) == known);
        model.erase(key);
        break;
      default: {
        bytes out(3);
        REQUIRE(tier->get(space, tokens, out) == known);
        REQUIRE(out == (known ? model[key] : bytes()));
      }
    }
    if (step == 200) {
      tier.reset();  // what is stored outlives the object
      tier = place.open();
    }
  }
  CHECK(tier->stats().errors == 0);
  CHECK(tier->stats().damaged == 0);
  CHECK(tier->stats().foreign == 0);
  for (const auto& [key, payload] : model) CHECK(tier->erase(key.first, key.second));
}

/// A key beyond the limits is refused, and no more.
template <class Place>
void refuses_long_keys(Place& place) {
  auto tier = place.open();
  bytes out(1);
  const path long_path(kvcache::store::max_path_tokens + 1);
  const std::string long_space(kvcache::store::max_space_bytes + 1, 'x');
  CHECK_FALSE(tier->put("a", long_path, bytes(10)));
  CHECK_FALSE(tier->put(long_space, path{1}, bytes(10)));
  CHECK(tier->stats().refused == 2);
  CHECK_FALSE(tier->get("a", long_path, out));
  CHECK(out.empty());
  CHECK_FALSE(tier->contains(long_space, path{1}));
  CHECK_FALSE(tier->erase(long_space, path{1}));
  CHECK(tier->put("a", path(kvcache::store::max_path_tokens), bytes(10)));
  CHECK(tier->get("a", path(kvcache::store::max_path_tokens), out));
  CHECK(out == bytes(10));
  CHECK(tier->erase("a", path(kvcache::store::max_path_tokens)));
  CHECK(tier->stats().errors == 0);
}

/// Every byte of a record changed, the record cut at every length, made longer, or another one put in its place: a miss that
/// is counted, and the record is gone.
template <class Place>
void misses_what_is_damaged(Place& place) {
  const path tokens{1, 2, 3, 4, 5};
  const path other{1, 2, 3, 4, 6};
  const tier_key key{"me", tokens};
  const bytes payload = payload_of(1, 0, 40);
  auto tier = place.open();
  REQUIRE(tier->put("me", tokens, payload));
  REQUIRE(tier->put("me", other, payload));
  REQUIRE(tier->put("you", tokens, payload));
  tier.reset();
  const bytes good = place.raw(key).value();
  const bytes of_others[] = {place.raw({"me", other}).value(), place.raw({"you", tokens}).value()};
  REQUIRE(good.size() == 128 + 40);

  std::vector<std::pair<bytes, bool>> bad;  // and whether it is foreign, not damaged
  for (std::size_t i = 0; i < good.size(); ++i) {
    bad.emplace_back(good, i < 12);  // magic and version
    bad.back().first[i] ^= static_cast<std::byte>(1U << (i % 8));
  }
  for (std::size_t n = 0; n < good.size(); ++n)
    bad.emplace_back(bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(n)), false);
  bad.emplace_back(good, false);
  bad.back().first.push_back(std::byte{0});
  for (const bytes& record : of_others) bad.emplace_back(record, true);
  bad.emplace_back(bytes(500, std::byte{'x'}), true);

  for (const auto& [record, is_foreign] : bad) {
    CAPTURE(record.size(), is_foreign);
    place.set_raw(key, record);
    tier = place.open();
    const auto before = tier->stats();
    bytes out(7);
    const bool hit = tier->get("me", tokens, out);
    REQUIRE_FALSE(hit);
    REQUIRE(out.empty());
    // A server knows no difference between an empty value and none.
    if (!(record.empty() && Place::empty_is_nothing)) {
      REQUIRE(tier->stats().foreign - before.foreign == (is_foreign ? 1 : 0));
      REQUIRE(tier->stats().damaged - before.damaged == (is_foreign ? 0 : 1));
      REQUIRE_FALSE(tier->contains("me", tokens));
    }
    tier.reset();
    if (!(record.empty() && Place::empty_is_nothing)) REQUIRE_FALSE(place.raw(key).has_value());
  }
  // `contains` looks at the head.
  for (std::size_t i = 0; i < good.size(); i += 5) {
    bytes record = good;
    record[i] ^= std::byte{0x80};
    place.set_raw(key, record);
    tier = place.open();
    REQUIRE(tier->contains("me", tokens) == (i >= 128));
    tier.reset();
  }
  tier = place.open();
  CHECK(tier->put("me", tokens, payload));
  bytes out;
  CHECK(tier->get("me", tokens, out));
  CHECK(out == payload);
}

/// Every allocation of every verb fails once: no exception, no wrong bytes, and afterwards all is as it should be.
/// \param fail_at  sets after how many allocations one fails; negative: none
template <class Place, class FailAt>
void misses_without_memory(Place& place, FailAt fail_at) {
  auto tier = place.open();
  const path tokens = path_of(3);
  const bytes small = payload_of(3, 0, 3000);
  const bytes large = payload_of(3, 1, 60'000);
  REQUIRE(tier->put("s", tokens, small));
  for (long n = 0; n < 60; ++n) {
    bytes out;
    fail_at(n);
    const bool hit = tier->get("s", tokens, out);
    fail_at(-1);
    REQUIRE((hit ? out == small || out == large : out.empty()));
    fail_at(n);
    (void)tier->put("s", tokens, n % 2 == 0 ? large : small);
    (void)tier->contains("s", tokens);
    fail_at(-1);
    fail_at(n);
    (void)tier->erase("t", tokens);
    fail_at(-1);
    if (tier->get("s", tokens, out)) REQUIRE((out == small || out == large));
  }
  CHECK(tier->stats().errors > 0);
  CHECK(tier->stats().damaged == 0);
  for (int i = 0; i < 100 && !tier->put("s", tokens, large); ++i) ::usleep(10'000);
  bytes out;
  CHECK(tier->get("s", tokens, out));
  CHECK(out == large);
}

/// Processes that change the same few keys at once: whoever reads, reads what somebody wrote under that key.
template <class Place>
void serves_processes_at_once(Place& place, int num_processes, int num_steps) {
  std::vector<::pid_t> children;
  children.reserve(static_cast<std::size_t>(num_processes));
  for (int p = 0; p < num_processes; ++p) {
    children.push_back(start([&] {
      test::random random(static_cast<std::uint64_t>(p) + 1);
      auto tier = place.open();
      int num_hits = 0;
      for (int step = 0; step < num_steps; ++step) {
        const auto who = static_cast<std::uint32_t>(random.below(12));
        const path tokens = path_of(who);
        bytes out;
        switch (random.below(8)) {
          case 0:
            (void)tier->erase("shared", tokens);
            break;
          case 1:
          case 2:
          case 3: {
            const auto version = static_cast<std::uint64_t>(random.below(4));
            (void)tier->put("shared", tokens, payload_of(who, version, size_of(who, version)));
            break;
          }
          default:
            if (!tier->get("shared", tokens, out)) break;
            ++num_hits;
            if (!is_payload_of(who, out)) return 1;
        }
      }
      if (tier->stats().damaged + tier->stats().foreign != 0) return 2;
      if (tier->stats().errors != 0) return 3;
      return num_hits > 0 ? 0 : 4;
    }));
  }
  for (const ::pid_t child : children) CHECK(result_of(child) == 0);
}

/// Writers killed at any moment: what is there afterwards is whole.
template <class Place>
void survives_kills(Place& place, int num_kills) {
  test::random random;
  for (int round = 0; round < num_kills; ++round) {
    const ::pid_t child = start([&] {
      test::random own(static_cast<std::uint64_t>(round) + 100);
      auto tier = place.open();
      for (;;) {
        const auto who = static_cast<std::uint32_t>(own.below(12));
        const auto version = static_cast<std::uint64_t>(own.below(4));
        (void)tier->put("shared", path_of(who), payload_of(who, version, size_of(who, version)));
        if (own.chance(0.1)) (void)tier->erase("shared", path_of(who));
      }
      return 0;
    });
    ::usleep(static_cast<unsigned>(2000 + random.below(15'000)));
    (void)::kill(child, SIGKILL);
    CHECK(result_of(child) == -SIGKILL);
    auto tier = place.open();
    for (std::uint32_t who = 0; who < 12; ++who) {
      bytes out;
      if (tier->get("shared", path_of(who), out)) REQUIRE(is_payload_of(who, out));
    }
    REQUIRE(tier->stats().damaged == 0);
    REQUIRE(tier->stats().errors == 0);
    REQUIRE(tier->put("shared", path_of(0), payload_of(0, 0, size_of(0, 0))));
  }
}

}  // namespace tiers
