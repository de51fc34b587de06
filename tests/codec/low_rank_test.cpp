// SPDX-License-Identifier: MIT
// low_rank: errors against the Eckart-Young bound from an SVD of the rows themselves, in double; attention over components
// against attention over the rows they stand for; options, bytes, rows that are special.

#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/kernel/select.hpp>

#include "codec/coded_attention.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <Eigen/SVD>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

using kvcache::block_geometry;
using kvcache::cache_shape;
using kvcache::index_t;
using kvcache::status;
namespace codec = kvcache::codec;
namespace kernel = kvcache::kernel;
using codec::component_store;
using codec::low_rank_bases;
using codec::low_rank_options;
using test::attention_error;

namespace {

using matrix = Eigen::MatrixXd;

/// Rows whose components fall off: x = M y, y_i ~ decay^i, M the same for all rows.
std::vector<float> rows_of(index_t count, index_t dim, double decay, test::random& random) {
  const std::vector<float> mix = random.floats(dim * dim);
  std::vector<float> rows;
  for (index_t t = 0; t < count; ++t) {
    std::vector<double> x(static_cast<std::size_t>(dim));
    double size = 1;
    for (index_t i = 0; i < dim; ++i, size *= decay) {
      const double y = size * double{random.normal()};
      for (index_t d = 0; d < dim; ++d)
        x[static_cast<std::size_t>(d)] += y * double{mix[static_cast<std::size_t>(i * dim + d)]};
    }
    for (const double number : x) rows.push_back(static_cast<float>(number));
  }
  return rows;
}

/// The same for every head and layer of a shape, each with a spectrum of its own: [layers, tokens, heads, dim].
std::vector<float> sample_of(const cache_shape& shape, index_t tokens, double decay, test::random& random) {
  const auto size = static_cast<std::size_t>(shape.num_layers * tokens * shape.num_kv_heads * shape.head_dim);
  std::vector<float> all(size);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    for (index_t head = 0; head < shape.num_kv_heads; ++head) {
      const std::vector<float> rows = rows_of(tokens, shape.head_dim, decay, random);
      for (index_t t = 0; t < tokens; ++t)
        std::copy_n(rows.begin() + t * shape.head_dim, shape.head_dim,
                    all.begin() + ((layer * tokens + t) * shape.num_kv_heads + head) * shape.head_dim);
    }
  }
  return all;
}

matrix wide(const std::vector<float>& rows, index_t dim) {
  return Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
             rows.data(), static_cast<index_t>(rows.size()) / dim, dim)
      .cast<double>();
}

/// The least error that `rank` components can have: the root of the sum of the squared singular values behind them.
double bound(const matrix& rows, index_t rank) {
  const Eigen::VectorXd s = Eigen::BDCSVD<matrix>(rows).singularValues();
  return rank < s.size() ? s.tail(s.size() - rank).norm() : 0;
}

template <class Codec>
kvcache::memory_block zero_block(const block_geometry& g, const Codec& codec) {
  kvcache::memory_block block(codec.block_bytes(g), kvcache::huge_page_resource());
  std::memset(block.data(), 0, static_cast<std::size_t>(block.size()));
  return block;
}

struct key_value_rows {
  std::vector<float> k;
  std::vector<float> v;
};

/// Rows of one head, [tokens, dim], there and back, block by block.
key_value_rows through(const cache_shape& shape, const codec::low_rank& all_heads,
                       const key_value_rows& rows) {
  const block_geometry g = kvcache::geometry_of(shape);
  const auto here = kvcache::codec_at(all_heads, 0, 0);
  key_value_rows back{std::vector<float>(rows.k.size()), std::vector<float>(rows.v.size())};
  const index_t count = static_cast<index_t>(rows.k.size()) / g.head_dim;
  for (index_t t = 0; t < count; t += g.block_size) {
    const auto block = zero_block(g, here);
    const index_t n = std::min(g.block_size, count - t);
    const index_t at = t * g.head_dim;
    REQUIRE(here.encode(kernel::best(), g, block.data(), 0, n, {rows.k.data() + at, g.head_dim},
                        {rows.v.data() + at, g.head_dim}) == status::ok);
    here.decode(kernel::best(), g, block.data(), 0, n, {back.k.data() + at, g.head_dim},
                {back.v.data() + at, g.head_dim});
  }
  return back;
}

