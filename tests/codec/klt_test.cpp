// SPDX-License-Identifier: MIT
// klt: what bits buy on rows that are correlated, how they are shared out, rows unlike those of the calibration; scores and
// sums are those of the rows as they are read back.

#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/klt.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/kernel/select.hpp>

#include "codec/coded_blocks.hpp"
#include "codec/correlated_rows.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using kvcache::block_geometry;
using kvcache::cache_shape;
using kvcache::codec_at;
using kvcache::index_t;
using kvcache::shape_error;
using kvcache::status;
using test::aligned_floats;
using test::calibrated;
using test::correlated_rows;
using test::key_value_rows;
using test::relative_error;
using test::rows_of_head;
using test::through;
using test::zero_block;
namespace codec = kvcache::codec;
namespace kernel = kvcache::kernel;

namespace {

/// One block of one head's rows.
key_value_rows block_of_rows(const cache_shape& shape, index_t layer, index_t head, test::random& random) {
  const auto k = correlated_rows(shape, shape.block_size, test::of_layer(layer), random);
  const auto v = correlated_rows(shape, shape.block_size, test::of_layer(layer), random);
  return {rows_of_head(k, shape, head), rows_of_head(v, shape, head)};
}

/// Relative errors of keys and values, mean over layers, heads and blocks.
template <class Codec>
std::pair<double, double> mean_error(const cache_shape& shape, const Codec& whole, test::random& random) {
  constexpr int blocks = 5;
  const block_geometry g = kvcache::geometry_of(shape);
  double k = 0;
  double v = 0;
  for (int i = 0; i < blocks; ++i) {
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      for (index_t head = 0; head < shape.num_kv_heads; ++head) {
        const key_value_rows rows = block_of_rows(shape, layer, head, random);
        const key_value_rows back = through(g, rows, codec_at(whole, layer, head));
        k += relative_error(back.k, rows.k);
        v += relative_error(back.v, rows.v);
      }
    }
  }
  const auto count = static_cast<double>(blocks * shape.num_layers * shape.num_kv_heads);
  return {k / count, v / count};
}

/// Bits of a number, of the blocks of all layers together.
template <class Codec>
double bits_used(const cache_shape& shape, const Codec& codec) {
  double bytes = 0;
  for (index_t layer = 0; layer < shape.num_layers; ++layer)
    bytes += static_cast<double>(kvcache::block_bytes_at(codec, layer, kvcache::geometry_of(shape)));
  return 8 * bytes / static_cast<double>(shape.num_layers * 2 * shape.block_size * shape.head_dim);
}

index_t bits_of(const codec::low_rank_layout& layout) {
  return 8 * layout.int8 + 6 * layout.bits6 + 5 * layout.bits5 + 4 * layout.bits4 + 3 * layout.bits3 +
         2 * layout.bits2;
}

codec::klt klt_of(const codec::low_rank_calibration& seen, double bits) {
  return codec::klt(codec::klt_bases(seen, {.bits_per_value = bits, .all_sizes = true}));
}
codec::klt klt_of(const cache_shape& shape, double bits, test::random& random, bool queries = false) {
  return klt_of(calibrated(shape, random, queries), bits);
}

}  // namespace

TEST_CASE("klt has less than half the error of trellis on correlated rows, at the same bits", "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 2, .head_dim = 64};
  const auto check = [&]<int Bits>(const codec::trellis<Bits>& trellis) {
    const double bits = bits_used(shape, trellis);
    const codec::klt klt = klt_of(shape, bits, random);
    const auto plain = mean_error(shape, trellis, random);
    const auto error = mean_error(shape, klt, random);
    CAPTURE(Bits, bits, plain.first, plain.second, error.first, error.second);
    CHECK(bits_used(shape, klt) <= bits);
    CHECK(error.first < plain.first / 2);
    CHECK(error.second < plain.second / 2);
  };
  check(codec::trellis<4>{});
  check(codec::trellis<3>{});
  check(codec::trellis<2>{});
}

