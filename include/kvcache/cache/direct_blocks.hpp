// SPDX-License-Identifier: MIT
// direct_blocks: the blocks of one sequence where every token is encoded as it comes. What sequence_cache is made of,
// unless its codec seals (cache/sealing_blocks.hpp).
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/keep_tokens.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <utility>

namespace kvcache::inline v0::detail {

/// Float rows of several heads: row (token, head) starts at `data + token * stride + head * head_stride`.
template <class Float>
struct head_rows {
  Float* data = nullptr;
  index_t stride = 0;
  index_t head_stride = 0;

  [[nodiscard]] row_view<Float> at(index_t token, index_t head) const noexcept {
    return {data + token * stride + head * head_stride, stride};
  }
};

/// Tokens that lie in one block: slots [slot, slot + count) of block `index`, the first of them `done` after the start.
struct block_piece {
  index_t index;
  index_t slot;
  index_t count;
  index_t done;
};

/// Calls body(block_piece) for tokens [first, first + count), block by block, until it returns something but ok.
template <class Body>
status for_each_piece(index_t block_size, index_t first, index_t count, Body body) {
  for (index_t done = 0; done < count;) {
    const index_t slot = (first + done) % block_size;
    const index_t n = std::min(block_size - slot, count - done);
    if (const status s = body(block_piece{(first + done) / block_size, slot, n, done}); s != status::ok)
      return s;
    done += n;
  }
  return status::ok;
}

/// What `tokens` tokens of one head take in whole blocks and a part of one. No more than the blocks have: rows that
/// are rounded up to bytes share them in a block.
template <class Codec>
index_t payload_bytes(const Codec& codec, const block_geometry& g, index_t tokens) noexcept {
  const index_t block_bytes = codec.block_bytes(g);
  const index_t token_bytes = codec.token_bytes(g);
  return tokens / g.block_size * std::min(g.block_size * token_bytes, block_bytes) +
         std::min(tokens % g.block_size * token_bytes, block_bytes);
}

/// Whether whole blocks have no padding, neither behind rows nor in their last codes: those of numbers of 16 or 32 bits.
template <class Codec>
bool fills_blocks(const Codec& codec, const block_geometry& g) noexcept {
  const index_t row = codec.token_bytes(g);  // rounded up, so it alone does not tell
  return g.head_dim % 2 == 0 && codec.block_bytes(g) == g.block_size * row &&
         (row == 2 * g.head_dim * index_t{sizeof(bfloat16)} ||
          row == 2 * g.head_dim * index_t{sizeof(float)});
}

template <block_codec Codec, block_storage Storage>
class direct_blocks {
 public:
  direct_blocks(const cache_shape& shape, const Codec& codec, Storage storage)
      : shape_(shape), codec_(codec), storage_(std::move(storage)) {
    if constexpr (!sealing_codec<Codec>) {
      if (codec.needs_whole_blocks())
        throw shape_error(
            "kvcache: a codec that needs whole blocks has to be one that seals; wrap it in exact_tail");
    }
  }

  [[nodiscard]] const cache_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] const Codec& codec() const noexcept { return codec_; }
  [[nodiscard]] const Storage& storage() const noexcept { return storage_; }
  [[nodiscard]] Storage& storage() noexcept { return storage_; }
  [[nodiscard]] block_geometry geometry() const noexcept { return geometry_of(shape_); }

