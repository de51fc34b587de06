// SPDX-License-Identifier: MIT
// The codec trellis<b>, b = 2, 3, 4, 5 or 6 bits per number: a row of codes is read as one stream of bits, and the last eight
// bits of it, the state, select one of 256 numbers of a table. The oldest bit is a sign, table[s + 128] = -table[s], so that
// kernels look up one of 128; trained so, tables lose as little, within 1 %.
//
//   state[d] = (state[d-1] << b | code[d]) mod 256, state[-1] = 0           row[d] ~ scale * table[state[d]]
//
//   b = 2                          code[d-3] code[d-2] code[d-1] code[d]
//   state[d], high bit first        7 6       5 4       3 2       1 0        each number shares six bits with its neighbour
//
// Here in plain C++, which every instruction set has to equal bit by bit: all that decides is done in integers.
//
// Encoding a row
//   1. m = row * 2^k rounded to nearest even, 2^k such that the largest |m| lies in [2^13, 2^14]; the power of two is exact.
//   2. t = m * (trellis_unit / rms(m)) in fixed point with 6 - b fractional bits: what the states should come to.
//   3. The codes of least sum_d (t[d] - table[state[d]])^2, by Viterbi: cost[s] of the best codes that end in state s.
//      Of two equal predecessors, and of two equal last states, the lower one.
//   4. scale = sum m table[state] / sum table[state]^2 * 2^-k: least squares, of exact sums.
//
// With a unit of its own in place of rms(m) a row may be at 127 throughout.
//
// t^2 is the same for all codes and left out of the sums: they lie between -sum t^2 and sum (x^2 + 2 |t x|). For rows of 512
// numbers and tables up to 127, times 64 for the fixed point, that is within [-2^26, 2^30), and with a unit within
// [-2^29, 3 * 2^29), so nothing overflows.
// Source: Viterbi 1967; Tseng et al. 2024, "QTIP: Quantization with Trellises and Incoherence Processing", for the trellis.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/portable_low_bit.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace kvcache::inline v0::kernel::portable {

/// Fractional bits of the targets: `64 * (t - x)^2` is what a cost counts, however many bits a code has.
constexpr int trellis_fraction(int bits) noexcept { return 6 - bits; }

/// A row as integers, m = row * 2^exponent, and what its states should come to. Zeros up to a multiple of 16.
struct trellis_row {
  alignas(64) std::array<std::int16_t, max_head_dim> m;
  alignas(64) std::array<std::int16_t, max_head_dim> targets;
  int exponent;
};

/// What Viterbi leaves behind: for every dim and p = state mod (256 >> bits) the high bits, in the low bits of a byte, of
/// the best state that ends in p; and the costs of all last states.
struct trellis_path {
  alignas(64) std::array<std::uint8_t, max_head_dim * trellis_states / 4> from;  // [count][256 >> bits]
  alignas(64) std::array<std::int32_t, trellis_states> cost;

  /// The last state of least cost, the first of them. In lanes, because it is asked for every row.
  [[nodiscard]] [[gnu::always_inline]] std::uint32_t best_last() const noexcept {
    constexpr std::size_t lanes = 16;
    std::array<std::int32_t, lanes> least;
    std::copy_n(cost.begin(), lanes, least.begin());
    for (std::size_t s = lanes; s < cost.size(); s += lanes) {
      for (std::size_t i = 0; i < lanes; ++i) least[i] = std::min(least[i], cost[s + i]);
    }
    const std::int32_t best = *std::min_element(least.begin(), least.end());
    const auto has_best = [&](std::size_t first) {
      bool found = false;
      for (std::size_t i = 0; i < lanes; ++i) found |= cost[first + i] == best;
      return found;
    };
    std::size_t state = 0;
    while (!has_best(state)) state += lanes;
    while (cost[state] != best) ++state;
    return static_cast<std::uint32_t>(state);
  }

