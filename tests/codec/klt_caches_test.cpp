// SPDX-License-Identifier: MIT
// klt, centred or not, and low_rank in caches, by type and chosen at run time: layers of different sizes through every verb.

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/klt.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/any_snapshot.hpp>
#include <kvcache/kernel/select.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/save.hpp>

#include "codec/coded_attention.hpp"
#include "codec/correlated_rows.hpp"
#include "store/sequences.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::status;
using stored::require_same;
namespace codec = kvcache::codec;
namespace kernel = kvcache::kernel;
namespace store = kvcache::store;

namespace {

constexpr cache_shape shape{.num_layers = 3, .num_kv_heads = 2, .head_dim = 24, .block_size = 16};

/// `count` tokens more of every layer, like those of the calibration.
template <class Cache>
void grow(Cache& cache, index_t count, test::random& random) {
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const auto k = test::correlated_rows(shape, count, test::of_layer(layer), random);
    const auto v = test::correlated_rows(shape, count, test::of_layer(layer), random);
    cache[layer].append(k, v);
  }
}

template <class Codec>
struct maker;
template <>
struct maker<codec::klt> {
  static codec::klt make(test::random& random) {
    return codec::klt(codec::klt_bases(test::calibrated(shape, random), {.bits_per_value = 4}));
  }
};
template <>
struct maker<codec::centred<codec::klt>> {
  static codec::centred<codec::klt> make(test::random& random) {
    codec::centred<codec::klt> made({.head_dim = shape.head_dim, .pairing = kvcache::rope_pairing::half},
                                    maker<codec::klt>::make(random));
    made.tail_tokens = 20;
    return made;
  }
};
template <>
struct maker<codec::low_rank> {
  static codec::low_rank make(test::random& random) {
    return codec::low_rank(
        test::calibrated(shape, random)
            .bases({.bits_per_value = 5, .store = codec::component_store::allocated, .by_layer = true},
                   {.bits_per_value = 4, .store = codec::component_store::allocated, .by_layer = true}));
  }
};

template <class Codec>
kvcache::any_codec any_of(const Codec& codec) {
  kvcache::any_codec any;
  any.keys = codec::any_keys::of(codec.keys);
  any.values = codec::any_values::of(codec.values);
  if constexpr (kvcache::sealing_codec<Codec>) {
    any.tail_tokens = codec.tail_tokens;
    any.sink_tokens = codec.sink_tokens;
  }
  return any;
}

/// Calls use(cache) with an empty cache in each container.
template <class Codec, class Use>
void in_containers(const Codec& codec, Use use) {
  use(kvcache::contiguous_cache<Codec>(shape, codec));
  use(kvcache::chunked_cache<Codec>(shape, codec, {.blocks_per_chunk = 1}));
  use(kvcache::page_pool<Codec>(shape, {}, codec).sequence());
}

/// Calls use(codec) with the codec as a type, as an any_codec, and as one for each layer.
template <class Codec, class Use>
void in_every_guise(const Codec& codec, Use use) {
  use(codec);
  use(any_of(codec));
  use(codec::by_layer<kvcache::any_codec>(any_of(codec)));
}

/// Some tokens that may stay, the newest among them.
template <class Cache>
std::vector<index_t> some_tokens(const Cache& cache, test::random& random) {
  const kvcache::keep_limits limits = cache.keep_limits();
  std::vector<index_t> tokens;
  bool stays = true;
  for (index_t t = 0; t < cache.size(); ++t) {
    if (t >= limits.whole_blocks || t % shape.block_size == 0) stays = random.chance(0.5);
    if (stays || t < limits.pinned || t == cache.size() - 1) tokens.push_back(t);
  }
  return tokens;
}

