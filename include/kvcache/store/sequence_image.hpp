// SPDX-License-Identifier: MIT
// sequence_image: a sequence, or a range of its tokens, as a snapshot has it. The bytes depend on the tokens alone: slots
// that hold none are zero rows, whatever they held before.
#pragma once

#include <kvcache/cache/block_access.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>
#include <kvcache/store/identity.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store::detail {

using access = kvcache::detail::block_access;

/// Geometry and size of the exact first tokens of a head.
inline block_geometry sink_geometry(const stored_sequence& s) {
  return {round_up(s.codec.sink_tokens, key_lanes), s.shape.head_dim};
}
inline index_t sink_bytes(const stored_sequence& s) {
  return s.codec.sink_tokens == 0 ? 0 : codec::bf16{}.block_bytes(sink_geometry(s));
}
inline index_t exact_block_bytes(const stored_sequence& s) {
  return codec::bf16{}.block_bytes(geometry_of(s.shape));
}
inline index_t num_exact(const stored_sequence& s, std::size_t layer) noexcept {
  return s.codec.seals ? ceil_div(s.layers[layer].size, s.shape.block_size) - s.layers[layer].first_exact : 0;
}

/// Bytes of the sections of one layer. Throws shape_error if they cannot be counted.
inline index_t blocks_bytes(const stored_sequence& s, std::size_t layer) {
  return checked_mul(s.shape.num_kv_heads, s.layers[layer].num_sealed, s.block_bytes[layer]);
}
inline index_t exact_bytes(const stored_sequence& s, std::size_t layer) {
  return checked_mul(s.shape.num_kv_heads,
                     checked_add(checked_mul(num_exact(s, layer), exact_block_bytes(s)), sink_bytes(s)));
}

/// Whether decoding and encoding again gives the same bytes.
inline bool is_exact(const codec_description& described) noexcept {
  const auto plain = [](const std::string& name) { return name == "f32" || name == "f16" || name == "bf16"; };
  return plain(described.keys.name) && plain(described.values.name);
}

template <class Cache>
class sequence_image {
 public:
  /// Tokens [first, last). Throws shape_error if they cannot be had on their own, see save().
  sequence_image(const Cache& cache, const identity& who, index_t first, index_t last)
      : cache_(&cache), first_(first), kernels_(&kernel::best()) {
    about_.shape = cache.shape();
    about_.codec = describe(cache.codec());
    about_.who = who;
    about_.first_token = first;
    require_range(last);
    if (!who.tokens.empty())
      about_.who.tokens.assign(who.tokens.begin() + first, who.tokens.begin() + std::min(last, cache.size()));
    index_t largest = exact_block_bytes(about_) + sink_bytes(about_);
    for (index_t layer = 0; layer < shape().num_layers; ++layer) {
      about_.layers.push_back(layer_range(layer, last));
      about_.block_bytes.push_back(access::block_bytes(cache, layer));
      largest = std::max(largest, about_.block_bytes.back());
    }
    copy_positions(last);
    copy_ = memory_block(largest, huge_page_resource());
    rows_.resize(static_cast<std::size_t>(2 * shape().block_size * shape().head_dim));
  }

  [[nodiscard]] const stored_sequence& about() const noexcept { return about_; }
  [[nodiscard]] stored_sequence& about() noexcept { return about_; }

  /// Whether what was emitted is overwritten by what is emitted next.
  [[nodiscard]] bool is_copy(const std::byte* data) const noexcept { return data == copy_.data(); }

  /// Calls emit(data, bytes) for the blocks of a layer, in order.
  template <class Emit>
  void blocks(index_t layer, Emit emit) {
    const auto& l = about_.layers[static_cast<std::size_t>(layer)];
    const index_t bytes = about_.block_bytes[static_cast<std::size_t>(layer)];
    for (index_t head = 0; l.num_sealed > 0 && head < shape().num_kv_heads; ++head) {
      for (index_t b = 0; b < l.num_sealed; ++b) emit(block(layer, head, b), static_cast<std::size_t>(bytes));
    }
  }

  /// The same for the exact blocks and sinks of a layer.
  template <class Emit>
  void exact(index_t layer, Emit emit) {
    const auto& l = about_.layers[static_cast<std::size_t>(layer)];
    const index_t all = ceil_div(l.size, shape().block_size);
    for (index_t head = 0; head < shape().num_kv_heads; ++head) {
      for (index_t b = l.first_exact; b < all; ++b) {
        const index_t count = std::min(shape().block_size, l.size - b * shape().block_size);
        emit(exact_copy(access::exact_block(*cache_, layer, head, b + first_block()), geometry_of(shape()),
                        count),
             static_cast<std::size_t>(exact_block_bytes(about_)));
      }
      if (about_.codec.sink_tokens == 0) continue;
      emit(l.num_sealed == 0 ? zeros(sink_bytes(about_))
                             : exact_copy(access::sinks(*cache_, layer, head), sink_geometry(about_),
                                          about_.codec.sink_tokens),
           static_cast<std::size_t>(sink_bytes(about_)));
    }
  }

 private:
  [[nodiscard]] const cache_shape& shape() const noexcept { return about_.shape; }
  [[nodiscard]] index_t first_block() const noexcept { return first_ / shape().block_size; }
  [[nodiscard]] bool is_aligned() const noexcept { return first_ % shape().block_size == 0; }

