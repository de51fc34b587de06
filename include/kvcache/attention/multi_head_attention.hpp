// SPDX-License-Identifier: MIT
// multi_head_attention: an attention layer with Eigen weights over any cache.
//
//   x -> Wq, Wk, Wv (+ bias) -> norm of q and k per head -> RoPE -> append k, v -> attend -> Wo (+ bias) -> y
#pragma once

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/dense_kv.hpp>
#include <kvcache/attention/options.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/executor.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <Eigen/Core>

#include <cmath>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <utility>

namespace kvcache::inline v0 {

/// Row-major, as weights are stored and rows are handed to a cache.
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Weights of one layer. Vectors that are empty are left out of the computation.
struct attention_weights {
  matrix wq;                    ///< [num_q_heads * head_dim, hidden]
  matrix wk;                    ///< [num_kv_heads * head_dim, hidden]
  matrix wv;                    ///< [num_kv_heads * head_dim, hidden]
  matrix wo;                    ///< [hidden, num_q_heads * head_dim]
  Eigen::VectorXf bq = {};      ///< [num_q_heads * head_dim]
  Eigen::VectorXf bk = {};      ///< [num_kv_heads * head_dim]
  Eigen::VectorXf bv = {};      ///< [num_kv_heads * head_dim]
  Eigen::VectorXf bo = {};      ///< [hidden]
  Eigen::VectorXf q_norm = {};  ///< [head_dim], RMS norm of each query head before RoPE
  Eigen::VectorXf k_norm = {};  ///< [head_dim], the same of each key head
  float norm_eps = 1e-6F;
};

struct attention_config {
  index_t num_q_heads;
  index_t num_kv_heads;  ///< divides num_q_heads
  index_t head_dim;
  std::optional<rope_config> rope = {};  ///< none: positions are not encoded here
  index_t window = 0;                    ///< these three as in attend_options
  index_t sinks = 0;
  float soft_cap = 0;
  std::optional<float> scale = {};
};

/// Threads: `forward` may run at the same time on different caches.
class multi_head_attention {
 public:
  /// \param max_positions  positions whose RoPE angles are computed ahead; see rope_table
  /// Throws shape_error naming the weight that does not fit.
  multi_head_attention(attention_weights weights, const attention_config& config, index_t max_positions = 0)
      : weights_(std::move(weights)), config_(config) {
    check_weights();
    if (config.rope) {
      if (config.rope->head_dim != config.head_dim)
        throw shape_error("kvcache: rope head_dim must be that of the heads");
      rope_.emplace(*config.rope, max_positions);
    }
  }

  [[nodiscard]] const attention_config& config() const noexcept { return config_; }
  [[nodiscard]] const attention_weights& weights() const noexcept { return weights_; }
  [[nodiscard]] index_t hidden_size() const noexcept { return weights_.wo.rows(); }

  /// Appends the tokens of `x` to a layer of a cache and attends over all it holds. Prefill and decode alike.
  /// \param x      [tokens, hidden]; their positions are the layer's next ones
  /// \param layer  `cache[i]`; shape must fit the configuration
  /// \return       [tokens, hidden]
  /// Throws capacity_error if the cache is full; then the cache is unchanged. What the executor throws comes after
  /// the tokens are in; a step (cache.begin) takes them back.
  template <growing_layer Layer, executor Executor = serial_executor>
  [[nodiscard]] matrix forward(const matrix& x, Layer layer, Executor&& executor = {}) const {
    projections p = appended(x, layer);
    return attended(std::move(p), layer, executor);
  }

  /// The same, and tells what add_token_weights (attention/weights.hpp) takes.
  /// \param watch  called as watch(q, lse, attend_options) once the tokens are attended over: std::span<const float> q,
  ///               [tokens, num_q_heads, head_dim], rotated, and lse, [tokens, num_q_heads]; valid during the call
  template <growing_layer Layer, executor Executor, class Watch>
  [[nodiscard]] matrix forward(const matrix& x, Layer layer, Executor&& executor, Watch&& watch) const {
    const projections p = appended(x, layer);
    matrix out(p.q.rows(), p.q.cols());
    matrix lse(p.q.rows(), config_.num_q_heads);
    attend_options options = options_for(p.q.rows());
    const std::span<const float> q(p.q.data(), static_cast<std::size_t>(p.q.size()));
    if (p.q.rows() > 0) {
      options.lse = floats(lse);
      attend(q, layer, floats(out), options, executor);
      options.lse = {};
      watch(q, std::span<const float>(floats(lse)), std::as_const(options));
    }
    return linear(out, weights_.wo, weights_.bo);
  }

  /// The same without a cache: causal attention of the tokens of `x`, at positions 0, 1, ..., over themselves.
  /// With the cache's codec and block size, bit-identical to `forward` into an empty cache.
  template <block_codec Codec = codec::f32, executor Executor = serial_executor>
  [[nodiscard]] matrix forward(const matrix& x, Executor&& executor = {}, index_t block_size = 64) const {
    projections p = project(x, 0);
    const dense_kv<Codec> rows({1, config_.num_kv_heads, config_.head_dim, block_size}, floats(p.k),
                               floats(p.v));
    return attended(std::move(p), rows.layer(), executor);
  }

