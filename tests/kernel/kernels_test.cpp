// SPDX-License-Identifier: MIT
// Every kernel of every instruction set that runs here, against plain double-precision loops over the same
// stored numbers, at awkward sizes.
#include "support/catch.hpp"
#include "support/kernels_on_tiles.hpp"
#include "support/random.hpp"

#include <kvcache/block/order.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

using namespace kvcache;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
const float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// Relative error of a sum of products in units of the sum of their sizes: that of float addition of up to 512 terms;
/// AMX splits operands into two bf16.
template <class Element>
double bound_of(const kernel::table& kernels) {
  return kernels.level == kernel::isa::amx && std::is_same_v<Element, bfloat16> ? 1e-5 : 2e-6;
}

/// Queries as the kernels of a table take them.
template <class Element>
class prepared_queries {
 public:
  prepared_queries(const kernel::table& kernels, index_t head_dim, const std::vector<float>& q,
                   index_t num_rows)
      : memory_(num_rows * kernel::prepared_element_floats(head_dim) * index_t{sizeof(float)},
                huge_page_resource()),
        data_(q.data()) {
    const auto prepare = kernel::for_element<Element>(kernels).prepare;
    if (prepare != nullptr)
      data_ = prepare(head_dim, q.data(), num_rows, reinterpret_cast<float*>(memory_.data()));
  }
  [[nodiscard]] const float* data() const { return data_; }

 private:
  memory_block memory_;
  const float* data_;
};

/// One block of random rows, what each element became when stored, and garbage wherever no token is.
template <class Element>
struct block {
  using order = block_order<Element>;

  block(const kernel::table& kernels, block_geometry geometry, index_t num_tokens, test::random& random)
      : g(geometry),
        count(num_tokens),
        keys(order::key_size(g) * index_t{sizeof(Element)}, huge_page_resource()),
        values(order::value_size(g) * index_t{sizeof(Element)}, huge_page_resource()) {
    std::memset(keys.data(), 0xff, static_cast<std::size_t>(keys.size()));  // NaN in every format
    std::memset(values.data(), 0xff, static_cast<std::size_t>(values.size()));
    k = random.floats(count * g.head_dim);
    v = random.floats(count * g.head_dim);
    const auto& kernel = kernel::for_element<Element>(kernels);
    kernel.encode_keys(g, keys.data(), 0, count, {k.data(), g.head_dim});
    kernel.encode_values(g, values.data(), 0, count, {v.data(), g.head_dim});
    for (float& x : k) x = to_float(from_float<Element>(x));
    for (float& x : v) x = to_float(from_float<Element>(x));
  }

  block_geometry g;
  index_t count;
  memory_block keys, values;
  std::vector<float> k, v;  // [count, head_dim]
};

struct sizes {
  index_t block_size, head_dim, count, num_rows;
};

std::vector<sizes> awkward_sizes() {
  std::vector<sizes> all;
  for (const index_t block_size : {16, 64, 256}) {
    for (const index_t head_dim : {1, 2, 3, 15, 16, 17, 33, 64, 80, 128, 129, 512}) {
      for (const index_t count :
           {index_t{1}, index_t{15}, index_t{16}, index_t{17}, block_size - 1, block_size}) {
        const index_t rows = (head_dim + count) % 19;  // 1 to 9, and as AMX multiplies them: 10, 15, ..., 50
        if (count <= block_size)
          all.push_back({block_size, head_dim, count, rows < 9 ? 1 + rows : 5 * (rows - 7)});
      }
    }
  }
  return all;
}

