// SPDX-License-Identifier: MIT
// What low_rank stores of a row: how many components, and with how many bits each.
//
//   row: | f32 | bf16 | int8 | 4 bits | 2 bits |      components by falling energy; those behind are not stored
//
// A group of components is a section of its own, encoded by the side of that name over rows as long as the group:
//
//   f32, bf16   32, 16 bits                                  codec/exact.hpp
//   int8        8 bits and one scale for each token          codec/int8.hpp
//   4, 2 bits   4, 2 bits and one scale for each token       codec/rotated.hpp
//
//   bytes of a row = 4 f32 + 2 bf16 + (int8 + 2) + (ceil(bits4 / 2) + 2) + (ceil(bits2 / 4) + 2)    groups there are
//
// Bits that are given out to fit a budget go where they save the most error (reverse water-filling).
// Source: Cover and Thomas, "Elements of Information Theory", 10.3.3 (parallel Gaussian sources).
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

namespace kvcache::inline v0::codec {

/// Components in each group, those with the most energy first.
struct low_rank_layout {
  index_t f32 = 0;
  index_t bf16 = 0;
  index_t int8 = 0;
  index_t bits4 = 0;
  index_t bits2 = 0;

  [[nodiscard]] constexpr index_t rank() const noexcept { return f32 + bf16 + int8 + bits4 + bits2; }
  /// Of these components no scale is stored.
  [[nodiscard]] constexpr index_t num_exact() const noexcept { return f32 + bf16; }

  friend bool operator==(const low_rank_layout&, const low_rank_layout&) = default;
};

/// How the components that are kept are stored.
enum class component_store {
  exact32,    ///< float
  exact16,    ///< bfloat16; with `rank`: plain truncated SVD
  bytes,      ///< 8 bits, one scale for each token
  allocated,  ///< 8, 4, 2 or 0 bits each, as fits `bits_per_value` best
};

/// Exactly one of rank, energy, bits_per_value and layout is given.
struct low_rank_options {
  index_t rank = 0;   ///< components kept, 1 to head_dim
  double energy = 0;  ///< as many as hold this share of the energy in every head, above 0, at most 1
  double bits_per_value =
      0;  ///< as many as fit into block_size * head_dim * this many bits, scales and padding included
  component_store store = component_store::bytes;
  low_rank_layout layout = {};  ///< all of it as it is; `store` is not looked at
  double ridge = 1e-6;          ///< what query moments have on their diagonal at least, relative to its mean

  friend bool operator==(const low_rank_options&, const low_rank_options&) = default;
};

namespace detail {

/// The sides that the groups of keys, or of values, are stored with.
struct key_groups {
  using f32 = exact_keys<float>;
  using bf16 = exact_keys<bfloat16>;
  using int8 = int8_keys;
  using bits4 = codec::rotated_keys<4>;
  using bits2 = codec::rotated_keys<2>;
};
struct value_groups {
  using f32 = exact_values<float>;
  using bf16 = exact_values<bfloat16>;
  using int8 = int8_values;
  using bits4 = codec::rotated_values<4>;
  using bits2 = codec::rotated_values<2>;
};

/// Where a group lies.
struct component_group {
  index_t first;            ///< component
  index_t offset;           ///< bytes from the start of the section
  index_t next_offset;      ///< where it ends
  block_geometry geometry;  ///< head_dim is the number of components
};

/// Calls body(side, component_group) for each group there is, in order. \tparam Groups  key_groups or value_groups
template <class Groups, class Body>
void for_each_group(const low_rank_layout& layout, index_t block_size, Body body) {
  index_t first = 0;
  index_t offset = 0;
  const auto visit = [&]<class Side>(const Side& side, index_t count) {
    if (count == 0) return;
    const block_geometry g{block_size, count};
    const index_t end = offset + side.section_bytes(g);
    body(side, component_group{first, offset, end, g});
    first += count;
    offset = end;
  };
  visit(typename Groups::f32{}, layout.f32);
  visit(typename Groups::bf16{}, layout.bf16);
  visit(typename Groups::int8{}, layout.int8);
  visit(typename Groups::bits4{}, layout.bits4);
  visit(typename Groups::bits2{}, layout.bits2);
}

/// Bytes of the sections of all groups.
template <class Groups>
index_t section_bytes(const low_rank_layout& layout, index_t block_size) {
  index_t bytes = 0;
  for_each_group<Groups>(layout, block_size, [&](const auto& /*side*/, const component_group& group) {
    bytes = group.next_offset;
  });
  return bytes;
}

/// Bytes that one more row takes.
template <class Groups>
index_t row_bytes(const low_rank_layout& layout, index_t block_size) {
  index_t bytes = 0;
  for_each_group<Groups>(layout, block_size, [&](const auto& side, const component_group& group) {
    bytes += side.row_bytes(group.geometry);
  });
  return bytes;
}

/// From options and the energies of components to a layout.
template <class Groups>
class layout_chooser {
 public:
  /// \param energies  for each head of each layer [head_dim], falling
  layout_chooser(const cache_shape& shape, const low_rank_options& options,
                 std::span<const std::vector<double>> energies)
      : shape_(shape), options_(options), energies_(energies) {}

  /// Throws shape_error naming the option that cannot be.
  [[nodiscard]] low_rank_layout choose() const {
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

 private:
  [[noreturn]] static void refuse(const std::string& rule) {
    throw shape_error("kvcache: low_rank: " + rule);
  }

  [[nodiscard]] low_rank_layout checked(const low_rank_layout& layout) const {
    for (const index_t count : {layout.f32, layout.bf16, layout.int8, layout.bits4, layout.bits2}) {
      if (count < 0 || count > shape_.head_dim) refuse("a group has 0 to head_dim components");
    }
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
    const auto values = static_cast<double>(shape_.block_size * shape_.head_dim);
    const auto bits = static_cast<double>(8 * section_bytes<Groups>(layout, shape_.block_size));
    return bits <= values * options_.bits_per_value;
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
    for_each_end(0, [&](index_t end8) {
      return for_each_end(end8, [&, end8](index_t end4) {
        return for_each_end(end4, [&, end8, end4](index_t end2) {
          const low_rank_layout layout{.int8 = end8, .bits4 = end4 - end8, .bits2 = end2 - end4};
          if (!fits(layout)) return false;
          const double error = expected_error(behind, end8, end4, end2);
          if (error < least && end2 > 0) {
            least = error;
            best = layout;
          }
          return true;
        });
      });
    });
    if (best.rank() == 0) refuse("bits_per_value is too little for four components");
    return best;
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
  static double expected_error(const std::vector<double>& behind, index_t end8, index_t end4,
                               index_t end2) noexcept {
    const auto at = [&behind](index_t end) { return behind[static_cast<std::size_t>(end)]; };
    return 4.5e-5 * (at(0) - at(end8)) + 0.0095 * (at(end8) - at(end4)) + 0.1175 * (at(end4) - at(end2)) +
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

}  // namespace detail

}  // namespace kvcache::inline v0::codec
