// SPDX-License-Identifier: MIT
// Every container with every codec, behind one way to make them, and comparison with the model in oracle/.
//
//   TEMPLATE_TEST_CASE("...", "[conformance]", ALL_CACHES) {
//     TestType source(shape);             // paged: a pool; else nothing but the settings
//     auto cache = source.make();         // any number of sequences
//   }
//
// To add a container or a codec, add it to the lists at the end.
#pragma once

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rotated.hpp>

#include "conformance/memory.hpp"
#include "oracle/cache_oracle.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace conformance {

using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::kv_layout;
using kvcache::status;

/// contiguous_cache as it is by default: addresses reserved from the system, growth in place.
template <class Codec>
struct contiguous {
  using codec = Codec;
  using cache = kvcache::contiguous_cache<Codec>;
  static constexpr bool takes_memory = false;  ///< blocks come from the memory resource given
  static constexpr bool shares = false;        ///< forks share blocks
  static constexpr bool shrinks = false;       ///< truncating gives memory back

  explicit contiguous(const cache_shape& s) : shape(s) {}
  [[nodiscard]] cache make() const {
    return cache(shape, {}, kvcache::contiguous_options{.max_tokens = 4096});
  }

  cache_shape shape;
};

/// contiguous_cache with a few tokens reserved only: growth soon moves to new addresses.
template <class Codec>
struct contiguous_small : contiguous<Codec> {
  using typename contiguous<Codec>::cache;

  using contiguous<Codec>::contiguous;
  [[nodiscard]] cache make() const {
    return cache(this->shape, {}, kvcache::contiguous_options{.max_tokens = 20});
  }
};

/// contiguous_cache in a memory resource: growth doubles and copies.
template <class Codec>
struct contiguous_in_memory {
  using codec = Codec;
  using cache = kvcache::contiguous_cache<Codec>;
  static constexpr bool takes_memory = true;
  static constexpr bool shares = false;
  static constexpr bool shrinks = false;

  explicit contiguous_in_memory(const cache_shape& s,
                                std::pmr::memory_resource* m = std::pmr::new_delete_resource())
      : shape(s), memory(m) {}
  [[nodiscard]] cache make() const { return cache(shape, {}, kvcache::contiguous_options{.memory = memory}); }

  cache_shape shape;
  std::pmr::memory_resource* memory;
};

/// chunked_cache with one block of each head in a chunk.
template <class Codec>
struct chunked {
  using codec = Codec;
  using cache = kvcache::chunked_cache<Codec>;
  static constexpr bool takes_memory = true;
  static constexpr bool shares = false;
  static constexpr bool shrinks = true;

  explicit chunked(const cache_shape& s, std::pmr::memory_resource* m = kvcache::huge_page_resource())
      : shape(s), memory(m) {}
  [[nodiscard]] cache make() const {
    return cache(shape, {}, kvcache::chunked_options{.blocks_per_chunk = 1, .memory = memory});
  }

  cache_shape shape;
  std::pmr::memory_resource* memory;
};

template <class Codec>
struct chunked_by_3 : chunked<Codec> {
  using typename chunked<Codec>::cache;
  using chunked<Codec>::chunked;
  [[nodiscard]] cache make() const {
    return cache(this->shape, {}, kvcache::chunked_options{.blocks_per_chunk = 3, .memory = this->memory});
  }
};

/// paged_cache: every sequence made by one source lives in one pool.
template <class Codec>
struct paged {
  using codec = Codec;
  using cache = kvcache::paged_cache<Codec>;
  static constexpr bool takes_memory = true;
  static constexpr bool shares = true;
  static constexpr bool shrinks = true;

  explicit paged(const cache_shape& s, std::pmr::memory_resource* m = kvcache::huge_page_resource(),
                 index_t budget = 0)
      : pool(s, {.budget_bytes = budget, .memory = m}) {}
  [[nodiscard]] cache make() { return pool.sequence(); }

  kvcache::page_pool<Codec> pool;
};

namespace codec = kvcache::codec;

// What TEMPLATE_TEST_CASE is to be given: every container with every codec ...
#define ALL_CACHES                                                                                        \
  contiguous<codec::f32>, contiguous<codec::f16>, contiguous<codec::bf16>, contiguous_small<codec::bf16>, \
      contiguous_in_memory<codec::f32>, chunked<codec::f32>, chunked<codec::f16>, chunked<codec::bf16>,   \
      chunked_by_3<codec::bf16>, paged<codec::f32>, paged<codec::f16>, paged<codec::bf16>,                \
      contiguous<codec::int8>, chunked_by_3<codec::int8>, paged<codec::int8>,                             \
      chunked_by_3<codec::rotated<3>>, paged<codec::rotated<4>>
