// SPDX-License-Identifier: MIT
// What the codecs cost in quality and gain in speed, as measured: the tables that plan() reads.
//
// Copied from docs/codecs.md ("The bundled model", "Synthetic heads", "With trellis codecs", "Keys without their mean") and from
// the README ("Benchmarks"); a test compares every figure with those pages. Only synthetic heads and a model of 2.4 million
// parameters were measured, bigger models were not: take the order of the codecs from here, not a promise.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/serving/cache_sizes.hpp>

#include <array>
#include <optional>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::serving {

/// Quality of keys in one codec and values in another, with or without exact sinks and tail.
struct quality_figures {
  std::string_view keys;
  std::string_view values;
  index_t sink_tokens = 0;
  index_t tail_tokens = 0;
  codec::exact_element exact_as = codec::exact_element::bf16;
  /// KL divergence of the bundled model's next token from that over an f32 cache, nats, median of 4,096 positions;
  /// 64 dims, blocks of 128 tokens.
  double median_kl = 0;
  /// Facts recalled of 320 scattered through documents; f32 recalls 318.
  int recalled = 0;
  /// Relative error of the output of attention where only keys, or only values, are in the codec, 128 dims.
  std::optional<double> key_output_error;
  std::optional<double> value_output_error;

  /// That of int8 behind a tail of 128 tokens in bf16: what bf16's own rounding costs.
  static constexpr double reference_kl = 1.07e-6;

  /// Divergence in multiples of that; bf16 is .98, more is worse.
  [[nodiscard]] constexpr double kl_ratio() const noexcept { return median_kl / reference_kl; }
};

/// Times as fast as bf16 in decode, and what it takes to store; neither depends on sinks and tail.
struct speed_figures {
  std::string_view keys;
  std::string_view values;
  /// Decode of one token over 16,384 against bf16: 4 query heads per KV head on 1 and 2 threads, then 8 on 1 and 2.
  /// 2 virtual CPUs of a Zen 5 with avx512, spreads of 3 to 30 %.
  std::array<double, 4> decode{};
  /// Microseconds to encode keys and values of one token, 8 heads of 128, one thread; where it was measured.
  std::optional<double> encode_us;

  /// The figure for the nearer of the measured groups, one thread.
  [[nodiscard]] constexpr double decode_at(index_t group_size) const noexcept {
    return group_size > 6 ? decode[2] : decode[0];
  }
};

