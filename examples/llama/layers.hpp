// SPDX-License-Identifier: MIT
// The parts of a Llama layer that are not attention: RMSNorm, matrix product, SwiGLU. A row is a token.
#pragma once

#include "llama/weights.hpp"

#include <kvcache/core/executor.hpp>

#include <Eigen/Core>

#include <algorithm>

namespace llama {

/// Each row divided by its root mean square, then scaled: x[t, i] / rms(x[t]) * weight[i].
/// \param x       [tokens, hidden]
/// \param weight  [hidden]
[[nodiscard]] inline matrix rms_norm(const matrix& x, const Eigen::VectorXf& weight, float eps) {
  matrix out(x.rows(), x.cols());  // [tokens, hidden]
  for (index_t t = 0; t < x.rows(); ++t) {
    const float mean_square = x.row(t).squaredNorm() / static_cast<float>(x.cols());
    const float scale = 1.0f / std::sqrt(mean_square + eps);
    out.row(t) = (x.row(t).array() * scale * weight.transpose().array()).matrix();
  }
  return out;
}

/// y[t, o] = sum_i x[t, i] * w[o, i], with the rows of `w` shared out in pieces of a few million
/// multiply-adds. The pieces depend on the sizes alone, so the result does not depend on how many workers
/// there are.
/// \param x  [tokens, in]
/// \param w  [out, in]
template <class Executor>
[[nodiscard]] matrix linear(const matrix& x, const matrix& w, Executor& executor) {
  constexpr index_t piece_work = index_t{1} << 22;  // multiply-adds
  matrix y(x.rows(), w.rows());                     // [tokens, out]
  const index_t row_work = std::max<index_t>(1, x.rows() * x.cols());
  const index_t piece_rows = std::max<index_t>(16, piece_work / row_work);
  const index_t num_pieces = (w.rows() + piece_rows - 1) / piece_rows;
  const auto multiply = [&](index_t piece, index_t /*worker*/) {
    const index_t first = piece * piece_rows, count = std::min(piece_rows, w.rows() - first);
    y.middleCols(first, count).noalias() = x * w.middleRows(first, count).transpose();
  };
  if (num_pieces == 1) {
    multiply(0, 0);
  } else {
    executor.run(num_pieces, multiply);
  }
  return y;
}

/// w_down (silu(w_gate x) * w_up x), where silu(g) = g / (1 + exp(-g)).
/// \param x  [tokens, hidden]
template <class Executor>
[[nodiscard]] matrix swiglu(const matrix& x, const layer_weights& w, Executor& executor) {
  matrix gate = linear(x, w.w_gate, executor);    // [tokens, mlp]
  const matrix up = linear(x, w.w_up, executor);  // [tokens, mlp]
  gate.array() *= up.array() / (1.0f + (-gate.array()).exp());
  return linear(gate, w.w_down, executor);  // [tokens, hidden]
}

}  // namespace llama
