// SPDX-License-Identifier: MIT
// What codecs of 2, 3 and 4 bits share: where a code lies, and multiplying a section that is unpacked piece by piece.
//
//   codes:  block order of bytes, then packed (block/packed.hpp); a code is an index into 16 bytes of a codebook
//   scores: up to 64 tokens are unpacked to bytes in the first-level cache and serve all query rows; so are sums
#pragma once

#include <kvcache/block/move_row.hpp>
#include <kvcache/block/order.hpp>
#include <kvcache/block/packed.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvcache::inline v0::codec::detail {

/// Bytes in 64-byte lines, and tokens that are unpacked at a time.
inline constexpr index_t line_bytes = 64;
inline constexpr index_t unpacked_tokens = 64;

/// Memory for what is unpacked: 64 tokens, and as much in front of them as a packed unit may hold.
using unpacked_lines =
    std::array<std::int8_t, (unpacked_tokens * max_head_dim / line_bytes + 8) * line_bytes>;

/// Codes of `Bits` bits for the keys or the values of a block; `Order` is keys_in_order or values_in_order.
template <int Bits, class Order>
struct packed_codes {
  using packed = packed_order<Bits>;

  [[nodiscard]] static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return packed::section_bytes(Order::size(g));
  }
  /// Bytes of the codes of one row, rounded up.
  [[nodiscard]] static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    return ceil_div(g.head_dim * Bits, 8);
  }

  /// \param codes  [head_dim], and three more that are ignored
  static void put(const block_geometry& g, std::byte* section, index_t token, std::uint8_t* codes) noexcept {
    Order::template put<packed>(g, section, token, codes);
  }
  [[nodiscard]] static std::uint8_t get(const block_geometry& g, const std::byte* section, index_t token,
                                        index_t dim) noexcept {
    return packed::get(section, Order::index(g, token, dim));
  }

  /// Unpacks up to 64 tokens from a multiple of 64 on through `unpack`; returns where they begin in `memory`.
  /// \param next  what is read after this section, fetched meanwhile; may be null
  template <class Unpack>
  static std::int8_t* unpack_piece(const block_geometry& g, const std::byte* section, index_t token,
                                   index_t num_tokens, const std::byte* next, Unpack unpack,
                                   unpacked_lines& memory) {
    const index_t first = Order::line(g, token);
    const index_t aligned = first / packed::lines_per_unit * packed::lines_per_unit;
    const index_t num_lines = Order::lines_for(g, num_tokens) + first - aligned;
    unpack(section, aligned, num_lines, memory.data(), next);
    return memory.data() + (first - aligned) * line_bytes;
  }

  /// Calls body(first_token, num_tokens, std::int8_t* bytes) for tokens [0, count), unpacked likewise.
  template <class Unpack, class Body>
  static void for_each_piece(const block_geometry& g, const std::byte* section, index_t count,
                             const std::byte* next, Unpack unpack, Body body) {
    alignas(64) unpacked_lines memory;
    for (index_t t = 0; t < count; t += unpacked_tokens) {
      const index_t num_tokens = std::min(unpacked_tokens, count - t);
      body(t, num_tokens, unpack_piece(g, section, t, num_tokens, next, unpack, memory));
    }
  }
};

struct keys_in_order {
  using order = block_order<std::int8_t>;
  static constexpr index_t run_tokens = key_lanes;  ///< that lie together
  static constexpr index_t size(const block_geometry& g) noexcept { return order::key_size(g); }
  static constexpr index_t index(const block_geometry& g, index_t token, index_t dim) noexcept {
    return order::key_index(g, token, dim);
  }
  /// Where the group of a token begins.
  static constexpr index_t line(const block_geometry& g, index_t token) noexcept {
    return token / key_lanes * order::key_packs(g);
  }
  static constexpr index_t lines_for(const block_geometry& g, index_t num_tokens) noexcept {
    return ceil_div(num_tokens, key_lanes) * order::key_packs(g);
  }
  /// Of bytes that are not packed.
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    move_key_row<std::int8_t>(g, from, from_slot, to, to_slot);
  }
  /// A row as bytes, see kernel::int8_kernels.
  static void put_bytes(const kernel::table& kernels, const block_geometry& g, std::byte* section,
                        index_t token, const float* row, float scale) {
    kernels.int8.put_key(row, g.head_dim, scale,
                         reinterpret_cast<std::int8_t*>(section) + index(g, token, 0));
  }
  template <class Packed>
  static void put(const block_geometry& g, std::byte* section, index_t token, std::uint8_t* codes) {
    for (index_t d = g.head_dim; d % order::pack != 0; ++d) codes[d] = 0;
    Packed::put_row_of_keys(section, line(g, token), token % key_lanes, codes, order::key_packs(g));
  }
};