cache_shape one_head(index_t dim) {
  return {.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .block_size = 64};
}

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};

}  // namespace

TEST_CASE("truncated rows are off by no more than the Eckart-Young bound", "[codec]") {
  test::random random;
  double worst = 0;
  for (const index_t dim : {1, 5, 16, 33, 64, 128}) {
    for (const double decay : {1.0, 0.93, 0.7}) {
      const cache_shape shape = one_head(dim);
      const key_value_rows rows{rows_of(300, dim, decay, random), rows_of(300, dim, decay, random)};
      const matrix k = wide(rows.k, dim);
      const matrix v = wide(rows.v, dim);
      for (const index_t rank : {index_t{1}, (dim + 1) / 2, dim}) {
        CAPTURE(dim, decay, rank);
        const codec::low_rank low_rank(low_rank_bases::fit(
            shape, {.rank = rank, .store = component_store::exact32}, {.k = rows.k, .v = rows.v}));
        const key_value_rows back = through(shape, low_rank, rows);
        const double k_error = (wide(back.k, dim) - k).norm();
        const double v_error = (wide(back.v, dim) - v).norm();
        const double k_bound = bound(k, rank);
        const double v_bound = bound(v, rank);
        CHECK(k_error <= 1.0001 * k_bound + 1e-6 * k.norm());
        CHECK(v_error <= 1.0001 * v_bound + 1e-6 * v.norm());
        if (k_bound > 1e-3 * k.norm())
          worst = std::max({worst, k_error / k_bound - 1, v_error / v_bound - 1});

        // bf16: the same, and half a unit of its last place on top
        const codec::low_rank plain(low_rank_bases::fit(
            shape, {.rank = rank, .store = component_store::exact16}, {.k = rows.k, .v = rows.v}));
        CHECK((wide(through(shape, plain, rows).k, dim) - k).norm() <=
              std::hypot(1.0001 * k_bound, 0x1p-8 * k.norm()));
      }
    }
  }
  CAPTURE(worst);
  CHECK(worst < 1e-4);
}

TEST_CASE("with query moments scores are off by no more than the bound of K Q^T", "[codec]") {
  test::random random;
  double worst = 0;
  for (const index_t dim : {2, 16, 33, 128}) {
    const cache_shape shape = one_head(dim);
    const key_value_rows rows{rows_of(300, dim, 0.95, random), rows_of(300, dim, 0.95, random)};
    const std::vector<float> queries = rows_of(2 * 400, dim, 0.97, random);  // two query heads
    const matrix k = wide(rows.k, dim);
    const matrix q = wide(queries, dim);
    const matrix exact = k * q.transpose();
    codec::low_rank_calibration calibration(shape);
    calibration.add(0, rows.k, rows.v);
    calibration.add_queries(0, queries, 2);
    const Eigen::MatrixXf moments = (q.transpose() * q).cast<float>();
    for (const index_t rank : {index_t{1}, dim / 2, dim}) {
      CAPTURE(dim, rank);
      const low_rank_options options{.rank = rank, .store = component_store::exact32};
      const double least = bound(exact, rank);
      const auto given =
          low_rank_bases::fit(shape, options,
                              {.k = rows.k,
                               .v = rows.v,
                               .query_moments = {moments.data(), static_cast<std::size_t>(moments.size())}});
      for (const auto& bases : {calibration.bases(options), given}) {
        const matrix scores = wide(through(shape, codec::low_rank(bases), rows).k, dim) * q.transpose();
        const double error = (scores - exact).norm();
        CHECK(error <= 1.0001 * least + 4e-6 * exact.norm());
        if (least > 1e-3 * exact.norm()) worst = std::max(worst, error / least - 1);
      }
      if (rank != dim / 2 || dim < 16) continue;
      // bases that know nothing of the queries do worse
      const auto blind = low_rank_bases::fit(shape, options, {.k = rows.k, .v = rows.v});
      const matrix scores = wide(through(shape, codec::low_rank(blind), rows).k, dim) * q.transpose();
      CHECK((scores - exact).norm() > 1.01 * least);
    }
  }
  CAPTURE(worst);
  CHECK(worst < 1e-4);
}

