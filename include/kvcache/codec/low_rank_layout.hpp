// SPDX-License-Identifier: MIT
// What low_rank stores of a row: how many components, and with how many bits each.
//
//   row: | f32 | bf16 | int8 | 4 bits | 2 bits |      components by falling energy; those behind are not stored
//
// Layouts of klt (codec/klt_rows.hpp) have no f32 and bf16, but 6, 5 and 3 bits.
//
// A group of components is a section of its own, encoded by the side of that name over rows as long as the group:
//
//   f32, bf16   32, 16 bits                                  codec/exact.hpp
//   int8        8 bits and one scale for each token          codec/int8.hpp
//   4, 2 bits   4, 2 bits and one scale for each token       codec/rotated.hpp
//
//   bytes of a row = 4 f32 + 2 bf16 + (int8 + 2) + (ceil(bits4 / 2) + 2) + (ceil(bits2 / 4) + 2)    groups there are
//
// How a layout is chosen from options: codec/low_rank_chooser.hpp.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <array>
#include <numeric>

namespace kvcache::inline v0::codec {

/// Components in each group, those with the most energy first.
struct low_rank_layout {
  index_t f32 = 0;
  index_t bf16 = 0;
  index_t int8 = 0;
  index_t bits6 = 0;  ///< klt alone
  index_t bits5 = 0;  ///< klt alone
  index_t bits4 = 0;
  index_t bits3 = 0;  ///< klt alone
  index_t bits2 = 0;
  bool best_scales = false;  ///< klt alone: see klt_options

  using counts_type = std::array<index_t, 8>;
  [[nodiscard]] constexpr counts_type counts() const noexcept {
    return {f32, bf16, int8, bits6, bits5, bits4, bits3, bits2};
  }
  static constexpr low_rank_layout of(const counts_type& c) noexcept {
    return {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], false};
  }
  [[nodiscard]] constexpr index_t rank() const noexcept {
    const counts_type all = counts();
    return std::accumulate(all.begin(), all.end(), index_t{0});
  }
  /// Of these components no scale is stored.
  [[nodiscard]] constexpr index_t num_exact() const noexcept { return f32 + bf16; }
  /// Components of sizes that low_rank has not.
  [[nodiscard]] constexpr index_t num_of_klt() const noexcept { return bits6 + bits5 + bits3; }

  friend bool operator==(const low_rank_layout&, const low_rank_layout&) = default;
};

/// How the components that are kept are stored.
enum class component_store {
  exact32,    ///< float
  exact16,    ///< bfloat16; with `rank`: plain truncated SVD
  bytes,      ///< 8 bits, one scale for each token
  allocated,  ///< 8, 4, 2 or 0 bits each, as fits `bits_per_value` best
};

/// Exactly one of rank, energy, bits_per_value and layout is given.
struct low_rank_options {
  index_t rank = 0;   ///< components kept, 1 to head_dim
  double energy = 0;  ///< as many as hold this share of the energy in every head, above 0, at most 1
  double bits_per_value =
      0;  ///< as many as fit into block_size * head_dim * this many bits, scales and padding included
  component_store store = component_store::bytes;
  low_rank_layout layout = {};  ///< all of it as it is; `store` is not looked at
  double ridge = 1e-6;          ///< what query moments have on their diagonal at least, relative to its mean
  /// With `energy` or `bits_per_value`: each layer has a layout of its own. Of all layers together as many bits as
  /// bits_per_value says, given to those where they save the most; each head's energy counts as 1.
  bool by_layer = false;
  bool left_out = false;  ///< no bases: keys, or values, have another codec. Nothing else is looked at

  friend bool operator==(const low_rank_options&, const low_rank_options&) = default;
};

namespace detail {

/// The sides that the groups of keys, or of values, are stored with.
struct key_groups {
  using f32 = exact_keys<float>;
  using bf16 = exact_keys<bfloat16>;
  using int8 = int8_keys;
  using bits4 = codec::rotated_keys<4>;
  using bits2 = codec::rotated_keys<2>;
};
struct value_groups {
  using f32 = exact_values<float>;
  using bf16 = exact_values<bfloat16>;
  using int8 = int8_values;
  using bits4 = codec::rotated_values<4>;
  using bits2 = codec::rotated_values<2>;
};

/// Where a group lies.
struct component_group {
  index_t first;            ///< component
  index_t offset;           ///< bytes from the start of the section
  index_t next_offset;      ///< where it ends
  block_geometry geometry;  ///< head_dim is the number of components
};

/// Calls body(side, component_group) for each group there is, in order. \tparam Groups  key_groups or value_groups
template <class Groups, class Body>
void for_each_group(const low_rank_layout& layout, index_t block_size, Body body) {
  index_t first = 0;
  index_t offset = 0;
  const auto visit = [&]<class Side>(const Side& side, index_t count) {
    if (count == 0) return;
    const block_geometry g{block_size, count};
    const index_t end = offset + side.section_bytes(g);
    body(side, component_group{first, offset, end, g});
    first += count;
    offset = end;
  };
  visit(typename Groups::f32{}, layout.f32);
  visit(typename Groups::bf16{}, layout.bf16);
  visit(typename Groups::int8{}, layout.int8);
  visit(typename Groups::bits4{}, layout.bits4);
  visit(typename Groups::bits2{}, layout.bits2);
}

/// Bytes of the sections of all groups.
template <class Groups>
index_t section_bytes(const low_rank_layout& layout, index_t block_size) {
  index_t bytes = 0;
  for_each_group<Groups>(layout, block_size, [&](const auto& /*side*/, const component_group& group) {
    bytes = group.next_offset;
  });
  return bytes;
}

/// Bytes that one more row takes.
template <class Groups>
index_t row_bytes(const low_rank_layout& layout, index_t block_size) {
  index_t bytes = 0;
  for_each_group<Groups>(layout, block_size, [&](const auto& side, const component_group& group) {
    bytes += side.row_bytes(group.geometry);
  });
  return bytes;
}

/// A layout that a layer may have, what its section takes, and what error it is expected to leave, a share for each head.
struct layout_choice {
  low_rank_layout layout;
  index_t bytes = 0;
  double error = 0;
};

}  // namespace detail

}  // namespace kvcache::inline v0::codec
