// SPDX-License-Identifier: MIT
// The codec trellis: every instruction set equals the portable kernels bit by bit, and those equal what the definition says.
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/trellis_table.hpp"

#include <kvcache/block/order.hpp>
#include <kvcache/codec/trellis_tables.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/kernel/avx512.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

using namespace kvcache;

namespace {

using order = block_order<std::int8_t>;

constexpr index_t awkward_dims[] = {1,  2,  3,  4,  5,  7,  15,  16,  17,  31,
                                    33, 63, 64, 65, 80, 96, 128, 129, 511, 512};

struct encoded {
  float scale;
  std::vector<std::uint8_t> codes;

  friend bool operator==(const encoded& a, const encoded& b) {
    return std::bit_cast<std::uint32_t>(a.scale) == std::bit_cast<std::uint32_t>(b.scale) &&
           a.codes == b.codes;
  }
};

encoded encode(kernel::isa level, int bits, const std::vector<float>& row, const std::int8_t* table,
               float unit = 0.0F) {
  encoded out{0, std::vector<std::uint8_t>(row.size(), 0xff)};
  out.scale = kernel::select(level).trellis.encode(bits, row.data(), static_cast<index_t>(row.size()), table,
                                                   unit, out.codes.data());
  return out;
}

/// The numbers of a row, by the definition.
std::vector<double> decode(int bits, const std::vector<std::uint8_t>& codes, const std::int8_t* table,
                           double scale) {
  std::vector<double> row;
  row.reserve(codes.size());
  unsigned state = 0;
  for (const std::uint8_t code : codes) {
    state = (state << bits | code) & 255U;
    row.push_back(scale * table[state]);
  }
  return row;
}

double squared_distance(const std::vector<float>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}
double squared_size(const std::vector<float>& a) {
  return squared_distance(a, std::vector<double>(a.size()));
}

/// The codes of least distance in table units, by trying all.
double least_distance_of_all(int bits, const std::vector<double>& row, const std::int8_t* table,
                             std::size_t first = 0, unsigned state = 0) {
  if (first == row.size()) return 0;
  double least = std::numeric_limits<double>::infinity();
  for (unsigned code = 0; code < (1U << bits); ++code) {
    const unsigned next = (state << bits | code) & 255U;
    const double off = row[first] - table[next];
    least = std::min(least, off * off + least_distance_of_all(bits, row, table, first + 1, next));
  }
  return least;
}

/// The same by dynamic programming in doubles.
double least_distance(int bits, const std::vector<double>& row, const std::int8_t* table) {
  std::vector<double> cost(256, std::numeric_limits<double>::infinity());
  cost[0] = 0;
  for (const double x : row) {
    std::vector<double> next(256, std::numeric_limits<double>::infinity());
    for (unsigned s = 0; s < 256; ++s) {
      for (unsigned code = 0; code < (1U << bits); ++code) {
        const unsigned to = (s << bits | code) & 255U;
        next[to] = std::min(next[to], cost[s] + (x - table[to]) * (x - table[to]));
      }
    }
    cost = next;
  }
  return *std::min_element(cost.begin(), cost.end());
}

/// The row in table units.
std::vector<double> normalised(const std::vector<float>& row) {
  const double rms = std::sqrt(squared_size(row) / static_cast<double>(row.size()));
  std::vector<double> out;
  out.reserve(row.size());
  for (const float x : row) out.push_back(x / rms * kernel::trellis_unit);
  return out;
}

/// That of the codec trellis, or where there is none that of klt.
const std::int8_t* table_of(int bits) {
  return bits <= 4 ? codec::trellis_table(bits) : codec::short_trellis_table(bits);
}

std::vector<float> special_row(std::size_t count, int kind, test::random& random) {
  std::vector<float> row(count, 0.0F);
  for (std::size_t i = 0; i < count; ++i) {
    const float x = random.normal();
    const bool odd_one = i == count / 2;
    switch (kind) {
      case 0:
        row[i] = x;
        break;
      case 1:
        row[i] = 0.75F;
        break;  // constant
      case 2:
        row[i] = odd_one ? -1e6F : x * 1e-3F;
        break;  // one huge among tiny
      case 3:
        row[i] = x * 1e-41F;
        break;  // subnormal
      case 4:
        row[i] = std::clamp(x, -3.0F, 3.0F) * 1e38F;
        break;
      case 5:
        row[i] = odd_one ? std::numeric_limits<float>::max() : 1e-45F;
        break;
      case 6:
        row[i] = odd_one ? 1e-45F : 0.0F;
        break;  // the least there is
      case 7:
        row[i] = i % 2 == 0 ? 1.0F : -1.0F;
        break;
      case 8:
        row[i] = std::ldexp(x, static_cast<int>(random.between(-60, 60)));
        break;
      default:
        break;  // zeros
    }
  }
  return row;
}
constexpr int num_kinds = 10;

const std::uint8_t* as_codes(const std::vector<std::int8_t>& bytes) {
  return reinterpret_cast<const std::uint8_t*>(bytes.data());
}

}  // namespace

