// SPDX-License-Identifier: MIT
// Damaged, forged and truncated snapshots, files that cannot be written, memory that runs out; and the files of every
// format version, which must be read for ever.
#include "support/catch.hpp"
#include "support/random.hpp"

#include "conformance/memory.hpp"
#include "examples/temporary_folder.hpp"
#include "store/sequences.hpp"

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/mapped.hpp>
#include <kvcache/store/save.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <ostream>
#include <span>
#include <streambuf>
#include <string>
#include <vector>

#if defined(__unix__)
#include <sys/resource.h>

#include <csignal>
#endif

using namespace kvcache;
using stored::append_exactly;

namespace {

using bytes = std::vector<std::byte>;
using sealing = codec::exact_sinks<codec::exact_tail<codec::mixed<codec::channel<4>, codec::int8>, 16>, 2>;

template <class Codec>
chunked_cache<Codec> small_cache(const cache_shape& shape, index_t count) {
  Codec codec{};
  if constexpr (std::is_same_v<Codec, sealing>) {
  } else if constexpr (std::is_same_v<Codec, codec::int8>) {
    codec.keys.means = std::make_shared<const codec::key_means>(
        shape, std::vector<float>(
                   static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads * shape.head_dim), 0.25F));
  }
  chunked_cache<Codec> cache(shape, codec);
  append_exactly(cache, count);
  if (count > 10) cache.shift(2, 9, 4);
  return cache;
}

const store::identity who{
    .model = "model", .tokenizer = "words", .rope = {store::rope_kind::half, 1e4, 4, "x"}};

bytes read_file(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return store::read_all(stream);
}

}  // namespace

TEMPLATE_TEST_CASE("a snapshot with any byte changed, or cut anywhere, is refused", "[store]", codec::int8,
                   sealing) {
  const auto cache = small_cache<TestType>({1, 1, 4, 16}, 37);
  const bytes good = store::save(cache, who);
  const auto is_refused = [&](std::span<const std::byte> file) {
    try {
      (void)store::load<chunked_cache<TestType>>(file);
      return false;
    } catch (const load_error& error) {
      return error.offset() <= file.size() && !error.reason().empty();
    }
  };
  REQUIRE(!is_refused(good));
  bytes bad = good;
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const unsigned change : {1U << (i % 8), 0xffU}) {
      bad[i] = good[i] ^ static_cast<std::byte>(change);
      if (!is_refused(bad)) FAIL("byte " << i << " changed by " << change << " is not noticed");
    }
    bad[i] = good[i];
  }
  for (std::size_t size = 0; size < good.size(); ++size) {
    if (!is_refused(std::span(good).first(size))) FAIL("cut to " << size << " bytes is not noticed");
  }
  bad.push_back(std::byte{0});
  CHECK(is_refused(bad));
}

TEMPLATE_TEST_CASE("a forged snapshot is refused or a sequence that keeps its invariants", "[store]",
                   codec::int8, sealing) {
  const auto cache = small_cache<TestType>({1, 1, 4, 16}, 37);
  const bytes good = store::save(cache, who);
  // What any number in the file may at most be turned into: memory for blocks comes from here and no place else.
  conformance::watched_memory memory;
  memory.limit(64 * good.size());
  int loaded = 0;
  const auto try_load = [&](bytes& forged) {
    stored::repair(forged);
    try {
      auto again = store::load<chunked_cache<TestType>>(std::span<const std::byte>(forged),
                                                        {.slack_limit_bytes = 1 << 14},
                                                        {.blocks_per_chunk = 1, .memory = &memory})
                       .cache;
      again.check();
      for (index_t layer = 0; layer < again.shape().num_layers; ++layer)
        (void)stored::rows(again, layer, 0, again[layer].size());
      again.truncate(again.size() / 2);
      append_exactly(again, 3);
      again.check();
      ++loaded;
    } catch (const load_error&) {
    }
  };
  bytes forged = good;
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const unsigned change : {1U, 0x80U, 0xffU}) {
      forged[i] = good[i] ^ static_cast<std::byte>(change);
      try_load(forged);
      forged = good;
    }
  }
  // Numbers of 64 bits where such numbers are: near zero, huge, negative.
  for (std::size_t at = 0; at + 8 <= std::min<std::size_t>(good.size(), 2048); at += 4) {
    for (const std::uint64_t value :
         {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 20, std::uint64_t{1} << 40,
          std::uint64_t{1} << 56, std::uint64_t{1} << 62, ~std::uint64_t{0}}) {
      std::memcpy(forged.data() + at, &value, 8);
      try_load(forged);
      forged = good;
    }
  }
  CHECK(loaded > 100);  // other numbers in blocks and names are harmless
  CHECK(memory.bytes_out() == 0);
}

