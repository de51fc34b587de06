// SPDX-License-Identifier: MIT
// sequence_cache: everything the three containers have in common. What differs between them is only where block
// `index` of (layer, head) lies, and that is their storage:
//
//   sequence_cache<Codec, contiguous_storage>   base + index * stride              cache/contiguous.hpp
//   sequence_cache<Codec, chunked_storage>      chunk[index / n] + index % n       cache/chunked.hpp
//   sequence_cache<Codec, paged_storage>        page[table[index]]                 cache/paged.hpp
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/cache/block_layout.hpp>
#include <kvcache/cache/blocks_for_codec.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/keep_tokens.hpp>
#include <kvcache/cache/layer.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/cache/step.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

/// One sequence of keys and values in every layer. Move-only; copying is named `clone` or `fork`.
///
/// Threads: any number of readers (attend, copy_out, blocks) or one writer; no locks inside.
/// Memory: none of append, views or attend allocates once the blocks are there (see `reserve`).
/// Moved from, it may only be destroyed or assigned to.
template <block_codec Codec, block_storage Storage>
class sequence_cache {
 public:
  using codec_type = Codec;
  using storage_type = Storage;
  using step = cache_step<sequence_cache>;

  /// An empty sequence; containers' own constructors call this. Throws shape_error.
  sequence_cache(const cache_shape& shape, const Codec& codec, Storage storage)
      : sequence_cache(shape, blocks(shape, codec, std::move(storage))) {}

  /// An empty sequence over a storage built from its options. Throws shape_error naming what cannot be.
  template <class S = Storage, class Options = typename S::options>
  explicit sequence_cache(const cache_shape& shape, const Codec& codec = {}, const Options& options = {})
      : sequence_cache(shape, codec, make_storage(shape, codec, options)) {}

  sequence_cache(sequence_cache&&) noexcept = default;
  sequence_cache& operator=(sequence_cache&&) noexcept = default;

  // -- one layer ------------------------------------------------------------------------------------------------

  /// \pre `0 <= layer < shape().num_layers`. Invalidated by moving the cache.
  [[nodiscard]] layer_ref<sequence_cache> operator[](index_t layer) noexcept {
    KVCACHE_ASSERT(0 <= layer && layer < shape_.num_layers, "the layer must exist");
    return {*this, layer};
  }
  [[nodiscard]] layer_ref<const sequence_cache> operator[](index_t layer) const noexcept {
    KVCACHE_ASSERT(0 <= layer && layer < shape_.num_layers, "the layer must exist");
    return {*this, layer};
  }

  /// See layer_ref::try_append.
  [[nodiscard]] status try_append(index_t layer, std::span<const float> k, std::span<const float> v);

  /// See layer_ref::copy_out.
  void copy_out(index_t layer, index_t first, index_t count, std::span<float> k, std::span<float> v,
                kv_layout layout) const;

  // -- the sequence ---------------------------------------------------------------------------------------------

