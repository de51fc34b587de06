// SPDX-License-Identifier: MIT
// rope_identity_of: a rope_config as snapshots name it, so that keys rotated in one way are not taken for another's.
#pragma once

#include <kvcache/attention/rope.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/bytes.hpp>
#include <kvcache/store/identity.hpp>

#include <cstddef>
#include <string>
#include <variant>
#include <vector>

namespace kvcache::inline v0::store {

/// Pairing, theta, rotated dims and scaling with all its numbers.
[[nodiscard]] inline rope_identity rope_identity_of(const rope_config& config) {
  std::vector<std::byte> scaling;
  byte_writer to(scaling);
  const auto put = [&](const char* name, auto... numbers) {
    to.text(name);
    (to.number(static_cast<double>(numbers)), ...);
  };
  std::visit(
      [&]<class Scaling>(const Scaling& s) {
        if constexpr (std::is_same_v<Scaling, rope_scaling_linear>) {
          put("linear", s.factor);
        } else if constexpr (std::is_same_v<Scaling, rope_scaling_ntk>) {
          put("ntk", s.factor);
        } else if constexpr (std::is_same_v<Scaling, rope_scaling_yarn>) {
          put("yarn", s.factor, s.original_context, s.beta_fast, s.beta_slow, s.attention_factor);
        } else if constexpr (std::is_same_v<Scaling, rope_scaling_llama3>) {
          put("llama3", s.factor, s.low_freq_factor, s.high_freq_factor, s.original_context);
        }
      },
      config.scaling);
  return {config.pairing == rope_pairing::half ? rope_kind::half : rope_kind::interleaved, config.theta,
          config.rotary_dim == 0 ? config.head_dim : config.rotary_dim,
          std::string(reinterpret_cast<const char*>(scaling.data()), scaling.size())};
}

}  // namespace kvcache::inline v0::store
