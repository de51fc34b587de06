// SPDX-License-Identifier: MIT
// Layers with codecs of their own: each does what the same layer of a cache does whose codec is that one everywhere.

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/cache/block_layout.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/key_means.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/interop/any_cache.hpp>

#include "conformance/memory.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

using kvcache::any_cache;
using kvcache::any_codec;
using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::status;
namespace codec = kvcache::codec;

using layered = codec::by_layer<any_codec>;

static_assert(kvcache::sealing_codec<layered>);
static_assert(kvcache::block_codec<codec::by_layer<codec::int8>> &&
              !kvcache::sealing_codec<codec::by_layer<codec::int8>>);
static_assert(kvcache::sealing_codec<codec::exact_tail<codec::by_layer<codec::rotated<4>>>>);

namespace {

constexpr cache_shape small{.num_layers = 4, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};
constexpr index_t row_size = 2 * 20;

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

/// Keys of all tokens of a layer, then values.
template <class Layer>
std::vector<float> all_rows(const Layer& layer) {
  std::vector<float> k(static_cast<std::size_t>(layer.size() * row_size));
  std::vector<float> v(k.size());
  layer.copy_out(0, layer.size(), k, v);
  k.insert(k.end(), v.begin(), v.end());
  return k;
}

/// A cache whose layers differ beside one for each layer that has that layer's codec everywhere; all are told the same.
class twins {
 public:
  /// \param options  of the sequence, "" or ",tail=20"
  twins(const std::string& container, const std::vector<std::string>& codecs, const std::string& options)
      : mixed_(kvcache::make_cache(container + "/" + mixed_spec(codecs) + options, small)),
        rope_({.head_dim = 20, .pairing = kvcache::rope_pairing::half}) {
    for (const std::string& codec : codecs)
      uniform_.push_back(kvcache::make_cache(container + "/" + codec + options, small));
  }

  /// "bf16,layers=0:int8,layers=1:..."
  static std::string mixed_spec(const std::vector<std::string>& codecs) {
    std::string spec = "bf16";
    for (std::size_t i = 0; i < codecs.size(); ++i) spec += ",layers=" + std::to_string(i) + ":" + codecs[i];
    return spec;
  }

  template <class Do>
  void both(Do what) {
    what(mixed_);
    for (any_cache& cache : uniform_) what(cache);
  }

  void append(index_t layer, index_t tokens, test::random& random) {
    const std::vector<float> k = random.floats(tokens * row_size);
    const std::vector<float> v = random.floats(tokens * row_size);
    both([&](any_cache& cache) { REQUIRE(cache[layer].try_append(k, v) == status::ok); });
  }
  void append(index_t tokens, test::random& random) {
    for (index_t layer = 0; layer < small.num_layers; ++layer) append(layer, tokens, random);
  }

  void step(index_t tokens, bool commit, test::random& random) {
    both([&](any_cache& cache) { REQUIRE(cache.begin_step(tokens) == status::ok); });
    append(tokens, random);
    both([&](any_cache& cache) { cache.end_step(commit); });
  }

  [[nodiscard]] index_t size() const { return mixed_.size(); }

  void require_same(test::random& random) const {
    mixed_.check();
    for (index_t layer = 0; layer < small.num_layers; ++layer) {
      CAPTURE(layer);
      const any_cache& twin = uniform_[static_cast<std::size_t>(layer)];
      REQUIRE(mixed_[layer].size() == twin[layer].size());
      REQUIRE(same_bits(all_rows(mixed_[layer]), all_rows(twin[layer])));
      const index_t q_len = std::min<index_t>(mixed_[layer].size(), 3);
      if (q_len == 0) continue;
      const std::vector<float> q = random.floats(q_len * 2 * row_size);
      std::vector<float> out(q.size());
      std::vector<float> twin_out(q.size());
      attend(q, mixed_[layer], out, {.q_len = q_len, .rope = &rope_});
      attend(q, twin[layer], twin_out, {.q_len = q_len, .rope = &rope_});
      REQUIRE(same_bits(out, twin_out));
    }
  }

