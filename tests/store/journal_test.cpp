// SPDX-License-Identifier: MIT
// Journals: what comes back is a state that the sequence really had, the newest one that the file has whole, whatever a
// crash did to the file; and the sequence goes on from there as it would have.
#include "support/catch.hpp"
#include "support/random.hpp"

#include "examples/temporary_folder.hpp"
#include "store/sequences.hpp"

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/store/journal.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/recover.hpp>
#include <kvcache/store/save.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if defined(__unix__)
#include <sys/resource.h>

#include <csignal>
#endif

using namespace kvcache;

namespace {

using bytes = std::vector<std::byte>;
using sealing = codec::exact_sinks<codec::exact_tail<codec::mixed<codec::channel<4>, codec::int8>, 20>, 3>;
constexpr cache_shape shape{2, 2, 6, 16};

/// What a disk was told: every write, cut and sync, in order.
struct disk_log {
  struct operation {
    enum kind { write, cut, sync } what;
    std::uint64_t offset = 0;  // where a write goes, or a cut ends
    bytes data = {};
  };
  std::vector<operation> operations;
  std::uint64_t size = 0;
  int failing = 0;  // writes from now on that fail halfway

  /// The file when all of it arrived.
  [[nodiscard]] bytes file() const {
    bytes all;
    for (const operation& o : operations) apply(o, all);
    return all;
  }
  static void apply(const operation& o, bytes& to) {
    if (o.what == operation::cut) to.resize(o.offset);
    if (o.what != operation::write) return;
    to.resize(std::max<std::size_t>(to.size(), o.offset + o.data.size()));
    std::copy(o.data.begin(), o.data.end(), to.begin() + static_cast<std::ptrdiff_t>(o.offset));
  }

  /// What a crash after `count` operations may leave: all before the last sync; of later writes any sectors of 64 bytes,
  /// zeros or what was there in place of others.
  [[nodiscard]] bytes after_crash(std::size_t count, test::random& random) const {
    std::size_t safe = count;
    while (safe > 0 && operations[safe - 1].what != operation::sync) --safe;
    bytes file;
    for (std::size_t i = 0; i < safe; ++i) apply(operations[i], file);
    for (std::size_t i = safe; i < count; ++i) {
      if (operations[i].what == operation::cut && random.chance(0.5)) continue;
      if (operations[i].what == operation::write) {
        for (std::size_t at = 0; at < operations[i].data.size(); at += 64) {
          if (random.chance(0.2)) continue;
          const auto from = operations[i].data.begin() + static_cast<std::ptrdiff_t>(at);
          const std::size_t n = std::min<std::size_t>(64, operations[i].data.size() - at);
          apply({operation::write, operations[i].offset + at,
                 bytes(from, from + static_cast<std::ptrdiff_t>(n))},
                file);
        }
      } else {
        apply(operations[i], file);
      }
    }
    return file;
  }
};

class recorded_output final : public store::log_output {
 public:
  explicit recorded_output(disk_log& log) : log_(&log) {}

  void append(std::span<const std::span<const std::byte>> pieces) override {
    bytes all;
    for (const auto piece : pieces) all.insert(all.end(), piece.begin(), piece.end());
    const bool fails = log_->failing > 0;
    if (fails) all.resize(all.size() / 2);
    log_->operations.push_back({disk_log::operation::write, log_->size, all});
    log_->size += all.size();
    if (fails && log_->failing-- > 0) throw store::write_error("full");
  }
  void start_sync() override {}
  void sync() override { log_->operations.push_back({disk_log::operation::sync}); }
  void cut(std::uint64_t to) override {
    log_->operations.push_back({disk_log::operation::cut, to});
    log_->size = to;
  }

 private:
  disk_log* log_;
};

/// A sequence with its ids, and a journal of it; token t of a text that ends in `salt` has rows that depend on both.
template <class Cache>
struct session {
  Cache cache;
  std::vector<token_id> ids = {};

