// SPDX-License-Identifier: MIT
// Packing, the Walsh-Hadamard transform and scalar quantisation: against their definitions, and the same bits on every
// instruction set that runs here.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/block/packed.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

using namespace kvcache;

namespace {

std::vector<const kernel::table*> tables() {
  std::vector<const kernel::table*> all;
  for (const kernel::isa level : kernel::available()) all.push_back(&kernel::select(level));
  return all;
}

std::vector<std::byte> random_bytes(index_t n, test::random& random) {
  std::vector<std::byte> all(static_cast<std::size_t>(n));
  for (std::byte& b : all) b = static_cast<std::byte>(random.below(256));
  return all;
}

/// The code of byte `i`, from the words at the head of block/packed.hpp.
unsigned code_in_words(int bits, const std::vector<std::byte>& packed, index_t i) {
  const index_t line = i / 64;
  const auto at = [&](index_t packed_line) {
    return std::to_integer<unsigned>(packed[static_cast<std::size_t>(packed_line * 64 + i % 64)]);
  };
  if (bits == 1) return at(line / 8) >> static_cast<unsigned>(line % 8) & 1U;
  if (bits == 4) return line % 2 == 0 ? at(line / 2) % 16 : at(line / 2) / 16;
  const auto quarter = static_cast<unsigned>(line % 4);
  if (bits == 2) return at(line / 4) >> 2 * quarter & 3U;
  const index_t unit = line / 8;
  const unsigned low = at(3 * unit + line % 8 / 4) >> 2 * quarter & 3U;
  return low + (at(3 * unit + 2) >> static_cast<unsigned>(line % 8) & 1U) * 4;
}

template <int Bits>
void check_packing(index_t num_bytes, test::random& random) {
  using order = packed_order<Bits>;
  std::vector<std::byte> packed = random_bytes(order::section_bytes(num_bytes), random);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(num_bytes));
  for (auto& code : codes) code = static_cast<std::uint8_t>(random.below(1 << Bits));
  std::vector<std::byte> at_once = packed;
  for (index_t i = 0; i < num_bytes; ++i) order::put(packed.data(), i, codes[static_cast<std::size_t>(i)]);
  for (index_t i = 0; i + 4 <= num_bytes; i += 4) {
    std::uint32_t four;
    std::memcpy(&four, &codes[static_cast<std::size_t>(i)], 4);
    order::put_four(at_once.data(), i, four);
  }
  for (index_t i = num_bytes / 4 * 4; i < num_bytes; ++i)
    order::put(at_once.data(), i, codes[static_cast<std::size_t>(i)]);
  CHECK(packed == at_once);
  bool right = true;
  for (index_t i = 0; i < num_bytes; ++i) {
    const unsigned code = codes[static_cast<std::size_t>(i)];
    right = right && order::get(packed.data(), i) == code && code_in_words(Bits, packed, i) == code;
  }
  CHECK(right);
}

template <int Bits>
void check_unpack(const kernel::table& kernels, test::random& random) {
  using order = packed_order<Bits>;
  constexpr index_t total = 40;  // lines
  const std::vector<std::byte> packed = random_bytes(order::section_bytes(total * 64), random);
  std::array<std::int8_t, 16> codebook;
  for (auto& level : codebook) level = static_cast<std::int8_t>(random.below(256) - 128);
  for (index_t first = 0; first < total; first += order::lines_per_unit) {
    for (const index_t num_lines : {0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 23}) {
      if (first + num_lines > total) continue;
      CAPTURE(Bits, first, num_lines);
      std::vector<std::int8_t> out(static_cast<std::size_t>((num_lines + 1) * 64), 77);
      std::vector<std::int8_t> expected = out;
      for (index_t i = 0; i < num_lines * 64; ++i)
        expected[static_cast<std::size_t>(i)] = codebook[code_in_words(Bits, packed, first * 64 + i)];
      kernels.low_bit.unpack(Bits, packed.data(), first, num_lines, codebook.data(), out.data(),
                             first % 16 == 0 ? nullptr : packed.data());
      CHECK(out == expected);
    }
  }
}

std::vector<std::uint32_t> words_of(const std::vector<float>& row) {
  std::vector<std::uint32_t> words(row.size());
  std::transform(row.begin(), row.end(), words.begin(),
                 [](float x) { return std::bit_cast<std::uint32_t>(x); });
  return words;
}

/// The rounds as they are defined.
std::vector<float> hadamard_in_words(std::vector<float> x) {
  for (std::size_t round = x.size(); round > 1; round /= 2) {
    std::vector<float> y(x.size());
    for (std::size_t i = 0; i < x.size() / 2; ++i) {
      y[2 * i] = x[i] + x[i + x.size() / 2];
      y[2 * i + 1] = x[i] - x[i + x.size() / 2];
    }
    x = y;
  }
  return x;
}

// ---- scalar quantisation --------------------------------------------------------------------------------------------

