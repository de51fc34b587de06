// SPDX-License-Identifier: MIT
// low_rank chosen by a string: exact at first, then what a cache is whose bases were found in the same tokens by hand.

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/interop/any_snapshot.hpp>
#include <kvcache/interop/low_rank_snapshot.hpp>
#include <kvcache/interop/low_rank_spec.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/save.hpp>

#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <vector>

// Blocks come from the aligned operator new: one that can be told that there is no memory for large pieces.
namespace {
std::size_t largest_piece = std::numeric_limits<std::size_t>::max();
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  const auto unit = static_cast<std::size_t>(alignment);
  void* p = size > largest_piece ? nullptr : std::aligned_alloc(unit, (size + unit - 1) / unit * unit);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void operator delete(void* p, std::align_val_t /*alignment*/) noexcept { std::free(p); }
void operator delete(void* p, std::size_t /*size*/, std::align_val_t /*alignment*/) noexcept { std::free(p); }

using kvcache::any_cache;
using kvcache::any_codec;
using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::make_cache_with_low_rank;
using kvcache::status;
namespace codec = kvcache::codec;

namespace {

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};
constexpr index_t width = 2 * 20;

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

/// A cache by its spec beside one that is told the same.
struct twins {
  any_cache cache;
  any_cache other;

  void append(index_t tokens, test::random& random) {
    for (index_t layer = 0; layer < small.num_layers; ++layer) append(layer, tokens, random);
  }
  void append(index_t layer, index_t tokens, test::random& random) {
    const std::vector<float> k = random.floats(tokens * width);
    const std::vector<float> v = random.floats(tokens * width);
    REQUIRE(cache[layer].try_append(k, v) == status::ok);
    REQUIRE(other[layer].try_append(k, v) == status::ok);
  }

  void require_same(test::random& random) const {
    const kvcache::rope_table rope({.head_dim = 20, .pairing = kvcache::rope_pairing::half});
    cache.check();
    REQUIRE(cache.size() == other.size());
    REQUIRE(cache.bytes().payload == other.bytes().payload);
    for (index_t layer = 0; layer < small.num_layers; ++layer) {
      CAPTURE(layer);
      REQUIRE(cache[layer].size() == other[layer].size());
      const auto n = static_cast<std::size_t>(cache[layer].size() * width);
      std::vector<float> k(n), v(n), other_k(n), other_v(n);
      cache[layer].copy_out(0, cache[layer].size(), k, v);
      other[layer].copy_out(0, cache[layer].size(), other_k, other_v);
      REQUIRE(same_bits(k, other_k));
      REQUIRE(same_bits(v, other_v));
      if (n == 0) continue;
      const std::vector<float> q = random.floats(2 * width);
      std::vector<float> out(q.size()), other_out(q.size());
      attend(q, cache[layer], out, {.rope = &rope});
      attend(q, other[layer], other_out, {.rope = &rope});
      REQUIRE(same_bits(out, other_out));
    }
  }
};

/// What "k=low_rank6,v=low_rank9,last=1:low_rank3+int8,tail=20,sinks=4" has to become, found by hand.
any_cache expected(const any_cache& exact, index_t fit) {
  const any_cache first = exact.fork(fit);
  any_codec both;
  codec::low_rank_keys keys;
  codec::low_rank_values values;
  keys.bases = codec::low_rank_bases::fit_from(first, {.rank = 6}, {.rank = 9});
  values.bases = keys.bases;
  both.keys = codec::any_keys::of(keys);
  both.values = codec::any_values::of(values);
  any_codec last = kvcache::make_codec("int8,tail=20,sinks=4");
  codec::low_rank_keys few;
  few.bases = codec::low_rank_bases::fit_from(first, {.rank = 3});
  last.keys = codec::any_keys::of(few);
  using layered = codec::by_layer<any_codec>;
  any_cache made("expected", kvcache::chunked_cache<layered>(small, layered({both, last}, {0, 1})));
  return kvcache::recoded(exact, std::move(made));
}

constexpr const char* spec = "/k=low_rank6,v=low_rank9,last=1:low_rank3+int8,fit=50,tail=20,sinks=4";

}  // namespace

