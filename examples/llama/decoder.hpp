// SPDX-License-Identifier: MIT
// The forward pass of a Llama-architecture model, with a cache and without one.
//
//   tokens -> embedding -> num_layers x ( + attention(rms_norm) , + swiglu(rms_norm) ) -> rms_norm -> logits
//
// Both paths are the same code but for one line: attention over the cache, or over this call's tokens alone.
#pragma once

#include "llama/layers.hpp"
#include "llama/weights.hpp"

#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/executor.hpp>

#include <algorithm>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace llama {

class decoder {
 public:
  explicit decoder(model from);

  [[nodiscard]] const model_config& config() const noexcept { return config_; }
  /// \pre the layer exists
  [[nodiscard]] const kvcache::attention_weights& attention_weights(index_t layer) const {
    return attention_[static_cast<std::size_t>(layer)].weights();
  }

  /// Runs `tokens` after those in `cache` and appends their keys and values: one token, a prompt, or a piece
  /// of one.
  ///
  /// \param tokens    [num_tokens], at least one
  /// \param num_rows  how many of the newest tokens get logits, 1 to num_tokens
  /// \return          logits [num_rows, vocab]
  /// Throws std::out_of_range for a token outside the vocabulary and kvcache::capacity_error when the cache
  /// is full; then the cache is as before.
  template <class Cache, class Executor = kvcache::serial_executor>
  [[nodiscard]] matrix forward(std::span<const index_t> tokens, Cache& cache, index_t num_rows = 1,
                               Executor&& executor = {}) const;

  /// The same, and tells what each layer's attention did.
  /// \param watch  called as watch(layer, q, lse, attend_options), see kvcache::multi_head_attention::forward
  template <class Cache, class Executor, class Watch>
  [[nodiscard]] matrix forward_watched(std::span<const index_t> tokens, Cache& cache, index_t num_rows,
                                       Executor&& executor, Watch&& watch) const;

  /// The same logits without a cache: all of `tokens` from the beginning of the text, computed anew.
  template <class Executor = kvcache::serial_executor>
  [[nodiscard]] matrix recompute(std::span<const index_t> tokens, index_t num_rows = 1,
                                 Executor&& executor = {}) const;

 private:
  [[nodiscard]] matrix embed(std::span<const index_t> tokens) const;

  template <class Attention, class Executor>
  [[nodiscard]] matrix run(std::span<const index_t> tokens, index_t num_rows, Attention attention,
                           Executor& executor) const;

  model_config config_;
  model_weights weights_;  // without the attention weights, which have moved into attention_
  std::vector<kvcache::multi_head_attention> attention_;  // [num_layers]
};

inline decoder::decoder(model from) : config_(std::move(from.config)), weights_(std::move(from.weights)) {
  const index_t rotated_ahead =
      std::min<index_t>(config_.max_context, 4096);  // positions whose sines are kept ready
  for (auto& layer : weights_.layers) {
    attention_.emplace_back(std::move(layer.attention), attention_config_of(config_), rotated_ahead);
  }
}

template <class Cache, class Executor>
matrix decoder::forward(std::span<const index_t> tokens, Cache& cache, index_t num_rows,
                        Executor&& executor) const {
  auto step = cache.begin(static_cast<index_t>(tokens.size()));  // undone unless committed
  const auto attend = [&](std::size_t layer, const matrix& x) {
    return attention_[layer].forward(x, cache[static_cast<index_t>(layer)], executor);
  };
  matrix logits = run(tokens, num_rows, attend, executor);
  step.commit();
  return logits;
}

template <class Cache, class Executor, class Watch>
matrix decoder::forward_watched(std::span<const index_t> tokens, Cache& cache, index_t num_rows,
                                Executor&& executor, Watch&& watch) const {
  auto step = cache.begin(static_cast<index_t>(tokens.size()));
  const auto attend = [&](std::size_t layer, const matrix& x) {
    const auto tell = [&](const auto&... what) { watch(static_cast<index_t>(layer), what...); };
    return attention_[layer].forward(x, cache[static_cast<index_t>(layer)], executor, tell);
  };
  matrix logits = run(tokens, num_rows, attend, executor);
  step.commit();
  return logits;
}

template <class Executor>
matrix decoder::recompute(std::span<const index_t> tokens, index_t num_rows, Executor&& executor) const {
  const auto attend = [&](std::size_t layer, const matrix& x) {
    return attention_[layer].forward<kvcache::codec::f32>(x, executor);  // over exact keys and values
  };
  return run(tokens, num_rows, attend, executor);
}

inline matrix decoder::embed(std::span<const index_t> tokens) const {
  if (tokens.empty()) throw std::out_of_range("a forward pass needs at least one token");
  matrix x(static_cast<index_t>(tokens.size()), config_.hidden_size);  // [tokens, hidden]
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const index_t id = tokens[t];
    if (id < 0 || id >= config_.vocab_size)
      throw std::out_of_range("token " + std::to_string(id) + " does not exist");
    x.row(static_cast<index_t>(t)) = weights_.embedding.row(id);
  }
  return x;
}

template <class Attention, class Executor>
matrix decoder::run(std::span<const index_t> tokens, index_t num_rows, Attention attention,
                    Executor& executor) const {
  matrix x = embed(tokens);  // [tokens, hidden]
  for (std::size_t layer = 0; layer < weights_.layers.size(); ++layer) {
    const layer_weights& w = weights_.layers[layer];
    x += attention(layer, rms_norm(x, w.attention_norm, config_.norm_eps));
    x += swiglu(rms_norm(x, w.mlp_norm, config_.norm_eps), w, executor);
  }
  const matrix newest = x.bottomRows(std::clamp<index_t>(num_rows, 1, x.rows()));  // [num_rows, hidden]
  const matrix& output = config_.tied_embeddings ? weights_.embedding : weights_.output;
  return linear(rms_norm(newest, weights_.final_norm, config_.norm_eps), output, executor);
}

}  // namespace llama