  void require_range(index_t last) const {
    const auto require = [](bool holds, const char* rule) {
      if (!holds) throw shape_error(std::string("kvcache: save: ") + rule);
    };
    require(0 <= first_ && (first_ == 0 || last <= cache_->size()) && first_ <= last,
            "the range must lie in the sequence");
    require(first_ == 0 || is_aligned() || is_exact(about_.codec),
            "a range of a codec that rounds must begin at a multiple of the block size");
    require(first_ == 0 || is_aligned() || !about_.codec.seals,
            "a range of a codec that keeps a tail must begin at a multiple of the block size");
    require(first_ == 0 || about_.codec.sink_tokens == 0,
            "a range of a codec that keeps sinks must begin at the first token");
    require(about_.who.tokens.empty() ||
                static_cast<index_t>(about_.who.tokens.size()) >= std::min(last, cache_->size()),
            "there must be a token id for every token that is saved, or none");
  }

  [[nodiscard]] kvcache::detail::layer_blocks layer_range(index_t layer, index_t last) const noexcept {
    kvcache::detail::layer_blocks l = access::layer(*cache_, layer);
    l.size = std::min(l.size, last) - first_;
    if (about_.codec.seals) {  // `last` is no limit here, save() has seen to that
      l.num_sealed = std::max(l.num_sealed - first_block(), index_t{0});
      l.first_exact = std::max(l.first_exact - first_block(), index_t{0});
    } else {
      l.num_sealed = l.first_exact = ceil_div(l.size, shape().block_size);
    }
    return l;
  }

  void copy_positions(index_t last) {
    const position_map& map = cache_->positions();
    const auto segments = map.segments();
    for (std::size_t i = 0; i < segments.size(); ++i) {
      const index_t begin = std::max(segments[i].first_token, first_);
      const index_t end = i + 1 < segments.size() ? std::min(segments[i + 1].first_token, last) : last;
      if (begin < end) about_.positions.push_back({begin - first_, map[begin], segments[i].rotation});
    }
    if (about_.positions.empty()) about_.positions.push_back({0, map[first_], 0});
    if (about_.positions.back().rotation != 0)
      about_.positions.push_back({last - first_, map[last - 1] + 1, 0});  // tokens to come are not rotated
  }

  const std::byte* block(index_t layer, index_t head, index_t index) {
    const index_t block_size = shape().block_size;
    const index_t size = about_.layers[static_cast<std::size_t>(layer)].size;
    const index_t count = std::min(block_size, size - index * block_size);
    if (!is_aligned()) return repacked(layer, head, index, count);
    const std::byte* data = access::block(*cache_, layer, head, index + first_block());
    if (about_.codec.seals && index == 0 && about_.codec.sink_tokens == block_size)
      return zeros(about_.block_bytes[static_cast<std::size_t>(layer)]);  // all of it is in the sinks
    if (count == block_size) return data;
    std::memcpy(copy_.data(), data,
                static_cast<std::size_t>(about_.block_bytes[static_cast<std::size_t>(layer)]));
    clear_slots(codec_at(cache_->codec(), layer, head), geometry_of(shape()), count);
    return copy_.data();
  }

  /// Slots [count, block_size) of the copy become zero rows.
  template <class Codec>
  void clear_slots(const Codec& codec, const block_geometry& g, index_t count) {
    std::fill(rows_.begin(), rows_.end(), 0.0F);
    const const_rows none{rows_.data(), g.head_dim};
    if (count < g.block_size)
      (void)codec.encode(*kernels_, g, copy_.data(), count, g.block_size - count, none, none);
  }

  /// A block of tokens that lie in two, from an exact codec.
  const std::byte* repacked(index_t layer, index_t head, index_t index, index_t count) {
    const block_geometry g = geometry_of(shape());
    const auto& codec = codec_at(cache_->codec(), layer, head);
    (void)zeros(codec.block_bytes(g));
    const mutable_rows k{rows_.data(), g.head_dim};
    const mutable_rows v{rows_.data() + g.block_size * g.head_dim, g.head_dim};
    for (index_t done = 0; done < count;) {
      const index_t token = first_ + index * g.block_size + done;
      const index_t slot = token % g.block_size;
      const index_t n = std::min(g.block_size - slot, count - done);
      codec.decode(*kernels_, g, access::block(*cache_, layer, head, token / g.block_size), slot, n,
                   {k.row(done), k.stride}, {v.row(done), v.stride});
      done += n;
    }
    (void)codec.encode(*kernels_, g, copy_.data(), 0, count, {k.data, k.stride}, {v.data, v.stride});
    clear_slots(codec, g, count);
    return copy_.data();
  }

  /// An exact block as if it had just been made: memory of the ring may hold anything where there are no tokens.
  const std::byte* exact_copy(const std::byte* block, const block_geometry& g, index_t count) {
    const codec::bf16 exact;
    const mutable_rows k{rows_.data(), g.head_dim};
    const mutable_rows v{rows_.data() + g.block_size * g.head_dim, g.head_dim};
    exact.decode(*kernels_, g, block, 0, count, k, v);
    (void)zeros(exact.block_bytes(g));
    (void)exact.encode(*kernels_, g, copy_.data(), 0, count, {k.data, k.stride}, {v.data, v.stride});
    return copy_.data();
  }

  const std::byte* zeros(index_t bytes) {
    std::memset(copy_.data(), 0, static_cast<std::size_t>(bytes));
    return copy_.data();
  }

  const Cache* cache_;
  index_t first_;
  const kernel::table* kernels_;
  stored_sequence about_;
  memory_block copy_;        // of one block
  std::vector<float> rows_;  // [2, block_size, head_dim]
};

}  // namespace kvcache::inline v0::store::detail