TEST_CASE("a cache finds its bases in its first tokens and goes on with low_rank", "[interop]") {
  test::random random;
  for (const std::string container : {"contiguous", "chunked", "paged"}) {
    CAPTURE(container);
    twins t{make_cache_with_low_rank(container + spec, small), kvcache::make_cache("chunked/bf16", small)};
    REQUIRE(t.cache.spec() == container + spec);
    t.append(40, random);
    t.append(29, random);
    t.append(0, 30, random);  // the first layer is ahead
    t.cache.shift(10, 30, 7);
    t.other.shift(10, 30, 7);
    t.require_same(random);  // exact: 69 tokens are less than 50 + 20
    const index_t exact_bytes = t.cache.bytes_per_token();
    any_cache before = t.cache.fork();
    t.append(1, 1, random);
    t.other = expected(t.other, 50);
    t.require_same(random);
    CHECK(t.cache.bytes_per_token() < exact_bytes / 2);
    for (index_t i = 0; i < 69; ++i) REQUIRE(t.cache.positions()[i] == t.other.positions()[i]);

    t.append(100, random);
    t.require_same(random);
    twins forks{t.cache.fork(77), t.other.fork(77)};
    forks.append(33, random);
    forks.require_same(random);
    twins clones{t.cache.clone(), t.other.clone()};
    clones.append(33, random);
    clones.cache.truncate(11);
    clones.other.truncate(11);
    clones.append(60, random);  // the bases stay
    clones.require_same(random);
    t.require_same(random);
    CHECK(before.size() == 69);
    CHECK(before.bytes_per_token() == exact_bytes);
  }
}

TEST_CASE("components by energy and by bits are those that options say", "[interop]") {
  test::random random;
  twins t{make_cache_with_low_rank("paged/k=low_rank92.5%,v=low_rank3.5bit,fit=50", small),
          kvcache::make_cache("chunked/bf16", small)};
  t.append(50, random);
  codec::low_rank_keys keys;
  codec::low_rank_values values;
  keys.bases = codec::low_rank_bases::fit_from(
      t.other, {.energy = 0.925}, {.bits_per_value = 3.5, .store = codec::component_store::allocated});
  values.bases = keys.bases;
  any_codec both;
  both.keys = codec::any_keys::of(keys);
  both.values = codec::any_values::of(values);
  any_cache made("expected", kvcache::chunked_cache<any_codec>(small, both));
  t.other = kvcache::recoded(t.other, std::move(made));
  t.append(40, random);
  t.require_same(random);
  CHECK(t.cache.bytes_per_token() < 2 * 2 * (20 + 2 + 9));  // keys at most all components and a scale
}

TEST_CASE("bases are found when a step is over, not within it", "[interop]") {
  test::random random;
  twins t{make_cache_with_low_rank(std::string("chunked") + spec, small),
          kvcache::make_cache("chunked/bf16", small)};
  const index_t exact_bytes = t.cache.bytes_per_token();
  t.append(60, random);
  {
    auto step = t.cache.begin(30);
    auto other = t.other.begin(30);
    t.append(30, random);
    REQUIRE(t.cache.bytes_per_token() == exact_bytes);
  }
  CHECK(t.cache.size() == 60);
  CHECK(t.cache.bytes_per_token() == exact_bytes);
  t.require_same(random);
  {
    auto step = t.cache.begin(30);
    t.append(30, random);
    CHECK(t.cache.bytes_per_token() == exact_bytes);
    step.commit();
  }
  CHECK(t.cache.bytes_per_token() < exact_bytes / 2);
  t.other = expected(t.other, 50);
  t.require_same(random);
}

TEST_CASE("caches with and without bases are attended over in one batch", "[interop]") {
  test::random random;
  std::vector<any_cache> caches;
  for (const char* by_name : {"chunked/low_rank5,fit=30", "chunked/bf16", "paged/low_rank5,fit=30"}) {
    for (const index_t tokens : {20, 90}) {
      caches.push_back(make_cache_with_low_rank(by_name, small));
      for (index_t layer = 0; layer < small.num_layers; ++layer)
        caches.back()[layer].append(random.floats(tokens * width), random.floats(tokens * width));
    }
  }
  REQUIRE(caches[0].bytes_per_token() != caches[1].bytes_per_token());
  const std::vector<float> q = random.floats(2 * width);
  std::vector<std::vector<float>> out(caches.size(), std::vector<float>(q.size()));
  std::vector<kvcache::attend_item<kvcache::any_layer>> batch;
  for (std::size_t i = 0; i < caches.size(); ++i) batch.push_back({q, caches[i][1], out[i]});
  kvcache::attend(batch);
  for (std::size_t i = 0; i < caches.size(); ++i) {
    CAPTURE(i);
    std::vector<float> want(q.size());
    kvcache::attend(q, caches[i][1], want);
    CHECK(same_bits(out[i], want));
  }
}

