// SPDX-License-Identifier: MIT
// Trains the tables of the codec trellis<b> and prints the header that holds them; trellis.sh compiles and runs this.
//
// Rows of 128 normally distributed numbers, each divided by its root mean square, are encoded by Viterbi from state 0; each
// entry of the table becomes the mean of the numbers that its state stood for; and again. A run starts from the quantiles of
// the normal distribution in random order, and where it ends depends on that order: hence many runs. At last entries are
// rounded to whole 1/trellis_unit. The distortion on other rows is measured by tests/kernel/trellis_test.cpp.
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numbers>
#include <random>
#include <vector>

namespace {

constexpr int row_length = 128;
constexpr int num_states = 256;

using table = std::array<float, num_states>;
using row = std::array<float, row_length>;

/// Normally distributed rows, each with a mean square of 1.
std::vector<row> random_rows(std::uint64_t seed, int count) {
  std::mt19937_64 bits(seed);
  const auto uniform = [&bits] { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; };
  std::vector<row> rows(static_cast<std::size_t>(count));
  for (row& r : rows) {
    double squares = 0;
    for (float& x : r) {
      x = static_cast<float>(std::sqrt(-2 * std::log(uniform())) *
                             std::cos(2 * std::numbers::pi * uniform()));
      squares += static_cast<double>(x) * static_cast<double>(x);
    }
    for (float& x : r) x /= static_cast<float>(std::sqrt(squares / row_length));
  }
  return rows;
}

/// The states of the path through the trellis that is nearest to `x`. Returns its squared distance.
template <int Bits>
float viterbi(const table& entries, const row& x, std::array<int, row_length>& states) {
  constexpr int num_prefixes = num_states >> Bits;
  static std::array<std::array<std::int32_t, num_prefixes>, row_length> came_from;
  alignas(64) std::array<float, num_states> cost;
  alignas(64) std::array<float, num_prefixes> best;
  cost.fill(1e30F);
  cost[0] = 0;
  for (int d = 0; d < row_length; ++d) {
    std::int32_t* from = came_from[d].data();
    for (int p = 0; p < num_prefixes; ++p) {
      best[p] = cost[p];
      from[p] = p;
    }
    for (int j = 1; j < (1 << Bits); ++j) {
      for (int p = 0; p < num_prefixes; ++p) {
        const float other = cost[p + j * num_prefixes];
        from[p] = other < best[p] ? p + j * num_prefixes : from[p];
        best[p] = other < best[p] ? other : best[p];
      }
    }
    for (int p = 0; p < num_prefixes; ++p) {
      for (int c = 0; c < (1 << Bits); ++c) {
        const float off = x[d] - entries[(p << Bits) + c];
        cost[(p << Bits) + c] = best[p] + off * off;
      }
    }
  }
  int state = static_cast<int>(std::min_element(cost.begin(), cost.end()) - cost.begin());
  const float distance = cost[state];
  for (int d = row_length - 1; d >= 0; --d) {
    states[d] = state;
    state = came_from[d][state >> Bits];
  }
  return distance;
}

/// One round: encodes all rows and moves the entries by `step` times the way to the means; a step beyond them, up to about
/// 3, gets further in a round. Returns the distortion before the move.
template <int Bits>
double improve(table& entries, const std::vector<row>& rows, float step = 2.5F) {
  std::array<double, num_states> sum{};
  std::array<double, num_states> count{};
  std::array<int, row_length> states;
  double distance = 0;
  for (const row& x : rows) {
    distance += static_cast<double>(viterbi<Bits>(entries, x, states));
    for (int d = 0; d < row_length; ++d) {
      sum[states[d]] += static_cast<double>(x[d]);
      ++count[states[d]];
    }
  }
  for (int s = 0; s < num_states; ++s) {
    if (count[s] > 0) entries[s] += step * (static_cast<float>(sum[s] / count[s]) - entries[s]);
  }
  return distance / static_cast<double>(rows.size()) / row_length;
}

/// x with P(X < x) = p, by bisection.
double normal_quantile(double p) {
  double low = -8;
  double high = 8;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::numbers::sqrt2) / 2 < p ? low : high) = middle;
  }
  return low;
}

/// The quantiles of the normal distribution in random order.
table random_table(std::uint64_t seed) {
  table entries;
  for (int s = 0; s < num_states; ++s)
    entries[s] = static_cast<float>(normal_quantile((s + 0.5) / num_states));
  std::mt19937_64 bits(seed);
  for (int i = num_states - 1; i > 0; --i)  // std::shuffle differs between standard libraries
    std::swap(entries[i], entries[bits() % static_cast<std::uint64_t>(i + 1)]);
  return entries;
}

/// Many runs on few rows, of which the better half goes on, and so on; then the best one on many rows.
template <int Bits>
table train() {
  struct run {
    table entries;
    double distortion = 1;
  };
  std::vector<run> runs(16);
  for (std::size_t i = 0; i < runs.size(); ++i) runs[i].entries = random_table(i + 1);
  const std::vector<row> few = random_rows(1, 1500);
  for (; runs.size() > 1; runs.resize(runs.size() / 2)) {
    for (run& r : runs) {
      for (int i = 0; i < 60; ++i) r.distortion = improve<Bits>(r.entries, few);
    }
    std::sort(runs.begin(), runs.end(),
              [](const run& a, const run& b) { return a.distortion < b.distortion; });
  }
  const std::vector<row> many = random_rows(2, 20000);
  for (int i = 0; i < 60; ++i)
    runs[0].distortion = improve<Bits>(runs[0].entries, many, i < 50 ? 2.5F : 1.0F);
  std::fprintf(stderr, "%d bits: %.5f before rounding\n", Bits, runs[0].distortion);
  return runs[0].entries;
}

template <int Bits>
void print() {
  const table entries = train<Bits>();
  std::printf("\nalignas(64) inline constexpr std::array<std::int8_t, 256> trellis_table_%d = {\n", Bits);
  for (int s = 0; s < num_states; ++s) {
    const long x = std::lround(entries[s] * static_cast<float>(kvcache::kernel::trellis_unit));
    std::printf("%s%ld,%s", s % 16 == 0 ? "    " : " ", std::clamp(x, -127L, 127L), s % 16 == 15 ? "\n" : "");
  }
  std::printf("};\n");
}

}  // namespace

int main() {
  std::printf(R"(// SPDX-License-Identifier: MIT
// The tables of the codec trellis<b>, trained on normally distributed rows of 128 numbers; in units of 1/%d of a row's root
// mean square. Generated by tools/codebooks/trellis.sh: do not edit.
#pragma once

#include <array>
#include <cstdint>

namespace kvcache::inline v0::codec {

// clang-format off
)",
              kvcache::kernel::trellis_unit);
  print<2>();
  print<3>();
  print<4>();
  print<6>();
  std::printf(R"(// clang-format on

/// The table for 2, 3, 4 or 6 bits per number.
constexpr const std::int8_t* trellis_table(int bits) noexcept {
  return (bits == 2   ? trellis_table_2
          : bits == 3 ? trellis_table_3
          : bits == 4 ? trellis_table_4
                      : trellis_table_6)
      .data();
}

}  // namespace kvcache::inline v0::codec
)");
}