  [[nodiscard]] std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    return storage_.block(layer, head, index);
  }

  /// Room for tokens [first, last) in every layer. On any status but ok nothing changed.
  [[nodiscard]] status prepare(index_t first, index_t last) {
    return storage_.prepare_write(first / shape_.block_size, blocks_for(last));
  }
  /// The same for all blocks from that of `first` on, those set aside before included.
  [[nodiscard]] status reserve(index_t first, index_t last) {
    return storage_.prepare_write(first / shape_.block_size,
                                  std::max(blocks_for(last), storage_.num_blocks()));
  }

  /// Encodes tokens behind the first `size` of a layer. \pre prepare(size, size + num_tokens) was ok
  [[nodiscard]] status write(const kernel::table& kernels, index_t layer, index_t size, index_t num_tokens,
                             const head_rows<const float>& k, const head_rows<const float>& v) {
    const block_geometry g = geometry();
    return for_each_piece(g.block_size, size, num_tokens, [&](const block_piece& piece) {
      for (index_t head = 0; head < shape_.num_kv_heads; ++head) {
        const auto& codec = codec_at(codec_, layer, head);
        std::byte* to = block(layer, head, piece.index);
        // A block starts out zero, so that no bytes of its last owner stay behind, unless every bit of it is written.
        if (piece.slot == 0 && (piece.count < g.block_size || !fills_blocks(codec, g)))
          std::memset(to, 0, static_cast<std::size_t>(codec.block_bytes(g)));
        const status s = codec.encode(kernels, g, to, piece.slot, piece.count, k.at(piece.done, head),
                                      v.at(piece.done, head));
        if (s != status::ok) return s;
      }
      return status::ok;
    });
  }

  /// Decodes tokens [first, first + count) of a layer.
  void read(const kernel::table& kernels, index_t layer, index_t first, index_t count,
            const head_rows<float>& k, const head_rows<float>& v) const {
    const block_geometry g = geometry();
    (void)for_each_piece(g.block_size, first, count, [&](const block_piece& piece) {
      for (index_t head = 0; head < shape_.num_kv_heads; ++head)
        codec_at(codec_, layer, head)
            .decode(kernels, g, block(layer, head, piece.index), piece.slot, piece.count,
                    k.at(piece.done, head), v.at(piece.done, head));
      return status::ok;
    });
  }

  /// See keep_tokens.hpp. On any status but ok nothing changed.
  [[nodiscard]] status keep(const keep_plan& plan) {
    KVCACHE_ASSERT(!plan.moves_rows() || moves_tokens(codec_),
                   "keep_tokens: rows of this codec do not move, only whole blocks go; see keep_limits");
    const index_t num_blocks = blocks_for(plan.num_tokens());
    const index_t first_own = plan.moves_rows() ? plan.first_moved() / shape_.block_size : num_blocks;
    if (const status s = storage_.keep_blocks(plan.blocks(), first_own, num_blocks); s != status::ok)
      return s;
    if constexpr (token_moving_codec<Codec>) move_rows(plan);
    storage_.shrink(num_blocks);
    return status::ok;
  }
  [[nodiscard]] keep_limits limits(index_t size) const noexcept {
    return {moves_tokens(codec_) ? 0 : blocks_for(size) * shape_.block_size, 0};
  }

  /// The layers have `sizes` tokens now; blocks past the longest are given back.
  void truncate(const kernel::table& /*kernels*/, std::span<const index_t> sizes) noexcept {
    storage_.shrink(blocks_needed(sizes));
  }
  [[nodiscard]] index_t blocks_needed(std::span<const index_t> sizes) const noexcept {
    return blocks_for(longest(sizes));
  }

  [[nodiscard]] status begin_step(index_t /*num_tokens*/) noexcept { return status::ok; }
  void end_step(const kernel::table& /*kernels*/, bool /*commit*/,
                std::span<const index_t> /*sizes*/) noexcept {}

  [[nodiscard]] memory_use bytes(std::span<const index_t> sizes) const noexcept {
    index_t payload = 0;
    for (index_t layer = 0; layer < shape_.num_layers; ++layer)
      payload +=
          payload_bytes(codec_at(codec_, layer, 0), geometry(), sizes[static_cast<std::size_t>(layer)]);
    payload *= shape_.num_kv_heads;
    const index_t settings = settings_bytes(codec_);
    const index_t total = storage_.total_bytes() + settings;
    return {total, payload, total - payload, storage_.shared_bytes() + settings};
  }

  /// The first `num_tokens` of every layer, of which there are `sizes`, in memory of their own. Throws capacity_error.
  [[nodiscard]] direct_blocks copied(const kernel::table& /*kernels*/, std::span<const index_t> sizes,
                                     index_t num_tokens) const {
    return copied_blocks(blocks_for(std::min(num_tokens, longest(sizes))), [&](index_t layer) {
      return blocks_for(std::min(num_tokens, sizes[static_cast<std::size_t>(layer)]));
    });
  }

  /// `num_blocks` blocks, of which the first blocks_of(layer) of each layer are copied. Throws capacity_error.
  template <class BlocksOf>
  [[nodiscard]] direct_blocks copied_blocks(index_t num_blocks, BlocksOf blocks_of) const {
    direct_blocks copy(shape_, codec_, storage_.empty_like());
    if (const status s = copy.storage_.prepare_write(0, num_blocks); s != status::ok)
      throw capacity_error("clone", s);
    for (index_t layer = 0; layer < shape_.num_layers; ++layer) {
      const auto block_bytes = static_cast<std::size_t>(block_bytes_at(codec_, layer, geometry()));
      for (index_t head = 0; head < shape_.num_kv_heads; ++head) {
        for (index_t b = 0; b < blocks_of(layer); ++b)
          std::memcpy(copy.block(layer, head, b), block(layer, head, b), block_bytes);
      }
    }
    return copy;
  }

  /// The same blocks, shared until written to. Throws std::bad_alloc.
  [[nodiscard]] direct_blocks shared(const kernel::table& /*kernels*/, std::span<const index_t> /*sizes*/,
                                     index_t num_tokens) const requires
      requires(const Storage& s, index_t n) {
    s.share(n);
  }
  { return {shape_, codec_, storage_.share(blocks_for(num_tokens))}; }

  /// Throws invariant_error.
  void check(std::span<const index_t> sizes) const {
    if (blocks_for(longest(sizes)) > storage_.num_blocks())
      throw invariant_error("kvcache: there is a block for every token");
    storage_.check();
  }

 private:
  [[nodiscard]] static index_t longest(std::span<const index_t> sizes) noexcept {
    return *std::max_element(sizes.begin(), sizes.end());
  }
  [[nodiscard]] index_t blocks_for(index_t tokens) const noexcept {
    return ceil_div(tokens, shape_.block_size);
  }

  void move_rows(const keep_plan& plan) noexcept {
    const block_geometry g = geometry();
    for (index_t layer = 0; plan.moves_rows() && layer < shape_.num_layers; ++layer) {
      for (index_t head = 0; head < shape_.num_kv_heads; ++head) {
        const auto& codec = codec_at(codec_, layer, head);
        plan.for_each_move([&](index_t from, index_t to) {
          codec.move_token(g, block(layer, head, from / g.block_size), from % g.block_size,
                           block(layer, head, to / g.block_size), to % g.block_size);
        });
      }
    }
  }

  cache_shape shape_;
  [[no_unique_address]] Codec codec_;
  Storage storage_;
};

}  // namespace kvcache::inline v0::detail
