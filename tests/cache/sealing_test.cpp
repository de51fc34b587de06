// SPDX-License-Identifier: MIT
// Caches whose newest tokens are exact: against a plain model, over random scripts, in every container.

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/dense_kv.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/interop/any_cache.hpp>

#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::status;
namespace codec = kvcache::codec;

namespace {

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};

/// Tokens of one layer as they should read back: exact in the tail, through the codec before it.
template <class Codec>
class layer_model {
 public:
  layer_model(const cache_shape& shape, const Codec& codec)
      : shape_(shape),
        codec_(codec),
        ring_blocks_((codec.tail_tokens + shape.block_size - 1) / shape.block_size + 2) {}

  void append(const std::vector<float>& k, const std::vector<float>& v) {
    const auto width = static_cast<std::size_t>(shape_.num_kv_heads * shape_.head_dim);
    for (std::size_t i = 0; i < k.size(); i += width) {
      const auto at = static_cast<std::ptrdiff_t>(i);
      rows_.push_back({narrowed({k.begin() + at, k.begin() + at + static_cast<std::ptrdiff_t>(width)}),
                       narrowed({v.begin() + at, v.begin() + at + static_cast<std::ptrdiff_t>(width)})});
      first_exact_ = std::max(first_exact_, (size() - 1) / shape_.block_size - ring_blocks_ + 1);
      while (sealed_ < due(size())) seal(sealed_++);
    }
  }

  void truncate(index_t n) {
    if (n >= size()) return;
    rows_.resize(static_cast<std::size_t>(n));
    while (sealed_ > due(n) && sealed_ > first_exact_) --sealed_;
    const index_t cut = n / shape_.block_size;
    if (sealed_ <= cut) return;
    for (index_t t = cut * shape_.block_size; t < n; ++t) {
      token& row = rows_[static_cast<std::size_t>(t)];
      if (t < codec_.sink_tokens) continue;
      row.k = narrowed(row.stored_k);
      row.v = narrowed(row.stored_v);
    }
    sealed_ = first_exact_ = cut;
  }

  [[nodiscard]] index_t size() const { return static_cast<index_t>(rows_.size()); }

  /// A short step that was given up, and had come as far as `other`, wrote over exact tokens that were sealed before.
  void forget_exact(const layer_model& other) { first_exact_ = std::max(first_exact_, other.first_exact_); }

  /// Keys of all tokens, then values, [token, head, dim].
  [[nodiscard]] std::vector<float> all() const {
    std::vector<float> keys;
    std::vector<float> values;
    for (index_t t = 0; t < size(); ++t) {
      const token& row = rows_[static_cast<std::size_t>(t)];
      const bool exact = t >= sealed_ * shape_.block_size || t < codec_.sink_tokens;
      const auto& k = exact ? row.k : row.stored_k;
      const auto& v = exact ? row.v : row.stored_v;
      keys.insert(keys.end(), k.begin(), k.end());
      values.insert(values.end(), v.begin(), v.end());
    }
    keys.insert(keys.end(), values.begin(), values.end());
    return keys;
  }

 private:
  struct token {
    std::vector<float> k;  // [num_kv_heads, head_dim], as exact tokens are stored
    std::vector<float> v;
    std::vector<float> stored_k = {};  // what the codec made of them
    std::vector<float> stored_v = {};
  };

  [[nodiscard]] index_t due(index_t size) const {
    return std::max(size - codec_.tail_tokens, index_t{0}) / shape_.block_size;
  }

  /// As exact tokens are stored; what a codec made of them is cut to the range of these first.
  [[nodiscard]] std::vector<float> narrowed(std::vector<float> rows) const {
    for (float& x : rows) {
      if (codec_.exact_as == codec::exact_element::f16)
        x = kvcache::to_float(kvcache::from_float<kvcache::half>(std::clamp(x, -65504.0F, 65504.0F)));
      if (codec_.exact_as == codec::exact_element::bf16)
        x = kvcache::to_float(kvcache::from_float<kvcache::bfloat16>(x));
    }
    return rows;
  }