TEST_CASE("every instruction set encodes to the same codes and scales", "[kernel]") {
  test::random random;
  const int bits = GENERATE(2, 3, 4, 5, 6);
  const std::vector<std::int8_t> other_table = test::random_trellis_table(random);
  std::vector<std::int8_t> extreme(256, 127);
  extreme[0] = -127;
  const std::int8_t* const tables[] = {table_of(bits), other_table.data(), extreme.data()};
  for (const index_t dim : awkward_dims) {
    for (int kind = 0; kind < num_kinds; ++kind) {
      const std::vector<float> row = special_row(static_cast<std::size_t>(dim), kind, random);
      for (const std::int8_t* table : tables) {
        const encoded expected = encode(kernel::isa::portable, bits, row, table);
        for (const kernel::isa level : kernel::available()) {
          CAPTURE(bits, dim, kind, kernel::to_string(level));
          REQUIRE(encode(level, bits, row, table) == expected);
        }
      }
    }
  }
}

TEST_CASE("an encoded row is finite, within its bits, and never further away than zero", "[kernel]") {
  test::random random(1);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  for (const index_t dim : awkward_dims) {
    for (int kind = 0; kind < num_kinds; ++kind) {
      CAPTURE(bits, dim, kind);
      const std::vector<float> row = special_row(static_cast<std::size_t>(dim), kind, random);
      const std::int8_t* table = table_of(bits);
      const encoded e = encode(kernel::available().back(), bits, row, table);
      REQUIRE(std::isfinite(e.scale));
      REQUIRE(std::all_of(e.codes.begin(), e.codes.end(), [&](std::uint8_t c) { return c < (1U << bits); }));
      if (squared_size(row) == 0) {
        REQUIRE(e.scale == 0);
        REQUIRE(std::all_of(e.codes.begin(), e.codes.end(), [](std::uint8_t c) { return c == 0; }));
      } else if (kind != 3 && kind != 6) {  // a subnormal scale is a coarse one
        REQUIRE(squared_distance(row, decode(bits, e.codes, table, double{e.scale})) <=
                squared_size(row) * 1.000001);
      }
    }
  }
}

TEST_CASE("a power of two changes the scale and nothing else", "[kernel]") {
  test::random random(2);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  const std::vector<float> row = random.floats(128);
  const encoded e = encode(kernel::available().back(), bits, row, table_of(bits));
  for (const int exponent : {-100, -1, 1, 60, 120}) {
    std::vector<float> scaled = row;
    for (float& x : scaled) x = std::ldexp(x, exponent);
    const encoded other = encode(kernel::available().back(), bits, scaled, table_of(bits));
    CAPTURE(exponent);
    REQUIRE(other.codes == e.codes);
    REQUIRE(other.scale == std::ldexp(e.scale, exponent));
  }
}

TEST_CASE("no other codes come nearer than those of the encoder", "[kernel]") {
  test::random random(3);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  const std::vector<std::int8_t> other_table = test::random_trellis_table(random);
  for (int i = 0; i < 60; ++i) {
    const std::int8_t* table = i % 2 == 0 ? table_of(bits) : other_table.data();
    const std::vector<float> row = random.floats(random.between(1, i < 30 ? 12 / bits : 200));
    const std::vector<double> in_units = normalised(row);
    const encoded e = encode(kernel::available().back(), bits, row, table);
    const std::vector<double> found = decode(bits, e.codes, table, 1.0);
    double distance = 0;
    for (std::size_t d = 0; d < row.size(); ++d)
      distance += (in_units[d] - found[d]) * (in_units[d] - found[d]);
    const double least = least_distance(bits, in_units, table);
    if (i < 30)
      REQUIRE_THAT(least_distance_of_all(bits, in_units, table), Catch::Matchers::WithinRel(least, 1e-9));
    CAPTURE(bits, row.size());
    // targets are rounded to 1/16, 1/8, 1/4, 1 of a unit: 2 * error * (distance between two numbers), for both
    const double rounding = 0.6 / (1 << (6 - bits)) * std::sqrt(static_cast<double>(row.size()));
    REQUIRE(distance >= least * (1 - 1e-9));
    REQUIRE(std::sqrt(distance) <= std::sqrt(least) + 2 * rounding);
  }
}

