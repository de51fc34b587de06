// SPDX-License-Identifier: MIT
// The containers under one face: how to make an empty sequence, which bytes of it attention reads, and how to
// attend.
#pragma once

#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/exact.hpp>

#include "support/pin.hpp"
#include "support/plain_twin.hpp"
#include "support/roof.hpp"

#include <algorithm>
#include <memory_resource>
#include <span>
#include <vector>

namespace kvcache::bench {

/// A codec for caches of this shape: what it says itself, or a default-made one.
template <class Codec>
Codec codec_for([[maybe_unused]] const cache_shape& shape) {
  if constexpr (requires { Codec::for_shape(shape); }) {
    return Codec::for_shape(shape);
  } else {
    return Codec{};
  }
}

struct contiguous {
  static constexpr const char* name = "contiguous";
  /// \param max_tokens  expected; nothing is granted for them yet
  template <class Codec>
  static contiguous_cache<Codec> make(const cache_shape& shape, index_t max_tokens,
                                      std::pmr::memory_resource* /*memory*/ = nullptr) {
    return contiguous_cache<Codec>(shape, codec_for<Codec>(shape), {.max_tokens = max_tokens});
  }
};

struct chunked {
  static constexpr const char* name = "chunked";
  template <class Codec>
  static chunked_cache<Codec> make(const cache_shape& shape, index_t /*max_tokens*/,
                                   std::pmr::memory_resource* memory = huge_page_resource()) {
    return chunked_cache<Codec>(shape, codec_for<Codec>(shape), {.memory = memory});
  }
};

struct paged {
  static constexpr const char* name = "paged";
  template <class Codec>
  static paged_cache<Codec> make(const cache_shape& shape, index_t /*max_tokens*/,
                                 std::pmr::memory_resource* /*memory*/ = nullptr) {
    return page_pool<Codec>(shape, {}, codec_for<Codec>(shape)).sequence();
  }
};

/// Codec f32 only.
struct plain {
  static constexpr const char* name = "plain";
  template <class Codec>
  static plain_cache make(const cache_shape& shape, index_t max_tokens,
                          std::pmr::memory_resource* /*memory*/ = nullptr) {
    return {shape, max_tokens};
  }
};

/// What attention over this layer reads, in pieces of up to `piece_bytes`, in order of address. Blocks that
/// lie side by side count as one stretch, so the roof is that of the bytes, not of the container's
/// bookkeeping.
template <class Layer>
std::vector<extent> pieces_of(const Layer& layer, index_t piece_bytes) {
  std::vector<extent> stretches;
  const auto g = block_geometry{layer.shape().block_size, layer.shape().head_dim};
  for (index_t head = 0; head < layer.shape().num_kv_heads; ++head) {
    for (const block_view& block : layer.blocks(head))
      stretches.push_back({block.data, layer.codec().block_bytes(g)});
  }
  return cut(join(std::move(stretches)), piece_bytes);
}

inline std::vector<extent> pieces_of(const plain_layer& layer, index_t piece_bytes) {
  std::vector<extent> stretches;
  const index_t bytes = layer.size * layer.shape.head_dim * index_t{sizeof(float)};
  for (index_t head = 0; head < layer.shape.num_kv_heads; ++head) {
    for (const auto* rows : {&layer.keys, &layer.values})
      stretches.push_back({reinterpret_cast<const std::byte*>(rows->data() + layer.row(head, 0)), bytes});
  }
  return cut(join(std::move(stretches)), piece_bytes);
}

/// Memory and settings of one row's attention.
struct attend_call {
  index_t q_len;
  const kernel::table* kernels;
  index_t threads;
  attend_workspace workspace = {};
  std::vector<float> plain_weights = {};

  template <class Layer>
  void operator()(std::span<const float> q, const Layer& layer, std::span<float> out) {
    attend(q, layer, out, {.q_len = q_len, .kernel = kernels, .workspace = &workspace},
           pinned_workers(threads));
  }
  void operator()(std::span<const float> q, const plain_layer& layer, std::span<float> out) {
    plain_attend(q, layer, out, plain_weights);
  }
};

}  // namespace kvcache::bench
