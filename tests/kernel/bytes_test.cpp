// SPDX-License-Identifier: MIT
// The kernels on blocks of bytes, both accuracies, against double-precision loops over the same stored numbers.
#include "support/catch.hpp"
#include "support/integer_levels.hpp"
#include "support/kernels_on_tiles.hpp"
#include "support/random.hpp"

#include <kvcache/block/order.hpp>
#include <kvcache/block/packed.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

using namespace kvcache;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
const float not_a_number = std::numeric_limits<float>::quiet_NaN();

using order = block_order<std::int8_t>;

/// One set of kernels, and how much of the largest number of a row an operand may be off.
struct accuracy {
  const kernel::table* table;
  const kernel::int8_kernels* kernels;
  double query;
  double weight;
};

std::vector<accuracy> accuracies() {
  std::vector<accuracy> all;
  for (const kernel::table* t : test::every_table()) {
    const bool whole = test::multiplies_integers(t->level);
    all.push_back({t, &t->int8, whole ? 0.5 / 16256 : 0, whole ? 0.5 / 65280 : 0});
    all.push_back({t, &t->coarse, whole ? 1.0 / 254 : 0, whole ? 1.0 / 510 : 0});
  }
  return all;
}

/// A block of random bytes with random scales; where no token is, scales are NaN.
struct byte_block {
  byte_block(block_geometry geometry, index_t num_tokens, test::random& random)
      : g(geometry),
        count(num_tokens),
        keys(order::key_size(g), huge_page_resource()),
        values(order::value_size(g), huge_page_resource()),
        scales(static_cast<std::size_t>(g.block_size), from_float<bfloat16>(not_a_number)) {
    for (index_t i = 0; i < keys.size(); ++i) keys.data()[i] = static_cast<std::byte>(random.below(256));
    for (index_t i = 0; i < values.size(); ++i) values.data()[i] = static_cast<std::byte>(random.below(256));
    for (index_t t = 0; t < g.block_size; ++t) {
      for (index_t d = g.head_dim; d < round_up(g.head_dim, 4); ++d)
        keys.data()[order::key_index(g, t, d)] = {};
    }
    for (index_t t = 0; t < count; ++t)
      scales[static_cast<std::size_t>(t)] = from_float<bfloat16>(random.uniform(0.001F, 2.0F));
  }

  [[nodiscard]] double key(index_t t, index_t d) const { return number(keys, order::key_index(g, t, d), t); }
  [[nodiscard]] double value(index_t t, index_t d) const {
    return number(values, order::value_index(g, t, d), t);
  }
  [[nodiscard]] double number(const memory_block& section, index_t i, index_t t) const {
    const auto byte = static_cast<std::int8_t>(section.data()[i]);
    return double{to_float(scales[static_cast<std::size_t>(t)])} * byte;
  }

  block_geometry g;
  index_t count;
  memory_block keys, values;
  std::vector<bfloat16> scales;
};

struct sizes {
  index_t block_size, head_dim, count, num_rows;
};

std::vector<sizes> awkward_sizes() {
  std::vector<sizes> all;
  for (const index_t block_size : {16, 64, 256}) {
    for (const index_t head_dim : {1, 3, 16, 20, 33, 64, 80, 100, 128, 512}) {
      for (const index_t num_rows : {1, 3, 4, 8, 16}) {
        for (const index_t count :
             {index_t{1}, index_t{16}, index_t{17}, index_t{47}, block_size - 1, block_size})
          if (count <= block_size) all.push_back({block_size, head_dim, count, num_rows});
      }
    }
  }
  for (index_t count = 1; count <= 64; ++count) all.push_back({64, 80, count, 1 + count % 5});
  return all;
}

