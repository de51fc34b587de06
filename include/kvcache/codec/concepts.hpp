// SPDX-License-Identifier: MIT
// What a codec is: the meaning of a block's bytes. A plain struct whose members are its settings.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <concepts>
#include <cstddef>
#include <string_view>

namespace kvcache::inline v0 {

/// \tparam C  stores the keys and values of a block in `block_bytes(geometry)` bytes, 64-byte aligned
///
/// `encode` writes slots [first, first + count) from float rows and touches no other slot; on any status but
/// `ok` nothing was written. `scores` and `accumulate` are those of kernel::element_kernels, for this encoding;
/// the last argument of `accumulate` is the block that will be read next, or null.
template <class C>
concept block_codec = std::copyable<C> && std::default_initializable<C> &&
    requires(const C& codec, const kernel::table& kernels, const block_geometry& g, std::byte* block,
             const std::byte* sealed, index_t n, const_rows in, mutable_rows out, const float* q,
             float* scores) {
  { C::name } -> std::convertible_to<std::string_view>;
  { codec.block_bytes(g) } -> std::same_as<index_t>;
  { codec.token_bytes(g) } -> std::same_as<index_t>;
  { codec.encode(kernels, g, block, n, n, in, in) } -> std::same_as<status>;
  codec.decode(kernels, g, sealed, n, n, out, out);
  codec.scores(kernels, g, sealed, n, q, n, scores);
  codec.accumulate(kernels, g, sealed, n, q, n, scores, sealed);
};

}  // namespace kvcache::inline v0
