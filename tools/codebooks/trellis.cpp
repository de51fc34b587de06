// SPDX-License-Identifier: MIT
// Trains the tables of the codec trellis<b> and prints the header that holds them; trellis.sh compiles and runs this.
//
// Rows of 128 normally distributed numbers, each divided by its root mean square, or pieces of them are encoded by Viterbi
// from state 0; each entry of the table becomes the mean of the numbers that its state stood for; and again. The two halves
// of a table differ in sign alone, so that a kernel looks up 128 numbers instead of 256. A run starts from the quantiles of
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

constexpr int num_states = 256;
constexpr int half_table = num_states / 2;  // entries[s + half_table] = -entries[s]

using table = std::array<float, num_states>;
template <int Length>
using row = std::array<float, Length>;

/// Normally distributed numbers, 128 after the other with a mean square of 1, as rows or pieces of rows. \param count  a multiple
/// of 128 / Length
template <int Length>
std::vector<row<Length>> random_rows(std::uint64_t seed, int count) {
  constexpr int whole = 128;
  std::mt19937_64 bits(seed);
  const auto uniform = [&bits] { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; };
  std::vector<row<Length>> rows;
  while (static_cast<int>(rows.size()) < count) {
    row<whole> r;
    double squares = 0;
    for (float& x : r) {
      x = static_cast<float>(std::sqrt(-2 * std::log(uniform())) *
                             std::cos(2 * std::numbers::pi * uniform()));
      squares += static_cast<double>(x) * static_cast<double>(x);
    }
    for (float& x : r) x /= static_cast<float>(std::sqrt(squares / whole));
    for (int first = 0; first < whole; first += Length)
      std::copy_n(r.begin() + first, Length, rows.emplace_back().begin());
  }
  return rows;
}

