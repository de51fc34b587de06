// SPDX-License-Identifier: MIT
// The groups of components that klt stores a row in: bytes, and codes of trellises.
//
//   component[i] in spreads of the calibration and the row's scale = unit * level[i]      unit: what a level counts
//
// Groups are unpacked to their levels, side by side, before they are multiplied. How rows become components, and their
// scales: codec/klt_rows.hpp.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/klt_scales.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/low_rank_side.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/codec/trellis_tables.hpp>
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
#include <type_traits>

namespace kvcache::inline v0::codec::detail {

/// Which part of a group is unpacked, and where to.
struct klt_piece {
  index_t token;          ///< the first, a multiple of 64
  index_t num_tokens;     ///< at most 64
  const std::byte* next;  ///< the group in the block that is read next, fetched meanwhile; may be null
  std::int8_t* out;       ///< block order of bytes, but for `stride`
  index_t stride;         ///< bytes from one group of 16 keys, or pack of four values, to the next
};

/// Components in bytes, up to 5 spreads. \tparam Order  keys_in_order or values_in_order
template <class Order>
struct klt_bytes {
  static constexpr bool fine = true;  ///< takes queries of more than 8 bits
  static constexpr float reach = 5.0F;
  static constexpr float unit = reach / 127.0F;
  static constexpr double error = 1.3e-4;  ///< relative, of normally distributed components of one spread

  static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return round_up(Order::size(g), block_alignment);
  }
  static constexpr index_t row_bytes(const block_geometry& g) noexcept { return g.head_dim; }

  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t token,
                     const float* row) {
    alignas(64) component_row clamped;
    std::transform(row, row + g.head_dim, clamped.begin(),
                   [](float x) { return std::clamp(x, -reach, reach); });
    Order::put_bytes(kernels, g, section, token, clamped.data(), unit);
  }
  static void decode(const block_geometry& g, const std::byte* section, index_t token, float* row) {
    for (index_t d = 0; d < g.head_dim; ++d)
      row[d] = static_cast<float>(static_cast<std::int8_t>(section[Order::index(g, token, d)]));
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    Order::move_row(g, from, from_slot, to, to_slot);
  }
  static void unpack(const kernel::table& /*kernels*/, const block_geometry& g, const std::byte* section,
                     const klt_piece& piece) {
    constexpr index_t run = Order::run_tokens;
    const index_t bytes = Order::size({run, g.head_dim});
    const index_t first = piece.token / run * bytes;
    fetch_behind(piece.next, first, first + ceil_div(piece.num_tokens, run) * bytes);
    for (index_t i = 0; i < ceil_div(piece.num_tokens, run); ++i)
      copy_bytes(section + first + i * bytes, bytes, piece.out + i * piece.stride);
  }

 private:
  /// In steps of 16 that need no call.
  static void copy_bytes(const std::byte* from, index_t count, std::int8_t* to) noexcept {
    index_t i = 0;
    for (; i + 16 <= count; i += 16) std::memcpy(to + i, from + i, 16);
    for (; i < count; i += 4) std::memcpy(to + i, from + i, 4);
  }
};

/// Codes of four, two or one bits.
template <int Bits, class Order>
struct klt_code_bits : packed_codes<Bits, Order> {
  static std::int8_t* unpack(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                             const klt_piece& piece, unpacked_lines& memory) {
    return unpack_times<1>(kernels, g, section, piece, memory);
  }
  /// Codes times `Factor`.
  template <int Factor>
  static std::int8_t* unpack_times(const kernel::table& kernels, const block_geometry& g,
                                   const std::byte* section, const klt_piece& piece, unpacked_lines& memory) {
    return packed_codes<Bits, Order>::unpack_piece(
        g, section, piece.token, piece.num_tokens, piece.next,
        [&](const std::byte* from, index_t first_line, index_t num_lines, std::int8_t* out,
            const std::byte* next) {
          kernels.low_bit.unpack(Bits, from, first_line, num_lines, multiples<Factor>.data(), out, next);
        },
        memory);
  }

 private:
  template <int Factor>
  static constexpr std::array<std::int8_t, 16> multiples = [] {
    std::array<std::int8_t, 16> made{};
    for (int code = 0; code < (1 << Bits); ++code)
      made[static_cast<std::size_t>(code)] = static_cast<std::int8_t>(Factor * code);
    return made;
  }();
};

/// Codes of 3, 5 and 6 bits: the low two or four in one section, the others in one behind it.
template <int Bits, class Order>
requires(Bits == 3 || Bits > 4) struct klt_code_bits<Bits, Order> {
  static constexpr int low_bits = Bits == 3 ? 2 : 4;
  using low = klt_code_bits<low_bits, Order>;
  using high = klt_code_bits<Bits - low_bits, Order>;

  static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return low::section_bytes(g) + high::section_bytes(g);
  }
  static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    return low::row_bytes(g) + high::row_bytes(g);
  }
  static void put(const block_geometry& g, std::byte* section, index_t token, std::uint8_t* codes) noexcept {
    code_row upper{};
    for (index_t d = 0; d < g.head_dim; ++d) {
      upper[static_cast<std::size_t>(d)] = static_cast<std::uint8_t>(codes[d] >> low_bits);
      codes[d] &= (1U << low_bits) - 1;
    }
    low::put(g, section, token, codes);
    high::put(g, section + low::section_bytes(g), token, upper.data());
  }
  static std::uint8_t get(const block_geometry& g, const std::byte* section, index_t token,
                          index_t dim) noexcept {
    const unsigned upper = high::get(g, section + low::section_bytes(g), token, dim);
    return static_cast<std::uint8_t>(upper << low_bits | low::get(g, section, token, dim));
  }
  static std::int8_t* unpack(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                             const klt_piece& piece, unpacked_lines& memory) {
    const index_t skip = low::section_bytes(g);
    klt_piece behind = piece;
    if (behind.next != nullptr) behind.next += skip;
    alignas(64) unpacked_lines upper_memory;
    std::int8_t* codes = low::unpack(kernels, g, section, piece, memory);
    const std::int8_t* upper =
        high::template unpack_times<1 << low_bits>(kernels, g, section + skip, behind, upper_memory);
    const index_t size = Order::lines_for(g, piece.num_tokens) * line_bytes;
    for (index_t i = 0; i < size; i += line_bytes) {
      for (index_t j = 0; j < line_bytes; ++j)
        codes[i + j] = static_cast<std::int8_t>(codes[i + j] | upper[i + j]);
    }
    return codes;
  }
};

