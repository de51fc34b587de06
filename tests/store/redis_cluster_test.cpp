// SPDX-License-Identifier: MIT
// Three servers that share the slots, one of which moves from server to server while it is used.
#include "support/catch.hpp"
#include "support/random.hpp"

#include "store/redis_server.hpp"
#include "store/tier_conformance.hpp"

#include <kvcache/store/redis_tier.hpp>

#include <chrono>
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

class redis_cluster {
 public:
  redis_cluster() {
    for (int i = 0; i < 3; ++i) {
      nodes_.emplace_back(std::vector<std::string>{"--cluster-enabled", "yes", "--cluster-config-file",
                                                   "nodes.conf", "--cluster-node-timeout", "2000",
                                                   "--cluster-require-full-coverage", "no"});
    }
    for (std::size_t i = 0; i < 3; ++i) {
      std::vector<std::string> words{"CLUSTER", "ADDSLOTS"};
      for (std::size_t slot = first_slot(i); slot < first_slot(i + 1); ++slot)
        words.push_back(std::to_string(slot));
      expect(node(i).say(words));
      ids_.push_back(node(i).say({"CLUSTER", "MYID"}));
    }
    for (std::size_t i = 1; i < 3; ++i)
      expect(node(0).say({"CLUSTER", "MEET", "127.0.0.1", std::to_string(node(i).port())}));
    for (int i = 0; i < 2000; ++i) {
      bool ready = true;
      for (std::size_t n = 0; n < 3; ++n) ready = ready && is_ready(node(n).say({"CLUSTER", "INFO"}));
      if (ready) return;
      ::usleep(10'000);
    }
    throw std::runtime_error("the cluster does not come up");
  }

  tiers::redis_server& node(std::size_t i) { return nodes_[i]; }
  const std::string& id(std::size_t i) const { return ids_[i]; }
  static std::size_t owner(std::size_t slot) {
    return slot < first_slot(1) ? 0 : slot < first_slot(2) ? 1 : 2;
  }
  static void expect(const std::string& answer) {
    if (answer != "OK") throw std::runtime_error("not OK: " + answer);
  }

  // -- moving a slot, step by step
  void begin_move(std::size_t slot, std::size_t from, std::size_t to) {
    expect(node(to).say({"CLUSTER", "SETSLOT", std::to_string(slot), "IMPORTING", id(from)}));
    expect(node(from).say({"CLUSTER", "SETSLOT", std::to_string(slot), "MIGRATING", id(to)}));
  }
  void move_key(const std::string& name, std::size_t from, std::size_t to) {
    expect(node(from).say({"MIGRATE", "127.0.0.1", std::to_string(node(to).port()), name, "0", "5000"}));
  }
  void end_move(std::size_t slot, std::size_t to) {
    for (std::size_t i = 0; i < 3; ++i)
      expect(node((to + i) % 3).say({"CLUSTER", "SETSLOT", std::to_string(slot), "NODE", id(to)}));
  }

 private:
  static std::size_t first_slot(std::size_t i) { return i * 16384 / 3; }
  static bool is_ready(const std::string& info) {
    return info.find("cluster_state:ok") != std::string::npos &&
           info.find("cluster_slots_ok:16384") != std::string::npos &&
           info.find("cluster_known_nodes:3") != std::string::npos;
  }

  std::deque<tiers::redis_server> nodes_;
  std::vector<std::string> ids_;
};

struct cluster_place {
  redis_cluster cluster;