  void seal(index_t index) {
    const auto g = kvcache::geometry_of(shape_);
    const index_t skipped = index == 0 ? codec_.sink_tokens : 0;
    for (index_t head = 0; head < shape_.num_kv_heads; ++head) {
      std::vector<float> k;
      std::vector<float> v;
      for_tokens(index, [&](token& row) {
        const auto from = head * shape_.head_dim;
        k.insert(k.end(), row.k.begin() + from, row.k.begin() + from + shape_.head_dim);
        v.insert(v.end(), row.v.begin() + from, row.v.begin() + from + shape_.head_dim);
      });
      const kvcache::memory_block block(codec_.block_bytes(g), kvcache::huge_page_resource());
      std::memset(block.data(), 0, static_cast<std::size_t>(block.size()));
      const auto& kernels = kvcache::kernel::best();
      const auto offset = skipped * shape_.head_dim;
      if (skipped < g.block_size)
        REQUIRE(codec_.encode(kernels, g, block.data(), skipped, g.block_size - skipped,
                              {k.data() + offset, g.head_dim},
                              {v.data() + offset, g.head_dim}) == status::ok);
      codec_.decode(kernels, g, block.data(), 0, g.block_size, {k.data(), g.head_dim},
                    {v.data(), g.head_dim});
      index_t t = 0;
      for_tokens(index, [&](token& row) {
        row.stored_k.resize(row.k.size());
        row.stored_v.resize(row.v.size());
        std::copy_n(k.begin() + t * g.head_dim, g.head_dim, row.stored_k.begin() + head * g.head_dim);
        std::copy_n(v.begin() + t * g.head_dim, g.head_dim, row.stored_v.begin() + head * g.head_dim);
        ++t;
      });
    }
  }

  template <class Body>
  void for_tokens(index_t block, Body body) {
    for (index_t t = block * shape_.block_size; t < (block + 1) * shape_.block_size; ++t)
      body(rows_[static_cast<std::size_t>(t)]);
  }

  cache_shape shape_;
  Codec codec_;
  index_t ring_blocks_;
  index_t sealed_ = 0;
  index_t first_exact_ = 0;  // block whose exact tokens are still there
  std::vector<token> rows_;
};

template <class Codec>
using model = std::vector<layer_model<Codec>>;

template <class Cache>
std::vector<float> all_of(const Cache& cache, index_t layer) {
  const index_t n = cache[layer].size();
  const auto floats = static_cast<std::size_t>(n * cache.shape().num_kv_heads * cache.shape().head_dim);
  std::vector<float> k(floats);
  std::vector<float> v(floats);
  cache[layer].copy_out(0, n, k, v);
  k.insert(k.end(), v.begin(), v.end());
  return k;
}

template <class Cache, class Codec>
void require_same(const Cache& cache, const model<Codec>& expected) {
  cache.check();
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer) {
    CAPTURE(layer);
    REQUIRE(cache[layer].size() == expected[static_cast<std::size_t>(layer)].size());
    const std::vector<float> got = all_of(cache, layer);
    const std::vector<float> all = expected[static_cast<std::size_t>(layer)].all();
    const auto differ = std::mismatch(got.begin(), got.end(), all.begin()).first - got.begin();
    REQUIRE(differ == static_cast<std::ptrdiff_t>(all.size()));  // index of the first number that differs
  }
}

template <class Cache, class Codec>
void append(Cache& cache, model<Codec>& expected, index_t layer, index_t tokens, test::random& random) {
  const index_t n = tokens * cache.shape().num_kv_heads * cache.shape().head_dim;
  const std::vector<float> k = random.floats(n);
  const std::vector<float> v = random.floats(n);
  REQUIRE(cache[layer].try_append(k, v) == status::ok);
  expected[static_cast<std::size_t>(layer)].append(k, v);
}

template <class Cache, class Codec>
void append(Cache& cache, model<Codec>& expected, index_t tokens, test::random& random) {
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer)
    append(cache, expected, layer, tokens, random);
}

template <class Codec>
void truncate(model<Codec>& expected, index_t n) {
  for (auto& layer : expected) layer.truncate(n);
}