  void append(index_t count, int salt) {
    for (index_t i = 0; i < count; ++i) {
      const auto id = static_cast<token_id>(ids.size() * 10 + static_cast<std::size_t>(salt));
      test::random rows(static_cast<std::uint64_t>(id));
      stored::append(cache, 1, rows);
      ids.push_back(id);
    }
  }
  [[nodiscard]] std::span<const token_id> newest(index_t count) const {
    return std::span(ids).last(static_cast<std::size_t>(count));
  }
};

/// All that tells one state from another: blocks, exact tail, positions, ids.
template <class Cache>
bytes state_of(const Cache& cache, const std::vector<token_id>& ids) {
  return store::save(cache, {.tokens = ids});
}

/// Random appends, truncations and shifts, of which the states that a record was written for are kept.
template <class Cache>
struct history {
  disk_log log;
  std::map<std::uint64_t, bytes> states;                      // end of the record -> state
  std::vector<std::pair<std::size_t, std::uint64_t>> synced;  // operations so far -> bytes that are on disk

  explicit history(session<Cache>& s, test::random& random, int steps, index_t every) {
    store::journal<Cache> journal(std::make_unique<recorded_output>(log), s.cache,
                                  {.model = "m", .tokens = s.ids}, {.every = every, .sync_every = 2});
    note(journal, s);
    for (int i = 0; i < steps; ++i) {
      const double what = random.unit();
      if (what < 0.7) {
        const index_t count = random.chance(0.2) ? random.between(1, 40) : random.between(1, 5);
        s.append(count, i % 7);
        journal.append(s.newest(count));
      } else if (what < 0.85) {
        const index_t size = std::max<index_t>(s.cache.size() - random.below(random.chance(0.3) ? 60 : 6), 0);
        s.ids.resize(static_cast<std::size_t>(size));
        journal.truncate(size);
      } else if (what < 0.9) {
        const index_t first = random.below(s.cache.size() + 1);
        s.cache.shift(first, s.cache.size(), random.between(-3, 3));
        journal.flush();
      } else {
        journal.flush();
      }
      note(journal, s);
    }
  }
  void note(const store::journal<Cache>& journal, const session<Cache>& s) {
    if (states.count(journal.position().bytes) == 0)
      states[journal.position().bytes] = state_of(s.cache, s.ids);
    if (!log.operations.empty() && log.operations.back().what == disk_log::operation::sync)
      synced.emplace_back(log.operations.size(), log.size);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("a journal gives back the newest recorded state, and goes on", "[store]", codec::bf16,
                   sealing) {
  using cache_type = chunked_cache<TestType>;
  for (const index_t every : {1, 7, 64}) {
    CAPTURE(every);
    test::random random(static_cast<std::uint64_t>(every));
    session<cache_type> s{cache_type(shape)};
    s.append(every == 7 ? 19 : 0, 3);
    history<cache_type> h(s, random, 60, every);
    auto found = store::recover<cache_type>(h.log.file());
    found.cache.check();
    CHECK(found.damaged_bytes == 0);
    CHECK(found.unwritten_at_most == every - 1);
    CHECK(found.about.who.model == "m");
    REQUIRE(h.states.count(found.at.bytes) == 1);
    REQUIRE(state_of(found.cache, found.about.who.tokens) == h.states.rbegin()->second);

    // Going on: from the recovered state and from the journal, again and again.
    session<cache_type> next{std::move(found.cache), found.about.who.tokens};
    store::journal<cache_type> journal(std::make_unique<recorded_output>(h.log), next.cache, found.at,
                                       {.every = every});
    next.append(30, 5);
    journal.append(next.newest(30));
    journal.truncate(next.cache.size() - 25);
    next.ids.resize(next.ids.size() - 25);
    next.append(2, 6);
    journal.append(next.newest(2));
    journal.sync();
    const auto again = store::recover<cache_type>(h.log.file());
    again.cache.check();
    REQUIRE(state_of(again.cache, again.about.who.tokens) == state_of(next.cache, next.ids));
  }
}

TEMPLATE_TEST_CASE("every prefix of a journal is a state that was, and no token more is lost than said",
                   "[store]", codec::int8, sealing) {
  using cache_type = chunked_cache<TestType>;
  test::random random;
  session<cache_type> s{cache_type(shape)};
  history<cache_type> h(s, random, 12, 8);
  const bytes file = h.log.file();
  const std::uint64_t first = h.states.begin()->first;
  std::uint64_t newest = first;
  std::size_t told = 0;
  for (std::size_t size = 0; size <= file.size(); ++size) {
    const auto part = std::span(file).first(size);
    if (size < first) {
      if (size % 16 == 0) REQUIRE_THROWS_AS(store::recover<cache_type>(part), load_error);
      continue;
    }
    while (std::next(h.states.find(newest)) != h.states.end() &&
           std::next(h.states.find(newest))->first <= size)
      newest = std::next(h.states.find(newest))->first;
    if (size % 16 != 0 && newest != size && newest + 64 != size) continue;  // every one would take minutes
    const auto found = store::recover<cache_type>(part);
    REQUIRE(found.at.bytes == newest);
    REQUIRE(found.damaged_bytes == size - newest);
    REQUIRE(state_of(found.cache, found.about.who.tokens) == h.states.at(newest));
    if (size >= newest + 64 && found.lost_tokens) ++told;
  }
  CHECK(told > 10);
}

TEST_CASE("a changed byte never brings back a state that was not", "[store]") {
  using cache_type = chunked_cache<sealing>;
  constexpr cache_shape small{1, 1, 4, 16};
  session<cache_type> s{cache_type(small)};
  test::random random;
  history<cache_type> h(s, random, 8, 16);
  const bytes file = h.log.file();
  bytes bad = file;
  for (std::size_t i = 0; i < file.size(); ++i) {
    bad[i] ^= static_cast<std::byte>(1U << (i % 8));
    try {
      const auto found = store::recover<cache_type>(std::span<const std::byte>(bad));
      const bool is_prefix = found.at.bytes <= i && h.states.count(found.at.bytes) == 1 &&
                             state_of(found.cache, found.about.who.tokens) == h.states.at(found.at.bytes);
      if (!is_prefix) FAIL("byte " << i);
    } catch (const load_error&) {
      if (i >= h.states.begin()->first) FAIL("byte " << i << " of a record is taken for damage of the file");
    }
    bad[i] = file[i];
  }
}

TEMPLATE_TEST_CASE("writes that are torn or come in another order lose nothing that was synced", "[store]",
                   codec::bf16, sealing) {
  using cache_type = chunked_cache<TestType>;
  test::random random;
  session<cache_type> s{cache_type(shape)};
  history<cache_type> h(s, random, 40, 8);
  const std::size_t created = h.synced.front().first;
  for (int round = 0; round < 400; ++round) {
    const std::size_t count =
        created +
        static_cast<std::size_t>(random.below(static_cast<index_t>(h.log.operations.size() - created + 1)));
    std::uint64_t safe = 0;
    for (const auto& [operations, size] : h.synced) {
      if (operations <= count) safe = size;
    }
    const bytes file = h.log.after_crash(count, random);
    const auto found = store::recover<cache_type>(std::span<const std::byte>(file));
    REQUIRE(found.at.bytes >= safe);
    REQUIRE(h.states.count(found.at.bytes) == 1);
    REQUIRE(state_of(found.cache, found.about.who.tokens) == h.states.at(found.at.bytes));
  }
}

TEMPLATE_TEST_CASE("nothing of deleted tokens gets into a journal", "[store]", codec::bf16, sealing) {
  using cache_type = chunked_cache<TestType>;
  enum how_they_went { truncated, not_kept };
  // 40 tokens, after 7 others that went again.
  const auto written = [](int deleted, how_they_went how) {
    session<cache_type> s{cache_type(shape)};
    s.append(33, 1);
    if (how == truncated) s.append(7, 1);
    s.append(7, deleted);
    s.ids.resize(how == truncated ? 40 : 33);
    if (how == truncated) s.cache.truncate(40);
    if (how == not_kept) {
      s.append(7, 1);
      std::vector<index_t> kept(40);
      std::iota(kept.begin(), kept.end(), index_t{0});
      for (std::size_t i = 33; i < 40; ++i) kept[i] += 7;
      REQUIRE(s.cache.keep_tokens(kept, keep_positions::original).code == status::ok);
      s.cache.set_positions({});
    }
    disk_log log;
    store::journal<cache_type> journal(std::make_unique<recorded_output>(log), s.cache, {.tokens = s.ids},
                                       {.every = 4});
    s.append(4, 3);
    journal.append(s.newest(4));
    journal.rewrite(s.ids);
    return log.file();
  };
  for (const how_they_went how : {truncated, not_kept}) {
    const bool same = written(2, how) == written(4, how);  // without printing them
    CHECK(same);
  }
}

TEST_CASE("layers whose blocks differ in size go through snapshots and journals", "[store]") {
  using codecs = codec::by_layer<any_codec>;
  constexpr cache_shape three{3, 2, 6, 16};
  for (const std::string spec :
       {"int8,first=1:f32,layers=1:bf16", "k=channel4,v=int8,last=1:f32,tail=20,sinks=3",
        "rotated4,first=1:bf16", "k=channel4,v=int8,last=1:f32,tail=20,sinks=3,exact=f16",
        "rotated4,last=1:balanced2,exact=f32"}) {
    CAPTURE(spec);
    const codecs codec = make_codec_by_layer(spec, 3);
    const block_geometry g = geometry_of(three);
    REQUIRE(codec.of(0).block_bytes(g) != codec.of(2).block_bytes(g));
    test::random random;
    session<chunked_cache<codecs>> s{chunked_cache<codecs>(three, codec)};
    history<chunked_cache<codecs>> h(s, random, 40, 8);
    for (const auto& [end, state] : h.states) {
      const bytes file = h.log.file();
      const auto found = store::recover<contiguous_cache<codecs>>(std::span(file).first(end));
      found.cache.check();
      REQUIRE(state_of(found.cache, found.about.who.tokens) == state);
    }
    const bytes& last = h.states.rbegin()->second;
    page_pool<codecs> pool(three, {}, codec);
    auto paged = pool.sequence();
    (void)store::load_into(paged, std::span<const std::byte>(last));
    paged.check();
    auto contiguous = store::load<contiguous_cache<codecs>>(std::span<const std::byte>(last)).cache;
    contiguous.check();
    session<chunked_cache<codecs>> chunked{
        store::load<chunked_cache<codecs>>(std::span<const std::byte>(last)).cache};
    stored::require_same(paged, contiguous);
    stored::require_same(paged, chunked.cache);
    // Each goes on as the others.
    test::random first(5);
    test::random second(5);
    stored::append(paged, 30, first);
    stored::append(contiguous, 30, second);
    stored::require_same(paged, contiguous);
    // The layers in another order are another codec.
    std::vector<any_codec> turned{codec.of(2), codec.of(1), codec.of(0)};
    chunked_cache<codecs> other(three, codecs(turned));
    CHECK_THROWS_AS(store::load_into(other, std::span<const std::byte>(last)), load_error);
  }
}

TEST_CASE("records of an older end of the file are not taken for a continuation", "[store]") {
  using cache_type = chunked_cache<codec::bf16>;
  session<cache_type> s{cache_type(shape)};
  disk_log log;
  {
    store::journal<cache_type> journal(std::make_unique<recorded_output>(log), s.cache, {}, {.every = 4});
    for (int i = 0; i < 3; ++i) {
      s.append(4, 1);
      journal.append(s.newest(4));
    }
  }
  const bytes old = log.file();
  auto first = store::recover<cache_type>(std::span(old).first(old.size() - 1));  // two records
  REQUIRE(first.cache.size() == 8);
  session<cache_type> again{std::move(first.cache), first.about.who.tokens};
  log.operations = {{disk_log::operation::write, 0,
                     bytes(old.begin(), old.begin() + static_cast<std::ptrdiff_t>(first.at.bytes))}};
  log.size = first.at.bytes;
  store::journal<cache_type> journal(std::make_unique<recorded_output>(log), again.cache, first.at,
                                     {.every = 4});
  again.append(3, 2);  // another text
  journal.append(again.newest(3));
  journal.flush();
  bytes mixed = log.file();
  const std::size_t record = mixed.size() - static_cast<std::size_t>(first.at.bytes);
  REQUIRE(record == old.size() - static_cast<std::size_t>(first.at.bytes));
  // The same place, number and size as the third record of old; a fourth that was written after that one follows.
  bytes fourth;
  {
    disk_log other;
    other.operations = {{disk_log::operation::write, 0, old}};
    other.size = old.size();
    auto all = store::recover<cache_type>(std::span<const std::byte>(old));
    session<cache_type> longer{std::move(all.cache), all.about.who.tokens};
    store::journal<cache_type> goes_on(std::make_unique<recorded_output>(other), longer.cache, all.at,
                                       {.every = 4});
    longer.append(4, 1);
    goes_on.append(longer.newest(4));
    fourth = other.operations.back().data;
  }
  mixed.insert(mixed.end(), fourth.begin(), fourth.end());
  const auto found = store::recover<cache_type>(std::span<const std::byte>(mixed));
  CHECK(found.cache.size() == 11);
  CHECK(found.damaged_bytes == fourth.size());
}

TEST_CASE("a write that fails is repeated, and nothing of it stays", "[store]") {
  using cache_type = chunked_cache<codec::bf16>;
  session<cache_type> s{cache_type(shape)};
  disk_log log;
  store::journal<cache_type> journal(std::make_unique<recorded_output>(log), s.cache, {}, {.every = 8});
  s.append(10, 1);
  journal.append(s.newest(10));
  const auto before = journal.position();
  log.failing = 2;
  s.append(10, 2);
  CHECK_THROWS_AS(journal.append(s.newest(10)), store::write_error);
  CHECK_THROWS_AS(journal.flush(), store::write_error);
  CHECK(journal.position() == before);
  CHECK(store::recover<cache_type>(log.file()).cache.size() == 10);
  journal.flush();
  const auto found = store::recover<cache_type>(log.file());
  CHECK(found.damaged_bytes == 0);
  CHECK(state_of(found.cache, found.about.who.tokens) == state_of(s.cache, s.ids));
}

TEST_CASE("a forged journal is refused or a sequence that keeps its invariants", "[store]") {
  using cache_type = chunked_cache<sealing>;
  session<cache_type> s{cache_type({1, 1, 4, 16})};
  test::random random;
  history<cache_type> h(s, random, 8, 16);
  const bytes file = h.log.file();
  int recovered = 0;
  const auto try_recover = [&](bytes forged) {
    stored::repair_journal(forged);
    try {
      auto found =
          store::recover<cache_type>(std::span<const std::byte>(forged), {.slack_limit_bytes = 1 << 14});
      found.cache.check();
      (void)state_of(found.cache, found.about.who.tokens);
      found.cache.truncate(found.cache.size() / 2);
      ++recovered;
    } catch (const load_error&) {
    }
  };
  for (std::size_t i = 0; i < file.size(); ++i) {
    bytes forged = file;
    forged[i] ^= static_cast<std::byte>(i % 3 == 0 ? 0xff : 1U << (i % 8));
    try_recover(forged);
  }
  for (const auto& [start, state] : h.states) {  // numbers of headers and tables
    for (std::size_t at = start; at + 8 <= std::min<std::size_t>(file.size(), start + 256); at += 8) {
      for (const std::uint64_t value :
           {std::uint64_t{0}, std::uint64_t{1} << 20, std::uint64_t{1} << 56, ~std::uint64_t{0}}) {
        bytes forged = file;
        std::memcpy(forged.data() + at, &value, 8);
        try_recover(forged);
      }
    }
  }
  CHECK(recovered > 100);
}

// KVCACHE_WRITE_FIXTURES=1 writes that of a new version; files of released versions are never written again.
TEMPLATE_TEST_CASE("a journal of every format version is read, and written in the same bytes", "[store]",
                   sealing, codec::trellis<2>) {
  using cache_type = chunked_cache<TestType>;
  constexpr bool is_newest = !std::is_same_v<TestType, sealing>;
  const std::filesystem::path path =
      std::string(KVCACHE_TESTS_DIR "/store/fixtures/") + (is_newest ? "v2_trellis.kvj" : "v1_journal.kvj");
  cache_type cache({2, 1, 4, 16});
  disk_log log;
  store::journal<cache_type> journal(std::make_unique<recorded_output>(log), cache, {.model = "model"},
                                     {.every = 16});
  const auto append = [&](index_t count) {
    stored::append_exactly(cache, count);
    std::vector<token_id> ids;
    for (index_t i = cache.size() - count; i < cache.size(); ++i) ids.push_back(static_cast<token_id>(7 * i));
    journal.append(ids);
  };
  append(20);
  append(25);
  journal.truncate(30);
  append(30);
  cache.shift(3, 9, -1);
  journal.flush();
  bytes now = log.file();
  if (is_newest && std::getenv("KVCACHE_WRITE_FIXTURES") != nullptr)
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(now.data()), static_cast<std::streamsize>(now.size()));

  std::ifstream stream(path, std::ios::binary);
  bytes released = store::read_all(stream);
  const auto found = store::recover<cache_type>(std::span<const std::byte>(released));
  CHECK(found.damaged_bytes == 0);
  stored::require_same(cache, found.cache);
  CHECK(found.about.who.tokens.back() == 7 * 59);
  for (bytes* file : {&released, &now}) {
    std::fill_n(file->begin() + 12, 4, std::byte{0});  // the format version
    std::fill_n(file->begin() + 20, 4, std::byte{0});  // that of the library that wrote it
    stored::repair_journal(*file);
  }
  const bool same = released == now;  // without printing them
  CHECK(same);
}

#if defined(__unix__)
TEST_CASE("a journal in a file is cut behind its newest whole record, locked, and made small", "[store]") {
  const model_files::temporary_folder folder;
  const auto path = folder.path() / "a.kvj";
  page_pool<sealing> pool(shape);
  session<paged_cache<sealing>> s{pool.sequence()};
  std::uint64_t whole = 0;
  {
    store::journal journal(path, s.cache, {.model = "m"}, {.every = 16, .sync_every = 1});
    CHECK_THROWS_AS(store::journal(path, s.cache, {}), std::system_error);  // it is there
    s.append(50, 1);
    journal.append(s.newest(50));
    try {
      const store::journal second(path, s.cache, journal.position());
      FAIL("it is locked");
    } catch (const std::system_error& error) {
      CHECK(error.code() == std::errc::resource_unavailable_try_again);
      CHECK(std::string(error.what()).find("another journal has it open") != std::string::npos);
    }
    whole = journal.position().bytes;
    s.append(10, 2);
    journal.append(s.newest(10));
    CHECK(journal.recorded_size() == 50);
    journal.sync();
  }
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 5);
  auto other = pool.sequence();
  const auto found = store::recover_into(other, path);
  CHECK(found.lost_tokens == 10);
  CHECK(other.size() == 50);
  CHECK(std::filesystem::file_size(path) == whole);