TEST_CASE("the scale is that of least squares", "[kernel]") {
  test::random random(4);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  for (const index_t dim : {1, 2, 16, 80, 128, 512}) {
    const std::vector<float> row = random.floats(dim);
    const encoded e = encode(kernel::available().back(), bits, row, table_of(bits));
    const std::vector<double> numbers = decode(bits, e.codes, table_of(bits), 1.0);
    double product = 0;
    double square = 0;
    for (std::size_t d = 0; d < row.size(); ++d) {
      product += row[d] * numbers[d];
      square += numbers[d] * numbers[d];
    }
    CAPTURE(bits, dim);
    REQUIRE_THAT(double{e.scale}, Catch::Matchers::WithinRel(product / square, 2e-4));
  }
}

TEST_CASE("normally distributed rows keep the distortion of their bits", "[kernel]") {
  test::random random(5);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  double distance = 0;
  double size = 0;
  for (int i = 0; i < 1000; ++i) {
    const std::vector<float> row = random.floats(128);
    const encoded e = encode(kernel::available().back(), bits, row, table_of(bits));
    const double scale = to_float(from_float<bfloat16>(e.scale));
    distance += squared_distance(row, decode(bits, e.codes, table_of(bits), scale));
    size += squared_size(row);
  }
  CAPTURE(bits, distance / size);
  constexpr std::array most{0.0785, 0.0213, 0.0059, 0.0017, 0.0006};
  REQUIRE(distance / size < most[static_cast<std::size_t>(bits - 2)]);
  REQUIRE(distance / size > std::ldexp(1.0, -2 * bits));  // Shannon's bound
}

TEST_CASE("tables for few numbers lose less of them than those for rows", "[kernel]") {
  test::random random(11);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  constexpr float limit = 127.0F / kernel::trellis_unit;
  double distance = 0;
  double with_long = 0;
  double size = 0;
  const auto lost = [bits](const std::vector<float>& row, const std::int8_t* table) {
    const encoded e = encode(kernel::available().back(), bits, row, table, 1.0F);
    return squared_distance(row, decode(bits, e.codes, table, 1.0 / kernel::trellis_unit));
  };
  for (int i = 0; i < 8000; ++i) {
    std::vector<float> row = random.floats(16);
    for (float& x : row) x = std::clamp(x, -limit, limit);
    distance += lost(row, codec::short_trellis_table(bits));
    if (bits <= 4) with_long += lost(row, codec::trellis_table(bits));
    size += squared_size(row);
  }
  constexpr std::array most{0.0935, 0.0252, 0.0069, 0.0020, 0.00063};
  CAPTURE(bits, distance / size, with_long / size);
  CHECK(distance / size < most[static_cast<std::size_t>(bits - 2)]);
  if (bits <= 4) CHECK(distance < with_long);
}

TEST_CASE("rows in units of their own are encoded to the same codes on every instruction set", "[kernel]") {
  test::random random(8);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  const std::vector<std::int8_t> other_table = test::random_trellis_table(random);
  std::vector<std::int8_t> extreme(256, 127);
  extreme[0] = -127;
  const std::int8_t* const tables[] = {table_of(bits), other_table.data(), extreme.data()};
  for (const float unit : {1.0F, 0.37F, 1e-30F, 1e30F}) {
    const float limit = 127.0F / kernel::trellis_unit * unit;
    for (const index_t dim : awkward_dims) {
      for (int kind = 0; kind < 6; ++kind) {
        std::vector<float> row = random.floats(dim);
        for (std::size_t i = 0; i < row.size(); ++i) {
          if (kind == 0) row[i] = std::clamp(row[i] * unit, -limit, limit);
          if (kind == 1) row[i] = limit;
          if (kind == 2) row[i] = i % 2 == 0 ? limit : -limit;
          if (kind == 3) row[i] = std::copysign(limit, row[i]);
          if (kind == 4) row[i] = i == row.size() / 2 ? unit * 1e-7F : 0.0F;
          if (kind == 5) row[i] = 0.0F;
        }
        for (const std::int8_t* table : tables) {
          const encoded expected = encode(kernel::isa::portable, bits, row, table, unit);
          REQUIRE(std::isfinite(expected.scale));
          for (const kernel::isa level : kernel::available()) {
            CAPTURE(bits, unit, dim, kind, kernel::to_string(level));
            REQUIRE(encode(level, bits, row, table, unit) == expected);
          }
        }
      }
    }
  }
}