std::vector<float> only(const std::vector<float>& rows, const std::vector<index_t>& tokens, index_t size) {
  std::vector<float> kept;
  const index_t width = shape.num_kv_heads * shape.head_dim;
  for (const index_t side : {0, 1}) {
    for (const index_t t : tokens)
      kept.insert(kept.end(), rows.begin() + (side * size + t) * width,
                  rows.begin() + (side * size + t + 1) * width);
  }
  return kept;
}

}  // namespace

TEMPLATE_TEST_CASE("layers of different sizes take what they need, in every container", "[codec]", codec::klt,
                   codec::centred<codec::klt>, codec::low_rank) {
  test::random random;
  const TestType codec = maker<TestType>::make(random);
  const kvcache::block_geometry g = kvcache::geometry_of(shape);
  index_t page_bytes = 0;
  bool differ = false;
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const index_t bytes = kvcache::block_bytes_at(codec, layer, g);
    page_bytes += shape.num_kv_heads * bytes;
    differ = differ || bytes != kvcache::block_bytes_at(codec, 0, g);
    CHECK(bytes <= codec.block_bytes(g));
  }
  CHECK(differ);
  const TestType fresh = codec;
  in_every_guise(codec, [&](const auto& guise) {
    using guise_type = std::decay_t<decltype(guise)>;
    for (index_t layer = 0; layer < shape.num_layers; ++layer)
      CHECK(kvcache::block_bytes_at(guise, layer, g) == kvcache::block_bytes_at(fresh, layer, g));
    CHECK(kvcache::page_pool<guise_type>(shape, {}, guise).page_bytes() == page_bytes);
    kvcache::chunked_cache<guise_type> cache(shape, guise, {.blocks_per_chunk = 1});
    const kvcache::chunked_cache<guise_type> empty(shape, guise, {.blocks_per_chunk = 1});
    grow(cache, 70, random);
    if (!guise.needs_whole_blocks()) {
      index_t payload = 0;
      for (index_t layer = 0; layer < shape.num_layers; ++layer)
        payload += 70 * shape.num_kv_heads * kvcache::token_bytes_at(fresh, layer, g);
      CHECK(cache.bytes().payload == payload);
      CHECK(cache.bytes().total == 5 * page_bytes + empty.bytes().total);
    }
  });
}

TEMPLATE_TEST_CASE("attention over components in caches is that over the rows they give back", "[codec]",
                   codec::klt, codec::centred<codec::klt>, codec::low_rank) {
  test::random random;
  in_every_guise(maker<TestType>::make(random), [&](const auto& guise) {
    in_containers(guise, [&](auto cache) {
      grow(cache, 70, random);
      for (index_t layer = 0; layer < shape.num_layers; ++layer) {
        for (const kernel::isa level : kernel::available()) {
          for (const index_t q_len : {1, 3}) {
            CAPTURE(layer, kernel::to_string(level), q_len);
            CHECK(test::attention_error(cache, layer, kernel::select(level), q_len, random) < 0.06);
          }
        }
      }
    });
  });
}

TEMPLATE_TEST_CASE("every guise and every container give the same rows, whatever is done to them", "[codec]",
                   codec::klt, codec::centred<codec::klt>, codec::low_rank) {
  test::random random;
  const TestType codec = maker<TestType>::make(random);
  std::vector<std::vector<float>> expected;  // after each verb, of the first cache
  std::size_t verb = 0;
  const auto same_as_first = [&](const auto& cache) {
    cache.check();
    for (index_t layer = 0; layer < shape.num_layers; ++layer, ++verb) {
      const auto rows = stored::rows(cache, layer, 0, cache.size());
      if (verb == expected.size()) expected.push_back(rows);
      REQUIRE(rows == expected[verb]);
    }
  };
  in_every_guise(codec, [&](const auto& guise) {
    in_containers(guise, [&](auto cache) {
      test::random own(5);
      verb = 0;
      grow(cache, 70, own);
      same_as_first(cache);
      auto fork = cache.fork(37);
      const auto clone = cache.clone();
      grow(fork, 30, own);
      same_as_first(fork);
      cache.truncate(45);
      grow(cache, 9, own);
      same_as_first(cache);
      same_as_first(clone);
      fork.truncate(3);
      same_as_first(fork);
    });
  });
}

