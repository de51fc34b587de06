// SPDX-License-Identifier: MIT
#include "serving/manager_script.hpp"

#include <kvcache/codec/sealing.hpp>

#include <array>
#include <optional>
#include <string>
#include <tuple>

using namespace serving_test;

namespace {

// Few kinds only: each takes long to compile. The last is used without its tier, too.
using sealed_pool = page_pool<codec::exact_tail<codec::int8, 16>>;
using plain_manager =
    cache_manager<warm_pool, eviction::lru, serving::no_cold_pool, serving::no_spill_tier, recorder>;
using sealed_manager = cache_manager<sealed_pool>;
using alike_manager = cache_manager<sealed_pool, eviction::lru, sealed_pool>;
using full_manager = cache_manager<warm_pool, eviction::lru, cold_pool, map_tier, recorder>;

}  // namespace

TEST_CASE("with bytes to spare a prompt gets all that was released", "[serving]") {
  plain_manager manager(warm_pool(shape), {.budget_bytes = 64_MiB});
  test::random random;
  std::vector<tokens> earlier;
  for (int i = 0; i < 200; ++i) {
    const tokens path = some_prompt(random, earlier, 200);
    index_t want = 0;
    for (const tokens& t : earlier) want = std::max(want, common(t, path));
    REQUIRE(converse(manager, spaces[1], path) == want);
    earlier.push_back(path);
    manager.check();
  }
  CHECK(manager.hit_rate() > 0.3);
  CHECK(manager.num_live() == 0);
  CHECK(converse(manager, spaces[2], earlier.back()) == 0);  // another space
}

