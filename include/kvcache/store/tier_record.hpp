// SPDX-License-Identifier: MIT
// The record that every tier stores: a head with the whole key and two checksums, then the payload.
//
//    0  8  "KVCTIER\n"                      24  8  number of tokens
//    8  4  version, 1                       32  8  bytes of the payload
//   12  4  CRC32C of the head, with 0 here  40  4  CRC32C of the payload
//   16  8  bytes of the space               44  4  0
//   48     the space, then the tokens (32 bits each), zeros up to a multiple of 64; then the payload, and no more
//
// All numbers are little-endian. Every bit of a record is under one of the checksums. The name of a record is the BLAKE2b
// digest of its key, each part with its length before it, and of the version; yet nobody has to trust in that: the key in
// the record is compared.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/store/blake2b.hpp>
#include <kvcache/store/crc32c.hpp>
#include <kvcache/store/tier.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::store {

inline constexpr std::uint32_t record_version = 1;
inline constexpr std::size_t record_alignment = 64;  ///< of the payload in its record, bytes

namespace detail {

static_assert(std::endian::native == std::endian::little);

inline constexpr std::size_t tier_record_fixed_bytes = 48;
inline constexpr std::string_view tier_magic = "KVCTIER\n";

/// The fixed part of a head, as it lies in a record.
struct tier_record_fields {
  char magic[8];
  std::uint32_t version;
  std::uint32_t head_crc;
  std::uint64_t space_bytes;
  std::uint64_t num_tokens;
  std::uint64_t payload_bytes;
  std::uint32_t payload_crc;
  std::uint32_t zero;
};
static_assert(sizeof(tier_record_fields) == tier_record_fixed_bytes);

inline std::span<const std::byte> bytes_of(std::string_view text) noexcept {
  return std::as_bytes(std::span(text.data(), text.size()));
}

/// \pre both are within the limits of a key
constexpr std::size_t record_head_bytes(std::size_t space_bytes, std::size_t num_tokens) noexcept {
  const std::size_t bytes = tier_record_fixed_bytes + space_bytes + 4 * num_tokens;
  return (bytes + record_alignment - 1) / record_alignment * record_alignment;
}

/// CRC32C of a head, whatever its checksum field has. \pre `head` has at least the fixed part
inline std::uint32_t tier_head_checksum(std::span<const std::byte> head) noexcept {
  tier_record_fields fields;
  std::memcpy(&fields, head.data(), sizeof(fields));
  fields.head_crc = 0;
  return crc32c(head.subspan(tier_record_fixed_bytes), crc32c(std::as_bytes(std::span(&fields, 1))));
}

}  // namespace detail

constexpr bool within_limits(const tier_key& key) noexcept {
  return key.space.size() <= max_space_bytes && key.tokens.size() <= max_path_tokens;
}

/// Bytes before the payload. \pre within_limits(key)
constexpr std::size_t record_head_bytes(const tier_key& key) noexcept {
  return detail::record_head_bytes(key.space.size(), key.tokens.size());
}

/// The most that a head can have.
inline constexpr std::size_t max_record_head_bytes =
    detail::record_head_bytes(max_space_bytes, max_path_tokens);

/// What a record is stored under. O(key). \pre within_limits(key)
inline digest256 record_name(const tier_key& key) noexcept {
  const std::uint64_t sizes[3] = {record_version, key.space.size(), key.tokens.size()};
  blake2b digest;
  digest.add(std::as_bytes(std::span(sizes)));
  digest.add(detail::bytes_of(key.space));
  digest.add(std::as_bytes(key.tokens));
  return digest.finish();
}

/// 64 hexadecimal digits.
inline std::string to_hex(const digest256& digest) {
  static constexpr char digits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * digest.size());
  for (const std::byte b : digest) {
    text += digits[std::to_integer<unsigned>(b) >> 4U];
    text += digits[std::to_integer<unsigned>(b) & 15U];
  }
  return text;
}

