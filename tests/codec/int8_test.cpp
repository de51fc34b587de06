// SPDX-License-Identifier: MIT
// int8: its error, the rows that are special, and attention over it on every instruction set.
#include "codec/attention_bounds.hpp"

#include <kvcache/codec/int8.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/portable.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

using namespace attention_test;
using kvcache::block_geometry;
using kvcache::status;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

/// Stores rows as keys and, in reverse order of dims, as values; reads them back.
struct round_trip {
  std::vector<float> k;
  std::vector<float> v;
};

round_trip through(const std::vector<float>& rows, index_t head_dim, const kvcache::kernel::table& kernels) {
  const auto count = static_cast<index_t>(rows.size()) / head_dim;
  const block_geometry g{64, head_dim};
  const kvcache::memory_block block(codec::int8{}.block_bytes(g), kvcache::huge_page_resource());
  round_trip r{std::vector<float>(rows.size()), std::vector<float>(rows.size())};
  std::vector<float> values(rows.rbegin(), rows.rend());
  REQUIRE(codec::int8{}.encode(kernels, g, block.data(), 0, count, {rows.data(), head_dim},
                               {values.data(), head_dim}) == status::ok);
  codec::int8{}.decode(kernels, g, block.data(), 0, count, {r.k.data(), head_dim}, {r.v.data(), head_dim});
  std::reverse(r.v.begin(), r.v.end());
  return r;
}

std::vector<const kvcache::kernel::table*> tables() {
  std::vector<const kvcache::kernel::table*> all;
  for (const auto level : kvcache::kernel::available()) all.push_back(&kvcache::kernel::select(level));
  return all;
}

}  // namespace

TEST_CASE("int8 loses what it says on normally distributed rows", "[codec]") {
  test::random random;
  double error = 0;
  double size = 0;
  for (int i = 0; i < 200; ++i) {
    const std::vector<float> rows = random.floats(64 * 128);
    const round_trip r = through(rows, 128, kvcache::kernel::best());
    REQUIRE(r.k == r.v);
    for (std::size_t j = 0; j < rows.size(); ++j) {
      error += std::pow(static_cast<double>(r.k[j]) - static_cast<double>(rows[j]), 2);
      size += std::pow(static_cast<double>(rows[j]), 2);
    }
  }
  CAPTURE(error / size);
  CHECK(error / size < 4.5e-5);
  CHECK(error / size > 3.5e-5);  // or the measurement is wrong
}

TEST_CASE("int8 keeps zero, constant, huge and tiny rows", "[codec]") {
  for (const auto* kernels : tables()) {
    for (const index_t head_dim : {1, 2, 3, 5, 16, 17, 80, 128, 512}) {
      CAPTURE(std::string(kvcache::kernel::to_string(kernels->level)), head_dim);
      const auto n = static_cast<std::size_t>(head_dim);
      for (const float x :
           {0.0F, -0.0F, 1.0F, -3.5F, 3e38F, -std::numeric_limits<float>::max(), 1e-30F, 1e-38F}) {
        CAPTURE(x);
        const round_trip r = through(std::vector<float>(n, x), head_dim, *kernels);
        for (const float y : r.k) REQUIRE(std::fabs(y - x) <= std::fabs(x) * 0.008F);
        REQUIRE(r.k == r.v);
      }
    }
  }
}

TEST_CASE("int8 is off by half a step at most, and the same on every instruction set", "[codec]") {
  test::random random;
  for (const index_t head_dim : {1, 7, 16, 33, 128}) {
    std::vector<float> rows = random.floats(64 * head_dim);
    for (std::size_t i = 0; i < rows.size(); ++i)
      rows[i] *= std::exp2(static_cast<float>(i / 37 % 40) - 20.0F);
    const round_trip expected = through(rows, head_dim, kvcache::kernel::portable::kernels);
    for (std::size_t first = 0; first < rows.size(); first += static_cast<std::size_t>(head_dim)) {
      float largest = 0;
      for (std::size_t i = first; i < first + static_cast<std::size_t>(head_dim); ++i)
        largest = std::max(largest, std::fabs(rows[i]));
      for (std::size_t i = first; i < first + static_cast<std::size_t>(head_dim); ++i)
        REQUIRE(std::fabs(rows[i] - expected.k[i]) <= 0.504F * largest / 127);
    }
    for (const auto* kernels : tables()) {
      CAPTURE(std::string(kvcache::kernel::to_string(kernels->level)), head_dim);
      REQUIRE(through(rows, head_dim, *kernels).k == expected.k);
    }
  }
}

