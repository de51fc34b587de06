// SPDX-License-Identifier: MIT
// What a codec does to attention over synthetic heads: divergence of the weights and relative error of the output with
// only the keys stored in the codec, and that error with only the values stored in it.
#pragma once

#include "quality/coded_rows.hpp"
#include "quality/metrics.hpp"
#include "quality/synthetic_head.hpp"

#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/interop/codec_spec.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace quality {

struct heads_settings {
  head_settings head = {};
  index_t num_heads = 40;
  index_t block_size = 128;      ///< tokens
  std::uint64_t first_seed = 1;  ///< head i has seed first_seed + i
};

struct attention_quality {
  double key_divergence = 0;  ///< nats, mean over queries and heads
  double key_output = 0;      ///< relative error of the output, keys in the codec
  double value_output = 0;    ///< the same, values in the codec
};

/// How peaked attention is.
struct attention_shape {
  double entropy = 0;         ///< nats, mean over queries
  double largest_weight = 0;  ///< mean over queries
};

/// A head with what exact attention makes of it.
class exact_head {
 public:
  exact_head(std::uint64_t seed, const heads_settings& settings)
      : head_(make_head(seed, settings.head)),
        g_{settings.block_size, settings.head.head_dim},
        num_tokens_(static_cast<std::size_t>(settings.head.num_tokens)),
        log_weights_(log_weights_of(exact_scores())),
        weights_(weights_of(log_weights_)),
        outputs_(outputs_of(weights_)) {}

  [[nodiscard]] attention_quality measure(const kvcache::any_codec& codec) const {
    const coded_keys keys(codec.keys, g_, head_.keys);
    const auto logs = log_weights_of(keys.scores(head_.queries));
    const coded_values values(codec.values, g_, head_.values);
    const double rows = static_cast<double>(num_queries());
    return {divergence(log_weights_, logs) / rows, relative_error(outputs_of(weights_of(logs)), outputs_),
            relative_error(values.sums(weights_), outputs_)};
  }

  [[nodiscard]] attention_shape shape() const {
    attention_shape sum;
    for (std::size_t q = 0; q < num_queries(); ++q) {
      const auto row = std::span(log_weights_).subspan(q * num_tokens_, num_tokens_);
      sum.largest_weight += std::exp(*std::max_element(row.begin(), row.end()));
      for (const double x : row) sum.entropy -= std::exp(x) * x;
    }
    const double rows = static_cast<double>(num_queries());
    return {sum.entropy / rows, sum.largest_weight / rows};
  }

 private:
  [[nodiscard]] std::size_t dim() const noexcept { return static_cast<std::size_t>(g_.head_dim); }
  [[nodiscard]] std::size_t num_queries() const noexcept { return head_.queries.size() / dim(); }

  /// [num_queries, num_tokens]
  [[nodiscard]] std::vector<float> exact_scores() const {
    return coded_keys(kvcache::make_codec("f32").keys, g_, head_.keys).scores(head_.queries);
  }

  [[nodiscard]] std::vector<double> log_weights_of(const std::vector<float>& scores) const {
    std::vector<double> all;
    all.reserve(scores.size());
    for (std::size_t at = 0; at < scores.size(); at += num_tokens_) {
      const auto row = log_softmax(std::span(scores).subspan(at, num_tokens_));
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }

  /// Weighted sums of the exact values, [num_queries, head_dim].
  [[nodiscard]] std::vector<float> outputs_of(const std::vector<float>& weights) const {
    return coded_values(kvcache::make_codec("f32").values, g_, head_.values).sums(weights);
  }

  synthetic_head head_;
  block_geometry g_;
  std::size_t num_tokens_;
  std::vector<double> log_weights_;  // [num_queries, num_tokens]
  std::vector<float> weights_;       // the same, not as logarithms
  std::vector<float> outputs_;       // [num_queries, head_dim]
};

/// Bits per number of a codec's keys in these heads, scales and padding included.
[[nodiscard]] inline double key_bits(const std::string& spec, const heads_settings& settings) {
  const block_geometry g{settings.block_size, settings.head.head_dim};
  const index_t bytes = kvcache::make_codec(spec).keys.section_bytes(g);
  return 8.0 * static_cast<double>(bytes) / static_cast<double>(g.block_size * g.head_dim);
}

struct heads_result {
  attention_shape shape = {};
  std::vector<attention_quality> codecs;  ///< in the order of the specs
};

/// Means over the heads. Sinks and tails of the codecs play no part.
[[nodiscard]] inline heads_result measure_heads(const std::vector<std::string>& specs,
                                                const heads_settings& settings = {}) {
  heads_result all{.codecs = std::vector<attention_quality>(specs.size())};
  const double count = static_cast<double>(settings.num_heads);
  const auto turns = std::make_shared<const kvcache::codec::rope_turns>(rope_of(settings.head));
  for (index_t i = 0; i < settings.num_heads; ++i) {
    const exact_head head(settings.first_seed + static_cast<std::uint64_t>(i), settings);
    all.shape.entropy += head.shape().entropy / count;
    all.shape.largest_weight += head.shape().largest_weight / count;
    for (std::size_t c = 0; c < specs.size(); ++c) {
      kvcache::any_codec codec = kvcache::make_codec(specs[c]);
      codec.keys = codec.keys.turning_with(turns);
      const attention_quality one = head.measure(codec);
      all.codecs[c].key_divergence += one.key_divergence / count;
      all.codecs[c].key_output += one.key_output / count;
      all.codecs[c].value_output += one.value_output / count;
    }
  }
  return all;
}

}  // namespace quality
