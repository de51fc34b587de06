// SPDX-License-Identifier: MIT
// klt: rows as components in a basis from calibration, with 8, 6, 5, 4, 3, 2 or no bits for each, as much as it matters.
//
//   low_rank_calibration seen(shape);                        // keys, values and queries of some texts, see codec/low_rank.hpp
//   const auto bases = codec::klt_bases(seen, {.bits_per_value = 3});
//   chunked_cache<codec::klt> cache(shape, codec::klt(bases));
//   codec::centred<codec::klt> codec(rope, codec::klt(bases));   // where `seen` has keys without means, see take_off_means
//
// The Karhunen-Loeve transform takes out what channels have in common; with the queries' second moments, errors of keys fall
// where queries do not look. Equal bits for unequal components lose the ratio of the arithmetic to the geometric mean of
// their energies: 4 to 30 times for the keys of the bundled model, 4 to 100 times for its values. So bits go where they
// save the most error, over the components of all layers, keys and values at once (reverse water-filling). 6 to
// 2 bits are those of trellis. Each layer has a layout of its own, the same for its heads.
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
  /// What the relative error of a layer's keys, or values, costs; [num_layers], or empty: the same everywhere. To measure it:
  /// store one side of one layer in klt, and divide what the result loses by what expected_errors() says that side loses.
  std::vector<double> key_weights = {};
  std::vector<double> value_weights = {};
  bool centred = false;    ///< the bits are those of centred<klt>, means included
  double ridge = 1e-4;     ///< as in low_rank_options
  bool all_sizes = false;  ///< 5 and 3 bits as well: a tenth less error, a quarter more time to read
  /// Each row is encoded with three scales, and the one of least error stays: thrice the time to append, none to read.
  bool best_scales = false;
};

namespace detail {

/// What is lost with each component of the keys or the values of a layer, falling, and how many side by side get the same bits.
struct klt_costs {
  std::vector<double> of;  // [head_dim]
  index_t run;

  [[nodiscard]] std::size_t num_runs() const noexcept {
    return static_cast<std::size_t>(ceil_div(static_cast<index_t>(of.size()), run));
  }
  /// How many there are in a run: the last may be shorter.
  [[nodiscard]] index_t run_size(std::size_t index) const {
    return std::min(run, static_cast<index_t>(of.size()) - static_cast<index_t>(index) * run);
  }
  [[nodiscard]] double of_run(std::size_t index) const {
    const auto first = of.begin() + static_cast<std::ptrdiff_t>(index) * run;
    return std::accumulate(first, first + run_size(index), 0.0);
  }
};

/// Shares out bits among the components of the keys and the values of all layers.
class klt_allocator {
 public:
  /// Relative errors of normally distributed numbers: nothing, trellises of 2 to 6 bits, 127 steps to five spreads.
  struct choice {
    index_t bits;
    double error;
  };
  static constexpr std::array<choice, 7> choices{{{0, 1.0},
                                                  {2, klt_codes<2, keys_in_order>::error},
                                                  {3, klt_codes<3, keys_in_order>::error},
                                                  {4, klt_codes<4, keys_in_order>::error},
                                                  {5, klt_codes<5, keys_in_order>::error},
                                                  {6, klt_codes<6, keys_in_order>::error},
                                                  {8, klt_bytes<keys_in_order>::error}}};

  /// \param sides  keys of each layer, then values of each layer; kept by reference
  /// \param all_sizes  as in klt_options
  klt_allocator(const std::vector<klt_costs>& sides, double num_bits, bool all_sizes)
      : sides_(sides), all_sizes_(all_sizes) {
    for (std::size_t side = 0; side < sides.size(); ++side) {
      level_.emplace_back(sides[side].num_runs(), 0);
      for (std::size_t i = 0; i < level_[side].size(); ++i) offer(side, i);
    }
    while (!offers_.empty()) {
      const step best = offers_.top();
      offers_.pop();
      if (best.bits > num_bits) continue;  // a smaller step may still fit
      num_bits -= best.bits;
      level_[best.side][best.index] = above(level_[best.side][best.index]);
      offer(best.side, best.index);
    }
  }