TEST_CASE("the best of three scales never loses more, takes no more bits, and comes back from settings",
          "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 64};
  const block_geometry g = kvcache::geometry_of(shape);
  const auto seen = calibrated(shape, random);
  for (const double bits : {2.25, 3.25, 4.5}) {
    CAPTURE(bits);
    const codec::klt usual(codec::klt_bases(seen, {.bits_per_value = bits}));
    const codec::klt best(codec::klt_bases(seen, {.bits_per_value = bits, .best_scales = true}));
    CHECK(bits_used(shape, best) == bits_used(shape, usual));
    const auto again = kvcache::make_described<codec::klt>(kvcache::describe(best), shape);
    double usual_error = 0;
    double best_error = 0;
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      key_value_rows rows = block_of_rows(shape, layer, 0, random);
      std::fill_n(rows.k.begin(), shape.head_dim, 0.0F);
      for (index_t d = 0; d < shape.head_dim; ++d) {
        rows.k[static_cast<std::size_t>(shape.head_dim + d)] *= 1e-30F;
        rows.k[static_cast<std::size_t>(2 * shape.head_dim + d)] *= 1e30F;
      }
      const auto plain = through(g, rows, codec_at(usual, layer, 0));
      const auto back = through(g, rows, codec_at(best, layer, 0));
      CHECK(through(g, rows, codec_at(again, layer, 0)).k == back.k);
      CHECK(through(g, rows, codec_at(again, layer, 0)).v == back.v);
      for (std::size_t i = 0; i < rows.v.size(); i += 64) {
        const auto error = [&](const std::vector<float>& of, const std::vector<float>& is) {
          double squares = 0;
          for (std::size_t d = i; d < i + 64; ++d) squares += std::pow(double{of[d]} - double{is[d]}, 2);
          return squares;
        };
        for (const bool is_k : {true, false}) {
          const double was = is_k ? error(rows.k, plain.k) : error(rows.v, plain.v);
          const double now = is_k ? error(rows.k, back.k) : error(rows.v, back.v);
          CHECK(now <= was * 1.01 + 1e-80);
          if (is_k) continue;  // some of which are huge
          usual_error += was;
          best_error += now;
        }
      }
    }
    CHECK(best_error < usual_error * 0.985);
  }
}

TEST_CASE("klt refuses layers of which only some have best_scales", "[codec]") {
  constexpr index_t dim = 16;
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = dim};
  codec::low_rank_matrices made;
  for (const bool best : {false, true}) made.key_layouts.push_back({.bits4 = dim, .best_scales = best});
  for (index_t i = 0; i < 2 * dim * dim; ++i) made.keys_in.push_back(i % (dim + 1) == 0 ? 1.0F : 0.5F);
  made.key_spreads.assign(2 * dim, 1.0F);
  codec::klt_keys keys;
  keys.bases = std::make_shared<const codec::low_rank_bases>(shape, made);
  CHECK_THROWS_AS(keys.validate(shape), kvcache::shape_error);
}

namespace {

/// Queries, or rows of output weights, of 32 dims that look at the second half of them ten times as hard.
std::vector<float> rows_that_look_right(index_t count, test::random& random) {
  std::vector<float> rows = random.floats(count * 32);
  for (std::size_t i = 0; i < rows.size(); ++i)
    if (i % 32 >= 16) rows[i] *= 10;
  return rows;
}

/// Squared error of the products of all `looking` rows with all rows, of 32 dims.
double error_of_products(const std::vector<float>& looking, const std::vector<float>& back,
                         const std::vector<float>& rows) {
  double sum = 0;
  for (std::size_t i = 0; i < looking.size(); i += 32) {
    for (std::size_t t = 0; t < rows.size(); t += 32) {
      double off = 0;
      for (std::size_t d = 0; d < 32; ++d)
        off += double{looking[i + d]} * (double{back[t + d]} - double{rows[t + d]});
      sum += off * off;
    }
  }
  return sum;
}

}  // namespace

TEST_CASE("moments of queries make scores better", "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 32};
  const block_geometry g = kvcache::geometry_of(shape);
  const auto k = correlated_rows(shape, 1000, {0.5F}, random);
  codec::low_rank_calibration seen(shape);
  seen.add(0, k, k);
  const codec::klt blind(codec::klt_bases(seen, {.bits_per_value = 2.5}));
  seen.add_queries(0, rows_that_look_right(500, random), 1);
  const codec::klt seeing(codec::klt_bases(seen, {.bits_per_value = 2.5}));

  const std::vector<float> q = rows_that_look_right(50, random);
  const key_value_rows rows = block_of_rows(shape, 0, 0, random);
  const auto error_of = [&](const codec::klt& klt) {
    return error_of_products(q, through(g, rows, codec_at(klt, 0, 0)).k, rows.k);
  };
  CHECK(error_of(seeing) < error_of(blind) * 0.6);
}

TEST_CASE("output weights make outputs better, and come back from settings", "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 32};
  const block_geometry g = kvcache::geometry_of(shape);
  const std::vector<float> weights = rows_that_look_right(50, random);
  const auto v = correlated_rows(shape, 1000, {0.5F}, random);
  codec::low_rank_calibration seen(shape);
  seen.add(0, v, v);
  const codec::klt blind(codec::klt_bases(seen, {.bits_per_value = 2.5}));
  seen.add_output_weights(0, weights, 1);
  const codec::klt seeing(codec::klt_bases(seen, {.bits_per_value = 2.5}));

  const key_value_rows rows = block_of_rows(shape, 0, 0, random);
  const auto error_of = [&](const codec::klt& klt) {
    return error_of_products(weights, through(g, rows, codec_at(klt, 0, 0)).v, rows.v);
  };
  CHECK(error_of(seeing) < error_of(blind) * 0.6);
  const auto again = kvcache::make_described<codec::klt>(kvcache::describe(seeing), shape);
  CHECK(through(g, rows, codec_at(again, 0, 0)).v == through(g, rows, codec_at(seeing, 0, 0)).v);
}