  /// Costs before the first dim: only state 0 can be had.
  void start() noexcept {
    cost.fill(std::int32_t{1} << 30);
    cost[0] = 0;
  }
};

/// Floor of the binary logarithm of the largest magnitude. \pre the row is finite and not zero
constexpr int largest_exponent(std::uint32_t largest_bits) noexcept {
  const int exponent = static_cast<int>(largest_bits >> 23);
  return exponent != 0 ? exponent - 127 : static_cast<int>(std::bit_width(largest_bits)) - 150;
}

/// Steps 1 and 2, with `unit` in place of the root mean square unless it is 0. Returns false for a row of zeros then.
[[gnu::always_inline]] inline bool prepare_trellis(int bits, const float* row, index_t count, float unit,
                                                   trellis_row& out) {
  alignas(64) std::array<float, max_head_dim> x;
  const index_t padded = ceil_div(count, key_lanes) * key_lanes;
  std::memcpy(x.data(), row, static_cast<std::size_t>(count) * sizeof(float));
  std::fill(x.data() + count, x.data() + padded, 0.0F);

  std::array<std::uint32_t, key_lanes> lane{};
  for (index_t i = 0; i < padded; i += key_lanes) {
    for (std::size_t j = 0; j < key_lanes; ++j) {
      const auto magnitude = std::bit_cast<std::uint32_t>(x[static_cast<std::size_t>(i) + j]) & 0x7fffffffU;
      lane[j] = std::max(lane[j], magnitude);
    }
  }
  const std::uint32_t largest = *std::max_element(lane.begin(), lane.end());
  if (largest == 0) {
    out.m.fill(0);
    out.targets.fill(0);
    out.exponent = 0;
    return unit > 0;
  }

  // m = x * 2^k in two steps, because 2^k alone need not be a float
  constexpr float round_to_integer = 0x1.8p23F;
  out.exponent = 13 - largest_exponent(largest);
  const float first = power_of_two(out.exponent / 2);
  const float second = power_of_two(out.exponent - out.exponent / 2);
  std::int64_t squares = 0;
  for (index_t i = 0; i < padded; i += key_lanes) {
    const float* from = &x[static_cast<std::size_t>(i)];
    std::int16_t* to = &out.m[static_cast<std::size_t>(i)];
    for (index_t j = 0; j < key_lanes; ++j) {
      const float scaled = from[j] * first * second + round_to_integer;
      to[j] = static_cast<std::int16_t>(scaled - round_to_integer);
    }
    for (index_t j = 0; j < key_lanes; ++j) squares += std::int64_t{to[j]} * to[j];
  }

  const double rms = unit > 0 ? std::ldexp(static_cast<double>(unit), out.exponent)
                              : std::sqrt(static_cast<double>(squares) / static_cast<double>(count));
  const auto factor =
      static_cast<std::int32_t>(static_cast<double>((trellis_unit << 16) << trellis_fraction(bits)) / rms);
  for (index_t i = 0; i < padded; i += key_lanes) {
    const std::int16_t* from = &out.m[static_cast<std::size_t>(i)];
    std::int16_t* to = &out.targets[static_cast<std::size_t>(i)];
    for (index_t j = 0; j < key_lanes; ++j)
      to[j] = static_cast<std::int16_t>((from[j] * factor + 0x8000) >> 16);
  }
  return true;
}

/// Step 3, forwards.
template <int Bits>
inline void walk_trellis(const trellis_row& row, index_t count, const std::int8_t* table,
                         trellis_path& path) {
  constexpr std::size_t num_suffixes = trellis_states >> Bits;
  std::array<std::int32_t, num_suffixes> best;
  path.start();
  for (std::size_t d = 0; d < static_cast<std::size_t>(count); ++d) {
    for (std::size_t p = 0; p < num_suffixes; ++p) {
      std::uint8_t from = 0;
      best[p] = path.cost[p];
      for (std::size_t j = 1; j < (1U << Bits); ++j) {
        const std::int32_t other = path.cost[p + j * num_suffixes];
        from = other < best[p] ? static_cast<std::uint8_t>(j) : from;
        best[p] = std::min(best[p], other);
      }
      path.from[d * num_suffixes + p] = from;
    }
    for (std::size_t s = 0; s < trellis_states; ++s) {
      const std::int8_t x = table[s];
      const std::int32_t off = (x * x << trellis_fraction(Bits)) - 2 * row.targets[d] * x;
      path.cost[s] = best[s >> Bits] + (off << Bits);
    }
  }
}