  [[nodiscard]] std::unique_ptr<redis_tier> open() {
    return std::make_unique<redis_tier>(
        redis_options{.servers = {{.port = cluster.node(0).port()}},  // the others are learned
                      .is_cluster = true,
                      .link = {.command_timeout = milliseconds(10'000),
                               .first_pause = milliseconds(20),
                               .longest_pause = milliseconds(100)}});
  }
};

std::string name_of(const tier_key& key) { return "kvcache:1:{" + to_hex(record_name(key)) + "}"; }

}  // namespace

TEST_CASE("a cluster is one tier, also while a slot moves and a server is away", "[store]") {
  if (!tiers::find_redis_server()) {
    WARN("neither redis-server nor valkey-server is installed: not tested");
    return;
  }
  cluster_place place;
  redis_cluster& cluster = place.cluster;
  tiers::agrees_with_a_map(place);
  tiers::serves_processes_at_once(place, 3, 300);

  auto tier = place.open();
  auto other = place.open();  // has its own map
  std::deque<path> paths;
  std::vector<tier_key> keys;
  std::vector<bytes> payloads;
  int num_on[3] = {0, 0, 0};
  for (std::uint32_t who = 0; who < 100; ++who) {
    paths.push_back(tiers::token_path(who));
    keys.push_back({"c", paths.back()});
    payloads.push_back(tiers::payload_of(who, 0, 500 + who));
    ++num_on[redis_cluster::owner(store::detail::redis_slot(name_of(keys.back())))];
  }
  payloads[0] = tiers::payload_of(0, 0, 9'000'000);  // three parts
  const std::vector<std::span<const std::byte>> views(payloads.begin(), payloads.end());
  std::vector<bytes> outs(100);
  CHECK(tier->put_many(keys, views) == 100);
  CHECK(other->get_many(keys, outs) == 100);
  CHECK(outs == payloads);
  CHECK((num_on[0] > 0 && num_on[1] > 0 && num_on[2] > 0));

  // The slot of key 0 moves, and with it the record's parts, one after the other.
  const std::string name = name_of(keys[0]);
  const std::size_t slot = store::detail::redis_slot(name);
  const std::size_t from = redis_cluster::owner(slot);
  const std::size_t to = (from + 1) % 3;
  bytes out;
  cluster.begin_move(slot, from, to);
  CHECK(tier->get("c", paths[0], out));  // still at home
  cluster.move_key(name + ":1", from, to);
  CHECK(cluster.node(from).say({"GET", name + ":1"}).starts_with("ASK "));
  CHECK(tier->get("c", paths[0], out));  // the second part by ASK, the others at home
  CHECK(out == payloads[0]);
  cluster.move_key(name, from, to);
  CHECK(tier->get("c", paths[0], out));
  CHECK(out == payloads[0]);
  cluster.move_key(name + ":2", from, to);
  CHECK(tier->get("c", paths[0], out));
  CHECK(out == payloads[0]);
  CHECK(tier->contains("c", paths[0]));
  CHECK(cluster.node(to).say({"GET", name}).starts_with("MOVED "));  // without ASKING: it is not there yet
  REQUIRE(tier->put("c", paths[0], payloads[1]));                    // replaced on its way
  CHECK(tier->get("c", paths[0], out));
  CHECK(out == payloads[1]);
  cluster.end_move(slot, to);
  CHECK(cluster.node(from).say({"GET", name}).starts_with("MOVED "));
  CHECK(tier->get("c", paths[0], out));  // by MOVED, then by the map
  CHECK(out == payloads[1]);
  CHECK(cluster.node(to).say({"EXISTS", name, name + ":1", name + ":2"}) == "1");  // no part is left over
  payloads[0] = payloads[1];
  CHECK(other->get_many(keys, outs) == 100);
  CHECK(outs == payloads);
  CHECK(tier->erase("c", paths[0]));
  CHECK_FALSE(other->contains("c", paths[0]));
  CHECK((tier->stats().errors == 0 && other->stats().errors == 0));
  CHECK((tier->stats().damaged == 0 && other->stats().damaged == 0));

  // A server dies: its records are missed, those of the others are not.
  const std::size_t dead = (to + 1) % 3;
  cluster.node(dead).stop();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 20; ++i) {
    const index_t found = other->get_many(keys, outs);
    REQUIRE(found >= 99 - num_on[dead]);
    REQUIRE(found < 100 - num_on[dead] + 1);
    for (std::size_t k = 1; k < 100; ++k) REQUIRE((outs[k].empty() || outs[k] == payloads[k]));
  }
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
  CHECK(other->stats().errors > 0);
  cluster.node(dead).start();  // empty, as nothing is saved
  bool kept = false;
  for (int i = 0; i < 500 && !kept; ++i) {
    kept = other->put_many(keys, views) == 100;
    if (!kept) ::usleep(20'000);
  }
  CHECK(kept);
  CHECK(tier->get_many(keys, outs) == 100);
}