TEST_CASE("with output weights outputs are off by no more than the bound of V W^T", "[codec]") {
  test::random random;
  double worst = 0;
  for (const index_t dim : {2, 16, 33, 128}) {
    const cache_shape shape = one_head(dim);
    const key_value_rows rows{rows_of(300, dim, 0.95, random), rows_of(300, dim, 0.95, random)};
    const std::vector<float> weights = rows_of(2 * 400, dim, 0.97, random);  // 400 outputs of two query heads
    const matrix v = wide(rows.v, dim);
    const matrix w = wide(weights, dim);
    const matrix exact = v * w.transpose();
    codec::low_rank_calibration calibration(shape);
    calibration.add(0, rows.k, rows.v);
    const low_rank_options options{.rank = (dim + 1) / 2, .store = component_store::exact32};
    const auto blind = calibration.bases(options);
    CHECK_FALSE(calibration.has_output_weights());
    calibration.add_output_weights(0, weights, 2);
    CHECK(calibration.has_output_weights());
    const auto error_of = [&](const auto& bases) {
      return (wide(through(shape, codec::low_rank(bases), rows).v, dim) * w.transpose() - exact).norm();
    };
    CAPTURE(dim);
    const double least = bound(exact, options.rank);
    const double error = error_of(calibration.bases(options));
    CHECK(error <= 1.0001 * least + 4e-6 * exact.norm());
    if (least > 1e-3 * exact.norm()) worst = std::max(worst, error / least - 1);
    if (dim >= 16) CHECK(error_of(blind) > 1.01 * least);
    // keys know nothing of it
    CHECK(wide(through(shape, codec::low_rank(calibration.bases(options)), rows).k, dim) ==
          wide(through(shape, codec::low_rank(blind), rows).k, dim));
    // and bases come back from their settings
    const codec::low_rank seeing(calibration.bases(options));
    const auto again = kvcache::make_described<codec::low_rank>(kvcache::describe(seeing), shape);
    CHECK(through(shape, again, rows).v == through(shape, seeing, rows).v);
  }
  CAPTURE(worst);
  CHECK(worst < 1e-4);
  codec::low_rank_calibration calibration(small);
  const std::vector<float> weights(3 * 4 * 20);
  CHECK_THROWS_AS(calibration.add_output_weights(2, weights, 4), kvcache::shape_error);
  CHECK_THROWS_AS(calibration.add_output_weights(0, weights, 3), kvcache::shape_error);
}