template <class Element>
void check_encode_and_decode(const kernel::table& kernels, const sizes& n, test::random& random) {
  const block_geometry g{n.block_size, n.head_dim};
  const auto& kernel = kernel::for_element<Element>(kernels);
  block<Element> b(kernels, g, n.count, random);
  const auto* keys = reinterpret_cast<const Element*>(b.keys.data());
  const auto* values = reinterpret_cast<const Element*>(b.values.data());
  bool in_place = true;
  for (index_t t = 0; t < n.count; ++t) {
    for (index_t d = 0; d < n.head_dim; ++d) {
      const auto i = static_cast<std::size_t>(t * n.head_dim + d);
      in_place = in_place && to_float(keys[block_order<Element>::key_index(g, t, d)]) == b.k[i];
      in_place = in_place && to_float(values[block_order<Element>::value_index(g, t, d)]) == b.v[i];
    }
  }
  CHECK(in_place);

  // Some tokens again, from rows that are further apart: nothing else may change.
  const index_t first = n.count / 3;
  const index_t again = n.count - first;
  const index_t stride = n.head_dim + 5;
  const std::vector<float> rows = random.floats(again * stride);
  kernel.encode_keys(g, b.keys.data(), first, again, {rows.data(), stride});
  kernel.encode_values(g, b.values.data(), first, again, {rows.data(), stride});
  for (index_t t = 0; t < again; ++t) {
    for (index_t d = 0; d < n.head_dim; ++d) {
      const float x = to_float(from_float<Element>(rows[static_cast<std::size_t>(t * stride + d)]));
      const auto i = static_cast<std::size_t>((first + t) * n.head_dim + d);
      b.k[i] = x;
      b.v[i] = x;
    }
  }
  std::vector<float> k(b.k.size()), v(b.v.size());
  kernel.decode_keys(g, b.keys.data(), 0, n.count, {k.data(), n.head_dim});
  kernel.decode_values(g, b.values.data(), 0, n.count, {v.data(), n.head_dim});
  CHECK(k == b.k);
  CHECK(v == b.v);
}

template <class Element>
void check_scores(const kernel::table& kernels, const sizes& n, test::random& random) {
  const block_geometry g{n.block_size, n.head_dim};
  const block<Element> b(kernels, g, n.count, random);
  const std::vector<float> q = random.floats(n.num_rows * n.head_dim);
  std::vector<float> scores(static_cast<std::size_t>(n.num_rows * n.block_size), not_a_number);
  const prepared_queries<Element> prepared(kernels, n.head_dim, q, n.num_rows);
  kernel::for_element<Element>(kernels).scores(g, b.keys.data(), n.count, prepared.data(), n.num_rows,
                                               scores.data(), nullptr);
  double worst = 0;
  for (index_t r = 0; r < n.num_rows; ++r) {
    for (index_t t = 0; t < n.count; ++t) {
      double dot = 0;
      double size = 0;
      for (index_t d = 0; d < n.head_dim; ++d) {
        const double term = double{q[static_cast<std::size_t>(r * n.head_dim + d)]} *
                            double{b.k[static_cast<std::size_t>(t * n.head_dim + d)]};
        dot += term;
        size += std::abs(term);
      }
      const double error = std::abs(double{scores[static_cast<std::size_t>(r * n.block_size + t)]} - dot);
      worst = std::max(worst, std::isnan(error) ? 1.0 : error / std::max(size, 1e-30));
    }
  }
  CHECK(worst < bound_of<Element>(kernels));
}

template <class Element>
void check_accumulate(const kernel::table& kernels, const sizes& n, test::random& random) {
  const block_geometry g{n.block_size, n.head_dim};
  const block<Element> b(kernels, g, n.count, random);
  std::vector<float> weights(static_cast<std::size_t>(n.num_rows * n.block_size));
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const index_t slot = static_cast<index_t>(i) % n.block_size;
    const bool zero = (slot >= n.count && slot < round_up(n.count, key_lanes)) || random.chance(0.3);
    weights[i] = zero ? 0.0F : random.uniform(0, 1);
  }
  std::vector<float> sums = random.floats(n.num_rows * n.head_dim);
  const std::vector<float> before = sums;
  kernel::for_element<Element>(kernels).accumulate(g, b.values.data(), n.count, weights.data(), n.num_rows,
                                                   sums.data(), nullptr);
  double worst = 0;
  for (index_t r = 0; r < n.num_rows; ++r) {
    for (index_t d = 0; d < n.head_dim; ++d) {
      const auto i = static_cast<std::size_t>(r * n.head_dim + d);
      double sum = before[i];
      double size = std::abs(sum);
      for (index_t t = 0; t < n.count; ++t) {
        const double term = double{weights[static_cast<std::size_t>(r * n.block_size + t)]} *
                            double{b.v[static_cast<std::size_t>(t * n.head_dim + d)]};
        sum += term;
        size += std::abs(term);
      }
      const double error = std::abs(double{sums[i]} - sum);
      worst = std::max(worst, std::isnan(error) ? 1.0 : error / size);
    }
  }
  CHECK(worst < bound_of<Element>(kernels));
}

}  // namespace

