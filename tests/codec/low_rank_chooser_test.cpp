// SPDX-License-Identifier: MIT
// low_rank with a layout for each layer: how a budget is shared out, and that each layer works as if it were alone.

#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>

#include "support/catch.hpp"
#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

using kvcache::cache_shape;
using kvcache::index_t;
namespace codec = kvcache::codec;
using codec::component_store;
using codec::low_rank_bases;
using codec::low_rank_options;
using codec::detail::layout_choice;

namespace {

constexpr cache_shape shape{.num_layers = 3, .num_kv_heads = 2, .head_dim = 24, .block_size = 16};
constexpr index_t width = 2 * 24;

/// [layers, tokens, heads, dim], dim i of layer l of the size decay[l]^i: layers with spectra of their own.
std::vector<float> sample_of(const std::vector<double>& decay, index_t tokens, test::random& random) {
  std::vector<float> all;
  for (const double factor : decay) {
    for (index_t i = 0; i < tokens * width; ++i)
      all.push_back(static_cast<float>(double{random.normal()} * std::pow(factor, i % shape.head_dim)));
  }
  return all;
}

std::span<const float> layer_of(const std::vector<float>& sample, index_t layer) {
  const std::size_t size = sample.size() / 3;
  return std::span(sample).subspan(static_cast<std::size_t>(layer) * size, size);
}

/// The share of the energy that a layer's key layout leaves out, summed over heads; from the sample itself.
double left_behind(const low_rank_bases& bases, const std::vector<float>& sample, index_t layer) {
  double behind = 0;
  const std::span<const float> rows = layer_of(sample, layer);
  for (index_t head = 0; head < shape.num_kv_heads; ++head) {
    const Eigen::MatrixXd x =
        Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, 0,
                   Eigen::OuterStride<>>(rows.data() + head * shape.head_dim,
                                         static_cast<index_t>(rows.size()) / width, shape.head_dim,
                                         Eigen::OuterStride<>(width))
            .cast<double>();
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(x.transpose() * x, Eigen::EigenvaluesOnly);
    const index_t rank = bases.key_layout(layer).rank();
    behind += solver.eigenvalues().head(shape.head_dim - rank).sum() / solver.eigenvalues().sum();
  }
  return behind;
}

index_t key_section_bytes(const codec::low_rank_layout& layout) {
  return codec::detail::section_bytes<codec::detail::key_groups>(layout, shape.block_size);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("a budget goes where it saves the most", "[codec]") {
  test::random random;
  for (int round = 0; round < 300; ++round) {
    std::vector<std::vector<layout_choice>> layers;
    for (int layer = 0; layer < 3; ++layer) {
      std::vector<layout_choice> choices;
      for (index_t i = random.between(1, 6); i > 0; --i)
        choices.push_back({{.f32 = i}, 64 * random.between(1, 12), random.unit()});
      layers.push_back(choices);
    }
    std::vector<std::vector<layout_choice>> hulls;
    index_t longest_step = 0;
    for (const auto& choices : layers) {
      hulls.push_back(codec::detail::lower_hull(choices));
      for (std::size_t i = 1; i < hulls.back().size(); ++i)
        longest_step = std::max(longest_step, hulls.back()[i].bytes - hulls.back()[i - 1].bytes);
    }
    const index_t budget = 64 * random.between(1, 36);
    const auto chosen = codec::detail::share_out(hulls, static_cast<double>(budget));
    // All combinations: what fits, and what would fit into one step less.
    double least = std::numeric_limits<double>::infinity();
    bool any_fits = false;
    for (const auto& a : layers[0]) {
      for (const auto& b : layers[1]) {
        for (const auto& c : layers[2]) {
          const index_t bytes = a.bytes + b.bytes + c.bytes;
          any_fits = any_fits || bytes <= budget;
          if (bytes <= budget - longest_step) least = std::min(least, a.error + b.error + c.error);
        }
      }
    }
    REQUIRE(chosen.empty() == !any_fits);
    if (chosen.empty()) continue;
    index_t bytes = 0;
    double error = 0;
    for (const layout_choice& each : chosen) {
      bytes += each.bytes;
      error += each.error;
    }
    REQUIRE(bytes <= budget);
    REQUIRE(error <= least + 1e-12);
  }
}

TEST_CASE("each layer has the rank that its energy or a shared budget asks for", "[codec]") {
  test::random random;
  const std::vector<float> rows = sample_of({0.5, 0.8, 0.98}, 200, random);
  const auto by_energy =
      low_rank_bases::fit(shape, {.energy = 0.99, .by_layer = true}, {.k = rows, .v = rows});
  const auto for_all = low_rank_bases::fit(shape, {.energy = 0.99}, {.k = rows, .v = rows});
  CHECK(by_energy->key_layout(0).rank() < by_energy->key_layout(1).rank());
  CHECK(by_energy->key_layout(1).rank() < by_energy->key_layout(2).rank());
  CHECK(by_energy->value_layout(0) == by_energy->key_layout(0));
  for (index_t layer = 0; layer < 3; ++layer) {
    CHECK(left_behind(*by_energy, rows, layer) <= 2 * 0.01 + 1e-6);  // two heads
    CHECK(for_all->key_layout(layer) == by_energy->key_layout(2));
  }
  CHECK(by_energy->key_bytes() < for_all->key_bytes());

  for (const auto store : {component_store::exact32, component_store::bytes, component_store::allocated}) {
    for (const double bits : {3.0, 5.0, 7.0}) {
      const low_rank_options one{.bits_per_value = bits, .store = store};
      low_rank_options each = one;
      each.by_layer = true;
      const auto shared = low_rank_bases::fit(shape, each, {.k = rows, .v = rows});
      const auto uniform = low_rank_bases::fit(shape, one, {.k = rows, .v = rows});
      index_t bytes = 0;
      double error = 0;
      double uniform_error = 0;
      for (index_t layer = 0; layer < 3; ++layer) {
        bytes += key_section_bytes(shared->key_layout(layer));
        error += left_behind(*shared, rows, layer);
        uniform_error += left_behind(*uniform, rows, layer);
      }
      CAPTURE(bits, bytes, error, uniform_error);
      CHECK(8.0 * static_cast<double>(bytes) <= 3 * bits * 16 * 24);
      if (store != component_store::allocated) CHECK(error <= uniform_error);
      if (store == component_store::bytes && bits == 5.0) CHECK(error < 0.7 * uniform_error);
    }
  }
  const auto fails = [&](const low_rank_options& options) {
    CHECK_THROWS_AS(low_rank_bases::fit(shape, options, {.k = rows, .v = rows}), kvcache::shape_error);
  };
  fails({.rank = 4, .by_layer = true});
  fails({.layout = {.int8 = 3}, .by_layer = true});
  fails({.bits_per_value = 0.01, .by_layer = true});
  fails({.left_out = true});  // neither keys nor values
}

TEST_CASE("a layer with a rank of its own does what it does alone", "[codec]") {
  test::random random;
  const std::vector<float> rows = sample_of({0.6, 0.9, 1.0}, 100, random);
  const low_rank_options options{.bits_per_value = 4, .store = component_store::allocated, .by_layer = true};
  const auto bases = low_rank_bases::fit(shape, options, {.k = rows, .v = rows});
  REQUIRE(bases->key_layout(0) != bases->key_layout(2));
  kvcache::chunked_cache<codec::low_rank> cache(shape, codec::low_rank(bases), {.blocks_per_chunk = 2});
  for (index_t layer = 0; layer < 3; ++layer)
    cache[layer].append(layer_of(rows, layer), layer_of(rows, layer));
  const auto copy = cache.clone();
  copy.check();

  index_t bytes = 0;
  cache_shape alone = shape;
  alone.num_layers = 1;
  const std::vector<float> q = random.floats(2 * width);
  for (index_t layer = 0; layer < 3; ++layer) {
    CAPTURE(layer);
    const std::vector<float> of_layer(layer_of(rows, layer).begin(), layer_of(rows, layer).end());
    const auto its_bases =
        low_rank_bases::fit(alone, {.layout = bases->key_layout(layer)},
                            {.layout = bases->value_layout(layer)}, {.k = of_layer, .v = of_layer});
    kvcache::chunked_cache<codec::low_rank> one(alone, codec::low_rank(its_bases), {.blocks_per_chunk = 2});
    one[0].append(of_layer, of_layer);
    std::vector<float> out(q.size());
    std::vector<float> out_alone(q.size());
    kvcache::attend(q, copy[layer], out);
    kvcache::attend(q, std::as_const(one)[0], out_alone);
    CHECK(same_bits(out, out_alone));
    std::vector<float> k(of_layer.size()), v(k), k_alone(k), v_alone(k);
    copy[layer].copy_out(0, 100, k, v);
    one[0].copy_out(0, 100, k_alone, v_alone);
    CHECK(same_bits(k, k_alone));
    CHECK(same_bits(v, v_alone));
    bytes += one.bytes().total;
  }
  CHECK(cache.bytes().total == bytes);  // blocks and bases, layer by layer
}

TEST_CASE("bases for keys alone take no memory for values, and serve keys alone", "[codec]") {
  test::random random;
  const std::vector<float> rows = sample_of({0.6, 0.7, 0.8}, 60, random);
  const auto both = low_rank_bases::fit(shape, {.rank = 8}, {.k = rows, .v = rows});
  const auto keys = low_rank_bases::fit(shape, {.rank = 8}, {.left_out = true}, {.k = rows, .v = rows});
  CHECK(keys->key_bytes() == both->key_bytes());
  CHECK(keys->value_bytes() == 0);
  CHECK_THROWS_AS(kvcache::chunked_cache<codec::low_rank>(shape, codec::low_rank(keys)),
                  kvcache::shape_error);
  using keys_only = codec::mixed<codec::low_rank, codec::rotated<4>>;
  keys_only mixed;
  mixed.keys.bases = keys;
  keys_only same;
  same.keys.bases = both;
  kvcache::chunked_cache<keys_only> a(shape, mixed);
  kvcache::chunked_cache<keys_only> b(shape, same);
  std::vector<float> out_a(2 * width), out_b(2 * width);
  a[1].append(layer_of(rows, 1), layer_of(rows, 1));
  b[1].append(layer_of(rows, 1), layer_of(rows, 1));
  const std::vector<float> q = random.floats(2 * width);
  kvcache::attend(q, std::as_const(a)[1], out_a);
  kvcache::attend(q, std::as_const(b)[1], out_b);
  CHECK(same_bits(out_a, out_b));
}
