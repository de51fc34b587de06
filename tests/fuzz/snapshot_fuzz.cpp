// SPDX-License-Identifier: MIT
// Any bytes as a snapshot: a load_error, or a sequence that keeps its invariants and is saved and loaded again the same.
#include "store/repair.hpp"

#include <kvcache/cache/chunked.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/save.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

namespace {

using namespace kvcache;

template <class Cache>
void try_load(std::span<const std::byte> file) {
  try {
    auto [cache, about] = store::load<Cache>(file, {.slack_limit_bytes = 1_MiB}, {.blocks_per_chunk = 1});
    cache.check();
    const std::vector<std::byte> once = store::save(cache, about.who);
    const auto again = store::load<Cache>(once, {.slack_limit_bytes = 1_MiB});
    if (store::save(again.cache, again.about.who) != once) std::abort();
    cache.truncate(cache.size() / 2);
    cache.check();
  } catch (const load_error&) {
  } catch (const capacity_error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using sealing = codec::exact_sinks<codec::exact_tail<codec::mixed<codec::channel<4>, codec::int8>, 16>, 2>;
  std::vector<std::byte> file(size);
  for (std::size_t i = 0; i < size; ++i) file[i] = static_cast<std::byte>(data[i]);
  try_load<chunked_cache<codec::int8>>(file);
  stored::repair(file);
  try_load<chunked_cache<codec::int8>>(file);
  try_load<chunked_cache<sealing>>(file);
  try_load<chunked_cache<any_codec>>(file);
  return 0;
}