TEMPLATE_TEST_CASE("tokens that stay are what they were when those between them go", "[codec]", codec::klt,
                   codec::centred<codec::klt>, codec::low_rank) {
  test::random random;
  in_every_guise(maker<TestType>::make(random), [&](const auto& guise) {
    in_containers(guise, [&](auto cache) {
      grow(cache, 75, random);
      for (int round = 0; round < 3; ++round) {
        const auto fork = cache.fork();
        const index_t size = cache.size();
        const std::vector<index_t> tokens = some_tokens(cache, random);
        std::vector<std::vector<float>> before;
        for (index_t layer = 0; layer < shape.num_layers; ++layer)
          before.push_back(stored::rows(cache, layer, 0, size));
        REQUIRE(cache.keep_tokens(tokens).code == status::ok);
        cache.check();
        REQUIRE(cache.size() == static_cast<index_t>(tokens.size()));
        for (index_t layer = 0; layer < shape.num_layers; ++layer) {
          CAPTURE(round, layer, size, tokens.size());
          const auto i = static_cast<std::size_t>(layer);
          REQUIRE(stored::rows(cache, layer, 0, cache.size()) == only(before[i], tokens, size));
          REQUIRE(stored::rows(fork, layer, 0, size) == before[i]);
          CHECK(test::attention_error(cache, layer, kernel::best(), 1, random) < 0.06);
        }
        grow(cache, 21, random);
      }
    });
  });
}

TEMPLATE_TEST_CASE("centred keys that no spec names come back from their description", "[codec]", codec::f32,
                   codec::f16, codec::bf16) {
  codec::centred_keys<typename TestType::keys_type> keys;
  keys.turns = std::make_shared<const codec::rope_turns>(
      kvcache::rope_config{.head_dim = 24, .pairing = kvcache::rope_pairing::half});
  kvcache::any_codec any;
  any.keys = codec::any_keys::of(keys);
  const auto described = kvcache::describe(any);
  CHECK(kvcache::describe(kvcache::make_described<kvcache::any_codec>(described, shape)) == described);
}

TEMPLATE_TEST_CASE("snapshots of klt come back with its bases, into caches by type and by name", "[codec]",
                   codec::klt, codec::centred<codec::klt>) {
  test::random random;
  const TestType codec = maker<TestType>::make(random);
  using of_layers = codec::by_layer<kvcache::any_codec>;
  const kvcache::any_cache named(
      "paged/klt", kvcache::page_pool<of_layers>(shape, {}, of_layers(any_of(codec))).sequence());
  in_containers(codec, [&](auto cache) {
    for (const index_t size : {0, 1, 16, 70}) {
      cache.clear();
      grow(cache, size, random);
      std::vector<std::byte> saved = store::save(cache, {.model = "m"});
      auto typed = store::load<kvcache::chunked_cache<TestType>>(saved).cache;
      require_same(cache, typed);
      require_same(cache, store::load<kvcache::contiguous_cache<of_layers>>(saved).cache);
      auto same = named.fork();
      test::random c(11);
      test::random d(11);
      cache.clear();
      grow(cache, size, c);
      grow(same, size, d);
      require_same(cache, same);
      require_same(cache, store::load<kvcache::chunked_cache<TestType>>(store::save(same, {})).cache);
      saved = store::save(cache, {.model = "m"});
      for (const char* container : {"contiguous", "chunked", "paged"}) {
        auto loaded = store::load_any(saved, {}, container).cache;
        require_same(cache, loaded);
        test::random a(9);
        test::random b(9);
        grow(loaded, 30, a);
        auto longer = cache.clone();
        grow(longer, 30, b);
        require_same(longer, loaded);
        require_same(loaded, store::load_any(store::save(loaded, {.model = "m"})).cache);
      }
    }
  });
}
