// SPDX-License-Identifier: MIT
// Bases of codec::klt for a model, from texts: what keys, values and queries look like, and what errors of each layer cost.
#pragma once

#include "llama/decoder.hpp"
#include "quality/metrics.hpp"

#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/klt.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_codec.hpp>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace quality {

using kvcache::any_codec;
using kvcache::index_t;
using layered_codec = kvcache::codec::by_layer<any_codec>;

/// An empty cache of a codec that was put together.
[[nodiscard]] inline kvcache::any_cache cache_of(const layered_codec& codec,
                                                 const kvcache::cache_shape& shape) {
  return {"paged/put together", kvcache::page_pool<layered_codec>(shape, {}, codec).sequence()};
}

/// What a model's texts tell.
class klt_calibration {
 public:
  using ids = std::vector<index_t>;
  /// Median divergence of some texts with a codec, nats.
  using median_of = std::function<double(const layered_codec&)>;

  /// \param texts  token ids, none of those that are measured later
  klt_calibration(const llama::decoder& model, const kvcache::cache_shape& shape, std::span<const ids> texts)
      : shape_(shape),
        turns_(std::make_shared<const kvcache::codec::rope_turns>(model.config().rope)),
        seen_(shape) {
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      const auto& wo = model.attention_weights(layer).wo;
      seen_.add_output_weights(layer, {wo.data(), static_cast<std::size_t>(wo.size())},
                               model.config().num_q_heads);
    }
    for (const ids& text : texts) watch(model, text);
  }

  /// Weighs layers, keys and values by what their errors alone add to the divergence, for as much error as they have. In between
  /// all weights are 1.
  void weigh(const median_of& divergence) {
    constexpr double bits = 4.4;
    const double floor = divergence(layered_codec(with_options({})));
    const any_codec coded = codec(bits);
    const kvcache::codec::klt_errors errors = kvcache::codec::expected_errors(seen_, with_bits(bits));
    std::vector<double> weights;
    for (std::size_t i = 0; i < 2 * num_layers(); ++i) {
      std::vector<any_codec> layers(num_layers(), with_options({}));
      if (i < num_layers()) {
        layers[i].keys = coded.keys;
      } else {
        layers[i - num_layers()].values = coded.values;
      }
      const double error = i < num_layers() ? errors.keys[i] : errors.values[i - num_layers()];
      weights.push_back(std::max(divergence(layered_codec(layers)) / floor - 1, 0.02) / error);
    }
    set_weights(weights);
  }

  /// Centred klt keys and klt values, of so many bits in the mean; no tail.
  [[nodiscard]] any_codec codec(double bits_per_value) const {
    const kvcache::codec::klt klt(kvcache::codec::klt_bases(seen_, with_bits(bits_per_value)));
    kvcache::codec::centred_keys<kvcache::codec::klt_keys> keys;
    keys.turns = turns_;
    keys.rest = klt.keys;
    any_codec made;
    made.keys = kvcache::codec::any_keys::of(keys);
    made.values = kvcache::codec::any_values::of(klt.values);
    return made;
  }

  /// The tail that sensitivities are measured with.
  [[nodiscard]] static any_codec with_options(any_codec codec) {
    codec.tail_tokens = 128;
    codec.sink_tokens = 4;
    return codec;
  }

 private:
  [[nodiscard]] std::size_t num_layers() const noexcept {
    return static_cast<std::size_t>(shape_.num_layers);
  }

  [[nodiscard]] kvcache::codec::klt_options with_bits(double bits_per_value) const {
    kvcache::codec::klt_options options = weights_;
    options.bits_per_value = bits_per_value;
    options.centred = true;
    options.all_sizes = true;
    options.best_scales = true;
    return options;
  }

  void set_weights(const std::vector<double>& weights) {
    const auto middle = weights.begin() + static_cast<std::ptrdiff_t>(num_layers());
    weights_.key_weights.assign(weights.begin(), middle);
    weights_.value_weights.assign(middle, weights.end());
  }

  /// One forward pass over a text.
  void watch(const llama::decoder& model, const ids& text) {
    auto cache = kvcache::make_cache("paged/f32", shape_);
    kvcache::serial_executor serial;
    const auto take_queries = [this, &model](index_t layer, std::span<const float> q, const auto&...) {
      seen_.add_queries(layer, q, model.config().num_q_heads);
    };
    (void)model.forward_watched(text, cache, 1, serial, take_queries);
    std::vector<float> k(text.size() * static_cast<std::size_t>(shape_.num_kv_heads * shape_.head_dim));
    std::vector<float> v(k.size());
    for (index_t layer = 0; layer < shape_.num_layers; ++layer) {
      cache[layer].copy_out(0, static_cast<index_t>(text.size()), k, v);
      kvcache::codec::take_off_means(k, shape_, turns_.get());
      seen_.add(layer, k, v);
    }
  }

  kvcache::cache_shape shape_;
  std::shared_ptr<const kvcache::codec::rope_turns> turns_;
  kvcache::codec::low_rank_calibration seen_;
  kvcache::codec::klt_options weights_;
};

}  // namespace quality