 private:
  any_cache mixed_;
  std::vector<any_cache> uniform_;
  kvcache::rope_table rope_;
};

void play(twins& caches, test::random& random, int moves) {
  for (int i = 0; i < moves; ++i) {
    const index_t tokens = random.chance(0.5) ? random.below(4) : random.below(40);
    const index_t n = random.below(caches.size() + 1);
    switch (random.below(11)) {
      case 0:
      case 1:
      case 2:
        caches.append(tokens, random);
        break;
      case 3:
        caches.append(random.below(small.num_layers), tokens % 20, random);
        break;
      case 4:
        caches.both([&](any_cache& cache) { cache.truncate(n); });
        break;
      case 5:
        caches.step(tokens, random.chance(0.5), random);
        break;
      case 6: {  // the fork goes on, the parent is gone; before that both write
        const std::vector<float> rows = random.floats(3 * row_size);
        caches.both([&](any_cache& cache) {
          any_cache child = cache.fork(n);
          cache[1].append(rows, rows);
          child[0].append(rows, rows);
          cache.check();
          cache = std::move(child);
        });
        break;
      }
      case 7:
        caches.both([&](any_cache& cache) { cache = cache.clone(); });
        break;
      case 8:
        caches.both([&](any_cache& cache) { cache.shift(n, cache.size(), 5); });
        break;
      case 9:
        caches.both([&](any_cache& cache) { REQUIRE(cache.reserve(n + 100) == status::ok); });
        break;
      default:
        caches.both([](any_cache& cache) { cache.shrink_to_fit(); });
        if (random.chance(0.3)) caches.both([](any_cache& cache) { cache.clear(); });
    }
    INFO("move " << i);
    caches.require_same(random);
  }
}

/// [first, last) of every block there is, in order of address.
template <class Cache>
std::vector<std::pair<const std::byte*, const std::byte*>> extents(const Cache& cache) {
  std::vector<std::pair<const std::byte*, const std::byte*>> all;
  for (index_t layer = 0; layer < small.num_layers; ++layer) {
    const index_t bytes = cache.codec().of(layer).block_bytes(kvcache::geometry_of(small));
    for (index_t head = 0; head < small.num_kv_heads; ++head) {
      for (const auto& block : cache[layer].blocks(head)) {
        REQUIRE(reinterpret_cast<std::uintptr_t>(block.data) % 64 == 0);
        all.emplace_back(block.data, block.data + bytes);
      }
    }
  }
  std::sort(all.begin(), all.end());
  return all;
}

layered some_codecs() {
  return layered({kvcache::make_codec("int8"), kvcache::make_codec("f32"), kvcache::make_codec("rotated3"),
                  kvcache::make_codec("bf16")});
}

}  // namespace

TEST_CASE("each layer does what it does in a cache of its codec alone", "[codec]") {
  test::random random;
  for (const std::string container : {"contiguous", "chunked", "paged"}) {
    CAPTURE(container);
    twins direct(container, {"int8", "f32", "rotated3+trellis2", "bf16"}, "");
    play(direct, random, 60);
    // Codecs that need whole blocks and those that do not: all layers have the tail.
    twins sealed(container, {"int8", "channel4", "balanced2", "bf16"}, ",tail=20,sinks=4");
    play(sealed, random, 60);
  }
}

