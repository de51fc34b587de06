// SPDX-License-Identifier: MIT
// Starts its own servers on the loopback interface; without redis-server it says so and checks what needs none.
#include "support/catch.hpp"
#include "support/random.hpp"

#include "examples/allocation_watch.hpp"
#include "store/redis_server.hpp"
#include "store/tier_conformance.hpp"

#include <kvcache/store/redis_tier.hpp>

#include <chrono>
#include <csignal>
#include <deque>
#include <memory>
#include <string>
#include <vector>

using namespace kvcache;
using namespace kvcache::store;
using std::chrono::milliseconds;
using tiers::bytes;
using tiers::path;

namespace {

bool have_server() {
  if (tiers::find_redis_server()) return true;
  WARN("neither redis-server nor valkey-server is installed: not tested");
  return false;
}

redis_options options_for(int port) {
  return {.servers = {{.port = port}},
          .link = {.command_timeout = milliseconds(10'000),
                   .first_pause = milliseconds(20),
                   .longest_pause = milliseconds(100)}};
}

std::string name_of(const tier_key& key, const std::string& prefix = "kvcache") {
  return prefix + ":1:{" + to_hex(record_name(key)) + "}";
}

struct redis_place {
  static constexpr bool empty_is_nothing = false;

  tiers::redis_server server;

  [[nodiscard]] std::unique_ptr<redis_tier> open() const {
    return std::make_unique<redis_tier>(options_for(server.port()));
  }
  [[nodiscard]] std::optional<bytes> raw(const tier_key& key) const {
    const std::string name = name_of(key);
    if (server.say({"EXISTS", name}) != "1") return std::nullopt;
    const std::string text = server.say({"GET", name});
    const auto b = std::as_bytes(std::span(text));
    return bytes(b.begin(), b.end());
  }
  void set_raw(const tier_key& key, const bytes& record) const {
    REQUIRE(server.say({"SET", name_of(key),
                        std::string(reinterpret_cast<const char*>(record.data()), record.size())}) == "OK");
  }
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("slots and redirects are those of the cluster specification", "[store]") {
  using store::detail::parse_redirect;
  using store::detail::redis_slot;
  CHECK(redis_slot("123456789") == 0x31C3);
  CHECK(redis_slot("foo") == 12182);
  CHECK(redis_slot("{foo}bar") == 12182);
  CHECK(redis_slot("a{foo}{bar}") == 12182);
  CHECK(redis_slot("foo{}{bar}") == redis_slot("foo{}{bar}"));
  CHECK(redis_slot("foo{}{bar}") != redis_slot("bar"));
  CHECK(redis_slot("foo{{bar}}zap") == redis_slot("{bar"));
  CHECK(redis_slot("") == 0);

  const auto moved = parse_redirect("MOVED 3999 127.0.0.1:6381");
  REQUIRE(moved);
  CHECK((!moved->ask && moved->slot == 3999 && moved->to == redis_address{"127.0.0.1", 6381}));
  const auto ask = parse_redirect("ASK 16383 ::1:7000");
  REQUIRE(ask);
  CHECK((ask->ask && ask->slot == 16383 && ask->to == redis_address{"::1", 7000}));
  CHECK(parse_redirect("MOVED 1 :7000")->to.host.empty());
  for (const char* text :
       {"", "MOVED", "MOVED ", "MOVED 1", "MOVED 16384 a:1", "MOVED -1 a:1", "MOVED 1 a:0", "MOVED 1 a:65536",
        "MOVED 1 a:", "MOVED x a:1", "ASK 1 a", "ASKING 1 a:1", "ERR MOVED 1 a:1", "MOVED a:1 2",
        "MOVED 99999999999999999999 a:1", "MOVED 1 a:1 "})
    CHECK_FALSE(parse_redirect(text));
}

TEST_CASE("a Redis server does what every tier does", "[store]") {
  if (!have_server()) return;
  redis_place place;
  SECTION("verbs") { tiers::agrees_with_a_map(place); }
  SECTION("limits") { tiers::refuses_long_keys(place); }
  SECTION("damage") { tiers::misses_what_is_damaged(place); }
  SECTION("processes") { tiers::serves_processes_at_once(place, 4, 600); }
  SECTION("no memory") {
    tiers::misses_without_memory(place, [](long n) { model_files::allocations_until_failure = n; });
  }
  SECTION("kills") { tiers::survives_kills(place, 10); }
}

TEST_CASE("a record of many parts is put, got, replaced and erased as one", "[store]") {
  if (!have_server()) return;
  redis_place place;
  auto tier = place.open();
  const tier_key key{"s", {}};
  const std::size_t part = 4U << 20U;
  bytes out;
  for (const std::size_t size :
       {part - 64, part - 63, 3 * part - 64, std::size_t{10} << 20U, std::size_t{9} << 20U}) {
    const bytes payload = tiers::payload_of(size, 0, size);
    REQUIRE(tier->put("s", {}, payload));
    REQUIRE(tier->get("s", {}, out));
    REQUIRE(out == payload);
    REQUIRE(place.server.say({"DBSIZE"}) == std::to_string((size + 64 + part - 1) / part));
  }
  SECTION("replaced by a small one") {
    REQUIRE(tier->put("s", {}, bytes(5)));
    CHECK(place.server.say({"DBSIZE"}) == "1");
    CHECK(tier->get("s", {}, out));
    CHECK(out == bytes(5));
  }
  SECTION("erased") {
    CHECK(tier->erase("s", {}));
    CHECK(place.server.say({"DBSIZE"}) == "0");
    CHECK_FALSE(tier->get("s", {}, out));
  }
  SECTION("a part is missing, another one's, or damaged") {
    const std::string second = name_of(key) + ":1";
    const std::string last = name_of(key) + ":2";
    const int which = GENERATE(0, 1, 2, 3, 4);
    if (which == 0) (void)place.server.say({"DEL", second});
    if (which == 1) (void)place.server.say({"RENAME", last, second});
    if (which == 2) (void)place.server.say({"SETRANGE", second, "77", "x"});
    if (which == 3) (void)place.server.say({"APPEND", last, "x"});
    if (which == 4) (void)place.server.say({"SET", last, ""});
    CHECK_FALSE(tier->get("s", {}, out));
    CHECK(out.empty());
    CHECK(tier->stats().damaged == 1);
    CHECK(place.server.say({"DBSIZE"}) == "0");
  }
  SECTION("of another type") {
    (void)place.server.say({"DEL", name_of(key)});
    (void)place.server.say({"LPUSH", name_of(key), "x"});
    CHECK_FALSE(tier->get("s", {}, out));
    CHECK(tier->stats().errors > 0);
    CHECK(tier->erase("s", {}));
  }
  SECTION("too large for who reads") {
    auto options = options_for(place.server.port());
    options.max_payload_bytes = 1_MiB;
    redis_tier small(options);
    CHECK_FALSE(small.get("s", {}, out));
    CHECK(small.stats().refused == 1);
    CHECK(tier->get("s", {}, out));  // it is not gone
  }
}

TEST_CASE("many keys go in one pipeline", "[store]") {
  if (!have_server()) return;
  redis_place place;
  auto tier = place.open();
  std::deque<path> paths;
  std::vector<tier_key> keys;
  std::vector<bytes> payloads;
  for (std::uint32_t who = 0; who < 200; ++who) {
    paths.push_back(tiers::token_path(who));
    keys.push_back({"many", paths.back()});
    payloads.push_back(tiers::payload_of(who, 0, who == 7 ? 9'000'000 : who * 100));
  }
  const std::vector<std::span<const std::byte>> views(payloads.begin(), payloads.end());
  CHECK(tier->put_many(keys, views) == 200);
  REQUIRE(tier->erase("many", paths[100]));
  std::vector<bytes> outs(200);
  CHECK(tier->get_many(keys, outs) == 199);
  payloads[100].clear();
  CHECK(outs == payloads);
  CHECK(tier->stats().hits == 199);
  CHECK(tier->stats().misses == 1);
  CHECK(tier->stats().puts == 200);
}

TEST_CASE("a record lives as long as it is told to", "[store]") {
  if (!have_server()) return;
  redis_place place;
  auto options = options_for(place.server.port());
  options.time_to_live = milliseconds(150);
  options.prefix = "other";
  redis_tier tier(options);
  bytes out;
  REQUIRE(tier.put("s", path{1}, bytes(10)));
  const std::string left = place.server.say({"PTTL", name_of({"s", path{1}}, "other")});
  CHECK((std::stoi(left) > 0 && std::stoi(left) <= 150));
  ::usleep(200'000);
  CHECK_FALSE(tier.get("s", path{1}, out));
  CHECK(tier.stats().errors == 0);
}

TEST_CASE("a server that wants a password gets it, or is missed", "[store]") {
  if (!have_server()) return;
  const tiers::redis_server server(
      {"--requirepass", "se$cret", "--user", "reader", "on", ">word", "~*", "+@all"});
  auto options = options_for(server.port());
  bytes out;
  SECTION("the password") {
    options.link.password = "se$cret";
    options.link.database = 3;
    redis_tier tier(options);
    CHECK(tier.put("s", path{1}, bytes(10)));
    CHECK(tier.get("s", path{1}, out));
    options.link.database = 4;
    CHECK_FALSE(redis_tier(options).contains("s", path{1}));
  }
  SECTION("a user") {
    options.link.user = "reader";
    options.link.password = "word";
    CHECK(redis_tier(options).put("s", path{1}, bytes(10)));
  }
  SECTION("none, or a wrong one") {
    redis_tier without(options);
    options.link.password = "wrong";
    redis_tier wrong(options);
    for (redis_tier* tier : {&without, &wrong}) {
      CHECK_FALSE(tier->put("s", path{1}, bytes(10)));
      CHECK_FALSE(tier->get("s", path{1}, out));
      CHECK(tier->stats().errors > 0);
    }
  }
}

TEST_CASE("a server without room refuses, and that is all", "[store]") {
  if (!have_server()) return;
  const tiers::redis_server server({"--maxmemory", "3mb", "--maxmemory-policy", "noeviction"});
  redis_tier tier(options_for(server.port()));
  REQUIRE(tier.put("s", path{1}, bytes(10)));
  int num_kept = 0;
  for (std::uint32_t who = 2; who < 6; ++who)
    num_kept += tier.put("s", tiers::token_path(who), bytes(2'000'000)) ? 1 : 0;
  CHECK(num_kept <= 1);
  CHECK(tier.stats().errors > 0);
  bytes out;
  CHECK(tier.get("s", path{1}, out));
}

TEST_CASE("a server that dies is missed, and found again when it is back", "[store]") {
  if (!have_server()) return;
  redis_place place;
  auto tier = place.open();
  bytes out(1);
  REQUIRE(tier->put("s", path{1}, bytes(10)));
  REQUIRE(tier->get("s", path{1}, out));
  place.server.stop();
  auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 2000; ++i) {
    REQUIRE_FALSE(tier->get("s", path{1}, out));
    REQUIRE(out.empty());
  }
  CHECK_FALSE(tier->put("s", path{1}, bytes(10)));
  CHECK_FALSE(tier->erase("s", path{1}));
  CHECK_FALSE(tier->contains("s", path{1}));
  CHECK(seconds_since(start) < 5);
  CHECK(tier->stats().misses == 2000);
  CHECK(tier->stats().unreachable > 1000);  // not even tried
  CHECK(tier->stats().errors > 0);

  place.server.start();
  start = std::chrono::steady_clock::now();
  while (!tier->put("s", path{1}, bytes(20)) && seconds_since(start) < 5) ::usleep(10'000);
  CHECK(tier->get("s", path{1}, out));
  CHECK(out == bytes(20));

  // One that was away between two calls is not missed at all.
  place.server.stop();
  place.server.start();
  CHECK(tier->put("s", path{1}, bytes(30)));
  CHECK(tier->get("s", path{1}, out));
}

TEST_CASE("a server that is killed while it is spoken to is missed", "[store]") {
  if (!have_server()) return;
  test::random random;
  redis_place place;
  const bytes payload = tiers::payload_of(1, 0, 12'000'000);
  for (int round = 0; round < 4; ++round) {
    auto tier = place.open();
    const ::pid_t killer = tiers::start([&] {
      ::usleep(static_cast<unsigned>(random.below(30'000)));
      place.server.signal(SIGKILL);
      return 0;
    });
    bytes out;
    for (int i = 0; i < 40; ++i) {
      (void)tier->put("s", path{1}, payload);
      if (tier->get("s", path{1}, out)) REQUIRE(out == payload);
      ::usleep(1000);
    }
    CHECK(tiers::result_of(killer) == 0);
    place.server.stop();
    place.server.start();
  }
}

TEST_CASE("a server that hangs costs one timeout, then nothing", "[store]") {
  if (!have_server()) return;
  redis_place place;
  auto options = options_for(place.server.port());
  options.link.command_timeout = milliseconds(150);
  options.link.connect_timeout = milliseconds(150);
  options.link.first_pause = milliseconds(10'000);
  redis_tier tier(options);
  bytes out;
  REQUIRE(tier.put("s", path{1}, bytes(10)));
  place.server.signal(SIGSTOP);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) REQUIRE_FALSE(tier.get("s", path{1}, out));
  CHECK(seconds_since(start) >= 0.14);
  CHECK(seconds_since(start) < 3);
  CHECK(tier.stats().errors == 1);
  CHECK(tier.stats().unreachable == 999);
  place.server.signal(SIGCONT);
}

TEST_CASE("a server that answers nonsense is a miss that takes little memory", "[store]") {
  const bool for_ever = GENERATE(false, true);
  const std::string answer =
      GENERATE(as<std::string>{}, "*1000000000\r\n", "*1048576\r\n*1048576\r\n", "$100000000000\r\n",
               "$-7\r\n", "+OK\r\n", ":1\r\n", "$3\r\nabc\r\n", "nonsense\r\n",
               "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n", "-MOVED 1 127.0.0.1:1\r\n",
               "-ERR no\r\n", "\r\n", "x", std::string(5000, '\0'));
  CAPTURE(for_ever, answer);
  const tiers::rude_server server(answer, for_ever);
  auto options = options_for(server.port());
  options.is_cluster = GENERATE(false, true);
  options.link.command_timeout = milliseconds(60);
  options.link.first_pause = milliseconds(5000);
  redis_tier tier(options);
  bytes out(1);
  const auto start = std::chrono::steady_clock::now();
  const model_files::allocation_watch watch;
  const bool hit = tier.get("s", path{1}, out);
  const bool kept = tier.put("s", path{1}, bytes(100'000));
  const std::size_t largest = watch.largest();
  CHECK_FALSE(hit);
  CHECK(out.empty());
  if (answer != "+OK\r\n") CHECK_FALSE(kept);
  CHECK(largest < 400'000);
  CHECK(seconds_since(start) < 3);
}

TEST_CASE("impossible settings are refused", "[store]") {
  CHECK_THROWS_AS(redis_tier(redis_options{.servers = {}}), shape_error);
  CHECK_THROWS_AS(redis_tier(redis_options{.servers = {{}, {}}}), shape_error);
  CHECK_THROWS_AS(redis_tier(redis_options{.prefix = "a{b}"}), shape_error);
  CHECK_THROWS_AS(redis_tier(redis_options{.max_payload_bytes = 0}), shape_error);
}