const std::array<kernel::scalar_codebook, 3> books = {{
    {2, {-127, -38, 38, 127}, {0.98F}},
    {3, {-127, -79, -44, -14, 14, 44, 79, 127}, {0.5F, 1.05F, 1.748F}},
    {4,
     {-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127},
     {0.258F, 0.522F, 0.8F, 1.099F, 1.437F, 1.844F, 2.401F}},
}};

struct quantised {
  float scale;
  std::vector<std::uint8_t> codes;
};

/// The definition in doubles and wide integers.
quantised nearest_in_words(const std::vector<float>& row, const kernel::scalar_codebook& book) {
  const int half = 1 << (book.bits - 1);
  quantised result{0.0F, std::vector<std::uint8_t>(row.size(), static_cast<std::uint8_t>(half))};
  double largest = 0;
  for (const float x : row) largest = std::max(largest, std::abs(double{x}));
  if (largest == 0) return result;
  int exponent = 0;  // largest * 2^exponent in [256, 512)
  while (std::ldexp(largest, exponent) >= 512) --exponent;
  while (std::ldexp(largest, exponent) < 256) ++exponent;
  std::int64_t squares = 0;
  std::vector<int> whole;
  whole.reserve(row.size());
  for (const float x : row) {
    whole.push_back(static_cast<int>(std::nearbyint(std::ldexp(double{x}, exponent))));
    squares += std::int64_t{whole.back()} * whole.back();
  }
  const double rms = std::sqrt(static_cast<double>(squares) / static_cast<double>(row.size()));
  std::int64_t products = 0;
  std::int64_t level_squares = 0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    int index = 0;
    for (int j = 0; j + 1 < half; ++j)
      index += std::abs(whole[i]) > std::floor(double{book.thresholds[j]} * rms) ? 1 : 0;
    const int code = whole[i] < 0 ? half - 1 - index : half + index;
    result.codes[i] = static_cast<std::uint8_t>(code);
    products += whole[i] * book.levels[code];
    level_squares += book.levels[code] * book.levels[code];
  }
  result.scale = static_cast<float>(
      std::ldexp(static_cast<double>(products) / static_cast<double>(level_squares), -exponent));
  return result;
}

/// Rows that are easy to get wrong, and some that are not.
std::vector<std::vector<float>> varied_rows(index_t num_floats, test::random& random) {
  const auto count = static_cast<std::size_t>(num_floats);
  std::vector<std::vector<float>> all;
  for (int i = 0; i < 20; ++i) all.push_back(random.floats(num_floats));
  for (const float scale : {1e-38F, 1e-41F, 1e-44F, 1e30F, 3e37F, 0x1p-119F, 0x1p-127F}) {
    all.push_back(random.floats(num_floats));
    for (float& x : all.back()) x *= scale;
  }
  for (const float x : {0.0F, -0.0F, 1.0F, -1.0F, 511.75F, -511.5F, 1e38F, -1e38F, 1e-45F, 0x1p-126F,
                        std::nextafter(0x1p-126F, 0.0F), 2e-41F})
    all.emplace_back(count, x);
  for (const float huge : {1e38F, -3.4e38F, 1.0F}) {
    all.push_back(random.floats(num_floats));
    for (float& x : all.back()) x *= 1e-6F;
    all.back()[static_cast<std::size_t>(random.below(num_floats))] = huge;
  }
  all.emplace_back(count, 0.0F);
  all.back().back() = -1e-45F;
  all.emplace_back();  // ties of rounding and of thresholds
  for (std::size_t i = 0; i < count; ++i)
    all.back().push_back(static_cast<float>(random.below(1025) - 512) + (i % 2 == 0 ? 0.5F : 0.0F));
  return all;
}

}  // namespace

TEST_CASE("packed codes lie where the words say and come back", "[kernel]") {
  test::random random;
  for (const index_t num_bytes : {4, 60, 64, 68, 128, 256, 320, 510, 512, 576, 64 * 80, 64 * 128}) {
    CAPTURE(num_bytes);
    check_packing<1>(num_bytes, random);
    check_packing<2>(num_bytes, random);
    check_packing<3>(num_bytes, random);
    check_packing<4>(num_bytes, random);
  }
  STATIC_REQUIRE(packed_order<4>::section_bytes(64 * 128) == 64 * 128 / 2);
  STATIC_REQUIRE(packed_order<3>::section_bytes(64 * 128) == 64 * 128 * 3 / 8);
  STATIC_REQUIRE(packed_order<2>::section_bytes(64 * 128) == 64 * 128 / 4);
  STATIC_REQUIRE(packed_order<1>::section_bytes(64 * 128) == 64 * 128 / 8);
  STATIC_REQUIRE(packed_order<3>::section_bytes(513) == 384);
  STATIC_REQUIRE(packed_order<2>::section_bytes(1) == 64);
}