/// Kernels take queries prepared, 64-byte aligned.
memory_block prepared(const kernel::int8_kernels& kernels, const std::vector<float>& queries,
                      index_t head_dim) {
  const auto num_rows = static_cast<index_t>(queries.size()) / head_dim;
  memory_block out(num_rows * kernel::prepared_query_floats(head_dim) * 4, huge_page_resource());
  std::memset(out.data(), 0xff, static_cast<std::size_t>(out.size()));
  kernels.prepare(head_dim, queries.data(), num_rows, reinterpret_cast<float*>(out.data()));
  return out;
}

std::vector<float> scores_of(const accuracy& a, const byte_block& b, const std::vector<float>& queries) {
  const auto num_rows = static_cast<index_t>(queries.size()) / b.g.head_dim;
  const memory_block q = prepared(*a.kernels, queries, b.g.head_dim);
  std::vector<float> scores(static_cast<std::size_t>(num_rows * b.g.block_size), not_a_number);
  a.kernels->scores(b.g, b.keys.data(), b.scales.data(), b.count, reinterpret_cast<const float*>(q.data()),
                    num_rows, scores.data(), b.values.data());
  return scores;
}

void check_scores(const accuracy& a, const sizes& n, test::random& random) {
  const byte_block b({n.block_size, n.head_dim}, n.count, random);
  const std::vector<float> q = random.floats(n.num_rows * n.head_dim);
  const std::vector<float> scores = scores_of(a, b, q);
  double worst = 0;  // in units of what is allowed
  for (index_t r = 0; r < n.num_rows; ++r) {
    const float* row = &q[static_cast<std::size_t>(r * n.head_dim)];
    double largest = 0;
    for (index_t d = 0; d < n.head_dim; ++d) largest = std::max(largest, std::abs(double{row[d]}));
    for (index_t t = 0; t < n.count; ++t) {
      double dot = 0;
      double size = 0;
      double keys = 0;
      for (index_t d = 0; d < n.head_dim; ++d) {
        dot += double{row[d]} * b.key(t, d);
        size += std::abs(double{row[d]} * b.key(t, d));
        keys += std::abs(b.key(t, d));
      }
      const double allowed = 2e-6 * size + 1.0001 * a.query * largest * keys + 1e-30;
      const double error = std::abs(double{scores[static_cast<std::size_t>(r * n.block_size + t)]} - dot);
      worst = std::max(worst, std::isnan(error) ? 2.0 : error / allowed);
    }
  }
  CHECK(worst <= 1);
}

/// What the weights of 64 tokens may be off, times their values: [block_size / 64] of one row and dim.
double allowed_error(const accuracy& a, const byte_block& b, const float* weights, index_t d) {
  double allowed = 0;
  for (index_t first = 0; first < b.count; first += 64) {
    double largest = 0;
    double values = 0;
    for (index_t t = first; t < std::min(first + 64, b.count); ++t) {
      if (weights[t] == 0.0F) continue;
      const double scale = double{to_float(b.scales[static_cast<std::size_t>(t)])};
      largest = std::max(largest, double{weights[t]} * scale);
      values += std::abs(b.value(t, d)) / scale;
    }
    allowed += 1.0001 * a.weight * largest * values;
  }
  return allowed;
}

void check_accumulate(const accuracy& a, const sizes& n, test::random& random) {
  const byte_block b({n.block_size, n.head_dim}, n.count, random);
  std::vector<float> weights(static_cast<std::size_t>(n.num_rows * n.block_size), not_a_number);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const index_t slot = static_cast<index_t>(i) % n.block_size;
    if (slot < round_up(n.count, key_lanes))
      weights[i] = slot >= n.count || random.chance(0.3) ? 0.0F : random.uniform(0, 1);
  }
  std::vector<float> sums = random.floats(n.num_rows * n.head_dim);
  const std::vector<float> before = sums;
  a.kernels->accumulate(b.g, b.values.data(), b.scales.data(), n.count, weights.data(), n.num_rows,
                        sums.data(), nullptr);
  double worst = 0;
  for (index_t r = 0; r < n.num_rows; ++r) {
    const float* row = &weights[static_cast<std::size_t>(r * n.block_size)];
    for (index_t d = 0; d < n.head_dim; ++d) {
      const auto i = static_cast<std::size_t>(r * n.head_dim + d);
      double sum = double{before[i]};
      double size = std::abs(sum);
      for (index_t t = 0; t < n.count; ++t) {
        const double term = row[t] == 0.0F ? 0.0 : double{row[t]} * b.value(t, d);
        sum += term;
        size += std::abs(term);
      }
      const double error = std::abs(double{sums[i]} - sum);
      const double allowed = 2e-6 * size + allowed_error(a, b, row, d) + 1e-30;
      worst = std::max(worst, std::isnan(error) ? 2.0 : error / allowed);
    }
  }
  CHECK(worst <= 1);
}

}  // namespace

