// SPDX-License-Identifier: MIT
// The exact codecs f32, f16 and bf16: every number stored as one element, narrowed by rounding to nearest.
//
//   block: | keys, block order of the element | pad to 64 bytes | values, block order | pad to 64 bytes |
//
// Relative error of a stored number: 0 for f32, 2^-11 for f16 (range 6e-5 to 65504, beyond becomes infinity),
// 2^-8 for bf16 (the range of float). NaN and infinity are stored as they are.
#pragma once

#include <kvcache/block/move_row.hpp>
#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>
#include <type_traits>

namespace kvcache::inline v0::codec {

template <class Element>
inline constexpr std::string_view exact_name = std::is_same_v<Element, float>
                                                   ? "f32"
                                                   : (std::is_same_v<Element, half> ? "f16" : "bf16");

template <class Element>
struct exact_keys : plain_side {
  using itself = exact_keys;  // not what derives from it
  using stored_element = Element;
  static constexpr bool reads_lines = true;
  [[nodiscard]] static constexpr std::string_view side_name() noexcept { return exact_name<Element>; }
  [[nodiscard]] static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return round_up(block_order<Element>::key_size(g) * index_t{sizeof(Element)}, block_alignment);
  }
  [[nodiscard]] static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    return g.head_dim * index_t{sizeof(Element)};
  }
  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
                     index_t count, const_rows rows) {
    kernel::for_element<Element>(kernels).encode_keys(g, section, first, count, rows);
  }
  static void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                     index_t first, index_t count, mutable_rows rows) {
    kernel::for_element<Element>(kernels).decode_keys(g, section, first, count, rows);
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    move_key_row<Element>(g, from, from_slot, to, to_slot);
  }
  [[nodiscard]] static constexpr index_t prepared_floats(const block_geometry& g) noexcept {
    return std::is_same_v<Element, bfloat16> ? kernel::prepared_element_floats(g.head_dim) : 0;
  }
  static const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                              index_t num_rows, float* prepared) {
    const auto prepares = kernel::for_element<Element>(kernels).prepare;
    return prepares == nullptr ? queries : prepares(g.head_dim, queries, num_rows, prepared);
  }
  static void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                     index_t count, const float* queries, index_t num_rows, float* scores,
                     const kernel::upcoming& next) {
    kernel::for_element<Element>(kernels).scores(g, section, count, queries, num_rows, scores, next);
  }
  /// The same of queries as they are, prepared in here: for whoever has few blocks, or few dims of many.
  static void scores_of_plain(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                              index_t count, const float* queries, index_t num_rows, float* out,
                              const kernel::upcoming& next) {
    constexpr index_t rows_at_once = 16;
    alignas(64) std::array<float, rows_at_once * max_head_dim> prepared;
    for (index_t first = 0; first < num_rows; first += rows_at_once) {
      const index_t n = std::min(rows_at_once, num_rows - first);
      const float* rows = prepare(kernels, g, queries + first * g.head_dim, n, prepared.data());
      scores(kernels, g, section, count, rows, n, out + first * g.block_size, next);
    }
  }
};

template <class Element>
struct exact_values : plain_side {
  using itself = exact_values;
  using stored_element = Element;
  static constexpr bool reads_lines = true;
  [[nodiscard]] static constexpr std::string_view side_name() noexcept { return exact_name<Element>; }
  [[nodiscard]] static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return round_up(block_order<Element>::value_size(g) * index_t{sizeof(Element)}, block_alignment);
  }
  [[nodiscard]] static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    return g.head_dim * index_t{sizeof(Element)};
  }
  static void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
                     index_t count, const_rows rows) {
    kernel::for_element<Element>(kernels).encode_values(g, section, first, count, rows);
  }
  static void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                     index_t first, index_t count, mutable_rows rows) {
    kernel::for_element<Element>(kernels).decode_values(g, section, first, count, rows);
  }
  static void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                       index_t to_slot) noexcept {
    move_value_row<Element>(g, from, from_slot, to, to_slot);
  }
  static void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                         index_t count, const float* weights, index_t num_rows, float* sums,
                         const kernel::upcoming& next) {
    kernel::for_element<Element>(kernels).accumulate(g, section, count, weights, num_rows, sums, next);
  }
};

template <class Element>
struct exact : sides<exact_keys<Element>, exact_values<Element>> {
  using element = Element;
  using order = block_order<Element>;

  static constexpr std::string_view name = exact_name<Element>;
};

using f32 = exact<float>;
using f16 = exact<half>;
using bf16 = exact<bfloat16>;

static_assert(block_codec<f32> && block_codec<f16> && block_codec<bf16>);

}  // namespace kvcache::inline v0::codec