/// Makes `head` what stands before `payload`. O(key + payload). \pre within_limits(key)
inline void write_record_head(const tier_key& key, std::span<const std::byte> payload,
                              std::vector<std::byte>& head) {
  head.assign(record_head_bytes(key), std::byte{0});
  detail::tier_record_fields fields{};
  std::copy(detail::tier_magic.begin(), detail::tier_magic.end(), fields.magic);
  fields.version = record_version;
  fields.space_bytes = key.space.size();
  fields.num_tokens = key.tokens.size();
  fields.payload_bytes = payload.size();
  fields.payload_crc = crc32c(payload);
  std::memcpy(head.data(), &fields, sizeof(fields));
  std::byte* at = head.data() + sizeof(fields);
  if (!key.space.empty()) std::memcpy(at, key.space.data(), key.space.size());
  if (!key.tokens.empty()) std::memcpy(at + key.space.size(), key.tokens.data(), key.tokens.size_bytes());
  fields.head_crc = detail::tier_head_checksum(head);
  std::memcpy(head.data(), &fields, sizeof(fields));
}

/// What a record turned out to be.
enum class record_state {
  good,     ///< the head is sound and of this key
  damaged,  ///< not what was written
  foreign,  ///< of another key, another version or another program
};

struct record_check {
  record_state state = record_state::damaged;
  std::uint64_t payload_bytes = 0;  ///< of a good one; a claim until as many bytes are there
  std::uint32_t payload_crc = 0;
};

/// Looks at the head of a record: is it sound, and is it of this key? O(key), allocates nothing.
/// \param bytes  at least the first record_head_bytes(key) bytes of the record, or all that there are
/// \pre within_limits(key)
inline record_check check_record_head(const tier_key& key, std::span<const std::byte> bytes) noexcept {
  if (bytes.size() < detail::tier_record_fixed_bytes) return {};
  detail::tier_record_fields fields;
  std::memcpy(&fields, bytes.data(), sizeof(fields));
  if (!std::equal(detail::tier_magic.begin(), detail::tier_magic.end(), fields.magic) ||
      fields.version != record_version)
    return {.state = record_state::foreign};
  if (fields.space_bytes > max_space_bytes || fields.num_tokens > max_path_tokens) return {};
  const std::size_t head_bytes = detail::record_head_bytes(static_cast<std::size_t>(fields.space_bytes),
                                                           static_cast<std::size_t>(fields.num_tokens));
  if (head_bytes > bytes.size()) return {};
  const auto head = bytes.first(head_bytes);
  if (detail::tier_head_checksum(head) != fields.head_crc) return {};
  const auto space = head.subspan(sizeof(fields), static_cast<std::size_t>(fields.space_bytes));
  const auto tokens =
      head.subspan(sizeof(fields) + space.size(), 4 * static_cast<std::size_t>(fields.num_tokens));
  if (!std::ranges::equal(space, detail::bytes_of(key.space)) ||
      !std::ranges::equal(tokens, std::as_bytes(key.tokens)))
    return {.state = record_state::foreign};
  return {record_state::good, fields.payload_bytes, fields.payload_crc};
}

/// The payload of a record that lies in memory as a whole. O(record), allocates nothing.
/// \param payload  set if the record is good
inline record_state check_record(const tier_key& key, std::span<const std::byte> record,
                                 std::span<const std::byte>& payload) noexcept {
  const record_check head = check_record_head(key, record);
  if (head.state != record_state::good) return head.state;
  const auto rest = record.subspan(record_head_bytes(key));
  if (rest.size() != head.payload_bytes || crc32c(rest) != head.payload_crc) return record_state::damaged;
  payload = rest;
  return record_state::good;
}

/// Counts what is no hit for this reason.
inline void count_bad_record(tier_stats& stats, record_state state) noexcept {
  ++(state == record_state::foreign ? stats.foreign : stats.damaged);
}

}  // namespace kvcache::inline v0::store