  [[nodiscard]] const cache_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] const Codec& codec() const noexcept { return blocks_.codec(); }
  [[nodiscard]] const Storage& storage() const noexcept { return blocks_.storage(); }
  [[nodiscard]] const position_map& positions() const noexcept { return positions_; }

  /// Tokens that every layer has.
  [[nodiscard]] index_t size() const noexcept { return *std::min_element(sizes_.begin(), sizes_.end()); }
  [[nodiscard]] index_t layer_size(index_t layer) const noexcept {
    return sizes_[static_cast<std::size_t>(layer)];
  }

  /// In the encoding of codec(), or of codec::exact_tokens where a sealing codec keeps it exact.
  /// \pre the block exists. O(1).
  [[nodiscard]] const std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    return blocks_.block(layer, head, index);
  }
  /// Where a sealing codec keeps tokens exact; see sealing_blocks.
  [[nodiscard]] const auto& sealing() const noexcept requires sealing_codec<Codec> { return blocks_; }

  /// Memory of the blocks. O(blocks) for paged, else O(layers).
  [[nodiscard]] memory_use bytes() const noexcept { return blocks_.bytes(sizes_); }

  /// Memory that is neither blocks of the storage nor a part of this object, in bytes: an exact tail and the lists that
  /// the sequence keeps. Changes with the first append, with steps and with shift. O(1).
  [[nodiscard]] index_t own_bytes() const noexcept {
    index_t bytes = positions_.list_bytes();
    bytes += static_cast<index_t>((sizes_.capacity() + step_sizes_.capacity()) * sizeof(index_t));
    if constexpr (sealing_codec<Codec>) bytes += blocks_.exact_bytes() + blocks_.books_bytes();
    return bytes;
  }
  /// How much of own_bytes() an exact tail takes once there is a token. O(1).
  [[nodiscard]] index_t tail_bytes() const noexcept {
    if constexpr (sealing_codec<Codec>) return blocks_.tail_bytes();
    return 0;
  }

  /// Room for `num_tokens` tokens in all, so that appends up to there cannot fail or allocate.
  /// \return out_of_pages or out_of_memory; then nothing changed
  /// Invalidates: views of shared blocks; all views where a contiguous cache has to copy.
  [[nodiscard]] status reserve(index_t num_tokens) {
    if (num_tokens > max_tokens) return status::out_of_memory;
    if (num_tokens <= size()) return status::ok;
    return blocks_.reserve(size(), num_tokens);
  }

  /// Forgets every token from `num_tokens` on, in every layer; longer than the sequence is no change.
  /// Chunks and pages past the end are given back, reserved ones too. Invalidates: views past the end,
  /// and, where blocks are sealed, of those that are cut or hold exact tokens again.
  void truncate(index_t num_tokens) noexcept;

  /// truncate(0).
  void clear() noexcept { truncate(0); }

  /// Gives back what was reserved, and what a contiguous cache keeps on truncate; where that memory came from a
  /// resource, the blocks move into a smaller piece, if there is one. Invalidates: all views of blocks.
  void shrink_to_fit() noexcept {
    KVCACHE_ASSERT(!in_step_, "shrink_to_fit: no step may be open");
    Storage& storage = blocks_.storage();
    if constexpr (requires { storage.shrink_to_fit(index_t{}); }) {
      storage.shrink_to_fit(blocks_.blocks_needed(sizes_));
    } else {
      storage.shrink(blocks_.blocks_needed(sizes_));
    }
  }

  /// Tokens [first, last) now sit `delta` positions further; stored keys stay, queries are rotated instead
  /// (attend_options::rope). \pre `0 <= first <= last <= size()`, no open step. Throws std::bad_alloc.
  void shift(index_t first, index_t last, index_t delta) {
    KVCACHE_ASSERT(!in_step_, "shift: no step may be open");
    positions_.shift(first, last, delta, size());
  }
  /// As of another cache with the same tokens. \pre no open step
  void set_positions(const position_map& positions) {
    KVCACHE_ASSERT(!in_step_, "set_positions: no step may be open");
    positions_ = positions;
  }

  /// Forgets all tokens but these, which are counted anew from 0: eviction within a sequence; see cache/keep_tokens.hpp.
  ///
  /// \param tokens  ascending, the newest included (`truncate` forgets the newest), within keep_limits()
  /// \return        code ok; or out_of_pages, out_of_memory, then nothing changed
  /// \pre every layer has size() tokens, no step is open
  /// Complexity: O(tokens), and in paged caches no more than that where whole blocks go; what moves is copied once.
  /// Invalidates: all views. Forks keep theirs. Memory reserved past the end is given back.
  [[nodiscard]] keep_result keep_tokens(std::span<const index_t> tokens,
                                        keep_positions mode = keep_positions::original) {
    KVCACHE_ASSERT(!in_step_, "keep_tokens: no step may be open");
    return detail::keep_tokens(blocks_, positions_, sizes_, tokens, mode);
  }
  /// What keep_tokens may be asked. O(layers).
  [[nodiscard]] kvcache::keep_limits keep_limits() const noexcept { return blocks_.limits(size()); }

  // -- copies ---------------------------------------------------------------------------------------------------

  /// A sequence of its own with the same tokens: every block is copied. Throws capacity_error,
  /// std::bad_alloc.
  [[nodiscard]] sequence_cache clone() const { return copied(newest()); }

  /// The first `num_tokens` tokens as a new sequence. In a pool pages are shared and copied on the first write,
  /// O(pages) and no page taken; elsewhere blocks are copied. Throws as clone. \pre `num_tokens <= size()`
  [[nodiscard]] sequence_cache fork(index_t num_tokens) const;
  [[nodiscard]] sequence_cache fork() const { return fork(size()); }

  /// As above; nothing where those throw.
  [[nodiscard]] std::optional<sequence_cache> try_clone() const {
    return unless_exhausted([this] { return clone(); });
  }
  [[nodiscard]] std::optional<sequence_cache> try_fork(index_t num_tokens) const {
    return unless_exhausted([this, num_tokens] { return fork(num_tokens); });
  }

  // -- steps ----------------------------------------------------------------------------------------------------

  /// Begins a step in which each layer may append up to `num_tokens` tokens; see cache_step. Where a codec keeps a tail, more
  /// than that may come back from a rollback as the codec stored it.
  /// Room is set aside first, so that those appends cannot run out, unless the sequence is forked meanwhile. Throws capacity_error, then nothing changed.
  /// Invalidates: as reserve.
  step begin(index_t num_tokens) {
    if (const status s = begin_step(num_tokens); s != status::ok) throw capacity_error("begin", s);
    return step(*this);
  }
  [[nodiscard]] std::optional<step> try_begin(index_t num_tokens) {
    return begin_step(num_tokens) == status::ok ? std::optional<step>(std::in_place, *this) : std::nullopt;
  }

  /// The two halves of a step, for those who cannot hold a cache_step. \pre no step is open / one is
  [[nodiscard]] status begin_step(index_t num_tokens);
  void end_step(bool commit) noexcept;

  // -- invariants and settings ----------------------------------------------------------------------------------

  /// Proves the books: sizes, blocks, bytes and, in a pool, every reference count. Throws invariant_error.
  void check() const;

  /// Encodes and decodes with these kernels from now on; kernel::best() unless set. The bytes are the same.
  void use_kernels(const kernel::table& kernels) noexcept { kernels_ = &kernels; }

 private:
  friend detail::block_access;  // cache/block_access.hpp

  using blocks = typename detail::blocks_for_codec<Codec, Storage>::type;

  sequence_cache(const cache_shape& shape, blocks settled)
      : shape_(shape),
        blocks_(std::move(settled)),
        sizes_(static_cast<std::size_t>(shape.num_layers), 0),
        step_sizes_(sizes_) {}

  template <class Options>
  static Storage make_storage(const cache_shape& shape, const Codec& codec, const Options& options) {
    validate(shape);
    validate(codec, shape);
    return Storage(layout_of(shape, codec), options);
  }

  template <class Make>
  static std::optional<sequence_cache> unless_exhausted(Make make) {
    try {
      return make();
    } catch (const capacity_error&) {
      return std::nullopt;
    } catch (const std::bad_alloc&) {
      return std::nullopt;
    }
  }

  // Above any memory there is, and far enough from the end of index_t to be added to.
  static constexpr index_t max_tokens = std::numeric_limits<index_t>::max() / 4;

  [[nodiscard]] index_t newest() const noexcept { return *std::max_element(sizes_.begin(), sizes_.end()); }
  [[nodiscard]] sequence_cache copied(index_t num_tokens) const;
  void take_sizes_from(const sequence_cache& other, index_t num_tokens);

  cache_shape shape_;
  blocks blocks_;
  std::vector<index_t> sizes_;       // [num_layers] tokens
  std::vector<index_t> step_sizes_;  // [num_layers] the same when the open step began
  position_map positions_;
  const kernel::table* kernels_ = &kernel::best();
  index_t step_blocks_ = 0;  // blocks when the open step began
  bool in_step_ = false;
};

