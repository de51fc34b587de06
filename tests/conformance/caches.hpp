// SPDX-License-Identifier: MIT
// Every container, with codecs as types, behind one way to make them, and comparison with the model in oracle/. Codecs by
// name: every_codec_test.cpp.
//
//   TEMPLATE_TEST_CASE("...", "[conformance]", ALL_CACHES) {
//     TestType source(shape);             // paged: a pool; else nothing but the settings
//     auto cache = source.make();         // any number of sequences
//   }
//
// To add a container, or a codec that encodes token by token, add it to the lists at the end.
#pragma once

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/interop/any_codec.hpp>

#include "conformance/memory.hpp"
#include "oracle/cache_oracle.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace conformance {

using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::kv_layout;
using kvcache::status;

/// Layers in turn of three codecs, whose blocks differ in size.
struct three_codecs : kvcache::codec::by_layer<kvcache::any_codec> {
  static constexpr std::string_view name = "by_layer";
  static constexpr std::string_view names[] = {"int8", "bf16", "f32"};

  three_codecs() = default;  // one codec everywhere; see codec_for
  explicit three_codecs(const cache_shape& shape) : by_layer(codecs(), turns(shape.num_layers)) {}

 private:
  static std::vector<kvcache::any_codec> codecs() {
    const auto codec_of = []<class Codec>(const Codec& codec) {
      kvcache::any_codec any;
      any.keys = kvcache::codec::any_keys::of(codec.keys);
      any.values = kvcache::codec::any_values::of(codec.values);
      return any;
    };
    return {codec_of(kvcache::codec::int8{}), codec_of(kvcache::codec::bf16{}),
            codec_of(kvcache::codec::f32{})};
  }
  static std::vector<index_t> turns(index_t num_layers) {
    std::vector<index_t> of_layer;
    for (index_t layer = 0; layer < num_layers; ++layer) of_layer.push_back(layer % 3);
    return of_layer;
  }
};

/// What a source gives its caches: the codec as it is by default, unless that depends on the shape.
template <class Codec>
Codec codec_for(const cache_shape& shape) {
  if constexpr (std::is_constructible_v<Codec, const cache_shape&>) {
    return Codec(shape);
  } else {
    return {};
  }
}

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
      : pool(s, {.budget_bytes = budget, .memory = m}, codec_for<Codec>(s)) {}
  [[nodiscard]] cache make() { return pool.sequence(); }

  kvcache::page_pool<Codec> pool;
};

namespace codec = kvcache::codec;

// What TEMPLATE_TEST_CASE is to be given: every container with codecs that encode token by token ...
#define ALL_CACHES                                                                                        \
  contiguous<codec::f32>, contiguous<codec::f16>, contiguous<codec::bf16>, contiguous_small<codec::bf16>, \
      contiguous_in_memory<codec::f32>, chunked<codec::f32>, chunked<codec::f16>, chunked<codec::bf16>,   \
      chunked_by_3<codec::bf16>, paged<codec::f32>, paged<codec::f16>, paged<codec::bf16>,                \
      contiguous<codec::int8>, chunked_by_3<codec::int8>, paged<codec::int8>,                             \
      chunked_by_3<codec::rotated<3>>, paged<codec::rotated<4>>, paged<three_codecs>
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
          [codec, dim = shape.head_dim](std::vector<float> rows, bool keys, index_t) {
            return stored_through(codec, std::move(rows), dim, keys);
          }};
}
template <class Source>
oracle::cache model_of(const cache_shape& shape) {
  if constexpr (std::is_same_v<typename Source::codec, three_codecs>) {
    return {shape.num_layers, shape.num_kv_heads, shape.head_dim,
            [dim = shape.head_dim](std::vector<float> rows, bool, index_t layer) {
              return oracle::stored_rows(std::move(rows), dim, three_codecs::names[layer % 3]);
            }};
  } else {
    return model_with(shape, typename Source::codec{}, Source::codec::name);
  }
}

/// Bytes that a token takes in all layers, keys and values, by the model.
template <class Source>
index_t token_bytes_of(const cache_shape& shape) {
  index_t bytes = 0;
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const bool in_turn = std::is_same_v<typename Source::codec, three_codecs>;
    const auto name = in_turn ? three_codecs::names[layer % 3] : Source::codec::name;
    bytes += 2 * shape.num_kv_heads * oracle::row_bytes(shape.head_dim, name);
  }
  return bytes;
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