 private:
  struct projections {
    matrix q;  // [tokens, num_q_heads * head_dim]
    matrix k;  // [tokens, num_kv_heads * head_dim]
    matrix v;  // [tokens, num_kv_heads * head_dim]
  };

  static std::span<float> floats(matrix& m) { return {m.data(), static_cast<std::size_t>(m.size())}; }

  static matrix linear(const matrix& x, const matrix& weight, const Eigen::VectorXf& bias) {
    matrix y(x.rows(), weight.rows());
    if (x.rows() == 1) {
      y.row(0).transpose().noalias() =
          weight * x.row(0).transpose();  // a matrix-vector product, as decode has it
    } else {
      y.noalias() = x * weight.transpose();
    }
    if (bias.size() > 0) y.rowwise() += bias.transpose();
    return y;
  }

  /// x * rsqrt(mean(x^2) + eps) * weight, for each head of each row.
  void normalize(matrix& x, const Eigen::VectorXf& weight) const {
    if (weight.size() == 0) return;
    Eigen::Map<matrix> heads(x.data(), x.size() / config_.head_dim, config_.head_dim);
    for (index_t i = 0; i < heads.rows(); ++i) {
      const float mean_square = heads.row(i).squaredNorm() / static_cast<float>(config_.head_dim);
      heads.row(i) =
          heads.row(i).cwiseProduct(weight.transpose()) / std::sqrt(mean_square + weights_.norm_eps);
    }
  }

  projections project(const matrix& x, index_t first_position) const {
    KVCACHE_ASSERT(x.cols() == weights_.wq.cols(), "forward: x must be [tokens, hidden]");
    projections p{linear(x, weights_.wq, weights_.bq), linear(x, weights_.wk, weights_.bk),
                  linear(x, weights_.wv, weights_.bv)};
    normalize(p.q, weights_.q_norm);
    normalize(p.k, weights_.k_norm);
    if (rope_) rope(floats(p.q), floats(p.k), first_position, *rope_, x.rows());
    return p;
  }

  template <class Layer>
  projections appended(const matrix& x, Layer& layer) const {
    const cache_shape& shape = layer.shape();
    KVCACHE_ASSERT(shape.num_kv_heads == config_.num_kv_heads && shape.head_dim == config_.head_dim,
                   "forward: the cache must have the heads of the attention");
    projections p = project(x, layer.positions()[layer.size()]);
    layer.append(floats(p.k), floats(p.v));
    return p;
  }

  attend_options options_for(index_t q_len) const {
    attend_options options;
    options.q_len = q_len;
    options.scale = config_.scale;
    options.window = config_.window;
    options.sinks = config_.sinks;
    options.soft_cap = config_.soft_cap;
    options.rope = rope_ ? &*rope_ : nullptr;
    return options;
  }

  template <class Layer, class Executor>
  matrix attended(projections p, const Layer& layer, Executor& executor) const {
    const attend_options options = options_for(p.q.rows());
    if (p.q.rows() > 0) attend(std::span<const float>(floats(p.q)), layer, floats(p.q), options, executor);
    return linear(p.q, weights_.wo, weights_.bo);
  }

  void check_weights() const {
    const auto& [heads, kv_heads, dim, r, w, s, cap, scale] = config_;
    (void)r, (void)w, (void)s, (void)cap, (void)scale;
    validate({1, kv_heads, dim});
    if (heads < 1 || heads % kv_heads != 0)
      throw shape_error("kvcache: num_q_heads must be a multiple of num_kv_heads");
    const index_t hidden = weights_.wq.cols();
    const auto require = [](const char* name, index_t rows, index_t cols, index_t want_rows,
                            index_t want_cols) {
      if (rows == want_rows && cols == want_cols) return;
      throw shape_error(std::string("kvcache: ") + name + " must be [" + std::to_string(want_rows) + ", " +
                        std::to_string(want_cols) + "], got [" + std::to_string(rows) + ", " +
                        std::to_string(cols) + "]");
    };
    require("wq", weights_.wq.rows(), weights_.wq.cols(), heads * dim, hidden);
    require("wk", weights_.wk.rows(), weights_.wk.cols(), kv_heads * dim, hidden);
    require("wv", weights_.wv.rows(), weights_.wv.cols(), kv_heads * dim, hidden);
    require("wo", weights_.wo.rows(), weights_.wo.cols(), hidden, heads * dim);
    const auto require_vector = [&](const char* name, const Eigen::VectorXf& x, index_t size) {
      if (x.size() > 0) require(name, x.size(), 1, size, 1);
    };
    require_vector("bq", weights_.bq, heads * dim);
    require_vector("bk", weights_.bk, kv_heads * dim);
    require_vector("bv", weights_.bv, kv_heads * dim);
    require_vector("bo", weights_.bo, hidden);
    require_vector("q_norm", weights_.q_norm, dim);
    require_vector("k_norm", weights_.k_norm, dim);
  }

  attention_weights weights_;
  attention_config config_;
  std::optional<rope_table> rope_;
};

}  // namespace kvcache::inline v0