TEST_CASE("klt never takes more bits than it was given, and leaves few", "[codec]") {
  test::random random;
  for (const index_t dim : {64, 128}) {
    for (const index_t block_size : {64, 256}) {
      if (dim == 128 && block_size == 256) continue;  // calibrating takes long
      const cache_shape shape{.num_layers = 3, .num_kv_heads = 2, .head_dim = dim, .block_size = block_size};
      const auto seen = calibrated(shape, random);
      for (const double bits : {0.7, 1.5, 2.0, 2.75, 3.3, 4.25, 6.0, 8.0}) {
        CAPTURE(dim, block_size, bits);
        const auto even = codec::klt_bases(seen, {.bits_per_value = bits});
        for (const codec::low_rank_layout& layout : {even->key_layout(), even->value_layout()})
          CHECK(layout.bits5 + layout.bits3 == 0);
        const codec::klt klt(codec::klt_bases(seen, {.bits_per_value = bits, .all_sizes = true}));
        CHECK(bits_used(shape, klt) <= bits + 1e-9);
        CHECK(bits_used(shape, klt) > bits * 0.97);
        if (bits < 1.0) continue;
        const auto bases =
            codec::klt_bases(seen, {.bits_per_value = bits, .centred = true, .all_sizes = true});
        const codec::centred<codec::klt> centred({.head_dim = dim, .pairing = kvcache::rope_pairing::half},
                                                 codec::klt(bases));
        CHECK(bits_used(shape, centred) <= bits + 1e-9);
        CHECK(bits_used(shape, centred) > bits * 0.97);
      }
      const codec::klt most(codec::klt_bases(seen, {.bits_per_value = 100}));
      CHECK(bits_used(shape, most) == 8 + 8.0 / static_cast<double>(dim));
    }
  }
}

TEST_CASE("klt stores every dim of heads of any size when it has the bits", "[codec]") {
  test::random random;
  for (const index_t dim : {1, 2, 3, 4, 5, 7, 20, 31, 131}) {
    const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .block_size = 16};
    const codec::klt klt = klt_of(shape, 100, random);
    CAPTURE(dim);
    CHECK(klt.keys.bases->key_layout() == codec::low_rank_layout{.int8 = dim});
    CHECK(klt.keys.bases->value_layout() == codec::low_rank_layout{.int8 = dim});
    const auto error = mean_error(shape, klt, random);
    CHECK(error.first < 1e-3);
    CHECK(error.second < 1e-3);
  }
}

TEST_CASE("weights shift bits from layer to layer and from keys to values", "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 3, .num_kv_heads = 1, .head_dim = 32};
  const auto seen = calibrated(shape, random);
  const auto equal = codec::klt_bases(seen, {.bits_per_value = 3});
  const auto shifted =
      codec::klt_bases(seen, {.bits_per_value = 3, .key_weights = {1, 50, 1}, .value_weights = {0, 1, 0.02}});
  CHECK(bits_of(shifted->key_layout(1)) > bits_of(equal->key_layout(1)) + 32);
  CHECK(bits_of(shifted->value_layout(0)) < bits_of(equal->value_layout(0)));
  CHECK(bits_of(shifted->value_layout(2)) < bits_of(equal->value_layout(2)));
  CHECK(shifted->value_layout(0).rank() >= 4);  // of no weight, and still something
  const auto same =
      codec::klt_bases(seen, {.bits_per_value = 3, .key_weights = {7, 7, 7}, .value_weights = {7, 7, 7}});
  for (index_t layer = 0; layer < 3; ++layer) {
    CHECK(same->key_layout(layer) == equal->key_layout(layer));
    CHECK(same->value_layout(layer) == equal->value_layout(layer));
  }
}