  // Truncated and gone on with many times, it grows; compact makes it as small as the sequence.
  session<paged_cache<sealing>> t{std::move(other), found.about.who.tokens};
  store::journal journal(path, t.cache, found.at, {.every = 16});
  for (int i = 0; i < 20; ++i) {
    journal.truncate(40);
    t.ids.resize(40);
    t.append(30, i % 5);
    journal.append(t.newest(30));
  }
  const auto large = std::filesystem::file_size(path);
  journal.compact(t.ids);
  CHECK(std::filesystem::file_size(path) < large / 10);
  t.append(20, 3);
  journal.append(t.newest(20));
  const auto again = store::recover<chunked_cache<sealing>>(path);
  CHECK(state_of(again.cache, again.about.who.tokens) == state_of(t.cache, t.ids));
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("a journal on a full disk keeps what it has", "[store]") {
  const model_files::temporary_folder folder;
  const auto path = folder.path() / "a.kvj";
  session<chunked_cache<codec::bf16>> s{chunked_cache<codec::bf16>(shape)};
  store::journal journal(path, s.cache, {}, {.every = 16});
  s.append(20, 1);
  journal.append(s.newest(20));
  ::rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const ::rlimit low{static_cast<rlim_t>(journal.position().bytes + 100), limit.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &low) == 0);
  s.append(20, 2);
  bool failed = false;
  try {
    journal.append(s.newest(20));
  } catch (const store::write_error&) {
    failed = true;
  }
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  (void)std::signal(SIGXFSZ, handler);
  CHECK(failed);
  CHECK(std::filesystem::file_size(path) == journal.position().bytes);
  CHECK(store::recover<chunked_cache<codec::bf16>>(path).cache.size() == 20);
  journal.flush();
  CHECK(store::recover<chunked_cache<codec::bf16>>(path).cache.size() == 40);
}
#endif