// ... each container once, where the codec cannot matter ...
#define ALL_CONTAINERS                                                                      \
  contiguous<codec::bf16>, contiguous_small<codec::f16>, contiguous_in_memory<codec::bf16>, \
      chunked<codec::f32>, chunked_by_3<codec::bf16>, paged<codec::bf16>
// ... and those whose blocks come from a memory resource, so that it can run out.
#define EXHAUSTIBLE_CACHES \
  contiguous_in_memory<codec::f16>, chunked<codec::f32>, chunked_by_3<codec::bf16>, paged<codec::bf16>

// ------------------------------------------------------------------------------------------------ helpers

/// What a codec that encodes token by token gives back for rows, [n, head_dim], each stored alone.
template <class Codec>
std::vector<float> stored_through(const Codec& codec, std::vector<float> rows, index_t head_dim, bool keys) {
  const kvcache::block_geometry g{.block_size = 16, .head_dim = head_dim};
  const kvcache::memory_block block(codec.block_bytes(g), kvcache::huge_page_resource());
  std::memset(block.data(), 0, static_cast<std::size_t>(block.size()));
  std::vector<float> other(static_cast<std::size_t>(head_dim));
  const auto& kernels = kvcache::kernel::best();
  for (float* row = rows.data(); row != rows.data() + rows.size(); row += head_dim) {
    REQUIRE(codec.encode(kernels, g, block.data(), 5, 1, {row, head_dim}, {row, head_dim}) == status::ok);
    codec.decode(kernels, g, block.data(), 5, 1, {keys ? row : other.data(), head_dim},
                 {keys ? other.data() : row, head_dim});
  }
  return rows;
}

/// The model of a cache of this shape, given its codec. Codecs that oracle/ knows are its own there; of the others this
/// suite shows that a container keeps what they store, and tests/codec/ what that is.
template <class Codec>
oracle::cache model_with(const cache_shape& shape, const Codec& codec, std::string_view name) {
  if (name == "f32" || name == "f16" || name == "bf16" || name == "int8")
    return {shape.num_layers, shape.num_kv_heads, shape.head_dim, name};
  return {shape.num_layers, shape.num_kv_heads, shape.head_dim,
          [codec, dim = shape.head_dim](std::vector<float> rows, bool keys) {
            return stored_through(codec, std::move(rows), dim, keys);
          }};
}
template <class Source>
oracle::cache model_of(const cache_shape& shape) {
  return model_with(shape, typename Source::codec{}, Source::codec::name);
}

inline std::vector<float> random_rows(test::random& random, const cache_shape& shape, index_t tokens) {
  return random.floats(tokens * shape.num_kv_heads * shape.head_dim);
}

/// Appends the same random tokens to one layer of a cache and of its model.
template <class Cache>
void append(Cache& cache, oracle::cache& model, index_t layer, index_t tokens, test::random& random) {
  const std::vector<float> k = random_rows(random, cache.shape(), tokens);
  const std::vector<float> v = random_rows(random, cache.shape(), tokens);
  REQUIRE(cache[layer].try_append(k, v) == status::ok);
  model.append(layer, k, v);
}

/// The same for every layer.
template <class Cache>
void append(Cache& cache, oracle::cache& model, index_t tokens, test::random& random) {
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer)
    append(cache, model, layer, tokens, random);
}

/// Equal bit for bit, save that any NaN equals any other.
inline bool same_numbers(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::bit_cast<std::uint32_t>(a[i]) != std::bit_cast<std::uint32_t>(b[i])) return false;
  }
  return true;
}

/// Tokens [first, first + count) of a layer are those of the model, in both layouts.
template <class Cache>
void require_same_tokens(const Cache& cache, const oracle::cache& model, index_t layer, index_t first,
                         index_t count) {
  const auto n = static_cast<std::size_t>(count * cache.shape().num_kv_heads * cache.shape().head_dim);
  std::vector<float> k(n, 1e9F);
  std::vector<float> v(n, 1e9F);
  for (const bool by_head : {false, true}) {
    CAPTURE(layer, first, count, by_head);
    cache[layer].copy_out(first, count, k, v, by_head ? kv_layout::hnd : kv_layout::nhd);
    REQUIRE(same_numbers(k, model.keys(layer, first, count, by_head)));
    REQUIRE(same_numbers(v, model.values(layer, first, count, by_head)));
  }
}

/// Sizes, positions and every token are those of the model, and the cache's books add up.
template <class Cache>
void require_same(const Cache& cache, const oracle::cache& model) {
  cache.check();
  REQUIRE(cache.size() == model.size());
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer) {
    REQUIRE(cache[layer].size() == model.size(layer));
    require_same_tokens(cache, model, layer, 0, model.size(layer));
  }
  for (index_t t = 0; t < model.size(); ++t)
    REQUIRE(cache.positions()[t] == model.positions()[static_cast<std::size_t>(t)]);
}

}  // namespace conformance
