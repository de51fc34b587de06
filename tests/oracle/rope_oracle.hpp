// SPDX-License-Identifier: MIT
// Rotary position embedding in double precision with complex numbers: pair number j of a head is the complex
// number z_j, and a token at position p carries z_j * magnitude * exp(i * p * frequency_j). Uses nothing of
// the library.
//
// Sources: Su et al. 2021 (RoFormer, sec. 3.4.2); Chen et al. 2023 (linear interpolation); Peng et al. 2023
// (YaRN, with NTK-aware scaling as its definition 1 and the ramp over pair numbers of the authors' program);
// the frequency rule of Llama 3.1's model card.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <numbers>
#include <vector>

namespace oracle {

struct rope {
  enum class pairs { half, interleaved };
  enum class scaling { none, linear, ntk, yarn, llama3 };

  std::ptrdiff_t head_dim = 64;
  std::ptrdiff_t rotary_dim = 64;
  pairs pairing = pairs::half;
  double theta = 10000;
  scaling kind = scaling::none;
  double factor = 1;
  double original_context = 0;
  double beta_fast = 32;        // yarn
  double beta_slow = 1;         // yarn
  double attention_factor = 0;  // yarn; 0 means 0.1 ln(factor) + 1
  double low_freq_factor = 1;   // llama3
  double high_freq_factor = 4;  // llama3
};

/// Radians per position of each pair, [rotary_dim / 2].
inline std::vector<double> frequencies(const rope& r) {
  const double d = static_cast<double>(r.rotary_dim);
  const double two_pi = 2 * std::numbers::pi;
  const double base = r.kind == rope::scaling::ntk ? r.theta * std::pow(r.factor, d / (d - 2)) : r.theta;
  std::vector<double> result;
  for (std::ptrdiff_t j = 0; j < r.rotary_dim / 2; ++j) {
    const double plain = std::exp(-2.0 * static_cast<double>(j) / d * std::log(base));
    const double stretched = plain / r.factor;
    double f = plain;
    if (r.kind == rope::scaling::linear) {
      f = stretched;
    } else if (r.kind == rope::scaling::yarn) {
      // The pair that turns `turns` times over the original context, as a real number.
      const auto pair_turning = [&](double turns) {
        return d * std::log(r.original_context / (turns * two_pi)) / (2 * std::log(r.theta));
      };
      const double first = std::max(std::floor(pair_turning(r.beta_fast)), 0.0);
      const double last = std::min(std::ceil(pair_turning(r.beta_slow)), d - 1);
      const double width = last == first ? 0.001 : last - first;
      const double share =
          std::clamp((static_cast<double>(j) - first) / width, 0.0, 1.0);  // of the stretched one
      f = share * stretched + (1 - share) * plain;
    } else if (r.kind == rope::scaling::llama3) {
      const double turns = r.original_context * plain / two_pi;  // over the original context
      if (turns < r.low_freq_factor) {
        f = stretched;
      } else if (turns <= r.high_freq_factor) {
        const double share = (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
        f = share * plain + (1 - share) * stretched;
      }
    }
    result.push_back(f);
  }
  return result;
}

/// What every rotated pair is multiplied with besides the rotation.
inline double magnitude(const rope& r) {
  if (r.kind != rope::scaling::yarn) return 1;
  return r.attention_factor != 0 ? r.attention_factor : 0.1 * std::log(r.factor) + 1;
}

/// Rotates one head, [head_dim], to position `pos`; elements from rotary_dim on stay.
inline void rotate(double* head, double pos, const rope& r, const std::vector<double>& freqs) {
  const std::ptrdiff_t half = r.rotary_dim / 2;
  for (std::ptrdiff_t j = 0; j < half; ++j) {
    double& re = head[r.pairing == rope::pairs::half ? j : 2 * j];
    double& im = head[r.pairing == rope::pairs::half ? j + half : 2 * j + 1];
    const std::complex<double> z =
        std::complex<double>(re, im) * std::polar(magnitude(r), pos * freqs[static_cast<std::size_t>(j)]);
    re = z.real();
    im = z.imag();
  }
}

/// Rotates x, [tokens, heads, head_dim], token t to positions[t].
template <class Index>
std::vector<double> rotated(std::vector<double> x, const std::vector<Index>& positions, const rope& r) {
  if (positions.empty()) return x;
  const std::vector<double> freqs = frequencies(r);
  const std::size_t heads = x.size() / (positions.size() * static_cast<std::size_t>(r.head_dim));
  for (std::size_t t = 0; t < positions.size(); ++t)
    for (std::size_t h = 0; h < heads; ++h)
      rotate(&x[(t * heads + h) * static_cast<std::size_t>(r.head_dim)], static_cast<double>(positions[t]), r,
             freqs);
  return x;
}

}  // namespace oracle