TEST_CASE("options of klt that cannot be are refused", "[codec]") {
  test::random random;
  constexpr cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 16, .block_size = 16};
  const auto seen = calibrated(shape, random);
  const auto refused_for = [&](const codec::klt_options& options, const char* reason) {
    try {
      (void)codec::klt_bases(seen, options);
    } catch (const shape_error& error) {
      return std::string(error.what()).find(reason) != std::string::npos;
    }
    return false;
  };
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  CHECK(refused_for({}, "bits_per_value"));
  for (const double bits : {-3.0, 0.5, 0.9, double{nan}, -double{infinity}})
    CHECK(refused_for({.bits_per_value = bits}, "bits_per_value"));
  CHECK(refused_for({.bits_per_value = 1.4, .centred = true}, "bits_per_value"));
  for (const std::vector<double>& weights :
       {std::vector<double>{1}, {1, 2, 3}, {1, -1}, {1, nan}, {infinity, 1}}) {
    CHECK(refused_for({.bits_per_value = 4, .key_weights = weights}, "weights"));
    CHECK(refused_for({.bits_per_value = 4, .value_weights = weights}, "weights"));
  }
  CHECK(refused_for({.bits_per_value = 4, .ridge = -1}, "ridge"));
  CHECK(refused_for({.bits_per_value = 4, .ridge = nan}, "ridge"));
  CHECK_NOTHROW(codec::klt_bases(seen, {.bits_per_value = 4}));
  CHECK_THROWS_AS(kvcache::validate(codec::klt{}, shape), shape_error);
  CHECK_THROWS_AS(kvcache::validate(codec::klt(codec::klt_bases(seen, {.bits_per_value = 4})),
                                    {.num_layers = 1, .num_kv_heads = 1, .head_dim = 16}),
                  shape_error);
  // bases whose layouts have components that klt has not
  for (const codec::low_rank_layout& layout :
       {codec::low_rank_layout{.f32 = 2, .int8 = 4}, codec::low_rank_layout{.bf16 = 4}})
    CHECK_THROWS_AS(kvcache::validate(codec::klt(seen.bases({.layout = layout})), shape), shape_error);
  // and those that low_rank has not
  for (const codec::low_rank_layout& layout :
       {codec::low_rank_layout{.bits6 = 4}, codec::low_rank_layout{.int8 = 4, .bits5 = 4},
        codec::low_rank_layout{.bits4 = 4, .bits3 = 4}})
    CHECK_THROWS_AS(seen.bases({.layout = layout}), shape_error);
  CHECK_THROWS_AS(kvcache::validate(codec::low_rank(codec::klt_bases(seen, {.bits_per_value = 6})), shape),
                  shape_error);
  CHECK(refused_for({.bits_per_value = infinity}, "finite"));
  // a layer of which nothing was seen
  codec::low_rank_calibration half_seen(shape);
  half_seen.add(0, random.floats(64 * 16), random.floats(64 * 16));
  const auto names_layer = [](const auto& make) {
    try {
      make();
    } catch (const shape_error& error) {
      return std::string(error.what()).find("layer 1") != std::string::npos;
    }
    return false;
  };
  CHECK(names_layer([&] { (void)codec::klt_bases(half_seen, {.bits_per_value = 5}); }));
  CHECK(names_layer([&] { (void)codec::expected_errors(half_seen, {.bits_per_value = 5}); }));
  CHECK(names_layer([&] { (void)half_seen.bases({.rank = 4}); }));
}

// ---- attention over components against the rows they stand for ---------------------------------------------------------

namespace {

double product(const float* a, const float* b, index_t count) {
  double sum = 0;
  for (index_t d = 0; d < count; ++d) sum += double{a[d]} * double{b[d]};
  return sum;
}

/// The worst difference between scores and q . k, relative to |q| |k|.
double worst_score(const block_geometry& g, index_t count, index_t num_rows, const float* queries,
                   const std::vector<float>& k, const float* scores) {
  double worst = 0;
  for (index_t r = 0; r < num_rows; ++r) {
    const float* q = queries + r * g.head_dim;
    for (index_t t = 0; t < count; ++t) {
      const float* row = k.data() + t * g.head_dim;
      const double size = std::sqrt(product(q, q, g.head_dim) * product(row, row, g.head_dim));
      const double off = product(q, row, g.head_dim) - double{scores[r * g.block_size + t]};
      worst = std::max(worst, std::fabs(off) / (size + 1e-20));
    }
  }
  return worst;
}

/// The worst difference between sums and the sum of weighted rows, relative to the sum of their sizes.
double worst_sum(const block_geometry& g, index_t count, index_t num_rows, const float* weights,
                 const std::vector<float>& v, const float* sums) {
  double worst = 0;
  for (index_t r = 0; r < num_rows; ++r) {
    std::vector<double> expected(static_cast<std::size_t>(g.head_dim));
    double size = 1e-20;
    for (index_t t = 0; t < count; ++t) {
      const float* row = v.data() + t * g.head_dim;
      const double weight = weights[r * g.block_size + t];
      size += weight * std::sqrt(product(row, row, g.head_dim));
      for (std::size_t d = 0; d < expected.size(); ++d) expected[d] += weight * double{row[d]};
    }
    double off = 0;
    for (std::size_t d = 0; d < expected.size(); ++d)
      off += std::pow(expected[d] - double{sums[r * g.head_dim + static_cast<index_t>(d)]}, 2);
    worst = std::max(worst, std::sqrt(off) / size);
  }
  return worst;
}

/// Scores and sums of one head's codec on every level, against its own decoded rows.
template <class Codec>
void check_attention(const cache_shape& shape, const Codec& codec, const key_value_rows& rows,
                     test::random& random) {
  const block_geometry g = kvcache::geometry_of(shape);
  const index_t dim = g.head_dim;
  const auto block = zero_block(g, codec);
  REQUIRE(codec.encode(kernel::best(), g, block.data(), 0, g.block_size, {rows.k.data(), dim},
                       {rows.v.data(), dim}) == status::ok);
  key_value_rows back{std::vector<float>(rows.k.size()), std::vector<float>(rows.v.size())};
  codec.decode(kernel::best(), g, block.data(), 0, g.block_size, {back.k.data(), dim}, {back.v.data(), dim});
  for (const index_t num_rows : {1, 3, 8, 17}) {
    aligned_floats queries(num_rows * dim);
    const auto q =
        correlated_rows({.num_layers = 1, .num_kv_heads = 1, .head_dim = dim}, num_rows, {0.5F}, random);
    std::copy(q.begin(), q.end(), queries.data());
    for (const index_t count : {1, 15, 16, 17, 63, 64, 256}) {
      if (count > g.block_size) continue;
      aligned_floats weights(num_rows * g.block_size);
      for (index_t r = 0; r < num_rows; ++r) {
        for (index_t t = 0; t < count; ++t)
          weights.data()[r * g.block_size + t] = random.chance(0.1) ? 0.0F : random.uniform(0, 1);
      }
      for (const kernel::isa level : kernel::available()) {
        CAPTURE(num_rows, count, kernel::to_string(level), dim, g.block_size);
        const kernel::table& kernels = kernel::select(level);
        aligned_floats prepared(num_rows * codec.prepared_floats(g));
        aligned_floats scores(num_rows * g.block_size);
        const float* made = codec.prepare(kernels, g, queries.data(), num_rows, prepared.data());
        codec.scores(kernels, g, block.data(), count, made, num_rows, scores.data(), nullptr);
        // queries and weights are bytes on some levels: 1/254 of a group's largest number
        REQUIRE(worst_score(g, count, num_rows, queries.data(), back.k, scores.data()) < 0.02);
        aligned_floats sums(num_rows * dim);
        codec.accumulate(kernels, g, block.data(), count, weights.data(), num_rows, sums.data(), nullptr);
        codec.finish(kernels, g, num_rows, sums.data());
        REQUIRE(worst_sum(g, count, num_rows, weights.data(), back.v, sums.data()) < 0.02);
      }
    }
  }
}

}  // namespace

