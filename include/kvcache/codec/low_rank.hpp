// SPDX-License-Identifier: MIT
// low_rank: rows as their components in a basis of few dims, found by a singular value decomposition of sample rows.
//
//   const auto bases = codec::low_rank_bases::fit_from(cache, {.rank = 48});      // what a bf16 cache has seen so far
//   auto lean = recoded(cache, chunked_cache<codec::low_rank>(cache.shape(), codec::low_rank(bases)));
//   lean[layer].append(k, v);                                                      // go on with low_rank
//
// Keys, with the second moment of the queries G = L L^T: from K L = U S V^T are stored c = V_r^T L^T k, and the query is
// taken as V_r^T L^-1 q. No other r numbers give a smaller || K Q^T - scores ||: it is sqrt(sum_{i > r} S_i^2). Without G,
// L = 1: the same for || K - K_r ||. Values: the same, with the second moments of the rows of the output projection in
// place of G; without them c = E_r^T v in their own basis, the output is E_r times the sum.
//
// Components come by falling energy. Each is kept in f32, bf16 (plain truncated SVD), or 8, 4 or 2 bits with a scale for
// each token and group, or not at all; see codec/low_rank_layout.hpp for bytes and options. Those that are quantised are
// first divided by how far they spread in the sample, but by no less than 1/16 of the group's widest, so that rows unlike
// the sample do no harm. Rows that are not finite are refused. Tokens are encoded as they come.
//
// The decomposition is that of the Gram matrix, in double: it needs a few matrices of head_dim^2 for any number of rows,
// and squaring costs only what lies below 1e-8 of the largest singular value, where rows of float have nothing to say.
// Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank"; KQ-SVD, arXiv 2512.05916.
#pragma once

#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_chooser.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/low_rank_rows.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <Eigen/Eigenvalues>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvcache::inline v0::codec {

/// Keys and values of low rank. Default-made it has no bases, and caches refuse it with shape_error.
struct low_rank : sides<low_rank_keys, low_rank_values> {
  static constexpr std::string_view name = "low_rank";

  low_rank() = default;
  explicit low_rank(const std::shared_ptr<const low_rank_bases>& bases) {
    keys.bases = bases;
    values.bases = bases;
  }
};

static_assert(block_codec<low_rank>);

namespace detail {

/// Components of the rows of one head, by falling energy.
struct components {
  Eigen::MatrixXd in;   // [head_dim, head_dim]: a row x has components in * x
  Eigen::MatrixXd out;  // out^T in = 1
  std::vector<double> energies;
};

/// Eigenvectors and eigenvalues of a symmetric matrix, the largest first.
inline components principal_components(const Eigen::MatrixXd& moments) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(moments);
  components found;
  found.in = solver.eigenvectors().transpose().colwise().reverse();
  found.out = found.in;
  for (Eigen::Index i = moments.rows() - 1; i >= 0; --i)
    found.energies.push_back(std::max(solver.eigenvalues()(i), 0.0));
  return found;
}

/// The components that matter for products with queries, or rows of weights, of these second moments. All zero: any.
inline components weighted_components(const Eigen::MatrixXd& moments, Eigen::MatrixXd weights, double ridge) {
  const double mean = weights.trace() / static_cast<double>(weights.rows());
  if (!(mean > 0)) return principal_components(moments);
  weights /= mean;
  weights.diagonal().array() += ridge;
  const Eigen::LLT<Eigen::MatrixXd> factor(weights);
  if (factor.info() != Eigen::Success)
    throw shape_error(
        "kvcache: low_rank: moments of queries and output weights must be symmetric and not negative");
  const Eigen::MatrixXd lower = factor.matrixL();
  components found = principal_components(lower.transpose() * moments * lower);
  found.out = factor.matrixU().solve(found.in.transpose()).transpose();  // V^T L^-1 = (L^-T V)^T
  found.in = found.in * lower.transpose();
  return found;
}

/// How far the first components spread, relative to the widest of their group; 1 for those that are stored exactly.
inline void append_spreads(const low_rank_layout& layout, const std::vector<double>& energies,
                           std::vector<float>& spreads) {
  constexpr double least = 1.0 / 16;
  spreads.insert(spreads.end(), static_cast<std::size_t>(layout.num_exact()), 1.0F);
  auto i = static_cast<std::size_t>(layout.num_exact());
  for (const index_t count : {layout.int8, layout.bits4, layout.bits2}) {
    const double widest = count > 0 ? energies[i] : 0;
    for (index_t n = 0; n < count; ++n, ++i)
      spreads.push_back(
          static_cast<float>(widest > 0 ? std::max(std::sqrt(energies[i] / widest), least) : 1));
  }
}