TEST_CASE("blocks of layers that differ overlap nowhere and take what the layout says", "[codec]") {
  test::random random;
  const auto fill = [&](auto cache) {
    for (index_t layer = 0; layer < small.num_layers; ++layer)
      cache[layer].append(random.floats(100 * row_size), random.floats(100 * row_size));
    const auto all = extents(cache);
    for (std::size_t i = 1; i < all.size(); ++i) REQUIRE(all[i - 1].second <= all[i].first);
    index_t bytes = 0;
    for (const auto& [first, last] : all) bytes += last - first;
    return std::pair(cache.bytes(), bytes);
  };
  // 7 blocks of 100 tokens; rows of 20: int8 22 bytes, f32 80, rotated3 8 + 2, bf16 40, keys and values, two heads
  const index_t payload = 100 * 2 * 2 * (22 + 80 + 10 + 40);
  CHECK(kvcache::bytes_per_token(small, some_codecs()) == payload / 100);

  kvcache::page_pool<layered> pool(small, {}, some_codecs());
  const auto [paged, in_pages] = fill(pool.sequence());
  CHECK(paged.total == in_pages);  // not a byte between blocks
  CHECK(paged.total == 7 * pool.page_bytes());
  CHECK(paged.payload == payload);
  kvcache::page_pool<any_codec> widest(small, {}, kvcache::make_codec("f32"));
  CHECK(pool.page_bytes() < widest.page_bytes());

  const auto [chunked, in_chunks] =
      fill(kvcache::chunked_cache<layered>(small, some_codecs(), {.blocks_per_chunk = 7}));
  CHECK(chunked.total == in_chunks);
  CHECK(chunked.payload == payload);
  std::pmr::monotonic_buffer_resource memory;
  const auto [copied, in_copies] =
      fill(kvcache::contiguous_cache<layered>(small, some_codecs(), {.memory = &memory}));
  CHECK(copied.total == in_copies);
  const auto [contiguous, in_place] =
      fill(kvcache::contiguous_cache<layered>(small, some_codecs(), {.max_tokens = 30}));
  CHECK(contiguous.total >= in_place);  // whole pages of the system
  CHECK(contiguous.payload == payload);
}

TEST_CASE("a block layout counts up layers, heads and blocks", "[codec]") {
  test::random random;
  for (int round = 0; round < 50; ++round) {
    const cache_shape shape{.num_layers = random.between(1, 6), .num_kv_heads = random.between(1, 4)};
    std::vector<index_t> bytes;
    for (index_t layer = 0; layer < shape.num_layers; ++layer)
      bytes.push_back(64 * random.between(1, round % 2 == 0 ? 1 : 3));
    const kvcache::block_layout layout(shape, bytes);
    const index_t num_pages = random.between(1, 5);
    index_t offset = 0;
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      for (index_t head = 0; head < shape.num_kv_heads; ++head) {
        for (index_t index = 0; index < num_pages; ++index) {
          REQUIRE(layout.offset(num_pages, layer, head, index) == offset);
          offset += bytes[static_cast<std::size_t>(layer)];
        }
      }
      REQUIRE(layout.block_bytes(layer) == bytes[static_cast<std::size_t>(layer)]);
    }
    REQUIRE(layout.page_bytes() * num_pages == offset);
    REQUIRE(layout.is_uniform() ==
            std::all_of(bytes.begin(), bytes.end(), [&](index_t b) { return b == bytes[0]; }));
  }
  CHECK_THROWS_AS(kvcache::block_layout({.num_layers = 3}, std::vector<index_t>{64, 64}),
                  kvcache::shape_error);
  CHECK_THROWS_AS(kvcache::block_layout({.num_layers = 2}, std::vector<index_t>(2, index_t{1} << 62)),
                  kvcache::shape_error);
}

