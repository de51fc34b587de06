// SPDX-License-Identifier: MIT
// klt: rows as components in a basis from calibration, with 8, 4, 2 or no bits for each, as much as it matters.
//
//   low_rank_calibration seen(shape);                        // keys, values and queries of some texts, see codec/low_rank.hpp
//   const auto bases = codec::klt_bases(seen, {.bits_per_value = 3});
//   chunked_cache<codec::klt> cache(shape, codec::klt(bases));
//   codec::centred<codec::klt> codec(rope, codec::klt(bases));   // where `seen` has keys without means, see take_off_means
//
// The Karhunen-Loeve transform takes out what channels have in common; with the queries' second moments, errors of keys fall
// where queries do not look. Equal bits for unequal components lose the ratio of the arithmetic to the geometric mean of
// their energies: 4 to 30 times for the keys of the bundled model, 4 to 100 times for its values. So bits go where they
// save the most error, over the components of all layers, keys and values at once (reverse water-filling). 4 and 2 bits are
// those of trellis. Each layer has a layout of its own, the same for its heads.
// Tokens are encoded as they come. Like low_rank, and unlike it: one scale for a row instead of one for each group.
// Source: Cover and Thomas, "Elements of Information Theory", 10.3.3; KQ-SVD, arXiv 2512.05916, for the basis of keys.
#pragma once

#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/klt_groups.hpp>
#include <kvcache/codec/klt_rows.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <numeric>
#include <queue>
#include <string_view>
#include <utility>
#include <vector>

namespace kvcache::inline v0::codec {

/// Default-made it has no bases, and caches refuse it with shape_error.
struct klt : sides<klt_keys, klt_values> {
  static constexpr std::string_view name = "klt";

  klt() = default;
  explicit klt(const std::shared_ptr<const low_rank_bases>& bases) {
    keys.bases = bases;
    values.bases = bases;
  }
};

static_assert(block_codec<klt>);

struct klt_options {
  double bits_per_value = 0;  ///< of keys and values of all layers together, scales included, padding not
  /// What the relative error of a layer's keys, or values, costs; [num_layers], or empty: the same everywhere.
  std::vector<double> key_weights = {};
  std::vector<double> value_weights = {};
  bool centred = false;  ///< the bits are those of centred<klt>, means included
  double ridge = 1e-4;   ///< as in low_rank_options
};

namespace detail {

/// Shares out bits among the components of the keys and the values of all layers.
class klt_allocator {
 public:
  /// Relative errors of normally distributed numbers in 0, 2, 4 and 8 bits: nothing, trellis<2>, trellis<4>, 127 steps
  /// to five spreads.
  struct choice {
    index_t bits;
    double error;
  };
  static constexpr std::array<choice, 4> choices{{{0, 1.0},
                                                  {2, klt_codes<2, keys_in_order>::error},
                                                  {4, klt_codes<4, keys_in_order>::error},
                                                  {8, klt_bytes<keys_in_order>::error}}};
  static constexpr index_t quad = 4;  // components that get the same bits

  /// \param costs  for each side of each layer, what is lost with each of its components, [head_dim], falling
  klt_allocator(const std::vector<std::vector<double>>& costs, double num_bits) {
    for (std::size_t side = 0; side < costs.size(); ++side) {
      const auto& of_side = costs[side];
      level_.emplace_back((of_side.size() + quad - 1) / quad, 0);
      for (std::size_t i = 0; i < of_side.size(); i += quad)
        offer(side, i / quad,
              std::accumulate(
                  of_side.begin() + static_cast<std::ptrdiff_t>(i),
                  of_side.begin() + static_cast<std::ptrdiff_t>(std::min(i + quad, of_side.size())), 0.0));
    }
    while (!offers_.empty()) {
      const step best = offers_.top();
      offers_.pop();
      if (best.bits > num_bits) continue;  // a smaller step may still fit
      num_bits -= best.bits;
      level_[best.side][best.index] = best.level;
      offer(best.side, best.index, best.cost);
    }
  }

  /// Whether every layer stores something.
  [[nodiscard]] bool fits() const noexcept {
    return std::all_of(level_.begin(), level_.end(), [](const auto& side) { return side.front() > 0; });
  }
  [[nodiscard]] low_rank_layout layout(std::size_t side, index_t head_dim) const {
    low_rank_layout made;
    for (const std::size_t level : level_[side]) {
      if (level == 3) made.int8 += quad;
      if (level == 2) made.bits4 += quad;
      if (level == 1) made.bits2 += quad;
    }
    for (index_t* last :
         {&made.bits2, &made.bits4, &made.int8}) {  // of a head_dim that is no multiple of four
      if (made.rank() > head_dim && *last > 0) *last -= made.rank() - head_dim;
    }
    return made;
  }

 private:
  struct step {
    double gain;  // cost saved for each bit
    std::size_t side;
    std::size_t index;
    std::size_t level;
    double bits;
    double cost;
    friend bool operator<(const step& a, const step& b) {
      if (a.gain != b.gain) return a.gain < b.gain;
      return std::pair(a.side, a.index) > std::pair(b.side, b.index);
    }
  };

