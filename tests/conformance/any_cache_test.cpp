// SPDX-License-Identifier: MIT
// A cache chosen by a string does what the typed one does, verb by verb and bit by bit.

#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/interop/any_cache.hpp>

#include "conformance/caches.hpp"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using namespace conformance;

namespace {

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 6, .block_size = 16};

std::string codec_of(const std::string& spec) { return spec.substr(spec.find('/') + 1); }

/// Every spec whose codec encodes token by token.
std::vector<std::string> token_specs() {
  std::vector<std::string> specs = kvcache::cache_specs();
  std::erase_if(specs, [](const std::string& spec) {
    return kvcache::make_codec(codec_of(spec)).needs_whole_blocks();
  });
  return specs;
}

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
  with_codec(std::type_identity<codec::rotated<4>>{});
  with_codec(std::type_identity<codec::rotated<3>>{});
  with_codec(std::type_identity<codec::rotated<2>>{});
  with_codec(std::type_identity<codec::channel<4>>{});
  with_codec(std::type_identity<codec::channel<3>>{});
  with_codec(std::type_identity<codec::balanced<4>>{});
  with_codec(std::type_identity<codec::balanced<3>>{});
  with_codec(std::type_identity<codec::balanced<2>>{});
  with_codec(std::type_identity<codec::trellis<4>>{});
  with_codec(std::type_identity<codec::trellis<3>>{});
  with_codec(std::type_identity<codec::trellis<2>>{});
  with_codec(std::type_identity<codec::centred<codec::int8>>{});
  with_codec(std::type_identity<codec::centred<codec::rotated<4>>>{});
  with_codec(std::type_identity<codec::centred<codec::rotated<3>>>{});
  with_codec(std::type_identity<codec::centred<codec::rotated<2>>>{});
  with_codec(std::type_identity<codec::centred<codec::trellis<4>>>{});
  with_codec(std::type_identity<codec::centred<codec::trellis<3>>>{});
  with_codec(std::type_identity<codec::centred<codec::trellis<2>>>{});
}

}  // namespace

TEST_CASE("every container goes with every codec by name", "[conformance]") {
  const auto specs = kvcache::cache_specs();
  const std::set<std::string> all(specs.begin(), specs.end());
  REQUIRE(all.size() == specs.size());
  for (const char* container : {"contiguous", "chunked", "paged"})
    for (const char* codec : {"f32", "f16", "bf16", "int8", "rotated4", "channel3", "balanced2"})
      REQUIRE(all.count(std::string(container) + "/" + codec) == 1);
}

