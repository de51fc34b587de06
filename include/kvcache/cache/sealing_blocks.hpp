// SPDX-License-Identifier: MIT
// sealing_blocks: the blocks of one sequence whose newest tokens are exact and whose older ones are encoded block by
// block, once, when they leave the exact tail.
//
//   block      0        1      ...    s - 1  |    s      ...   newest  |
//            [sinks]  sealed          sealed |           exact         |      s = blocks older than the newest tail_tokens
//             codec, in the storage          |  ring of tail_blocks + 2, block i in place i % ring_blocks
//
// Sealed blocks may be shared between forks. Ring and sinks belong to the sequence, which copies them to fork, keeps them for
// its lifetime, and takes them from the storage's memory resource: they are no pages and no part of a pool's budget. A
// block that was just sealed is still in the ring, so that giving up a step of up to block_size tokens, or truncating as far,
// brings back the exact tokens; further back a block that is cut is decoded into the ring. A longer step keeps a copy.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/direct_blocks.hpp>
#include <kvcache/cache/keep_tokens.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::detail {

struct block_access;

template <sealing_codec Codec, block_storage Storage>
class sealing_blocks {
 public:
  /// Throws shape_error if the codec's settings do not fit the shape.
  sealing_blocks(const cache_shape& shape, const Codec& codec, Storage storage)
      : direct_(shape, codec, std::move(storage)), exact_{codec.exact_as}, seals_(keeps_exact(codec)) {
    if (!seals_) return;
    if (codec.tail_tokens < 0) throw shape_error("kvcache: tail_tokens must not be negative");
    if (codec.exact_as > codec::exact_elements.back())
      throw shape_error("kvcache: exact_as must be bf16, f16 or f32");
    if (codec.sink_tokens < 0 || codec.sink_tokens > shape.block_size)
      throw shape_error("kvcache: sink_tokens must be 0 to block_size, got " +
                        std::to_string(codec.sink_tokens));
    ring_blocks_ = checked_add(ceil_div(codec.tail_tokens, shape.block_size), 2);
    exact_bytes_ = exact_.block_bytes(geometry());
    tail_bytes_ = checked_mul(shape.num_layers, shape.num_kv_heads,
                              checked_add(checked_mul(ring_blocks_, exact_bytes_), sink_bytes()));
    const index_t row_bytes = 2 * shape.block_size * shape.head_dim * index_t{sizeof(float)};
    work_offset_ = tail_bytes_;
    tail_bytes_ = checked_add(tail_bytes_, round_up(row_bytes, block_alignment));
    const auto num_layers = static_cast<std::size_t>(shape.num_layers);
    states_.resize(num_layers);
    saved_states_.resize(num_layers);
  }

  [[nodiscard]] const cache_shape& shape() const noexcept { return direct_.shape(); }
  [[nodiscard]] const Codec& codec() const noexcept { return direct_.codec(); }
  [[nodiscard]] const Storage& storage() const noexcept { return direct_.storage(); }
  [[nodiscard]] Storage& storage() noexcept { return direct_.storage(); }
  [[nodiscard]] block_geometry geometry() const noexcept { return direct_.geometry(); }

  /// Blocks of a layer that are encoded by the codec; those behind them are exact.
  [[nodiscard]] index_t num_sealed(index_t layer, index_t size) const noexcept {
    return seals_ ? state(layer).sealed : ceil_div(size, shape().block_size);
  }
  /// Tokens of a sealed first block that are exact all the same, in a block of their own.
  [[nodiscard]] index_t num_sinks() const noexcept { return seals_ ? codec().sink_tokens : 0; }
  [[nodiscard]] std::byte* sinks(index_t layer, index_t head) const noexcept {
    return region(layer, head) + ring_blocks_ * exact_bytes_;
  }
  [[nodiscard]] block_geometry sink_geometry() const noexcept {
    return {round_up(codec().sink_tokens, key_lanes), shape().head_dim};
  }