/// Appends, truncations, forks, clones and steps, some of them given up, in random order.
template <class Codec, class Cache>
void run_script(Cache cache, test::random& random) {
  const Codec codec = cache.codec();
  model<Codec> expected(static_cast<std::size_t>(small.num_layers), layer_model<Codec>(small, codec));
  for (int verb = 0; verb < 60; ++verb) {
    const index_t n = random.below(3) == 0 ? random.between(0, 70) : random.between(0, 3);
    const index_t chosen = random.between(0, 6);
    CAPTURE(verb, chosen, n, cache.size());
    switch (chosen) {
      case 0:
        truncate(expected, std::max(cache.size() - n, index_t{0}));
        cache.truncate(std::max(cache.size() - n, index_t{0}));
        break;
      case 1: {
        const index_t kept = random.between(0, cache.size());
        auto fork = cache.fork(kept);
        auto fork_expected = expected;
        truncate(fork_expected, kept);
        require_same(fork, fork_expected);
        append(fork, fork_expected, 20, random);
        require_same(fork, fork_expected);
        if (random.chance(0.5)) {
          cache = std::move(fork);
          expected = fork_expected;
        }
        break;
      }
      case 2: {
        auto clone = cache.clone();
        require_same(clone, expected);
        break;
      }
      case 3: {  // given up: as if it had never been
        auto step = cache.begin(n);
        auto scratch = expected;
        for (index_t layer = 0; layer < small.num_layers; ++layer)
          append(cache, scratch, layer, random.between(0, n), random);
        for (std::size_t i = 0; n <= small.block_size && i < expected.size(); ++i)
          expected[i].forget_exact(scratch[i]);
        break;
      }
      case 4: {
        auto step = cache.begin(n);
        append(cache, expected, n, random);
        step.commit();
        break;
      }
      default:
        append(cache, expected, n, random);
    }
    require_same(cache, expected);
  }
}

template <class Codec>
void run_scripts(const Codec& settings, test::random& random) {
  run_script<Codec>(kvcache::contiguous_cache<Codec>(small, settings), random);
  run_script<Codec>(kvcache::chunked_cache<Codec>(small, settings, {.blocks_per_chunk = 2}), random);
  kvcache::page_pool<Codec> pool(small, {}, settings);
  run_script<Codec>(pool.sequence(), random);
  pool.check();
  REQUIRE(pool.num_in_use() == 0);
}

}  // namespace

TEMPLATE_TEST_CASE(
    "sealed caches agree with the model over random scripts", "[cache]", (codec::exact_tail<codec::int8, 20>),
    (codec::exact_sinks<codec::rotated<4>, 3>),
    (codec::exact_sinks<codec::exact_tail<codec::rotated<2>, 0>, 16>), codec::channel<4>,
    (codec::exact_tail<codec::balanced<2>, 33>),
    (codec::exact_tail<codec::int8, 20, codec::exact_element::f16>),
    (codec::exact_sinks<codec::exact_tail<codec::channel<4>, 5, codec::exact_element::f32>, 7>),
    (codec::exact_sinks<codec::exact_tail<codec::mixed<codec::channel<3>, codec::rotated<4>>>, 4>)) {
  test::random random;
  run_scripts(TestType{}, random);
}

TEST_CASE("settings of tail and sinks are values as well", "[cache]") {
  test::random random;
  kvcache::any_codec settings = kvcache::make_codec("k=channel4,v=rotated3,sinks=5,tail=40");
  run_scripts(settings, random);
  run_scripts(codec::exact_tail<codec::int8>(codec::int8{}, 7), random);
  for (const char* exact : {"f16", "f32", "bf16"}) {
    CAPTURE(exact);
    run_scripts(kvcache::make_codec("k=channel4,v=rotated3,sinks=5,tail=40,exact=" + std::string(exact)),
                random);
  }
}

TEST_CASE("tokens appended one by one and at once are stored alike", "[cache]") {
  test::random random;
  using stored = codec::exact_sinks<codec::exact_tail<codec::channel<4>, 30>, 2>;
  kvcache::chunked_cache<stored> one_by_one(small);
  kvcache::chunked_cache<stored> at_once(small);
  const index_t token = small.num_kv_heads * small.head_dim;
  const std::vector<float> k = random.floats(200 * token);
  const std::vector<float> v = random.floats(200 * token);
  at_once[1].append(k, v);
  for (std::size_t t = 0; t < 200; ++t) {
    const auto n = static_cast<std::size_t>(token);
    one_by_one[1].append(std::span(k).subspan(t * n, n), std::span(v).subspan(t * n, n));
  }
  REQUIRE(all_of(one_by_one, 1) == all_of(at_once, 1));
  REQUIRE(one_by_one[1].num_sealed() == 10);
}

