// SPDX-License-Identifier: MIT
// quads: bytes that belong to one of four tokens side by side, as rows of values do in the block order of bytes.
//
//   bytes   b0 b1 b2 ...       slot 1:   | .  b0 .  . | .  b1 .  . | .  b2 .  . | ...      the dots stay as they are
#pragma once

#include <kvcache/core/types.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvcache::inline v0 {

namespace detail {

/// Sixteen bytes in a register of any processor.
using byte_vector [[gnu::vector_size(16)]] = std::uint8_t;

inline byte_vector load_bytes(const void* from) noexcept {
  byte_vector loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return loaded;
}

template <int Slot>
void put_in_quads(std::byte* quads, const std::uint8_t* bytes) noexcept {
  constexpr byte_vector none{};
  constexpr std::uint8_t k = 0xff;
  constexpr std::uint8_t kept[4] = {Slot == 0 ? std::uint8_t{0} : k, Slot == 1 ? std::uint8_t{0} : k,
                                    Slot == 2 ? std::uint8_t{0} : k, Slot == 3 ? std::uint8_t{0} : k};
  constexpr byte_vector mask{kept[0], kept[1], kept[2], kept[3], kept[0], kept[1], kept[2], kept[3],
                             kept[0], kept[1], kept[2], kept[3], kept[0], kept[1], kept[2], kept[3]};
  const byte_vector in = load_bytes(bytes);
  // Bytes into pairs, pairs into quads, zeros beside them.
  const byte_vector a = Slot % 2 == 0 ? in : none;
  const byte_vector b = Slot % 2 == 0 ? none : in;
  const byte_vector pairs[2] = {
      __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
  for (int i = 0; i < 2; ++i, quads += 32) {
    const byte_vector c = Slot < 2 ? pairs[i] : none;
    const byte_vector d = Slot < 2 ? none : pairs[i];
    const byte_vector low =
        __builtin_shufflevector(c, d, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
    const byte_vector high =
        __builtin_shufflevector(c, d, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
    const byte_vector all[2] = {(load_bytes(quads) & mask) | low, (load_bytes(quads + 16) & mask) | high};
    std::memcpy(quads, all, sizeof(all));
  }
}

}  // namespace detail

/// Byte `slot` of each of 16 quads becomes that of `bytes`, [16]; the others stay. \pre 0 <= slot < 4
inline void put_in_quads(std::byte* quads, index_t slot, const std::uint8_t* bytes) noexcept {
  if (slot == 0) return detail::put_in_quads<0>(quads, bytes);
  if (slot == 1) return detail::put_in_quads<1>(quads, bytes);
  if (slot == 2) return detail::put_in_quads<2>(quads, bytes);
  return detail::put_in_quads<3>(quads, bytes);
}

}  // namespace kvcache::inline v0
