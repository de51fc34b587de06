// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include "examples/temporary_folder.hpp"
#include "store/sequences.hpp"

#include <kvcache/cache/chunked.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/mapped.hpp>
#include <kvcache/store/save.hpp>
#include <kvcache/store/zstd.hpp>

#include <cstddef>
#include <span>
#include <vector>

using namespace kvcache;

TEST_CASE("a snapshot compressed by zstd is smaller, comes back, and cannot be damaged unnoticed",
          "[store]") {
  constexpr cache_shape shape{1, 1, 16, 16};
  const store::zstd compression;
  test::random random;
  chunked_cache<> cache(shape);
  stored::append(cache, 70, random);
  const std::vector<std::byte> plain = store::save(cache, {});
  const std::vector<std::byte> saved = store::save(cache, {}, {.compression = &compression});
  CHECK(saved.size() < plain.size());
  const auto load = [&](std::span<const std::byte> file, const store::section_compressor* with) {
    return store::load<chunked_cache<>>(file, {.compression = with}).cache;
  };
  stored::require_same(cache, load(saved, &compression));
  stored::require_same(cache, load(plain, &compression));
  CHECK_THROWS_AS(load(saved, nullptr), load_error);

  std::vector<std::byte> bad = saved;
  int loaded = 0;
  for (std::size_t i = 0; i < saved.size(); ++i) {
    bad[i] ^= static_cast<std::byte>(1U << (i % 8));
    REQUIRE_THROWS_AS(load(bad, &compression), load_error);
    stored::repair(bad);  // what libzstd makes of it, if it can
    try {
      load(bad, &compression).check();
      ++loaded;
    } catch (const load_error&) {
    }
    bad = saved;
  }
  CHECK(loaded > 0);
  for (std::size_t size = 0; size < saved.size(); ++size)
    REQUIRE_THROWS_AS(load(std::span(saved).first(size), &compression), load_error);

  const model_files::temporary_folder folder;
  store::save(cache, {}, folder.path() / "a.kv", {.compression = &compression});
  CHECK_THROWS_AS(store::mapped_snapshot<>(folder.path() / "a.kv"), load_error);
}

TEST_CASE("blocks that compress too well are stored as they are", "[store]") {
  const store::zstd compression(9);
  chunked_cache<> zeros({1, 1, 64, 256});
  const std::vector<float> rows(64 * 2000);
  zeros[0].append(rows, rows);
  const auto saved = store::save(zeros, {}, {.compression = &compression});
  CHECK(saved == store::save(zeros, {}));
}