TEST_CASE("unpacking looks every code up and writes whole lines only", "[kernel]") {
  test::random random;
  for (const kernel::table* level : tables()) {
    CAPTURE(kernel::to_string(level->level));
    check_unpack<1>(*level, random);
    check_unpack<2>(*level, random);
    check_unpack<3>(*level, random);
    check_unpack<4>(*level, random);
  }
}

TEST_CASE("the Hadamard transform is the defined rounds, bit by bit", "[kernel]") {
  test::random random;
  for (const kernel::table* level : tables()) {
    for (index_t size = 1; size <= 512; size *= 2) {
      CAPTURE(kernel::to_string(level->level), size);
      std::vector<float> row = random.floats(size);
      for (float& x : row) x *= std::exp2(static_cast<float>(random.below(40) - 20));
      const std::vector<float> before = row;
      level->low_bit.hadamard(row.data(), size);
      CHECK(words_of(row) == words_of(hadamard_in_words(before)));

      double worst = 0;  // H[i, j] = (-1)^(bits that i and j share)
      double sizes = 0;
      for (const float x : before) sizes += std::abs(double{x});
      for (std::size_t i = 0; i < row.size(); ++i) {
        double sum = 0;
        for (std::size_t j = 0; j < row.size(); ++j)
          sum += std::popcount(i & j) % 2 == 0 ? double{before[j]} : -double{before[j]};
        worst = std::max(worst, std::abs(sum - double{row[i]}));
      }
      CHECK(worst <= sizes * 1e-6);
    }
  }
}

TEST_CASE("nearest levels and their scale are what exact arithmetic says", "[kernel]") {
  test::random random;
  for (const kernel::table* level : tables()) {
    for (const index_t count : {1, 2, 15, 16, 17, 31, 33, 64, 80, 96, 128, 511, 512}) {
      for (const std::vector<float>& row : varied_rows(count, random)) {
        for (const kernel::scalar_codebook& book : books) {
          CAPTURE(kernel::to_string(level->level), count, book.bits, row);
          std::vector<std::uint8_t> codes(row.size() + 1, 99);
          const float scale = level->low_bit.nearest(row.data(), count, book, codes.data());
          const quantised expected = nearest_in_words(row, book);
          REQUIRE(codes.back() == 99);
          codes.pop_back();
          REQUIRE(codes == expected.codes);
          REQUIRE(std::bit_cast<std::uint32_t>(scale) == std::bit_cast<std::uint32_t>(expected.scale));
        }
      }
    }
  }
}

TEST_CASE("thresholds that are nearly whole numbers are rounded as exactly as all others", "[kernel]") {
  test::random random;
  for (int i = 0; i < 10000; ++i) {  // of which one in 270 has such a threshold
    const auto count = static_cast<index_t>(random.between(1, 130));
    const std::vector<float> row = random.floats(count);
    const kernel::scalar_codebook& book = books.at(static_cast<std::size_t>(i % 3));
    const quantised expected = nearest_in_words(row, book);
    for (const kernel::table* level : tables()) {
      std::vector<std::uint8_t> codes(row.size());
      const float scale = level->low_bit.nearest(row.data(), count, book, codes.data());
      CAPTURE(kernel::to_string(level->level), count, book.bits, row);
      REQUIRE(codes == expected.codes);
      REQUIRE(scale == expected.scale);
    }
  }
}

TEST_CASE("the scale of the largest numbers is finite even with levels of one", "[kernel]") {
  const kernel::scalar_codebook book{2, {-2, -1, 1, 2}, {5.0F}};
  for (const kernel::table* level : tables()) {
    const std::vector<float> row(20, std::numeric_limits<float>::max());
    std::vector<std::uint8_t> codes(20);
    CHECK(level->low_bit.nearest(row.data(), 20, book, codes.data()) == std::numeric_limits<float>::max());
    CHECK(codes == std::vector<std::uint8_t>(20, 2));
  }
}

TEST_CASE("quantised normal numbers are as close as their number of levels allows", "[kernel]") {
  test::random random;
  const std::array<double, 3> bounds = {0.125, 0.037,
                                        0.0105};  // relative squared error of Lloyd-Max: .1175 .0345 .0095
  for (std::size_t b = 0; b < books.size(); ++b) {
    double error = 0;
    double size = 0;
    for (int i = 0; i < 100; ++i) {
      const std::vector<float> row = random.floats(128);
      std::vector<std::uint8_t> codes(128);
      const float scale = kernel::best().low_bit.nearest(row.data(), 128, books[b], codes.data());
      for (std::size_t j = 0; j < row.size(); ++j) {
        const double stored = double{scale} * books[b].levels[codes[j]];
        error += (stored - double{row[j]}) * (stored - double{row[j]});
        size += double{row[j]} * double{row[j]};
      }
    }
    CAPTURE(books[b].bits, error / size);
    CHECK(error / size < bounds[b]);
  }
}