struct values_in_order {
  using order = block_order<std::int8_t>;
  static constexpr index_t run_tokens = order::pack;  ///< as above
  static constexpr index_t size(const block_geometry& g) noexcept { return order::value_size(g); }
  static constexpr index_t index(const block_geometry& g, index_t token, index_t dim) noexcept {
    return order::value_index(g, token, dim);
  }
  /// \pre token is a multiple of 64
  static constexpr index_t line(const block_geometry& g, index_t token) noexcept {
    return token / line_bytes * g.head_dim;
  }
  static constexpr index_t lines_for(const block_geometry& g, index_t num_tokens) noexcept {
    return ceil_div(round_up(num_tokens, order::pack) * g.head_dim, line_bytes);
  }
  /// Of bytes that are not packed.
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    move_value_row<std::int8_t>(g, from, from_slot, to, to_slot);
  }
  /// A row as bytes, see kernel::int8_kernels.
  static void put_bytes(const kernel::table& kernels, const block_geometry& g, std::byte* section,
                        index_t token, const float* row, float scale) {
    auto* quads = reinterpret_cast<std::int8_t*>(section) + index(g, token / order::pack * order::pack, 0);
    kernels.int8.put_value(row, g.head_dim, scale, token % order::pack, quads);
  }
  template <class Packed>
  static void put(const block_geometry& g, std::byte* section, index_t token, const std::uint8_t* codes) {
    Packed::put_row_of_values(section, index(g, token, 0), codes, g.head_dim);
  }
};

/// A row of codes, and room for the padding behind it.
using code_row = std::array<std::uint8_t, max_head_dim + 4>;

/// Codes that index a codebook of up to 16 bytes, multiplied: at once where the kernels can, else unpacked piece by piece.
template <int Bits>
struct looked_up {
  const kernel::table& kernels;
  const block_geometry& g;
  const std::byte* section;
  const std::int8_t* codebook;
  index_t count;
  const kernel::upcoming& next;

  /// kernels.coarse.scores. \param scales  [count rounded up to 16]
  void scores(const bfloat16* scales, const float* prepared, index_t num_rows, float* scores) const {
    const auto at_once = kernels.low_bit.scores;
    if (at_once != nullptr &&
        at_once({Bits, section, codebook}, g, scales, count, prepared, num_rows, scores, next))
      return;
    for_each_piece<keys_in_order>([&](index_t t, index_t num_tokens, const std::int8_t* levels) {
      kernels.coarse.scores(g, reinterpret_cast<const std::byte*>(levels), scales + t, num_tokens, prepared,
                            num_rows, scores + t, nullptr);
    });
  }

  /// kernels.coarse.accumulate.
  void accumulate(const bfloat16* scales, const float* weights, index_t num_rows, float* sums) const {
    const auto at_once = kernels.low_bit.accumulate;
    if (at_once != nullptr &&
        at_once({Bits, section, codebook}, g, scales, count, weights, num_rows, sums, next))
      return;
    for_each_piece<values_in_order>([&](index_t t, index_t num_tokens, const std::int8_t* levels) {
      kernels.coarse.accumulate(g, reinterpret_cast<const std::byte*>(levels), scales + t, num_tokens,
                                weights + t, num_rows, sums, nullptr);
    });
  }

  /// Calls body(first_token, num_tokens, std::int8_t* bytes), unpacked, piece by piece.
  template <class Order, class Body>
  void for_each_piece(Body body) const {
    packed_codes<Bits, Order>::for_each_piece(
        g, section, count, next,
        [this](const std::byte* from, index_t first_line, index_t num_lines, std::int8_t* out,
               const std::byte* after) {
          kernels.low_bit.unpack(Bits, from, first_line, num_lines, codebook, out, after);
        },
        body);
  }
};

}  // namespace kvcache::inline v0::codec::detail