inline void append_row(const Eigen::MatrixXd& matrix, index_t row, std::vector<float>& to) {
  for (Eigen::Index d = 0; d < matrix.cols(); ++d) to.push_back(static_cast<float>(matrix(row, d)));
}

/// The first `rank` rows.
inline void append_rows(const Eigen::MatrixXd& matrix, index_t rank, std::vector<float>& to) {
  for (index_t i = 0; i < rank; ++i) append_row(matrix, i, to);
}

}  // namespace detail

/// Gathers what bases are made from, any number of rows in memory of 4 * 8 * head_dim^2 bytes for each head.
class low_rank_calibration {
 public:
  /// Throws shape_error.
  explicit low_rank_calibration(const cache_shape& shape) : shape_(shape) {
    validate(shape);
    const Eigen::MatrixXd zero = Eigen::MatrixXd::Zero(shape.head_dim, shape.head_dim);
    moments_.assign(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads),
                    {zero, zero, zero, zero});
    num_tokens_.assign(static_cast<std::size_t>(shape.num_layers), 0);
  }

  /// Rows as they are appended, [tokens, num_kv_heads, head_dim]. O(tokens * num_kv_heads * head_dim^2).
  /// Throws shape_error if there is no such layer, sizes are wrong or a number is not finite; then nothing was added.
  void add(index_t layer, std::span<const float> k, std::span<const float> v) {
    if (k.size() != v.size()) refuse("as many keys as values are needed");
    check(layer, k, shape_.num_kv_heads);
    check(layer, v, shape_.num_kv_heads);
    for (index_t head = 0; head < shape_.num_kv_heads; ++head) {
      add_rows(k, shape_.num_kv_heads, head, of(layer, head).keys);
      add_rows(v, shape_.num_kv_heads, head, of(layer, head).values);
    }
    num_tokens_[static_cast<std::size_t>(layer)] +=
        static_cast<index_t>(k.size()) / (shape_.num_kv_heads * shape_.head_dim);
  }

  /// Queries, rotated, [tokens, num_q_heads, head_dim]; num_q_heads is a multiple of num_kv_heads. Throws as add.
  void add_queries(index_t layer, std::span<const float> q, index_t num_q_heads) {
    add_to_groups(layer, q, num_q_heads, &head_moments::queries);
  }

  /// Second moments of queries, [num_layers, num_kv_heads, head_dim, head_dim], on top of what was added. Throws as add.
  void add_query_moments(std::span<const float> query_moments) {
    const index_t size = shape_.head_dim * shape_.head_dim;
    if (static_cast<index_t>(query_moments.size()) != static_cast<index_t>(moments_.size()) * size)
      refuse("query moments must be [num_layers, num_kv_heads, head_dim, head_dim]");
    require_finite(query_moments);
    for (std::size_t i = 0; i < moments_.size(); ++i) {
      const Eigen::Map<const Eigen::MatrixXf> given(query_moments.data() + static_cast<index_t>(i) * size,
                                                    shape_.head_dim, shape_.head_dim);
      const Eigen::MatrixXd wide = given.cast<double>();
      moments_[i].queries += (wide + wide.transpose()) / 2;
    }
  }

  /// What the weighted sums of values are multiplied by behind attention: the output projection of a layer as models store it,
  /// [outputs, num_q_heads, head_dim]. Errors of values fall where it does not look, as those of keys where queries do not.
  /// O(outputs * num_q_heads * head_dim^2). Throws as add_queries.
  void add_output_weights(index_t layer, std::span<const float> weights, index_t num_q_heads) {
    add_to_groups(layer, weights, num_q_heads, &head_moments::outputs);
  }

  /// Components of the keys and the values of each head, [num_layers, num_kv_heads], by what they matter to the queries and
  /// the output weights that were added. O(heads * head_dim^3). Throws shape_error.
  [[nodiscard]] std::vector<detail::components> key_components(double ridge = 1e-6) const {
    return all_components(&head_moments::keys, &head_moments::queries, ridge);
  }
  [[nodiscard]] std::vector<detail::components> value_components(double ridge = 1e-6) const {
    return all_components(&head_moments::values, &head_moments::outputs, ridge);
  }
  /// Whether queries were added: keys have two matrices then.
  [[nodiscard]] bool has_queries() const noexcept { return has(&head_moments::queries); }
  /// Whether output weights were added: values have two matrices then.
  [[nodiscard]] bool has_output_weights() const noexcept { return has(&head_moments::outputs); }
  [[nodiscard]] const cache_shape& shape() const noexcept { return shape_; }
  /// Tokens of a layer whose rows were added. \pre the layer exists
  [[nodiscard]] index_t num_tokens(index_t layer) const noexcept {
    return num_tokens_[static_cast<std::size_t>(layer)];
  }

  /// Throws shape_error naming a layer of which no rows were added.
  void require_rows() const {
    for (index_t layer = 0; layer < shape_.num_layers; ++layer) {
      if (num_tokens(layer) == 0) refuse("no rows were added of layer " + std::to_string(layer));
    }
  }

  /// The best bases for what was added, which should be many more rows than head_dim. O(heads * head_dim^3).
  /// Throws shape_error if options cannot be, or a layer has no rows.
  [[nodiscard]] std::shared_ptr<const low_rank_bases> bases(const low_rank_options& keys,
                                                            const low_rank_options& values) const;
  [[nodiscard]] std::shared_ptr<const low_rank_bases> bases(const low_rank_options& both) const {
    return bases(both, both);
  }

 private:
  struct head_moments {
    Eigen::MatrixXd keys, values, queries, outputs;
  };
  using moments_of = Eigen::MatrixXd head_moments::*;
  using row_map = Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, 0,
                             Eigen::OuterStride<>>;

  [[noreturn]] static void refuse(const std::string& rule) {
    throw shape_error("kvcache: low_rank: " + rule);
  }
  static void require_finite(std::span<const float> numbers) {
    if (!std::all_of(numbers.begin(), numbers.end(), [](float x) { return std::isfinite(x); }))
      refuse("calibration takes finite numbers only");
  }
  void check(index_t layer, std::span<const float> rows, index_t num_heads) const {
    if (layer < 0 || layer >= shape_.num_layers) refuse("the layer must exist");
    if (static_cast<index_t>(rows.size()) % (num_heads * shape_.head_dim) != 0)
      refuse("rows must be a whole number of tokens");
    require_finite(rows);
  }
  void add_to_groups(index_t layer, std::span<const float> rows, index_t num_q_heads, moments_of moments) {
    if (num_q_heads < 1 || num_q_heads % shape_.num_kv_heads != 0)
      refuse("num_q_heads must be a multiple of num_kv_heads");
    check(layer, rows, num_q_heads);
    const index_t group_size = num_q_heads / shape_.num_kv_heads;
    for (index_t head = 0; head < num_q_heads; ++head)
      add_rows(rows, num_q_heads, head, of(layer, head / group_size).*moments);
  }
  [[nodiscard]] std::vector<detail::components> all_components(moments_of rows, moments_of weights,
                                                               double ridge) const {
    if (!(ridge >= 0 && std::isfinite(ridge))) refuse("ridge must not be negative");
    std::vector<detail::components> all;
    all.reserve(moments_.size());
    for (const head_moments& head : moments_)
      all.push_back(detail::weighted_components(head.*rows, head.*weights, ridge));
    return all;
  }
  [[nodiscard]] bool has(moments_of weights) const noexcept {
    return std::any_of(moments_.begin(), moments_.end(),
                       [=](const head_moments& head) { return (head.*weights).trace() > 0; });
  }
  [[nodiscard]] head_moments& of(index_t layer, index_t head) noexcept {
    return moments_[static_cast<std::size_t>(layer * shape_.num_kv_heads + head)];
  }

  /// moments += sum over tokens of x x^T, for one of `num_heads` heads.
  void add_rows(std::span<const float> rows, index_t num_heads, index_t head,
                Eigen::MatrixXd& moments) const {
    constexpr index_t at_a_time = 256;
    const index_t stride = num_heads * shape_.head_dim;
    const index_t num_tokens = static_cast<index_t>(rows.size()) / stride;
    for (index_t t = 0; t < num_tokens; t += at_a_time) {
      const row_map part(rows.data() + t * stride + head * shape_.head_dim,
                         std::min(at_a_time, num_tokens - t), shape_.head_dim, Eigen::OuterStride<>(stride));
      const Eigen::MatrixXd wide = part.cast<double>();
      moments.noalias() += wide.transpose() * wide;
    }
  }

  cache_shape shape_;
  std::vector<head_moments> moments_;  // [num_layers, num_kv_heads]
  std::vector<index_t> num_tokens_;    // [num_layers]
};

