// SPDX-License-Identifier: MIT
// One record of a journal: what changed since the one before it. docs/format.md has it to the byte.
//
//   | header, 64 | token ids | position segments | what is sealed, by layer | pad | blocks of layer 0 | of layer 1 | ...
//
// A record has every block, whole, that holds one of its tokens. Its header has the checksum of the header before it, so
// that what an earlier writer left behind in the file is never taken for a continuation.
#pragma once

#include <kvcache/cache/block_access.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/bytes.hpp>
#include <kvcache/store/crc32c.hpp>
#include <kvcache/store/format.hpp>
#include <kvcache/store/identity.hpp>
#include <kvcache/store/sequence_image.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

namespace kvcache::inline v0::store {

/// Where a journal goes on: after so many bytes, with a record of that number, chained to that checksum.
struct journal_position {
  // No default, so that {} is an identity where a journal takes either.
  journal_position(std::uint64_t end, std::uint64_t number, std::uint32_t checksum) noexcept
      : bytes(end), next_record(number), chain(checksum) {}

  std::uint64_t bytes;
  std::uint64_t next_record;
  std::uint32_t chain;

  friend bool operator==(const journal_position&, const journal_position&) = default;
};

namespace detail {

inline constexpr std::array<unsigned char, 8> record_magic = {'K', 'V', 'C', 'R', 'E', 'C', '\r', '\n'};
inline constexpr std::size_t record_header_bytes = 64;
inline constexpr std::size_t record_checksum_offset = 16;

struct record_header {
  std::uint64_t number = 0;
  std::uint32_t checksum = 0;  // of this header
  std::uint32_t previous = 0;  // that of the one before, or of the file
  std::uint32_t payload_checksum = 0;
  std::uint32_t every = 0;  // tokens, see journal_options
  std::uint64_t payload_bytes = 0;
  index_t first_token = 0;  // the record has the tokens from here on
  index_t num_tokens = 0;   // of the sequence from now on
  std::uint32_t num_segments = 0;
};

/// Sets the checksum as well.
inline std::array<std::byte, record_header_bytes> encode(record_header& h) {
  std::vector<std::byte> out;
  out.reserve(record_header_bytes);
  byte_writer to(out);
  to.raw(std::as_bytes(std::span(record_magic)));
  to.number(h.number);
  to.number(std::uint32_t{0});
  to.number(h.previous);
  to.number(h.payload_checksum);
  to.number(h.every);
  to.number(h.payload_bytes);
  to.count(h.first_token);
  to.count(h.num_tokens);
  to.number(h.num_segments);
  to.pad(record_header_bytes);
  h.checksum = crc32c(out);
  std::array<std::byte, record_header_bytes> bytes{};
  std::copy(out.begin(), out.end(), bytes.begin());
  std::memcpy(bytes.data() + record_checksum_offset, &h.checksum, sizeof(h.checksum));
  return bytes;
}

/// Nothing if these are not the bytes of the record that comes next.
inline std::optional<record_header> decode(std::span<const std::byte> bytes, const journal_position& at) {
  if (std::memcmp(bytes.data(), record_magic.data(), record_magic.size()) != 0) return std::nullopt;
  byte_reader from(bytes.subspan(record_magic.size()), "record", 0);
  record_header h;
  h.number = from.number<std::uint64_t>();
  h.checksum = from.number<std::uint32_t>();
  h.previous = from.number<std::uint32_t>();
  h.payload_checksum = from.number<std::uint32_t>();
  h.every = from.number<std::uint32_t>();
  h.payload_bytes = from.number<std::uint64_t>();
  h.first_token = static_cast<index_t>(from.number<std::int64_t>());
  h.num_tokens = static_cast<index_t>(from.number<std::int64_t>());
  h.num_segments = from.number<std::uint32_t>();
  std::array<std::byte, record_header_bytes> copy{};
  std::copy(bytes.begin(), bytes.begin() + record_header_bytes, copy.begin());
  std::fill_n(copy.begin() + record_checksum_offset, sizeof(h.checksum), std::byte{0});
  if (crc32c(copy) != h.checksum || h.number != at.next_record || h.previous != at.chain) return std::nullopt;
  return h;
}

/// What the blocks of one layer are after a record, and which of them it has.
struct record_layer {
  kvcache::detail::layer_blocks now;
  index_t first_sealed = 0;  // the codec's blocks [first_sealed, now.num_sealed) are in the record
  index_t first_exact = 0;   // and the exact ones from here on
  bool has_sinks = false;
};

/// \param first_token   of the record
/// \param first_sealed  the codec's blocks before this one have not changed; of no account where the codec does not seal
inline record_layer plan_layer(const stored_sequence& s, const kvcache::detail::layer_blocks& now,
                               index_t first_token, index_t first_sealed) {
  const index_t first_block = first_token / s.shape.block_size;
  if (!s.codec.seals) return {now, std::min(first_block, now.num_sealed), now.num_sealed, false};
  return {now, first_sealed, std::max(now.first_exact, first_block),
          s.codec.sink_tokens > 0 && now.num_sealed > 0 && first_sealed == 0};
}

/// The blocks of a sequence where they lie, to be read into.
template <class Cache>
struct blocks_in_place {
  Cache& cache;

