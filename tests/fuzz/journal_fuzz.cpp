// SPDX-License-Identifier: MIT
// Any bytes as a journal: a load_error, or a sequence that keeps its invariants, from records that are whole.
#include "store/repair.hpp"

#include <kvcache/cache/chunked.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/recover.hpp>
#include <kvcache/store/save.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

namespace {

using namespace kvcache;

template <class Cache>
void try_recover(std::span<const std::byte> file) {
  try {
    auto found = store::recover<Cache>(file, {.slack_limit_bytes = 1_MiB}, {.blocks_per_chunk = 1});
    found.cache.check();
    if (found.at.bytes + found.damaged_bytes != file.size()) std::abort();
    (void)store::save(found.cache, found.about.who);
    // The part that was whole gives the same, and has no damage.
    const auto whole = store::recover<Cache>(file.first(found.at.bytes), {.slack_limit_bytes = 1_MiB});
    if (whole.damaged_bytes != 0 || whole.cache.size() != found.cache.size()) std::abort();
    found.cache.truncate(found.cache.size() / 2);
    found.cache.check();
  } catch (const load_error&) {
  } catch (const capacity_error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using sealing = codec::exact_sinks<codec::exact_tail<codec::mixed<codec::channel<4>, codec::int8>, 20>, 3>;
  std::vector<std::byte> file(size);
  for (std::size_t i = 0; i < size; ++i) file[i] = static_cast<std::byte>(data[i]);
  try_recover<chunked_cache<sealing>>(file);
  stored::repair_journal(file);
  try_recover<chunked_cache<sealing>>(file);
  try_recover<chunked_cache<codec::int8>>(file);
  return 0;
}