TEST_CASE("scores and sums of klt are those of the rows that are read back", "[codec]") {
  test::random random;
  for (const index_t dim : {4, 20, 64, 72, 128, 131}) {
    for (const index_t block_size : {16, 64, 256}) {
      if (block_size == 256 && dim != 72) continue;  // takes long
      if (block_size == 64 && dim != 20 && dim != 128) continue;
      const cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = dim, .block_size = block_size};
      const auto seen = calibrated(shape, random);
      const auto with_queries = calibrated(shape, random, true);
      for (const double bits : {2.5, 3.5, 100.0}) {
        const double least = dim == 4 ? 4.0 : 0.0;
        const codec::klt klt =
            klt_of(bits > 3 ? with_queries : seen, std::max(bits, least) + 16.0 / static_cast<double>(dim));
        const key_value_rows rows = block_of_rows(shape, 1, 1, random);
        CAPTURE(bits);
        check_attention(shape, codec_at(klt, 1, 1), rows, random);
        if (dim % 2 != 0 || block_size == 256) continue;
        const codec::centred<codec::klt> centred({.head_dim = dim, .pairing = kvcache::rope_pairing::half},
                                                 klt);
        check_attention(shape, codec_at(centred, 1, 1), rows, random);
      }
    }
  }
}

TEST_CASE("klt blocks are the same bytes on every instruction set", "[codec]") {
  test::random random;
  for (const index_t dim : {4, 15, 20, 64, 131}) {
    const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .block_size = 32};
    for (const double bits : {2.0, 4.0, 9.0}) {
      const auto klt = codec_at(klt_of(shape, bits + 16.0 / static_cast<double>(dim), random), 0, 0);
      const key_value_rows rows = block_of_rows(shape, 0, 0, random);
      const auto encoded = [&](const auto& codec, const kernel::table& kernels) {
        auto block = zero_block(kvcache::geometry_of(shape), codec);
        REQUIRE(codec.encode(kernels, kvcache::geometry_of(shape), block.data(), 0, 32, {rows.k.data(), dim},
                             {rows.v.data(), dim}) == status::ok);
        return block;
      };
      const auto check = [&](const auto& codec) {
        const auto expected = encoded(codec, kernel::select(kernel::isa::portable));
        for (const kernel::isa level : kernel::available()) {
          CAPTURE(dim, bits, kernel::to_string(level));
          const auto got = encoded(codec, kernel::select(level));
          REQUIRE(std::memcmp(got.data(), expected.data(), static_cast<std::size_t>(got.size())) == 0);
        }
      };
      check(klt);
      codec::centred<codec::klt> centred;
      centred.keys.rest = klt.keys;
      centred.values = klt.values;
      check(centred);
    }
  }
}

// ---- rows unlike those of the calibration ------------------------------------------------------------------------------