TEST_CASE("what cannot be stored is refused and leaves everything as it was", "[cache]") {
  test::random random;
  kvcache::chunked_cache<codec::exact_tail<codec::channel<4>, 10>> cache(small);
  const index_t token = small.num_kv_heads * small.head_dim;
  const std::vector<float> rows = random.floats(40 * token);
  cache[0].append(rows, rows);
  const auto before = all_of(cache, 0);
  // the last one is finite, but not in bf16
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::max()}) {
    CAPTURE(bad);
    std::vector<float> one = random.floats(20 * token);
    one[static_cast<std::size_t>(17 * token + 5)] = bad;
    REQUIRE(cache[0].try_append(rows, rows) == status::ok);
    cache.truncate(0);
    cache[0].append(rows, rows);
    REQUIRE(cache[0].try_append(std::span(rows).first(one.size()), one) == status::not_finite);
    REQUIRE(cache[0].try_append(one, std::span(rows).first(one.size())) == status::not_finite);
    REQUIRE(all_of(cache, 0) == before);
    cache.check();
  }
}

TEST_CASE("exact tokens in f16 take all that f16 has, and no more", "[cache]") {
  using stored = codec::exact_tail<codec::channel<4>, 10, codec::exact_element::f16>;
  kvcache::chunked_cache<stored> cache(small);
  const auto floats = static_cast<std::size_t>(16 * small.num_kv_heads * small.head_dim);
  const std::vector<float> ones(floats, 1.0F);
  for (const float x : {65504.0F, -65519.9F, 1e-7F, 0x1p-24F, 0.0F}) {
    CAPTURE(x);
    std::vector<float> rows = ones;
    rows[7] = x;
    cache.truncate(0);
    REQUIRE(cache[0].try_append(rows, ones) == status::ok);
    REQUIRE(all_of(cache, 0)[7] == kvcache::to_float(kvcache::from_float<kvcache::half>(x)));
  }
  for (const float x : {65520.0F, -1e5F, 3e38F, std::numeric_limits<float>::quiet_NaN()}) {
    CAPTURE(x);
    std::vector<float> rows = ones;
    rows[7] = x;
    REQUIRE(cache[0].try_append(rows, ones) == status::not_finite);
    REQUIRE(cache[0].try_append(ones, rows) == status::not_finite);
    REQUIRE(cache[0].size() == 16);
  }
}

TEST_CASE("exact tokens are attended as they are stored, whatever the element", "[cache]") {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 2, .head_dim = 21, .block_size = 16};
  const index_t token = shape.num_kv_heads * shape.head_dim;
  for (const std::string element : {"bf16", "f16", "f32"}) {
    for (const index_t size : {1, 15, 16, 17, 50}) {
      CAPTURE(element, size);
      // A tail longer than the sequence: nothing is sealed, so it has to be what the exact codec gives, bit by bit.
      auto tail = kvcache::make_cache("chunked/int8,tail=60,exact=" + element, shape);
      auto whole = kvcache::make_cache("chunked/" + element, shape);
      const std::vector<float> k = random.floats(size * token);
      const std::vector<float> v = random.floats(size * token);
      tail[0].append(k, v);
      whole[0].append(k, v);
      const std::vector<float> q = random.floats(3 * token);
      std::vector<float> out(q.size());
      std::vector<float> expected(q.size());
      attend(q, tail[0], out);
      attend(q, whole[0], expected);
      REQUIRE(out == expected);
    }
  }
}

TEST_CASE("settings that do not fit the shape are refused", "[cache]") {
  using tail = codec::exact_tail<codec::int8>;
  using sinks = codec::exact_sinks<codec::int8>;
  REQUIRE_THROWS_AS(kvcache::chunked_cache<tail>(small, tail(codec::int8{}, -1)), kvcache::shape_error);
  REQUIRE_THROWS_AS(kvcache::chunked_cache<sinks>(small, sinks(codec::int8{}, 17)), kvcache::shape_error);
}

