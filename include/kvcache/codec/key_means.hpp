// SPDX-License-Identifier: MIT
// key_means: the mean key of each layer and head, taken off before keys are quantised. What is left is smaller where some
// channels sit far from zero, as they do after many models' projections.
//
// q . k = q . (k - m) + q . m: the last term is one number for each query, so nothing is added to a decode step.
#pragma once

#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <cmath>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0::codec {

/// Shared by the copies of a codec. Keys are those that are appended: after RoPE, of any positions.
class key_means {
 public:
  /// \param means  [num_layers, num_kv_heads, head_dim]
  /// Throws shape_error if the size is wrong or a number is not finite.
  key_means(const cache_shape& shape, std::vector<float> means) : shape_(shape), means_(std::move(means)) {
    if (static_cast<index_t>(means_.size()) !=
        checked_mul(shape.num_layers, shape.num_kv_heads, shape.head_dim))
      throw shape_error("kvcache: key means must be [num_layers, num_kv_heads, head_dim]");
    for (const float mean : means_) {
      if (!std::isfinite(mean)) throw shape_error("kvcache: key means must be finite");
    }
  }

  /// The means of sample keys. \param keys  for each layer, [tokens, num_kv_heads, head_dim]
  /// Throws shape_error if there is not one sample for each layer, or one is not whole tokens.
  static key_means of(const cache_shape& shape, std::span<const std::vector<float>> keys) {
    const auto width = static_cast<std::size_t>(shape.num_kv_heads * shape.head_dim);
    if (static_cast<index_t>(keys.size()) != shape.num_layers)
      throw shape_error("kvcache: key means need sample keys of every layer");
    std::vector<float> means;
    for (const std::vector<float>& layer : keys) {
      if (layer.empty() || layer.size() % width != 0)
        throw shape_error("kvcache: sample keys must be [tokens, num_kv_heads, head_dim]");
      std::vector<double> sums(width);
      for (std::size_t i = 0; i < layer.size(); ++i) sums[i % width] += static_cast<double>(layer[i]);
      const std::size_t tokens = layer.size() / width;
      for (const double sum : sums) means.push_back(static_cast<float>(sum / static_cast<double>(tokens)));
    }
    return {shape, std::move(means)};
  }

  /// Throws shape_error where a cache has other layers, heads or dims.
  void validate(const cache_shape& shape) const {
    if (!same_heads(shape, shape_))
      throw shape_error("kvcache: the key means are for another number of layers, heads or dims");
  }
  [[nodiscard]] index_t bytes() const noexcept {
    return static_cast<index_t>(means_.size()) * index_t{sizeof(float)};
  }

  /// [num_layers, num_kv_heads, head_dim]
  [[nodiscard]] std::span<const float> all() const noexcept { return means_; }
  /// [head_dim]
  [[nodiscard]] const float* at(index_t layer, index_t head) const noexcept {
    return means_.data() + (layer * shape_.num_kv_heads + head) * shape_.head_dim;
  }

 private:
  cache_shape shape_;
  std::vector<float> means_;
};

}  // namespace kvcache::inline v0::codec
