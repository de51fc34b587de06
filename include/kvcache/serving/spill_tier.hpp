// SPDX-License-Identifier: MIT
// spill_tier: where a cache_manager puts blocks that it has no memory for; and what it puts there.
//
//   value   | magic | element bytes | tokens | layers | row | checksum |  layer 0: keys, values | layer 1: ...
//   key     a prefix_space, and all tokens up to the end of the block
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/serving/prefix_node.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace kvcache::inline v0::serving {

/// A store of bytes by space and tokens. Members may throw std::bad_alloc only; what they do about files or networks
/// that fail is to answer false, or a negative number.
///
/// `put(space, tokens, bytes)`   keeps the bytes; false if it does not
/// `get(space, tokens, out)`     writes what was put to the front of `out`; how many bytes, negative if there are none
///                               or more than fit
/// `contains(space, tokens)`     whether get is likely to find it
/// `erase(space, tokens)`        forgets it
template <class T>
concept spill_tier = requires(T& tier, const prefix_space& space, std::span<const token_id> tokens,
                              std::span<const std::byte> bytes, std::span<std::byte> out) {
  { tier.put(space, tokens, bytes) } -> std::same_as<bool>;
  { tier.get(space, tokens, out) } -> std::same_as<index_t>;
  { tier.contains(space, tokens) } -> std::same_as<bool>;
  tier.erase(space, tokens);
};

/// None attached.
struct no_spill_tier {};

namespace detail {

struct spill_header {
  std::uint32_t magic = 0x6B765331U;  // also tells the order of bytes
  std::uint32_t element_bytes = 0;    // 2: bf16, where that is exact; 4: float
  std::uint32_t tokens = 0;
  std::uint32_t layers = 0;
  std::uint32_t row = 0;  // floats of one token in one layer, keys or values
  std::uint32_t reserved = 0;
  std::uint64_t checksum = 0;  // of what follows

  friend bool operator==(const spill_header&, const spill_header&) = default;
};

inline std::uint64_t spill_checksum(std::span<const std::byte> bytes) noexcept {
  std::uint64_t h = bytes.size();
  std::size_t at = 0;
  for (; at + 8 <= bytes.size(); at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, 8);
    h = mixed_bits(h ^ word);
  }
  for (; at < bytes.size(); ++at) h = mixed_bits(h ^ static_cast<std::uint64_t>(bytes[at]));
  return h;
}

inline std::size_t spilled_floats(const cache_shape& shape, index_t tokens) noexcept {
  return static_cast<std::size_t>(2 * shape.num_layers * tokens * shape.num_kv_heads * shape.head_dim);
}

/// The most bytes that so many tokens take.
inline std::size_t most_spilled_bytes(const cache_shape& shape, index_t tokens) noexcept {
  return sizeof(spill_header) + spilled_floats(shape, tokens) * sizeof(float);
}

/// Tokens [first, last) of a sequence as bytes: nothing that its codec stored is lost. Throws std::bad_alloc.
template <class Cache>
std::vector<std::byte> spilled_rows(const Cache& cache, index_t first, index_t last) {
  const cache_shape shape = cache.shape();
  std::vector<float> floats(spilled_floats(shape, last - first));
  const std::size_t part = floats.size() / static_cast<std::size_t>(2 * shape.num_layers);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const std::span<float> both =
        std::span(floats).subspan(2 * part * static_cast<std::size_t>(layer), 2 * part);
    cache[layer].copy_out(first, last - first, both.first(part), both.last(part));
  }
  const bool in_16_bits = std::all_of(floats.begin(), floats.end(), [](float x) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof(bits));
    return (bits & 0xFFFFU) == 0;
  });
  spill_header header;
  header.element_bytes = in_16_bits ? 2 : 4;
  header.tokens = static_cast<std::uint32_t>(last - first);
  header.layers = static_cast<std::uint32_t>(shape.num_layers);
  header.row = static_cast<std::uint32_t>(shape.num_kv_heads * shape.head_dim);
  std::vector<std::byte> bytes(sizeof(header) + floats.size() * header.element_bytes);
  std::byte* to = bytes.data() + sizeof(header);
  for (const float x : floats) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof(bits));
    const auto high = static_cast<std::uint16_t>(bits >> 16);
    if (in_16_bits) {
      std::memcpy(to, &high, sizeof(high));
    } else {
      std::memcpy(to, &bits, sizeof(bits));
    }
    to += header.element_bytes;
  }
  header.checksum = spill_checksum(std::span(bytes).subspan(sizeof(header)));
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

/// The rows of `tokens` tokens from what a tier gave, or nothing if it is not that. Layer by layer, keys before values.
/// Throws std::bad_alloc.
inline std::vector<float> restored_rows(const cache_shape& shape, index_t tokens,
                                        std::span<const std::byte> bytes) {
  spill_header header;
  if (bytes.size() < sizeof(header)) return {};
  std::memcpy(&header, bytes.data(), sizeof(header));
  const std::span<const std::byte> body = bytes.subspan(sizeof(header));
  spill_header want;
  want.element_bytes = header.element_bytes == 2 ? 2 : 4;
  want.tokens = static_cast<std::uint32_t>(tokens);
  want.layers = static_cast<std::uint32_t>(shape.num_layers);
  want.row = static_cast<std::uint32_t>(shape.num_kv_heads * shape.head_dim);
  const std::size_t count = spilled_floats(shape, tokens);
  if (body.size() != count * want.element_bytes) return {};
  want.checksum = spill_checksum(body);
  if (header != want) return {};
  std::vector<float> floats(count);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits = 0;
    if (want.element_bytes == 2) {
      std::uint16_t high = 0;
      std::memcpy(&high, body.data() + 2 * i, sizeof(high));
      bits = std::uint32_t{high} << 16;
    } else {
      std::memcpy(&bits, body.data() + 4 * i, sizeof(bits));
    }
    std::memcpy(&floats[i], &bits, sizeof(bits));
  }
  return floats;
}

/// Appends tokens [skip, tokens) of restored rows to every layer. \return as try_append; then nothing changed
template <class Cache>
[[nodiscard]] status append_restored(Cache& cache, std::span<const float> floats, index_t tokens,
                                     index_t skip) {
  const cache_shape shape = cache.shape();
  const auto row = static_cast<std::size_t>(shape.num_kv_heads * shape.head_dim);
  const std::size_t part = static_cast<std::size_t>(tokens) * row;
  const index_t before = cache.size();
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const std::span<const float> both = floats.subspan(2 * part * static_cast<std::size_t>(layer), 2 * part);
    const std::size_t from = static_cast<std::size_t>(skip) * row;
    if (const status s =
            cache[layer].try_append(both.first(part).subspan(from), both.last(part).subspan(from));
        s != status::ok) {
      cache.truncate(before);
      return s;
    }
  }
  return status::ok;
}

}  // namespace detail
}  // namespace kvcache::inline v0::serving
