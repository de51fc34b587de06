// SPDX-License-Identifier: MIT
// rotated, trellis, channel and balanced: their errors, the rows that are special, the same bytes on every instruction set.

#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/select.hpp>

#include "codec/coded_blocks.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

using kvcache::block_geometry;
using kvcache::index_t;
using kvcache::status;
using test::key_value_rows;
using test::relative_error;
using test::through;
using test::zero_block;
namespace codec = kvcache::codec;
namespace kernel = kvcache::kernel;

namespace {

/// Relative mean squared error of keys and values over many blocks of normally distributed rows of 128.
template <class Codec>
std::pair<double, double> gaussian_error() {
  test::random random;
  const block_geometry g{.block_size = 64, .head_dim = 128};
  double k = 0;
  double v = 0;
  constexpr int blocks = 40;
  for (int i = 0; i < blocks; ++i) {
    const key_value_rows rows{random.floats(64 * 128), random.floats(64 * 128)};
    const key_value_rows back = through<Codec>(g, rows);
    k += relative_error(back.k, rows.k) / blocks;
    v += relative_error(back.v, rows.v) / blocks;
  }
  return {k, v};
}

}  // namespace

TEST_CASE("rotated codecs reach the error of their codebooks on normally distributed rows", "[codec]") {
  const auto four = gaussian_error<codec::rotated<4>>();
  const auto three = gaussian_error<codec::rotated<3>>();
  const auto two = gaussian_error<codec::rotated<2>>();
  CAPTURE(four, three, two);
  for (const double error : {four.first, four.second}) CHECK(error < 0.0092 * 1.02);
  for (const double error : {three.first, three.second}) CHECK(error < 0.0335 * 1.02);
  for (const double error : {two.first, two.second}) CHECK(error < 0.1153 * 1.02);
}

TEST_CASE("trellis codecs stay below what any scalar quantiser can do", "[codec]") {
  const auto four = gaussian_error<codec::trellis<4>>();
  const auto three = gaussian_error<codec::trellis<3>>();
  const auto two = gaussian_error<codec::trellis<2>>();
  CAPTURE(four, three, two);
  for (const double error : {four.first, four.second}) CHECK(error < 0.0062);
  for (const double error : {three.first, three.second}) CHECK(error < 0.0220);
  for (const double error : {two.first, two.second}) CHECK(error < 0.0800);
}

TEST_CASE("a rotation makes rows with outliers as good as any", "[codec]") {
  test::random random;
  const block_geometry g{.block_size = 64, .head_dim = 128};
  key_value_rows rows{random.floats(64 * 128), random.floats(64 * 128)};
  for (std::size_t t = 0; t < 64; ++t) rows.k[t * 128 + 17] *= 30;
  CHECK(relative_error(through<codec::rotated<4>>(g, rows).k, rows.k) < 0.0125);
}

TEST_CASE("channel keys are off by at most half a step of their channel", "[codec]") {
  test::random random;
  const auto check = [&]<int Bits>(const codec::channel<Bits>& channel, index_t block_size, index_t dim,
                                   float size) {
    const block_geometry g{.block_size = block_size, .head_dim = dim};
    key_value_rows rows{random.floats(block_size * dim), random.floats(block_size * dim)};
    for (std::size_t i = 0; i < rows.k.size(); ++i) {
      const auto d = i % static_cast<std::size_t>(dim);
      rows.k[i] = size * (rows.k[i] * static_cast<float>(1 + d % 3) + (d % 7 == 0 ? 12.0F : 0.0F));
    }
    const auto back = through(g, rows, channel);
    for (index_t d = 0; d < dim; ++d) {
      float least = std::numeric_limits<float>::infinity();
      float largest = -least;
      double worst = 0;
      for (index_t t = 0; t < block_size; ++t) {
        const auto i = static_cast<std::size_t>(t * dim + d);
        least = std::min(least, rows.k[i]);
        largest = std::max(largest, rows.k[i]);
        worst = std::max(worst, std::fabs(double{rows.k[i]} - double{back.k[i]}));
      }
      CAPTURE(Bits, block_size, dim, d, least, largest);
      // step and middle are bfloat16: 2^-8 of each on top
      const double step = (double{largest} - double{least}) / ((1 << Bits) - 1);
      const double middle = std::max(std::fabs(double{least}), std::fabs(double{largest}));
      CHECK(worst <= step / 2 * (1 + 0x1p-7) + middle * 0x1p-8 / ((1 << Bits) - 1) + 1e-37);
    }
  };
  for (const float size : {1.0F, 1e-30F, 1e36F}) {
    check(codec::channel<4>{}, 64, 128, size);
    check(codec::channel<3>{}, 32, 33, size);
    check(codec::channel<4>{}, 16, 1, size);
  }
}