TEST_CASE("where there is no memory for both copies tokens stay exact until there are twice as many",
          "[interop]") {
  test::random random;
  twins t{make_cache_with_low_rank("chunked/low_rank5,fit=30", small),
          kvcache::make_cache("chunked/bf16", small)};
  const index_t exact_bytes = t.cache.bytes_per_token();
  t.append(29, random);
  REQUIRE(t.cache.reserve(64) == status::ok);
  largest_piece = 4096;  // the bases of one side: 2 layers x 2 heads x (16 x 20 + 16) floats
  t.append(20, random);
  largest_piece = std::numeric_limits<std::size_t>::max();
  t.append(10, random);
  CHECK(t.cache.bytes_per_token() == exact_bytes);  // 59 tokens: it was tried at 49
  t.require_same(random);
  t.append(39, random);
  CHECK(t.cache.size() == 98);
  CHECK(t.cache.bytes_per_token() == 2 * 2 * 2 * (5 + 2));
  t.cache.check();
}

TEST_CASE("a cache is saved before and after it has bases, and goes on as it would have", "[interop]") {
  namespace store = kvcache::store;
  test::random random;
  for (const std::string text :
       {"chunked/k=low_rank12,v=low_rank20,fit=40,tail=20", "chunked/low_rank8,fit=40,tail=20,exact=f16",
        "paged/low_rank8,fit=40,tail=20,exact=f32", "paged/low_rank8,first=1:int8,fit=40",
        "paged/k=low_rank4bit,v=low_rank90%,fit=40", "contiguous/low_rank8,fit=40"}) {
    for (const index_t before : {0, 30, 59, 60, 90}) {
      CAPTURE(text, before);
      any_cache saved = make_cache_with_low_rank(text, small);
      for (index_t layer = 0; layer < small.num_layers; ++layer)
        saved[layer].append(random.floats(before * width), random.floats(before * width));
      const std::vector<std::byte> file = store::save(saved, {.model = "m"});
      auto [again, about] = store::load_any_with_low_rank(file);
      CHECK(about.who.model == "m");
      CHECK(again.spec() == text);
      CHECK(store::save(again, {.model = "m"}) == file);
      twins both{saved.clone(), std::move(again)};
      both.require_same(random);
      for (const index_t more : {1, 9, 50}) {  // bases are found in here, where there were none
        both.append(more, random);
        both.require_same(random);
      }
      const index_t tail = text.find("tail") != std::string::npos ? 20 : 0;
      if (before >= 40 + tail) {
        both.other = store::load_any(file, {}, "chunked").cache;
        CHECK(both.other.spec() == "chunked" + text.substr(text.find('/')));
        twins{std::move(saved), std::move(both.other)}.require_same(random);
      } else {
        try {
          (void)store::load_any(file);
          FAIL("it has no bases");
        } catch (const kvcache::load_error& error) {
          CHECK(std::string(error.what()).find("low_rank_snapshot.hpp") != std::string::npos);
        }
        auto moved = store::load_any_with_low_rank(file, {}, "contiguous").cache;
        CHECK(moved.spec() == "contiguous" + text.substr(text.find('/')));
        twins{std::move(saved), std::move(moved)}.require_same(random);
      }
    }
  }
  // A spec in a file is as hostile as the rest of it.
  kvcache::chunked_cache<> exact(small);
  for (const std::string text : {"chunked/low_rank99", "chunked/low_rank8,fit=0", "heap/low_rank8",
                                 "low_rank8", "chunked/low_rank8,tail=20", "chunked/low_rank8,,"}) {
    CAPTURE(text);
    store::save_options options;
    options.spec = text;
    const std::vector<std::byte> file = store::save(exact, {}, options);
    CHECK_THROWS_AS(store::load_any_with_low_rank(file), kvcache::load_error);
  }
}

