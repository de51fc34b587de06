// SPDX-License-Identifier: MIT
// spill_tier: where a cache_manager puts blocks that it has no memory for; and what it puts there.
//
//   value   | magic | element bytes | tokens | layers | row | checksum |  layer 0: keys, values | layer 1: ...
//   key     a prefix_space, and all tokens up to the end of the block
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/serving/prefix_node.hpp>

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

/// Numbers of one token in one layer, keys or values; and of so many tokens in all layers, both.
inline std::size_t row_floats(const cache_shape& shape) noexcept {
  return static_cast<std::size_t>(shape.num_kv_heads * shape.head_dim);
}
inline std::size_t spilled_floats(const cache_shape& shape, index_t tokens) noexcept {
  return static_cast<std::size_t>(2 * shape.num_layers * tokens) * row_floats(shape);
}

/// The most bytes that so many tokens take.
inline std::size_t most_spilled_bytes(const cache_shape& shape, index_t tokens) noexcept {
  return sizeof(spill_header) + spilled_floats(shape, tokens) * sizeof(float);
}

/// Bytes of memory that spilling or restoring so many tokens works in, at most: those, and one layer as floats.
inline index_t spill_work_bytes(const cache_shape& shape, index_t tokens) noexcept {
  const std::size_t layer_floats = spilled_floats(shape, tokens) / static_cast<std::size_t>(shape.num_layers);
  return static_cast<index_t>(most_spilled_bytes(shape, tokens) + layer_floats * sizeof(float));
}

inline spill_header header_of(const cache_shape& shape, index_t tokens) noexcept {
  spill_header header;
  header.tokens = static_cast<std::uint32_t>(tokens);
  header.layers = static_cast<std::uint32_t>(shape.num_layers);
  header.row = static_cast<std::uint32_t>(row_floats(shape));
  return header;
}

/// Leaves of floats their upper halves, if nothing else is in any of them. \return the bytes that are left
inline std::size_t halve_floats(std::span<std::byte> floats) noexcept {
  constexpr std::size_t whole = sizeof(float), half = whole / 2;
  for (std::size_t at = 0; at < floats.size(); at += whole)
    if (floats[at] != std::byte{0} || floats[at + 1] != std::byte{0}) return floats.size();
  for (std::size_t at = 0; at < floats.size(); at += whole)
    std::memmove(floats.data() + at / 2, floats.data() + at + half, half);
  return floats.size() / 2;
}

/// Tokens [first, last) of a sequence as bytes: nothing that its codec stored is lost. Throws std::bad_alloc.
template <class Cache>
std::vector<std::byte> spilled_rows(const Cache& cache, index_t first, index_t last) {
  const cache_shape shape = cache.shape();
  std::vector<std::byte> bytes(most_spilled_bytes(shape, last - first));
  const std::span<std::byte> body = std::span(bytes).subspan(sizeof(spill_header));
  const std::size_t part = static_cast<std::size_t>(last - first) * row_floats(shape);
  std::vector<float> layer_rows(2 * part);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const std::span<float> both(layer_rows);
    cache[layer].copy_out(first, last - first, both.first(part), both.last(part));
    std::memcpy(body.data() + static_cast<std::size_t>(layer) * both.size_bytes(), both.data(),
                both.size_bytes());
  }
  const std::size_t left = halve_floats(body);
  spill_header header = header_of(shape, last - first);
  header.element_bytes = left == body.size() ? 4 : 2;
  header.checksum = spill_checksum(body.first(left));
  std::memcpy(bytes.data(), &header, sizeof(header));
  bytes.resize(sizeof(header) + left);
  return bytes;
}

/// Whether these bytes are what spilled_rows made of so many tokens.
inline bool are_spilled(const cache_shape& shape, index_t tokens, std::span<const std::byte> bytes) noexcept {
  spill_header header;
  if (bytes.size() < sizeof(header)) return false;
  std::memcpy(&header, bytes.data(), sizeof(header));
  const std::span<const std::byte> body = bytes.subspan(sizeof(header));
  spill_header want = header_of(shape, tokens);
  want.element_bytes = header.element_bytes == 2 ? 2 : 4;
  if (body.size() != spilled_floats(shape, tokens) * want.element_bytes) return false;
  want.checksum = spill_checksum(body);
  return header == want;
}

/// Appends tokens [skip, tokens) of such bytes to every layer. \return as try_append; then nothing changed
/// Throws std::bad_alloc.
template <class Cache>
[[nodiscard]] status append_spilled(Cache& cache, std::span<const std::byte> bytes, index_t tokens,
                                    index_t skip) {
  const cache_shape shape = cache.shape();
  const std::span<const std::byte> body = bytes.subspan(sizeof(spill_header));
  const std::size_t element = body.size() / spilled_floats(shape, tokens);
  const std::size_t part = static_cast<std::size_t>(tokens) * row_floats(shape);
  const std::size_t from = static_cast<std::size_t>(skip) * row_floats(shape);
  const index_t before = cache.size();
  std::vector<float> layer_rows(2 * part);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const std::byte* stored = body.data() + static_cast<std::size_t>(layer) * 2 * part * element;
    for (std::size_t i = 0; i < layer_rows.size(); ++i) {
      std::byte x[sizeof(float)] = {};
      std::memcpy(x + sizeof(float) - element, stored + i * element, element);
      std::memcpy(&layer_rows[i], x, sizeof(float));
    }
    codec::fit_into(cache, layer_rows);
    const std::span<const float> both(layer_rows);
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
