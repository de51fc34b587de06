// SPDX-License-Identifier: MIT
// A Llama decoder that runs tokens of many sequences in one pass: matrix products over all of them, attention over the
// cache of each in one call.
//
//   rows   | a: token 17 | b: tokens 5, 6, 7 | c: token 40 | padding |      one pass; the tokens of a sequence in order
//
// What a row becomes does not depend on which rows are beside it, to the bit, so neither does any text: matrices are
// multiplied in tiles of always eight rows, as a library chooses other orders of summing for other sizes, and attention
// takes one token of each sequence at a time.
#pragma once

#include "llama/layers.hpp"
#include "llama/load_model.hpp"
#include "llama/weights.hpp"

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/core/executor.hpp>

#include <algorithm>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

namespace serving {

using kvcache::index_t;
using llama::matrix;

/// A token to run: the next one of sequence `sequence` of the pass.
struct batch_row {
  kvcache::token_id token = 0;
  std::size_t sequence = 0;
  bool wants_logits = false;
};

class batch_decoder {
 public:
  /// Throws std::runtime_error for a model with biases or norms of queries and keys, which are left out here.
  explicit batch_decoder(llama::model from)
      : config_(std::move(from.config)),
        weights_(std::move(from.weights)),
        rope_(config_.rope, std::min<index_t>(config_.max_context, 4096)) {
    if (config_.attention_bias || config_.output_bias || config_.qk_norm)
      throw std::runtime_error("models with biases, or norms of queries and keys, are not served here");
  }

  [[nodiscard]] const llama::model_config& config() const noexcept { return config_; }

  /// Runs `rows` and appends their keys and values.
  ///
  /// \param sequences  whose members are append(layer, k, v), which must not fail, and cache()
  /// \param rows       those of a sequence one after the other, in order; tokens of the vocabulary
  /// \return           logits [rows that want them, vocab]
  template <class Sequence>
  [[nodiscard]] matrix step(std::span<Sequence> sequences, std::span<const batch_row> rows) const;

 private:
  static constexpr index_t tile = 8;  // rows

  /// y = f(x), eight rows at a time. \param x  a multiple of eight rows
  template <class Function>
  static matrix by_tiles(const matrix& x, Function f) {
    matrix y;
    for (index_t row = 0; row < x.rows(); row += tile) {
      const matrix part = f(matrix(x.middleRows(row, tile)));
      if (y.size() == 0) y.resize(x.rows(), part.cols());
      y.middleRows(row, tile) = part;
    }
    return y;
  }

  static matrix padded(index_t num_rows, index_t num_cols) {
    return matrix::Zero((num_rows + tile - 1) / tile * tile, num_cols);
  }

  template <class Sequence>
  [[nodiscard]] matrix attention(std::size_t layer, const matrix& x, std::span<Sequence> sequences,
                                 std::span<const batch_row> rows) const;

  llama::model_config config_;
  llama::model_weights weights_;
  kvcache::rope_table rope_;
};

template <class Sequence>
matrix batch_decoder::step(std::span<Sequence> sequences, std::span<const batch_row> rows) const {
  kvcache::serial_executor executor;
  matrix x = padded(std::ssize(rows), config_.hidden_size);  // [rows and padding, hidden]
  for (std::size_t i = 0; i < rows.size(); ++i)
    x.row(static_cast<index_t>(i)) = weights_.embedding.row(rows[i].token);
  for (std::size_t layer = 0; layer < weights_.layers.size(); ++layer) {
    const llama::layer_weights& w = weights_.layers[layer];
    const matrix normed = by_tiles(
        x, [&](const matrix& part) { return llama::rms_norm(part, w.attention_norm, config_.norm_eps); });
    x += attention(layer, normed, sequences, rows);
    x += by_tiles(x, [&](const matrix& part) {
      return llama::swiglu(llama::rms_norm(part, w.mlp_norm, config_.norm_eps), w, executor);
    });
  }

  const auto num_wanted =
      std::count_if(rows.begin(), rows.end(), [](const batch_row& r) { return r.wants_logits; });
  if (num_wanted == 0) return {};
  matrix wanted = padded(num_wanted, config_.hidden_size);
  for (index_t i = 0, to = 0; i < std::ssize(rows); ++i)
    if (rows[static_cast<std::size_t>(i)].wants_logits) wanted.row(to++) = x.row(i);
  const matrix& output = config_.tied_embeddings ? weights_.embedding : weights_.output;
  return by_tiles(wanted,
                  [&](const matrix& part) {
                    return llama::linear(llama::rms_norm(part, weights_.final_norm, config_.norm_eps), output,
                                         executor);
                  })
      .topRows(num_wanted);
}

template <class Sequence>
matrix batch_decoder::attention(std::size_t layer, const matrix& x, std::span<Sequence> sequences,
                                std::span<const batch_row> rows) const {
  using layer_type = decltype(std::as_const(sequences[0]).cache()[index_t{0}]);
  const kvcache::attention_weights& w = weights_.layers[layer].attention;
  kvcache::serial_executor executor;
  const auto times = [&](const matrix& weight) {
    return [&](const matrix& part) { return llama::linear(part, weight, executor); };
  };
  matrix q = by_tiles(x, times(w.wq));  // [rows, num_q_heads * head_dim]
  matrix k = by_tiles(x, times(w.wk));  // [rows, num_kv_heads * head_dim]
  matrix v = by_tiles(x, times(w.wv));  // same
  matrix out = matrix::Zero(q.rows(), q.cols());
  const auto row_of = [](matrix& m, index_t row) {
    return std::span<float>(m.data() + row * m.cols(), static_cast<std::size_t>(m.cols()));
  };
  kvcache::attend_options options;
  options.window = config_.window;
  options.rope = &rope_;

  // Round r takes the r-th token of each sequence: it sees those before it, as it would alone.
  std::vector<index_t> left(rows.size());  // rows that no round has taken
  for (std::size_t i = 0; i < left.size(); ++i) left[i] = static_cast<index_t>(i);
  while (!left.empty()) {
    std::vector<kvcache::attend_item<layer_type>> batch;
    std::vector<index_t> later;
    std::size_t before = sequences.size();
    for (const index_t row : left) {
      const std::size_t s = rows[static_cast<std::size_t>(row)].sequence;
      if (s == std::exchange(before, s)) {
        later.push_back(row);
        continue;
      }
      const layer_type so_far = std::as_const(sequences[s]).cache()[static_cast<index_t>(layer)];
      kvcache::rope(row_of(q, row), row_of(k, row), so_far.positions()[so_far.size()], rope_);
      sequences[s].append(static_cast<index_t>(layer), row_of(k, row), row_of(v, row));
      batch.push_back({row_of(q, row), std::as_const(sequences[s]).cache()[static_cast<index_t>(layer)],
                       row_of(out, row)});
    }
    kvcache::attend(std::span<const kvcache::attend_item<layer_type>>(batch), options, executor);
    left = std::move(later);
  }
  return by_tiles(out, times(w.wo));
}

}  // namespace serving