TEST_CASE("int8 refuses what is not finite and writes nothing", "[codec]") {
  for (const auto* kernels : tables()) {
    for (const index_t head_dim : {1, 16, 37}) {
      for (const float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
        for (const bool in_keys : {false, true}) {
          CAPTURE(std::string(kvcache::kernel::to_string(kernels->level)), head_dim, bad, in_keys);
          const block_geometry g{16, head_dim};
          const kvcache::memory_block block(codec::int8{}.block_bytes(g), kvcache::huge_page_resource());
          std::memset(block.data(), 0x33, static_cast<std::size_t>(block.size()));
          const std::vector<float> good(static_cast<std::size_t>(3 * head_dim), 1.0F);
          std::vector<float> poisoned = good;
          poisoned.back() = bad;
          const std::vector<float>& k = in_keys ? poisoned : good;
          const std::vector<float>& v = in_keys ? good : poisoned;
          REQUIRE(codec::int8{}.encode(*kernels, g, block.data(), 2, 3, {k.data(), head_dim},
                                       {v.data(), head_dim}) == status::not_finite);
          REQUIRE(std::all_of(block.data(), block.data() + block.size(),
                              [](std::byte b) { return b == std::byte{0x33}; }));
        }
      }
    }
  }
  kvcache::contiguous_cache<codec::int8> cache({.num_layers = 1, .num_kv_heads = 2, .head_dim = 4});
  std::vector<float> rows(8 * 20, 1.0F);
  cache[0].append(rows, rows);
  std::vector<float> poisoned = rows;
  poisoned[8 * 19 + 5] = infinity;
  REQUIRE(cache[0].try_append(rows, poisoned) == status::not_finite);
  REQUIRE(cache.size() == 20);
  cache.check();
}

TEST_CASE("attention over int8 is attention over what it stored", "[codec]") {
  // Integer dot products take queries as 15 bits relative to their largest number, weights as 16: on random rows much less
  // than the bound of attend, next to the half step of 1/254 that the codec itself takes nothing.
  test::random random;
  for (problem& p : varied_problems(random)) {
    for (const index_t block_size : {16, 64, 256}) {
      const auto cache = filled<kvcache::paged_cache<codec::int8>>(p, block_size);
      problem stored = p;
      cache[0].copy_out(0, p.n.kv_len, stored.k, stored.v);
      REQUIRE(stored.k == oracle::stored_rows(p.k, p.n.head_dim, "int8"));
      REQUIRE(stored.v == oracle::stored_rows(p.v, p.n.head_dim, "int8"));
      require_within_bounds(p, cache[0]);
      for (const auto* kernels : tables()) {
        CAPTURE(std::string(kvcache::kernel::to_string(kernels->level)), p.n.kv_len, p.n.head_dim,
                block_size);
        p.options.kernel = kernels;
        require_close(computed(p, cache[0]), expected(p, "int8"), 50);
      }
    }
  }
}

TEST_CASE("hidden tokens of int8 do not matter", "[codec]") {
  test::random random;
  problem p =
      make_problem(random, {.q_len = 6, .kv_len = 90, .num_q_heads = 8, .num_kv_heads = 2, .head_dim = 18});
  p.q_positions = {80, 81, 82, 83, 84, 85};
  problem other = p;
  for (std::size_t i = 86 * 2 * 18; i < other.k.size(); ++i) other.k[i] = other.v[i] = 3e37F;
  for (const auto* kernels : tables()) {
    CAPTURE(std::string(kvcache::kernel::to_string(kernels->level)));
    p.options.kernel = other.options.kernel = kernels;
    require_same_bits(computed(p, filled<kvcache::contiguous_cache<codec::int8>>(p, 64)[0]),
                      computed(other, filled<kvcache::contiguous_cache<codec::int8>>(other, 64)[0]));
  }
}