/// Step 3 for five and six bits: of the states that follow suffix `from` and end in suffix `to` the nearest will do, so what is
/// left to choose is a path through eight or four suffixes.
template <int Bits>
inline void walk_short_trellis(const trellis_row& row, index_t count, const std::int8_t* table,
                               trellis_path& path) {
  static_assert(Bits == 5 || Bits == 6);
  using eight [[gnu::vector_size(16)]] = std::int16_t;
  constexpr std::size_t num_suffixes = trellis_states >> Bits;
  constexpr std::size_t lane_suffixes = 8 / num_suffixes;             // lanes that end in one suffix
  constexpr std::size_t vectors = trellis_states / num_suffixes / 8;  // of the states that follow one suffix
  alignas(64) std::array<std::int16_t, trellis_states> levels;        // 16 times the numbers, as targets are
  for (std::size_t s = 0; s < trellis_states; ++s)
    levels[s] = static_cast<std::int16_t>((16 << trellis_fraction(Bits)) * table[s]);
  // high bits of the codes: which of those as near is taken
  constexpr auto second = static_cast<std::int16_t>(lane_suffixes - 1);
  constexpr eight first_codes = {0, 0, 0, 0, second, second, second, second};

  // costs, below them where they come from: the minimum of both needs no branches
  constexpr unsigned code_bits = 2 * Bits - 8;  // of a code beside its suffix
  constexpr std::int64_t unreachable = std::int64_t{1} << 40;
  std::array<std::int64_t, num_suffixes> best;
  best.fill(unreachable);
  best[0] = 0;
  std::uint8_t* came_from = path.from.data();
  std::fill_n(came_from, num_suffixes, std::uint8_t{0});
  for (index_t d = 0; d < count; ++d) {
    const eight target = eight{} + static_cast<std::int16_t>(16 * row.targets[static_cast<std::size_t>(d)]);
    std::array<std::int64_t, num_suffixes> next;
    next.fill(std::numeric_limits<std::int64_t>::max());
    for (std::size_t from = 0; from < num_suffixes; ++from) {
      eight nearest = eight{} + std::numeric_limits<std::int16_t>::max();
      for (std::size_t v = 0; v < vectors; ++v) {
        eight off;
        std::memcpy(&off, &levels[(from * vectors + v) * 8], sizeof(off));
        off -= target;
        const eight other = -off;
        const eight distance =
            (off > other ? off : other) | (first_codes + static_cast<std::int16_t>(lane_suffixes * v));
        nearest = distance < nearest ? distance : nearest;
      }
      for (std::size_t to = 0; to < num_suffixes; ++to) {
        const std::int64_t found = std::min(nearest[to], nearest[to + 8 - num_suffixes]);
        const std::int64_t cost = best[from] + (found >> 4) * (found >> 4);
        next[to] =
            std::min(next[to], cost << 8 | static_cast<std::int64_t>(from << code_bits) | (found & 15));
      }
    }
    came_from += num_suffixes;
    for (std::size_t p = 0; p < num_suffixes; ++p) {
      best[p] = next[p] >> 8;
      came_from[p] = static_cast<std::uint8_t>(next[p] & 255);
    }
  }
  path.cost.fill(std::numeric_limits<std::int32_t>::max());
  for (std::size_t p = 0; p < num_suffixes; ++p) {
    const std::int64_t limit = std::numeric_limits<std::int32_t>::max() - 1;
    path.cost[came_from[p] * num_suffixes + p] = static_cast<std::int32_t>(std::min(best[p], limit));
  }
}