inline std::shared_ptr<const low_rank_bases> low_rank_calibration::bases(
    const low_rank_options& keys, const low_rank_options& values) const {
  require_rows();
  const bool weighted = has_queries();
  const bool outputs_known = has_output_weights();
  const auto all_of = [this](const detail::components& none) {
    return std::vector<detail::components>(moments_.size(), none);
  };
  const std::vector<detail::components> key_components =
      keys.left_out ? all_of({}) : this->key_components(keys.ridge);
  const std::vector<detail::components> value_components =
      values.left_out ? all_of({}) : this->value_components(values.ridge);
  const auto energies_of = [](const std::vector<detail::components>& heads) {
    std::vector<std::vector<double>> energies(heads.size());
    std::transform(heads.begin(), heads.end(), energies.begin(),
                   [](const detail::components& head) { return head.energies; });
    return energies;
  };
  const std::vector<std::vector<double>> key_energies = energies_of(key_components);
  const std::vector<std::vector<double>> value_energies = energies_of(value_components);
  low_rank_matrices made;
  made.key_layouts = detail::layout_chooser<detail::key_groups>(shape_, keys, key_energies).choose();
  made.value_layouts = detail::layout_chooser<detail::value_groups>(shape_, values, value_energies).choose();
  for (std::size_t i = 0; i < moments_.size(); ++i) {
    const detail::components& k = key_components[i];
    const detail::components& v = value_components[i];
    const std::size_t layer = i / static_cast<std::size_t>(shape_.num_kv_heads);
    const low_rank_layout& key_layout = made.key_layouts[layer];
    const low_rank_layout& value_layout = made.value_layouts[layer];
    detail::append_rows(k.in, key_layout.rank(), made.keys_in);
    if (weighted) detail::append_rows(k.out, key_layout.rank(), made.keys_out);
    detail::append_rows(v.in, value_layout.rank(), made.values);
    if (outputs_known) detail::append_rows(v.out, value_layout.rank(), made.values_out);
    detail::append_spreads(key_layout, k.energies, made.key_spreads);
    detail::append_spreads(value_layout, v.energies, made.value_spreads);
  }
  return std::make_shared<const low_rank_bases>(shape_, made);
}

