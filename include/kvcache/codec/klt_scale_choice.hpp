// SPDX-License-Identifier: MIT
// How large the scale of a row of components should be, for klt.
#pragma once

#include <kvcache/codec/klt_groups.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cmath>

namespace kvcache::inline v0::codec::detail {

/// For components in spreads. \tparam Order  keys_in_order or values_in_order
template <class Order>
class klt_scale_choice {
 public:
  /// \param spreads  [rank], of the components of `layout`
  klt_scale_choice(const low_rank_layout& layout, const float* spreads, index_t block_size) noexcept
      : layout_(layout), spreads_(spreads), block_size_(block_size) {}

  /// Root mean square of the components in spreads, those that spread far counting more; but so much that none is beyond the
  /// reach of its group, unless the noise of that would be more than a quarter of the row.
  [[nodiscard]] float usual(const float* c) const noexcept {
    float squares = 0;
    float spreads = 0;
    float least = 0;
    float energy = 0;
    float noise = 0;  // at a scale of one
    for_each_klt_group<Order>(layout_, block_size_, [&](auto group, const component_group& part) {
      group_sums sums;
      for (index_t i = part.first; i < part.first + part.geometry.head_dim; ++i)
        sums.add(spreads_[i], std::fabs(c[i]));
      squares += sums.squares;
      spreads += sums.spreads;
      energy += sums.energy;
      noise += lanes::rounded(sums.square_spreads * static_cast<float>(group.error));
      least = std::max(least, sums.largest / group.reach);
    });
    const float usual = spreads > 0 ? std::max(std::sqrt(squares / spreads), least) : 0.0F;
    return noise * usual * usual <= energy / 4 ? usual : of_least_error(c, noise);
  }

 private:
  /// Of a group, in registers.
  struct group_sums {
    float squares = 0;
    float spreads = 0;
    float energy = 0;
    float square_spreads = 0;
    float largest = 0;

    void add(float spread, float size) noexcept {
      squares += lanes::rounded(spread * size * size);
      spreads += spread;
      energy += lanes::rounded(spread * size * (spread * size));
      square_spreads += lanes::rounded(spread * spread);
      largest = std::max(largest, size);
    }
  };

  /// The scale of least noise and components cut off, noise * scale^2 + sum over i beyond the reach of
  /// spread[i]^2 (|c[i]| - reach * scale)^2: by Newton's method, which comes to it from below.
  [[nodiscard]] float of_least_error(const float* c, float noise) const noexcept {
    float scale = 0;
    for (int step = 0; step < 16; ++step) {
      float wanted = 0;
      float weight = noise;
      for_each_klt_group<Order>(layout_, block_size_, [&](auto group, const component_group& part) {
        for (index_t i = part.first; i < part.first + part.geometry.head_dim; ++i) {
          if (std::fabs(c[i]) <= group.reach * scale) continue;
          const float reached = spreads_[i] * group.reach;
          wanted += lanes::rounded(spreads_[i] * std::fabs(c[i]) * reached);
          weight += lanes::rounded(reached * reached);
        }
      });
      const float next = wanted / weight;
      if (!(next > scale)) break;
      scale = next;
    }
    return scale;
  }

  low_rank_layout layout_;
  const float* spreads_;
  index_t block_size_;
};

}  // namespace kvcache::inline v0::codec::detail
