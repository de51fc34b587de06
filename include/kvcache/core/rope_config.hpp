// SPDX-License-Identifier: MIT
// rope_config: which dims of a row rotary position embedding turns together, and how far for each position.
//
// Pair i of a row at position p turns by p * frequency[i], frequency[i] = theta^(-2i / rotary_dim) before scaling:
//
//   rope_pairing::half          pairs (i, i + rotary_dim/2)     Llama in Hugging Face's layout, NeoX, Qwen, Gemma
//   rope_pairing::interleaved   pairs (2i, 2i + 1)              Llama in Meta's layout, llama2.c, GPT-J
//
// The two differ by a permutation of the weights; mixing them up goes unnoticed until the text turns bad, so
// there is no default. Dims from rotary_dim on are left alone.
// Source: Su et al. 2021, "RoFormer"; scaling: Chen et al. 2023 (linear), bloc97 2023 (NTK), Peng et al. 2023
// (YaRN), Llama 3.1.
#pragma once

#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <variant>
#include <vector>

namespace kvcache::inline v0 {

enum class rope_pairing { half, interleaved };

/// Every frequency divided by `factor`.
struct rope_scaling_linear {
  double factor = 1;
};

/// theta becomes theta * factor^(d / (d - 2)), d = rotary_dim: the highest frequency stays, the lowest is divided.
struct rope_scaling_ntk {
  double factor = 1;
};

/// Low frequencies divided by `factor`, high ones kept, a ramp between; cos and sin times `attention_factor`.
struct rope_scaling_yarn {
  double factor = 1;
  index_t original_context = 4096;  ///< tokens the model was trained on
  double beta_fast = 32;            ///< turns over original_context above which a pair is kept
  double beta_slow = 1;             ///< and below which it is divided
  double attention_factor = 0;      ///< 0: 0.1 ln(factor) + 1
};

/// As YaRN, with the ramp over wavelengths that Llama 3.1 uses, and no attention factor.
struct rope_scaling_llama3 {
  double factor = 8;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  index_t original_context = 8192;
};

using rope_scaling = std::variant<std::monostate, rope_scaling_linear, rope_scaling_ntk, rope_scaling_yarn,
                                  rope_scaling_llama3>;

struct rope_config {
  index_t head_dim;
  rope_pairing pairing;  ///< must be spelled out
  double theta = 10000;
  index_t rotary_dim = 0;  ///< leading dims that are rotated, even; 0: head_dim
  rope_scaling scaling = {};
};

/// What a configuration comes to.
struct rope_frequencies {
  std::vector<double> radians;  ///< per position, [rotary_dim/2], after scaling
  double attention_factor = 1;  ///< what cos and sin are multiplied by: 1 except for YaRN
};

namespace detail {

[[noreturn]] inline void refuse_rope(const char* rule) { throw shape_error(rule); }

inline void require_rope_factor(double factor) {
  if (!(factor >= 1) || !std::isfinite(factor))
    refuse_rope("kvcache: rope scaling factor must be at least 1");
}
inline void require_rope_context(index_t context) {
  if (context < 1) refuse_rope("kvcache: rope original_context must be at least 1");
}

inline void scale_rope(const rope_config& /*config*/, std::monostate, rope_frequencies& /*made*/) {}

inline void scale_rope(const rope_config& /*config*/, const rope_scaling_linear& linear,
                       rope_frequencies& made) {
  require_rope_factor(linear.factor);
  for (double& f : made.radians) f /= linear.factor;
}

inline void scale_rope(const rope_config& config, const rope_scaling_ntk& ntk, rope_frequencies& made) {
  require_rope_factor(ntk.factor);
  if (config.rotary_dim <= 2) refuse_rope("kvcache: rope NTK scaling needs rotary_dim above 2");
  const auto dim = static_cast<double>(config.rotary_dim);
  const double theta = config.theta * std::pow(ntk.factor, dim / (dim - 2));
  for (std::size_t i = 0; i < made.radians.size(); ++i)
    made.radians[i] = std::pow(theta, -2.0 * static_cast<double>(i) / dim);
}

inline void scale_rope(const rope_config& config, const rope_scaling_yarn& yarn, rope_frequencies& made) {
  require_rope_factor(yarn.factor);
  require_rope_context(yarn.original_context);
  if (!(config.theta > 1)) refuse_rope("kvcache: rope YaRN scaling needs theta above 1");
  if (!(yarn.beta_fast > yarn.beta_slow && yarn.beta_slow > 0) || !std::isfinite(yarn.beta_fast))
    refuse_rope("kvcache: rope beta_fast must be above beta_slow, both positive");
  if (!(yarn.attention_factor >= 0) || !std::isfinite(yarn.attention_factor))
    refuse_rope("kvcache: rope attention_factor must not be negative");
  const auto dim = static_cast<double>(config.rotary_dim);
  // The pair that makes `turns` turns over the original context.
  const auto pair_with = [&](double turns) {
    return dim * std::log(static_cast<double>(yarn.original_context) / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(config.theta));
  };
  const double low = std::max(std::floor(pair_with(yarn.beta_fast)), 0.0);
  double high = std::min(std::ceil(pair_with(yarn.beta_slow)), dim - 1);
  if (low == high) high += 0.001;  // no division by zero; the ramp is a step then
  for (std::size_t i = 0; i < made.radians.size(); ++i) {
    const double divided = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    made.radians[i] *= (1 - divided) + divided / yarn.factor;
  }
  made.attention_factor =
      yarn.attention_factor != 0 ? yarn.attention_factor : 0.1 * std::log(yarn.factor) + 1;
}

inline void scale_rope(const rope_config& /*config*/, const rope_scaling_llama3& llama,
                       rope_frequencies& made) {
  require_rope_factor(llama.factor);
  require_rope_context(llama.original_context);
  if (!(llama.high_freq_factor > llama.low_freq_factor && llama.low_freq_factor > 0) ||
      !std::isfinite(llama.high_freq_factor))
    refuse_rope("kvcache: rope high_freq_factor must be above low_freq_factor, both positive");
  for (double& f : made.radians) {
    const double turns = static_cast<double>(llama.original_context) * f / (2 * std::numbers::pi);
    const double kept = std::clamp(
        (turns - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor), 0.0, 1.0);
    f *= kept + (1 - kept) / llama.factor;
  }
}

}  // namespace detail

/// Throws shape_error naming the field that cannot be.
inline rope_frequencies frequencies_of(rope_config config) {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) detail::refuse_rope(rule);
  };
  if (config.rotary_dim == 0) config.rotary_dim = config.head_dim;
  require(config.head_dim >= 1 && config.head_dim <= max_head_dim, "kvcache: rope head_dim must be 1 to 512");
  require(config.rotary_dim >= 2 && config.rotary_dim <= config.head_dim && config.rotary_dim % 2 == 0,
          "kvcache: rope rotary_dim must be even, at least 2 and at most head_dim");
  require(config.theta > 0 && std::isfinite(config.theta), "kvcache: rope theta must be positive");
  rope_frequencies made;
  made.radians.resize(static_cast<std::size_t>(config.rotary_dim / 2));
  for (std::size_t i = 0; i < made.radians.size(); ++i)
    made.radians[i] =
        std::pow(config.theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.rotary_dim));
  std::visit([&](const auto& scaling) { detail::scale_rope(config, scaling, made); }, config.scaling);
  return made;
}

}  // namespace kvcache::inline v0
