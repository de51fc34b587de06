// SPDX-License-Identifier: MIT
// layer_ref: one layer of a cache, as `cache[layer]` hands it out. Two words, copied freely.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <type_traits>

namespace kvcache::inline v0 {

template <class Cache>
class layer_ref;

/// The blocks of one layer and head, in order; a forward range of block_view, three words.
template <class Cache>
class block_range {
 public:
  class iterator {
   public:
    using value_type = block_view;
    using difference_type = index_t;
    using iterator_category = std::input_iterator_tag;  // dereferences to a value
    using iterator_concept = std::forward_iterator_tag;

    iterator() = default;
    iterator(const block_range& range, index_t index) noexcept : range_(range), index_(index) {}

    block_view operator*() const noexcept { return range_.view(index_); }
    iterator& operator++() noexcept {
      ++index_;
      return *this;
    }
    iterator operator++(int) noexcept {
      const iterator before = *this;
      ++index_;
      return before;
    }
    friend bool operator==(const iterator&, const iterator&) = default;

   private:
    block_range range_;
    index_t index_ = 0;
  };

  block_range() = default;
  block_range(const Cache& cache, index_t layer, index_t head) noexcept
      : cache_(&cache), layer_(layer), head_(head) {}

  friend bool operator==(const block_range&, const block_range&) = default;

  [[nodiscard]] iterator begin() const noexcept { return {*this, 0}; }
  [[nodiscard]] iterator end() const noexcept { return {*this, size()}; }
  [[nodiscard]] index_t size() const noexcept {
    return ceil_div(cache_->layer_size(layer_), cache_->shape().block_size);
  }

 private:
  [[nodiscard]] block_view view(index_t index) const noexcept {
    const index_t block_size = cache_->shape().block_size;
    const index_t first = index * block_size;
    return {index, first, std::min(block_size, cache_->layer_size(layer_) - first),
            cache_->block(layer_, head_, index),
            index < layer_ref<const Cache>(*cache_, layer_).num_sealed()};
  }

  const Cache* cache_ = nullptr;
  index_t layer_ = 0;
  index_t head_ = 0;
};

/// A handle to one layer of a cache. Invalidated when the cache is moved or destroyed.
/// Models cache_layer; appending needs a handle from a cache that is not const.
template <class Cache>
class layer_ref {
 public:
  layer_ref(Cache& cache, index_t layer) noexcept : cache_(&cache), layer_(layer) {}

  /// Appends tokens to this layer.
  ///
  /// \param k  keys, [tokens, num_kv_heads, head_dim], row-major, already rotated
  /// \param v  values, same shape; neither may alias the cache
  /// \return   out_of_pages, out_of_memory or, from lossy codecs, not_finite; then nothing was written
  /// \pre      both spans hold the same whole number of tokens
  /// \post     size() grew by that number; earlier tokens are as before
  /// Complexity: O(tokens * num_kv_heads * head_dim); a container may first grow or, when sharing, copy a page.
  /// Invalidates: views of blocks that held no token before, were shared or are sealed by it; all views where a contiguous
  /// cache has to copy, see contiguous_options. Threads: one writer per sequence.
  [[nodiscard]] status try_append(std::span<const float> k, std::span<const float> v) const
      requires(!std::is_const_v<Cache>) {
    return cache_->try_append(layer_, k, v);
  }

  /// The same; throws capacity_error instead of returning a status.
  void append(std::span<const float> k, std::span<const float> v) const requires(!std::is_const_v<Cache>) {
    if (const status s = try_append(k, v); s != status::ok) throw capacity_error("append", s);
  }

  /// Tokens in this layer. While a forward pass is under way, layers differ.
  [[nodiscard]] index_t size() const noexcept { return cache_->layer_size(layer_); }
  [[nodiscard]] index_t num_blocks() const noexcept { return blocks(0).size(); }
  [[nodiscard]] const cache_shape& shape() const noexcept { return cache_->shape(); }
  [[nodiscard]] const auto& codec() const noexcept { return cache_->codec(); }
  /// The codec for one head of this layer; the same for all where it has no settings of a head's own.
  [[nodiscard]] decltype(auto) codec(index_t head) const noexcept {
    return codec_at(cache_->codec(), layer_, head);
  }
  [[nodiscard]] const position_map& positions() const noexcept { return cache_->positions(); }

  /// The encoded block `index` of `head`; 64-byte aligned. \pre `index < num_blocks()`. O(1).
  [[nodiscard]] const std::byte* block(index_t head, index_t index) const noexcept {
    return cache_->block(layer_, head, index);
  }

  /// Blocks [0, num_sealed) are in the encoding of codec(), those behind are codec::exact_tokens.
  [[nodiscard]] index_t num_sealed() const noexcept {
    if constexpr (requires { cache_->sealing(); }) {
      return cache_->sealing().num_sealed(layer_, size());
    } else {
      return num_blocks();
    }
  }
  /// The first tokens of a head that are exact although their block is sealed: an exact block of their own.
  [[nodiscard]] exact_sinks_view sinks([[maybe_unused]] index_t head) const noexcept {
    if constexpr (requires { cache_->sealing(); }) {
      const auto& blocks = cache_->sealing();
      if (blocks.num_sinks() > 0 && num_sealed() > 0)
        return {blocks.sinks(layer_, head), blocks.num_sinks(), blocks.sink_geometry()};
    }
    return {};
  }

  /// All blocks of a head. Invalidated when the cache is moved, or the sequence changes.
  [[nodiscard]] block_range<std::remove_const_t<Cache>> blocks(index_t head) const noexcept {
    return {*cache_, layer_, head};
  }

  /// Writes tokens [first, first + count) as floats.
  /// \param k  [count, num_kv_heads, head_dim] for nhd, [num_kv_heads, count, head_dim] for hnd
  /// \param v  same shape
  /// \pre `first + count <= size()` and both spans have exactly that size
  void copy_out(index_t first, index_t count, std::span<float> k, std::span<float> v,
                kv_layout layout = kv_layout::nhd) const {
    cache_->copy_out(layer_, first, count, k, v, layout);
  }

 private:
  Cache* cache_;
  index_t layer_;
};

}  // namespace kvcache::inline v0