template <block_codec Codec, block_storage Storage>
status sequence_cache<Codec, Storage>::try_append(index_t layer, std::span<const float> k,
                                                  std::span<const float> v) {
  const index_t token_size = shape_.num_kv_heads * shape_.head_dim;
  const auto num_floats = static_cast<index_t>(k.size());
  KVCACHE_ASSERT(0 <= layer && layer < shape_.num_layers, "append: the layer must exist");
  KVCACHE_ASSERT(k.size() == v.size() && num_floats % token_size == 0,
                 "append: keys and values must hold the same whole number of tokens");
  const index_t num_tokens = num_floats / token_size;
  if (num_tokens == 0) return status::ok;

  index_t& size = sizes_[static_cast<std::size_t>(layer)];
  const detail::head_rows<const float> k_rows{k.data(), token_size, shape_.head_dim};
  const detail::head_rows<const float> v_rows{v.data(), token_size, shape_.head_dim};
  if constexpr (requires { blocks_.accepts(*kernels_, num_tokens, k_rows, v_rows); }) {
    if (const status s = blocks_.accepts(*kernels_, num_tokens, k_rows, v_rows); s != status::ok) return s;
  }
  const index_t blocks_before = blocks_.storage().num_blocks();
  if (const status s = blocks_.prepare(size, size + num_tokens); s != status::ok) return s;
  if (const status s = blocks_.write(*kernels_, layer, size, num_tokens, k_rows, v_rows); s != status::ok) {
    blocks_.storage().shrink(blocks_before);
    return s;
  }
  size += num_tokens;
  return status::ok;
}