TEST_CASE("bytes count sealed blocks, ring and sinks", "[cache]") {
  test::random random;
  using stored = codec::exact_sinks<codec::exact_tail<codec::rotated<4>, 32>, 4>;
  kvcache::chunked_cache<stored> cache(small, {}, {.blocks_per_chunk = 1});
  REQUIRE(cache.bytes().total == 0);
  const index_t token = small.num_kv_heads * small.head_dim;
  const std::vector<float> rows = random.floats(100 * token);
  for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(rows, rows);
  const auto g = kvcache::geometry_of(small);
  const index_t sealed = (100 - 32) / 16;  // blocks
  const index_t heads = small.num_layers * small.num_kv_heads;
  const index_t exact_tokens = 100 - sealed * 16 + 4;
  const auto use = cache.bytes();
  CHECK(use.payload ==
        heads * (sealed * 16 * stored{}.token_bytes(g) + exact_tokens * codec::bf16{}.token_bytes(g)));
  // four blocks of ring for each head, one of sinks, rows of one block as floats
  const index_t exact_block = codec::bf16{}.block_bytes(g);
  CHECK(use.total ==
        heads * (sealed * stored{}.block_bytes(g) + 5 * exact_block) + 2 * 16 * small.head_dim * 4);
  CHECK(use.total == use.payload + use.slack);
  CHECK(use.shared == 0);
}

TEST_CASE("exact tokens in f32 take twice the bytes of f16", "[cache]") {
  const auto g = kvcache::geometry_of(small);
  const index_t heads = small.num_layers * small.num_kv_heads;
  const std::vector<float> rows(static_cast<std::size_t>(100 * small.num_kv_heads * small.head_dim), 1.0F);
  const auto use_of = [&](const std::string& element) {
    kvcache::chunked_cache<kvcache::any_codec> cache(
        small, kvcache::make_codec("rotated4,tail=32,sinks=4,exact=" + element), {.blocks_per_chunk = 1});
    for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(rows, rows);
    return cache.bytes();
  };
  const auto half = use_of("f16");
  const auto whole = use_of("f32");
  CHECK(half.total == use_of("bf16").total);
  CHECK(whole.total - half.total == heads * 5 * (codec::f32{}.block_bytes(g) - codec::f16{}.block_bytes(g)));
  CHECK(whole.payload - half.payload == heads * (100 - 64 + 4) * codec::f16{}.token_bytes(g));
}

TEST_CASE("payload is never more than what the blocks have", "[cache]") {
  test::random random;
  for (const char* name : {"rotated3", "rotated2", "trellis3", "channel3", "balanced2,tail=5", "rotated4"}) {
    for (const index_t head_dim : {1, 63, 66, 100}) {
      for (const index_t block_size : {128, 256}) {
        CAPTURE(name, head_dim, block_size);
        const cache_shape shape{
            .num_layers = 1, .num_kv_heads = 2, .head_dim = head_dim, .block_size = block_size};
        kvcache::chunked_cache<kvcache::any_codec> cache(shape, kvcache::make_codec(name),
                                                         {.blocks_per_chunk = 1});
        const std::vector<float> rows = random.floats(block_size * 2 * head_dim);
        for (int i = 0; i < 3; ++i) {
          cache[0].append(rows, rows);
          REQUIRE_NOTHROW(cache.check());
        }
      }
    }
  }
}

TEST_CASE("what a pool refuses leaves no tail behind", "[cache]") {
  test::random random;
  using stored = codec::exact_tail<codec::int8, 16>;
  kvcache::page_pool<stored> pool(small, {.budget_bytes = 2 * small.num_layers * small.num_kv_heads *
                                                          stored{}.block_bytes(kvcache::geometry_of(small))});
  auto cache = pool.sequence();
  const std::vector<float> rows = random.floats(100 * small.num_kv_heads * small.head_dim);
  REQUIRE(cache[0].try_append(rows, rows) == status::out_of_pages);
  CHECK(cache.bytes().total == 0);
  CHECK(cache.reserve(100) == status::out_of_pages);
  CHECK(cache.bytes().total == 0);
  cache.check();
}

TEST_CASE("a first append that is refused takes no memory, and reserved memory stays", "[cache]") {
  kvcache::chunked_cache<codec::exact_tail<codec::int8, 16>> cache(small);
  std::vector<float> rows(static_cast<std::size_t>(small.num_kv_heads * small.head_dim), 1.0F);
  rows[3] = std::numeric_limits<float>::infinity();
  REQUIRE(cache[0].try_append(rows, rows) == status::not_finite);
  CHECK(cache.bytes().total == 0);
  REQUIRE(cache.reserve(20) == status::ok);
  const index_t reserved = cache.bytes().total;
  REQUIRE(cache[0].try_append(rows, rows) == status::not_finite);
  CHECK(cache.bytes().total == reserved);
}

