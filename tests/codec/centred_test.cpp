// SPDX-License-Identifier: MIT
// centred: what turns as RoPE turns costs nothing, whatever the pairing; scores are those of the rows as they are read back.

#include <kvcache/attention/rope.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/kernel/select.hpp>

#include "codec/coded_blocks.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

using kvcache::block_geometry;
using kvcache::index_t;
using kvcache::rope_config;
using kvcache::rope_pairing;
using test::key_value_rows;
using test::relative_error;
using test::through;
namespace codec = kvcache::codec;
namespace kernel = kvcache::kernel;

namespace {

/// Keys of consecutive tokens: one row in common before RoPE, and `spread` of what differs; values of their own.
key_value_rows turning_rows(const block_geometry& g, const rope_config& rope, index_t first_position,
                            float spread, test::random& random) {
  const kvcache::rope_table table(rope);
  const std::vector<float> common = random.floats(g.head_dim);
  key_value_rows rows{random.floats(g.block_size * g.head_dim), random.floats(g.block_size * g.head_dim)};
  for (index_t t = 0; t < g.block_size; ++t) {
    float* row = rows.k.data() + t * g.head_dim;
    for (index_t d = 0; d < g.head_dim; ++d) row[d] = common[static_cast<std::size_t>(d)] + spread * row[d];
    table.rotate(row, 1, first_position + t);
  }
  return rows;
}

std::vector<rope_config> configurations() {
  return {{.head_dim = 64, .pairing = rope_pairing::half},
          {.head_dim = 64, .pairing = rope_pairing::interleaved},
          {.head_dim = 80, .pairing = rope_pairing::half, .theta = 5e5, .rotary_dim = 20},
          {.head_dim = 80, .pairing = rope_pairing::interleaved, .rotary_dim = 64},
          {.head_dim = 2, .pairing = rope_pairing::interleaved},
          {.head_dim = 131, .pairing = rope_pairing::half, .rotary_dim = 130},
          {.head_dim = 128, .pairing = rope_pairing::half, .scaling = kvcache::rope_scaling_llama3{}}};
}

}  // namespace

TEST_CASE("what keys have in common before RoPE costs no error", "[codec]") {
  test::random random;
  for (const rope_config& rope : configurations()) {
    for (const index_t block_size : {16, 64, 256}) {
      CAPTURE(rope.head_dim, rope.rotary_dim, static_cast<int>(rope.pairing), block_size);
      const block_geometry g{.block_size = block_size, .head_dim = rope.head_dim};
      constexpr float spread = 0.125F;
      const key_value_rows rows = turning_rows(g, rope, 1000, spread, random);
      const double plain = relative_error(through<codec::rotated<4>>(g, rows).k, rows.k);
      const auto back = through(g, rows, codec::centred<codec::rotated<4>>(rope));
      // what differs has at most `spread` squared of the energy; the mean is off by up to 2^-9 of itself
      // (of few dims the row in common may be a small one)
      CHECK(relative_error(back.k, rows.k) <
            (rope.head_dim > 60 ? 0.012 * spread * spread * 2 + 2e-5 : 0.05));
      if (rope.head_dim > 60) CHECK(relative_error(back.k, rows.k) < plain / 10);
      CHECK(relative_error(back.v, rows.v) < 0.0125);
    }
  }
}

TEST_CASE("a block that begins with exact sinks is centred over the others", "[codec]") {
  test::random random;
  const rope_config rope{.head_dim = 64, .pairing = rope_pairing::half};
  const block_geometry g{.block_size = 64, .head_dim = 64};
  const codec::centred<codec::trellis<4>> codec(rope);
  const key_value_rows rows = turning_rows(g, rope, 0, 0.125F, random);
  const auto block = test::zero_block(g, codec);
  constexpr index_t first = 4;
  REQUIRE(codec.encode(kernel::best(), g, block.data(), first, 60, {rows.k.data() + first * 64, 64},
                       {rows.v.data() + first * 64, 64}) == kvcache::status::ok);
  std::vector<float> k(60 * 64);
  std::vector<float> v(60 * 64);
  codec.decode(kernel::best(), g, block.data(), first, 60, {k.data(), 64}, {v.data(), 64});
  CHECK(relative_error(k, {rows.k.begin() + first * 64, rows.k.end()}) < 2e-4);
}

