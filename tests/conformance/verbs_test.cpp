// SPDX-License-Identifier: MIT
// What every container does with its tokens: append, read back, iterate, truncate, clear, reserve, account.

#include "conformance/caches.hpp"

#include <limits>
#include <type_traits>
#include <utility>

using namespace conformance;

namespace {

constexpr cache_shape small{.num_layers = 3, .num_kv_heads = 2, .head_dim = 5, .block_size = 16};

}  // namespace

TEMPLATE_TEST_CASE("an empty cache holds nothing", "[conformance]", ALL_CACHES) {
  TestType source(small);
  auto cache = source.make();
  REQUIRE(cache.shape() == small);
  REQUIRE(cache.size() == 0);
  REQUIRE(cache.bytes().payload == 0);
  REQUIRE(cache.bytes().total == cache.bytes().slack);
  for (index_t layer = 0; layer < small.num_layers; ++layer) {
    REQUIRE(cache[layer].size() == 0);
    REQUIRE(cache[layer].num_blocks() == 0);
    for (const auto view : cache[layer].blocks(1)) FAIL("block " << view.index << " of an empty layer");
    cache[layer].copy_out(0, 0, {}, {});
    REQUIRE(cache[layer].try_append({}, {}) == status::ok);
  }
  cache.truncate(0);
  cache.truncate(100);
  cache.clear();
  cache.check();
  REQUIRE(cache.fork().size() == 0);
  REQUIRE(cache.clone().size() == 0);
  REQUIRE(cache.positions()[0] == 0);
}

TEMPLATE_TEST_CASE("appended tokens read back as the codec rounds them, in both layouts", "[conformance]",
                   ALL_CACHES) {
  test::random random;
  for (const index_t head_dim : {1, 2, 3, 16, 33, 128}) {
    for (const index_t block_size : {16, 64}) {
      const cache_shape shape{
          .num_layers = 2, .num_kv_heads = 3, .head_dim = head_dim, .block_size = block_size};
      CAPTURE(head_dim, block_size);
      TestType source(shape);
      auto cache = source.make();
      auto model = model_of<TestType>(shape);
      for (const index_t tokens :
           {index_t{1}, block_size - 2, index_t{1}, index_t{1}, 2 * block_size, block_size + 1})
        append(cache, model, tokens, random);
      require_same(cache, model);
      for (int i = 0; i < 8; ++i) {  // any range
        const index_t first = random.below(model.size() + 1);
        require_same_tokens(cache, model, random.below(2), first, random.below(model.size() - first + 1));
      }
    }
  }
}

TEMPLATE_TEST_CASE("every block size holds tokens up to, at and beyond its end", "[conformance]",
                   ALL_CONTAINERS) {
  test::random random;
  for (const index_t block_size : {16, 32, 64, 128, 256}) {
    for (const index_t tokens : {index_t{1}, block_size - 1, block_size, block_size + 1, 2 * block_size}) {
      const cache_shape shape{.num_layers = 1, .num_kv_heads = 2, .head_dim = 7, .block_size = block_size};
      CAPTURE(block_size, tokens);
      TestType source(shape);
      auto cache = source.make();
      auto model = model_of<TestType>(shape);
      append(cache, model, tokens, random);
      require_same(cache, model);
      append(cache, model, 1, random);
      require_same(cache, model);
    }
  }
}