TEST_CASE("settings of a layer's codec are those of that layer", "[codec]") {
  test::random random;
  const auto num_means = static_cast<std::size_t>(small.num_layers * row_size);
  codec::int8_keys centred;
  centred.means =
      std::make_shared<const codec::key_means>(small, random.floats(static_cast<std::ptrdiff_t>(num_means)));
  any_codec with_means = kvcache::make_codec("int8");
  with_means.keys = codec::any_keys::of(centred);

  const auto mixed_codec = layered::ends(small.num_layers, 1, 2, with_means, kvcache::make_codec("rotated4"));
  CHECK(mixed_codec.settings_bytes() ==
        static_cast<index_t>(num_means * sizeof(float)));  // once for three layers
  kvcache::chunked_cache<layered> mixed(small, mixed_codec);
  kvcache::chunked_cache<layered> uniform(small, layered(with_means));
  kvcache::chunked_cache<layered> between(small, layered(kvcache::make_codec("rotated4")));
  std::vector<kvcache::attend_item<decltype(std::as_const(mixed)[0])>> batch;
  const std::vector<float> q = random.floats(2 * row_size);
  std::vector<std::vector<float>> outs(static_cast<std::size_t>(small.num_layers),
                                       std::vector<float>(q.size()));
  for (index_t layer = 0; layer < small.num_layers; ++layer) {
    const std::vector<float> rows = random.floats(40 * row_size);
    for (auto* cache : {&mixed, &uniform, &between}) (*cache)[layer].append(rows, rows);
  }
  for (index_t layer = 0; layer < small.num_layers; ++layer)  // layers of different codecs in one call
    batch.push_back({q, std::as_const(mixed)[layer], outs[static_cast<std::size_t>(layer)]});
  kvcache::attend(std::span<const kvcache::attend_item<decltype(std::as_const(mixed)[0])>>(batch));
  for (index_t layer = 0; layer < small.num_layers; ++layer) {
    CAPTURE(layer);
    std::vector<float> out(q.size());
    kvcache::attend(q, std::as_const(layer == 1 ? between : uniform)[layer], out);
    CHECK(same_bits(out, outs[static_cast<std::size_t>(layer)]));
  }
  CHECK(mixed.bytes().shared == mixed_codec.settings_bytes());
}

TEST_CASE("a cache of layers that differ runs out without changing", "[codec]") {
  test::random random;
  conformance::watched_memory memory;
  {
    kvcache::page_pool<layered> pool(small, {.memory = &memory}, some_codecs());
    kvcache::chunked_cache<layered> chunked(small, some_codecs(), {.blocks_per_chunk = 1, .memory = &memory});
    kvcache::contiguous_cache<layered> contiguous(small, some_codecs(), {.memory = &memory});
    auto paged = pool.sequence();
    const auto fails = [&](auto& cache) {
      const std::vector<float> rows = random.floats(30 * row_size);
      for (index_t layer = 0; layer < small.num_layers; ++layer) cache[layer].append(rows, rows);
      const auto before = all_rows(cache[2]);
      const auto bytes = cache.bytes();
      for (index_t at = 0; at < 3; ++at) {
        memory.fail_at(at);
        const std::vector<float> more = random.floats(90000 * row_size);  // several allocations
        REQUIRE(cache[1].try_append(more, more) == status::out_of_memory);
        memory.fail_at(conformance::watched_memory::never);
        cache.check();
        REQUIRE(cache.bytes() == bytes);
        REQUIRE(cache[1].size() == 30);
        REQUIRE(same_bits(all_rows(cache[2]), before));
        if (&cache == static_cast<void*>(&contiguous)) break;  // it allocates once
      }
      cache[1].append(rows, rows);
    };
    fails(paged);
    fails(chunked);
    fails(contiguous);
  }
  CHECK(memory.mistakes() == 0);
  CHECK(memory.bytes_out() == 0);
}

TEST_CASE("codecs for other layers than the shape has are refused", "[codec]") {
  const any_codec int8 = kvcache::make_codec("int8,tail=7");
  const any_codec bf16 = kvcache::make_codec("bf16,sinks=3,tail=2");
  CHECK_THROWS_AS(layered(std::vector<any_codec>{}), kvcache::shape_error);
  CHECK_THROWS_AS(layered({int8}, {0, 1}), kvcache::shape_error);
  CHECK_THROWS_AS(layered({int8}, {0, -1}), kvcache::shape_error);
  CHECK_THROWS_AS(layered::ends(4, 5, 0, int8, bf16), kvcache::shape_error);
  CHECK_THROWS_AS(layered::ends(4, 0, -1, int8, bf16), kvcache::shape_error);
  const layered three(std::vector<any_codec>{int8, bf16, int8});
  CHECK_THROWS_AS(kvcache::chunked_cache<layered>(small, three), kvcache::shape_error);
  CHECK_THROWS_AS(kvcache::page_pool<layered>(small, {}, three), kvcache::shape_error);
  CHECK(three.tail_tokens == 7);
  CHECK(three.sink_tokens == 3);
  // Where every layer has the first, the others are not described: no file could say of which layers.
  const layered first({int8, kvcache::make_codec("channel4")}, {});
  CHECK(kvcache::describe(first) == kvcache::describe(int8));
  CHECK_NOTHROW(kvcache::make_described<layered>(kvcache::describe(first), small));
  CHECK(first.codecs().size() == 1);
  const auto ends = layered::ends(5, 2, 1, int8, bf16);
  const kvcache::block_geometry g = kvcache::geometry_of(small);
  for (index_t layer = 0; layer < 5; ++layer)
    CHECK(ends.of(layer).block_bytes(g) == (layer < 2 || layer > 3 ? int8 : bf16).block_bytes(g));
}