TEST_CASE("every verb of any_cache agrees with the model", "[conformance]") {
  test::random random;
  for (const std::string& spec : token_specs()) {
    CAPTURE(spec);
    kvcache::any_cache cache = kvcache::make_cache(spec, small);
    oracle::cache model = model_with(small, kvcache::make_codec(codec_of(spec)), codec_of(spec));
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

TEST_CASE("tokens are kept and weights added up as in the typed container", "[conformance]") {
  test::random random;
  for (const char* spec :
       {"paged/int8", "chunked/k=channel4,v=rotated4,sinks=2,tail=16",
        "contiguous/k=channel4,v=rotated4,exact=f16", "paged/trellis3,sinks=2,exact=f32"}) {
    auto any = kvcache::make_cache(spec, small);
    const index_t width = small.num_kv_heads * small.head_dim;
    for (index_t layer = 0; layer < small.num_layers; ++layer)
      any[layer].append(random.floats(100 * width), random.floats(100 * width));
    const kvcache::keep_limits limits = any.keep_limits();
    std::vector<index_t> tokens;
    for (index_t t = 0; t < 100; ++t) {
      if (t < limits.pinned || t >= 50 || (t < limits.whole_blocks ? t / small.block_size != 1 : t % 3 != 0))
        tokens.push_back(t);
    }
    std::vector<float> k(static_cast<std::size_t>(100 * width)), v(k.size());
    any[1].copy_out(0, 100, k, v);
    const auto fork = any.fork();
    const auto result = any.keep_tokens(tokens, kvcache::keep_positions::original);
    REQUIRE(result.code == kvcache::status::ok);
    REQUIRE(result.num_forgotten == 100 - std::ssize(tokens));
    any.check();
    std::vector<float> k_now(tokens.size() * static_cast<std::size_t>(width)), v_now(k_now.size());
    any[1].copy_out(0, any.size(), k_now, v_now);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      REQUIRE(any.positions()[static_cast<index_t>(i)] == tokens[i]);
      const auto at = static_cast<index_t>(i) * width;
      REQUIRE(std::equal(k_now.begin() + at, k_now.begin() + at + width, k.begin() + tokens[i] * width));
      REQUIRE(std::equal(v_now.begin() + at, v_now.begin() + at + width, v.begin() + tokens[i] * width));
    }
    REQUIRE(fork.size() == 100);

    const std::vector<float> q = random.floats(2 * width);
    std::vector<float> out(q.size()), lse(static_cast<std::size_t>(2 * small.num_kv_heads));
    attend(q, any[1], out, {.lse = lse});
    std::vector<float> weights(tokens.size(), 0.0F);
    add_token_weights(q, any[1], lse, weights);
    double sum = 0;
    for (const float w : weights) sum += static_cast<double>(w);
    REQUIRE(std::fabs(sum - static_cast<double>(lse.size())) < 1e-3);  // every row adds up to 1
  }
}

TEST_CASE("a spec that is not known is refused with a list of what there is", "[conformance]") {
  const auto refused = [](const char* spec, std::initializer_list<const char*> words) {
    CAPTURE(spec);
    try {
      (void)kvcache::make_cache(spec, small);
      FAIL("made a cache");
    } catch (const kvcache::shape_error&) {
      FAIL("wrong exception");
    } catch (const std::invalid_argument& error) {
      const std::string text = error.what();
      CAPTURE(text);
      for (const char* word : words) REQUIRE(text.find(word) != std::string::npos);
    }
  };
  for (const char* spec : {"", "paged", "/", "/bf16", "pagd/bf16", "PAGED/BF16"})
    refused(spec, {"contiguous/", "chunked/", "paged/"});
  for (const char* spec :
       {"paged/bf61", "paged/bf16 ", "paged/bf16/x", "paged/", "paged/k=bf61", "paged/v=", "paged/k"})
    refused(spec, {"f32", "bf16", "rotated4", "channel3", "balanced2"});
  for (const char* spec : {"paged/bf16,bf16", "paged/bf16,tial=3", "paged/k=bf16,=3"})
    refused(spec, {"k=", "v=", "sinks=", "tail="});
  for (const char* spec : {"paged/bf16,tail=", "paged/bf16,tail=3x", "paged/bf16,sinks=-1",
                           "paged/tail=99999999999", "paged/tail=65537"})
    refused(spec, {"number of tokens"});
  for (const char* spec : {"paged/bf16,tail", "paged/bf16,tail=", "paged/tail", "paged/tail="})
    refused(spec, {"'tail=' lacks a number of tokens", "tail=128"});
  for (const char* spec : {"paged/k=", "paged/bf16,k", "paged/k=,tail=3"})
    refused(spec, {"'k=' lacks a codec"});
  for (const char* spec :
       {"paged/bf16,tail=3,exact=", "paged/bf16,tail=3,exact=f61", "paged/channel4,exact=int8"})
    refused(spec, {"exact=", "tails and sinks", "bf16, f16, f32"});
  for (const char* spec :
       {"paged/int8,exact=f16", "paged/exact=f16,tail=0", "paged/rotated4,first=1:int8,exact=f32"})
    refused(spec, {"exact=", "neither"});
  refused("paged/int8+", {"'int8+' lacks a codec", "rotated4"});
  refused("paged/v=channel4", {"channel4", "keys"});
  refused("paged/v=centred_int8", {"centred_int8", "keys"});
  refused("paged/v=centred_int9", {"no codec 'centred_int9'", "did you mean centred_int8?"});
  refused("paged/bf16,", {"ends"});
  refused("paged/k=int8,,v=int8", {"no name"});
  REQUIRE_THROWS_AS(kvcache::make_cache("paged/bf16", {.head_dim = 0}), kvcache::shape_error);
  REQUIRE_THROWS_AS(kvcache::make_cache("paged/bf16,sinks=17", small),
                    kvcache::shape_error);  // more than a block
}

namespace {

/// What make_cache says of a spec that it refuses; "made" where it takes it.
std::string message_of(const std::string& spec) {
  try {
    (void)kvcache::make_cache(spec, small);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "made";
}

}  // namespace

TEST_CASE("a misspelt name is refused once, with the nearest", "[conformance]") {
  const auto count = [](const std::string& text, const std::string& word) {
    std::size_t found = 0;
    for (std::size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++found;
    return found;
  };
  for (const auto& [said, meant] :
       std::vector<std::pair<std::string, std::string>>{{"centred_trelis3", "centred_trellis3"},
                                                        {"centered_trellis3", "centred_trellis3"},
                                                        {"Int8", "int8"},
                                                        {"bf61", "bf16"},
                                                        {"rotated", "rotated4"}}) {
    const std::string text = message_of("paged/" + said);
    CAPTURE(text);
    CHECK(count(text, "did you mean " + meant + "?") == 1);
    CHECK(count(text, "'" + said + "'") == 1);
  }
  for (const std::string far : {"q", "lz4hc", "centred_channel4_and_more"}) {
    CAPTURE(far);
    CHECK(count(message_of("paged/" + far), "did you mean") == 0);
  }
  CHECK(count(message_of("pagd/bf16"), "did you mean paged?") == 1);
  CHECK(count(message_of("paged"), "did you mean") == 0);
}

TEST_CASE("what is said twice in a spec is refused", "[conformance]") {
  const auto message = [](const std::string& spec) { return message_of("chunked/" + spec); };
  for (const char* spec :
       {"k=int8,k=int8", "v=int8,tail=3,v=f32", "tail=3,tail=3", "int8,sinks=1,sinks=2", "int8,k=f16,k=f32",
        "tail=3,exact=f16,exact=f16", "centred_int8,rope=half:10000,rope=half:10000", "int8,k=f16,v=f32"}) {
    CAPTURE(spec, message(spec));
    CHECK(message(spec).find("given twice") != std::string::npos);
  }
  CHECK(message("int8,v=f32") == "made");
  CHECK(message("int8,k=f32") == "made");
  CHECK(message("int8,first=1:f32,first=2:f16") == "made");  // the later counts
}

TEST_CASE("messages show as much of a spec as can be read", "[conformance]") {
  using namespace std::string_literals;
  for (const std::string& spec :
       {"heap\0\x1b[31m\n\xff/int8"s, "paged/int8\0\x1b[31m\n\xff"s, "paged/k=\0\x1b[31m\n\xff"s,
        "paged/int8,\0\x1b[31m\n\xff=3"s, "paged/int8,tail=\0\x1b[31m\n\xff"s,
        "paged/int8,first=\0\x1b[31m\n\xff:int8"s, "paged/int8,first=1:\0\x1b[31m\n\xff"s,
        "paged/centred_int8,rope=\0\x1b[31m\n\xff"s}) {
    const std::string text = message_of(spec);
    CAPTURE(text);
    CHECK(text.find("\\x00\\x1b[31m\\x0a\\xff") != std::string::npos);
    for (const char c : text) REQUIRE((c >= ' ' && c < '\x7f'));
  }
  const std::string longest = message_of("paged/zzz");
  for (const std::string start : {"", "paged/", "paged/int8,", "paged/int8,tail=", "paged/int8,first=",
                                  "paged/int8,layers=1:", "paged/centred_int8,rope="}) {
    CAPTURE(start);
    CHECK(message_of(start + std::string(100000, 'z')).size() < longest.size() + 250);
    CHECK(message_of(start + std::string(100000, '\0')).size() < longest.size() + 250);
  }
}

TEST_CASE("rope= is for centred codecs, and says no other thing than the rope_config", "[conformance]") {
  const kvcache::rope_config half{.head_dim = 6, .pairing = kvcache::rope_pairing::half};
  const auto made = [](const std::string& spec, const std::optional<kvcache::rope_config>& rope) {
    try {
      return kvcache::make_cache("chunked/" + spec, small, rope).spec() == "chunked/" + spec;
    } catch (const std::invalid_argument& error) {
      CHECK(std::string(error.what()).find("rope") != std::string::npos);
      return false;
    }
  };
  CHECK(made("centred_int8,rope=half:10000", {}));
  CHECK(made("int8,last=1:centred_int8,rope=half:10000", {}));
  CHECK(!made("int8,rope=half:10000", {}));
  CHECK(!made("rope=half:10000", {}));
  CHECK(made("int8", half));  // as a program says that asks its user for the codec only
  CHECK(made("centred_int8,rope=half:10000", half));
  CHECK(!made("centred_int8,rope=half:500000", half));
  CHECK(!made("centred_int8,rope=interleaved:10000", half));
  kvcache::rope_config scaled = half;
  scaled.scaling = kvcache::rope_scaling_linear{.factor = 2};
  CHECK(!made("centred_int8,rope=half:10000", scaled));
  CHECK(!made("centred_int8,rope=", {}));
  CHECK(!made("centred_int8,rope", {}));
}

TEST_CASE("a spec says the codec of keys and values, sinks and tail", "[conformance]") {
  const auto codec = kvcache::make_codec("k=channel4,v=rotated3,sinks=4,tail=128");
  REQUIRE(codec.exact_as == codec::exact_element::bf16);
  REQUIRE(kvcache::make_codec("int8,exact=f16,tail=1").exact_as == codec::exact_element::f16);
  REQUIRE(kvcache::make_codec("channel3,exact=f32").exact_as == codec::exact_element::f32);
  const kvcache::block_geometry g{.block_size = 64, .head_dim = 128};
  REQUIRE(codec.tail_tokens == 128);
  REQUIRE(codec.sink_tokens == 4);
  REQUIRE(codec.block_bytes(g) == codec::mixed<codec::channel<4>, codec::rotated<3>>{}.block_bytes(g));
  REQUIRE(kvcache::make_codec("int8,v=rotated4").block_bytes(g) ==
          codec::mixed<codec::int8, codec::rotated<4>>{}.block_bytes(g));
  REQUIRE(kvcache::make_codec("tail=5").block_bytes(g) == codec::bf16{}.block_bytes(g));
}

TEST_CASE("any_cache moves without throwing and copies only by name", "[conformance]") {
  STATIC_REQUIRE(std::is_nothrow_move_constructible_v<kvcache::any_cache>);
  STATIC_REQUIRE(std::is_nothrow_move_assignable_v<kvcache::any_cache>);
  STATIC_REQUIRE(!std::is_copy_constructible_v<kvcache::any_cache>);
  STATIC_REQUIRE(!std::is_copy_assignable_v<kvcache::any_cache>);
}