/// Components in codes of a trellis, up to 3.5 spreads; with fewer than 5 bits those up to 4.5 as if they were no larger.
template <int Bits, class Order>
struct klt_codes {
  using codes = klt_code_bits<Bits, Order>;
  static constexpr bool fine = Bits > 5;
  static constexpr float unit = 1.0F / kernel::trellis_unit;
  static constexpr float largest = 127 * unit;
  static constexpr float reach = Bits > 5 ? largest : 4.5F;
  static constexpr double error =
      std::array{0.0913, 0.0246, 0.0066, 0.0018, 0.00052}[Bits - 2];  ///< as in klt_bytes

  static constexpr index_t section_bytes(const block_geometry& g) noexcept { return codes::section_bytes(g); }
  static constexpr index_t row_bytes(const block_geometry& g) noexcept { return codes::row_bytes(g); }

  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t token,
                     const float* row) {
    alignas(64) component_row clamped;
    std::transform(row, row + g.head_dim, clamped.begin(),
                   [](float x) { return std::clamp(x, -largest, largest); });
    code_row row_codes;
    kernels.trellis.encode(Bits, clamped.data(), g.head_dim, table(), 1.0F, row_codes.data());
    codes::put(g, section, token, row_codes.data());
  }
  static void decode(const block_geometry& g, const std::byte* section, index_t token, float* row) {
    trellis_levels<Bits>(codes_of(g, section, token).data(), g.head_dim, table(), row);
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    code_row row_codes = codes_of(g, from, from_slot);
    codes::put(g, to, to_slot, row_codes.data());
  }
  static void unpack(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                     const klt_piece& piece) {
    constexpr bool keys = std::is_same_v<Order, keys_in_order>;
    const kernel::trellis_kernels& trellis = kernels.trellis;
    const auto at_once = keys ? trellis.unpack_keys : trellis.unpack_values;
    if (at_once != nullptr && at_once({Bits, section, table()}, g, piece.token, piece.num_tokens, piece.out,
                                      piece.stride, piece.next))
      return;
    alignas(64) unpacked_lines memory;
    const auto* bytes =
        reinterpret_cast<const std::uint8_t*>(codes::unpack(kernels, g, section, piece, memory));
    const auto decode_runs = keys ? trellis.decode_keys : trellis.decode_values;
    decode_runs(Bits, g.head_dim, ceil_div(piece.num_tokens, Order::run_tokens), bytes, table(), piece.out,
                piece.stride);
  }

 private:
  static constexpr const std::int8_t* table() noexcept { return short_trellis_table(Bits); }
  static code_row codes_of(const block_geometry& g, const std::byte* section, index_t token) noexcept {
    code_row row_codes;
    for (index_t d = 0; d < g.head_dim; ++d)
      row_codes[static_cast<std::size_t>(d)] = codes::get(g, section, token, d);
    return row_codes;
  }
};

/// Calls body(Group{}, component_group) for each group there is, in order; offsets are behind the scales.
template <class Order, class Body>
void for_each_klt_group(const low_rank_layout& layout, index_t block_size, Body body) {
  index_t first = 0;
  index_t offset = klt_scales_bytes(block_size);
  const auto visit = [&]<class Group>(Group group, index_t count) {
    if (count == 0) return;
    const block_geometry g{block_size, count};
    const index_t end = offset + Group::section_bytes(g);
    body(group, component_group{first, offset, end, g});
    first += count;
    offset = end;
  };
  visit(klt_bytes<Order>{}, layout.int8);
  visit(klt_codes<6, Order>{}, layout.bits6);
  visit(klt_codes<5, Order>{}, layout.bits5);
  visit(klt_codes<4, Order>{}, layout.bits4);
  visit(klt_codes<3, Order>{}, layout.bits3);
  visit(klt_codes<2, Order>{}, layout.bits2);
}

/// Dims of the keys' groups that are multiplied together, each from a line of its own on.
template <bool Fine>
index_t klt_dims(const low_rank_layout& layout) {
  constexpr index_t line = keys_in_order::order::pack;
  index_t dims = 0;
  for_each_klt_group<keys_in_order>(layout, block_alignment, [&](auto group, const component_group& part) {
    if (group.fine == Fine) dims += round_up(part.geometry.head_dim, line);
  });
  return dims;
}

/// Bytes of one row, its scale included, and of the section.
struct klt_sizes {
  index_t row = 0;
  index_t section = 0;
};
template <class Order>
klt_sizes klt_sizes_of(const low_rank_layout& layout, index_t block_size) {
  klt_sizes sizes{1, klt_scales_bytes(block_size)};
  for_each_klt_group<Order>(layout, block_size, [&](auto group, const component_group& part) {
    sizes.row += group.row_bytes(part.geometry);
    sizes.section = part.next_offset;
  });
  return sizes;
}

}  // namespace kvcache::inline v0::codec::detail