TEST_CASE("balanced codecs take out what channels and tokens have in size", "[codec]") {
  test::random random;
  const block_geometry g{.block_size = 64, .head_dim = 128};
  const auto plain = gaussian_error<codec::balanced<2>>();
  CAPTURE(plain);
  CHECK(plain.first < 0.113);
  CHECK(plain.second < 0.113);
  key_value_rows rows{random.floats(64 * 128), random.floats(64 * 128)};
  for (std::size_t t = 0; t < 64; ++t) {
    const float token = std::exp(random.normal());
    for (std::size_t d = 0; d < 128; ++d) rows.k[t * 128 + d] *= token * (d % 16 == 3 ? 40.0F : 1.0F);
  }
  // each channel on its own scale, as the codec sees them
  const auto back = through<codec::balanced<4>>(g, rows);
  for (std::size_t d = 0; d < 128; ++d) {
    double error = 0;
    double size = 0;
    for (std::size_t t = 0; t < 64; ++t) {
      const std::size_t i = t * 128 + d;
      error += std::pow(double{rows.k[i]} - double{back.k[i]}, 2);
      size += std::pow(double{rows.k[i]}, 2);
    }
    CAPTURE(d);
    CHECK(error / size < 0.04);
  }
}

TEMPLATE_TEST_CASE("special rows", "[codec]", codec::rotated<4>, codec::rotated<3>, codec::rotated<2>,
                   codec::channel<4>, codec::channel<3>, codec::balanced<4>, codec::balanced<3>,
                   codec::balanced<2>, codec::centred<codec::rotated<3>>, codec::centred<codec::int8>) {
  test::random random;
  for (const index_t dim : {1, 2, 5, 20, 64, 80, 128, 511}) {
    const block_geometry g{.block_size = 16, .head_dim = dim};
    const auto n = static_cast<std::size_t>(16 * dim);
    CAPTURE(dim);

    const auto zeros = through<TestType>(g, {std::vector<float>(n), std::vector<float>(n)});
    CHECK(std::all_of(zeros.k.begin(), zeros.k.end(), [](float x) { return x == 0.0F; }));
    CHECK(std::all_of(zeros.v.begin(), zeros.v.end(), [](float x) { return x == 0.0F; }));

    for (const float size : {1.0F, 1e30F, 1e-30F, 3e37F}) {
      CAPTURE(size);
      key_value_rows rows{random.floats(16 * dim), random.floats(16 * dim)};
      for (auto* side : {&rows.k, &rows.v})
        for (float& x : *side) x *= size;
      const auto back = through<TestType>(g, rows);
      CHECK(relative_error(back.k, rows.k) < 0.3);
      CHECK(relative_error(back.v, rows.v) < 0.3);

      // constant over tokens and dims
      const key_value_rows constant{std::vector<float>(n, -size), std::vector<float>(n, size)};
      const auto same = through<TestType>(g, constant);
      CHECK(relative_error(same.k, constant.k) < 0.25);
      CHECK(relative_error(same.v, constant.v) < 0.25);
    }
    // one row among zeros; denormals come back finite
    key_value_rows lone{std::vector<float>(n), std::vector<float>(n, 1e-41F)};
    std::fill_n(lone.k.begin() + 3 * dim, dim, 5.0F);
    const auto back = through<TestType>(g, lone);
    for (const float x : back.k) CHECK(std::fabs(x) < 15);
    for (const float x : back.v) CHECK(std::fabs(x) < 1e-37F);
  }
}

TEMPLATE_TEST_CASE("rows that are not finite are refused and nothing is written", "[codec]",
                   codec::rotated<4>, codec::rotated<2>, codec::channel<4>, codec::balanced<3>,
                   codec::trellis<2>, codec::centred<codec::trellis<2>>) {
  test::random random;
  const block_geometry g{.block_size = 16, .head_dim = 20};
  const TestType codec;
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const bool in_keys : {true, false}) {
      const auto block = zero_block(g, codec);
      key_value_rows rows{random.floats(16 * 20), random.floats(16 * 20)};
      (in_keys ? rows.k : rows.v)[301] = bad;
      REQUIRE(codec.encode(kernel::best(), g, block.data(), 0, 16, {rows.k.data(), 20},
                           {rows.v.data(), 20}) == status::not_finite);
      REQUIRE(std::all_of(block.data(), block.data() + block.size(),
                          [](std::byte b) { return b == std::byte{0}; }));
    }
  }
}

