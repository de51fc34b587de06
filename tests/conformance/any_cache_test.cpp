// SPDX-License-Identifier: MIT
// A cache chosen by a string does what the typed one does, verb by verb and bit by bit.

#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/interop/any_cache.hpp>

#include "conformance/caches.hpp"

#include <set>
#include <type_traits>
#include <utility>

using namespace conformance;

namespace {

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 6, .block_size = 16};

std::string codec_of(const std::string& spec) { return spec.substr(spec.find('/') + 1); }

std::vector<float> attended(const std::vector<float>& q, const auto& layer, index_t q_len,
                            std::vector<float>& lse) {
  std::vector<float> out(q.size());
  lse.assign(
      static_cast<std::size_t>(q_len * static_cast<index_t>(q.size()) / (q_len * layer.shape().head_dim)),
      0.0F);
  attend(q, layer, out, {.q_len = q_len, .window = 30, .lse = lse});
  return out;
}

/// The typed cache of a spec, filled alike, handed to `use`.
template <class Use>
void with_typed(const std::string& spec, Use use) {
  const auto with_codec = [&]<class Codec>(std::type_identity<Codec>) {
    if (codec_of(spec) != Codec::name) return;
    if (spec.starts_with("contiguous")) use(kvcache::contiguous_cache<Codec>(small));
    if (spec.starts_with("chunked")) use(kvcache::chunked_cache<Codec>(small));
    if (spec.starts_with("paged")) use(kvcache::page_pool<Codec>(small).sequence());
  };
  with_codec(std::type_identity<codec::f32>{});
  with_codec(std::type_identity<codec::f16>{});
  with_codec(std::type_identity<codec::bf16>{});
  with_codec(std::type_identity<codec::int8>{});
}

}  // namespace

TEST_CASE("every container goes with every codec by name", "[conformance]") {
  const auto specs = kvcache::cache_specs();
  const std::set<std::string> all(specs.begin(), specs.end());
  REQUIRE(all.size() == specs.size());
  for (const char* container : {"contiguous", "chunked", "paged"})
    for (const char* codec : {"f32", "f16", "bf16", "int8"})
      REQUIRE(all.count(std::string(container) + "/" + codec) == 1);
}

TEST_CASE("every verb of any_cache agrees with the model", "[conformance]") {
  test::random random;
  for (const std::string& spec : kvcache::cache_specs()) {
    CAPTURE(spec);
    kvcache::any_cache cache = kvcache::make_cache(spec, small);
    oracle::cache model(small.num_layers, small.num_kv_heads, small.head_dim, codec_of(spec));
    REQUIRE(cache.spec() == spec);
    REQUIRE(cache.shape() == small);
    require_same(cache, model);
    append(cache, model, 37, random);
    require_same(cache, model);
    REQUIRE(cache.bytes().payload == cache.size() * cache.bytes_per_token());
    REQUIRE(cache.bytes().total == cache.bytes().payload + cache.bytes().slack);
    REQUIRE(cache.bytes_per_token() == 2 * 2 * 2 * oracle::row_bytes(6, codec_of(spec)));

    auto fork = cache.fork(20);
    auto fork_model = model.fork(20);
    auto clone = cache.clone();
    auto clone_model = model;
    append(fork, fork_model, 9, random);
    append(cache, model, 1, random);
    append(clone, clone_model, 30, random);
    require_same(fork, fork_model);
    require_same(clone, clone_model);
    require_same(cache, model);
    require_same(cache.fork(), model);

    {
      auto step = cache.begin(10);
      auto scratch = model;
      append(cache, scratch, 10, random);
    }
    require_same(cache, model);
    {
      auto step = cache.try_begin(10);
      REQUIRE(step.has_value());
      append(cache, model, 10, random);
      step->commit();
    }
    require_same(cache, model);
    REQUIRE(cache.reserve(200) == status::ok);
    cache.shrink_to_fit();
    cache.shift(3, 9, 5);
    model.shift(3, 9, 5);
    require_same(cache, model);
    cache.truncate(18);
    model.truncate(18);
    append(cache, model, 4, random);
    kvcache::any_cache moved = std::move(cache);
    require_same(moved, model);
    moved.clear();
    model.clear();
    append(moved, model, 2, random);
    require_same(moved, model);
  }
}