TEST_CASE("quantised components add what their bits cost", "[codec]") {
  test::random random;
  constexpr index_t dim = 64;
  const cache_shape shape = one_head(dim);
  const key_value_rows rows{rows_of(640, dim, 0.97, random), rows_of(640, dim, 0.97, random)};
  const matrix k = wide(rows.k, dim);
  const Eigen::VectorXd s = Eigen::BDCSVD<matrix>(k).singularValues();
  const auto energy = [&s](index_t first, index_t count) { return s.segment(first, count).squaredNorm(); };
  const auto error = [&](const codec::low_rank_layout& layout) {
    const auto bases = low_rank_bases::fit(shape, {.layout = layout}, {.k = rows.k, .v = rows.v});
    const key_value_rows back = through(shape, codec::low_rank(bases), rows);
    const double k_error = (wide(back.k, dim) - k).squaredNorm();
    const matrix v = wide(rows.v, dim);
    const double v_error = (wide(back.v, dim) - v).squaredNorm() * k.squaredNorm() / v.squaredNorm();
    CHECK(v_error < 3 * k_error);  // another spectrum, but of the same kind
    return k_error;
  };
  // relative errors of the groups: int8 4.5e-5, and the codebooks of 16 and 4 levels, 15 % more for scales per token
  CHECK(error({.int8 = 64}) < 1.5 * 4.5e-5 * energy(0, 64));
  CHECK(error({.bits4 = 64}) < 1.15 * 0.0095 * energy(0, 64));
  CHECK(error({.bits2 = 64}) < 1.15 * 0.1175 * energy(0, 64));
  CHECK(error({.int8 = 40}) < 1.0001 * energy(40, 24) + 1.5 * 4.5e-5 * energy(0, 40));
  CHECK(error({.int8 = 8, .bits4 = 24, .bits2 = 20}) <
        1.15 * (4.5e-5 * energy(0, 8) + 0.0095 * energy(8, 24) + 0.1175 * energy(32, 20)) + energy(52, 12));
  CHECK(error({.f32 = 4, .bf16 = 4, .bits2 = 30}) <
        1.15 * 0.1175 * energy(8, 30) + energy(38, 26) + 1e-5 * energy(0, 8));
}

TEST_CASE("allocated bits fit the budget and are the best that do", "[codec]") {
  test::random random;
  constexpr index_t dim = 16;
  const cache_shape shape = one_head(dim);
  const std::vector<float> rows = rows_of(500, dim, 0.75, random);
  const Eigen::VectorXd s = Eigen::BDCSVD<matrix>(wide(rows, dim)).singularValues();
  const auto predicted = [&s](const codec::low_rank_layout& layout) {
    double sum = 0;
    for (index_t i = 0; i < dim; ++i) {
      const double share = i < layout.int8                                 ? 4.5e-5
                           : i < layout.int8 + layout.bits4                ? 0.0095
                           : i < layout.int8 + layout.bits4 + layout.bits2 ? 0.1175
                                                                           : 1;
      sum += share * s(i) * s(i);
    }
    return sum;
  };
  const block_geometry g = kvcache::geometry_of(shape);
  for (const double bits : {1.7, 2.5, 3.0, 4.0, 5.5, 8.0, 9.5}) {
    CAPTURE(bits);
    const auto bases = low_rank_bases::fit(
        shape, {.bits_per_value = bits, .store = component_store::allocated}, {.k = rows, .v = rows});
    const codec::low_rank low_rank(bases);
    const double budget = bits * 64 * dim;
    CHECK(8 * static_cast<double>(low_rank.keys.section_bytes(g)) <= budget);
    CHECK(8 * static_cast<double>(low_rank.values.section_bytes(g)) <= budget);
    double best = std::numeric_limits<double>::infinity();
    for (index_t n8 = 0; n8 <= dim; n8 += 4) {
      for (index_t n4 = 0; n8 + n4 <= dim; n4 += 4) {
        for (index_t n2 = 0; n8 + n4 + n2 <= dim; n2 += 4) {
          const codec::low_rank_layout layout{.int8 = n8, .bits4 = n4, .bits2 = n2};
          const double size =
              8 * static_cast<double>(codec::detail::section_bytes<codec::detail::key_groups>(layout, 64));
          if (size <= budget) best = std::min(best, predicted(layout));
        }
      }
    }
    CAPTURE(bases->key_layout().int8, bases->key_layout().bits4, bases->key_layout().bits2);
    CHECK(predicted(bases->key_layout()) <
          1.6 * best);  // groups cost a scale each: greedy may miss by one step
  }
}