  /// A block in the encoding of the codec if it is sealed, else in that of codec::exact_tokens.
  [[nodiscard]] std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    return seals_ && index >= state(layer).sealed ? exact_block(layer, head, index)
                                                  : direct_.block(layer, head, index);
  }

  [[nodiscard]] status prepare(index_t first, index_t last) {
    if (!seals_) return direct_.prepare(first, last);
    return with_tail([&] { return storage().prepare_write(first_unsealed(), blocks_to_seal(last)); });
  }
  [[nodiscard]] status reserve(index_t first, index_t last) {
    if (!seals_) return direct_.reserve(first, last);
    return with_tail([&] {
      return storage().prepare_write(first_unsealed(),
                                     std::max(blocks_to_seal(last), storage().num_blocks()));
    });
  }

  /// Refuses rows that are not finite, or not as exact tokens are stored.
  [[nodiscard]] status accepts(const kernel::table& kernels, index_t num_tokens,
                               const head_rows<const float>& k, const head_rows<const float>& v) const {
    for (index_t head = 0; seals_ && head < shape().num_kv_heads; ++head) {
      for (index_t t = 0; t < num_tokens; ++t) {
        if (!fits(kernels, k.at(t, head).row(0)) || !fits(kernels, v.at(t, head).row(0)))
          return status::not_finite;
      }
    }
    return status::ok;
  }

  /// As direct_blocks::write. \pre accepts(...)
  [[nodiscard]] status write(const kernel::table& kernels, index_t layer, index_t size, index_t num_tokens,
                             const head_rows<const float>& k, const head_rows<const float>& v) {
    if (!seals_) return direct_.write(kernels, layer, size, num_tokens, k, v);
    const block_geometry g = geometry();
    return for_each_piece(g.block_size, size, num_tokens, [&](const block_piece& piece) {
      for (index_t head = 0; head < shape().num_kv_heads; ++head) {
        std::byte* to = exact_block(layer, head, piece.index);
        if (piece.slot == 0 && (piece.count < g.block_size || g.head_dim % 2 != 0))  // has padding
          std::memset(to, 0, static_cast<std::size_t>(exact_bytes_));
        exact_.encode(kernels, g, to, piece.slot, piece.count, k.at(piece.done, head),
                      v.at(piece.done, head));
      }
      index_t& in_ring = state(layer).first_in_ring;
      in_ring = std::max(in_ring, piece.index - ring_blocks_ + 1);
      return seal(kernels, layer, size + piece.done + piece.count);
    });
  }

  void read(const kernel::table& kernels, index_t layer, index_t first, index_t count,
            const head_rows<float>& k, const head_rows<float>& v) const {
    if (!seals_) return direct_.read(kernels, layer, first, count, k, v);
    (void)for_each_piece(geometry().block_size, first, count, [&](const block_piece& piece) {
      for (index_t head = 0; head < shape().num_kv_heads; ++head)
        read_piece(kernels, layer, head, piece, k.at(piece.done, head), v.at(piece.done, head));
      return status::ok;
    });
  }

  /// As those of direct_blocks; defined in cache/keep_sealed.hpp.
  [[nodiscard]] status keep(const keep_plan& plan);
  [[nodiscard]] keep_limits limits(index_t size) const noexcept;

  void truncate(const kernel::table& kernels, std::span<const index_t> sizes) noexcept {
    if (!seals_) return direct_.truncate(kernels, sizes);
    for (index_t layer = 0; layer < shape().num_layers; ++layer)
      unseal(kernels, layer, sizes[static_cast<std::size_t>(layer)]);
    storage().shrink(blocks_needed(sizes));
  }
  [[nodiscard]] index_t blocks_needed(std::span<const index_t> sizes) const noexcept {
    if (!seals_) return direct_.blocks_needed(sizes);
    index_t most = 0;
    for (const layer_state& s : states_) most = std::max(most, s.sealed);
    return most;
  }

  /// Room for what a step of `num_tokens` would overwrite. \return out_of_memory, then nothing changed
  [[nodiscard]] status begin_step(index_t num_tokens) {
    saved_ = {};
    if (!seals_ || num_tokens <= shape().block_size || tail_.data() == nullptr) return status::ok;
    try {
      saved_ = memory_block(work_offset_, storage().memory());
    } catch (const std::bad_alloc&) {
      return status::out_of_memory;
    }
    std::memcpy(saved_.data(), tail_.data(), static_cast<std::size_t>(work_offset_));
    std::copy(states_.begin(), states_.end(), saved_states_.begin());
    return status::ok;
  }
  /// \param sizes  what the layers have from now on
  void end_step(const kernel::table& kernels, bool commit, std::span<const index_t> sizes) noexcept {
    if (!seals_) return;
    if (!commit && saved_.data() != nullptr) {
      std::memcpy(tail_.data(), saved_.data(), static_cast<std::size_t>(work_offset_));
      std::copy(saved_states_.begin(), saved_states_.end(), states_.begin());
    } else if (!commit) {
      for (index_t layer = 0; layer < shape().num_layers; ++layer)
        unseal(kernels, layer, sizes[static_cast<std::size_t>(layer)]);
    }
    saved_ = {};
  }

  [[nodiscard]] memory_use bytes(std::span<const index_t> sizes) const noexcept {
    if (!seals_) return direct_.bytes(sizes);
    index_t payload = 0;
    for (index_t layer = 0; layer < shape().num_layers; ++layer) {
      const index_t sealed = state(layer).sealed * shape().block_size;
      const index_t exact = sizes[static_cast<std::size_t>(layer)] - sealed + (sealed > 0 ? num_sinks() : 0);
      payload += payload_bytes(codec_at(codec(), layer, 0), geometry(), sealed) +
                 exact * exact_.token_bytes(geometry());
    }
    payload *= shape().num_kv_heads;
    const index_t settings = settings_bytes(codec());
    const index_t total = storage().total_bytes() + tail_.size() + saved_.size() + settings;
    return {total, payload, total - payload, storage().shared_bytes() + settings};
  }

  /// Rings, sinks and what a step saved; how much the first append takes for them; what else is allocated for books.
  [[nodiscard]] index_t exact_bytes() const noexcept { return tail_.size() + saved_.size(); }
  [[nodiscard]] index_t tail_bytes() const noexcept { return tail_bytes_; }
  [[nodiscard]] index_t books_bytes() const noexcept {
    return static_cast<index_t>((states_.capacity() + saved_states_.capacity()) * sizeof(layer_state));
  }

  [[nodiscard]] sealing_blocks copied(const kernel::table& kernels, std::span<const index_t> sizes,
                                      index_t num_tokens) const {
    if (!seals_) return {direct_.copied(kernels, sizes, num_tokens), *this};
    const auto blocks_of = [&](index_t layer) {
      return std::min(state(layer).sealed, ceil_div(num_tokens, shape().block_size));
    };
    index_t most = 0;
    for (index_t layer = 0; layer < shape().num_layers; ++layer) most = std::max(most, blocks_of(layer));
    return cut({direct_.copied_blocks(most, blocks_of), *this}, kernels, sizes, num_tokens);
  }

  [[nodiscard]] sealing_blocks shared(const kernel::table& kernels, std::span<const index_t> sizes,
                                      index_t num_tokens) const requires
      requires(const Storage& s, index_t n) {
    s.share(n);
  }
  {
    if (!seals_) return {direct_.shared(kernels, sizes, num_tokens), *this};
    const index_t num_blocks = std::min(blocks_needed(sizes), ceil_div(num_tokens, shape().block_size));
    return cut({{shape(), codec(), storage().share(num_blocks)}, *this}, kernels, sizes, num_tokens);
  }

  void check(std::span<const index_t> sizes) const {
    if (!seals_) return direct_.check(sizes);
    using kvcache::detail::require;
    for (index_t layer = 0; layer < shape().num_layers; ++layer) {
      const layer_state& s = state(layer);
      const index_t size = sizes[static_cast<std::size_t>(layer)];
      require(0 <= s.sealed && s.sealed * shape().block_size <= size, "only whole blocks are sealed");
      require(s.sealed <= storage().num_blocks(), "there is a block for all that is sealed");
      require(s.sealed >= blocks_to_seal(size), "what left the tail is sealed");
      require(s.first_in_ring <= s.sealed, "what is not sealed is in the ring");
      require(ceil_div(size, shape().block_size) - s.first_in_ring <= ring_blocks_, "the ring holds it");
    }
    storage().check();
  }

 private:
  friend block_access;  // cache/block_access.hpp

  void keep_exact(const keep_plan& plan, std::byte* copy) noexcept;

  struct layer_state {
    index_t sealed = 0;         // blocks that the codec encoded
    index_t first_in_ring = 0;  // block from which on the ring has the exact tokens
  };

  /// Blocks of its own, settings and all else from `other`: what copied and shared begin with. Throws capacity_error.
  sealing_blocks(direct_blocks<Codec, Storage> direct, const sealing_blocks& other)
      : direct_(std::move(direct)),
        exact_(other.exact_),
        seals_(other.seals_),
        ring_blocks_(other.ring_blocks_),
        exact_bytes_(other.exact_bytes_),
        tail_bytes_(other.tail_bytes_),
        work_offset_(other.work_offset_),
        states_(other.states_),
        saved_states_(other.states_) {
    if (other.tail_.data() == nullptr) return;
    if (const status s = allocate_tail(); s != status::ok) throw capacity_error("clone", s);
    std::memcpy(tail_.data(), other.tail_.data(), static_cast<std::size_t>(work_offset_));
  }

  static sealing_blocks cut(sealing_blocks copy, const kernel::table& kernels, std::span<const index_t> sizes,
                            index_t num_tokens) {
    index_t most = 0;
    for (index_t layer = 0; layer < copy.shape().num_layers; ++layer) {
      copy.unseal(kernels, layer, std::min(num_tokens, sizes[static_cast<std::size_t>(layer)]));
      most = std::max(most, copy.state(layer).sealed);
    }
    copy.storage().shrink(most);
    return copy;
  }

  [[nodiscard]] layer_state& state(index_t layer) noexcept {
    return states_[static_cast<std::size_t>(layer)];
  }
  [[nodiscard]] const layer_state& state(index_t layer) const noexcept {
    return states_[static_cast<std::size_t>(layer)];
  }
  [[nodiscard]] index_t first_unsealed() const noexcept {
    index_t least = states_.front().sealed;
    for (const layer_state& s : states_) least = std::min(least, s.sealed);
    return least;
  }
  /// Blocks that are sealed at the latest when a layer has `size` tokens.
  [[nodiscard]] index_t blocks_to_seal(index_t size) const noexcept {
    return std::max(size - codec().tail_tokens, index_t{0}) / shape().block_size;
  }
  [[nodiscard]] index_t sink_bytes() const {
    return codec().sink_tokens == 0 ? 0 : exact_.block_bytes(sink_geometry());
  }

  /// Ring and sinks of one head.
  [[nodiscard]] std::byte* region(index_t layer, index_t head) const noexcept {
    const index_t index = layer * shape().num_kv_heads + head;
    return tail_.data() + index * (ring_blocks_ * exact_bytes_ + sink_bytes());
  }
  [[nodiscard]] std::byte* exact_block(index_t layer, index_t head, index_t index) const noexcept {
    return region(layer, head) + index % ring_blocks_ * exact_bytes_;
  }
  /// Rows of one block as floats.
  [[nodiscard]] mutable_rows work_rows(index_t side) const noexcept {
    auto* floats = reinterpret_cast<float*>(tail_.data() + work_offset_);
    return {floats + side * shape().block_size * shape().head_dim, shape().head_dim};
  }
  static const_rows constant(mutable_rows rows) noexcept { return {rows.data, rows.stride}; }

  [[nodiscard]] status allocate_tail() {
    if (tail_.data() != nullptr) return status::ok;
    if (exceeds_memory(1, tail_bytes_, storage().memory())) return status::out_of_memory;
    try {
      tail_ = memory_block(tail_bytes_, storage().memory());
    } catch (const std::bad_alloc&) {
      return status::out_of_memory;
    }
    return status::ok;
  }

  /// Allocates the tail, if there is none, and prepares the storage; neither where one of them fails.
  template <class Prepare>
  [[nodiscard]] status with_tail(Prepare prepare_storage) {
    const bool is_new = tail_.data() == nullptr;
    if (const status s = allocate_tail(); s != status::ok) return s;
    const status s = prepare_storage();
    if (s != status::ok && is_new) tail_ = {};
    return s;
  }

  /// Finite, also once it is rounded.
  [[nodiscard]] bool fits(const kernel::table& kernels, const float* row) const {
    return kernels.int8.largest(row, shape().head_dim) < exact_.limit();
  }

  // Defined in cache/seal_blocks.hpp.
  status seal(const kernel::table& kernels, index_t layer, index_t size);
  void unseal(const kernel::table& kernels, index_t layer, index_t size) noexcept;

  void read_piece(const kernel::table& kernels, index_t layer, index_t head, const block_piece& piece,
                  mutable_rows k, mutable_rows v) const {
    const block_geometry g = geometry();
    if (piece.index >= state(layer).sealed)
      return exact_.decode(kernels, g, exact_block(layer, head, piece.index), piece.slot, piece.count, k, v);
    const index_t sink_slots = piece.index == 0 ? num_sinks() : 0;
    const index_t exact_count = std::clamp(sink_slots - piece.slot, index_t{0}, piece.count);
    if (exact_count > 0)
      exact_.decode(kernels, sink_geometry(), sinks(layer, head), piece.slot, exact_count, k, v);
    if (exact_count == piece.count) return;
    codec_at(codec(), layer, head)
        .decode(kernels, g, direct_.block(layer, head, piece.index), piece.slot + exact_count,
                piece.count - exact_count, {k.row(exact_count), k.stride}, {v.row(exact_count), v.stride});
  }

  direct_blocks<Codec, Storage> direct_;
  codec::exact_tokens exact_;
  bool seals_;
  index_t ring_blocks_ = 0;
  index_t exact_bytes_ = 0;  // of one block in the ring
  index_t tail_bytes_ = 0;   // rings, sinks and working memory
  index_t work_offset_ = 0;  // where the working memory begins
  memory_block tail_;        // allocated by the first append or reserve
  memory_block saved_;       // rings and sinks when a long step began
  std::vector<layer_state> states_;
  std::vector<layer_state> saved_states_;
};

}  // namespace kvcache::inline v0::detail
