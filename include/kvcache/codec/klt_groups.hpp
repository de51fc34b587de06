// SPDX-License-Identifier: MIT
// The groups of components that klt stores a row in: bytes, and codes of trellises.
//
//   component[i] in spreads of the calibration and the row's scale = unit * level[i]      unit: what a level counts
//
// How rows become components, and their scales: codec/klt_rows.hpp.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/low_rank_side.hpp>
#include <kvcache/codec/trellis.hpp>
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

namespace kvcache::inline v0::codec::detail {

/// A scale as it is stored is so many times smaller: levels times scales stay within float as long as components do.
inline constexpr float klt_scale_divisor = 32.0F;
/// 160 times that, of a component of 5 spreads, is within float.
inline constexpr float largest_klt_scale = 0x1.8p120F;

/// Components in bytes, up to 5 spreads. \tparam Order  keys_in_order or values_in_order
template <class Order>
struct klt_bytes {
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
    std::array<std::int8_t, max_head_dim + 4> levels{};
    kernels.int8.quantize(clamped.data(), g.head_dim, unit, levels.data());
    for (index_t d = 0; d < g.head_dim; ++d)
      section[Order::index(g, token, d)] = static_cast<std::byte>(levels[static_cast<std::size_t>(d)]);
  }
  static void decode(const block_geometry& g, const std::byte* section, index_t token, float* row) {
    for (index_t d = 0; d < g.head_dim; ++d)
      row[d] = static_cast<float>(static_cast<std::int8_t>(section[Order::index(g, token, d)]));
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    Order::move_row(g, from, from_slot, to, to_slot);
  }
  static const kernel::int8_kernels& kernels_in(const kernel::table& kernels) noexcept {
    return kernels.int8;
  }
  static void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                     const bfloat16* scales, index_t count, const float* prepared, index_t num_rows,
                     float* scores, const std::byte* next) {
    kernels.int8.scores(g, section, scales, count, prepared, num_rows, scores, next);
  }
  static void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                         const bfloat16* scales, index_t count, const float* weights, index_t num_rows,
                         float* sums, const std::byte* next) {
    kernels.int8.accumulate(g, section, scales, count, weights, num_rows, sums, next);
  }
};

/// Components in codes of a trellis, up to 3.5 spreads, those up to 4.5 as if they were no larger.
template <int Bits, class Order>
struct klt_codes {
  using quantiser = trellis_quantiser<Bits>;
  using codes = packed_codes<Bits, Order>;
  static constexpr float reach = 4.5F;
  static constexpr float unit = 1.0F / kernel::trellis_unit;
  static constexpr float largest = 127 * unit;
  static constexpr double error = Bits == 4 ? 0.0057 : 0.0774;  ///< as in klt_bytes

  static constexpr index_t section_bytes(const block_geometry& g) noexcept { return codes::section_bytes(g); }
  static constexpr index_t row_bytes(const block_geometry& g) noexcept { return codes::row_bytes(g); }

  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t token,
                     const float* row) {
    alignas(64) component_row clamped;
    std::transform(row, row + g.head_dim, clamped.begin(),
                   [](float x) { return std::clamp(x, -largest, largest); });
    code_row row_codes;
    kernels.trellis.encode(Bits, clamped.data(), g.head_dim, quantiser::table(), 1.0F, row_codes.data());
    codes::put(g, section, token, row_codes.data());
  }
  static void decode(const block_geometry& g, const std::byte* section, index_t token, float* row) {
    const code_row row_codes = codes_of(g, section, token);
    quantiser::levels(row_codes.data(), g.head_dim, row);
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    code_row row_codes = codes_of(g, from, from_slot);
    codes::put(g, to, to_slot, row_codes.data());
  }
  static const kernel::int8_kernels& kernels_in(const kernel::table& kernels) noexcept {
    return kernels.coarse;
  }
  static void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                     const bfloat16* scales, index_t count, const float* prepared, index_t num_rows,
                     float* scores, const std::byte* next) {
    quantiser::scores({kernels, g, section, quantiser::unpack_book(), count, next}, scales, prepared,
                      num_rows, scores);
  }
  static void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                         const bfloat16* scales, index_t count, const float* weights, index_t num_rows,
                         float* sums, const std::byte* next) {
    quantiser::accumulate({kernels, g, section, quantiser::unpack_book(), count, next}, scales, weights,
                          num_rows, sums);
  }

 private:
  static code_row codes_of(const block_geometry& g, const std::byte* section, index_t token) noexcept {
    code_row row_codes;
    for (index_t d = 0; d < g.head_dim; ++d)
      row_codes[static_cast<std::size_t>(d)] = codes::get(g, section, token, d);
    return row_codes;
  }
};

/// Calls body(Group{}, component_group) for each group there is, in order.
template <class Order, class Body>
void for_each_klt_group(const low_rank_layout& layout, index_t block_size, Body body) {
  index_t first = 0;
  index_t offset = 0;
  const auto visit = [&]<class Group>(Group group, index_t count) {
    if (count == 0) return;
    const block_geometry g{block_size, count};
    const index_t end = offset + Group::section_bytes(g);
    body(group, component_group{first, offset, end, g});
    first += count;
    offset = end;
  };
  visit(klt_bytes<Order>{}, layout.int8);
  visit(klt_codes<4, Order>{}, layout.bits4);
  visit(klt_codes<2, Order>{}, layout.bits2);
}

/// Bytes of one row's codes in all groups, and of all rows' in a block.
struct klt_sizes {
  index_t row = 0;
  index_t block = 0;
};
template <class Order>
klt_sizes klt_sizes_of(const low_rank_layout& layout, index_t block_size) {
  klt_sizes sizes;
  for_each_klt_group<Order>(layout, block_size, [&](auto group, const component_group& part) {
    sizes.row += group.row_bytes(part.geometry);
    sizes.block = part.next_offset;
  });
  return sizes;
}

}  // namespace kvcache::inline v0::codec::detail