TEMPLATE_TEST_CASE("the widest head fits", "[conformance]", ALL_CACHES) {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 512, .block_size = 16};
  TestType source(shape);
  auto cache = source.make();
  auto model = model_of<TestType>(shape);
  append(cache, model, 19, random);
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("numbers that are not ordinary are stored as the element type has them, or refused",
                   "[conformance]", ALL_CACHES) {
  using limits = std::numeric_limits<float>;
  const std::vector<float> k{
      0.0F,     -0.0F,    limits::infinity(), -limits::infinity(), limits::quiet_NaN(),  limits::max(),
      65504.0F, 65519.9F, 65520.0F,           -65520.0F,           limits::denorm_min(), 5.9e-8F,
      2.9e-8F,  6.1e-5F,  1.00390625F,        1.01171875F,         -1.00390625F,         limits::lowest()};
  const std::vector<float> v(k.rbegin(), k.rend());
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 3, .block_size = 16};
  TestType source(shape);
  auto cache = source.make();
  auto model = model_of<TestType>(shape);
  if (!(std::is_same_v<typename TestType::codec, codec::f32> ||
        std::is_same_v<typename TestType::codec, codec::f16> ||
        std::is_same_v<typename TestType::codec, codec::bf16>)) {
    REQUIRE(cache[0].try_append(k, v) == status::not_finite);
    REQUIRE_THROWS(cache[0].append(k, v));
  } else {
    cache[0].append(k, v);
    model.append(0, k, v);
  }
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("the blocks of a head cover its tokens in order", "[conformance]", ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  for (const index_t tokens : {1, 15, 16, 17, 50}) {
    CAPTURE(tokens);
    append(cache, model, tokens, random);
    const auto layer = std::as_const(cache)[1];
    REQUIRE(layer.num_blocks() == (model.size() + 15) / 16);
    for (index_t head = 0; head < small.num_kv_heads; ++head) {
      index_t covered = 0;
      index_t index = 0;
      for (const kvcache::block_view view : layer.blocks(head)) {
        REQUIRE(view.index == index);
        REQUIRE(view.first_token == covered);
        REQUIRE(view.count == std::min<index_t>(16, model.size() - covered));
        REQUIRE(view.data == layer.block(head, index));
        REQUIRE(reinterpret_cast<std::uintptr_t>(view.data) % 64 == 0);
        covered += view.count;
        ++index;
      }
      REQUIRE(covered == model.size());
      REQUIRE(index == layer.num_blocks());
    }
  }
}

TEMPLATE_TEST_CASE("a block decodes to its tokens through the codec alone", "[conformance]", ALL_CACHES) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 37, random);
  const auto geometry = kvcache::geometry_of(small);
  for (index_t layer = 0; layer < small.num_layers; ++layer) {
    for (index_t head = 0; head < small.num_kv_heads; ++head) {
      for (const auto view : cache[layer].blocks(head)) {
        std::vector<float> k(static_cast<std::size_t>(view.count * small.head_dim));
        std::vector<float> v(k.size());
        kvcache::codec_at(cache.codec(), layer, head)
            .decode(kvcache::kernel::best(), geometry, view.data, 0, view.count, {k.data(), small.head_dim},
                    {v.data(), small.head_dim});
        const auto all_k = model.keys(layer, view.first_token, view.count, true);
        const auto all_v = model.values(layer, view.first_token, view.count, true);
        const auto from = head * view.count * small.head_dim;
        REQUIRE(same_numbers(k, {all_k.begin() + from, all_k.begin() + from + view.count * small.head_dim}));
        REQUIRE(same_numbers(v, {all_v.begin() + from, all_v.begin() + from + view.count * small.head_dim}));
      }
    }
  }
}

TEMPLATE_TEST_CASE("the size of a cache is what every layer has", "[conformance]", ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 0, 20, random);
  require_same(cache, model);
  REQUIRE(cache.size() == 0);
  append(cache, model, 2, 7, random);
  append(cache, model, 1, 31, random);
  require_same(cache, model);
  REQUIRE(cache.size() == 7);
  append(cache, model, 2, 13, random);
  REQUIRE(cache.size() == 20);
  auto copy = cache.clone();  // every layer with what it has
  require_same(copy, model);
  cache.truncate(19);
  model.truncate(19);
  require_same(cache, model);
  REQUIRE(copy[1].size() == 31);
}

TEMPLATE_TEST_CASE("a truncated cache continues where it was cut", "[conformance]", ALL_CACHES) {
  test::random random;
  TestType source(small);
  for (index_t cut = 0; cut <= 50; cut += cut % 16 == 2 ? 12 : 1) {
    CAPTURE(cut);
    auto cache = source.make();
    auto model = model_of<TestType>(small);
    append(cache, model, 50, random);
    cache.truncate(cut);
    model.truncate(cut);
    require_same(cache, model);
    append(cache, model, 5, random);
    append(cache, model, 23, random);
    require_same(cache, model);
  }
}

TEMPLATE_TEST_CASE("a cleared cache starts over and gives memory back where the container can",
                   "[conformance]", ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 100, random);
  cache.clear();
  model.clear();
  require_same(cache, model);
  REQUIRE(cache.bytes().payload == 0);
  if (TestType::shrinks) REQUIRE(cache.bytes().total == 0);
  append(cache, model, 100, random);
  require_same(cache, model);
  if (TestType::shrinks) {
    const index_t before = cache.bytes().total;
    cache.truncate(1);
    REQUIRE(cache.bytes().total <= before / 2);
  }
}