/// Step 3, back along the best path, and step 4.
[[gnu::always_inline]] inline float trace_trellis(int bits, const trellis_row& row, index_t count,
                                                  const std::int8_t* table, const trellis_path& path,
                                                  std::uint8_t* codes) {
  const std::uint32_t code_mask = (1U << bits) - 1;
  const std::size_t num_suffixes = static_cast<std::size_t>(trellis_states) >> bits;
  std::uint32_t state = path.best_last();
  std::int32_t product = 0;
  std::int32_t square = 0;
  for (index_t d = count - 1; d >= 0; --d) {
    const auto i = static_cast<std::size_t>(d);
    const std::int8_t x = table[state];
    product += row.m[i] * x;
    square += x * x;
    codes[d] = static_cast<std::uint8_t>(state & code_mask);
    const std::uint32_t suffix = state >> bits;
    state = suffix | (path.from[i * num_suffixes + suffix] & code_mask) << (8 - bits);
  }
  if (square == 0) return 0.0F;
  constexpr double largest = std::numeric_limits<float>::max();
  const double scale = static_cast<double>(product) / static_cast<double>(square);
  return static_cast<float>(std::clamp(std::ldexp(scale, -row.exponent), -largest, largest));
}

inline float encode_trellis(int bits, const float* row, index_t count, const std::int8_t* table, float unit,
                            std::uint8_t* codes) {
  trellis_row prepared;
  if (!prepare_trellis(bits, row, count, unit, prepared)) {
    std::fill_n(codes, count, std::uint8_t{0});
    return 0.0F;
  }
  trellis_path path;
  if (bits == 2) {
    walk_trellis<2>(prepared, count, table, path);
  } else if (bits == 3) {
    walk_trellis<3>(prepared, count, table, path);
  } else if (bits == 4) {
    walk_trellis<4>(prepared, count, table, path);
  } else if (bits == 5) {
    walk_short_trellis<5>(prepared, count, table, path);
  } else {
    walk_short_trellis<6>(prepared, count, table, path);
  }
  return trace_trellis(bits, prepared, count, table, path, codes);
}

inline void decode_trellis_keys(int bits, index_t head_dim, index_t num_groups, const std::uint8_t* codes,
                                const std::int8_t* table, std::int8_t* out, index_t out_stride) {
  using order = block_order<std::int8_t>;
  const block_geometry g{num_groups * key_lanes, head_dim};
  const index_t padded_dim = order::key_packs(g) * order::pack;
  for (index_t t = 0; t < g.block_size; ++t) {
    std::uint32_t state = 0;
    for (index_t d = 0; d < padded_dim; ++d) {
      const index_t i = order::key_index(g, t, d);
      state = (state << bits | codes[i]) % trellis_states;
      out[i % order::key_group_size(g) + t / key_lanes * out_stride] = table[state];
    }
  }
}

inline void decode_trellis_values(int bits, index_t head_dim, index_t num_packs, const std::uint8_t* codes,
                                  const std::int8_t* table, std::int8_t* out, index_t out_stride) {
  using order = block_order<std::int8_t>;
  const block_geometry g{num_packs * order::pack, head_dim};
  for (index_t t = 0; t < g.block_size; ++t) {
    std::uint32_t state = 0;
    for (index_t d = 0; d < head_dim; ++d) {
      state = (state << bits | codes[order::value_index(g, t, d)]) % trellis_states;
      out[t / order::pack * out_stride + order::pack * d + t % order::pack] = table[state];
    }
  }
}

inline constexpr trellis_kernels kernels_for_trellis = {encode_trellis, decode_trellis_keys,
                                                        decode_trellis_values};

}  // namespace kvcache::inline v0::kernel::portable