TEST_CASE("scores of bytes are dot products within the stated accuracy", "[kernel]") {
  test::random random;
  for (const accuracy& a : accuracies()) {
    for (const sizes& n : awkward_sizes()) {
      CAPTURE(kernel::to_string(a.table->level), a.query, n.block_size, n.head_dim, n.count, n.num_rows);
      check_scores(a, n, random);
    }
  }
}

TEST_CASE("sums of bytes are weighted sums within the stated accuracy, hidden tokens left out", "[kernel]") {
  test::random random;
  for (const accuracy& a : accuracies()) {
    for (const sizes& n : awkward_sizes()) {
      CAPTURE(kernel::to_string(a.table->level), a.weight, n.block_size, n.head_dim, n.count, n.num_rows);
      check_accumulate(a, n, random);
    }
  }
}

TEST_CASE("a hidden token's scale may be NaN or infinite", "[kernel]") {
  test::random random;
  for (const accuracy& a : accuracies()) {
    CAPTURE(kernel::to_string(a.table->level), a.weight);
    byte_block b({64, 20}, 50, random);
    std::vector<float> weights(64, 0.25F);
    std::fill(weights.begin() + 50, weights.end(), 0.0F);
    weights[3] = weights[7] = 0.0F;
    std::vector<float> clean(20, 1.0F);
    a.kernels->accumulate(b.g, b.values.data(), b.scales.data(), 50, weights.data(), 1, clean.data(),
                          nullptr);
    b.scales[3] = from_float<bfloat16>(not_a_number);
    b.scales[7] = from_float<bfloat16>(infinity);
    std::vector<float> sums(20, 1.0F);
    a.kernels->accumulate(b.g, b.values.data(), b.scales.data(), 50, weights.data(), 1, sums.data(), nullptr);
    CHECK(sums == clean);
    weights[9] = not_a_number;  // of a token that is seen: NaN it must be
    a.kernels->accumulate(b.g, b.values.data(), b.scales.data(), 50, weights.data(), 1, sums.data(), nullptr);
    CHECK(std::all_of(sums.begin(), sums.end(), [](float x) { return std::isnan(x); }));
  }
}

TEST_CASE("queries that are not finite have scores that are not, and spoil no other row", "[kernel]") {
  test::random random;
  for (const accuracy& a : accuracies()) {
    for (const float bad : {not_a_number, -not_a_number, infinity, -infinity}) {
      for (const index_t at : {0, 19, 70}) {
        CAPTURE(kernel::to_string(a.table->level), a.query, bad, at);
        const byte_block b({16, 71}, 16, random);
        std::vector<float> q = random.floats(5 * 71);
        const std::vector<float> clean = scores_of(a, b, q);
        q[static_cast<std::size_t>(2 * 71 + at)] = bad;
        const std::vector<float> scores = scores_of(a, b, q);
        for (std::size_t i = 0; i < scores.size(); ++i) {
          const bool spoilt = i / 16 == 2;
          const bool key_is_zero = b.key(static_cast<index_t>(i % 16), at) == 0;
          CHECK((spoilt ? !std::isfinite(scores[i]) || key_is_zero : scores[i] == clean[i]));
        }
      }
    }
  }
}

