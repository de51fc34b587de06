// SPDX-License-Identifier: MIT
// sequence_image: a sequence, or a range of its tokens, as a snapshot has it.
#pragma once

#include <kvcache/cache/block_access.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>
#include <kvcache/store/clean_blocks.hpp>
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
      : cache_(&cache), first_(first), about_(about_of(cache, who, first)), clean_(cache, about_) {
    require_range(last);
    if (!who.tokens.empty())
      about_.who.tokens.assign(who.tokens.begin() + first, who.tokens.begin() + std::min(last, cache.size()));
    for (index_t layer = 0; layer < shape().num_layers; ++layer) {
      about_.layers.push_back(layer_range(layer, last));
      about_.block_bytes.push_back(access::block_bytes(cache, layer));
    }
    copy_positions(last);
    copy_ = memory_block(clean_.largest_bytes(), huge_page_resource());
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
        emit(clean_.exact_block(layer, head, b + first_block(), count, to_copy()),
             static_cast<std::size_t>(exact_block_bytes(about_)));
      }
      if (about_.codec.sink_tokens == 0) continue;
      emit(clean_.sinks(layer, head, l.num_sealed, to_copy()), static_cast<std::size_t>(sink_bytes(about_)));
    }
  }

 private:
  static stored_sequence about_of(const Cache& cache, const identity& who, index_t first) {
    stored_sequence made;
    made.shape = cache.shape();
    made.codec = describe(cache.codec());
    made.who = who;
    made.first_token = first;
    return made;
  }
  [[nodiscard]] auto to_copy() const noexcept {
    return [this] { return copy_.data(); };
  }
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
    return clean_.block(layer, head, index + first_block(), count, to_copy());
  }

  /// A block of tokens that lie in two, from an exact codec.
  const std::byte* repacked(index_t layer, index_t head, index_t index, index_t count) {
    const block_geometry g = geometry_of(shape());
    const auto& codec = codec_at(cache_->codec(), layer, head);
    const auto& kernels = kernel::best();
    std::memset(copy_.data(), 0, static_cast<std::size_t>(codec.block_bytes(g)));
    std::vector<float> rows(static_cast<std::size_t>(2 * g.block_size * g.head_dim));
    const mutable_rows k{rows.data(), g.head_dim};
    const mutable_rows v{rows.data() + g.block_size * g.head_dim, g.head_dim};
    for (index_t done = 0; done < count;) {
      const index_t token = first_ + index * g.block_size + done;
      const index_t slot = token % g.block_size;
      const index_t n = std::min(g.block_size - slot, count - done);
      codec.decode(kernels, g, access::block(*cache_, layer, head, token / g.block_size), slot, n,
                   {k.row(done), k.stride}, {v.row(done), v.stride});
      done += n;
    }
    (void)codec.encode(kernels, g, copy_.data(), 0, count, {k.data, k.stride}, {v.data, v.stride});
    clean_.clear_slots(codec, copy_.data(), count);
    return copy_.data();
  }

  const Cache* cache_;
  index_t first_;
  stored_sequence about_;
  clean_blocks<Cache> clean_;
  memory_block copy_;  // of one block
};

}  // namespace kvcache::inline v0::store::detail
