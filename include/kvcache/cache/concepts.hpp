// SPDX-License-Identifier: MIT
// What attention needs of a cache, what users may rely on in every container, and what a container's storage is.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <concepts>
#include <cstddef>
#include <span>

namespace kvcache::inline v0 {

/// Memory of the blocks of a sequence and of what its codec refers to, in bytes. `total == payload + slack`.
struct memory_use {
  index_t total = 0;    ///< granted for blocks, whether used or not
  index_t payload = 0;  ///< taken by tokens: tokens * heads * codec.token_bytes, exact ones as they are
  index_t slack = 0;    ///< the rest: unused slots, reserved blocks, padding, the bases of low_rank
  index_t shared = 0;   ///< part of `total` that other sequences refer to as well, or may: bases

  friend bool operator==(const memory_use&, const memory_use&) = default;
};

/// Bytes that one token takes in all layers and heads, keys and values, without padding or slack.
/// For exact codecs 2 * num_layers * num_kv_heads * head_dim * bytes per element.
template <block_codec Codec>
index_t bytes_per_token(const cache_shape& shape, const Codec& codec = {}) {
  index_t bytes = 0;
  for (index_t layer = 0; layer < shape.num_layers; ++layer)
    bytes = checked_add(bytes, token_bytes_at(codec, layer, geometry_of(shape)));
  return checked_mul(shape.num_kv_heads, bytes);
}

/// Order of the axes where rows are handed out.
enum class kv_layout {
  nhd,  ///< [token, head, dim]
  hnd,  ///< [head, token, dim]
};

/// What `attend` reads: one layer of one sequence.
template <class L>
concept cache_layer = requires(const L& layer, index_t n) {
  requires block_codec<std::remove_cvref_t<decltype(layer.codec())>>;
  { layer.shape() } -> std::convertible_to<cache_shape>;
  { layer.size() } -> std::same_as<index_t>;
  { layer.block(n, n) } -> std::convertible_to<const std::byte*>;  // (head, block index)
  { layer.positions() } -> std::convertible_to<const position_map&>;
};  // and, where some blocks are exact whatever the codec: num_sealed(), sinks(head) as layer_ref has them

/// One layer of one sequence that takes tokens: what `cache[layer]` gives, typed or any_cache.
template <class L>
concept growing_layer = requires(const L& layer, std::span<const float> rows) {
  layer.append(rows, rows);
  { layer.shape() } -> std::convertible_to<cache_shape>;
  { layer.size() } -> std::same_as<index_t>;
  { layer.positions() } -> std::convertible_to<const position_map&>;
};

/// Where the blocks of one sequence lie. A container is a sequence_cache over one of these.
///
/// `prepare_write(first, last)`: afterwards blocks [0, last) exist and those in [first, last) belong to this
/// sequence alone; on any status but `ok` nothing changed. `shrink(n)`: blocks from n on are no longer needed.
/// `keep_blocks(kept, first, last)`, `kept` ascending and below num_blocks(): afterwards there is room for kept.size() blocks
/// at least, block i is what kept[i] was, and those in [first, last) belong to this sequence alone; on any status but `ok`
/// nothing changed.
/// `empty_like()`: a storage with the same settings and no blocks. `check()` throws invariant_error.
template <class S>
concept block_storage = std::movable<S> &&
    requires(S& storage, const S& settled, index_t n, std::span<const index_t> kept) {
  { storage.prepare_write(n, n) } -> std::same_as<status>;
  { storage.keep_blocks(kept, n, n) } -> std::same_as<status>;
  { storage.shrink(n) }
  noexcept;
  { settled.block(n, n, n) }
  noexcept->std::same_as<std::byte*>;  // (layer, head, block index)
  { settled.num_blocks() }
  noexcept->std::same_as<index_t>;
  { settled.total_bytes() }
  noexcept->std::same_as<index_t>;
  { settled.shared_bytes() }
  noexcept->std::same_as<index_t>;
  { settled.empty_like() } -> std::same_as<S>;
  settled.check();
};

/// What every container offers: one sequence that is appended to, truncated, copied by name and attended over.
template <class C>
concept kv_cache = std::movable<C> && !std::copyable<C> &&
                   requires(C & cache, const C& settled, index_t n, std::span<const float> rows) {
  requires cache_layer<decltype(settled[n])>;
  { cache[n].try_append(rows, rows) } -> std::same_as<status>;
  cache[n].append(rows, rows);
  { settled.size() } -> std::same_as<index_t>;
  { settled.shape() } -> std::convertible_to<cache_shape>;
  { settled.bytes() } -> std::same_as<memory_use>;
  { settled.positions() } -> std::convertible_to<const position_map&>;
  { settled.clone() } -> std::same_as<C>;
  { cache.fork(n) } -> std::same_as<C>;
  { cache.reserve(n) } -> std::same_as<status>;
  cache.begin(n).commit();
  cache.truncate(n);
  cache.clear();
  cache.check();
};

}  // namespace kvcache::inline v0