TEST_CASE("zero, tiny and huge queries and weights keep their accuracy", "[kernel]") {
  test::random random;
  for (const accuracy& a : accuracies()) {
    for (const float scale : {0.0F, 1e-30F, 1e-20F, 1e20F, 1e30F}) {
      CAPTURE(kernel::to_string(a.table->level), a.query, scale);
      const byte_block b({16, 64}, 16, random);
      std::vector<float> q(64, scale);
      double sum = 0;
      for (index_t d = 0; d < 64; ++d) sum += b.key(5, d) * double{scale};
      CHECK(std::abs(double{scores_of(a, b, q)[5]} - sum) <= 1e-3 * double{scale});

      const std::vector<float> weights(16, scale);
      std::vector<float> sums(64, 0.0F);
      a.kernels->accumulate(b.g, b.values.data(), b.scales.data(), 16, weights.data(), 1, sums.data(),
                            nullptr);
      double expected = 0;
      for (index_t t = 0; t < 16; ++t) expected += b.value(t, 9) * double{scale};
      const double allowed = a.weight * 16 * 128 * 2 * double{scale} + 1e-4 * double{scale};
      CHECK(std::abs(double{sums[9]} - expected) <= allowed);
    }
    const byte_block b({16, 64}, 16, random);
    for (const float tiny : {1e-45F, 1e-41F, 3e-39F, 1e-36F}) {  // only not to come out large
      const std::vector<float> q(64, tiny);
      for (const float s : scores_of(a, b, q)) CHECK(std::abs(s) < 1e-30F);
    }
  }
}

namespace {

/// The packed form of a section whose bytes are codes.
template <int Bits>
memory_block packed(const std::vector<std::uint8_t>& codes) {
  memory_block section(packed_order<Bits>::section_bytes(static_cast<index_t>(codes.size())),
                       huge_page_resource());
  std::memset(section.data(), 0, static_cast<std::size_t>(section.size()));
  for (std::size_t i = 0; i < codes.size(); ++i)
    packed_order<Bits>::put(section.data(), static_cast<index_t>(i), codes[i]);
  return section;
}

/// Scores and sums of packed codes, where a level has them, are those of the bytes that the codes stand for.
template <int Bits>
void require_packed_like_bytes(const kernel::table& t, const block_geometry& g, index_t count,
                               index_t num_rows, test::random& random) {
  CAPTURE(kernel::to_string(t.level), Bits, g.head_dim, g.block_size, count, num_rows);
  std::int8_t codebook[16];
  for (std::int8_t& entry : codebook) entry = static_cast<std::int8_t>(random.between(-127, 127));
  const auto in_codes = [&](index_t size) {
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(size));
    for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random.below(1 << Bits));
    return codes;
  };
  const auto to_bytes = [&](const std::vector<std::uint8_t>& codes) {
    memory_block bytes(round_up(static_cast<index_t>(codes.size()), 64), huge_page_resource());
    for (std::size_t i = 0; i < codes.size(); ++i)
      bytes.data()[i] = static_cast<std::byte>(codebook[codes[i]]);
    return bytes;
  };
  std::vector<bfloat16> scales(static_cast<std::size_t>(g.block_size));
  for (bfloat16& scale : scales) scale = from_float<bfloat16>(random.uniform(0.01F, 2.0F));

  const auto key_codes = in_codes(order::key_size(g));
  const auto keys = packed<Bits>(key_codes);
  const auto key_bytes = to_bytes(key_codes);
  const std::vector<float> queries = random.floats(num_rows * g.head_dim);
  const memory_block prepared(num_rows * kernel::prepared_query_floats(g.head_dim) * index_t{sizeof(float)},
                              huge_page_resource());
  auto* ready = reinterpret_cast<float*>(prepared.data());
  t.coarse.prepare(g.head_dim, queries.data(), num_rows, ready);
  std::vector<float> got(static_cast<std::size_t>(num_rows * g.block_size), 7.0F);
  std::vector<float> expected = got;
  if (!t.low_bit.scores({Bits, keys.data(), codebook}, g, scales.data(), count, ready, num_rows, got.data(),
                        nullptr))
    return;
  t.coarse.scores(g, key_bytes.data(), scales.data(), count, ready, num_rows, expected.data(), nullptr);
  REQUIRE(got == expected);

  const auto value_codes = in_codes(order::value_size(g));
  const auto values = packed<Bits>(value_codes);
  const auto value_bytes = to_bytes(value_codes);
  std::vector<float> weights(static_cast<std::size_t>(num_rows * g.block_size));
  for (index_t r = 0; r < num_rows; ++r) {
    for (index_t i = 0; i < count; ++i)
      weights[static_cast<std::size_t>(r * g.block_size + i)] =
          random.chance(0.2) ? 0.0F : random.uniform(0, 1);
  }
  std::vector<float> sums = random.floats(num_rows * g.head_dim);
  std::vector<float> expected_sums = sums;
  if (!t.low_bit.accumulate({Bits, values.data(), codebook}, g, scales.data(), count, weights.data(),
                            num_rows, sums.data(), values.data()))
    return;
  t.coarse.accumulate(g, value_bytes.data(), scales.data(), count, weights.data(), num_rows,
                      expected_sums.data(), nullptr);
  REQUIRE(sums == expected_sums);
}

}  // namespace