TEST_CASE("a snapshot that asks for more memory than it has bytes gets it only if the caller says so",
          "[store]") {
  sealing codec;
  codec.tail_tokens = 2000;  // room for 127 blocks, of which the file has two
  chunked_cache<sealing> cache({1, 1, 4, 16}, codec);
  append_exactly(cache, 20);
  const bytes file = store::save(cache, {});
  REQUIRE(file.size() < 4096);
  using loaded = chunked_cache<sealing>;
  CHECK(store::load<loaded>(file).cache.codec().tail_tokens == 2000);
  CHECK_THROWS_AS(store::load<loaded>(file, {.slack_limit_bytes = 1 << 14}), load_error);

  chunked_cache<codec::bf16> uneven({200, 1, 4, 16});  // one long layer would make the others as long
  const std::vector<float> rows(4 * 1600);
  uneven[7].append(rows, rows);
  const bytes long_layer = store::save(uneven, {});
  CHECK(store::load<chunked_cache<codec::bf16>>(long_layer).cache.layer_size(7) == 1600);
  CHECK_THROWS_AS(store::load<chunked_cache<codec::bf16>>(long_layer, {.slack_limit_bytes = 1 << 20}),
                  load_error);
  chunked_cache<codec::bf16> target(uneven.shape());
  CHECK_THROWS_AS(store::load_into(target, long_layer, {.slack_limit_bytes = 1 << 20}), load_error);
  CHECK_NOTHROW(store::load_into(target, long_layer));
}

TEST_CASE("a sequence that cannot be replaced stays what it was", "[store]") {
  const bytes file = store::save(small_cache<codec::bf16>({2, 1, 4, 16}, 50), {});
  bytes damaged = file;
  damaged.back() ^= std::byte{1};
  damaged[damaged.size() - 40] ^= std::byte{1};
  conformance::watched_memory memory;
  {
    const index_t page_bytes = page_pool<codec::bf16>({2, 1, 4, 16}).page_bytes();
    page_pool<codec::bf16> pool({2, 1, 4, 16}, {.budget_bytes = 6 * page_bytes, .memory = &memory});
    auto target = pool.sequence();
    append_exactly(target, 30);
    bytes before = store::save(target, {});
    const auto is_as_before = [&] {
      target.check();
      return store::save(target, {}) == before;
    };
    CHECK_THROWS_AS(store::load_into(target, damaged), load_error);
    CHECK(is_as_before());
    CHECK(pool.num_in_use() == 2);
    append_exactly(target, 10);
    before = store::save(target, {});
    CHECK_THROWS_AS(store::load_into(target, file), capacity_error);  // three and four pages
    CHECK(is_as_before());
    CHECK(pool.num_in_use() == 3);
  }
  CHECK(memory.bytes_out() == 0);
  for (int failing = 0;; ++failing) {
    chunked_cache<codec::bf16> target({2, 1, 4, 16}, {}, {.blocks_per_chunk = 1, .memory = &memory});
    append_exactly(target, 30);
    const bytes before = store::save(target, {});
    memory.fail_at(failing);
    bool failed = false;
    try {
      (void)store::load_into(target, file);
    } catch (const capacity_error&) {
      failed = true;
    }
    memory.fail_at(conformance::watched_memory::never);
    target.check();
    if (!failed) {
      CHECK(failing == 4);
      break;
    }
    REQUIRE(store::save(target, {}) == before);
  }
  CHECK(memory.bytes_out() == 0);
}

