// SPDX-License-Identifier: MIT
// What is saved comes back, in any container, as far as it was asked for; and goes on as it would have.
#include "support/catch.hpp"
#include "support/random.hpp"

#include "examples/temporary_folder.hpp"
#include "store/repair.hpp"
#include "store/sequences.hpp"

#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/interop/any_snapshot.hpp>
#include <kvcache/interop/rope_identity.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/mapped.hpp>
#include <kvcache/store/save.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using namespace kvcache;
using stored::require_same;

namespace {

using bytes = std::vector<std::byte>;
using sealing = codec::exact_sinks<codec::exact_tail<codec::channel<4>, 20>>;
using sealing_f16 = codec::exact_sinks<codec::exact_tail<codec::channel<4>, 20, codec::exact_element::f16>>;
using sealing_f32 = codec::exact_sinks<codec::exact_tail<codec::int8, 20, codec::exact_element::f32>>;
constexpr cache_shape shape{2, 2, 24, 16};

std::vector<token_id> ids(index_t count) {
  std::vector<token_id> all(static_cast<std::size_t>(count));
  std::iota(all.begin(), all.end(), 100);
  return all;
}

template <class Codec>
std::vector<float> attended(const auto& layer, test::random&& random) {
  const auto q = random.floats(2 * layer.shape().num_kv_heads * layer.shape().head_dim);
  std::vector<float> out(q.size());
  attend(q, layer, out);
  return out;
}

}  // namespace

TEMPLATE_TEST_CASE("a sequence goes through a snapshot into any container and goes on as it was", "[store]",
                   codec::bf16, codec::int8, sealing, sealing_f16, sealing_f32) {
  for (const index_t size : {0, 1, 15, 16, 17, 70}) {
    CAPTURE(size);
    test::random random;
    contiguous_cache<TestType> cache(shape);
    stored::append(cache, size, random);
    if (size > 20) cache.shift(3, 10, -2);
    const bytes saved = store::save(cache, {.model = "m", .tokens = ids(size)});
    CHECK(saved.size() % 64 == 0);

    auto [chunked, about] = store::load<chunked_cache<TestType>>(saved);
    chunked.check();
    CHECK(about.who.model == "m");
    CHECK(about.who.tokens == ids(size));
    require_same(cache, chunked);

    page_pool<TestType> pool(shape);
    auto paged = pool.sequence();
    stored::append(paged, 5, random);  // what was there before goes
    CHECK(store::load_into(paged, saved).size() == size);
    paged.check();
    require_same(cache, paged);
    CHECK(store::save(paged, {.model = "m", .tokens = ids(size)}) == saved);

    // Truncating brings back exact tokens, and appending seals: all three do the same.
    for (const index_t cut : {size, size - 1, size - 30}) {
      if (cut < 0) continue;
      test::random a(1);
      test::random b(1);
      test::random c(1);
      const auto change = [cut](auto& sequence, test::random& with) {
        sequence.truncate(cut);
        stored::append(sequence, 25, with);
      };
      change(cache, a);
      change(chunked, b);
      change(paged, c);
      require_same(cache, chunked);
      require_same(cache, paged);
      chunked.check();
      paged.check();
    }
  }
}

TEST_CASE("the bytes of a snapshot depend on tokens alone, not on what was there before", "[store]") {
  const auto saved_after = [](auto&& cache, index_t more) {
    test::random random;
    stored::append(cache, 37, random);
    test::random other(7);
    stored::append(cache, more, other);
    cache.truncate(37);
    return store::save(cache, {});
  };
  CHECK(saved_after(chunked_cache<codec::bf16>(shape), 0) ==
        saved_after(chunked_cache<codec::bf16>(shape), 9));
  CHECK(saved_after(contiguous_cache<codec::int8>(shape), 0) ==
        saved_after(chunked_cache<codec::int8>(shape), 11));
  CHECK(saved_after(contiguous_cache<sealing>(shape), 0) == saved_after(chunked_cache<sealing>(shape), 11));
}

TEST_CASE("a snapshot goes through files and streams", "[store]") {
  const model_files::temporary_folder folder;
  test::random random;
  chunked_cache<codec::bf16> cache(shape);
  stored::append(cache, 40, random);
  const auto path = folder.path() / "a.kv";
  store::save(cache, {.model = "one"}, path);
  stored::append(cache, 3, random);
  store::save(cache, {.model = "two"}, path);
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
  CHECK(store::inspect(path).who.model == "two");
  require_same(cache, store::load<contiguous_cache<codec::bf16>>(path).cache);

  std::stringstream stream;
  stream << "before";
  store::save(cache, {.model = "two"}, stream);
  stream.ignore(6);
  require_same(cache, store::load<contiguous_cache<codec::bf16>>(stream).cache);
  CHECK_THROWS_AS(store::load<contiguous_cache<>>(folder.path() / "none.kv"), std::system_error);
  CHECK_THROWS_AS(store::load<contiguous_cache<>>(folder.path()), load_error);
}

