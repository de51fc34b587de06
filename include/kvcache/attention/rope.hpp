// SPDX-License-Identifier: MIT
// Rotary position embedding: which pairs are rotated, by which angles, and the rotation itself.
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

#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <span>
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

/// Frequencies of a configuration and, if asked for, cosines and sines computed ahead.
class rope_table {
 public:
  /// \param max_positions  positions [0, max_positions) are computed now, [max_positions, rotary_dim] floats;
  ///                       any other position works as well, its angles are computed when met
  /// Throws shape_error naming the field that cannot be. Angles are computed in double.
  explicit rope_table(const rope_config& config, index_t max_positions = 0);

  [[nodiscard]] const rope_config& config() const noexcept { return config_; }
  /// Radians per position, [rotary_dim/2], after scaling.
  [[nodiscard]] std::span<const double> frequencies() const noexcept { return frequencies_; }
  /// What cos and sin are multiplied by: 1 except for YaRN.
  [[nodiscard]] double attention_factor() const noexcept { return attention_factor_; }

  /// Rotates heads, [num_heads, head_dim], in place, for `position`. O(num_heads * head_dim).
  void rotate(float* heads, index_t num_heads, index_t position) const noexcept {
    angles scratch;
    const float* cos_sin = position >= 0 && position < max_positions_
                               ? &computed_[static_cast<std::size_t>(position * config_.rotary_dim)]
                               : fill(scratch, static_cast<double>(position), attention_factor_);
    turn(heads, num_heads, cos_sin);
  }

  /// Turns heads that are rotated already by `delta` positions more; no attention factor.
  void turn_by(float* heads, index_t num_heads, index_t delta) const noexcept {
    angles scratch;
    turn(heads, num_heads, fill(scratch, static_cast<double>(delta), 1.0));
  }

 private:
  using angles = std::array<float, max_head_dim>;

  /// [rotary_dim/2] cosines, then as many sines.
  const float* fill(std::span<float> out, double position, double factor) const noexcept {
    const std::size_t pairs = frequencies_.size();
    for (std::size_t i = 0; i < pairs; ++i) {
      const double angle = position * frequencies_[i];
      out[i] = static_cast<float>(std::cos(angle) * factor);
      out[pairs + i] = static_cast<float>(std::sin(angle) * factor);
    }
    return out.data();
  }

  void turn(float* heads, index_t num_heads, const float* cos_sin) const noexcept {
    const auto pairs = static_cast<index_t>(frequencies_.size());
    const bool half = config_.pairing == rope_pairing::half;
    const index_t step = half ? 1 : 2;         // from one pair to the next
    const index_t partner = half ? pairs : 1;  // from the first of a pair to the second
    for (float* head = heads; head != heads + num_heads * config_.head_dim; head += config_.head_dim) {
      for (index_t i = 0; i < pairs; ++i) {
        float& x = head[i * step];
        float& y = head[i * step + partner];
        const float c = cos_sin[i];
        const float s = cos_sin[pairs + i];
        const float turned = x * c - y * s;
        y = y * c + x * s;
        x = turned;
      }
    }
  }

  void scale_frequencies();

  rope_config config_;
  std::vector<double> frequencies_;
  double attention_factor_ = 1;
  index_t max_positions_;
  std::vector<float> computed_;  // [max_positions, rotary_dim]
};

/// Rotates rows in place.
/// \param x          [tokens, heads, head_dim], row-major; the number of heads follows from the size
/// \param positions  [tokens]
inline void rope(std::span<float> x, std::span<const index_t> positions, const rope_table& table) {
  const auto num_tokens = static_cast<index_t>(positions.size());
  const index_t head_dim = table.config().head_dim;
  if (num_tokens == 0) return;
  const index_t num_heads = static_cast<index_t>(x.size()) / (num_tokens * head_dim);
  KVCACHE_ASSERT(static_cast<index_t>(x.size()) == num_tokens * num_heads * head_dim,
                 "rope: the span must be [tokens, heads, head_dim] with one position per token");
  for (index_t t = 0; t < num_tokens; ++t)
    table.rotate(x.data() + t * num_heads * head_dim, num_heads, positions[static_cast<std::size_t>(t)]);
}

/// Rotates queries and keys of tokens at positions pos, pos + 1, ... in place.
/// \param q  [num_tokens, num_q_heads, head_dim]
/// \param k  [num_tokens, num_kv_heads, head_dim]
inline void rope(std::span<float> q, std::span<float> k, index_t pos, const rope_table& table,
                 index_t num_tokens = 1) {
  for (const std::span<float> x : {q, k}) {
    const index_t token_size = num_tokens > 0 ? static_cast<index_t>(x.size()) / num_tokens : 0;
    KVCACHE_ASSERT(static_cast<index_t>(x.size()) == num_tokens * token_size &&
                       token_size % table.config().head_dim == 0,
                   "rope: the spans must be [num_tokens, heads, head_dim]");
    for (index_t t = 0; t < num_tokens; ++t)
      table.rotate(x.data() + t * token_size, token_size / table.config().head_dim, pos + t);
  }
}