TEST_CASE("random verbs under a small budget keep to it, to the byte", "[serving]") {
  for (const index_t budget : {40'000, 90'000}) {
    for (const index_t slab : {1, 16'384}) {
      CAPTURE(budget, slab);
      plain_manager manager(warm_pool(shape, {.slab_bytes = slab}), {.budget_bytes = budget});
      const outcome out = run_script(manager, 700, 0, 6);
      CHECK(out.reused > 10);
      CHECK(out.refused == manager.observer().refused);
      CHECK(manager.counts().of(rung::refuse) == out.refused);
      CHECK(manager.counts().of(rung::drop) > 20);
      CHECK(manager.observer().reused < 1000000);
    }
  }
}

TEST_CASE("random verbs keep to the budget where a codec keeps a tail", "[serving]") {
  sealed_manager manager(sealed_pool(shape, {.slab_bytes = 1}), {.budget_bytes = 150'000});
  const outcome out = run_script(manager, 500, 1.0F, 5);
  CHECK(out.reused > 40);
  CHECK(manager.counts().of(rung::drop) > 10);
}

TEST_CASE("random verbs with a smaller codec behind the pool", "[serving]") {
  full_manager manager(warm_pool(shape, {.slab_bytes = 1}), {.budget_bytes = 110'000},
                       cold_pool(shape, {.slab_bytes = 1}));
  const outcome out = run_script(manager, 900, 1.5F, 5);
  CHECK(out.reused > 40);
  CHECK(manager.counts().of(rung::recode) > 5);
  CHECK(manager.counts().of(rung::drop) > 5);
  CHECK(manager.observer().decided(decision::recall) > 3);
  CHECK(manager.observer().recoded < 1000000);
  CHECK(manager.observer().recoded == manager.counts().of(rung::recode));
}

TEST_CASE("random verbs with a tier to spill to", "[serving]") {
  map_tier tier;
  full_manager manager(warm_pool(shape, {.slab_bytes = 1}), {.budget_bytes = 90'000},
                       cold_pool(shape, {.slab_bytes = 1}), &tier);
  const outcome out = run_script(manager, 900, 1.5F, 5, &tier);
  CHECK(out.reused > 40);
  CHECK(manager.counts().of(rung::spill) > 5);
  CHECK(tier.gets > 3);
  index_t bytes = 0;
  for (const auto& [key, times] : tier.puts) {
    CHECK(times == 1);  // what the tier has is not written again
    bytes += std::ssize(tier.stored[key]);
  }
  CHECK(manager.observer().spilled == bytes);
}

TEST_CASE("a rung is climbed in the order that was asked for", "[serving]") {
  using serving::ladder_options;
  const auto run = [](const ladder_options& ladder, map_tier& tier) {
    full_manager manager(warm_pool(shape, {.slab_bytes = 1}), {.budget_bytes = 120'000, .ladder = ladder},
                         cold_pool(shape, {.slab_bytes = 1}), &tier);
    index_t refused = 0;
    for (index_t i = 0; i < 40; ++i) {
      refused += converse(manager, spaces[0], counted(1000 * i, 100)) < 0 ? 1 : 0;
      manager.check();
    }
    const auto& c = manager.counts();
    CHECK((refused > 0) == (c.of(rung::refuse) > 0));
    return std::make_tuple(c.of(rung::drop), c.of(rung::recode), c.of(rung::spill), c.of(rung::refuse),
                           manager.observer().decided(decision::compress_first));
  };
  const std::array all{rung::drop, rung::recode, rung::spill, rung::refuse};
  {
    map_tier tier;
    const auto [drop, recode, spill, refuse, decided] = run({.rungs = all}, tier);
    CHECK(recode > 10);
    CHECK(spill > 10);
    CHECK(drop == 0);
    CHECK(refuse == 0);
    CHECK(decided > 0);
  }
  {
    map_tier tier;
    const auto [drop, recode, spill, refuse, decided] = run({.rungs = all, .adapt = false}, tier);
    CHECK(recode + spill + refuse + decided == 0);
    CHECK(drop > 10);
    CHECK(tier.stored.empty());
  }
  {
    map_tier tier;
    const auto [drop, recode, spill, refuse, decided] =
        run({.rungs = {rung::spill, rung::drop, rung::recode, rung::refuse}, .adapt = false}, tier);
    CHECK(recode + drop + refuse == 0);
    CHECK(spill > 10);
  }
  {
    map_tier tier;
    tier.full = true;
    const auto [drop, recode, spill, refuse, decided] =
        run({.rungs = {rung::spill, rung::refuse, rung::drop, rung::recode}, .adapt = false}, tier);
    CHECK(drop + recode == 0);
    CHECK(spill < 20);  // ends of sequences that are no whole block: nobody could find them in a tier
    CHECK(tier.stored.empty());
    CHECK(refuse > 10);
  }
  {
    map_tier tier;
    const auto [drop, recode, spill, refuse, decided] =
        run({.rungs = {rung::refuse, rung::drop, rung::recode, rung::spill}, .adapt = false}, tier);
    CHECK(drop + recode + spill == 0);
    CHECK(refuse > 10);
  }
  CHECK_THROWS_AS(serving::pressure_ladder({.high = 0.8, .low = 0.9}, 100), shape_error);
  CHECK_THROWS_AS(serving::pressure_ladder({.high = 1.5}, 100), shape_error);
  CHECK_THROWS_AS(serving::pressure_ladder({.growth = 1}, 100), shape_error);
  CHECK_THROWS_AS(
      serving::pressure_ladder({.rungs = {rung::drop, rung::drop, rung::spill, rung::refuse}}, 100),
      shape_error);
  CHECK_THROWS_AS(plain_manager(warm_pool(shape), {.budget_bytes = 3000}), shape_error);
}

TEST_CASE("pressure frees down to the low mark, and then there is none for a while", "[serving]") {
  plain_manager manager(warm_pool(shape, {.slab_bytes = 1}),
                        {.budget_bytes = 200'000, .ladder = {.high = 0.9, .low = 0.6}});
  index_t drops = 0, quiet = 0, episodes = 0;
  for (index_t i = 0; i < 100; ++i) {
    REQUIRE(converse(manager, spaces[0], counted(1000 * i, 30)) == 0);
    const auto& use = manager.use();
    const index_t now = manager.counts().of(rung::drop);
    if (now > drops) {
      ++episodes;
      CHECK(use.total - use.free <= 130'000);  // the low mark, and one conversation
    } else if (drops > 0) {
      ++quiet;
    }
    drops = now;
  }
  CHECK(episodes > 2);
  CHECK(quiet > 5 * episodes);
}

TEST_CASE("nothing is re-encoded twice without a use between", "[serving]") {
  full_manager manager(warm_pool(shape, {.slab_bytes = 1}), {.budget_bytes = 150'000},
                       cold_pool(shape, {.slab_bytes = 1}));
  for (index_t i = 0; i < 60; ++i) REQUIRE(converse(manager, spaces[0], counted(1000 * i, 100)) == 0);
  const index_t recodes = manager.counts().of(rung::recode);
  CHECK(recodes > 20);
  CHECK(recodes <= 60);  // each at most once
  index_t recalled = 0;
  for (index_t i = 59; i >= 0 && recalled == 0; --i) {
    const tokens path = counted(1000 * i, 100);
    const auto got = manager.acquire(spaces[0], path);
    REQUIRE(got.code == status::ok);
    recalled = manager.observer().decided(decision::recall);
    const auto there = std::span(path).first(static_cast<std::size_t>(got.reused));
    CHECK(holds(manager.cache(got.id), spaces[0], there, 1.0F));
    manager.release(got.id);
    manager.check();
  }
  CHECK(recalled == 1);
}

TEST_CASE("what many begin with does not keep them from being re-encoded", "[serving]") {
  full_manager manager(warm_pool(shape, {.slab_bytes = 1}),
                       {.budget_bytes = 450'000, .ladder = {.high = 0.8, .low = 0.75}},
                       cold_pool(shape, {.slab_bytes = 1}));
  const auto path_of = [](index_t i) {
    tokens path = counted(0, 640);
    for (const token_id t : counted(100'000 + 1000 * i, 40)) path.push_back(t);
    return path;
  };
  for (index_t i = 0; i < 80; ++i) {
    REQUIRE(converse(manager, spaces[0], path_of(i), 1.0F) >= (i > 0 ? 640 : 0));
    manager.check();
  }
  CHECK(manager.counts().of(rung::recode) > 10);
  CHECK(manager.observer().recoded == manager.counts().of(rung::recode));  // each took less afterwards
  // One of those is found whole.
  index_t recalled = 0;
  for (index_t i = 80; i < 160 && recalled == 0; ++i) {
    REQUIRE(converse(manager, spaces[0], path_of(i), 1.0F) >= 640);
    for (index_t j = i - 1; j > i - 30 && recalled == 0; --j) {
      const auto got = manager.acquire(spaces[0], path_of(j));
      REQUIRE(got.code == status::ok);
      recalled = manager.observer().decided(decision::recall);
      if (recalled > 0) CHECK(got.reused == 680);
      manager.drop(got.id);
    }
  }
  CHECK(recalled == 1);
}

TEST_CASE("the cold pool may be of the type of the warm one", "[serving]") {
  const codec::exact_tail<codec::int8, 16> lean(codec::int8{}, 0);
  alike_manager manager(
      sealed_pool(shape, {.slab_bytes = 1}, codec::exact_tail<codec::int8, 16>(codec::int8{}, 64)),
      {.budget_bytes = 150'000}, sealed_pool(shape, {.slab_bytes = 1}, lean));
  for (index_t i = 0; i < 100; ++i) {
    REQUIRE(converse(manager, spaces[0], counted(1000 * i, 100)) == 0);
    manager.check();
  }
  CHECK(manager.counts().of(rung::recode) > 5);
  CHECK(manager.counts().of(rung::recode) <= 100);  // what is cold is dropped, not re-encoded
  CHECK(manager.counts().of(rung::drop) > 5);
}

TEST_CASE("the limit grows where hits are few and there is memory, unless told not to", "[serving]") {
  for (const bool adapt : {true, false}) {
    plain_manager manager(warm_pool(shape, {.slab_bytes = 1}),
                          {.budget_bytes = 1'000'000, .ladder = {.adapt = adapt, .start_bytes = 100'000}});
    CHECK(manager.limit() == (adapt ? 100'000 : 1'000'000));
    for (index_t i = 0; i < 20; ++i) REQUIRE(converse(manager, spaces[0], counted(1000 * i, 100)) == 0);
    const index_t grown = manager.observer().decided(decision::grow);
    CHECK((grown > 0) == adapt);
    CHECK(manager.counts().of(rung::drop) == 0);
  }
  // With hits it drops instead.
  plain_manager manager(warm_pool(shape, {.slab_bytes = 1}),
                        {.budget_bytes = 1'000'000, .ladder = {.start_bytes = 100'000}});
  for (index_t i = 0; i < 300; ++i) {
    tokens path = counted(0, 100);
    path.push_back(static_cast<token_id>(1000 + i));
    for (const token_id t : counted(0, 20)) path.push_back(t);
    REQUIRE(converse(manager, spaces[0], path) >= (i > 0 ? 96 : 0));
  }
  CHECK(manager.observer().decided(decision::grow) == 0);
  CHECK(manager.counts().of(rung::drop) > 100);
  CHECK(manager.limit() == 100'000);
}

TEST_CASE("what fits can be held, and a refused append changes nothing", "[serving]") {
  for (const index_t budget : {60'000, 100'000, 250'000}) {
    plain_manager manager(warm_pool(shape, {.slab_bytes = 1}), {.budget_bytes = budget});
    for (index_t i = 0; i < 30; ++i) REQUIRE(converse(manager, spaces[0], counted(1000 * i, 50)) >= 0);
    const auto other = manager.acquire(spaces[1], counted(0, 20));
    REQUIRE(compute(manager, other.id, spaces[1], counted(0, 20)) == status::ok);
    index_t most = 0;
    while (manager.fits(most + 16, 16)) most += 16;
    CAPTURE(budget, most);
    CHECK(most * shape.num_layers * row_size * 4 > budget / 2);
    const tokens path = counted(0, most + 16);
    const auto got = manager.acquire(spaces[0], std::span(path).first(static_cast<std::size_t>(most)), 0);
    REQUIRE(got.code == status::ok);
    REQUIRE(manager.extend(got.id, std::span(path).last(16)) == status::ok);
    REQUIRE(compute(manager, got.id, spaces[0], path) == status::ok);
    tokens too_long = path;
    for (int i = 0; i < 10'000; ++i) {
      too_long.push_back(7);
      const index_t bytes_before = manager.use().pages;
      const status s = compute(manager, got.id, spaces[0], too_long);
      manager.check();
      if (s == status::ok) continue;
      CHECK(s == status::out_of_pages);
      too_long.pop_back();
      CHECK(manager.use().pages == bytes_before);
      break;
    }
    CHECK(manager.counts().of(rung::refuse) == 1);
    CHECK(holds(manager.cache(got.id), spaces[0], too_long));
    CHECK(holds(manager.cache(other.id), spaces[1], counted(0, 20)));
    manager.release(other.id);
    too_long.push_back(7);
    CHECK(compute(manager, got.id, spaces[0], too_long) == status::ok);
  }
}

TEST_CASE("what was reserved cannot run out, whatever others take meanwhile", "[serving]") {
  plain_manager manager(warm_pool(shape, {.slab_bytes = 1}), {.budget_bytes = 60'000});
  const tokens path = counted(0, 200), prompt(path.begin(), path.begin() + 20);
  const auto got = manager.acquire(spaces[0], prompt);
  REQUIRE(got.code == status::ok);
  REQUIRE(manager.reserve(got.id, 200) == status::ok);
  const auto other = manager.acquire(spaces[1], counted(0, 1));
  for (tokens taken = counted(0, 1); compute(manager, other.id, spaces[1], taken) == status::ok;)
    taken.push_back(7);
  while (manager.extend(other.id, prompt) == status::ok) continue;
  while (manager.acquire(spaces[2], counted(0, 1)).code == status::ok) continue;
  const index_t refused = manager.counts().of(rung::refuse);
  for (std::size_t size = 21; size <= path.size(); ++size) {
    REQUIRE(manager.extend(got.id, std::span(path).subspan(size - 1, 1)) == status::ok);
    REQUIRE(compute(manager, got.id, spaces[0], std::span(path).first(size)) == status::ok);
  }
  CHECK(manager.counts().of(rung::refuse) == refused);
  CHECK(holds(manager.cache(got.id), spaces[0], path));
  manager.check();
}

TEST_CASE("memory that runs out at any point leaves a manager as it was", "[serving]") {
  const tokens first = counted(0, 70), second = [] {
    tokens t = counted(0, 40);
    for (const token_id x : counted(500, 30)) t.push_back(x);
    return t;
  }();
  index_t failures = 0;
  for (int verb = 0; verb < 4; ++verb) {
    for (std::ptrdiff_t n = 0;; ++n) {
      CAPTURE(verb, n);
      full_manager manager(warm_pool(shape, {.slab_bytes = 1}), {.budget_bytes = 120'000},
                           cold_pool(shape, {.slab_bytes = 1}));
      for (index_t i = 0; i < 12; ++i)
        REQUIRE(converse(manager, spaces[0], counted(10'000 + 1000 * i, 70)) == 0);
      REQUIRE(converse(manager, spaces[0], first) == 0);
      sequence_id id{};
      if (verb > 0) {
        id = manager.acquire(spaces[0], second).id;
        if (verb > 1) REQUIRE(compute(manager, id, spaces[0], second) == status::ok);
      }
      const index_t live = manager.num_live();
      const index_t size = verb > 0 ? manager.cache(id)[0].size() : 0;
      const auto k = rows(spaces[0], second, 0, 40, false), v = rows(spaces[0], second, 0, 40, true);
      status s = status::ok;
      bool reached = false;
      {
        const heap::failing out_of_memory(n);
        if (verb == 0) s = manager.acquire(spaces[0], second).code;
        if (verb == 1) s = manager.try_append(id, 0, k, v);
        if (verb == 2) s = manager.extend(id, second);
        if (verb == 3) manager.release(id);
        reached = heap::failing::happened();
      }
      manager.check();
      if (verb == 3) REQUIRE(manager.num_live() == 0);
      if (s != status::ok) {
        ++failures;
        REQUIRE(s == status::out_of_memory);
        REQUIRE(manager.num_live() == live);
        if (verb > 0) REQUIRE(manager.cache(id)[0].size() == size);
        if (verb > 0) REQUIRE(manager.tokens(id).size() == second.size());
      }
      if (!reached) break;
    }
  }
  CHECK(failures >= 4);
}

TEST_CASE("a tier that gives back something else is not believed", "[serving]") {
  map_tier tier;
  full_manager manager(
      warm_pool(shape, {.slab_bytes = 1}),
      {.budget_bytes = 60'000,
       .ladder = {.rungs = {rung::spill, rung::refuse, rung::drop, rung::recode}, .adapt = false}},
      cold_pool(shape, {.slab_bytes = 1}), &tier);
  for (index_t i = 0; i < 30; ++i) REQUIRE(converse(manager, spaces[0], counted(1000 * i, 64)) == 0);
  REQUIRE(tier.stored.size() > 20);
  for (index_t kind = 0; kind < 6; ++kind) {
    CAPTURE(kind);
    const tokens path = counted(1000 * kind, 64);
    const auto key = map_tier::key_of(spaces[0], std::span(path).first(16));
    REQUIRE(tier.stored.contains(key));
    std::vector<std::byte>& bytes = tier.stored[key];
    if (kind == 0) bytes.clear();
    if (kind == 1) bytes.resize(bytes.size() / 2);
    if (kind == 2) bytes[bytes.size() / 2] ^= std::byte{1};
    if (kind == 3) bytes[9] ^= std::byte{1};
    if (kind == 4) bytes = tier.stored[map_tier::key_of(spaces[0], std::span(path).first(32))];
    const auto got = manager.acquire(spaces[0], path);
    REQUIRE(got.code == status::ok);
    if (kind < 4) CHECK(got.reused == 0);
    if (kind < 4) CHECK_FALSE(tier.stored.contains(key));
    if (kind == 5) CHECK(got.reused == 64);
    if (kind == 5) CHECK(holds(manager.cache(got.id), spaces[0], path));
    manager.drop(got.id);
  }
}

TEST_CASE("times and attention are told to the observer", "[serving]") {
  static double now = 0;
  plain_manager manager(warm_pool(shape), {.budget_bytes = 8_MiB, .clock = [] { return now += 0.5; }});
  CHECK(converse(manager, spaces[0], counted(0, 50)) == 0);
  CHECK(converse(manager, spaces[0], counted(0, 60)) == 50);
  manager.attended(60, 0.25);
  const recorder& told = manager.observer();
  CHECK(told.asked == 110);
  CHECK(told.hit == 50);
  CHECK(told.reused == 1);
  CHECK(told.appended == 60);
  CHECK(told.seconds == 0.5 * 2 * 2);  // two conversations, two layers
  CHECK(told.attended == 0.25);
  CHECK(manager.counts().times == told.taken.times);
}