  void offer(std::size_t side, std::size_t index, double cost) {
    const std::size_t level = level_[side][index];
    if (level + 1 >= choices.size()) return;
    const double saved = cost * (choices[level].error - choices[level + 1].error);
    const auto bits = static_cast<double>(quad * (choices[level + 1].bits - choices[level].bits));
    // The first of a side comes before all else: every layer has to store something.
    const double gain = index == 0 && level == 0 ? std::numeric_limits<double>::infinity() : saved / bits;
    offers_.push({gain, side, index, level + 1, bits, cost});
  }

  std::vector<std::vector<std::size_t>> level_;  // of each side's quads, index of `choices`
  std::priority_queue<step> offers_;
};

/// For each layer, what is lost with each component: its share of the energy, mean over heads, times the layer's weight.
inline void append_costs(const std::vector<components>& heads, const cache_shape& shape,
                         const std::vector<double>& weights, std::vector<std::vector<double>>& costs) {
  if (!weights.empty() && static_cast<index_t>(weights.size()) != shape.num_layers)
    throw shape_error("kvcache: klt: weights must be [num_layers], or none");
  if (!std::all_of(weights.begin(), weights.end(), [](double w) { return w >= 0 && std::isfinite(w); }))
    throw shape_error("kvcache: klt: weights must be finite and not negative");
  const auto num_heads = static_cast<std::size_t>(shape.num_kv_heads);
  for (std::size_t first = 0; first < heads.size(); first += num_heads) {
    std::vector<double> cost(static_cast<std::size_t>(shape.head_dim), 0.0);
    double total = 0;
    for (std::size_t head = first; head < first + num_heads; ++head) {
      for (std::size_t i = 0; i < cost.size(); ++i) cost[i] += heads[head].energies[i];
    }
    for (const double energy : cost) total += energy;
    const double weight = weights.empty() ? 1.0 : weights[first / num_heads];
    for (double& energy : cost) energy = total > 0 ? energy / total * weight : 0.0;
    costs.push_back(std::move(cost));
  }
}

/// The components of a layout as they are stored: groups by falling energy, but within those of a trellis by rising energy,
/// because the first numbers of a trellis have the fewest states to choose from.
inline std::vector<index_t> klt_order(const low_rank_layout& layout) {
  std::vector<index_t> order(static_cast<std::size_t>(layout.rank()));
  std::iota(order.begin(), order.end(), index_t{0});
  const auto four = order.begin() + layout.int8;
  const auto two = four + layout.bits4;
  std::reverse(four, two);
  std::reverse(two, order.end());
  return order;
}

/// How far a component spreads, relative to the first.
inline float klt_spread(const std::vector<double>& energies, index_t component) {
  constexpr double least = 0x1p-12;
  const double share = energies[0] > 0 ? energies[static_cast<std::size_t>(component)] / energies[0] : 1.0;
  return static_cast<float>(std::max(std::sqrt(share), least));
}

}  // namespace detail

/// Bases and layouts for what a calibration has seen. O(heads * head_dim^3). Throws shape_error naming the option that cannot
/// be.
inline std::shared_ptr<const low_rank_bases> klt_bases(const low_rank_calibration& seen,
                                                       const klt_options& options) {
  const cache_shape& shape = seen.shape();
  const std::vector<detail::components> keys = seen.key_components(options.ridge);
  const std::vector<detail::components> values = seen.value_components();
  std::vector<std::vector<double>> costs;
  detail::append_costs(keys, shape, options.key_weights, costs);
  detail::append_costs(values, shape, options.value_weights, costs);
  const auto dim = static_cast<double>(shape.head_dim);
  const double scales = 16.0 / dim;
  const double means = options.centred ? 16.0 / static_cast<double>(shape.block_size) : 0.0;
  const auto num_layers = static_cast<std::size_t>(shape.num_layers);
  const detail::klt_allocator shared(
      costs, static_cast<double>(costs.size()) * dim * (options.bits_per_value - scales - means / 2));
  if (!(options.bits_per_value > 0) || !shared.fits())
    throw shape_error(
        "kvcache: klt: bits_per_value is too little for scales and four components in every layer");

  low_rank_matrices made;
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    made.key_layouts.push_back(shared.layout(layer, shape.head_dim));
    made.value_layouts.push_back(shared.layout(num_layers + layer, shape.head_dim));
  }
  const bool weighted = seen.has_queries();
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const std::size_t layer = i / static_cast<std::size_t>(shape.num_kv_heads);
    for (const index_t component : detail::klt_order(made.key_layouts[layer])) {
      detail::append_row(keys[i].in, component, made.keys_in);
      if (weighted) detail::append_row(keys[i].out, component, made.keys_out);
      made.key_spreads.push_back(detail::klt_spread(keys[i].energies, component));
    }
    for (const index_t component : detail::klt_order(made.value_layouts[layer])) {
      detail::append_row(values[i].in, component, made.values);
      made.value_spreads.push_back(detail::klt_spread(values[i].energies, component));
    }
  }
  return std::make_shared<const low_rank_bases>(shape, made);
}

}  // namespace kvcache::inline v0::codec