TEMPLATE_TEST_CASE("bytes are payload and slack, and payload is the formula", "[conformance]", ALL_CACHES) {
  test::random random;
  for (const index_t head_dim : {1, 5, 64}) {
    const cache_shape shape{.num_layers = 3, .num_kv_heads = 2, .head_dim = head_dim, .block_size = 16};
    TestType source(shape);
    auto cache = source.make();
    auto model = model_of<TestType>(shape);
    const index_t formula = token_bytes_of<TestType>(shape);
    REQUIRE(kvcache::bytes_per_token(shape, cache.codec()) == formula);
    for (const index_t tokens : {1, 14, 1, 1, 40}) {
      append(cache, model, tokens, random);
      const auto use = cache.bytes();
      CAPTURE(head_dim, model.size(), use.total, use.payload, use.slack, use.shared);
      REQUIRE(use.payload == formula * model.size());
      REQUIRE(use.total == use.payload + use.slack);
      REQUIRE(use.slack >= 0);
      REQUIRE(use.shared == 0);
    }
  }
}

TEMPLATE_TEST_CASE("slack is less than one block of each head where a container grows by blocks",
                   "[conformance]", chunked<codec::bf16>, paged<codec::bf16>, paged<codec::f32>) {
  test::random random;
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 64, .block_size = 16};
  TestType source(shape);
  auto cache = source.make();
  auto model = model_of<TestType>(shape);
  for (index_t tokens = 1; tokens <= 40; ++tokens) {
    append(cache, model, 1, random);
    REQUIRE(cache.bytes().slack ==
            (tokens % 16 == 0 ? 0 : 16 - tokens % 16) * kvcache::bytes_per_token(shape, cache.codec()));
  }
}

TEMPLATE_TEST_CASE("reserved room is there, and appending into it grants no more", "[conformance]",
                   ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  append(cache, model, 3, random);
  REQUIRE(cache.reserve(75) == status::ok);
  require_same(cache, model);
  const index_t total = cache.bytes().total;
  REQUIRE(total >= 75 * kvcache::bytes_per_token(small, cache.codec()));
  REQUIRE(cache.reserve(10) == status::ok);  // less than there is
  append(cache, model, 72, random);
  REQUIRE(cache.bytes().total == total);
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("shrinking to fit gives back what is not needed and keeps every token", "[conformance]",
                   ALL_CONTAINERS) {
  test::random random;
  TestType source(small);
  auto cache = source.make();
  auto model = model_of<TestType>(small);
  cache.shrink_to_fit();
  require_same(cache, model);
  append(cache, model, 50, random);
  REQUIRE(cache.reserve(2000) == status::ok);
  const index_t reserved = cache.bytes().total;
  cache.shrink_to_fit();
  require_same(cache, model);
  REQUIRE(cache.bytes().total < reserved);
  append(cache, model, 500, random);
  cache.truncate(33);
  model.truncate(33);
  cache.shrink_to_fit();
  require_same(cache, model);
  const index_t kept = cache.bytes().total;
  append(cache, model, 700, random);
  require_same(cache, model);
  REQUIRE(cache.bytes().total > kept);
  cache.clear();
  model.clear();
  cache.shrink_to_fit();
  require_same(cache, model);
  REQUIRE(cache.bytes().total == 0);
  append(cache, model, 3, random);
  require_same(cache, model);
}

TEMPLATE_TEST_CASE("impossible shapes are refused with the field's name", "[conformance]", ALL_CONTAINERS) {
  const auto refused = [](cache_shape shape, const std::string& field) {
    CAPTURE(field);
    try {
      TestType source(shape);
      (void)source.make();
    } catch (const kvcache::shape_error& error) {
      return std::string(error.what()).find(field) != std::string::npos;
    }
    return false;
  };
  REQUIRE(refused({.num_layers = 0}, "num_layers"));
  REQUIRE(refused({.num_layers = -3}, "num_layers"));
  REQUIRE(refused({.num_kv_heads = 0}, "num_kv_heads"));
  REQUIRE(refused({.head_dim = 0}, "head_dim"));
  REQUIRE(refused({.head_dim = 513}, "head_dim"));
  REQUIRE(refused({.block_size = 0}, "block_size"));
  REQUIRE(refused({.block_size = 48}, "block_size"));
  REQUIRE(refused({.block_size = 512}, "block_size"));
  constexpr index_t huge = std::numeric_limits<index_t>::max() / 4;
  REQUIRE(refused({.num_layers = huge, .num_kv_heads = huge}, "overflow"));
  REQUIRE(refused({.num_layers = 1, .num_kv_heads = huge}, "overflow"));
}
