// SPDX-License-Identifier: MIT
// layout_chooser: from the options of low_rank and the energies of components to a layout, one for all layers or one for each.
//
// Bits that are given out to fit a budget go where they save the most error (reverse water-filling).
// Source: Cover and Thomas, "Elements of Information Theory", 10.3.3 (parallel Gaussian sources).
#pragma once

#include <kvcache/codec/low_rank_budget.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

namespace kvcache::inline v0::codec::detail {

/// From options and the energies of components to a layout.
template <class Groups>
class layout_chooser {
 public:
  /// \param energies  for each head of each layer [head_dim], falling
  layout_chooser(const cache_shape& shape, const low_rank_options& options,
                 std::span<const std::vector<double>> energies)
      : shape_(shape), options_(options), energies_(energies) {}

  /// [num_layers]. Throws shape_error naming the option that cannot be.
  [[nodiscard]] std::vector<low_rank_layout> choose() const {
    const auto num_layers = static_cast<std::size_t>(shape_.num_layers);
    if (options_.left_out) return std::vector<low_rank_layout>(num_layers);
    const low_rank_layout for_all = one_for_all();  // refuses what cannot be
    if (!options_.by_layer) return std::vector<low_rank_layout>(num_layers, for_all);
    if (options_.energy == 0 && options_.bits_per_value == 0)
      refuse("by_layer needs energy or bits_per_value");
    const std::vector<layout_chooser> layers = one_for_each_layer();
    if (options_.bits_per_value != 0) return shared_out(layers, for_all);
    std::vector<low_rank_layout> chosen;
    chosen.reserve(layers.size());
    for (const layout_chooser& layer : layers) chosen.push_back(stored(layer.rank_for_energy()));
    return chosen;
  }

 private:
  [[nodiscard]] std::vector<layout_chooser> one_for_each_layer() const {
    const auto num_heads = static_cast<std::size_t>(shape_.num_kv_heads);
    std::vector<layout_chooser> layers;
    for (std::size_t first = 0; first < energies_.size(); first += num_heads)
      layers.emplace_back(shape_, options_, energies_.subspan(first, num_heads));
    return layers;
  }

  /// The budget of all layers shared out; one layout for all where that leaves less, which whole steps can make happen.
  [[nodiscard]] std::vector<low_rank_layout> shared_out(const std::vector<layout_chooser>& layers,
                                                        const low_rank_layout& for_all) const {
    std::vector<std::vector<layout_choice>> hulls;
    double error_for_all = 0;
    for (const layout_chooser& layer : layers) {
      hulls.push_back(lower_hull(layer.choices()));
      error_for_all += layer.choice(for_all, layer.energies_behind()).error;
    }
    const auto budget = bits_of_block() / 8 * static_cast<double>(layers.size());
    std::vector<low_rank_layout> layouts(layers.size(), for_all);
    double error = 0;
    const std::vector<layout_choice> chosen = share_out(hulls, budget);
    for (const layout_choice& each : chosen) error += each.error;
    if (chosen.empty() || error > error_for_all) return layouts;
    std::transform(chosen.begin(), chosen.end(), layouts.begin(),
                   [](const layout_choice& c) { return c.layout; });
    return layouts;
  }

  /// All layouts of this store, whatever they take.
  [[nodiscard]] std::vector<layout_choice> choices() const {
    const std::vector<double> behind = energies_behind();
    std::vector<layout_choice> all;
    if (options_.store != component_store::allocated) {
      for (index_t rank = 1; rank <= shape_.head_dim; ++rank) all.push_back(choice(stored(rank), behind));
      return all;
    }
    for_each_allocation([&](const low_rank_layout& layout) {
      if (layout.rank() > 0) all.push_back(choice(layout, behind));
      return true;
    });
    return all;
  }

  [[nodiscard]] layout_choice choice(const low_rank_layout& l, const std::vector<double>& behind) const {
    const index_t exact = l.num_exact();
    const index_t end8 = exact + l.int8;
    const index_t end4 = end8 + l.bits4;
    return {l, section_bytes<Groups>(l, shape_.block_size),
            expected_error(behind, exact, end8, end4, l.rank())};
  }

  [[nodiscard]] low_rank_layout one_for_all() const {
    const low_rank_layout& given = options_.layout;
    const bool has_layout = given != low_rank_layout{};
    const int num_given = (options_.rank != 0 ? 1 : 0) + (options_.energy != 0 ? 1 : 0) +
                          (options_.bits_per_value != 0 ? 1 : 0) + (has_layout ? 1 : 0);
    if (num_given != 1) refuse("exactly one of rank, energy, bits_per_value and layout must be given");
    if (has_layout) return checked(given);
    if (options_.store == component_store::allocated) {
      if (options_.bits_per_value == 0) refuse("allocated bits need bits_per_value");
      return allocated();
    }
    if (options_.energy != 0) return stored(rank_for_energy());
    if (options_.bits_per_value != 0) return largest_that_fits();
    return checked(stored(options_.rank));
  }

  [[noreturn]] static void refuse(const std::string& rule) {
    throw shape_error("kvcache: low_rank: " + rule);
  }