TEST_CASE("a spec says the codec of some layers", "[codec]") {
  const kvcache::block_geometry g{.block_size = 64, .head_dim = 128};
  const auto bytes_of = [&](const std::string& spec) {
    const auto made = kvcache::make_codec_by_layer(spec, 6);
    std::vector<index_t> bytes;
    for (index_t layer = 0; layer < 6; ++layer) bytes.push_back(made.of(layer).block_bytes(g));
    return bytes;
  };
  const auto bytes = [&](const char* spec) { return kvcache::make_codec(spec).block_bytes(g); };
  const index_t rest = bytes("k=channel3,v=rotated3");
  const index_t int8 = bytes("int8");
  const index_t pair = bytes("k=channel4,v=rotated4");
  CHECK(bytes("channel4+rotated4") == pair);
  CHECK(bytes_of("k=channel3,v=rotated3,first=2:int8,last=1:channel4+rotated4,tail=128,sinks=4") ==
        std::vector<index_t>{int8, int8, rest, rest, rest, pair});
  CHECK(bytes_of("channel3+rotated3,layers=0-1:int8,layers=5:channel4+rotated4") ==
        bytes_of("first=2:int8,k=channel3,last=1:channel4+rotated4,v=rotated3"));
  CHECK(bytes_of("int8,first=6:bf16,layers=2-3:f32") == std::vector<index_t>{bytes("bf16"), bytes("bf16"),
                                                                             bytes("f32"), bytes("f32"),
                                                                             bytes("bf16"), bytes("bf16")});
  const auto made = kvcache::make_codec_by_layer("int8,first=1:balanced2,tail=128,sinks=4", 6);
  CHECK(made.tail_tokens == 128);
  CHECK(made.sink_tokens == 4);
  CHECK(made.needs_whole_blocks());
  CHECK(!kvcache::make_codec_by_layer("int8,first=1:rotated2", 6).needs_whole_blocks());
}