  /// Whether every layer stores something.
  [[nodiscard]] bool fits() const noexcept {
    return std::all_of(level_.begin(), level_.end(), [](const auto& side) { return side.front() > 0; });
  }
  [[nodiscard]] low_rank_layout layout(std::size_t side) const {
    const index_t run = sides_[side].run;
    const auto head_dim = static_cast<index_t>(sides_[side].of.size());
    low_rank_layout made;
    const std::array counts{&made.bits2, &made.bits3, &made.bits4, &made.bits5, &made.bits6, &made.int8};
    static_assert(counts.size() + 1 == choices.size());
    for (const std::size_t level : level_[side]) {
      if (level > 0) *counts[level - 1] += run;
    }
    // of a head_dim that is no multiple of a run
    for (index_t* last : counts) {
      if (made.rank() > head_dim && *last > 0) *last -= made.rank() - head_dim;
    }
    return made;
  }
  /// What is lost of a side.
  [[nodiscard]] double cost(std::size_t side) const {
    double sum = 0;
    for (std::size_t i = 0; i < level_[side].size(); ++i)
      sum += sides_[side].of_run(i) * choices[level_[side][i]].error;
    return sum;
  }

 private:
  struct step {
    double gain;  // cost saved for each bit
    std::size_t side;
    std::size_t index;
    double bits;
    friend bool operator<(const step& a, const step& b) {
      if (a.gain != b.gain) return a.gain < b.gain;
      return std::pair(a.side, a.index) > std::pair(b.side, b.index);
    }
  };

  /// The next larger size; choices.size() where there is none.
  [[nodiscard]] std::size_t above(std::size_t level) const noexcept {
    ++level;
    return level < choices.size() && !all_sizes_ && choices[level].bits % 2 != 0 ? level + 1 : level;
  }

  void offer(std::size_t side, std::size_t index) {
    const std::size_t level = level_[side][index];
    const std::size_t next = above(level);
    if (next >= choices.size()) return;
    const double saved = sides_[side].of_run(index) * (choices[level].error - choices[next].error);
    const auto bits =
        static_cast<double>(sides_[side].run_size(index) * (choices[next].bits - choices[level].bits));
    // The first of a side comes before all else: every layer has to store something.
    const double gain = index == 0 && level == 0 ? std::numeric_limits<double>::infinity() : saved / bits;
    offers_.push({gain, side, index, bits});
  }

  const std::vector<klt_costs>& sides_;
  bool all_sizes_;
  std::vector<std::vector<std::size_t>> level_;  // of each side's runs, index of `choices`
  std::priority_queue<step> offers_;
};

/// For each layer, what is lost with each component: its share of the energy, mean over heads, times the layer's weight.
inline void append_costs(const std::vector<components>& heads, const cache_shape& shape,
                         const std::vector<double>& weights, index_t run, std::vector<klt_costs>& costs) {
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
    costs.push_back({std::move(cost), run});
  }
}

/// Keys come four dims to a line, values sixteen; a packed line of one bit holds eight lines, which are eight dims of 64 tokens.
/// Where heads are small, so few runs of sixteen would cost more than lines that are cut at their ends.
constexpr index_t klt_run_of_keys(index_t block_size, bool all_sizes) noexcept {
  return !all_sizes || block_size % 128 == 0 ? 4 : 8;
}
constexpr index_t klt_run_of_values(index_t head_dim, index_t block_size, bool all_sizes) noexcept {
  return head_dim < 128 ? klt_run_of_keys(block_size, all_sizes) : 16;
}

/// What is shared out, and how: components of all heads, costs and bits of all layers.
struct klt_shares {
  std::vector<components> keys;
  std::vector<components> values;
  std::vector<klt_costs> costs;
  double num_bits;

  /// Throws shape_error naming what is missing or cannot be.
  klt_shares(const low_rank_calibration& seen, const klt_options& options)
      : keys(seen.key_components(options.ridge)), values(seen.value_components(options.ridge)) {
    seen.require_rows();
    if (!(options.bits_per_value > 0 && std::isfinite(options.bits_per_value)))
      throw shape_error("kvcache: klt: bits_per_value must be given, finite and above 0");
    const cache_shape& shape = seen.shape();
    append_costs(keys, shape, options.key_weights, klt_run_of_keys(shape.block_size, options.all_sizes),
                 costs);
    append_costs(values, shape, options.value_weights,
                 klt_run_of_values(shape.head_dim, shape.block_size, options.all_sizes), costs);
    const auto dim = static_cast<double>(shape.head_dim);
    const double means = options.centred ? 16.0 / static_cast<double>(shape.block_size) : 0.0;
    num_bits = static_cast<double>(costs.size()) * dim * (options.bits_per_value - 8.0 / dim - means / 2);
  }
};