TEST_CASE("a range of tokens is saved with its positions", "[store]") {
  test::random random;
  chunked_cache<codec::bf16> exact(shape);
  chunked_cache<codec::int8> rounded(shape);
  stored::append(exact, 70, random);
  stored::append(rounded, 70, random);
  exact.shift(30, 40, 5);
  const auto part_of = [](const auto& cache, index_t first, index_t last) {
    using cache_type = std::remove_cvref_t<decltype(cache)>;
    const bytes saved = store::save(cache, {.tokens = ids(70)}, {.first_token = first, .last_token = last});
    auto [part, about] = store::load<cache_type>(saved);
    part.check();
    CHECK(about.first_token == first);
    REQUIRE(part.size() == last - first);
    for (index_t layer = 0; layer < shape.num_layers; ++layer)
      REQUIRE(stored::rows(part, layer, 0, last - first) == stored::rows(cache, layer, first, last));
    for (index_t t = first; t < last; ++t) {
      REQUIRE(part.positions()[t - first] == cache.positions()[t]);
      REQUIRE(about.who.tokens[static_cast<std::size_t>(t - first)] == 100 + t);
    }
    test::random more;
    stored::append(part, 20, more);
    REQUIRE(part.positions()[last - first] == cache.positions()[last - 1] + 1);
  };
  for (const auto& [first, last] :
       {std::pair<index_t, index_t>{0, 0}, {0, 1}, {0, 35}, {16, 16}, {16, 70}, {32, 33}}) {
    part_of(exact, first, last);
    part_of(rounded, first, last);
  }
  for (const auto& [first, last] : {std::pair<index_t, index_t>{1, 1}, {1, 2}, {7, 70}, {31, 39}, {69, 70}})
    part_of(exact, first, last);
  CHECK_THROWS_AS(store::save(rounded, {}, {.first_token = 3, .last_token = 9}), shape_error);
  CHECK_THROWS_AS(store::save(exact, {}, {.first_token = 9, .last_token = 8}), shape_error);
  CHECK_THROWS_AS(store::save(exact, {}, {.first_token = 71}), shape_error);
  CHECK_THROWS_AS(store::save(exact, {.tokens = ids(69)}), shape_error);
}

TEST_CASE("a range of a codec that keeps a tail is what a fork of it is", "[store]") {
  test::random random;
  chunked_cache<codec::exact_tail<codec::channel<4>, 20>> cache(shape);
  stored::append(cache, 90, random);
  for (const index_t last : {90, 89, 70, 33, 5, 0}) {
    auto part = store::load<decltype(cache)>(store::save(cache, {}, {.last_token = last})).cache;
    part.check();
    auto fork = cache.fork(last);
    require_same(fork, part);
  }
  const auto tail = store::load<decltype(cache)>(store::save(cache, {}, {.first_token = 32})).cache;
  tail.check();
  for (index_t layer = 0; layer < shape.num_layers; ++layer)
    REQUIRE(stored::rows(tail, layer, 0, 58) == stored::rows(cache, layer, 32, 90));
  CHECK_THROWS_AS(store::save(cache, {}, {.first_token = 31}), shape_error);
  chunked_cache<sealing> with_sinks(shape);
  stored::append(with_sinks, 40, random);
  CHECK_THROWS_AS(store::save(with_sinks, {}, {.first_token = 16}), shape_error);
}