TEST_CASE("special rows of klt", "[codec]") {
  test::random random;
  for (const index_t dim : {4, 20, 64, 131}) {
    const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .block_size = 16};
    const block_geometry g = kvcache::geometry_of(shape);
    const auto n = static_cast<std::size_t>(16 * dim);
    for (const double bits : {4.5, 9.0}) {
      const auto klt = codec_at(klt_of(shape, bits + 16.0 / static_cast<double>(dim), random), 0, 0);
      CAPTURE(dim, bits);
      const auto zeros = through(g, {std::vector<float>(n), std::vector<float>(n)}, klt);
      CHECK(std::all_of(zeros.k.begin(), zeros.k.end(), [](float x) { return x == 0.0F; }));
      CHECK(std::all_of(zeros.v.begin(), zeros.v.end(), [](float x) { return x == 0.0F; }));
      for (const float size : {1.0F, 1e30F, 1e-30F, 3e37F}) {
        CAPTURE(size);
        key_value_rows rows = block_of_rows(shape, 0, 0, random);
        for (auto* side : {&rows.k, &rows.v})
          for (float& x : *side) x *= size;
        const auto back = through(g, rows, klt);
        const double cut_off =
            size < 1e37F ? 0.05 : 1.0;  // of a row whose first components are beyond the scales
        CHECK(relative_error(back.k, rows.k) < cut_off);
        CHECK(relative_error(back.v, rows.v) < cut_off);
        // white noise, and rows that are constant
        key_value_rows noise{random.floats(16 * dim), std::vector<float>(n, size)};
        for (float& x : noise.k) x *= size;
        const auto same = through(g, noise, klt);
        // what has no bits is lost, and what passes the largest scale is cut off
        const double most = bits > 8 && size < 1e37F ? 0.05 : 1.0;
        CHECK(relative_error(same.k, noise.k) < most);
        CHECK(relative_error(same.v, noise.v) < most);
      }
      key_value_rows lone{std::vector<float>(n), std::vector<float>(n, 1e-41F)};
      std::fill_n(lone.k.begin() + 3 * dim, dim, 5.0F);
      const auto back = through(g, lone, klt);
      for (const float x : back.k) CHECK(std::fabs(x) < 15);
      for (const float x : back.v) CHECK(x == 0.0F);  // far below the least scale
    }
  }
}

TEST_CASE("rows orthogonal to those of the calibration do no worse than zeros would", "[codec]") {
  test::random random;
  for (const index_t dim : {20, 64, 128}) {
    const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .block_size = 16};
    const block_geometry g = kvcache::geometry_of(shape);
    // all but nothing of what was seen lies in the second half of the dims
    std::vector<float> seen_rows = random.floats(40 * dim * dim);
    const float small = GENERATE(0.0F, 1e-3F, 0.03F);
    for (std::size_t i = 0; i < seen_rows.size(); ++i)
      if (static_cast<index_t>(i) % dim >= dim / 2) seen_rows[i] *= small;
    codec::low_rank_calibration seen(shape);
    seen.add(0, seen_rows, seen_rows);
    for (const double bits : {3.0, 5.0, 9.0}) {
      const auto klt = codec_at(codec::klt(codec::klt_bases(seen, {.bits_per_value = bits})), 0, 0);
      for (const float size : {1.0F, 3e37F, 1e-30F}) {
        key_value_rows rows{random.floats(16 * dim), random.floats(16 * dim)};
        for (std::size_t i = 0; i < rows.k.size(); ++i) {
          const bool unseen = static_cast<index_t>(i) % dim >= dim / 2;
          rows.k[i] *= unseen ? size : 0.0F;
          rows.v[i] *= static_cast<index_t>(i) % dim == dim - 1 ? size : 0.0F;
        }
        const auto back = through(g, rows, klt);
        CAPTURE(dim, small, bits, size, klt.keys.bases->key_layout().rank());
        CHECK(std::all_of(back.k.begin(), back.k.end(), [](float x) { return std::isfinite(x); }));
        CHECK(std::all_of(back.v.begin(), back.v.end(), [](float x) { return std::isfinite(x); }));
        CHECK(relative_error(back.k, rows.k) < 1.3);
        CHECK(relative_error(back.v, rows.v) < 1.3);
      }
    }
  }
}