TEMPLATE_TEST_CASE("scores are those of the rows that are read back", "[codec]", codec::int8,
                   codec::rotated<4>, codec::rotated<2>, codec::trellis<3>) {
  test::random random;
  const auto check = [&](const codec::centred<TestType>& codec, const block_geometry& g,
                         const key_value_rows& rows) {
    const auto block = test::zero_block(g, codec);
    REQUIRE(codec.encode(kernel::best(), g, block.data(), 0, g.block_size, {rows.k.data(), g.head_dim},
                         {rows.v.data(), g.head_dim}) == kvcache::status::ok);
    key_value_rows back{std::vector<float>(rows.k.size()), std::vector<float>(rows.v.size())};
    codec.decode(kernel::best(), g, block.data(), 0, g.block_size, {back.k.data(), g.head_dim},
                 {back.v.data(), g.head_dim});
    // of a key that is much smaller than the others: the mean that is added to its rest is not
    double average = 0;
    for (const float x : back.k) average += double{x} * double{x} / static_cast<double>(g.block_size);
    for (const index_t num_rows : {1, 3, 4, 8, 9, 17}) {
      test::aligned_floats queries(num_rows * g.head_dim);
      const auto numbers = random.floats(num_rows * g.head_dim);
      std::copy(numbers.begin(), numbers.end(), queries.data());
      test::aligned_floats prepared(num_rows * codec.prepared_floats(g));
      for (const index_t count : {index_t{1}, index_t{15}, index_t{16}, g.block_size - 1, g.block_size}) {
        for (const kernel::isa level : kernel::available()) {
          CAPTURE(num_rows, count, kernel::to_string(level), g.head_dim, g.block_size);
          const kernel::table& kernels = kernel::select(level);
          test::aligned_floats scores(num_rows * g.block_size);
          const float* made = codec.prepare(kernels, g, queries.data(), num_rows, prepared.data());
          codec.scores(kernels, g, block.data(), count, made, num_rows, scores.data(), nullptr);
          double worst = 0;
          for (index_t r = 0; r < num_rows; ++r) {
            const float* q = queries.data() + r * g.head_dim;
            double q_size = 0;
            for (index_t d = 0; d < g.head_dim; ++d) q_size += double{q[d]} * double{q[d]};
            for (index_t t = 0; t < count; ++t) {
              double dot = 0;
              double size = 0;
              for (index_t d = 0; d < g.head_dim; ++d) {
                const double x = back.k[static_cast<std::size_t>(t * g.head_dim + d)];
                dot += double{q[d]} * x;
                size += x * x;
              }
              const double off = std::fabs(dot - double{scores.data()[r * g.block_size + t]});
              worst = std::max(worst, off / (std::sqrt(q_size * (size + average)) + 1e-20));
            }
          }
          // queries and carriers are bytes on some levels: 1/254 of a row's largest number each
          REQUIRE(worst < 0.02);
        }
      }
    }
  };
  for (const rope_config& rope : configurations()) {
    const block_geometry g{.block_size = 64, .head_dim = rope.head_dim};
    check(codec::centred<TestType>(rope), g, turning_rows(g, rope, 77, 0.5F, random));
  }
  const block_geometry g{.block_size = 32, .head_dim = 20};
  check({}, g, {random.floats(32 * 20), random.floats(32 * 20)});
}

TEST_CASE("keys at the ends of float are centred without infinities", "[codec]") {
  test::random random;
  for (const rope_config& rope : configurations()) {
    const block_geometry g{.block_size = 16, .head_dim = rope.head_dim};
    const codec::centred<codec::int8> codec(rope);
    for (const float size : {3.3e38F, 2.5e38F, 1e38F}) {
      for (const bool same_sign : {true, false}) {
        CAPTURE(rope.head_dim, size, same_sign);
        key_value_rows rows{std::vector<float>(static_cast<std::size_t>(16 * rope.head_dim), size), {}};
        for (float& x : rows.k)
          if (!same_sign && random.chance(0.5)) x = -x;
        rows.v = rows.k;
        for (const index_t count : {1, 16}) {
          key_value_rows some = rows;
          some.k.resize(static_cast<std::size_t>(count * rope.head_dim));
          some.v.resize(some.k.size());
          const auto back = through(g, some, codec);
          CHECK(std::none_of(back.k.begin(), back.k.end(), [](float x) { return std::isnan(x); }));
          if (size < 1.1e38F) CHECK(relative_error(back.k, some.k) < 1e-3);
        }
      }
    }
  }
}