TEST_CASE("a mapped snapshot says which damage it has", "[store]") {
  const model_files::temporary_folder folder;
  const auto path = folder.path() / "a.kv";
  store::save(small_cache<codec::int8>({2, 1, 4, 16}, 37), who, path);
  const bytes good = read_file(path);
  const auto write = [&](const bytes& file) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  };
  for (std::size_t i = 0; i < good.size(); i += 3) {
    bytes bad = good;
    bad[i] ^= std::byte{0x10};
    write(bad);
    bool noticed = false;
    try {
      const store::mapped_snapshot<codec::int8> mapped(path);
      mapped.verify();
    } catch (const load_error& error) {
      noticed = error.source() == path.string();
    }
    if (!noticed) FAIL("byte " << i);
  }
}

namespace {

/// Takes so many bytes and no more.
class small_buffer : public std::streambuf {
 public:
  explicit small_buffer(std::streamsize room) : room_(room) {}

 protected:
  std::streamsize xsputn(const char* /*data*/, std::streamsize size) override {
    const std::streamsize taken = std::min(size, room_);
    room_ -= taken;
    return taken;
  }
  int_type overflow(int_type) override { return traits_type::eof(); }

 private:
  std::streamsize room_;
};

}  // namespace

TEST_CASE("a stream that takes no more is an error", "[store]") {
  const auto cache = small_cache<codec::bf16>({1, 1, 4, 16}, 20);
  const auto size = static_cast<std::streamsize>(store::save(cache, {}).size());
  for (std::streamsize room = 0; room < size; room += 50) {
    small_buffer buffer(room);
    std::ostream stream(&buffer);
    REQUIRE_THROWS_AS(store::save(cache, {}, stream), store::write_error);
  }
}

#if defined(__unix__)
TEST_CASE("when the disk is full the old file stays, and nothing else does", "[store]") {
  const model_files::temporary_folder folder;
  const auto path = folder.path() / "a.kv";
  store::save(small_cache<codec::bf16>({1, 1, 4, 16}, 5), {}, path);
  const bytes before = read_file(path);
  const auto larger = small_cache<codec::bf16>({2, 1, 4, 16}, 60);
  ::rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t room : {0U, 1U, 64U, 1000U, 2000U}) {
    const ::rlimit low{room, limit.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &low) == 0);
    bool failed = false;
    try {
      store::save(larger, {}, path);
    } catch (const store::write_error&) {
      failed = true;
    }
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(failed);
    CHECK(read_file(path) == before);
    CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
  }
  (void)std::signal(SIGXFSZ, handler);
  store::save(larger, {}, path);
  CHECK(read_file(path) == store::save(larger, {}));
  CHECK_THROWS_AS(store::save(larger, {}, folder.path() / "no such folder" / "a.kv"), std::system_error);
}
#endif

// KVCACHE_WRITE_FIXTURES=1 writes those of a new version; files of released versions are never written again.
TEMPLATE_TEST_CASE("files of every format version are read, and written in the same bytes", "[store]",
                   codec::int8, sealing, codec::trellis<3>) {
  constexpr bool is_newest = std::is_same_v<TestType, codec::trellis<3>>;
  const std::string name = is_newest                           ? "v2_trellis.kv"
                           : std::is_same_v<TestType, sealing> ? "v1_sealing.kv"
                                                               : "v1_int8_means.kv";
  const std::filesystem::path path = std::string(KVCACHE_TESTS_DIR "/store/fixtures/") + name;
  const auto cache = small_cache<TestType>({2, 1, 4, 16}, 53);
  store::identity identity = who;
  for (token_id id = 0; id < 53; ++id) identity.tokens.push_back(1000 - id);
  if (is_newest && std::getenv("KVCACHE_WRITE_FIXTURES") != nullptr) store::save(cache, identity, path);

  const auto [again, about] = store::load<chunked_cache<TestType>>(path);
  again.check();
  stored::require_same(cache, again);
  CHECK(about.who.model == who.model);
  CHECK(about.who.tokenizer == who.tokenizer);
  CHECK(about.who.rope == who.rope);
  CHECK(about.who.tokens == identity.tokens);
  CHECK(store::mapped_snapshot<TestType>(path).size() == 53);

  bytes released = read_file(path);
  bytes now = store::save(cache, identity);
  for (bytes* file : {&released, &now}) {
    std::fill_n(file->begin() + 12, 4, std::byte{0});  // the format version
    std::fill_n(file->begin() + 20, 4, std::byte{0});  // that of the library that wrote it
    stored::repair(*file);
  }
  CHECK(released == now);
}