TEMPLATE_TEST_CASE("rows are stored where the block order says and come back", "[kernel]", float, half,
                   bfloat16) {
  test::random random;
  for (const kernel::table* level : test::every_table()) {
    for (const sizes& n : awkward_sizes()) {
      CAPTURE(kernel::to_string(level->level), n.block_size, n.head_dim, n.count);
      check_encode_and_decode<TestType>(*level, n, random);
    }
  }
}

TEMPLATE_TEST_CASE("scores are dot products, whatever lies in unused slots", "[kernel]", float, half,
                   bfloat16) {
  test::random random;
  for (const kernel::table* level : test::every_table()) {
    for (const sizes& n : awkward_sizes()) {
      CAPTURE(kernel::to_string(level->level), n.block_size, n.head_dim, n.count, n.num_rows);
      check_scores<TestType>(*level, n, random);
    }
  }
}

TEMPLATE_TEST_CASE("accumulate adds weighted values and leaves out weights of zero", "[kernel]", float, half,
                   bfloat16) {
  test::random random;
  for (const kernel::table* level : test::every_table()) {
    for (const sizes& n : awkward_sizes()) {
      CAPTURE(kernel::to_string(level->level), n.block_size, n.head_dim, n.count, n.num_rows);
      check_accumulate<TestType>(*level, n, random);
    }
  }
}

TEST_CASE("a value that is NaN or infinite does not leak through a weight of zero", "[kernel]") {
  for (const kernel::table* level : test::every_table()) {
    const kernel::table& kernels = *level;
    const block_geometry g{16, 20};
    std::vector<float> v(16 * 20, 1.0F);
    std::fill(v.begin() + 5 * 20, v.begin() + 6 * 20, not_a_number);
    std::fill(v.begin() + 6 * 20, v.begin() + 7 * 20, infinity);
    const memory_block values(block_order<half>::value_size(g) * 2, huge_page_resource());
    kernels.f16.encode_values(g, values.data(), 0, 16, {v.data(), 20});
    std::vector<float> weights(16, 0.5F);
    weights[5] = weights[6] = 0.0F;
    std::vector<float> sums(20, 0.0F);
    kernels.f16.accumulate(g, values.data(), 16, weights.data(), 1, sums.data(), nullptr);
    CHECK(sums == std::vector<float>(20, 7.0F));
    weights[5] = 0.5F;  // attended after all: NaN it must be
    kernels.f16.accumulate(g, values.data(), 16, weights.data(), 1, sums.data(), nullptr);
    CHECK(std::isnan(sums[0]));
  }
}

/// Random bits: every exponent, infinities, NaN, subnormals, ties of the narrowing.
std::vector<float> any_floats(index_t n, test::random& random) {
  std::vector<float> all(static_cast<std::size_t>(n));
  for (float& x : all) {
    auto u = static_cast<std::uint32_t>(random.below(index_t{1} << 32));
    if (random.chance(0.3)) u &= 0xffff8000U;                     // half-way between two bfloat16
    if (random.chance(0.2)) u = (u & 0x8fffffffU) | 0x38000000U;  // around the ends of half's range
    if (random.chance(0.05)) u |= 0x7f800000U;
    x = std::bit_cast<float>(u);
  }
  return all;
}

template <class Element>
void check_same_bytes(const kernel::table& kernels, const sizes& n, test::random& random) {
  const block_geometry g{n.block_size, n.head_dim};
  const std::vector<float> rows = any_floats(n.count * n.head_dim, random);
  const index_t first = random.below(n.block_size - n.count + 1);
  std::vector<std::byte> expected[2];
  std::vector<std::byte> stored[2];
  for (auto& bytes : expected)
    bytes.assign(
        static_cast<std::size_t>(round_up(g.block_size * (g.head_dim + 1) * index_t{sizeof(Element)}, 64)),
        std::byte{0x5a});
  for (int i = 0; i < 2; ++i) stored[i] = expected[i];
  const auto encode = [&](const kernel::table& with, std::vector<std::byte>* to) {
    const auto& kernel = kernel::for_element<Element>(with);
    kernel.encode_keys(g, to[0].data(), first, n.count, {rows.data(), n.head_dim});
    kernel.encode_values(g, to[1].data(), first, n.count, {rows.data(), n.head_dim});
  };
  encode(kernel::select(kernel::isa::portable), expected);
  encode(kernels, stored);
  CHECK(stored[0] == expected[0]);
  CHECK(stored[1] == expected[1]);
}