TEST_CASE("bases at their limits lead to finite components", "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 16, .block_size = 16};
  const block_geometry g = kvcache::geometry_of(shape);
  for (const float spread : {1e-15F, 1.0F, 1e15F}) {
    for (const float size : {0.0F, 1e-40F, 1.0F, 1e15F}) {
      codec::low_rank_matrices made{
          .key_layout = {.int8 = 3, .bits6 = 3, .bits5 = 3, .bits4 = 3, .bits3 = 2, .bits2 = 2}};
      made.value_layout = made.key_layout;
      for (index_t i = 0; i < 16 * 16; ++i) made.keys_in.push_back(random.uniform(-1, 1) * size);
      made.values = made.keys_in;
      made.key_spreads.assign(16, spread);
      made.value_spreads.assign(16, spread);
      const codec::klt klt(std::make_shared<const codec::low_rank_bases>(shape, made));
      const auto of_head = codec_at(klt, 0, 0);
      const key_value_rows rows{random.floats(16 * 16), random.floats(16 * 16)};
      const auto block = zero_block(g, of_head);
      CAPTURE(spread, size);
      REQUIRE(of_head.encode(kernel::best(), g, block.data(), 0, 16, {rows.k.data(), 16},
                             {rows.v.data(), 16}) == status::ok);
      key_value_rows back{std::vector<float>(256), std::vector<float>(256)};
      of_head.decode(kernel::best(), g, block.data(), 0, 16, {back.k.data(), 16}, {back.v.data(), 16});
      CHECK(std::all_of(back.k.begin(), back.k.end(), [](float x) { return std::isfinite(x); }));
      CHECK(std::all_of(back.v.begin(), back.v.end(), [](float x) { return std::isfinite(x); }));
    }
  }
}

TEST_CASE("groups that would be multiplied beyond the largest head_dim are refused", "[codec]") {
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 512, .block_size = 16};
  const auto klt_with = [&](const codec::low_rank_layout& layout) {
    codec::low_rank_matrices made{.key_layout = layout, .value_layout = layout};
    made.keys_in.assign(static_cast<std::size_t>(512 * layout.rank()), 0.01F);
    made.values = made.keys_in;
    made.key_spreads.assign(static_cast<std::size_t>(layout.rank()), 1.0F);
    made.value_spreads = made.key_spreads;
    return codec::klt(std::make_shared<const codec::low_rank_bases>(shape, made));
  };
  CHECK_NOTHROW(kvcache::validate(klt_with({.int8 = 4, .bits6 = 508}), shape));
  CHECK_THROWS_AS(kvcache::validate(klt_with({.int8 = 1, .bits6 = 511}), shape), shape_error);
}

TEST_CASE("klt is calibrated on rows of any size", "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .block_size = 16};
  const block_geometry g = kvcache::geometry_of(shape);
  for (const float size : {1e-20F, 1e-12F, 1e-3F, 1e12F, 1e17F}) {
    auto rows = correlated_rows(shape, 2000, test::of_layer(0), random);
    for (float& x : rows) x *= size;
    codec::low_rank_calibration seen(shape);
    seen.add(0, rows, rows);
    const auto klt = codec_at(codec::klt(codec::klt_bases(seen, {.bits_per_value = 4})), 0, 0);
    const std::vector<float> first(rows.begin(), rows.begin() + 16 * 64);
    const key_value_rows back = through(g, {first, first}, klt);
    CAPTURE(size);
    // beyond what spreads can say, scales lie in coarse steps
    const double most = size >= 1e-12F && size <= 1e12F ? 0.03 : 0.3;
    CHECK(relative_error(back.k, first) < most);
    CHECK(relative_error(back.v, first) < most);
  }
}

TEST_CASE("scales of klt are rounded up, by little around those of the calibration", "[codec]") {
  const auto scale_of = [](int code) {
    return double{kvcache::to_float(codec::detail::klt_scales[static_cast<std::size_t>(code)])} *
           double{codec::detail::klt_scale_divisor};
  };
  CHECK(scale_of(0) == 0.0);
  CHECK(scale_of(128) == 1.0);
  constexpr double none = 1e300;
  const auto code_of = [](double x, double limit) {
    return codec::detail::klt_scale_code(x / double{codec::detail::klt_scale_divisor}, limit);
  };
  for (int code = 1; code < 256; ++code) {
    CAPTURE(code);
    CHECK(std::isfinite(scale_of(code)));
    CHECK(scale_of(code) > scale_of(code - 1));
    CHECK(code_of(scale_of(code), none) == code);
    if (code > 1) CHECK(code_of(scale_of(code - 1) * 1.0001, none) == code);
    if (code > 64 && code <= 192) CHECK(scale_of(code) < scale_of(code - 1) * 1.07);
    if (code > 1) CHECK(scale_of(code) < scale_of(code - 1) * 4);
  }
  CHECK(code_of(0, none) == 0);
  CHECK(code_of(1e-40, none) == 0);
  CHECK(code_of(scale_of(1) / 2, none) == 1);
  CHECK(code_of(1e60, none) == 255);
  CHECK(code_of(std::numeric_limits<double>::infinity(), none) == 255);
  CHECK(scale_of(code_of(1e30, 1e10)) <= 1e10 * double{codec::detail::klt_scale_divisor});

  test::random random;
  for (const bool near : {true, false}) {
    std::vector<std::byte> codes(192);
    for (std::byte& code : codes)
      code = static_cast<std::byte>(near ? random.between(64, 191) : random.below(256));
    for (const index_t count : {1, 16, 17, 64}) {
      const codec::detail::klt_scale_run run(codes.data(), 64, count);
      for (index_t t = 0; t < count; ++t)
        CHECK(kvcache::to_float(run.data()[t]) * codec::detail::klt_scale_divisor ==
              static_cast<float>(scale_of(std::to_integer<int>(codes[static_cast<std::size_t>(64 + t)]))));
    }
  }
}

