// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include "examples/allocation_watch.hpp"
#include "examples/temporary_folder.hpp"
#include "store/tier_conformance.hpp"

#include <kvcache/store/lmdb_tier.hpp>

#include <csignal>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

using namespace kvcache;
using namespace kvcache::store;
using tiers::bytes;
using tiers::path;

namespace {

struct lmdb_place {
  static constexpr bool empty_is_nothing = false;

  model_files::temporary_folder folder;
  lmdb_options options{.map_bytes = 128_MiB, .sync = false};

  [[nodiscard]] std::unique_ptr<lmdb_tier> open() const {
    return std::make_unique<lmdb_tier>(folder.path() / "tier", options);
  }

  // -- the tables behind the tier's back; no tier may be open
  template <class Use>
  void with_tables(Use use) const {
    store::detail::lmdb_environment env;
    REQUIRE(env.open((folder.path() / "tier").string(), 128U << 20U, MDB_NOSYNC, 0600) == 0);
    REQUIRE(env.write([&](MDB_txn* txn) {
      use(txn, env);
      return 0;
    }) == 0);
  }
  template <class Use>
  void with_table(Use use) const {
    with_tables([&](MDB_txn* txn, const store::detail::lmdb_environment& env) { use(txn, env.records()); });
  }
  [[nodiscard]] std::optional<bytes> raw(const tier_key& key) const {
    std::optional<bytes> result;
    with_table([&](MDB_txn* txn, MDB_dbi records) {
      const digest256 name = record_name(key);
      MDB_val k = store::detail::lmdb_value(name);
      MDB_val value{};
      if (::mdb_get(txn, records, &k, &value) != 0) return;
      const auto found = store::detail::lmdb_bytes(value);
      result.emplace(found.begin(), found.end());
    });
    return result;
  }
  void set_raw(const tier_key& key, const bytes& record) const {
    with_table([&](MDB_txn* txn, MDB_dbi records) {
      const digest256 name = record_name(key);
      MDB_val k = store::detail::lmdb_value(name);
      MDB_val value = store::detail::lmdb_value(record);
      REQUIRE(::mdb_put(txn, records, &k, &value, 0) == 0);
    });
  }
};

}  // namespace

TEST_CASE("an LMDB file does what every tier does", "[store]") {
  lmdb_place place;
  SECTION("verbs") { tiers::agrees_with_a_map(place); }
  SECTION("limits") { tiers::refuses_long_keys(place); }
  SECTION("damage") { tiers::misses_what_is_damaged(place); }
  SECTION("processes") { tiers::serves_processes_at_once(place, 4, 1500); }
  SECTION("processes, with little room") {
    place.options.map_bytes = 1_MiB;
    tiers::serves_processes_at_once(place, 3, 1000);
  }
  SECTION("no memory") {
    tiers::misses_without_memory(place, [](long n) { model_files::allocations_until_failure = n; });
  }
  SECTION("kills") { tiers::survives_kills(place, 25); }
}