TEST_CASE("rank by energy and by budget", "[codec]") {
  test::random random;
  constexpr index_t dim = 48;
  const cache_shape shape = one_head(dim);
  const std::vector<float> rows = rows_of(400, dim, 0.9, random);
  const Eigen::VectorXd s = Eigen::BDCSVD<matrix>(wide(rows, dim)).singularValues();
  for (const double energy : {0.5, 0.9, 0.999}) {
    const auto bases = low_rank_bases::fit(shape, {.energy = energy}, {.k = rows, .v = rows});
    const index_t rank = bases->key_layout().rank();
    CAPTURE(energy, rank);
    CHECK(s.head(rank).squaredNorm() >= energy * s.squaredNorm());
    CHECK(s.head(rank - 1).squaredNorm() < energy * s.squaredNorm());
  }
  CHECK(low_rank_bases::fit(shape, {.energy = 1}, {.k = rows, .v = rows})->key_layout().rank() == dim);
  for (const double bits : {1.0, 4.0, 8.0}) {
    for (const auto store : {component_store::exact32, component_store::exact16, component_store::bytes}) {
      const auto bases =
          low_rank_bases::fit(shape, {.bits_per_value = bits, .store = store}, {.k = rows, .v = rows});
      const codec::low_rank low_rank(bases);
      const auto used = 8.0 * static_cast<double>(low_rank.keys.section_bytes(kvcache::geometry_of(shape)));
      CAPTURE(bits, bases->key_layout().rank());
      CHECK(used <= bits * 64 * dim);
      CHECK(used > bits * 64 * dim - 8 * 64 * 4 * 4);  // four components more would not fit
    }
  }
  const auto both = low_rank_bases::fit(shape, {.rank = 7}, {.rank = 31}, {.k = rows, .v = rows});
  CHECK(both->key_layout() == codec::low_rank_layout{.int8 = 7});
  CHECK(both->value_layout() == codec::low_rank_layout{.int8 = 31});
}

TEST_CASE("bytes of low_rank are what the layout adds up to", "[codec]") {
  test::random random;
  constexpr index_t dim = 128;
  const cache_shape shape = one_head(dim);
  const std::vector<float> rows = random.floats(200 * dim);
  const block_geometry g = kvcache::geometry_of(shape);
  const auto codec_of = [&](const low_rank_options& options) {
    return codec::low_rank(low_rank_bases::fit(shape, options, {.k = rows, .v = rows}));
  };
  const auto half_rank = codec_of({.rank = 64});
  CHECK(half_rank.token_bytes(g) == 2 * (64 + 2));
  CHECK(half_rank.block_bytes(g) == 64 * half_rank.token_bytes(g));
  CHECK(codec_of({.rank = 48, .store = component_store::exact16}).block_bytes(g) == 64 * 2 * 2 * 48);
  CHECK(codec_of({.rank = 48, .store = component_store::exact32}).block_bytes(g) == 64 * 2 * 4 * 48);
  const auto groups = codec_of({.layout = {.f32 = 2, .bf16 = 4, .int8 = 12, .bits4 = 40, .bits2 = 24}});
  CHECK(groups.token_bytes(g) == 2 * (8 + 8 + (12 + 2) + (20 + 2) + (6 + 2)));
  CHECK(groups.block_bytes(g) == 64 * groups.token_bytes(g));
  CHECK(codec_of({.rank = 1}).token_bytes(g) == 2 * 3);
  // bases: two matrices of 64 x 128 floats and two times 64 spreads
  CHECK(half_rank.keys.bases->key_bytes() == 4 * (64 * 128 + 64));
  CHECK(half_rank.keys.bases->value_bytes() == 4 * (64 * 128 + 64));
  // a cache counts its blocks, two of 64 tokens, one of them half used, and the bases
  kvcache::chunked_cache<codec::low_rank> cache(shape, half_rank, {.blocks_per_chunk = 1});
  cache[0].append(std::span(rows).first(96 * dim), std::span(rows).first(96 * dim));
  CHECK(cache.bytes().payload == 96 * half_rank.token_bytes(g));
  CHECK(cache.bytes().total == 2 * half_rank.block_bytes(g) + half_rank.settings_bytes());
  CHECK(cache.bytes().shared == half_rank.settings_bytes());
  kvcache::any_codec any;
  any.keys = codec::any_keys::of(half_rank.keys);
  any.tail_tokens = 30;
  CHECK(kvcache::chunked_cache<kvcache::any_codec>(shape, any).bytes().total ==
        half_rank.keys.bases->key_bytes());
}