TEST_CASE("packed codes are multiplied as the bytes that they stand for", "[kernel]") {
  test::random random;
  for (const kernel::table* table : test::every_table()) {
    const kernel::table& t = *table;
    if (t.low_bit.scores == nullptr) continue;
    for (const index_t head_dim : {8, 16, 32, 64, 80, 96, 128, 256}) {
      for (const index_t block_size : {16, 64, 128}) {
        for (const index_t count : {index_t{1}, index_t{15}, index_t{17}, index_t{50}, block_size}) {
          for (const index_t num_rows : {1, 3, 4, 8, 9}) {
            if (count > block_size) continue;
            const block_geometry g{.block_size = block_size, .head_dim = head_dim};
            require_packed_like_bytes<2>(t, g, count, num_rows, random);
            require_packed_like_bytes<3>(t, g, count, num_rows, random);
            require_packed_like_bytes<4>(t, g, count, num_rows, random);
          }
        }
      }
    }
  }
}

TEST_CASE("channels' scales and offsets are folded in on every level", "[kernel]") {
  test::random random;
  for (const kernel::isa level : kernel::available()) {
    const kernel::table& t = kernel::select(level);
    for (const index_t head_dim : {1, 7, 16, 33, 128}) {
      for (const index_t num_rows : {1, 4, 5}) {
        CAPTURE(kernel::to_string(level), head_dim, num_rows);
        const auto n = static_cast<std::size_t>(head_dim);
        std::vector<bfloat16> scales(n + 16);
        std::vector<bfloat16> offsets(n + 16);
        for (std::size_t d = 0; d < n; ++d) {
          scales[d] = from_float<bfloat16>(random.normal());
          offsets[d] = from_float<bfloat16>(random.normal());
        }
        const std::vector<float> rows = random.floats(num_rows * head_dim);
        std::vector<float> folded(rows.size());
        std::vector<float> dots(static_cast<std::size_t>(num_rows));
        t.channel.fold(rows.data(), num_rows, head_dim, scales.data(), offsets.data(), folded.data(),
                       dots.data());
        std::vector<float> sums = rows;
        std::vector<float> shifted = rows;
        std::vector<float> summed = folded;
        t.channel.add_to(rows.data(), num_rows * head_dim, summed.data());
        t.channel.shift(shifted.data(), num_rows * head_dim, 3.0F);
        t.channel.unfold(folded.data(), head_dim, scales.data(), offsets.data(), 0.5F, sums.data());
        std::vector<float> product(n);
        t.channel.multiply(rows.data(), folded.data(), 2.0F, head_dim, product.data());
        for (std::size_t r = 0; r < dots.size(); ++r) {
          double dot = 0;
          for (std::size_t d = 0; d < n; ++d) {
            dot += double{rows[r * n + d]} * double{to_float(offsets[d])};
            REQUIRE(folded[r * n + d] == rows[r * n + d] * to_float(scales[d]));
            REQUIRE(shifted[r * n + d] == rows[r * n + d] + 3.0F);
            REQUIRE(summed[r * n + d] == rows[r * n + d] + folded[r * n + d]);
          }
          REQUIRE(std::fabs(dots[r] - dot) < 1e-4);
        }
        for (std::size_t d = 0; d < n; ++d) {
          const double sum = double{rows[d]} + double{folded[d]} * double{to_float(scales[d])} +
                             0.5 * double{to_float(offsets[d])};
          REQUIRE(std::fabs(sums[d] - sum) < 1e-4);
          REQUIRE(std::fabs(product[d] - 2.0 * double{rows[d]} * double{folded[d]}) < 1e-4);
        }
      }
    }
  }
}