TEST_CASE("no other codes come nearer to a row in units of its own", "[kernel]") {
  test::random random(9);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  const std::vector<std::int8_t> other_table = test::random_trellis_table(random);
  constexpr float unit = 0.7F;
  constexpr float limit = 127.0F / kernel::trellis_unit * unit;
  for (int i = 0; i < 40; ++i) {
    const std::int8_t* table = i % 2 == 0 ? table_of(bits) : other_table.data();
    // rows far below the unit, of it, and at the limit
    std::vector<float> row = random.floats(i < 30 ? random.between(1, 200) : 512);
    const float size = i % 3 == 0 ? 1e-3F : i % 3 == 1 ? unit : 10;
    std::vector<double> in_units;
    for (float& x : row) {
      x = i == 39 ? 0.0F : std::clamp(x * size, -limit, limit);
      in_units.push_back(double{x} / double{unit} * kernel::trellis_unit);
    }
    const encoded e = encode(kernel::available().back(), bits, row, table, unit);
    const std::vector<double> found = decode(bits, e.codes, table, 1.0);
    double distance = 0;
    for (std::size_t d = 0; d < row.size(); ++d)
      distance += (in_units[d] - found[d]) * (in_units[d] - found[d]);
    const double least = least_distance(bits, in_units, table);
    CAPTURE(bits, i, row.size());
    const double rounding = 0.6 / (1 << (6 - bits)) * std::sqrt(static_cast<double>(row.size()));
    REQUIRE(distance >= least * (1 - 1e-9));
    REQUIRE(std::sqrt(distance) <= std::sqrt(least) + 2 * rounding);
  }
}

TEST_CASE("normally distributed rows in their true unit lose little more than in their own", "[kernel]") {
  test::random random(10);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  constexpr float limit = 127.0F / kernel::trellis_unit;
  double own = 0;
  double given = 0;
  for (int i = 0; i < 500; ++i) {
    const std::vector<float> row = random.floats(128);
    std::vector<float> clamped = row;
    for (float& x : clamped) x = std::clamp(x, -limit, limit);
    const encoded e = encode(kernel::available().back(), bits, row, table_of(bits));
    own += squared_distance(row, decode(bits, e.codes, table_of(bits), double{e.scale}));
    const encoded f = encode(kernel::available().back(), bits, clamped, table_of(bits), 1.0F);
    given += squared_distance(row, decode(bits, f.codes, table_of(bits), 1.0 / kernel::trellis_unit));
  }
  CAPTURE(bits, own, given);
  REQUIRE(given < own * (bits == 6 ? 1.35 : 1.15));  // what is beyond the table weighs more
}

