// SPDX-License-Identifier: MIT
// The exact codecs f32, f16 and bf16: every number stored as one element, narrowed by rounding to nearest.
//
//   block: | keys, block order of the element | pad to 64 bytes | values, block order | pad to 64 bytes |
//
// Relative error of a stored number: 0 for f32, 2^-11 for f16 (range 6e-5 to 65504, beyond becomes infinity),
// 2^-8 for bf16 (the range of float). NaN and infinity are stored as they are.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <cstddef>
#include <string_view>
#include <type_traits>

namespace kvcache::inline v0::codec {

template <class Element>
struct exact {
  using element = Element;
  using order = block_order<Element>;

  static constexpr std::string_view name =
      std::is_same_v<Element, float> ? "f32" : (std::is_same_v<Element, half> ? "f16" : "bf16");

  /// Bytes of one block, keys and values, both sections padded to 64 bytes.
  [[nodiscard]] static constexpr index_t block_bytes(const block_geometry& g) noexcept {
    return values_offset(g) + padded(order::value_size(g));
  }

  /// Bytes that one more token takes, keys and values, without padding.
  [[nodiscard]] static constexpr index_t token_bytes(const block_geometry& g) noexcept {
    return 2 * g.head_dim * static_cast<index_t>(sizeof(Element));
  }

  static status encode(const kernel::table& kernels, const block_geometry& g, std::byte* block, index_t first,
                       index_t count, const_rows k, const_rows v) {
    const auto& kernel = kernel::for_element<Element>(kernels);
    kernel.encode_keys(g, block, first, count, k);
    kernel.encode_values(g, block + values_offset(g), first, count, v);
    return status::ok;
  }

  static void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                     index_t first, index_t count, mutable_rows k, mutable_rows v) {
    const auto& kernel = kernel::for_element<Element>(kernels);
    kernel.decode_keys(g, block, first, count, k);
    kernel.decode_values(g, block + values_offset(g), first, count, v);
  }

  static void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                     index_t count, const float* queries, index_t num_rows, float* scores) {
    kernel::for_element<Element>(kernels).scores(g, block, count, queries, num_rows, scores,
                                                 block + values_offset(g));
  }

  static void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                         index_t count, const float* weights, index_t num_rows, float* sums,
                         const std::byte* next_block) {
    kernel::for_element<Element>(kernels).accumulate(g, block + values_offset(g), count, weights, num_rows,
                                                     sums, next_block);
  }

 private:
  static constexpr index_t padded(index_t elements) noexcept {
    return ceil_div(elements * static_cast<index_t>(sizeof(Element)), block_alignment) * block_alignment;
  }
  static constexpr index_t values_offset(const block_geometry& g) noexcept {
    return padded(order::key_size(g));
  }
};

using f32 = exact<float>;
using f16 = exact<half>;
using bf16 = exact<bfloat16>;

static_assert(block_codec<f32> && block_codec<f16> && block_codec<bf16>);

}  // namespace kvcache::inline v0::codec