TEST_CASE("settings of a codec are saved, and another codec or shape is refused", "[store]") {
  test::random random;
  std::vector<float> means = random.floats(shape.num_layers * shape.num_kv_heads * shape.head_dim);
  codec::mixed<codec::int8, codec::rotated<4>> with_means;
  with_means.keys.means = std::make_shared<const codec::key_means>(shape, means);
  std::vector<float> turns(static_cast<std::size_t>(4 * 24 * 24));
  for (std::size_t h = 0; h < 4; ++h) {
    for (std::size_t i = 0; i < 24; ++i) turns[(h * 24 + i) * 24 + (i + h) % 24] = 1;
  }
  with_means.values.rotation.matrices = std::make_shared<const codec::rotation_matrices>(shape, turns);
  chunked_cache<decltype(with_means)> cache(shape, with_means);
  stored::append(cache, 33, random);
  const bytes saved = store::save(cache, {});
  auto again = store::load<contiguous_cache<decltype(with_means)>>(saved).cache;
  require_same(cache, again);
  stored::append(again, 4, random);
  CHECK(store::save(again, {}, {.last_token = 33}) == saved);

  using same_codec = chunked_cache<decltype(with_means)>;
  same_codec without(shape);
  CHECK_THROWS_AS(store::load_into(without, saved), load_error);  // other settings
  same_codec smaller({2, 2, 24, 32}, with_means);
  CHECK_THROWS_AS(store::load_into(smaller, saved), load_error);
  CHECK_THROWS_AS(store::load<chunked_cache<codec::int8>>(saved), load_error);
  CHECK_THROWS_AS(
      (store::load<chunked_cache<codec::exact_tail<codec::mixed<codec::int8, codec::rotated<3>>>>>(saved)),
      load_error);
  using with_tail = chunked_cache<codec::exact_tail<codec::bf16, 8>>;
  with_tail tail(shape);
  CHECK_THROWS_AS(store::load<chunked_cache<codec::bf16>>(store::save(tail, {})), load_error);
  chunked_cache<sealing_f16> in_f16(shape);
  stored::append(in_f16, 50, random);
  const bytes saved_f16 = store::save(in_f16, {});
  chunked_cache<sealing> in_bf16(shape);
  CHECK_THROWS_AS(store::load_into(in_bf16, saved_f16), load_error);
  // As tail and sinks, it is what the file says.
  CHECK(store::load<chunked_cache<sealing>>(saved_f16).cache.codec().exact_as == codec::exact_element::f16);
  CHECK(
      store::load<with_tail>(store::save(chunked_cache<codec::bf16>(shape), {})).cache.codec().tail_tokens ==
      0);
}

TEST_CASE("bases of low_rank are saved with the blocks", "[store]") {
  test::random random;
  const bool two_matrices = GENERATE(false, true);
  codec::low_rank_matrices made;
  made.key_layout = {.f32 = 1, .bf16 = 2, .int8 = 5, .bits4 = 9};
  made.value_layout = {.bf16 = 3, .bits2 = 4};
  made.keys_in = random.floats(4 * 17 * 24);
  if (two_matrices) made.keys_out = random.floats(4 * 17 * 24);
  made.values = random.floats(4 * 7 * 24);
  for (int i = 0; i < 4 * 17; ++i) made.key_spreads.push_back(random.uniform(0.1F, 2));
  for (int i = 0; i < 4 * 7; ++i) made.value_spreads.push_back(random.uniform(0.1F, 2));
  codec::low_rank settings;
  settings.keys.bases = settings.values.bases = std::make_shared<const codec::low_rank_bases>(shape, made);
  chunked_cache<codec::low_rank> cache(shape, settings);
  stored::append(cache, 37, random);
  const bytes saved = store::save(cache, {});
  auto again = store::load<contiguous_cache<codec::low_rank>>(saved).cache;
  require_same(cache, again);
  const auto q = random.floats(48);
  std::vector<float> out(48);
  std::vector<float> expected(48);
  attend(q, cache[1], expected);
  attend(q, again[1], out);
  CHECK(out == expected);
  test::random a(1);
  test::random b(1);
  stored::append(cache, 9, a);
  stored::append(again, 9, b);
  CHECK(store::save(cache, {}) == store::save(again, {}));
}

TEST_CASE("a snapshot of another model, tokenizer or rotation is refused", "[store]") {
  const rope_config rope{
      .head_dim = 24, .pairing = rope_pairing::half, .scaling = rope_scaling_yarn{.factor = 4}};
  chunked_cache<> cache(shape);
  const bytes saved = store::save(
      cache, {.model = std::string("a\0b", 3), .tokenizer = "t", .rope = store::rope_identity_of(rope)});
  const auto refused = [&](const store::expectation& expected) {
    try {
      (void)store::load<chunked_cache<>>(saved, {.expect = expected});
      return false;
    } catch (const load_error& error) {
      CHECK(error.source() == "memory");
      CHECK(error.offset() < saved.size());
      return true;
    }
  };
  CHECK(!refused({.model = std::string("a\0b", 3), .tokenizer = "t", .rope = store::rope_identity_of(rope)}));
  CHECK(refused({.model = "a"}));
  CHECK(refused({.tokenizer = ""}));
  rope_config other = rope;
  other.pairing = rope_pairing::interleaved;
  CHECK(refused({.rope = store::rope_identity_of(other)}));
  other = rope;
  other.scaling = rope_scaling_yarn{.factor = 5};
  CHECK(refused({.rope = store::rope_identity_of(other)}));
  CHECK_THROWS_AS(store::save(cache, {.model = std::string(4097, 'x')}), shape_error);
}