namespace {

/// Queries, and what a block's channels fold into them.
struct folding {
  folding(index_t head_dim, index_t num_rows, test::random& random)
      : queries(random.floats(num_rows * head_dim)),
        scales(static_cast<std::size_t>(round_up(head_dim, 32)), from_float<bfloat16>(not_a_number)),
        offsets(scales) {
    for (std::size_t d = 0; d < static_cast<std::size_t>(head_dim); ++d) {
      scales[d] = from_float<bfloat16>(std::exp2(4 * random.normal()));
      offsets[d] = from_float<bfloat16>(random.normal());
    }
  }
  std::vector<float> queries;
  std::vector<bfloat16> scales;  // what is behind the channels does not count
  std::vector<bfloat16> offsets;
};

/// Scores through prepare_folded.
std::vector<float> folded_scores(const kernel::int8_kernels& kernels, const byte_block& block,
                                 const folding& f, const float* queries, index_t num_rows) {
  const index_t dim = block.g.head_dim;
  const memory_block prepared(num_rows * kernel::prepared_query_floats(dim) * 4, huge_page_resource());
  auto* ready = reinterpret_cast<float*>(prepared.data());
  kernels.prepare_folded(dim, queries, num_rows, f.scales.data(), f.offsets.data(), ready);
  std::vector<float> scores(static_cast<std::size_t>(num_rows * block.g.block_size));
  kernels.scores(block.g, block.keys.data(), block.scales.data(), block.count, ready, num_rows, scores.data(),
                 nullptr);
  return scores;
}

void require_folded_scores(const kernel::int8_kernels& kernels, const byte_block& block, const folding& f,
                           index_t num_rows) {
  const index_t dim = block.g.head_dim;
  const std::vector<float> scores = folded_scores(kernels, block, f, f.queries.data(), num_rows);
  for (index_t r = 0; r < num_rows; ++r) {
    const float* query = f.queries.data() + r * dim;
    const std::vector<float> alone = folded_scores(kernels, block, f, query, 1);
    double largest = 0;
    double constant = 0;
    for (index_t d = 0; d < dim; ++d) {
      const auto i = static_cast<std::size_t>(d);
      largest = std::max(largest, std::fabs(double{query[d]} * to_float(f.scales[i])));
      constant += double{query[d]} * to_float(f.offsets[i]);
    }
    for (index_t t = 0; t < block.count; ++t) {
      double score = 0;
      double size = 0;
      for (index_t d = 0; d < dim; ++d) {
        const auto key = static_cast<double>(
            reinterpret_cast<const std::int8_t*>(block.keys.data())[order::key_index(block.g, t, d)]);
        score += double{query[d]} * to_float(f.scales[static_cast<std::size_t>(d)]) * key;
        size += std::fabs(key);
      }
      const double scale = to_float(block.scales[static_cast<std::size_t>(t)]);
      const float got = scores[static_cast<std::size_t>(r * block.g.block_size + t)];
      REQUIRE(got == alone[static_cast<std::size_t>(t)]);
      REQUIRE(std::fabs(got - (scale * score + constant)) <=
              scale * size * largest * (1.0 / 254 + 1e-5) + 1e-4);
    }
  }
}

}  // namespace