// clang-format off
/// Least lossy first within each part.
inline constexpr auto measured_quality = [] {
  using enum codec::exact_element;
  return std::array{
    // keys, values, sinks, tail, how both are stored, median KL, recalled, output error of keys, of values
    quality_figures{"f32", "f32", 0, 0, bf16, 0.0, 318, {}, {}},  // what the others are compared with
    quality_figures{"f16", "f16", 0, 0, bf16, 1.63e-8, 318, 0.0007, 0.0002},
    quality_figures{"bf16", "bf16", 0, 0, bf16, 1.05e-6, 318, 0.0058, 0.0014},
    quality_figures{"channel4", "rotated4", 0, 0, bf16, 6.73e-6, 318, 0.1356, 0.0806},
    quality_figures{"int8", "int8", 0, 0, bf16, 9.20e-6, 318, 0.0278, 0.0059},
    quality_figures{"channel3", "rotated3", 0, 0, bf16, 2.55e-5, 317, 0.2847, 0.1548},
    quality_figures{"balanced2", "rotated2", 0, 0, bf16, 1.14e-4, 267, 0.6177, 0.2927},
    quality_figures{"int8", "rotated4", 0, 0, bf16, 8.67e-4, 317, 0.0278, 0.0806},
    quality_figures{"rotated4", "rotated4", 0, 0, bf16, 1.90e-3, 318, 0.2205, 0.0806},
    quality_figures{"rotated3", "rotated3", 0, 0, bf16, 7.10e-3, 315, 0.4066, 0.1548},
    quality_figures{"rotated2", "rotated2", 0, 0, bf16, 3.47e-2, 260, 0.6790, 0.2927},
    // with a tail in bf16
    quality_figures{"int8", "int8", 4, 128, bf16, 1.07e-6, 318, 0.0278, 0.0059},
    quality_figures{"centred_int8", "centred_int8", 4, 128, bf16, 1.07e-6, 318, 0.0113, 0.0059},
    quality_figures{"int8", "rotated4", 4, 128, bf16, 1.52e-6, 318, 0.0278, 0.0806},
    quality_figures{"centred_trellis4", "centred_trellis4", 4, 128, bf16, 1.84e-6, 318, 0.1041, 0.0628},
    quality_figures{"centred_rotated4", "centred_rotated4", 4, 128, bf16, 2.31e-6, 319, 0.1283, 0.0806},
    quality_figures{"channel4", "trellis4", 4, 128, bf16, 2.67e-6, 318, {}, {}},
    quality_figures{"trellis4", "trellis4", 4, 128, bf16, 2.68e-6, 319, 0.1752, 0.0636},
    quality_figures{"channel4", "rotated4", 4, 128, bf16, 2.71e-6, 319, 0.1356, 0.0806},
    quality_figures{"balanced4", "balanced4", 4, 128, bf16, 3.34e-6, 318, 0.1849, 0.0745},
    quality_figures{"rotated4", "rotated4", 4, 128, bf16, 3.42e-6, 318, 0.2205, 0.0806},
    quality_figures{"centred_trellis3", "centred_trellis3", 4, 128, bf16, 3.51e-6, 317, 0.1840, 0.1206},
    quality_figures{"centred_rotated3", "centred_rotated3", 4, 128, bf16, 4.35e-6, 317, 0.2277, 0.1548},
    quality_figures{"trellis3", "trellis3", 4, 128, bf16, 6.23e-6, 316, 0.3365, 0.1208},
    quality_figures{"channel3", "trellis3", 4, 128, bf16, 7.32e-6, 317, {}, {}},
    quality_figures{"channel3", "rotated3", 4, 128, bf16, 7.91e-6, 317, 0.2847, 0.1548},
    quality_figures{"balanced3", "balanced3", 4, 128, bf16, 8.59e-6, 312, 0.3320, 0.1421},
    quality_figures{"centred_trellis2", "centred_trellis2", 4, 128, bf16, 8.84e-6, 310, 0.3440, 0.2351},
    quality_figures{"rotated3", "rotated3", 4, 128, bf16, 9.05e-6, 316, 0.4066, 0.1548},
    quality_figures{"channel3", "trellis2", 4, 128, bf16, 9.20e-6, 317, {}, {}},
    quality_figures{"centred_rotated2", "centred_rotated2", 4, 128, bf16, 1.32e-5, 304, 0.4015, 0.2927},
    quality_figures{"trellis2", "trellis2", 4, 128, bf16, 2.09e-5, 309, 0.5989, 0.2351},
    quality_figures{"balanced2", "balanced2", 4, 128, bf16, 3.00e-5, 261, 0.6177, 0.2652},
    quality_figures{"balanced2", "rotated2", 4, 128, bf16, 3.17e-5, 275, 0.6177, 0.2927},
    quality_figures{"rotated2", "rotated2", 4, 128, bf16, 4.00e-5, 311, 0.6790, 0.2927},
    // with a tail in f16
    quality_figures{"centred_int8", "centred_int8", 4, 128, f16, 2.65e-8, 318, 0.0113, 0.0059},
    quality_figures{"int8", "int8", 4, 128, f16, 3.05e-8, 318, 0.0278, 0.0059},
    quality_figures{"int8", "rotated4", 4, 128, f16, 2.30e-7, 318, 0.0278, 0.0806},
    quality_figures{"centred_trellis4", "centred_trellis4", 4, 128, f16, 4.62e-7, 318, 0.1041, 0.0628},
    quality_figures{"centred_rotated4", "centred_rotated4", 4, 128, f16, 7.04e-7, 318, 0.1283, 0.0806},
    quality_figures{"trellis4", "trellis4", 4, 128, f16, 1.13e-6, 319, 0.1752, 0.0636},
    quality_figures{"channel4", "trellis4", 4, 128, f16, 1.14e-6, 318, {}, {}},
    quality_figures{"channel4", "rotated4", 4, 128, f16, 1.20e-6, 319, 0.1356, 0.0806},
    quality_figures{"centred_trellis3", "centred_trellis3", 4, 128, f16, 1.70e-6, 317, 0.1840, 0.1206},
    quality_figures{"balanced4", "balanced4", 4, 128, f16, 1.77e-6, 318, 0.1849, 0.0745},
    quality_figures{"rotated4", "rotated4", 4, 128, f16, 1.87e-6, 318, 0.2205, 0.0806},
    quality_figures{"centred_rotated3", "centred_rotated3", 4, 128, f16, 2.46e-6, 316, 0.2277, 0.1548},
    quality_figures{"trellis3", "trellis3", 4, 128, f16, 4.36e-6, 316, 0.3365, 0.1208},
    quality_figures{"channel3", "trellis3", 4, 128, f16, 5.66e-6, 318, {}, {}},
    quality_figures{"channel3", "rotated3", 4, 128, f16, 6.04e-6, 317, 0.2847, 0.1548},
    quality_figures{"balanced3", "balanced3", 4, 128, f16, 6.86e-6, 312, 0.3320, 0.1421},
    quality_figures{"centred_trellis2", "centred_trellis2", 4, 128, f16, 6.90e-6, 311, 0.3440, 0.2351},
    quality_figures{"channel3", "trellis2", 4, 128, f16, 7.12e-6, 316, {}, {}},
    quality_figures{"rotated3", "rotated3", 4, 128, f16, 7.29e-6, 316, 0.4066, 0.1548},
    quality_figures{"centred_rotated2", "centred_rotated2", 4, 128, f16, 1.13e-5, 303, 0.4015, 0.2927},
    quality_figures{"trellis2", "trellis2", 4, 128, f16, 1.92e-5, 309, 0.5989, 0.2351},
    quality_figures{"balanced2", "balanced2", 4, 128, f16, 2.82e-5, 259, 0.6177, 0.2652},
    quality_figures{"balanced2", "rotated2", 4, 128, f16, 2.93e-5, 272, 0.6177, 0.2927},
    quality_figures{"rotated2", "rotated2", 4, 128, f16, 3.78e-5, 309, 0.6790, 0.2927}};
}();

