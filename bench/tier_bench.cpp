// SPDX-License-Identifier: MIT
// What a tier costs: a prefix of 1 MiB and of 16 MiB put and got, through each tier that was built in, beside a copy of as many
// bytes. Files lie in the folder for temporary ones, in the page cache; redis-server is started on the loopback interface
// where it is installed.
#include <kvcache/store/directory_tier.hpp>
#include <kvcache/store/tier.hpp>

#include "support/measure.hpp"
#include "support/rows.hpp"

#ifdef TIER_BENCH_LMDB
#include <kvcache/store/lmdb_tier.hpp>
#endif
#ifdef TIER_BENCH_REDIS
#include <kvcache/store/redis_tier.hpp>

#include "store/redis_server.hpp"  // of the tests
#endif

#include "examples/temporary_folder.hpp"  // of the tests

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvcache::bench {
namespace {

using bytes = std::vector<std::byte>;

/// What keys and values look like to a tier: no pattern.
bytes noise(index_t size) {
  bytes result(static_cast<std::size_t>(size));
  std::uint64_t z = 1;
  for (auto& b : result)
    b = static_cast<std::byte>((z = z * 6364136223846793005U + 1442695040888963407U) >> 56U);
  return result;
}

/// One row for each verb and size. \param make  makes a place, which has a tier: `tier()`
template <class Make>
void add_rows(const char* name, Make make) {
  for (const index_t size : {1_MiB, 16_MiB}) {
    for (const bool is_put : {false, true}) {
      const auto row = row_name(is_put ? "tier_put" : "tier_get").add("tier", name).add("mib", size / 1_MiB);
      register_row(row, [make, size, is_put](benchmark::State& state) {
        const auto place = make();
        auto& tier = place->tier();
        const bytes payload = noise(size);
        const std::vector<token_id> tokens(1024, 7);
        bytes copy(payload.size());
        bytes out;
        bool worked = tier.put("bench", tokens, payload);
        measured measurement;
        measurement.op = [&](index_t) {
          worked = worked && (is_put ? tier.put("bench", tokens, payload) : tier.get("bench", tokens, out));
        };
        measurement.compare = {[&](index_t) { std::memcpy(copy.data(), payload.data(), payload.size()); }};
        const auto m = measure(state, measurement);
        if (!worked || (!is_put && out != payload)) throw std::runtime_error("the tier does not keep it");
        state.counters["bytes_per_second"] = static_cast<double>(size) / m.op;
        state.counters["times_copy"] = m.op / m.compare[0];
      });
    }
  }
}

struct directory_place {
  model_files::temporary_folder folder;
  store::directory_tier files{folder.path() / "tier"};
  store::directory_tier& tier() { return files; }
};

#ifdef TIER_BENCH_LMDB
/// \tparam Sync  as in lmdb_options
template <bool Sync>
struct lmdb_place {
  model_files::temporary_folder folder;
  store::lmdb_tier file{folder.path() / "tier", {.map_bytes = 1_GiB, .sync = Sync}};
  store::lmdb_tier& tier() { return file; }
};
#endif

#ifdef TIER_BENCH_REDIS
struct redis_place {
  tiers::redis_server server;
  store::redis_tier client{{.servers = {{.port = server.port()}}}};
  store::redis_tier& tier() { return client; }
};
#endif

}  // namespace

void register_rows() {
  add_rows("directory", [] { return std::make_unique<directory_place>(); });
#ifdef TIER_BENCH_LMDB
  add_rows("lmdb", [] { return std::make_unique<lmdb_place<true>>(); });
  add_rows("lmdb_without_sync", [] { return std::make_unique<lmdb_place<false>>(); });
#endif
#ifdef TIER_BENCH_REDIS
  if (tiers::find_redis_server()) add_rows("redis", [] { return std::make_unique<redis_place>(); });
#endif
}

}  // namespace kvcache::bench