TEST_CASE("rows that are not finite are refused before bases are found as after", "[interop]") {
  test::random random;
  auto cache = make_cache_with_low_rank("paged/low_rank5,fit=30", small);
  std::vector<float> bad = random.floats(width);
  bad[3] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> good = random.floats(width);
  for (index_t tokens = 0; tokens < 40; ++tokens) {
    REQUIRE(cache[0].try_append(good, bad) == status::not_finite);
    for (index_t layer = 0; layer < 2; ++layer) cache[layer].append(random.floats(width), good);
  }
  CHECK(cache.bytes_per_token() == 2 * 2 * 2 * (5 + 2));
}

TEST_CASE("a file whose exact rows are not finite stays exact", "[interop]") {
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 4, .block_size = 16};
  kvcache::chunked_cache<codec::by_layer<kvcache::any_codec>> typed(
      shape, kvcache::make_codec_by_layer("bf16,tail=1", 1));
  const std::vector<float> rows(8 * 4, 0.5F);
  typed[0].append(rows, rows);
  const kvcache::bfloat16 not_a_number{0x7fc0};
  std::memcpy(const_cast<std::byte*>(typed[0].block(0, 0)), &not_a_number, sizeof(not_a_number));
  const any_cache cache("chunked/low_rank2,fit=16", std::move(typed));
  const auto bytes = kvcache::store::save(cache, kvcache::store::identity{});
  auto loaded = kvcache::store::load_any_with_low_rank(std::span<const std::byte>(bytes));
  CHECK(loaded.cache[0].try_append(rows, rows) == kvcache::status::ok);
  CHECK(loaded.cache.size() == 16);
}

TEST_CASE("specs of low_rank that cannot be are refused with what there is", "[interop]") {
  const auto refused = [](const std::string& text, std::initializer_list<const char*> words) {
    CAPTURE(text);
    try {
      (void)make_cache_with_low_rank(text, small);
      FAIL("made a cache");
    } catch (const std::invalid_argument& error) {
      const std::string what = error.what();
      CAPTURE(what);
      for (const char* word : words) CHECK(what.find(word) != std::string::npos);
    }
  };
  for (const char* text :
       {"chunked/low_rank", "chunked/low_rank0", "chunked/k=low_rank-1", "chunked/low_rank4x"})
    refused(text, {"low_rank48", "rotated4", "int8"});
  for (const char* text : {"chunked/low_rank0%", "chunked/low_rankinf%", "chunked/low_rank-3bit",
                           "chunked/low_rank3bits", "chunked/low_rank%", "chunked/low_rank1.5"})
    refused(text, {"low_rank99%", "low_rank3bit", "int8"});
  refused("chunked/low_rank101%", {"low_rank101%", "energy", "at most 1"});
  refused("chunked/k=int8,v=low_rank0.1bit", {"low_rank0.1bit", "bits_per_value", "too little"});
  refused("chunked/low_rank21", {"low_rank21", "head_dim", "20"});
  refused("chunked/int8,first=1:low_rank21", {"low_rank21", "head_dim", "20"});
  refused("chunked/low_rank4,first=3:int8", {"first=3:int8", "do not exist"});
  for (const char* text : {"chunked/low_rank4,fit=", "chunked/low_rank4,fit=0", "chunked/fit=3x,low_rank4"})
    refused(text, {"fit=", "number of tokens"});
  refused("chunked/low_rank4,fit=30,fit=30", {"fit=", "given twice"});
  refused("chunked/low_rank4,fti=30", {"fit=", "tail=", "first="});
  refused("chunk/low_rank4", {"chunked/", "paged/"});
  refused("chunked/low_rank4,", {"ends"});
  refused("chunked/low_rank4,sinks=17", {"sink"});  // more than a block
  REQUIRE_THROWS_AS(make_cache_with_low_rank("chunked/low_rank4", {.head_dim = 0}), kvcache::shape_error);
  try {
    (void)kvcache::make_cache("chunked/low_rank4", small);
    FAIL("made a cache");
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find("make_cache_with_low_rank") != std::string::npos);
  }
  CHECK(make_cache_with_low_rank("chunked/int8,first=1:bf16", small).size() == 0);
}
