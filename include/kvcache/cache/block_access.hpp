// SPDX-License-Identifier: MIT
// block_access: what store/ sees of a sequence besides its public members: the exact blocks of sealing codecs, and a way
// to put encoded blocks into an empty sequence.
//
//   block_access::prepare(cache, state)       memory for all of it, or a status and nothing changed
//   memcpy(block_access::block(cache, ...))   every block the state names, whole
//   block_access::finish(cache, state)        now the sequence has them
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvcache::inline v0::detail {

/// What one layer of a sequence has. Blocks [0, num_sealed) are the codec's; where a codec seals, exact ones of
/// [first_exact, ceil(size / block_size)) are kept as well. Otherwise num_sealed is the number of all blocks.
struct layer_blocks {
  index_t size = 0;  ///< tokens
  index_t num_sealed = 0;
  index_t first_exact = 0;

  friend bool operator==(const layer_blocks&, const layer_blocks&) = default;
};

/// Friend of sequence_cache and sealing_blocks.
struct block_access {
  /// Whether the sequence keeps exact blocks of its own.
  template <class Cache>
  static bool seals([[maybe_unused]] const Cache& cache) noexcept {
    if constexpr (requires { cache.sealing(); }) {
      return cache.sealing().seals_;
    } else {
      return false;
    }
  }
  /// Blocks that the exact part has room for, and bytes of all its memory; 0 where there is none.
  template <class Cache>
  static index_t ring_blocks([[maybe_unused]] const Cache& cache) noexcept {
    if constexpr (requires { cache.sealing(); }) {
      return cache.sealing().ring_blocks_;
    } else {
      return 0;
    }
  }
  template <class Cache>
  static index_t exact_memory([[maybe_unused]] const Cache& cache) noexcept {
    if constexpr (requires { cache.sealing(); }) {
      return cache.sealing().tail_bytes_;
    } else {
      return 0;
    }
  }

  /// An empty sequence with the same settings, in the same pool where there is one. Throws std::bad_alloc.
  template <class Cache>
  static Cache empty_like(const Cache& cache) {
    Cache made(cache.shape(), cache.codec(), cache.storage().empty_like());
    made.kernels_ = cache.kernels_;
    return made;
  }

  /// Bytes of a block of a layer in the encoding of the codec.
  template <class Cache>
  static index_t block_bytes(const Cache& cache, index_t layer) {
    return codec_at(cache.codec(), layer, 0).block_bytes(geometry_of(cache.shape()));
  }

  template <class Cache>
  static layer_blocks layer(const Cache& cache, index_t layer) noexcept {
    const index_t size = cache.layer_size(layer);
    if constexpr (requires { cache.sealing(); }) {
      if (seals(cache)) {
        const auto& state = cache.sealing().state(layer);
        return {size, state.sealed, state.first_in_ring};
      }
    }
    const index_t all = ceil_div(size, cache.shape().block_size);
    return {size, all, all};
  }

  /// A block in the encoding of the codec. \pre it exists
  template <class Cache>
  static std::byte* block(const Cache& cache, index_t layer, index_t head, index_t index) noexcept {
    return cache.storage().block(layer, head, index);
  }
  /// An exact block, and the exact first tokens. \pre seals(cache), and it has had a token or prepare()
  template <class Cache>
  static std::byte* exact_block([[maybe_unused]] const Cache& cache, [[maybe_unused]] index_t layer,
                                [[maybe_unused]] index_t head, [[maybe_unused]] index_t index) noexcept {
    if constexpr (requires { cache.sealing(); }) {
      return cache.sealing().exact_block(layer, head, index);
    } else {
      return nullptr;
    }
  }
  template <class Cache>
  static std::byte* sinks([[maybe_unused]] const Cache& cache, [[maybe_unused]] index_t layer,
                          [[maybe_unused]] index_t head) noexcept {
    if constexpr (requires { cache.sealing(); }) {
      return cache.sealing().sinks(layer, head);
    } else {
      return nullptr;
    }
  }

  /// Whether a sequence like this one can have these blocks; for each layer in turn.
  template <class Cache>
  static bool is_possible(const Cache& cache, const layer_blocks& l) noexcept {
    const index_t block_size = cache.shape().block_size;
    if (l.size < 0 || l.size > Cache::max_tokens) return false;
    const index_t all = ceil_div(l.size, block_size);
    if (l.num_sealed < 0 || l.num_sealed > all || l.first_exact < 0) return false;
    if constexpr (requires { cache.sealing(); }) {
      if (seals(cache))
        return l.num_sealed <= l.size / block_size &&
               l.num_sealed >= cache.sealing().blocks_to_seal(l.size) && l.first_exact <= l.num_sealed &&
               all - l.first_exact <= cache.sealing().ring_blocks_;
    }
    return l.num_sealed == all && l.first_exact == all;
  }

  /// Memory for these blocks in all layers. \return out_of_pages or out_of_memory, then nothing changed
  template <class Cache>
  [[nodiscard]] static status prepare(Cache& cache, const std::vector<layer_blocks>& layers, index_t first) {
    index_t most = 0;
    bool any = false;
    for (const layer_blocks& l : layers) {
      most = std::max(most, l.num_sealed);
      any = any || l.size > 0;
    }
    auto& blocks = cache.blocks_;
    const auto prepare_storage = [&] { return blocks.storage().prepare_write(std::min(first, most), most); };
    if constexpr (requires { cache.sealing(); }) {
      if (seals(cache)) return any ? blocks.with_tail(prepare_storage) : status::ok;
    }
    return prepare_storage();
  }

  /// The sequence has these blocks from now on. \pre prepare() was ok, and each is_possible()
  template <class Cache>
  static void finish(Cache& cache, const std::vector<layer_blocks>& layers,
                     position_map&& positions) noexcept {
    index_t most = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      cache.sizes_[i] = layers[i].size;
      most = std::max(most, layers[i].num_sealed);
      if constexpr (requires { cache.sealing(); }) {
        if (seals(cache)) {
          auto& state = cache.blocks_.state(static_cast<index_t>(i));
          state.sealed = layers[i].num_sealed;
          state.first_in_ring = layers[i].first_exact;
        }
      }
    }
    cache.positions_ = std::move(positions);
    cache.blocks_.storage().shrink(most);
  }
};

}  // namespace kvcache::inline v0::detail