inline std::shared_ptr<const low_rank_bases> low_rank_bases::fit(const cache_shape& shape,
                                                                 const low_rank_options& keys,
                                                                 const low_rank_options& values,
                                                                 const low_rank_sample& sample) {
  low_rank_calibration calibration(shape);
  const auto num_layers = static_cast<std::size_t>(shape.num_layers);
  if (sample.k.size() != sample.v.size() || sample.k.size() % num_layers != 0)
    throw shape_error("kvcache: low_rank: samples must be [num_layers, tokens, num_kv_heads, head_dim]");
  const std::size_t size = sample.k.size() / num_layers;
  for (std::size_t layer = 0; layer < num_layers; ++layer)
    calibration.add(static_cast<index_t>(layer), sample.k.subspan(layer * size, size),
                    sample.v.subspan(layer * size, size));
  if (!sample.query_moments.empty()) calibration.add_query_moments(sample.query_moments);
  return calibration.bases(keys, values);
}

inline std::shared_ptr<const low_rank_bases> low_rank_bases::fit(const cache_shape& shape,
                                                                 const low_rank_options& options,
                                                                 const low_rank_sample& sample) {
  return fit(shape, options, options, sample);
}

template <class Cache>
std::shared_ptr<const low_rank_bases> low_rank_bases::fit_from(const Cache& cache,
                                                               const low_rank_options& keys,
                                                               const low_rank_options& values,
                                                               std::span<const float> query_moments) {
  constexpr index_t at_a_time = 256;
  const cache_shape shape = cache.shape();
  low_rank_calibration calibration(shape);
  std::vector<float> k;
  std::vector<float> v;
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const index_t size = cache[layer].size();
    for (index_t t = 0; t < size; t += at_a_time) {
      const index_t count = std::min(at_a_time, size - t);
      k.resize(static_cast<std::size_t>(count * shape.num_kv_heads * shape.head_dim));
      v.resize(k.size());
      cache[layer].copy_out(t, count, k, v);
      calibration.add(layer, k, v);
    }
  }
  if (!query_moments.empty()) calibration.add_query_moments(query_moments);
  return calibration.bases(keys, values);
}

}  // namespace kvcache::inline v0::codec