inline constexpr std::array measured_speed = {
    speed_figures{"bf16", "bf16", {1, 1, 1, 1}, {}},  // by definition
    speed_figures{"int8", "int8", {1.9, 2.1, 1.6, 1.6}, 0.9},
    speed_figures{"rotated4", "rotated4", {3.1, 3.2, 1.8, 2.4}, 2.5},
    speed_figures{"rotated2", "rotated2", {3.5, 5.1, 2.5, 2.5}, {}},
    speed_figures{"channel4", "rotated4", {2.6, 3.3, 1.8, 2.0}, 3.1},
    speed_figures{"channel3", "rotated3", {2.4, 3.8, 1.9, 1.9}, {}},
    speed_figures{"balanced2", "rotated2", {2.9, 4.4, 2.2, 2.2}, 3.8},
    speed_figures{"trellis4", "trellis4", {2.5, 3.6, 2.1, 2.1}, 28.0},
    speed_figures{"trellis2", "trellis2", {1.6, 3.4, 1.9, 1.9}, 28.0},
    speed_figures{"centred_rotated4", "centred_rotated4", {1.9, 2.8, 1.5, 1.6}, 3.9},
    speed_figures{"centred_trellis3", "centred_trellis3", {1.3, 2.1, 1.1, 1.2}, 35.0},
    speed_figures{"centred_trellis2", "centred_trellis2", {1.5, 2.4, 1.25, 1.3}, {}}};
// clang-format on

namespace detail {

/// channel's own values are those of rotated, those of centred_rotated4 too; figures have these under the name of the keys.
inline std::string_view values_name(const codec_choice& codec) noexcept {
  if (codec.values == "channel4") return "rotated4";
  if (codec.values == "channel3") return "rotated3";
  if (codec.keys == "centred_" + codec.values) return codec.keys;
  return codec.values;
}

}  // namespace detail

/// The measured quality of a choice, or null. More sinks, a longer tail or a finer one than were measured cost no quality, so
/// the figures of the longest tail that is no longer than the choice's stand for it, and of these the finest that is no finer.
inline const quality_figures* find_quality(const codec_choice& codec) noexcept {
  const quality_figures* best = nullptr;
  for (const quality_figures& f : measured_quality) {
    if (f.keys != codec.keys || f.values != detail::values_name(codec)) continue;
    if (f.tail_tokens > codec.tail_tokens || f.sink_tokens > codec.sink_tokens) continue;
    if (f.exact_as > codec.exact_as) continue;
    if (best == nullptr || f.tail_tokens > best->tail_tokens ||
        (f.tail_tokens == best->tail_tokens && f.exact_as > best->exact_as))
      best = &f;
  }
  return best;
}

/// The measured speed of a choice, or null.
inline const speed_figures* find_speed(const codec_choice& codec) noexcept {
  for (const speed_figures& f : measured_speed) {
    if (f.keys == codec.keys && f.values == detail::values_name(codec)) return &f;
  }
  return nullptr;
}

/// The choices that plan() weighs unless told otherwise: those that lose least for what they take, least lossy first;
/// and two without a tail, which costs memory for each sequence. Those with one have it in f16.
/// \param knows_rope  centred codecs, too; see plan_options
inline std::vector<codec_choice> default_choices(bool knows_rope = false) {
  constexpr auto f16 = codec::exact_element::f16;
  std::vector<codec_choice> choices = {{"bf16", "bf16"},
                                       {"f16", "f16"},
                                       {"int8", "int8", 4, 128, f16},
                                       {"int8", "rotated4", 4, 128, f16},
                                       {"channel4", "rotated4", 4, 128, f16},
                                       {"channel3", "rotated3", 4, 128, f16},
                                       {"trellis3", "trellis3", 4, 128, f16},
                                       {"trellis2", "trellis2", 4, 128, f16},
                                       {"int8", "int8"},
                                       {"rotated4", "rotated4"}};
  if (knows_rope) {
    for (const char* name : {"centred_rotated4", "centred_trellis4", "centred_rotated3", "centred_trellis3",
                             "centred_rotated2", "centred_trellis2"})
      choices.push_back({name, name, 4, 128, f16});
  }
  return choices;
}

}  // namespace kvcache::inline v0::serving