TEST_CASE("keys without their mean keep more of what differs between them", "[codec]") {
  test::random random;
  const kvcache::cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};
  const index_t token = shape.num_kv_heads * shape.head_dim;
  std::vector<std::vector<float>> keys;
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    keys.push_back(random.floats(50 * token));
    for (std::size_t i = 0; i < keys.back().size(); ++i) keys.back()[i] += i % 20 == 7 ? 40.0F : 0.0F;
  }
  codec::int8 centred;
  centred.keys.means = std::make_shared<const codec::key_means>(codec::key_means::of(shape, keys));

  const auto error = [&](const codec::int8& codec) {
    kvcache::chunked_cache<codec::int8> cache(shape, codec);
    std::vector<float> k(keys[1].size());
    std::vector<float> v(k.size());
    cache[1].append(keys[1], keys[1]);
    cache[1].copy_out(0, 50, k, v);
    double sum = 0;
    for (std::size_t i = 0; i < k.size(); ++i) sum += std::pow(double{k[i]} - double{keys[1][i]}, 2);

    // attention and its log-sum-exp are those over the keys that are read back
    const std::vector<float> q = random.floats(2 * token);
    std::vector<float> out(q.size());
    std::vector<float> plain_out(q.size());
    std::vector<float> lse(4);
    std::vector<float> plain_lse(4);
    attend(q, cache[1], out, {.scale = 0.05F, .lse = lse});
    kvcache::chunked_cache<codec::f32> plain(shape);
    plain[1].append(k, v);
    attend(q, plain[1], plain_out, {.scale = 0.05F, .lse = plain_lse});
    for (std::size_t i = 0; i < out.size(); ++i) CHECK(std::fabs(out[i] - plain_out[i]) < 2e-3);
    for (std::size_t i = 0; i < lse.size(); ++i) CHECK(std::fabs(lse[i] - plain_lse[i]) < 2e-3);
    return sum;
  };
  CHECK(error(centred) < error(codec::int8{}) / 30);

  CHECK(kvcache::chunked_cache<codec::int8>(shape, centred).bytes().total == 2 * token * 4);
  REQUIRE_THROWS_AS(
      kvcache::chunked_cache<codec::int8>({.num_layers = 2, .num_kv_heads = 1, .head_dim = 40}, centred),
      kvcache::shape_error);

  std::vector<float> means(static_cast<std::size_t>(2 * token), 1.0F);
  REQUIRE_NOTHROW(codec::key_means(shape, means));
  means[3] = std::numeric_limits<float>::infinity();
  REQUIRE_THROWS_AS(codec::key_means(shape, means), kvcache::shape_error);
  means.pop_back();
  REQUIRE_THROWS_AS(codec::key_means(shape, means), kvcache::shape_error);
  keys.pop_back();
  REQUIRE_THROWS_AS(codec::key_means::of(shape, keys), kvcache::shape_error);
}

TEST_CASE("keys whose distance from the mean is beyond float are cut off", "[codec]") {
  const kvcache::cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 4, .block_size = 16};
  kvcache::codec::int8 codec;
  codec.keys.means =
      std::make_shared<const kvcache::codec::key_means>(shape, std::vector<float>{-2e38F, 0, 0, 0});
  kvcache::chunked_cache<kvcache::codec::int8> cache(shape, codec);
  cache[0].append(std::vector<float>{2e38F, 1, 2, 3}, std::vector<float>{1, 2, 3, 4});
  std::vector<float> k(4);
  std::vector<float> v(4);
  cache[0].copy_out(0, 1, k, v);
  for (const float x : k) CHECK(std::isfinite(x));
  CHECK(k[0] > 1e38F);
  constexpr kvcache::index_t huge = kvcache::index_t{1} << 40;
  CHECK_THROWS_AS(kvcache::codec::key_means({.num_layers = huge, .num_kv_heads = huge, .head_dim = 64}, {}),
                  kvcache::shape_error);
}