TEST_CASE("attention over components is that over the rows they stand for", "[codec]") {
  test::random random;
  struct layout_bound {
    codec::low_rank_layout layout;
    double most;  // of numbers of the order of one
  };
  const std::vector<layout_bound> layouts = {
      {{.f32 = 11}, 1e-5},   {{.f32 = 20}, 1e-5},
      {{.bf16 = 13}, 1e-3},  {{.int8 = 1}, 2e-3},
      {{.int8 = 10}, 2e-3},  {{.int8 = 20}, 2e-3},
      {{.bits4 = 18}, 0.03},  // queries and weights of 8 bits
      {{.bits2 = 9}, 0.03},  {{.f32 = 1, .bf16 = 2, .int8 = 5, .bits4 = 7, .bits2 = 3}, 0.03},
  };
  const std::vector<float> k = sample_of(small, 150, 0.9, random);
  const std::vector<float> v = sample_of(small, 150, 0.9, random);
  const std::vector<float> q = random.floats(small.num_layers * small.num_kv_heads * 20 * 20);
  codec::low_rank_calibration calibration(small);
  const std::size_t layer_floats = k.size() / 2;
  for (index_t layer = 0; layer < 2; ++layer) {
    const auto at = static_cast<std::size_t>(layer) * layer_floats;
    calibration.add(layer, std::span(k).subspan(at, layer_floats), std::span(v).subspan(at, layer_floats));
    calibration.add_queries(layer, q, 4);
  }
  for (const layout_bound& chosen : layouts) {
    const codec::low_rank low_rank(calibration.bases({.layout = chosen.layout}));
    kvcache::chunked_cache<codec::low_rank> cache(small, low_rank);
    std::vector<float> layer_k(k.begin() + static_cast<std::ptrdiff_t>(layer_floats), k.end());
    std::vector<float> layer_v(v.begin() + static_cast<std::ptrdiff_t>(layer_floats), v.end());
    for (float& x : layer_k) x *= 0.4F;  // numbers of the order of one
    for (float& x : layer_v) x *= 0.4F;
    cache[1].append(layer_k, layer_v);
    for (const kernel::isa level : kernel::available()) {
      for (const index_t q_len : {1, 3, 7}) {
        const double error = attention_error(cache, 1, kernel::select(level), q_len, random);
        CAPTURE(chosen.layout.f32, chosen.layout.bf16, chosen.layout.int8, chosen.layout.bits4,
                chosen.layout.bits2, kernel::to_string(level), q_len, error);
        CHECK(error < chosen.most);
      }
    }
  }
}

