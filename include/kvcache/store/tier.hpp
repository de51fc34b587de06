// SPDX-License-Identifier: MIT
// tier: where the bytes of a prefix go that memory has no room for, and where other processes find them.
//
//   directory_tier  plain files, any number of processes       store/directory_tier.hpp
//   lmdb_tier       one memory-mapped file, any number of them  store/lmdb_tier.hpp, needs liblmdb
//   redis_tier      a server or a cluster, any number of hosts  store/redis_tier.hpp, needs hiredis
//
// A tier is a cache of a cache: whatever goes wrong in it is a miss, and the prefix is computed once more. No member
// throws or aborts; stats() tells what happened. What a tier gives back was put under exactly this key, byte for byte:
// every record has the whole key and checksums (store/tier_record.hpp), verified on each read. A checksum finds damage,
// not forgery: whoever may write to a tier is trusted with what is generated from it.
#pragma once

#include <kvcache/core/types.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::store {

/// Whose prefix, and which. Two keys are one only if both parts are equal throughout.
struct tier_key {
  /// Model, tokenizer, codec, tenant, and what else must be the same for the bytes to be of use; any bytes.
  std::string_view space;
  std::span<const token_id> tokens;  ///< the path from the first token on
};

/// What a key may have; a longer one is never stored and never found.
inline constexpr std::size_t max_space_bytes = 4096;
inline constexpr std::size_t max_path_tokens = 1'000'000;

/// What happened since the tier was made. Each `get` is one hit or one miss; what follows says why a miss was one.
struct tier_stats {
  index_t hits = 0;
  index_t misses = 0;
  index_t puts = 0;         ///< that are kept
  index_t refused = 0;      ///< puts beyond the limits, or that no room could be made for
  index_t damaged = 0;      ///< records that failed a checksum or ended too early; erased
  index_t foreign = 0;      ///< records of another key or program under this name; erased
  index_t evicted = 0;      ///< records that made room for others
  index_t errors = 0;       ///< what the file system, library or server refused
  index_t unreachable = 0;  ///< calls not tried, because the last ones failed just before
};

/// \c get       makes `out` the payload and returns true; or empties `out` and returns false. May use out's capacity.
/// \c put       replaces what the key has. False if it is not kept; then the old value, the new one or none is there.
/// \c contains  whether a record of this key is there. Reads the key, not the payload: `get` may miss all the same.
/// \c erase     false if nothing was there, or it could not be reached
/// One thread at a time for each object; any number of processes for each place.
// clang-format off
template <class T>
concept tier = requires(T& t, const T& constant, std::string_view space, std::span<const token_id> tokens,
                        std::span<const std::byte> payload, std::vector<std::byte>& out) {
  { t.get(space, tokens, out) } noexcept -> std::same_as<bool>;
  { t.put(space, tokens, payload) } noexcept -> std::same_as<bool>;
  { t.contains(space, tokens) } noexcept -> std::same_as<bool>;
  { t.erase(space, tokens) } noexcept -> std::same_as<bool>;
  { constant.stats() } noexcept -> std::same_as<const tier_stats&>;
};
// clang-format on

}  // namespace kvcache::inline v0::store