TEST_CASE("queries are folded and made ready at once as in two steps", "[kernel]") {
  test::random random;
  for (const kernel::isa level : kernel::available()) {
    const kernel::int8_kernels& kernels = kernel::select(level).coarse;
    if (kernels.prepare_folded == nullptr) continue;
    for (const index_t head_dim : {1, 7, 16, 33, 48, 64, 80, 128, 200, 512}) {
      for (const index_t num_rows : {1, 4, 7, 8}) {
        CAPTURE(kernel::to_string(level), head_dim, num_rows);
        const byte_block block({.block_size = 64, .head_dim = head_dim}, 50, random);
        folding f(head_dim, num_rows, random);
        require_folded_scores(kernels, block, f, num_rows);

        std::fill_n(f.queries.begin(), head_dim, 0.0F);
        for (const float score : folded_scores(kernels, block, f, f.queries.data(), 1))
          REQUIRE((score == 0.0F || score != score));  // NaN where there is no token
        for (const float bad : {not_a_number, infinity, -infinity}) {
          f.queries[static_cast<std::size_t>(head_dim) - 1] = bad;
          const std::vector<float> scores = folded_scores(kernels, block, f, f.queries.data(), 1);
          REQUIRE(std::none_of(scores.begin(), scores.end(), [](float x) { return std::isfinite(x); }));
        }
      }
    }
  }
}

TEST_CASE("products with a row that turns are coupled from what turns, on every level", "[kernel]") {
  test::random random;
  constexpr float guard = 77.0F;
  for (const index_t num_pairs : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 256}) {
    for (const index_t num_rows : {1, 3, 8}) {
      for (const index_t more : {0, 1, 5, 16}) {
        const index_t stride = 2 * num_pairs + more;
        const auto queries = random.floats(num_rows * stride);
        std::vector<bfloat16> means;
        for (index_t d = 0; d < 2 * num_pairs; ++d) means.push_back(from_float<bfloat16>(random.normal()));
        for (const kernel::isa level : kernel::available()) {
          CAPTURE(num_pairs, num_rows, stride, kernel::to_string(level));
          std::vector<float> out(static_cast<std::size_t>(num_rows * 2 * num_pairs + 1), guard);
          kernel::select(level).channel.couple(queries.data(), num_rows, stride, num_pairs, means.data(),
                                               out.data());
          double worst = 0;
          for (index_t r = 0; r < num_rows; ++r) {
            const float* q = queries.data() + r * stride;
            const float* made = out.data() + r * 2 * num_pairs;
            for (index_t i = 0; i < num_pairs; ++i) {
              const double mean_a = to_float(means[static_cast<std::size_t>(i)]);
              const double mean_b = to_float(means[static_cast<std::size_t>(num_pairs + i)]);
              const double a = q[i];
              const double b = q[num_pairs + i];
              const double size = (std::fabs(a) + std::fabs(b)) * (std::fabs(mean_a) + std::fabs(mean_b));
              worst = std::max(worst, std::fabs(a * mean_a + b * mean_b - double{made[i]}) / size);
              worst =
                  std::max(worst, std::fabs(b * mean_a - a * mean_b - double{made[num_pairs + i]}) / size);
            }
          }
          REQUIRE(worst < 0x1p-22);
          REQUIRE(out.back() == guard);
        }
      }
    }
  }
}