TEST_CASE("dense rows of a codec that seals are attended block by block", "[cache]") {
  test::random random;
  const index_t token = small.num_kv_heads * small.head_dim;
  const std::vector<float> rows = random.floats(40 * token);
  const std::vector<float> q = random.floats(2 * token);
  std::vector<float> out(q.size());
  std::vector<float> expected(q.size());
  const kvcache::dense_kv<codec::channel<4>> dense(small, rows, rows);
  const kvcache::dense_kv<codec::f32> exact(small, rows, rows);
  attend(q, dense.layer(), out);
  attend(q, exact.layer(), expected);
  for (std::size_t i = 0; i < out.size(); ++i) CHECK(std::fabs(out[i] - expected[i]) < 0.3);
}

TEST_CASE("forks share sealed pages and own their tail", "[cache]") {
  test::random random;
  using stored = codec::exact_tail<codec::int8, 16>;
  kvcache::page_pool<stored> pool(small);
  auto cache = pool.sequence();
  const index_t token = small.num_kv_heads * small.head_dim;
  const std::vector<float> rows = random.floats(100 * token);
  for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(rows, rows);
  const index_t pages = pool.num_in_use();
  REQUIRE(pages == (100 - 16) / 16);
  auto fork = cache.fork();
  CHECK(pool.num_in_use() == pages);
  CHECK(fork.bytes().shared == pages * pool.page_bytes());
  for (index_t layer = 0; layer < small.num_layers; ++layer) fork[layer].append(rows, rows);
  REQUIRE(all_of(cache, 1).size() * 2 == all_of(fork, 1).size());
  pool.check();
}

TEST_CASE("attention over a sealed cache is that over the tokens it gives back", "[cache]") {
  test::random random;
  constexpr index_t group = 3;
  const std::vector<std::string> specs = {"int8,tail=20",
                                          "rotated4,sinks=3",
                                          "k=channel4,v=rotated4,sinks=4,tail=20",
                                          "balanced3,tail=5,sinks=16",
                                          "bf16,tail=9",
                                          "k=f32,v=rotated2,sinks=1"};
  for (const std::string& spec : specs) {
    for (const index_t size : {1, 3, 15, 16, 17, 36, 37, 130}) {
      CAPTURE(spec, size);
      auto cache = kvcache::make_cache("paged/" + spec, small);
      const index_t token = small.num_kv_heads * small.head_dim;
      const std::vector<float> k = random.floats(size * token);
      const std::vector<float> v = random.floats(size * token);
      cache[1].append(k, v);
      std::vector<float> stored_k(k.size());
      std::vector<float> stored_v(v.size());
      cache[1].copy_out(0, size, stored_k, stored_v);
      kvcache::contiguous_cache<codec::f32> plain(small);
      plain[1].append(stored_k, stored_v);
      for (const index_t q_len : {index_t{1}, std::min(size, index_t{5})}) {
        const std::vector<float> q = random.floats(q_len * group * token);
        std::vector<float> got(q.size());
        std::vector<float> expected(q.size());
        const kvcache::attend_options options{.q_len = q_len, .window = size > 30 ? 25 : 0, .sinks = 2};
        attend(q, cache[1], got, options);
        attend(q, plain[1], expected, options);
        double worst = 0;
        for (std::size_t i = 0; i < got.size(); ++i)
          worst = std::max(worst, std::fabs(double{got[i]} - double{expected[i]}));
        CHECK(worst < 0.03);  // the least precise: queries and weights of 8 bits, numbers of the order of one
      }
    }
  }
}

TEST_CASE("a block that comes back beyond bfloat16 is sealed again when it was cut", "[cache]") {
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 8, .block_size = 16};
  using codec_type = codec::exact_tail<codec::balanced<4>, 16>;
  kvcache::chunked_cache<codec_type> cache(shape);
  std::vector<float> rows(40 * 8);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = i % 3 == 0 ? 3e38F : -3e38F;
  cache[0].append(rows, rows);
  cache.truncate(8);
  const std::vector<float> ones(8, 1.0F);
  for (int t = 0; t < 60; ++t) REQUIRE(cache[0].try_append(ones, ones) == status::ok);
  cache.check();
}