TEST_CASE("a full LMDB file drops what was used least recently", "[store]") {
  lmdb_place place;
  place.options.map_bytes = 2_MiB;
  auto tier = place.open();
  bytes out;
  constexpr std::uint32_t count = 200;
  for (std::uint32_t who = 0; who < count; ++who) {
    REQUIRE(tier->put("s", tiers::token_path(who), tiers::payload_of(who, 0, 30'000)));
    if (who % 10 == 0) REQUIRE(tier->get("s", path{0}, out));
    REQUIRE(tier->bytes() <= 2_MiB / 4 * 3);
  }
  CHECK(tier->stats().errors == 0);
  CHECK(tier->stats().evicted > 100);
  CHECK(tier->contains("s", path{0}));  // used all the time
  CHECK_FALSE(tier->contains("s", path{1}));
  CHECK(tier->contains("s", path{count - 1}));
  std::uint32_t num_left = 0;
  for (std::uint32_t who = 0; who < count; ++who) {
    if (!tier->get("s", tiers::token_path(who), out)) continue;
    ++num_left;
    REQUIRE(out == tiers::payload_of(who, 0, 30'000));
  }
  CHECK(num_left == count - static_cast<std::uint32_t>(tier->stats().evicted));
  CHECK(num_left >= 30);
}

TEST_CASE("records of any size follow each other in a small LMDB file for ever", "[store]") {
  lmdb_place place;
  place.options.map_bytes = 4_MiB;
  test::random random;
  auto tier = place.open();
  bytes out;
  int num_lost = 0;
  for (int i = 0; i < 600; ++i) {
    const auto who = static_cast<std::uint32_t>(random.below(40));
    const auto size = static_cast<std::size_t>(random.below(random.chance(0.2) ? 500'000 : 5000));
    const bytes payload = tiers::payload_of(who, 0, size);
    if (!tier->put("s", tiers::token_path(who), payload)) {
      ++num_lost;
      continue;
    }
    REQUIRE(tier->get("s", tiers::token_path(who), out));
    REQUIRE(out == payload);
  }
  CHECK(num_lost == 0);
  CHECK_FALSE(tier->put("s", path{1}, bytes(600'000)));  // more than an eighth
  CHECK(tier->stats().refused == 1);
  CHECK(tier->stats().errors == 0);
}

TEST_CASE("an LMDB file that a reader keeps full refuses changes, and takes them when it is done",
          "[store]") {
  lmdb_place place;
  place.options.map_bytes = 1_MiB;
  auto tier = place.open();
  const bytes payload = tiers::payload_of(1, 0, 50'000);
  REQUIRE(tier->put("s", path{1}, payload));
  REQUIRE(tier->put("s", path{2}, payload));
  int begun[2];
  int done[2];
  REQUIRE(::pipe(begun) == 0);
  REQUIRE(::pipe(done) == 0);
  const ::pid_t reader = tiers::start([&] {
    bool same = false;
    char c = 0;
    const bool hit = place.open()->view("s", path{1}, [&](std::span<const std::byte> p) {
      if (::write(begun[1], &c, 1) != 1 || ::read(done[0], &c, 1) != 1) return;
      same = std::equal(p.begin(), p.end(), payload.begin(), payload.end());
    });
    return hit && same ? 0 : 1;
  });
  char c = 0;
  REQUIRE(::read(begun[0], &c, 1) == 1);
  bytes out;
  int num_refused = 0;
  for (token_id i = 0; num_refused < 3 && i < 1000; ++i) {
    const bytes other = tiers::payload_of(i, 1, 50'000);
    if (tier->put("s", path{2}, other)) {
      REQUIRE(tier->get("s", path{2}, out));
      REQUIRE(out == other);
    } else {
      ++num_refused;
    }
  }
  REQUIRE(num_refused == 3);
  for (token_id i = 0; i < 20; ++i) {  // small changes find room for longer, but not for ever
    if (tier->put("s", path{3}, bytes(10)) && !tier->erase("s", path{3})) break;
  }
  CHECK(tier->stats().refused > 3);
  CHECK(tier->stats().errors == 0);
  REQUIRE(::write(done[1], &c, 1) == 1);
  CHECK(tiers::result_of(reader) == 0);  // what it had before it stays
  CHECK(tier->put("s", path{2}, payload));
  CHECK((tier->erase("s", path{3}) || !tier->contains("s", path{3})));
  CHECK(tier->get("s", path{2}, out));
  CHECK(out == payload);
  CHECK(tier->stats().errors == 0);
  for (const int file : {begun[0], begun[1], done[0], done[1]}) ::close(file);
}

TEST_CASE("an LMDB file opened with a smaller map goes on within it", "[store]") {
  lmdb_place place;
  place.options.map_bytes = 8_MiB;
  {
    auto tier = place.open();
    for (token_id who = 0; who < 300; ++who)
      REQUIRE(tier->put("s", path{who}, tiers::payload_of(who, 0, 30'000)));
  }
  place.options.map_bytes = 2_MiB;
  auto tier = place.open();
  bytes out;
  for (token_id who = 1000; who < 1100; ++who) {
    REQUIRE(tier->put("s", path{who}, tiers::payload_of(who, 0, 30'000)));
    REQUIRE(tier->get("s", path{who}, out));
    REQUIRE(out == tiers::payload_of(who, 0, 30'000));
  }
  CHECK(tier->bytes() <= 2_MiB / 4 * 3);
  CHECK(tier->stats().errors + tier->stats().refused == 0);
}

TEST_CASE("an LMDB file whose tables contradict each other is still bounded and right", "[store]") {
  lmdb_place place;
  place.options.map_bytes = 2_MiB;
  const auto fill = [&](token_id first) {
    auto tier = place.open();
    bytes out;
    for (token_id who = first; who < first + 100; ++who) {
      REQUIRE(tier->put("s", path{who}, tiers::payload_of(who, 0, 30'000)));
      REQUIRE(tier->get("s", path{who}, out));
      REQUIRE(out == tiers::payload_of(who, 0, 30'000));
    }
    CHECK(tier->bytes() <= 2_MiB / 4 * 3);
    CHECK(tier->stats().errors + tier->stats().refused + tier->stats().damaged == 0);
  };
  fill(0);
  const bytes name(32, std::byte{7});
  // \param key  in `order`, which is taken to be the first or the last use
  const auto call_used = [&](const bytes& key, const bytes& value) {
    place.with_tables([&](MDB_txn* txn, const store::detail::lmdb_environment& env) {
      MDB_val k = store::detail::lmdb_value(key);
      MDB_val v = store::detail::lmdb_value(value);
      REQUIRE(::mdb_put(txn, env.order(), &k, &v, 0) == 0);
    });
  };
  SECTION("a first use of 3 bytes") { call_used(bytes(3), name); }
  SECTION("a first use of 9 bytes, of nothing") { call_used(bytes(9), {}); }
  SECTION("a first use of 8 bytes, of nothing") { call_used(bytes(8), bytes(5)); }
  SECTION("last uses of 20 bytes and of 8") {
    call_used(bytes(20, std::byte{255}), name);
    call_used(bytes(8, std::byte{255}), name);
  }
  SECTION("no uses at all") {
    place.with_tables([&](MDB_txn* txn, const store::detail::lmdb_environment& env) {
      REQUIRE(::mdb_drop(txn, env.order(), 0) == 0);
      REQUIRE(::mdb_drop(txn, env.uses(), 0) == 0);
    });
  }
  SECTION("no order") {
    place.with_tables([&](MDB_txn* txn, const store::detail::lmdb_environment& env) {
      REQUIRE(::mdb_drop(txn, env.order(), 0) == 0);
    });
  }
  SECTION("the uses of records are 3 bytes") {
    place.with_tables([&](MDB_txn* txn, const store::detail::lmdb_environment& env) {
      for (token_id who = 0; who < 100; ++who) {
        const path tokens{who};
        const digest256 digest = record_name({"s", tokens});
        const bytes use(3);
        MDB_val k = store::detail::lmdb_value(digest);
        MDB_val v = store::detail::lmdb_value(use);
        REQUIRE(::mdb_put(txn, env.uses(), &k, &v, 0) == 0);
      }
    });
  }
  fill(50);
  fill(500);
}

TEST_CASE("a view of an LMDB record copies nothing and ends however its use ends", "[store]") {
  lmdb_place place;
  auto tier = place.open();
  const bytes payload = tiers::payload_of(1, 0, 100'000);
  REQUIRE(tier->put("s", path{1}, payload));
  const std::byte* first = nullptr;
  const std::byte* second = nullptr;
  REQUIRE(tier->view("s", path{1}, [&](std::span<const std::byte> p) {
    first = p.data();
    CHECK(std::equal(p.begin(), p.end(), payload.begin(), payload.end()));
  }));
  REQUIRE(tier->view("s", path{1}, [&](std::span<const std::byte> p) { second = p.data(); }));
  CHECK(first == second);  // where it lies in the map
  CHECK_THROWS_AS(
      tier->view("s", path{1}, [](std::span<const std::byte>) { throw std::runtime_error("no"); }),
      std::runtime_error);
  CHECK(tier->view("s", path{1}, [](std::span<const std::byte>) {}));
  CHECK(tier->put("s", path{2}, payload));
  CHECK_FALSE(tier->view("s", path{3}, [](std::span<const std::byte>) {}));
}

TEST_CASE("an LMDB file that cannot be used misses and counts it", "[store]") {
  lmdb_place place;
  bytes out(1);
  const auto misses = [&](lmdb_tier& tier) {
    CHECK_FALSE(tier.put("s", path{1}, bytes(10)));
    CHECK_FALSE(tier.get("s", path{1}, out));
    CHECK(out.empty());
    CHECK_FALSE(tier.contains("s", path{1}));
    CHECK_FALSE(tier.erase("s", path{1}));
    CHECK(tier.bytes() == 0);
    CHECK(tier.stats().misses == 1);
    CHECK(tier.stats().errors + tier.stats().unreachable >= 5);
  };
  SECTION("another file") {
    std::filesystem::create_directories(place.folder.path() / "tier");
    place.folder.write("tier/data.mdb", std::string(10'000, 'x'));
    misses(*place.open());
  }
  SECTION("no folder can be there") {
    place.folder.write("tier", "a file");
    auto tier = place.open();
    misses(*tier);
    std::filesystem::remove(place.folder.path() / "tier");
    ::usleep(1'050'000);
    CHECK(tier->put("s", path{1}, bytes(10)));  // it is tried again after a second
    CHECK(tier->get("s", path{1}, out));
  }
  SECTION("a process that forked") {
    auto tier = place.open();
    REQUIRE(tier->put("s", path{1}, bytes(10)));
    CHECK(tiers::result_of(tiers::start([&] {
            const bool hit = tier->get("s", path{1}, out) || tier->put("s", path{2}, out);
            tier.reset();
            return hit ? 1 : 0;
          })) == 0);
    CHECK(tier->get("s", path{1}, out));
  }
  SECTION("an impossible map") {
    place.options.map_bytes = 1000;
    CHECK_THROWS_AS(place.open(), shape_error);
  }
}

TEST_CASE("an LMDB file with flipped bits in its records misses", "[store]") {
  lmdb_place place;
  const bytes payload = tiers::payload_of(3, 0, 20'000);
  REQUIRE(place.open()->put("s", path{1}, payload));
  const auto file = place.folder.path() / "tier" / "data.mdb";
  std::string text;
  {
    std::ifstream in(file, std::ios::binary);
    text.assign(std::istreambuf_iterator<char>(in), {});
  }
  const auto at = text.find(std::string(reinterpret_cast<const char*>(payload.data()), 100));
  REQUIRE(at != std::string::npos);
  test::random random;
  for (int i = 0; i < 20; ++i) {
    std::string changed = text;
    changed[at + static_cast<std::size_t>(random.below(20'000))] ^= static_cast<char>(1 << random.below(8));
    place.folder.write("tier/data.mdb", changed);
    auto tier = place.open();
    bytes out;
    REQUIRE_FALSE(tier->get("s", path{1}, out));
    REQUIRE(tier->stats().damaged == 1);
    REQUIRE(tier->put("s", path{1}, payload));
    REQUIRE(tier->get("s", path{1}, out));
  }
}