TEMPLATE_TEST_CASE("blocks are the same bytes on every instruction set", "[codec]", codec::rotated<4>,
                   codec::rotated<3>, codec::rotated<2>, codec::channel<4>, codec::channel<3>,
                   codec::balanced<4>, codec::balanced<3>, codec::balanced<2>, codec::trellis<4>,
                   codec::trellis<3>, codec::trellis<2>, codec::centred<codec::rotated<4>>,
                   codec::centred<codec::int8>) {
  test::random random;
  const TestType codec;
  for (const index_t dim : {1, 4, 15, 20, 64, 80, 128, 131}) {
    const block_geometry g{.block_size = 32, .head_dim = dim};
    key_value_rows rows{random.floats(32 * dim), random.floats(32 * dim)};
    if (dim == 4) {  // numbers further apart than the largest float
      for (auto* side : {&rows.k, &rows.v}) {
        std::fill(side->begin(), side->end(), -3e38F);
        std::fill_n(side->end() - dim, dim, 3e38F);
      }
    }
    const auto encoded = [&](const kernel::table& kernels) {
      auto block = zero_block(g, codec);
      REQUIRE(codec.encode(kernels, g, block.data(), 0, 32, {rows.k.data(), dim}, {rows.v.data(), dim}) ==
              status::ok);
      return block;
    };
    const auto expected = encoded(kernel::select(kernel::isa::portable));
    for (const kernel::isa level : kernel::available()) {
      CAPTURE(dim, kernel::to_string(level));
      const auto got = encoded(kernel::select(level));
      REQUIRE(std::memcmp(got.data(), expected.data(), static_cast<std::size_t>(got.size())) == 0);
    }
  }
}

TEST_CASE("rotations by matrices: rows come back, what is not orthogonal is refused", "[codec]") {
  test::random random;
  constexpr index_t dim = 6;
  const kvcache::cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = dim, .block_size = 16};
  // a rotation in each plane of two dims, another angle for each layer
  std::vector<float> matrices(2 * dim * dim);
  for (index_t layer = 0; layer < 2; ++layer) {
    const float angle = 0.3F + static_cast<float>(layer);
    for (index_t d = 0; d < dim; d += 2) {
      float* m = matrices.data() + layer * dim * dim + d * dim + d;
      m[0] = m[dim + 1] = std::cos(angle);
      m[1] = std::sin(angle);
      m[dim] = -std::sin(angle);
    }
  }
  const auto given = std::make_shared<const codec::rotation_matrices>(shape, matrices);
  codec::rotated<4> rotated;
  rotated.keys.rotation.matrices = rotated.values.rotation.matrices = given;
  const block_geometry g = kvcache::geometry_of(shape);
  const key_value_rows rows{random.floats(16 * dim), random.floats(16 * dim)};
  for (index_t layer = 0; layer < 2; ++layer) {
    const auto here = kvcache::codec_at(rotated, layer, 0);
    const auto block = zero_block(g, here);
    REQUIRE(here.encode(kernel::best(), g, block.data(), 0, 16, {rows.k.data(), dim}, {rows.v.data(), dim}) ==
            status::ok);
    key_value_rows back{std::vector<float>(16 * dim), std::vector<float>(16 * dim)};
    here.decode(kernel::best(), g, block.data(), 0, 16, {back.k.data(), dim}, {back.v.data(), dim});
    CHECK(relative_error(back.k, rows.k) < 0.03);
    CHECK(relative_error(back.v, rows.v) < 0.03);

    // turned, larger than the largest float
    const std::vector<float> huge(16 * dim, 2.9e38F);
    REQUIRE(here.encode(kernel::best(), g, block.data(), 0, 16, {huge.data(), dim}, {huge.data(), dim}) ==
            status::ok);
    here.decode(kernel::best(), g, block.data(), 0, 16, {back.k.data(), dim}, {back.v.data(), dim});
    CHECK(relative_error(back.k, huge) < 0.1);
  }
  REQUIRE_NOTHROW(kvcache::validate(rotated, shape));
  REQUIRE_THROWS_AS(kvcache::validate(rotated, {.num_layers = 1, .num_kv_heads = 2, .head_dim = dim}),
                    kvcache::shape_error);
  CHECK(kvcache::settings_bytes(rotated) == 2 * 2 * dim * dim * 4);
  matrices[7] += 0.1F;
  REQUIRE_THROWS_AS(codec::rotation_matrices(shape, matrices), kvcache::shape_error);
  matrices.pop_back();
  REQUIRE_THROWS_AS(codec::rotation_matrices(shape, matrices), kvcache::shape_error);
}

TEST_CASE("bytes of low-bit codecs are what the layout adds up to", "[codec]") {
  const block_geometry g{.block_size = 64, .head_dim = 128};
  CHECK(codec::rotated<4>{}.token_bytes(g) == 2 * (64 + 2));
  CHECK(codec::rotated<3>{}.token_bytes(g) == 2 * (48 + 2));
  CHECK(codec::rotated<2>{}.token_bytes(g) == 2 * (32 + 2));
  CHECK(codec::rotated<4>{}.block_bytes(g) == 64 * codec::rotated<4>{}.token_bytes(g));
  CHECK(codec::rotated<3>{}.block_bytes(g) == 64 * codec::rotated<3>{}.token_bytes(g));
  CHECK(codec::channel<4>{}.block_bytes(g) == 64 * (64 + 8 + 66));
  CHECK(codec::balanced<2>{}.block_bytes(g) == 2 * 64 * (32 + 8 + 2));
  CHECK((codec::mixed<codec::channel<4>, codec::rotated<2>>{}.block_bytes(g)) == 64 * (64 + 8 + 34));
  CHECK((codec::mixed<codec::channel<4>, codec::rotated<2>>::name) == "channel4+rotated2");
}