TEST_CASE("low_rank blocks are the same bytes on every instruction set", "[codec]") {
  test::random random;
  for (const index_t dim : {1, 15, 20, 64, 131}) {
    const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .block_size = 32};
    const std::vector<float> rows = rows_of(100, dim, 0.95, random);
    const index_t few = dim / 5;
    const codec::low_rank_layout layout{.f32 = few, .bf16 = few, .int8 = 1, .bits4 = few, .bits2 = few};
    const auto here = kvcache::codec_at(
        codec::low_rank(low_rank_bases::fit(shape, {.layout = layout}, {.k = rows, .v = rows})), 0, 0);
    const block_geometry g = kvcache::geometry_of(shape);
    const auto encoded = [&](const kernel::table& kernels) {
      auto block = zero_block(g, here);
      REQUIRE(here.encode(kernels, g, block.data(), 0, 32, {rows.data(), dim}, {rows.data() + dim, dim}) ==
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

TEST_CASE("samples that are zero, constant or of less rank than is kept", "[codec]") {
  test::random random;
  constexpr index_t dim = 24;
  const cache_shape shape = one_head(dim);
  const auto n = static_cast<std::size_t>(100 * dim);
  std::vector<float> flat;  // of rank 3
  const std::vector<float> three = random.floats(3 * dim);
  for (int t = 0; t < 100; ++t) {
    const std::vector<float> y = random.floats(3);
    for (std::size_t d = 0; d < static_cast<std::size_t>(dim); ++d)
      flat.push_back(y[0] * three[d] + y[1] * three[dim + d] + y[2] * three[2 * dim + d]);
  }
  const std::vector<std::vector<float>> samples = {std::vector<float>(n), std::vector<float>(n, 3.0F), flat};
  for (const std::vector<float>& sample : samples) {
    for (const float size : {1.0F, 1e30F, 1e-30F, 1e-40F}) {
      std::vector<float> rows = sample;
      for (float& x : rows) x *= size;
      for (const codec::low_rank_layout& layout :
           {codec::low_rank_layout{.f32 = 10}, codec::low_rank_layout{.bf16 = 10},
            codec::low_rank_layout{.int8 = 10}, codec::low_rank_layout{.int8 = 2, .bits4 = 6, .bits2 = 16}}) {
        CAPTURE(size, rows[0], layout.f32, layout.bf16, layout.int8);
        const std::vector<float> moments(static_cast<std::size_t>(dim * dim), 1.0F);  // of rank 1
        for (const bool with_queries : {false, true}) {
          const codec::low_rank low_rank(low_rank_bases::fit(
              shape, {.layout = layout},
              {.k = rows, .v = rows, .query_moments = with_queries ? moments : std::vector<float>{}}));
          const key_value_rows back = through(shape, low_rank, {rows, rows});
          const double norm = wide(rows, dim).norm();
          const double error = (wide(back.v, dim) - wide(rows, dim)).norm();
          CHECK(error <= (layout.f32 > 0 ? 1e-5 : 0.2) * norm + 1e-38 * static_cast<double>(n));
          for (const float x : back.k) CHECK(std::isfinite(x));
          // scores of the only query there was
          const Eigen::VectorXd ones = Eigen::VectorXd::Ones(dim);
          const double of_scores = ((wide(back.k, dim) - wide(rows, dim)) * ones).norm();
          CHECK(of_scores <= (layout.f32 > 0 ? 1e-4 : 0.3) * norm * std::sqrt(double{dim}) + 1e-36);
          // rows that the sample knew nothing of stay finite
          const std::vector<float> other = random.floats(64 * dim);
          for (const float x : through(shape, low_rank, {other, other}).k) CHECK(std::isfinite(x));
        }
      }
    }
  }
}

TEST_CASE("low_rank refuses rows that are not finite, and nothing is written", "[codec]") {
  test::random random;
  constexpr index_t dim = 20;
  const cache_shape shape = one_head(dim);
  const block_geometry g = kvcache::geometry_of(shape);
  const std::vector<float> sample = random.floats(100 * dim);
  const auto here = kvcache::codec_at(
      codec::low_rank(low_rank_bases::fit(shape, {.rank = 9}, {.k = sample, .v = sample})), 0, 0);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const bool in_keys : {true, false}) {
      const auto block = zero_block(g, here);
      key_value_rows rows{random.floats(16 * dim), random.floats(16 * dim)};
      (in_keys ? rows.k : rows.v)[301] = bad;
      REQUIRE(here.encode(kernel::best(), g, block.data(), 0, 16, {rows.k.data(), dim},
                          {rows.v.data(), dim}) == status::not_finite);
      REQUIRE(std::all_of(block.data(), block.data() + block.size(),
                          [](std::byte b) { return b == std::byte{0}; }));
    }
  }
  // huge and tiny rows are stored, by a basis of rows of the order of one
  for (const float size : {1e37F, 1e-37F}) {
    std::vector<float> rows = random.floats(64 * dim);
    for (float& x : rows) x *= size;
    const auto full = codec::low_rank(low_rank_bases::fit(
        shape, {.rank = dim, .store = component_store::exact32}, {.k = sample, .v = sample}));
    const key_value_rows back = through(shape, full, {rows, rows});
    CHECK((wide(back.k, dim) - wide(rows, dim)).norm() < 1e-5 * wide(rows, dim).norm());
    CHECK((wide(back.v, dim) - wide(rows, dim)).norm() < 1e-5 * wide(rows, dim).norm());
  }
}

TEST_CASE("settings of low_rank that cannot be are refused", "[codec]") {
  test::random random;
  const std::vector<float> rows = random.floats(2 * 50 * 2 * 20);
  const auto fit = [&rows](const low_rank_options& options, std::span<const float> moments = {}) {
    return low_rank_bases::fit(small, options, {.k = rows, .v = rows, .query_moments = moments});
  };
  using kvcache::shape_error;
  REQUIRE_THROWS_AS(fit({}), shape_error);
  REQUIRE_THROWS_AS(fit({.rank = -1}), shape_error);
  REQUIRE_THROWS_AS(fit({.rank = 21}), shape_error);
  REQUIRE_THROWS_AS(fit({.rank = 5, .energy = 0.5}), shape_error);
  REQUIRE_THROWS_AS(fit({.energy = 1.5}), shape_error);
  REQUIRE_THROWS_AS(fit({.energy = std::numeric_limits<double>::quiet_NaN()}), shape_error);
  REQUIRE_THROWS_AS(fit({.bits_per_value = 0.01}), shape_error);
  REQUIRE_THROWS_AS(fit({.bits_per_value = -3}), shape_error);
  REQUIRE_THROWS_AS(fit({.bits_per_value = 0.01, .store = component_store::allocated}), shape_error);
  REQUIRE_THROWS_AS(fit({.rank = 5, .store = component_store::allocated}), shape_error);
  REQUIRE_THROWS_AS(fit({.layout = {.int8 = 15, .bits4 = 15}}), shape_error);
  REQUIRE_THROWS_AS(fit({.layout = {.int8 = 15, .bits4 = -5}}), shape_error);
  REQUIRE_THROWS_AS(fit({.rank = 5, .ridge = -1}), shape_error);
  const std::vector<float> too_few(7);
  REQUIRE_THROWS_AS(fit({.rank = 5}, too_few), shape_error);
  REQUIRE_THROWS_AS(low_rank_bases::fit(small, {.rank = 5}, {.k = rows, .v = too_few}), shape_error);
  REQUIRE_THROWS_AS(low_rank_bases::fit(small, {.rank = 5}, {.k = too_few, .v = too_few}), shape_error);
  std::vector<float> bad = rows;
  bad[17] = std::numeric_limits<float>::quiet_NaN();
  REQUIRE_THROWS_AS(low_rank_bases::fit(small, {.rank = 5}, {.k = rows, .v = bad}), shape_error);
  codec::low_rank_calibration calibration(small);
  REQUIRE_THROWS_AS(calibration.add(2, rows, rows), shape_error);
  REQUIRE_THROWS_AS(calibration.add_queries(0, rows, 3), shape_error);
  codec::low_rank_matrices matrices;
  matrices.key_layout = matrices.value_layout = {.f32 = 3};
  REQUIRE_THROWS_AS(low_rank_bases(small, matrices), shape_error);

  // no bases, or bases of another shape
  REQUIRE_THROWS_AS(kvcache::chunked_cache<codec::low_rank>(small), shape_error);
  REQUIRE_THROWS_AS(kvcache::contiguous_cache<codec::low_rank>(small), shape_error);
  REQUIRE_THROWS_AS(kvcache::page_pool<codec::low_rank>(small), shape_error);
  cache_shape other = small;
  other.num_layers = 3;
  const codec::low_rank low_rank(fit({.rank = 5}));
  REQUIRE_THROWS_AS(kvcache::chunked_cache<codec::low_rank>(other, low_rank), shape_error);
  kvcache::any_codec any;
  any.keys = codec::any_keys::of(codec::low_rank_keys{});
  REQUIRE_THROWS_AS(kvcache::chunked_cache<kvcache::any_codec>(small, any), shape_error);
}