TEST_CASE("any_cache is saved, and made again from its file", "[store]") {
  test::random random;
  for (const std::string spec :
       {"contiguous/bf16", "chunked/k=channel4,v=rotated4,tail=20,sinks=4",
        "paged/k=channel4,v=rotated4,exact=f16", "chunked/rotated4,tail=20,sinks=4,exact=f32",
        "paged/trellis2", "contiguous/k=channel3,v=rotated3,first=1:int8,tail=20"}) {
    CAPTURE(spec);
    any_cache cache = make_cache(spec, shape);
    stored::append(cache, 60, random);
    const bytes saved = store::save(cache, {.model = "m"});
    auto [again, about] = store::load_any(saved);
    again.check();
    CHECK(again.spec() == spec);
    require_same(cache, again);
    CHECK(store::load_any(saved, {}, "chunked").cache.spec().substr(0, 8) == "chunked/");
  }
  // What was typed can be loaded as any, and the other way round.
  chunked_cache<codec::int8> typed(shape);
  stored::append(typed, 20, random);
  const auto any = store::load_any(store::save(typed, {})).cache;
  require_same(typed, any);
  any_cache plain = make_cache("paged/int8", shape);
  stored::append(plain, 20, random);
  require_same(plain, store::load<contiguous_cache<codec::int8>>(store::save(plain, {})).cache);
}

TEST_CASE("codes of trellises in files of format version 1 are refused", "[store]") {
  test::random random;
  for (const auto& [spec, is_refused] :
       {std::pair{"paged/trellis3", true}, std::pair{"chunked/k=int8,v=trellis2,tail=16", true},
        std::pair{"chunked/int8,first=1:trellis4", true}, std::pair{"chunked/rotated3", false},
        std::pair{"chunked/rotated3,first=1:int8", false}}) {
    CAPTURE(spec);
    any_cache cache = make_cache(spec, shape);
    stored::append(cache, 40, random);
    bytes saved = store::save(cache, {});
    require_same(cache, store::load_any(saved).cache);
    saved[12] = std::byte{1};
    stored::repair(saved);
    try {
      require_same(cache, store::load_any(saved).cache);
      CHECK_FALSE(is_refused);
    } catch (const load_error& error) {
      CHECK(is_refused);
      CHECK(std::string(error.what()).find("format version 1 cannot be read") != std::string::npos);
    }
  }
}

TEST_CASE("low_rank is saved with its bases", "[store]") {
  test::random random;
  chunked_cache<> exact(shape);
  stored::append(exact, 60, random);
  const auto bases = codec::low_rank_bases::fit_from(exact, {.rank = 3}, {.energy = 0.9, .by_layer = true});
  chunked_cache<codec::low_rank> cache(shape, codec::low_rank(bases));
  stored::append(cache, 60, random);
  const bytes saved = store::save(cache, {});
  require_same(cache, store::load<contiguous_cache<codec::low_rank>>(saved).cache);
  require_same(cache, store::load_any(saved).cache);
}

TEMPLATE_TEST_CASE("a mapped snapshot is attended over as the sequence was", "[store]", codec::int8, sealing,
                   sealing_f32) {
  const model_files::temporary_folder folder;
  const auto path = folder.path() / "mapped.kv";
  for (const index_t size : {1, 16, 23, 70}) {
    CAPTURE(size);
    test::random random;
    chunked_cache<TestType> cache(shape);
    stored::append(cache, size, random);
    store::save(cache, {.model = "m"}, path);
    const store::mapped_snapshot<TestType> mapped(path, {.model = "m"});
    mapped.verify();
    REQUIRE(mapped.size() == size);
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      const std::vector<float> expected = attended<TestType>(cache[layer], test::random(9));
      REQUIRE(attended<TestType>(mapped[layer], test::random(9)) == expected);
      REQUIRE(reinterpret_cast<std::uintptr_t>(mapped[layer].block(1, 0)) % 64 == 0);
    }
  }
  CHECK_THROWS_AS(store::mapped_snapshot<codec::bf16>(path), load_error);
  CHECK_THROWS_AS(store::mapped_snapshot<TestType>(path, {.model = "n"}), load_error);
}

TEST_CASE("a mapped snapshot stays what it was when its file is replaced", "[store]") {
  const model_files::temporary_folder folder;
  const auto path = folder.path() / "mapped.kv";
  test::random random;
  chunked_cache<> cache(shape);
  stored::append(cache, 40, random);
  store::save(cache, {}, path);
  const store::mapped_snapshot<> mapped(path);
  cache.clear();
  store::save(cache, {}, path);
  CHECK(mapped.size() == 40);
  mapped.verify();
}

TEST_CASE("layers of different length are saved as they are", "[store]") {
  test::random random;
  chunked_cache<> cache(shape);
  stored::append(cache, 18, random);
  const auto k = random.floats(20 * 48);
  cache[1].append(k, k);
  const auto again = store::load<chunked_cache<>>(store::save(cache, {.tokens = ids(18)})).cache;
  again.check();
  CHECK(again.layer_size(0) == 18);
  CHECK(again.layer_size(1) == 38);
  require_same(cache, again);
}