/// The states of the path through the trellis that is nearest to `x`. Returns its squared distance.
template <int Bits, int Length>
float viterbi(const table& entries, const row<Length>& x, std::array<int, Length>& states) {
  constexpr int num_prefixes = num_states >> Bits;
  static std::array<std::array<std::int32_t, num_prefixes>, Length> came_from;
  alignas(64) std::array<float, num_states> cost;
  alignas(64) std::array<float, num_prefixes> best;
  cost.fill(1e30F);
  cost[0] = 0;
  for (int d = 0; d < Length; ++d) {
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
  for (int d = Length - 1; d >= 0; --d) {
    states[d] = state;
    state = came_from[d][state >> Bits];
  }
  return distance;
}

/// One round: encodes all rows and moves the entries by `step` times the way to the means; a step beyond them, up to about
/// 3, gets further in a round. Returns the distortion before the move.
template <int Bits, int Length>
double improve(table& entries, const std::vector<row<Length>>& rows, float step = 2.5F) {
  std::array<double, num_states> sum{};
  std::array<double, num_states> count{};
  std::array<int, Length> states;
  double distance = 0;
  for (const row<Length>& x : rows) {
    distance += static_cast<double>(viterbi<Bits, Length>(entries, x, states));
    for (int d = 0; d < Length; ++d) {
      sum[states[d]] += static_cast<double>(x[d]);
      ++count[states[d]];
    }
  }
  for (int s = 0; s < half_table; ++s) {
    const int opposite = s + half_table;
    const double both = count[s] + count[opposite];
    if (both > 0) entries[s] += step * (static_cast<float>((sum[s] - sum[opposite]) / both) - entries[s]);
    entries[opposite] = -entries[s];
  }
  return distance / static_cast<double>(rows.size()) / Length;
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

/// The quantiles of the normal distribution in random order, each opposite its negative.
table random_table(std::uint64_t seed) {
  std::mt19937_64 bits(seed);
  table entries;
  for (int s = 0; s < half_table; ++s) {
    entries[s] = static_cast<float>(normal_quantile((s + 0.5) / num_states));
    if (bits() % 2 == 1) entries[s] = -entries[s];
  }
  for (int i = half_table - 1; i > 0; --i)  // std::shuffle differs between standard libraries
    std::swap(entries[i], entries[bits() % static_cast<std::uint64_t>(i + 1)]);
  for (int s = 0; s < half_table; ++s) entries[s + half_table] = -entries[s];
  return entries;
}

/// Many runs on few rows, of which the better half goes on, and so on; then the best one on many rows.
template <int Bits, int Length>
table train(int num_few, int num_many) {
  struct run {
    table entries;
    double distortion = 1;
  };
  std::vector<run> runs(16);
  for (std::size_t i = 0; i < runs.size(); ++i) runs[i].entries = random_table(i + 1);
  const auto few = random_rows<Length>(1, num_few);
  for (; runs.size() > 1; runs.resize(runs.size() / 2)) {
    for (run& r : runs) {
      for (int i = 0; i < 60; ++i) r.distortion = improve<Bits, Length>(r.entries, few);
    }
    std::sort(runs.begin(), runs.end(),
              [](const run& a, const run& b) { return a.distortion < b.distortion; });
  }
  const auto many = random_rows<Length>(2, num_many);
  for (int i = 0; i < 60; ++i)
    runs[0].distortion = improve<Bits, Length>(runs[0].entries, many, i < 50 ? 2.5F : 1.0F);
  std::fprintf(stderr, "%d bits, rows of %d: %.5f before rounding\n", Bits, Length, runs[0].distortion);
  return runs[0].entries;
}

void print(const char* name, int num_bits, const table& entries) {
  std::printf("\nalignas(64) inline constexpr std::array<std::int8_t, 256> %s_%d = {\n", name, num_bits);
  for (int s = 0; s < num_states; ++s) {
    const long x = std::lround(entries[s] * static_cast<float>(kvcache::kernel::trellis_unit));
    std::printf("%s%ld,%s", s % 16 == 0 ? "    " : " ", std::clamp(x, -127L, 127L), s % 16 == 15 ? "\n" : "");
  }
  std::printf("};\n");
}

/// For rows of a head.
template <int Bits>
void print_table() {
  print("trellis_table", Bits, train<Bits, 128>(1500, 20000));
}
/// For groups of components: few numbers, of which the first have few states to choose from.
template <int Bits>
void print_short_table() {
  print("short_trellis_table", Bits, train<Bits, 16>(8000, 100000));
}

}  // namespace

int main() {
  std::printf(R"(// SPDX-License-Identifier: MIT
// The tables of the codec trellis<b>, trained on normally distributed rows of 128 numbers, and those of klt, on rows of 16; in
// units of 1/%d of a row's root mean square. The second half of a table is the first one negated. Generated by
// tools/codebooks/trellis.sh: do not edit.
#pragma once

#include <array>
#include <cstdint>

namespace kvcache::inline v0::codec {

// clang-format off
)",
              kvcache::kernel::trellis_unit);
  print_table<2>();
  print_table<3>();
  print_table<4>();
  print_short_table<2>();
  print_short_table<3>();
  print_short_table<4>();
  print_short_table<5>();
  print_short_table<6>();
  std::printf(R"(// clang-format on

/// The table for 2, 3 or 4 bits per number.
constexpr const std::int8_t* trellis_table(int bits) noexcept {
  return (bits == 2 ? trellis_table_2 : bits == 3 ? trellis_table_3 : trellis_table_4).data();
}
/// That for few numbers of 2 to 6 bits.
constexpr const std::int8_t* short_trellis_table(int bits) noexcept {
  return (bits == 2   ? short_trellis_table_2
          : bits == 3 ? short_trellis_table_3
          : bits == 4 ? short_trellis_table_4
          : bits == 5 ? short_trellis_table_5
                      : short_trellis_table_6)
      .data();
}

}  // namespace kvcache::inline v0::codec
)");
}