inline rope_table::rope_table(const rope_config& config, index_t max_positions)
    : config_(config), max_positions_(max_positions) {
  if (config_.rotary_dim == 0) config_.rotary_dim = config.head_dim;
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw shape_error(rule);
  };
  require(config.head_dim >= 1 && config.head_dim <= max_head_dim, "kvcache: rope head_dim must be 1 to 512");
  require(config_.rotary_dim >= 2 && config_.rotary_dim <= config.head_dim && config_.rotary_dim % 2 == 0,
          "kvcache: rope rotary_dim must be even, at least 2 and at most head_dim");
  require(config.theta > 0 && std::isfinite(config.theta), "kvcache: rope theta must be positive");
  require(max_positions >= 0, "kvcache: rope max_positions must not be negative");

  frequencies_.resize(static_cast<std::size_t>(config_.rotary_dim / 2));
  for (std::size_t i = 0; i < frequencies_.size(); ++i)
    frequencies_[i] =
        std::pow(config.theta, -2.0 * static_cast<double>(i) / static_cast<double>(config_.rotary_dim));
  scale_frequencies();

  computed_.resize(static_cast<std::size_t>(checked_mul(max_positions, config_.rotary_dim)));
  for (index_t p = 0; p < max_positions; ++p)
    fill(std::span(computed_).subspan(static_cast<std::size_t>(p * config_.rotary_dim)),
         static_cast<double>(p), attention_factor_);
}

inline void rope_table::scale_frequencies() {
  using std::numbers::pi;
  const auto dim = static_cast<double>(config_.rotary_dim);
  const auto require_factor = [](double factor) {
    if (!(factor >= 1) || !std::isfinite(factor))
      throw shape_error("kvcache: rope scaling factor must be at least 1");
  };
  const auto require_context = [](index_t context) {
    if (context < 1) throw shape_error("kvcache: rope original_context must be at least 1");
  };

  if (const auto* linear = std::get_if<rope_scaling_linear>(&config_.scaling)) {
    require_factor(linear->factor);
    for (double& f : frequencies_) f /= linear->factor;

  } else if (const auto* ntk = std::get_if<rope_scaling_ntk>(&config_.scaling)) {
    require_factor(ntk->factor);
    if (config_.rotary_dim <= 2) throw shape_error("kvcache: rope NTK scaling needs rotary_dim above 2");
    const double theta = config_.theta * std::pow(ntk->factor, dim / (dim - 2));
    for (std::size_t i = 0; i < frequencies_.size(); ++i)
      frequencies_[i] = std::pow(theta, -2.0 * static_cast<double>(i) / dim);

  } else if (const auto* yarn = std::get_if<rope_scaling_yarn>(&config_.scaling)) {
    require_factor(yarn->factor);
    require_context(yarn->original_context);
    if (!(config_.theta > 1)) throw shape_error("kvcache: rope YaRN scaling needs theta above 1");
    if (!(yarn->beta_fast > yarn->beta_slow && yarn->beta_slow > 0) || !std::isfinite(yarn->beta_fast))
      throw shape_error("kvcache: rope beta_fast must be above beta_slow, both positive");
    if (!(yarn->attention_factor >= 0) || !std::isfinite(yarn->attention_factor))
      throw shape_error("kvcache: rope attention_factor must not be negative");
    // The pair that makes `turns` turns over the original context.
    const auto pair_with = [&](double turns) {
      return dim * std::log(static_cast<double>(yarn->original_context) / (turns * 2 * pi)) /
             (2 * std::log(config_.theta));
    };
    const double low = std::max(std::floor(pair_with(yarn->beta_fast)), 0.0);
    double high = std::min(std::ceil(pair_with(yarn->beta_slow)), dim - 1);
    if (low == high) high += 0.001;  // no division by zero; the ramp is a step then
    for (std::size_t i = 0; i < frequencies_.size(); ++i) {
      const double divided = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
      frequencies_[i] *= (1 - divided) + divided / yarn->factor;
    }
    attention_factor_ =
        yarn->attention_factor != 0 ? yarn->attention_factor : 0.1 * std::log(yarn->factor) + 1;

  } else if (const auto* llama = std::get_if<rope_scaling_llama3>(&config_.scaling)) {
    require_factor(llama->factor);
    require_context(llama->original_context);
    if (!(llama->high_freq_factor > llama->low_freq_factor && llama->low_freq_factor > 0) ||
        !std::isfinite(llama->high_freq_factor))
      throw shape_error("kvcache: rope high_freq_factor must be above low_freq_factor, both positive");
    for (double& f : frequencies_) {
      const double turns = static_cast<double>(llama->original_context) * f / (2 * pi);
      const double kept = std::clamp(
          (turns - llama->low_freq_factor) / (llama->high_freq_factor - llama->low_freq_factor), 0.0, 1.0);
      f *= kept + (1 - kept) / llama->factor;
    }
  }
}

}  // namespace kvcache::inline v0