TEST_CASE("settings of centred come back, and others are refused", "[codec]") {
  const kvcache::cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64};
  for (const rope_pairing pairing : {rope_pairing::half, rope_pairing::interleaved}) {
    const codec::centred<codec::rotated<4>> codec({.head_dim = 64, .pairing = pairing});
    const auto described = kvcache::describe(codec);
    CHECK(described.keys.name == "centred_rotated4");
    CHECK(described.seals);
    const auto again = kvcache::make_described<codec::centred<codec::rotated<4>>>(described, shape);
    REQUIRE(again.keys.turns != nullptr);
    CHECK(again.keys.turns->pairing() == pairing);
    CHECK(again.keys.turns->radians() == codec.keys.turns->radians());
    for (std::size_t size = 0; size < described.keys.settings.size(); ++size) {
      auto cut = described;
      cut.keys.settings.resize(size);
      CHECK_THROWS_AS(kvcache::make_described<codec::centred<codec::rotated<4>>>(cut, shape),
                      kvcache::shape_error);
    }
    auto other = described;
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), 1e308}) {  // infinite over a block
      std::memcpy(other.keys.settings.data() + 8, &bad, sizeof(bad));
      CHECK_THROWS_AS(kvcache::make_described<codec::centred<codec::rotated<4>>>(other, shape),
                      kvcache::shape_error);
    }
    CHECK_THROWS_AS(kvcache::validate(codec, {.num_layers = 1, .num_kv_heads = 1, .head_dim = 32}),
                    kvcache::shape_error);
    CHECK(kvcache::settings_bytes(codec) == 256 * 64 * 5 + 32 * 8);
  }
  const auto plain = kvcache::describe(codec::centred<codec::rotated<4>>{});
  CHECK(kvcache::make_described<codec::centred<codec::rotated<4>>>(plain, shape).keys.turns == nullptr);
}

TEST_CASE("turns for another head_dim than the cache's are refused with both", "[codec]") {
  const kvcache::cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 128};
  const auto refused = [&](const rope_config& rope, const char* of_rope) {
    const codec::centred<codec::trellis<3>> codec(rope);
    try {
      kvcache::validate(codec, shape);
      FAIL("took it");
    } catch (const kvcache::shape_error& error) {
      const std::string what = error.what();
      CAPTURE(what);
      CHECK(what.find(of_rope) != std::string::npos);
      CHECK(what.find("128") != std::string::npos);
    }
    CHECK_THROWS_AS(kvcache::chunked_cache<codec::centred<codec::trellis<3>>>(shape, codec),
                    kvcache::shape_error);
    CHECK_THROWS_AS(kvcache::make_cache("paged/k=centred_rotated4,last=0:bf16", shape, rope),
                    kvcache::shape_error);
    std::vector<float> rows(128);
    CHECK_THROWS_AS(codec::take_off_means(rows, shape, codec.keys.turns.get()), kvcache::shape_error);
  };
  refused({.head_dim = 64, .pairing = rope_pairing::half}, "64");
  refused({.head_dim = 256, .pairing = rope_pairing::half, .rotary_dim = 64}, "256");
  const rope_config same{.head_dim = 128, .pairing = rope_pairing::half, .rotary_dim = 64};
  CHECK_NOTHROW(kvcache::validate(codec::centred<codec::trellis<3>>(same), shape));
  CHECK_NOTHROW(kvcache::make_cache("paged/centred_int8", shape, same));
}

TEST_CASE("the mean takes 16 bits of each channel and block", "[codec]") {
  const block_geometry g{.block_size = 64, .head_dim = 128};
  CHECK(codec::centred<codec::trellis<3>>{}.block_bytes(g) == codec::trellis<3>{}.block_bytes(g) + 256);
  CHECK(codec::centred<codec::trellis<3>>{}.token_bytes(g) == codec::trellis<3>{}.token_bytes(g) + 4);
  CHECK(codec::centred<codec::trellis<3>>::name == "centred_trellis3");
}