TEST_CASE("codes of a block become the numbers of the table, and nothing around them changes", "[kernel]") {
  test::random random(6);
  const index_t gap = GENERATE(0, 64, 68);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  const auto table = test::random_trellis_table(random);
  constexpr index_t margin = 64;
  for (const index_t dim : awkward_dims) {
    for (const index_t num_tokens : {4, 16, 20, 64}) {
      const block_geometry g{num_tokens, dim};
      const bool has_keys = num_tokens % key_lanes == 0;
      const auto size = static_cast<std::size_t>(has_keys ? order::key_size(g) : 0);
      const auto value_size = static_cast<std::size_t>(order::value_size(g));
      std::vector<std::uint8_t> keys(size + 2 * margin);
      std::vector<std::uint8_t> values(value_size + 2 * margin);
      for (std::uint8_t& c : keys) c = static_cast<std::uint8_t>(random.below(1 << bits));
      for (std::uint8_t& c : values) c = static_cast<std::uint8_t>(random.below(1 << bits));

      const index_t key_stride = order::key_group_size(g) + gap;
      const index_t value_stride = order::pack * dim + gap;
      const index_t num_groups = has_keys ? num_tokens / key_lanes : 0;
      std::vector<std::int8_t> key_numbers(static_cast<std::size_t>(num_groups * key_stride + 2 * margin),
                                           99);
      std::vector<std::int8_t> value_numbers(
          static_cast<std::size_t>(num_tokens / order::pack * value_stride + 2 * margin), 99);
      for (index_t t = 0; t < num_tokens; ++t) {
        unsigned key_state = 0;
        unsigned value_state = 0;
        for (index_t d = 0; d < dim; ++d) {
          if (has_keys) {
            const index_t k = order::key_index(g, t, d);
            key_state = (key_state << bits | keys[static_cast<std::size_t>(margin + k)]) & 255U;
            key_numbers[static_cast<std::size_t>(margin + k + t / key_lanes * gap)] = table[key_state];
          }
          const index_t v = order::value_index(g, t, d);
          value_state = (value_state << bits | values[static_cast<std::size_t>(margin + v)]) & 255U;
          value_numbers[static_cast<std::size_t>(margin + v + t / order::pack * gap)] = table[value_state];
        }
      }
      const auto is_padding = [&](std::size_t i) {
        const auto at = static_cast<index_t>(i) - margin;
        return at >= 0 && at < num_groups * key_stride && at % key_stride < order::key_group_size(g) &&
               at % key_stride / (key_lanes * order::pack) * order::pack + at % order::pack >= dim;
      };

      for (const kernel::isa level : kernel::available()) {
        CAPTURE(bits, dim, num_tokens, gap, kernel::to_string(level));
        const auto& kernels = kernel::select(level).trellis;
        const auto check = [&](std::vector<std::int8_t> key_out, std::vector<std::int8_t> value_out,
                               const std::uint8_t* key_codes, const std::uint8_t* value_codes) {
          kernels.decode_keys(bits, dim, num_groups,
                              key_codes == nullptr ? as_codes(key_out) + margin : key_codes, table.data(),
                              key_out.data() + margin, key_stride);
          kernels.decode_values(bits, dim, num_tokens / order::pack,
                                value_codes == nullptr ? as_codes(value_out) + margin : value_codes,
                                table.data(), value_out.data() + margin, value_stride);
          bool equal = true;
          for (std::size_t i = 0; i < key_numbers.size(); ++i)
            equal = equal && (is_padding(i) || key_out[i] == key_numbers[i]);
          return equal && value_out == value_numbers;
        };
        REQUIRE(check(std::vector<std::int8_t>(key_numbers.size(), 99),
                      std::vector<std::int8_t>(value_numbers.size(), 99), keys.data() + margin,
                      values.data() + margin));
        if (gap == 0) {  // in place
          const auto as_numbers = [](const std::vector<std::uint8_t>& codes) {
            std::vector<std::int8_t> numbers(codes.size(), 99);
            std::copy(codes.begin() + margin, codes.end() - margin, numbers.begin() + margin);
            return numbers;
          };
          REQUIRE(check(as_numbers(keys), as_numbers(values), nullptr, nullptr));
        }
      }
    }
  }
}

#if defined(__x86_64__)
TEST_CASE("AVX-512 without VBMI decodes to the same numbers", "[kernel]") {
  if (!kernel::avx512::runs_here()) return;
  test::random random(7);
  const int bits = GENERATE(2, 3, 4, 5, 6);
  const auto table = test::random_trellis_table(random);
  for (const index_t dim : awkward_dims) {
    const block_geometry g{64, dim};
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(order::key_size(g) + 64));
    for (std::uint8_t& c : codes) c = static_cast<std::uint8_t>(random.below(1 << bits));
    std::vector<std::int8_t> expected(codes.size());
    std::vector<std::int8_t> out(codes.size());
    CAPTURE(bits, dim);
    kernel::portable::decode_trellis_keys(bits, dim, 4, codes.data(), table.data(), expected.data(),
                                          order::key_group_size(g));
    kernel::avx512::decode_trellis_keys(bits, dim, 4, codes.data(), table.data(), out.data(),
                                        order::key_group_size(g));
    REQUIRE(out == expected);
    kernel::portable::decode_trellis_values(bits, dim, 16, codes.data(), table.data(), expected.data(),
                                            4 * dim);
    kernel::avx512::decode_trellis_values(bits, dim, 16, codes.data(), table.data(), out.data(), 4 * dim);
    REQUIRE(out == expected);
  }
}
#endif