TEST_CASE("attention over any_cache gives the bits of the typed cache", "[conformance]") {
  test::random random;
  const std::vector<float> k = random_rows(random, small, 45);
  const std::vector<float> v = random_rows(random, small, 45);
  const std::vector<float> q = random.floats(3 * 4 * small.head_dim);
  for (const std::string& spec : kvcache::cache_specs()) {
    CAPTURE(spec);
    auto any = kvcache::make_cache(spec, small);
    any[1].append(k, v);
    std::vector<float> any_lse;
    const std::vector<float> any_out = attended(q, any[1], 3, any_lse);
    bool compared = false;
    with_typed(spec, [&](auto cache) {
      cache[1].append(k, v);
      std::vector<float> lse;
      REQUIRE(same_numbers(attended(q, cache[1], 3, lse), any_out));
      REQUIRE(same_numbers(lse, any_lse));
      compared = true;
    });
    REQUIRE(compared);
  }
}

TEST_CASE("any_cache is attended over by qualified name and with an executor", "[conformance]") {
  test::random random;
  auto any = kvcache::make_cache("chunked/f16", small);
  const std::vector<float> k = random_rows(random, small, 20);
  any[0].append(k, k);
  const std::vector<float> q = random.floats(4 * small.head_dim);
  std::vector<float> out(q.size());
  std::vector<float> again(q.size());
  kvcache::attend(q, any[0], out);
  kvcache::serial_executor executor;
  kvcache::attend(q, any[0], again, {}, executor);
  REQUIRE(out == again);
}

TEST_CASE("attention layers run on any_cache", "[conformance]") {
  using kvcache::matrix;
  const kvcache::attention_weights weights{.wq = matrix::Identity(12, 12),
                                           .wk = matrix::Identity(12, 12),
                                           .wv = matrix::Identity(12, 12),
                                           .wo = matrix::Identity(12, 12)};
  const kvcache::multi_head_attention attention(weights,
                                                {.num_q_heads = 2, .num_kv_heads = 2, .head_dim = 6});
  const matrix x = matrix::Constant(5, 12, 0.5F) + matrix::Identity(5, 12);
  auto any = kvcache::make_cache("paged/bf16", small);
  auto typed = kvcache::page_pool<codec::bf16>(small).sequence();
  REQUIRE(attention.forward(x, any[1]) == attention.forward(x, typed[1]));
}

TEST_CASE("a spec that is not known is refused with a list of those that are", "[conformance]") {
  for (const char* spec : {"", "paged", "/", "paged/", "/bf16", "paged/bf61", "pagd/bf16", "paged/bf16 ",
                           "paged/bf16/x", "PAGED/BF16"}) {
    CAPTURE(spec);
    try {
      (void)kvcache::make_cache(spec, small);
      FAIL("made a cache");
    } catch (const kvcache::shape_error&) {
      FAIL("wrong exception");
    } catch (const std::invalid_argument& error) {
      const std::string text = error.what();
      for (const std::string& known : kvcache::cache_specs()) REQUIRE(text.find(known) != std::string::npos);
    }
  }
  REQUIRE_THROWS_AS(kvcache::make_cache("paged/bf16", {.head_dim = 0}), kvcache::shape_error);
}

TEST_CASE("any_cache moves without throwing and copies only by name", "[conformance]") {
  STATIC_REQUIRE(std::is_nothrow_move_constructible_v<kvcache::any_cache>);
  STATIC_REQUIRE(std::is_nothrow_move_assignable_v<kvcache::any_cache>);
  STATIC_REQUIRE(!std::is_copy_constructible_v<kvcache::any_cache>);
  STATIC_REQUIRE(!std::is_copy_assignable_v<kvcache::any_cache>);
}
