// SPDX-License-Identifier: MIT
// How a record is cut into values of Redis: 4 MiB each, so that no reply is large and none holds a server up for long.
#pragma once

#include <kvcache/store/tier_record.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace kvcache::inline v0::store::detail {

/// Part of the format: all who share a server cut alike. The first one has the whole head.
inline constexpr std::size_t redis_part_bytes = std::size_t{4} << 20U;
static_assert(max_record_head_bytes <= redis_part_bytes);

inline std::string redis_part_name(const std::string& name, std::size_t part) {
  return part == 0 ? name : name + ':' + std::to_string(part);
}

constexpr std::size_t num_redis_parts(std::uint64_t record_bytes) noexcept {
  return static_cast<std::size_t>(
      std::max<std::uint64_t>((record_bytes + redis_part_bytes - 1) / redis_part_bytes, 1));
}

/// How many parts a record has, by its first 48 bytes, which nobody has checked; 1 if that cannot be.
/// \param max_payload_bytes  more than this cannot be
inline std::size_t redis_parts_of(std::string_view fixed, std::uint64_t max_payload_bytes) noexcept {
  tier_record_fields fields;
  if (fixed.size() != sizeof(fields)) return 1;
  std::memcpy(&fields, fixed.data(), sizeof(fields));
  if (fields.space_bytes > max_space_bytes || fields.num_tokens > max_path_tokens ||
      fields.payload_bytes > max_payload_bytes)
    return 1;
  return num_redis_parts(record_head_bytes(static_cast<std::size_t>(fields.space_bytes),
                                           static_cast<std::size_t>(fields.num_tokens)) +
                         fields.payload_bytes);
}

}  // namespace kvcache::inline v0::store::detail