/// The components of a layout as they are stored: groups by falling energy, but within those of a trellis by rising energy,
/// because the first numbers of a trellis have the fewest states to choose from.
inline std::vector<index_t> klt_order(const low_rank_layout& layout) {
  std::vector<index_t> order(static_cast<std::size_t>(layout.rank()));
  std::iota(order.begin(), order.end(), index_t{0});
  auto first = order.begin() + layout.int8;
  for (const index_t count : {layout.bits6, layout.bits5, layout.bits4, layout.bits3, layout.bits2}) {
    std::reverse(first, first + count);
    first += count;
  }
  return order;
}

/// How far a component spreads in rows of the calibration, not less than a small part of the first, as low_rank_bases takes it.
inline float klt_spread(const std::vector<double>& energies, index_t component, index_t num_tokens) {
  const double least = energies[0] * 0x1p-24;
  const double energy = std::max(energies[static_cast<std::size_t>(component)], least);
  if (!(energy > 0)) return 1.0F;
  return static_cast<float>(std::clamp(std::sqrt(energy / static_cast<double>(num_tokens)), 1e-14, 1e14));
}

}  // namespace detail

/// Bases and layouts for what a calibration has seen: rows of every layer, and many more of them than head_dim, or other rows
/// will be unlike them. O(heads * head_dim^3). Throws shape_error naming the option that cannot be, or the layer without rows.
inline std::shared_ptr<const low_rank_bases> klt_bases(const low_rank_calibration& seen,
                                                       const klt_options& options) {
  const cache_shape& shape = seen.shape();
  const detail::klt_shares shares(seen, options);
  const detail::klt_allocator shared(shares.costs, shares.num_bits, options.all_sizes);
  if (!shared.fits())
    throw shape_error(
        "kvcache: klt: bits_per_value is too little for scales and some components in every layer");

  low_rank_matrices made;
  const auto num_layers = static_cast<std::size_t>(shape.num_layers);
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    made.key_layouts.push_back(shared.layout(layer));
    made.value_layouts.push_back(shared.layout(num_layers + layer));
    made.key_layouts.back().best_scales = made.value_layouts.back().best_scales = options.best_scales;
  }
  const bool weighted = seen.has_queries();
  const bool outputs_known = seen.has_output_weights();
  for (std::size_t i = 0; i < shares.keys.size(); ++i) {
    const std::size_t layer = i / static_cast<std::size_t>(shape.num_kv_heads);
    const index_t num_tokens = seen.num_tokens(static_cast<index_t>(layer));
    for (const index_t component : detail::klt_order(made.key_layouts[layer])) {
      detail::append_row(shares.keys[i].in, component, made.keys_in);
      if (weighted) detail::append_row(shares.keys[i].out, component, made.keys_out);
      made.key_spreads.push_back(detail::klt_spread(shares.keys[i].energies, component, num_tokens));
    }
    for (const index_t component : detail::klt_order(made.value_layouts[layer])) {
      detail::append_row(shares.values[i].in, component, made.values);
      if (outputs_known) detail::append_row(shares.values[i].out, component, made.values_out);
      made.value_spreads.push_back(detail::klt_spread(shares.values[i].energies, component, num_tokens));
    }
  }
  return std::make_shared<const low_rank_bases>(shape, made);
}

/// Relative errors of the keys, or the values, of each layer, [num_layers].
struct klt_errors {
  std::vector<double> keys;
  std::vector<double> values;
};

/// What bases of these options are expected to lose of rows like those of the calibration; of keys, as queries see it. To find
/// weights: what errors cost beside how large they are. Cost and errors as for klt_bases.
inline klt_errors expected_errors(const low_rank_calibration& seen, const klt_options& options) {
  const detail::klt_shares shares(seen, options);
  const detail::klt_allocator shared(shares.costs, shares.num_bits, options.all_sizes);
  klt_errors errors;
  const auto num_layers = static_cast<std::size_t>(seen.shape().num_layers);
  for (std::size_t side = 0; side < shares.costs.size(); ++side) {
    const std::vector<double>& costs = shares.costs[side].of;
    const double all = std::accumulate(costs.begin(), costs.end(), 0.0);
    (side < num_layers ? errors.keys : errors.values).push_back(all > 0 ? shared.cost(side) / all : 0.0);
  }
  return errors;
}

}  // namespace kvcache::inline v0::codec