template <block_codec Codec, block_storage Storage>
void sequence_cache<Codec, Storage>::copy_out(index_t layer, index_t first, index_t count, std::span<float> k,
                                              std::span<float> v, kv_layout layout) const {
  const index_t dim = shape_.head_dim;
  const auto num_floats = static_cast<std::size_t>(count * shape_.num_kv_heads * dim);
  KVCACHE_ASSERT(0 <= first && 0 <= count && first + count <= layer_size(layer),
                 "copy_out: the tokens must lie in the layer");
  KVCACHE_ASSERT(k.size() == num_floats && v.size() == num_floats,
                 "copy_out: the spans must have count * num_kv_heads * head_dim floats");
  const bool nhd = layout == kv_layout::nhd;
  const index_t stride = nhd ? shape_.num_kv_heads * dim : dim;
  const index_t head_stride = nhd ? dim : count * dim;
  blocks_.read(*kernels_, layer, first, count, {k.data(), stride, head_stride},
               {v.data(), stride, head_stride});
}

template <block_codec Codec, block_storage Storage>
void sequence_cache<Codec, Storage>::truncate(index_t num_tokens) noexcept {
  KVCACHE_ASSERT(num_tokens >= 0, "truncate: the number of tokens must not be negative");
  KVCACHE_ASSERT(!in_step_, "truncate: no step may be open");
  const index_t size_before = newest();
  for (index_t& size : sizes_) size = std::min(size, num_tokens);
  if (num_tokens < size_before) positions_.truncate(num_tokens);
  blocks_.truncate(*kernels_, sizes_);
}

template <block_codec Codec, block_storage Storage>
void sequence_cache<Codec, Storage>::take_sizes_from(const sequence_cache& other, index_t num_tokens) {
  for (std::size_t i = 0; i < sizes_.size(); ++i) sizes_[i] = std::min(other.sizes_[i], num_tokens);
  positions_ = other.positions_;
  positions_.truncate(num_tokens);
  kernels_ = other.kernels_;
}

template <block_codec Codec, block_storage Storage>
auto sequence_cache<Codec, Storage>::copied(index_t num_tokens) const -> sequence_cache {
  sequence_cache copy(shape_, blocks_.copied(*kernels_, sizes_, num_tokens));
  copy.take_sizes_from(*this, num_tokens);
  return copy;
}

template <block_codec Codec, block_storage Storage>
auto sequence_cache<Codec, Storage>::fork(index_t num_tokens) const -> sequence_cache {
  KVCACHE_ASSERT(0 <= num_tokens && num_tokens <= size(), "fork: the tokens must lie in the sequence");
  if constexpr (requires { blocks_.shared(*kernels_, sizes_, num_tokens); }) {
    sequence_cache child(shape_, blocks_.shared(*kernels_, sizes_, num_tokens));
    child.take_sizes_from(*this, num_tokens);
    return child;
  } else {
    return copied(num_tokens);
  }
}

template <block_codec Codec, block_storage Storage>
status sequence_cache<Codec, Storage>::begin_step(index_t num_tokens) {
  KVCACHE_ASSERT(!in_step_, "begin: a step is open already");
  KVCACHE_ASSERT(num_tokens >= 0, "begin: the number of tokens must not be negative");
  if (num_tokens > max_tokens) return status::out_of_memory;
  const index_t blocks_before = blocks_.storage().num_blocks();
  if (num_tokens > 0) {
    if (const status s = blocks_.reserve(size(), newest() + num_tokens); s != status::ok) return s;
  }
  if (const status s = blocks_.begin_step(num_tokens); s != status::ok) {
    blocks_.storage().shrink(blocks_before);
    return s;
  }
  step_blocks_ = blocks_before;
  step_sizes_ = sizes_;  // same length: never allocates
  in_step_ = true;
  return status::ok;
}

template <block_codec Codec, block_storage Storage>
void sequence_cache<Codec, Storage>::end_step(bool commit) noexcept {
  in_step_ = false;
  if (!commit) sizes_ = step_sizes_;
  blocks_.end_step(*kernels_, commit, sizes_);
  blocks_.storage().shrink(std::max(blocks_.blocks_needed(sizes_), step_blocks_));
}

template <block_codec Codec, block_storage Storage>
void sequence_cache<Codec, Storage>::check() const {
  using kvcache::detail::require;
  require(static_cast<index_t>(sizes_.size()) == shape_.num_layers, "one size per layer");
  require(std::all_of(sizes_.begin(), sizes_.end(), [](index_t n) { return n >= 0; }),
          "sizes are not negative");
  const memory_use use = bytes();
  require(use.payload >= 0 && use.slack >= 0 && use.payload + use.slack == use.total,
          "payload and slack make the total");
  require(use.shared <= use.total, "shared bytes are part of the total");
  const auto segments = positions_.segments();
  require(!segments.empty() && segments.front().first_token == 0, "positions start at token 0");
  require(std::is_sorted(segments.begin(), segments.end(),
                         [](const auto& a, const auto& b) { return a.first_token < b.first_token; }),
          "position segments are in order");
  blocks_.check(sizes_);
}

}  // namespace kvcache::inline v0