  [[nodiscard]] std::byte* block(index_t layer, index_t head, index_t index, index_t) const {
    return access::block(cache, layer, head, index);
  }
  [[nodiscard]] std::byte* exact_block(index_t layer, index_t head, index_t index, index_t) const {
    return access::exact_block(cache, layer, head, index);
  }
  [[nodiscard]] std::byte* sinks(index_t layer, index_t head, index_t) const {
    return access::sinks(cache, layer, head);
  }
};

/// Calls use(data, bytes) for the blocks of a layer that a record has, in order.
/// \param blocks  gives each, as blocks_in_place does; told how many slots have tokens, and how many blocks are sealed
template <class Blocks, class Use>
void for_each_block(Blocks& blocks, const stored_sequence& s, index_t layer, const record_layer& part,
                    Use use) {
  const auto bytes = static_cast<std::size_t>(s.block_bytes[static_cast<std::size_t>(layer)]);
  const index_t all = ceil_div(part.now.size, s.shape.block_size);
  const bool is_empty = part.first_sealed >= part.now.num_sealed &&
                        (!s.codec.seals || part.first_exact >= all) && !part.has_sinks;
  const auto num_tokens = [&](index_t b) {
    return std::min(s.shape.block_size, part.now.size - b * s.shape.block_size);
  };
  for (index_t head = 0; !is_empty && head < s.shape.num_kv_heads; ++head) {
    for (index_t b = part.first_sealed; b < part.now.num_sealed; ++b)
      use(blocks.block(layer, head, b, num_tokens(b)), bytes);
    if (!s.codec.seals) continue;
    for (index_t b = part.first_exact; b < all; ++b)
      use(blocks.exact_block(layer, head, b, num_tokens(b)), static_cast<std::size_t>(exact_block_bytes(s)));
    if (part.has_sinks)
      use(blocks.sinks(layer, head, part.now.num_sealed), static_cast<std::size_t>(sink_bytes(s)));
  }
}

/// Bytes of these blocks. Throws shape_error if they cannot be counted.
inline index_t blocks_bytes(const stored_sequence& s, std::size_t layer, const record_layer& part) {
  index_t bytes =
      checked_mul(std::max(part.now.num_sealed - part.first_sealed, index_t{0}), s.block_bytes[layer]);
  if (s.codec.seals) {
    const index_t all = ceil_div(part.now.size, s.shape.block_size);
    bytes =
        checked_add(bytes, checked_mul(std::max(all - part.first_exact, index_t{0}), exact_block_bytes(s)));
    bytes = checked_add(bytes, part.has_sinks ? sink_bytes(s) : 0);
  }
  return checked_mul(s.shape.num_kv_heads, bytes);
}

/// The part of the payload before the blocks, and how it is laid out.
struct record_tables {
  std::vector<token_id> tokens;  // from first_token on
  std::vector<position_segment> segments;
  std::vector<record_layer> layers;  // [num_layers]

  void encode(const stored_sequence& s, std::vector<std::byte>& out) const {
    byte_writer to(out);
    to.raw(std::as_bytes(std::span(tokens)));
    for (const position_segment& p : segments) {
      for (const index_t n : {p.first_token, p.first_position, p.rotation}) to.count(n);
    }
    for (const record_layer& l : layers) {
      if (!s.codec.seals) break;
      for (const index_t n : {l.first_sealed, l.now.num_sealed, l.now.first_exact}) to.count(n);
    }
    to.pad(64);
  }

  /// Bytes of the tables, padding included, as far as they can be within `limit`; more than that is more than there is.
  static std::uint64_t bytes(const stored_sequence& s, const record_header& h) noexcept {
    const auto num_tokens = static_cast<std::uint64_t>(h.num_tokens - h.first_token);
    return padded(4 * num_tokens + 24 * std::uint64_t{h.num_segments} +
                  (s.codec.seals ? 24 * static_cast<std::uint64_t>(s.shape.num_layers) : 0));
  }

  /// Throws load_error if the numbers cannot be.
  static record_tables decode(const stored_sequence& s, const record_header& h, byte_reader from) {
    record_tables t;
    t.tokens = decode_tokens(from.raw(4 * static_cast<std::size_t>(h.num_tokens - h.first_token)));
    for (std::uint32_t i = 0; i < h.num_segments; ++i) {
      const auto first_token = from.number<std::int64_t>();
      const auto first_position = from.number<std::int64_t>();
      t.segments.push_back({first_token, first_position, from.number<std::int64_t>()});
    }
    const index_t all = ceil_div(h.num_tokens, s.shape.block_size);
    for (index_t layer = 0; layer < s.shape.num_layers; ++layer) {
      kvcache::detail::layer_blocks now{h.num_tokens, all, all};
      index_t first_sealed = 0;
      if (s.codec.seals) {
        first_sealed = from.count();
        now.num_sealed = from.count();
        now.first_exact = from.count();
        if (first_sealed > now.num_sealed) from.refuse("a record has no such blocks", 24);
      }
      t.layers.push_back(plan_layer(s, now, h.first_token, first_sealed));
    }
    return t;
  }
};

}  // namespace detail

}  // namespace kvcache::inline v0::store
