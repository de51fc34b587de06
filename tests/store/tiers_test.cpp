// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include "examples/allocation_watch.hpp"
#include "examples/temporary_folder.hpp"
#include "store/tier_conformance.hpp"

#include <kvcache/store/blake2b.hpp>
#include <kvcache/store/directory_tier.hpp>
#include <kvcache/store/spill_to.hpp>
#include <kvcache/store/tier_record.hpp>

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
namespace fs = std::filesystem;

namespace {

struct directory_place {
  static constexpr bool empty_is_nothing = false;

  model_files::temporary_folder folder;
  directory_options options{.budget_bytes = 64_MiB, .patience = std::chrono::milliseconds(20'000)};

  [[nodiscard]] std::unique_ptr<directory_tier> open() const {
    return std::make_unique<directory_tier>(folder.path() / "tier", options);
  }
  [[nodiscard]] fs::path file_of(const tier_key& key) const {
    const std::string name = to_hex(record_name(key));
    return folder.path() / "tier" / name.substr(0, 2) / name;
  }
  [[nodiscard]] std::optional<bytes> raw(const tier_key& key) const {
    std::ifstream file(file_of(key), std::ios::binary);
    if (!file) return std::nullopt;
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const auto b = std::as_bytes(std::span(text));
    return bytes(b.begin(), b.end());
  }
  void set_raw(const tier_key& key, const bytes& record) const {
    std::ofstream(file_of(key), std::ios::binary)
        .write(reinterpret_cast<const char*>(record.data()), static_cast<std::streamsize>(record.size()));
  }
  /// Bytes of all records as the budget counts them, and number of files *.tmp.
  [[nodiscard]] std::pair<index_t, int> on_disk() const {
    std::pair<index_t, int> result{0, 0};
    for (const auto& entry : fs::recursive_directory_iterator(folder.path() / "tier")) {
      if (!entry.is_regular_file() || entry.path().filename() == "books") continue;
      if (entry.path().extension() == ".tmp") {
        ++result.second;
      } else {
        result.first += static_cast<index_t>((entry.file_size() + 4095) / 4096 * 4096);
      }
    }
    return result;
  }
};

void set_age(const fs::path& file, std::chrono::seconds age) {
  fs::last_write_time(file, fs::file_time_type::clock::now() - age);
}

}  // namespace

TEST_CASE("digests are those of BLAKE2b", "[store]") {
  const auto digest_of = [](std::string_view text, std::size_t step) {
    blake2b digest;
    for (std::size_t i = 0; i < text.size(); i += step)
      digest.add(std::as_bytes(std::span(text.substr(i, step))));
    return to_hex(digest.finish());
  };
  // Computed with Python's hashlib.blake2b(digest_size=32).
  for (const std::size_t step : {1, 7, 128, 1000}) {
    CHECK(digest_of("", step) == "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8");
    CHECK(digest_of("abc", step) == "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
    CHECK(digest_of(std::string(128, 'x'), step) ==
          "164ffb7089bae6f5a62fb0795e751dc9e88eac92e1a5b2fafe93a25abf2d9c3b");
    CHECK(digest_of(std::string(129, 'x'), step) ==
          "03b0758fa71d249c846c2304a2b9996e6ae66ffa7e5528f9e612e089a360fc8d");
    CHECK(digest_of(std::string(1000, 'y'), step) ==
          "31068c31698fb659449d56bfca789cfa63529ac640b514dee3bac0b8a3da9248");
  }
}

TEST_CASE("a record of any bytes is good only if it is the one that was made", "[store]") {
  test::random random;
  const path tokens{1, 2, 3};
  const tier_key key{"space", tokens};
  const bytes payload = tiers::payload_of(5, 0, 100);
  bytes record;
  write_record_head(key, payload, record);
  record.insert(record.end(), payload.begin(), payload.end());
  std::span<const std::byte> found;
  REQUIRE(check_record(key, record, found) == record_state::good);
  CHECK(bytes(found.begin(), found.end()) == payload);

  int num_good = 0;
  for (int i = 0; i < 20'000; ++i) {
    bytes changed = record;
    for (auto n = random.between(1, 4); n > 0; --n)
      changed[static_cast<std::size_t>(random.below(std::ssize(changed)))] = static_cast<std::byte>(random());
    if (random.chance(0.3)) changed.resize(static_cast<std::size_t>(random.below(400)));
    const model_files::allocation_watch watch;
    const bool good = check_record(key, changed, found) == record_state::good;
    const std::size_t largest = watch.largest();
    if (good != (changed == record) || largest != 0) ++num_good;
  }
  CHECK(num_good == 0);
}

TEST_CASE("a directory does what every tier does", "[store]") {
  directory_place place;
  SECTION("verbs") { tiers::agrees_with_a_map(place); }
  SECTION("limits") { tiers::refuses_long_keys(place); }
  SECTION("damage") { tiers::misses_what_is_damaged(place); }
  SECTION("processes") {
    tiers::serves_processes_at_once(place, 4, 1500);
    auto tier = place.open();
    CHECK(tier->bytes() == place.on_disk().first);
    CHECK(place.on_disk().second == 0);
  }
  SECTION("processes, with little room") {
    place.options.budget_bytes = 40_KiB;
    tiers::serves_processes_at_once(place, 3, 800);
    CHECK(place.on_disk().first <= 40_KiB);
  }
  SECTION("no memory") {
    tiers::misses_without_memory(place, [](long n) { model_files::allocations_until_failure = n; });
  }
  SECTION("kills") {
    place.options.stale_after = std::chrono::seconds(0);
    place.options.budget_bytes = 60_KiB;
    tiers::survives_kills(place, 25);
    auto tier = place.open();
    CHECK(place.on_disk().second == 0);
    CHECK(tier->bytes() == place.on_disk().first);
    CHECK(place.on_disk().first <= 60_KiB);
  }
}

TEST_CASE("a directory keeps to its budget and drops what was used least recently", "[store]") {
  directory_place place;
  place.options.budget_bytes = 40 * 4096;
  auto tier = place.open();
  const auto put = [&](std::uint32_t who) {
    return tier->put("s", tiers::token_path(who), tiers::payload_of(who, 0, 3000));
  };
  for (std::uint32_t who = 0; who < 40; ++who) {
    REQUIRE(put(who));
    set_age(place.file_of({"s", tiers::token_path(who)}), std::chrono::seconds(1000 - who));
  }
  CHECK(tier->bytes() == 40 * 4096);
  CHECK(tier->stats().evicted == 0);
  bytes out;
  REQUIRE(tier->get("s", path{0}, out));  // the oldest one is used
  REQUIRE(put(100));
  CHECK(tier->stats().evicted == 4);  // down to nine tenths
  CHECK(tier->contains("s", path{0}));
  CHECK(tier->contains("s", path{100}));
  for (std::uint32_t who = 1; who <= 4; ++who) CHECK_FALSE(tier->contains("s", tiers::token_path(who)));
  for (std::uint32_t who = 5; who < 40; ++who) CHECK(tier->contains("s", tiers::token_path(who)));
  CHECK(place.on_disk().first == tier->bytes());

  test::random random;
  for (int i = 0; i < 300; ++i) {
    (void)tier->put("s", tiers::token_path(static_cast<std::uint32_t>(random.below(60))),
                    bytes(static_cast<std::size_t>(random.below(20'000))));
    if (random.chance(0.2))
      (void)tier->erase("s", tiers::token_path(static_cast<std::uint32_t>(random.below(60))));
    REQUIRE(place.on_disk().first <= 40 * 4096);
    REQUIRE(place.on_disk().first == tier->bytes());
  }
  CHECK_FALSE(tier->put("s", path{7}, bytes(40 * 4096)));
  CHECK(tier->stats().refused == 1);
  CHECK(tier->stats().errors == 0);
}

TEST_CASE("a directory counts anew what it finds when it starts", "[store]") {
  directory_place place;
  index_t before = 0;
  {
    auto tier = place.open();
    for (std::uint32_t who = 0; who < 10; ++who) REQUIRE(tier->put("s", tiers::token_path(who), bytes(5000)));
    before = tier->bytes();
    CHECK(before == 10 * 8192);
  }
  const fs::path books = place.folder.path() / "tier" / "books";
  const fs::path stale = place.file_of({"s", path{3}}).string() + ".1-2-3.tmp";
  const fs::path fresh = place.file_of({"s", path{3}}).string() + ".1-2-4.tmp";
  SECTION("as it was") { CHECK(place.open()->bytes() == before); }
  SECTION("books that are damaged") {
    for (const char* text : {"", "short", "0123456789012345678901234567890"}) {
      std::ofstream(books) << text;
      CHECK(place.open()->bytes() == before);
    }
  }
  SECTION("books damaged while it is open") {
    auto tier = place.open();
    std::ofstream(books) << "nonsense, and long enough to be read as a page";
    REQUIRE(tier->put("s", path{77}, bytes(5000)));
    CHECK(tier->bytes() == before + 8192);
  }
  SECTION("files that nobody finished") {
    std::ofstream(stale) << "half";
    std::ofstream(fresh) << "half";
    set_age(stale, std::chrono::seconds(3600));
    CHECK(place.open()->bytes() == before);
    CHECK_FALSE(fs::exists(stale));
    CHECK(fs::exists(fresh));
  }
}

TEST_CASE("a directory that cannot be used misses and counts it", "[store]") {
  model_files::temporary_folder folder;
  bytes out(1);
  SECTION("a file is in its place") {
    folder.write("tier", "no folder");
    directory_tier tier(folder.path() / "tier");
    CHECK_FALSE(tier.put("s", path{1}, bytes(10)));
    CHECK_FALSE(tier.get("s", path{1}, out));
    CHECK(out.empty());
    CHECK_FALSE(tier.contains("s", path{1}));
    CHECK_FALSE(tier.erase("s", path{1}));
    CHECK(tier.stats().errors >= 2);
    CHECK(tier.stats().misses == 1);
  }
  SECTION("it goes away, and a put brings it back") {
    directory_tier tier(folder.path() / "a" / "b" / "tier");
    REQUIRE(tier.put("s", path{1}, bytes(10)));
    fs::remove_all(folder.path() / "a" / "b" / "tier");
    CHECK_FALSE(tier.get("s", path{1}, out));
    CHECK(tier.stats().errors == 0);
    CHECK(tier.put("s", path{1}, bytes(10)));
    CHECK(tier.get("s", path{1}, out));
  }
  SECTION("it belongs to somebody else") {
    if (::geteuid() != 0) SUCCEED("only root can try this");
    if (::geteuid() == 0) {
      fs::permissions(folder.path(), fs::perms(0755));
      directory_tier root(folder.path() / "tier");
      REQUIRE(root.put("s", path{1}, bytes(10)));
      CHECK(tiers::result_of(tiers::start([&] {
              if (::setuid(65534) != 0) return 1;
              directory_tier tier(folder.path() / "tier");
              if (tier.get("s", path{1}, out) || tier.put("s", path{1}, bytes(5)) || tier.erase("s", path{1}))
                return 2;
              return tier.stats().errors >= 3 ? 0 : 3;
            })) == 0);
      CHECK(root.get("s", path{1}, out));
      CHECK(out == bytes(10));
    }
  }
  SECTION("odd things in place of records") {
    directory_place place;
    auto tier = place.open();
    const fs::path file = place.file_of({"s", path{1}});
    REQUIRE(tier->put("s", path{1}, bytes(10)));
    fs::rename(file, folder.path() / "elsewhere");
    fs::create_symlink(folder.path() / "elsewhere", file);
    CHECK_FALSE(tier->get("s", path{1}, out));
    CHECK(tier->stats().foreign == 1);
    CHECK(fs::exists(folder.path() / "elsewhere"));
    REQUIRE(::mkfifo(file.c_str(), 0600) == 0);
    CHECK_FALSE(tier->get("s", path{1}, out));  // and does not wait for a writer
    CHECK_FALSE(fs::exists(file));
    fs::create_directory(file);
    CHECK_FALSE(tier->get("s", path{1}, out));
    CHECK_FALSE(tier->put("s", path{1}, bytes(10)));
    fs::remove(file);
    CHECK(tier->put("s", path{1}, bytes(10)));
  }
}

TEST_CASE("a process that is stopped with the lock holds nobody up", "[store]") {
  directory_place place;
  place.options.patience = std::chrono::milliseconds(50);
  auto tier = place.open();
  REQUIRE(tier->put("s", path{1}, bytes(10)));
  store::detail::folder_books held((place.folder.path() / "tier" / "books").string(), 0600,
                                   std::chrono::milliseconds(0));
  REQUIRE(held.held());
  const auto start = std::chrono::steady_clock::now();
  bytes out;
  CHECK(tier->get("s", path{1}, out));
  CHECK_FALSE(tier->put("s", path{2}, bytes(10)));
  CHECK_FALSE(tier->erase("s", path{1}));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
  CHECK(tier->stats().errors == 2);
}

TEST_CASE("a record that claims more than is there takes no memory for it", "[store]") {
  directory_place place;
  auto tier = place.open();
  const path tokens{1};
  bytes head;
  const bytes claimed(48_MiB);
  write_record_head({"s", tokens}, claimed, head);  // sound, but for what it claims
  REQUIRE(tier->put("s", tokens, bytes(10)));
  place.set_raw({"s", tokens}, head);
  bytes out;
  const model_files::allocation_watch watch;
  const bool hit = tier->get("s", tokens, out);
  const std::size_t largest = watch.largest();
  CHECK_FALSE(hit);
  CHECK(largest < 100'000);
  CHECK(tier->stats().damaged == 1);
}

TEST_CASE("a tier takes what a cache manager spills, each space apart", "[store]") {
  struct space {
    std::string_view model, adapter, tenant;
  };
  directory_place place;
  auto tier = place.open();
  store::spill_to spill(*tier);
  const space spaces[] = {{"m", "a", "t"}, {"ma", "", "t"}, {"m", "", "at"}, {"", "", "mat"}, {"m", "a", ""}};
  const path tokens{1, 2};
  bytes out(30);
  for (std::size_t i = 0; i < 5; ++i) {
    CHECK_FALSE(spill.contains(spaces[i], tokens));
    CHECK(spill.get(spaces[i], tokens, out) == -1);
    REQUIRE(spill.put(spaces[i], tokens, tiers::payload_of(i, 0, 20 + i)));
  }
  for (std::size_t i = 0; i < 5; ++i) {
    CHECK(spill.contains(spaces[i], tokens));
    REQUIRE(spill.get(spaces[i], tokens, out) == static_cast<index_t>(20 + i));
    const bytes payload = tiers::payload_of(i, 0, 20 + i);
    CHECK(std::equal(payload.begin(), payload.end(), out.begin()));
    CHECK(spill.get(spaces[i], tokens, std::span(out).first(19)) == -1);  // no room
  }
  CHECK(spill.erase(spaces[0], tokens));
  CHECK_FALSE(spill.contains(spaces[0], tokens));
  CHECK(spill.contains(spaces[1], tokens));
}