  [[nodiscard]] low_rank_layout checked(const low_rank_layout& layout) const {
    for (const index_t count : layout.counts()) {
      if (count < 0 || count > shape_.head_dim) refuse("a group has 0 to head_dim components");
    }
    if (layout.num_of_klt() != 0) refuse("components of 6, 5 and 3 bits are for klt");
    if (layout.rank() < 1 || layout.rank() > shape_.head_dim)
      refuse("rank must be 1 to head_dim, got " + std::to_string(layout.rank()));
    return layout;
  }

  [[nodiscard]] low_rank_layout stored(index_t rank) const noexcept {
    if (options_.store == component_store::exact32) return {.f32 = rank};
    if (options_.store == component_store::exact16) return {.bf16 = rank};
    return {.int8 = rank};
  }

  [[nodiscard]] bool fits(const low_rank_layout& layout) const {
    return static_cast<double>(8 * section_bytes<Groups>(layout, shape_.block_size)) <= bits_of_block();
  }
  [[nodiscard]] double bits_of_block() const {
    return static_cast<double>(shape_.block_size * shape_.head_dim) * options_.bits_per_value;
  }

  [[nodiscard]] low_rank_layout largest_that_fits() const {
    index_t rank = shape_.head_dim;
    while (rank > 0 && !fits(stored(rank))) --rank;
    if (rank == 0) refuse("bits_per_value is too little for one component");
    return stored(rank);
  }

  [[nodiscard]] index_t rank_for_energy() const {
    if (!(options_.energy > 0 && options_.energy <= 1)) refuse("energy must be above 0 and at most 1");
    index_t rank = 1;
    for (const std::vector<double>& of_head : energies_) {
      // From the far end, so that the many small ones are not lost beside the large.
      const double lost = (1 - options_.energy) * std::accumulate(of_head.begin(), of_head.end(), 0.0);
      double behind = 0;
      auto n = static_cast<index_t>(of_head.size());
      for (; n > 0; --n) {
        behind += of_head[static_cast<std::size_t>(n - 1)];
        if (behind > lost) break;
      }
      rank = std::max(rank, n);
    }
    return rank;
  }

  /// The least expected error of all layouts that fit, their groups ending after whole quads (what a word of a section
  /// holds): what reverse water-filling comes to where bits are 8, 4, 2 or 0 and groups cost a scale.
  [[nodiscard]] low_rank_layout allocated() const {
    const std::vector<double> behind = energies_behind();
    low_rank_layout best;
    double least = std::numeric_limits<double>::infinity();
    for_each_allocation([&](const low_rank_layout& layout) {
      if (!fits(layout)) return false;
      const double error = choice(layout, behind).error;
      if (error < least && layout.rank() > 0) {
        least = error;
        best = layout;
      }
      return true;
    });
    if (best.rank() == 0) refuse("bits_per_value is too little for four components");
    return best;
  }

  /// body(layout) for each way to end the groups of 8, 4 and 2 bits; where it returns false those with more are left out.
  template <class Body>
  void for_each_allocation(Body body) const {
    for_each_end(0, [&](index_t end8) {
      return for_each_end(end8, [&, end8](index_t end4) {
        return for_each_end(end4, [&, end8, end4](index_t end2) {
          return body(low_rank_layout{.int8 = end8, .bits4 = end4 - end8, .bits2 = end2 - end4});
        });
      });
    });
  }

  /// body(end) for `first`, and whole quads behind it as far as there are components, until it returns false.
  /// \return whether it was true for `first`
  template <class Body>
  bool for_each_end(index_t first, Body body) const {
    constexpr index_t quad = 4;
    if (!body(first)) return false;
    for (index_t end = first; end < shape_.head_dim;) {
      end = std::min(end + quad, shape_.head_dim);
      if (!body(end)) break;
    }
    return true;
  }

  /// By the relative errors of bytes and of the codebooks of 16 and 4 levels on normally distributed numbers.
  static double expected_error(const std::vector<double>& behind, index_t exact, index_t end8, index_t end4,
                               index_t end2) noexcept {
    const auto at = [&behind](index_t end) { return behind[static_cast<std::size_t>(end)]; };
    return 4.5e-5 * (at(exact) - at(end8)) + 0.0095 * (at(end8) - at(end4)) + 0.1175 * (at(end4) - at(end2)) +
           at(end2);
  }

  /// [head_dim + 1]: share of the energy from each component on, summed over heads, so that each head counts alike.
  [[nodiscard]] std::vector<double> energies_behind() const {
    const auto dim = static_cast<std::size_t>(shape_.head_dim);
    std::vector<double> behind(dim + 1);
    for (const std::vector<double>& of_head : energies_) {
      const double total = std::accumulate(of_head.begin(), of_head.end(), 0.0);
      for (std::size_t i = 0; total > 0 && i < dim; ++i) behind[i] += of_head[i] / total;
    }
    for (std::size_t i = dim; i-- > 0;) behind[i] += behind[i + 1];
    return behind;
  }

  cache_shape shape_;
  low_rank_options options_;
  std::span<const std::vector<double>> energies_;
};

}  // namespace kvcache::inline v0::codec::detail