TEST_CASE("a spec for layers that are not there, or misspelt, is refused with what there is", "[codec]") {
  const auto message = [](const std::string& spec) -> std::string {
    try {
      (void)kvcache::make_cache("chunked/" + spec, small);
    } catch (const kvcache::shape_error& error) {
      return std::string("shape: ") + error.what();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "made";
  };
  const auto has = [&](const std::string& spec, std::initializer_list<const char*> words) {
    const std::string text = message(spec);
    CAPTURE(spec, text);
    for (const char* word : words) CHECK(text.find(word) != std::string::npos);
  };
  for (const char* spec :
       {"bf16,first=5:int8", "bf16,last=5:int8", "bf16,layers=4:int8", "bf16,layers=2-4:int8"})
    has(spec, {"shape:", std::string(spec).substr(5).c_str(), "do not exist", "4"});
  has("bf16,layers=3-2:int8", {"3-2", "backwards"});
  has("bf16,layers=9-1:int8", {"9-1", "backwards"});
  has("bf16,frist=2:int8", {"first=", "last=", "layers=", "k=", "v=", "tail=", "sinks="});
  has("bf16,first=2:int9", {"int9", "int8", "rotated4", "balanced2"});
  has("bf16,first=2:int8+", {"int8", "rotated4"});
  has("bf16,first=2:int8+channel4", {"channel4", "keys"});
  for (const char* spec : {"bf16,first=2", "bf16,first=2:", "bf16,layers=int8"}) has(spec, {"lacks a codec"});
  for (const char* spec : {"bf16,last", "bf16,last=", "first", "bf16,layers=:"})
    has(spec, {"lacks a number of layers and a codec"});
  for (const char* spec : {"bf16,first=:int8", "bf16,first=x:int8", "bf16,last=-1:int8",
                           "bf16,first=0-1:int8", "bf16,layers=1-2-3:int8"})
    has(spec, {"number of layers"});
  has("bf16,layers=-1:int8", {"'layers=-1:int8' lacks the layer that its range begins with;", "layers=3-5:"});
  has("bf16,layers=-1", {"lacks the layer that its range begins with and a codec", "layers=3-5:"});
  has("bf16,layers=1-:int8", {"lacks the layer that its range ends with;"});
  CHECK(message("bf16,first=4:int8,last=4:int8,first=0:f32") == "made");
  CHECK_THROWS_AS(kvcache::make_codec("bf16,first=1:int8"), std::invalid_argument);
  CHECK_THROWS_AS(kvcache::make_codec_by_layer("bf16", 0), kvcache::shape_error);
}

TEST_CASE("a codec that no layer has neither seals nor counts", "[codec]") {
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 4, .block_size = 16};
  const std::vector<float> row(4, 1.0001F);  // no bfloat16
  for (const char* spec : {"chunked/f32,first=0:channel4", "chunked/channel4,layers=0-1:f32"}) {
    any_cache cache = kvcache::make_cache(spec, shape);
    for (index_t layer = 0; layer < 2; ++layer) cache[layer].append(row, row);
    std::vector<float> k(4);
    std::vector<float> v(4);
    cache[1].copy_out(0, 1, k, v);
    CAPTURE(spec);
    CHECK(k == row);
    CHECK(v == row);
  }
  const layered left(std::vector<any_codec>{kvcache::make_codec("channel4"), kvcache::make_codec("int8")},
                     {1, 1});
  CHECK(left.codecs().size() == 1);
  CHECK(left.of_layer() == std::vector<index_t>{0, 0});
}

TEST_CASE("a file may not name more codecs than layers, or than a few hundred", "[codec]") {
  const std::size_t most = codec::layer_descriptions::max_sides;
  const auto read = [](std::size_t num_sides, index_t num_layers) {
    const codec::layer_descriptions made{std::vector<kvcache::side_description>(num_sides, {"int8", {}}),
                                         std::vector<index_t>(static_cast<std::size_t>(num_layers), 0)};
    return codec::layer_descriptions::from_side(made.as_side(), num_layers).sides.size();
  };
  CHECK(read(3, 3) == 3);
  CHECK_THROWS_AS(read(4, 3), kvcache::shape_error);
  CHECK(read(most, 1000) == most);
  CHECK_THROWS_AS(read(most + 1, 1000), kvcache::shape_error);
  const layered same(std::vector<any_codec>(most + 44, kvcache::make_codec("int8")));
  CHECK(codec::layer_descriptions::from_side(kvcache::describe(same).keys, 300).sides.size() == 1);
  std::vector<any_codec> different;
  for (std::size_t i = 0; i <= most; ++i) {
    codec::centred_keys<codec::int8::keys_type> one;
    one.turns = std::make_shared<const codec::rope_turns>(kvcache::rope_config{
        .head_dim = 4, .pairing = kvcache::rope_pairing::half, .theta = 2.0 + static_cast<double>(i)});
    different.emplace_back().keys = codec::any_keys::of(one);
  }
  CHECK_THROWS_AS(kvcache::describe(layered(different)), kvcache::shape_error);
  different.pop_back();
  CHECK(codec::layer_descriptions::from_side(kvcache::describe(layered(different)).keys, 256).sides.size() ==
        most);
}