TEST_CASE("klt refuses rows that are not finite and writes nothing", "[codec]") {
  test::random random;
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 20, .block_size = 16};
  const block_geometry g = kvcache::geometry_of(shape);
  const auto klt = codec_at(klt_of(shape, 4, random), 0, 0);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const bool in_keys : {true, false}) {
      key_value_rows rows = block_of_rows(shape, 0, 0, random);
      (in_keys ? rows.k : rows.v)[301] = bad;
      const auto block = zero_block(g, klt);
      REQUIRE(klt.encode(kernel::best(), g, block.data(), 0, 16, {rows.k.data(), 20}, {rows.v.data(), 20}) ==
              status::not_finite);
      REQUIRE(std::all_of(block.data(), block.data() + block.size(),
                          [](std::byte b) { return b == std::byte{0}; }));
    }
  }
}

TEST_CASE("move_row of klt copies exactly and nothing else", "[codec]") {
  test::random random;
  for (const index_t dim : {20, 64, 131}) {
    const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .block_size = 64};
    const block_geometry g = kvcache::geometry_of(shape);
    const auto klt = codec_at(klt_of(shape, 3, random), 0, 0);
    const auto a = block_of_rows(shape, 0, 0, random);
    const auto b = block_of_rows(shape, 0, 0, random);
    const auto encoded = [&](const key_value_rows& rows) {
      auto block = zero_block(g, klt);
      REQUIRE(klt.encode(kernel::best(), g, block.data(), 0, 64, {rows.k.data(), dim},
                         {rows.v.data(), dim}) == status::ok);
      return block;
    };
    const auto from = encoded(a);
    const auto to = encoded(b);
    key_value_rows mixed = b;
    for (index_t i = 0; i < 20; ++i) {
      const index_t from_slot = random.below(64);
      const index_t to_slot = random.below(64);
      klt.move_token(g, from.data(), from_slot, to.data(), to_slot);
      std::copy_n(a.k.begin() + from_slot * dim, dim, mixed.k.begin() + to_slot * dim);
      std::copy_n(a.v.begin() + from_slot * dim, dim, mixed.v.begin() + to_slot * dim);
    }
    const auto expected = encoded(mixed);
    CAPTURE(dim);
    CHECK(std::memcmp(to.data(), expected.data(), static_cast<std::size_t>(to.size())) == 0);
  }
}

// ---- settings ----------------------------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("settings of klt come back, and others are refused or do no harm", "[codec]", codec::klt,
                   codec::centred<codec::klt>) {
  test::random random;
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 12, .block_size = 16};
  const block_geometry g = kvcache::geometry_of(shape);
  const codec::klt klt = klt_of(shape, 4, random, true);
  TestType codec;
  if constexpr (std::is_same_v<TestType, codec::klt>) {
    codec = klt;
  } else {
    codec = TestType({.head_dim = 12, .pairing = kvcache::rope_pairing::interleaved}, klt);
  }
  const kvcache::codec_description described = kvcache::describe(codec);
  const auto again = kvcache::make_described<TestType>(described, shape);
  CHECK(kvcache::describe(again) == described);
  for (index_t layer = 0; layer < 2; ++layer) {
    const key_value_rows rows = block_of_rows(shape, layer, 0, random);
    const auto back = through(g, rows, codec_at(codec, layer, 0));
    const auto same = through(g, rows, codec_at(again, layer, 0));
    CHECK(back.k == same.k);
    CHECK(back.v == same.v);
  }
  for (const bool in_keys : {true, false}) {
    const auto side = [in_keys](kvcache::codec_description& of) -> kvcache::side_description& {
      return in_keys ? of.keys : of.values;
    };
    auto changed = described;
    const std::size_t size = side(changed).settings.size();
    for (std::size_t cut = 0; cut < size; ++cut) {
      changed = described;
      side(changed).settings.resize(cut);
      CHECK_THROWS_AS(kvcache::make_described<TestType>(changed, shape), shape_error);
    }
    changed = described;
    side(changed).settings.push_back(std::byte{0});
    CHECK_THROWS_AS(kvcache::make_described<TestType>(changed, shape), shape_error);
    const key_value_rows rows = block_of_rows(shape, 0, 0, random);
    for (std::size_t i = 0; i < size; ++i) {
      changed = described;
      side(changed).settings[i] ^= static_cast<std::byte>(1U << static_cast<unsigned>(random.below(8)));
      try {
        const auto other = kvcache::make_described<TestType>(changed, shape);
        kvcache::validate(other, shape);
        (void)through(g, rows, codec_at(other, 0, 0));
      } catch (const shape_error&) {
      }
    }
  }
}