TEST_CASE("every level stores the same bytes", "[kernel]") {
  test::random random;
  for (const kernel::table* level : test::every_table()) {
    CAPTURE(kernel::to_string(level->level));
    for (const sizes& n : awkward_sizes()) {
      CAPTURE(n.block_size, n.head_dim, n.count);
      check_same_bytes<float>(*level, n, random);
      check_same_bytes<half>(*level, n, random);
      check_same_bytes<bfloat16>(*level, n, random);
    }
  }
}

/// One row. \return what sums must be multiplied by
static float softmax(const kernel::table& kernels, std::vector<float>& scores, kernel::softmax_row& row) {
  float rescale = 0;
  const auto count = static_cast<index_t>(scores.size());
  kernels.softmax(scores.data(), count, count, 1, &row, &rescale);
  return rescale;
}

TEST_CASE("exp is accurate over its whole range", "[kernel]") {
  // Through the softmax of each level: the first score is the maximum 0, so weight t is exp(score t).
  for (const kernel::table* level : test::every_table()) {
    CAPTURE(kernel::to_string(level->level));
    double worst = 0;
    for (int i = 0; i < 200'000; ++i) {
      const auto x = static_cast<float>(-87.3 * i / 200'000.0);
      std::vector<float> scores(16, x);
      scores[0] = 0.0F;
      kernel::softmax_row row{-infinity, 0.0F};
      (void)softmax(*level, scores, row);
      worst = std::max(worst, std::abs(double{scores[7]} / std::exp(double{x}) - 1.0));
    }
    CHECK(worst < 2e-7);
  }
}

TEST_CASE("soft caps are accurate over their whole range", "[kernel]") {
  for (const kernel::table* level : test::every_table()) {
    CAPTURE(kernel::to_string(level->level));
    double worst = 0;
    for (int i = -40'000; i <= 40'000; ++i) {
      const float x =
          static_cast<float>(std::copysign(std::exp(std::abs(i) / 1500.0 - 20.0), i));  // 2e-9 to 8e2
      std::vector<float> scores(16, x);
      level->soft_cap(scores.data(), 16, 30.0F);
      worst = std::max(worst, std::abs(double{scores[5]} / (30 * std::tanh(double{x} / 30)) - 1.0));
    }
    CHECK(worst < 5e-7);
    std::vector<float> ends = {0, -0.0F, infinity, -infinity, not_a_number, 1e38F, -1e38F, 1e-40F, 0, 0, 0, 0,
                               0, 0,     0,        0};
    level->soft_cap(ends.data(), 16, 50.0F);
    CHECK(ends[0] == 0.0F);
    CHECK(std::signbit(ends[1]));
    CHECK(ends[2] == 50.0F);
    CHECK(ends[3] == -50.0F);
    CHECK(std::isnan(ends[4]));
    CHECK(ends[5] == 50.0F);
    CHECK(ends[6] == -50.0F);
    CHECK(std::abs(ends[7]) <= 1e-39F);
  }
}

TEST_CASE("softmax steps keep a maximum within the slack, and the sum", "[kernel]") {
  for (const kernel::table* level : test::every_table()) {
    const kernel::table& kernels = *level;
    test::random random;
    kernel::softmax_row row{-infinity, 0.0F};
    double largest = -infinity;
    double sum = 0;
    double scale = 1;  // product of the factors handed out since the first step
    double first_weight = 0;
    std::vector<double> seen;
    for (int step = 0; step < 20; ++step) {
      std::vector<float> scores(64);
      for (float& s : scores) s = 10 * random.normal() + static_cast<float>(step);
      if (step % 3 == 0) std::fill(scores.begin() + 20, scores.end(), -infinity);
      for (const float s : scores) seen.push_back(s);
      const float rescale = softmax(kernels, scores, row);
      if (step == 0) first_weight = scores[0];
      if (step > 0) scale *= rescale;
    }
    for (const double s : seen) largest = std::max(largest, s);
    CHECK(largest <= double{row.max} + kernel::softmax_slack);
    CHECK(double{row.max} <= largest);
    for (const double s : seen) sum += std::exp(s - row.max);
    CHECK_THAT(double{row.sum}, Catch::Matchers::WithinRel(sum, 1e-5));
    CHECK_THAT(first_weight * scale, Catch::Matchers::WithinAbs(std::exp(seen[0] - row.max), 1e-6));
  }
}

TEST_CASE("softmax of a row does not depend on the rows beside it", "[kernel]") {
  constexpr index_t stride = 48;
  for (const kernel::table* level : test::every_table()) {
    CAPTURE(kernel::to_string(level->level));
    for (index_t num_rows = 0; num_rows <= kernel::max_softmax_rows; ++num_rows) {
      CAPTURE(num_rows);
      test::random random;
      std::vector<float> scores(static_cast<std::size_t>(stride * num_rows));
      for (float& s : scores) s = 20 * random.normal();
      std::vector<kernel::softmax_row> rows(static_cast<std::size_t>(num_rows), {-1.0F, 2.0F});
      if (num_rows > 2) rows[2] = {-infinity, 0.0F};
      std::vector<float> rescales(static_cast<std::size_t>(num_rows));
      const std::vector<float> given = scores;
      const std::vector<kernel::softmax_row> before = rows;
      level->softmax(scores.data(), stride, 32, num_rows, rows.data(), rescales.data());
      for (index_t r = 0; r < num_rows; ++r) {
        const auto i = static_cast<std::size_t>(r);
        std::vector<float> alone(given.begin() + r * stride, given.begin() + r * stride + 32);
        kernel::softmax_row row = before[i];
        CHECK(softmax(*level, alone, row) == rescales[i]);
        CHECK(row.max == rows[i].max);
        CHECK(row.sum == rows[i].sum);
        CHECK(std::equal(alone.begin(), alone.end(), scores.begin() + r * stride));
        CHECK(std::equal(given.begin() + r * stride + 32, given.begin() + (r + 1) * stride,
                         scores.begin() + r * stride + 32));
      }
    }
  }
}

TEST_CASE("softmax of nothing but masked scores is nothing, and NaN stays NaN", "[kernel]") {
  for (const kernel::table* level : test::every_table()) {
    const kernel::table& kernels = *level;
    std::vector<float> scores(32, -infinity);
    kernel::softmax_row row{-infinity, 0.0F};
    CHECK(softmax(kernels, scores, row) == 1.0F);
    CHECK(row.sum == 0.0F);
    CHECK(row.max == -infinity);
    CHECK(scores == std::vector<float>(32, 0.0F));

    row = {3.0F, 2.0F};  // masked scores after visible ones change nothing either
    std::fill(scores.begin(), scores.end(), -infinity);
    CHECK(softmax(kernels, scores, row) == 1.0F);
    CHECK(row.max == 3.0F);
    CHECK(row.sum == 2.0F);

    scores[4] = not_a_number;
    (void)softmax(kernels, scores, row);
    CHECK(std::isnan(row.sum));
    std::fill(scores.begin(), scores.end(), -infinity);
    scores[4] = not_a_number;
    row = {-infinity, 0.0F};
    (void)softmax(kernels, scores, row);
    CHECK(std::isnan(row.sum));
  }
}

TEST_CASE("kernels are selected by level or by name, and a wrong name lists the right ones", "[kernel]") {
  CHECK(kernel::available().front() == kernel::isa::portable);
  for (const kernel::isa level : kernel::available()) {
    CHECK(kernel::select(level).level == level);
    CHECK(&kernel::select(kernel::to_string(level)) == &kernel::select(level));
  }
  CHECK_THROWS_AS(kernel::select("sse9"), std::invalid_argument);
  CHECK_NOTHROW(kernel::best());
}
