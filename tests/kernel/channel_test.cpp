// SPDX-License-Identifier: MIT
// Kernels that encode by channels: the same bits as a plain loop on every level.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/block/view.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace {

using kvcache::const_rows;
using kvcache::index_t;
namespace kernel = kvcache::kernel;

constexpr index_t stride = 150;

/// Rows of `count` numbers among others that are not theirs.
struct some_rows {
  index_t num_rows, count;
  std::vector<float> numbers;

  some_rows(index_t n, index_t c, test::random& random)
      : num_rows(n), count(c), numbers(random.floats(n * stride)) {
    for (float& x : numbers)
      x = std::ldexp(x, static_cast<int>(random.between(-3, 3)) - (random.chance(0.02) ? 140 : 0));
  }
  [[nodiscard]] const_rows view() const { return {numbers.data(), stride}; }
  [[nodiscard]] float at(index_t t, index_t d) const { return view().row(t)[d]; }
};

/// Calls check(rows, random) for numbers of rows and dims around what vectors hold.
template <class Check>
void for_some_rows(Check check) {
  test::random random;
  for (const index_t num_rows : {1, 2, 15, 60, 64, 253}) {
    for (const index_t count : {1, 15, 16, 17, 31, 32, 80, 128, 129}) {
      const some_rows rows(num_rows, count, random);
      CAPTURE(num_rows, count);
      check(rows, random);
    }
  }
}

/// Calls run(kernels, out) on every level, `out` as long as `want`; nothing behind it may change.
template <class Number, class Run>
void same_everywhere(const std::vector<Number>& want, Run run) {
  for (const kernel::isa level : kernel::available()) {
    CAPTURE(kernel::to_string(level));
    std::vector<Number> got(want.size() + 16, Number{77});
    run(kernel::select(level).channel, got.data());
    CHECK(std::all_of(got.end() - 16, got.end(), [](Number x) { return x == Number{77}; }));
    got.resize(want.size());
    CHECK(got == want);
  }
}

}  // namespace

TEST_CASE("the least and the largest number of each channel are found", "[kernel]") {
  for_some_rows([](const some_rows& rows, test::random&) {
    std::vector<float> least;
    std::vector<float> largest;
    for (index_t d = 0; d < rows.count; ++d) {
      least.push_back(rows.at(0, d));
      largest.push_back(rows.at(0, d));
      for (index_t t = 1; t < rows.num_rows; ++t) {
        least.back() = std::min(least.back(), rows.at(t, d));
        largest.back() = std::max(largest.back(), rows.at(t, d));
      }
    }
    std::vector<float> other(least.size());
    same_everywhere(least, [&](const auto& channel, float* out) {
      channel.ranges(rows.view(), rows.num_rows, rows.count, out, other.data());
    });
    same_everywhere(largest, [&](const auto& channel, float* out) {
      channel.ranges(rows.view(), rows.num_rows, rows.count, other.data(), out);
    });
  });
}

TEST_CASE("means are sums of correctly rounded quotients", "[kernel]") {
  for_some_rows([](const some_rows& rows, test::random&) {
    std::vector<float> means(static_cast<std::size_t>(rows.count), 0.0F);
    for (index_t d = 0; d < rows.count; ++d) {
      for (index_t t = 0; t < rows.num_rows; ++t)
        means[static_cast<std::size_t>(d)] += rows.at(t, d) / static_cast<float>(rows.num_rows);
    }
    same_everywhere(means, [&](const auto& channel, float* out) {
      channel.means(rows.view(), rows.num_rows, rows.count, out);
    });
  });
}

TEST_CASE("squares of channels and of tokens are summed in the order that is said", "[kernel]") {
  for_some_rows([](const some_rows& rows, test::random& random) {
    const float factor = random.uniform(0.1F, 2.0F);
    const std::vector<float> means = random.floats(rows.count);
    const auto deviation = [&](index_t t, index_t d) {
      return (rows.at(t, d) - means[static_cast<std::size_t>(d)]) * factor;
    };
    const std::vector<float> of_tokens = random.floats(rows.num_rows);
    std::vector<float> squares(static_cast<std::size_t>(rows.count), 0.0F);
    for (index_t d = 0; d < rows.count; ++d) {
      for (index_t t = 0; t < rows.num_rows; ++t) {
        const float x = deviation(t, d);
        squares[static_cast<std::size_t>(d)] +=
            kvcache::lanes::rounded(of_tokens[static_cast<std::size_t>(t)] * x * x);
      }
    }
    same_everywhere(squares, [&](const auto& channel, float* out) {
      channel.squares_of_channels(rows.view(), rows.num_rows, rows.count, means.data(), factor,
                                  of_tokens.data(), out);
    });

    const std::vector<float> of_channels = random.floats(rows.count);
    std::vector<float> sums;
    for (index_t t = 0; t < rows.num_rows; ++t) {
      std::array<float, 16> parts{};
      for (index_t d = 0; d < rows.count; ++d) {
        const float x = deviation(t, d);
        parts.at(static_cast<std::size_t>(d % 16)) +=
            kvcache::lanes::rounded(x * x * of_channels[static_cast<std::size_t>(d)]);
      }
      sums.push_back(0.0F);
      for (const float part : parts) sums.back() += part;
    }
    same_everywhere(sums, [&](const auto& channel, float* out) {
      channel.squares_of_tokens(rows.view(), rows.num_rows, rows.count, means.data(), factor,
                                of_channels.data(), out);
    });
  });
}

TEST_CASE("numbers become the nearest of equal steps, those outside the last ones", "[kernel]") {
  for_some_rows([](const some_rows& rows, test::random& random) {
    for (const int below : {4, 8, 128}) {
      CAPTURE(below);
      const std::vector<float> middles = random.floats(rows.count);
      std::vector<float> inverse_steps;
      std::vector<float> row;
      std::vector<std::uint8_t> codes;
      for (index_t d = 0; d < rows.count; ++d) {
        const auto i = static_cast<std::size_t>(d);
        inverse_steps.push_back(std::ldexp(1.0F, static_cast<int>(random.between(-2, 6))));
        row.push_back(rows.at(0, d));
        if (random.chance(0.3))  // halfway between two
          row.back() = middles[i] + (static_cast<float>(random.between(-9, 8)) + 0.5F) / inverse_steps[i];
        if (random.chance(0.1)) row.back() = random.chance(0.5) ? 3e38F : -3e38F;
        const float steps = std::nearbyint((row[i] - middles[i]) * inverse_steps[i]);
        codes.push_back(static_cast<std::uint8_t>(
            static_cast<float>(below) +
            std::clamp(steps, static_cast<float>(-below), static_cast<float>(below - 1))));
      }
      same_everywhere(codes, [&](const auto& channel, std::uint8_t* out) {
        channel.to_codes(row.data(), middles.data(), inverse_steps.data(), below, rows.count, out);
      });
    }
  });
}
