// SPDX-License-Identifier: MIT
// Levels that multiply bytes as integers give the same numbers, bit by bit: those of the loops below.
#include "support/catch.hpp"
#include "support/emulated_tiles.hpp"
#include "support/integer_levels.hpp"
#include "support/random.hpp"

#include <kvcache/block/order.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

using namespace kvcache;

namespace {

using order = block_order<std::int8_t>;

#if defined(__x86_64__) && defined(__linux__)
/// AMX-BF16 without AMX-INT8.
struct tiles_of_bf16 : test::emulated_tiles {
  static bool multiply_bytes_here() { return false; }
  template <int C, int A, int B>
  static void multiply_signed() {
    throw std::logic_error("illegal instruction");
  }
  template <int C, int A, int B>
  static void multiply_unsigned() {
    throw std::logic_error("illegal instruction");
  }
};
#endif

/// Kernels that take queries and weights as integers up to these.
struct integer_kernels {
  std::string name;
  kernel::int8_kernels kernels;
  float largest_query;
  float largest_weight;
};

std::vector<integer_kernels> all_integer_kernels() {
  std::vector<integer_kernels> all;
  const auto add = [&all](const std::string& name, const kernel::int8_kernels& fine,
                          const kernel::int8_kernels& coarse) {
    all.push_back({name + " int8", fine, 127 * 128, 255 * 256});
    all.push_back({name + " coarse", coarse, 127, 255});
  };
  for (const kernel::isa level : kernel::available()) {
    const kernel::table& t = kernel::select(level);
    if (test::multiplies_integers(level)) add(std::string(kernel::to_string(level)), t.int8, t.coarse);
  }
#if defined(__x86_64__) && defined(__linux__)
  if (kernel::avx512::runs_here()) {
    using tiles = test::emulated_tiles;
    const kernel::table& t = kernel::amx::kernels_on<tiles>;
    const kernel::table& without = kernel::amx::kernels_on<tiles_of_bf16>;
    add("emulated tiles where they pay", t.int8, t.coarse);
    add("emulated tiles of bf16 only", without.int8, without.coarse);
    kernel::int8_kernels fine = t.int8;
    kernel::int8_kernels coarse = t.coarse;
    fine.scores = kernel::amx::score_bytes<tiles, 2>;
    fine.accumulate = kernel::amx::sum_bytes<tiles, 2>;
    coarse.scores = kernel::amx::score_bytes<tiles, 1>;
    coarse.accumulate = kernel::amx::sum_bytes<tiles, 1>;
    add("emulated tiles", fine, coarse);
  }
#endif
  return all;
}

/// number = scale * whole, the largest of a row being `largest`.
struct whole_row {
  whole_row(const std::vector<float>& row, float largest) {
    float most = 0x1p-110F;
    for (const float x : row) most = std::max(most, std::fabs(x));
    scale = most * (1.0F / largest);
    const float inverse = largest / most;
    for (const float x : row) numbers.push_back(static_cast<std::int32_t>(std::nearbyint(x * inverse)));
  }

  float scale;
  std::vector<std::int32_t> numbers;
};

struct sizes {
  index_t block_size, head_dim, count, num_rows;
};

/// Random bytes everywhere, in memory that ends where they do; scales are NaN where there is no token.
struct byte_block {
  byte_block(const sizes& n, test::random& random) : g{n.block_size, n.head_dim} {
    const auto bytes = [&random](index_t size) {
      std::vector<std::int8_t> all(static_cast<std::size_t>(size));
      for (std::int8_t& byte : all) byte = static_cast<std::int8_t>(random.between(-128, 127));
      return all;
    };
    keys = bytes(order::key_size(g));
    values = bytes(order::value_size(g));
    scales.resize(static_cast<std::size_t>(g.block_size),
                  from_float<bfloat16>(std::numeric_limits<float>::quiet_NaN()));
    for (index_t t = 0; t < n.count; ++t)
      scales[static_cast<std::size_t>(t)] = from_float<bfloat16>(random.uniform(0.001F, 2.0F));
  }
  [[nodiscard]] std::int32_t key(index_t t, index_t d) const {
    return keys[static_cast<std::size_t>(order::key_index(g, t, d))];
  }
  [[nodiscard]] std::int32_t value(index_t t, index_t d) const {
    return values[static_cast<std::size_t>(order::value_index(g, t, d))];
  }
  [[nodiscard]] float scale(index_t t) const { return to_float(scales[static_cast<std::size_t>(t)]); }

  block_geometry g;
  std::vector<std::int8_t> keys, values;
  std::vector<bfloat16> scales;
};

std::vector<float> scores_of(const integer_kernels& k, const byte_block& b, const sizes& n,
                             const std::vector<float>& queries) {
  const memory_block prepared(n.num_rows * kernel::prepared_query_floats(n.head_dim) * 4,
                              huge_page_resource());
  auto* ready = reinterpret_cast<float*>(prepared.data());
  k.kernels.prepare(n.head_dim, queries.data(), n.num_rows, ready);
  std::vector<float> scores(static_cast<std::size_t>(n.num_rows * n.block_size));
  k.kernels.scores(b.g, reinterpret_cast<const std::byte*>(b.keys.data()), b.scales.data(), n.count, ready,
                   n.num_rows, scores.data(), nullptr);
  return scores;
}

/// How many scores differ from those of whole numbers.
index_t wrong_scores(const integer_kernels& k, const byte_block& b, const sizes& n,
                     const std::vector<float>& queries, const std::vector<float>& scores) {
  index_t wrong = 0;
  for (index_t r = 0; r < n.num_rows; ++r) {
    const auto row = queries.begin() + r * n.head_dim;
    const whole_row q({row, row + n.head_dim}, k.largest_query);
    for (index_t t = 0; t < n.count; ++t) {
      std::int32_t dot = 0;
      for (index_t d = 0; d < n.head_dim; ++d) dot += q.numbers[static_cast<std::size_t>(d)] * b.key(t, d);
      const float expected = static_cast<float>(dot) * (b.scale(t) * q.scale);
      if (scores[static_cast<std::size_t>(r * n.block_size + t)] != expected) ++wrong;
    }
  }
  return wrong;
}

index_t wrong_sums(const integer_kernels& k, const byte_block& b, const sizes& n,
                   const std::vector<float>& weights, const std::vector<float>& before,
                   const std::vector<float>& sums) {
  index_t wrong = 0;
  for (index_t r = 0; r < n.num_rows; ++r) {
    std::vector<float> expected(before.begin() + r * n.head_dim, before.begin() + (r + 1) * n.head_dim);
    for (index_t first = 0; first < n.count; first += 64) {
      const index_t num_tokens = std::min(index_t{64}, n.count - first);
      std::vector<float> products;
      for (index_t t = first; t < first + num_tokens; ++t) {
        const float w = weights[static_cast<std::size_t>(r * n.block_size + t)];
        products.push_back(w == 0.0F ? 0.0F : w * b.scale(t));
      }
      const whole_row w(products, k.largest_weight);
      for (index_t d = 0; d < n.head_dim; ++d) {
        std::int32_t sum = 0;
        for (index_t t = 0; t < num_tokens; ++t)
          sum += w.numbers[static_cast<std::size_t>(t)] * b.value(first + t, d);
        float& to = expected[static_cast<std::size_t>(d)];
        const auto part = static_cast<float>(sum);  // the last dims, fewer than 16, are rounded twice
        to = d < n.head_dim / 16 * 16 ? std::fma(part, w.scale, to) : to + std::fma(part, w.scale, 0.0F);
      }
    }
    for (index_t d = 0; d < n.head_dim; ++d) {
      if (sums[static_cast<std::size_t>(r * n.head_dim + d)] != expected[static_cast<std::size_t>(d)])
        ++wrong;
    }
  }
  return wrong;
}

void require_all_alike(const sizes& n, test::random& random) {
  CAPTURE(n.block_size, n.head_dim, n.count, n.num_rows);
  const byte_block b(n, random);
  const std::vector<float> queries = random.floats(n.num_rows * n.head_dim);
  const std::vector<float> before = random.floats(n.num_rows * n.head_dim);
  std::vector<float> weights(static_cast<std::size_t>(n.num_rows * n.block_size),
                             std::numeric_limits<float>::quiet_NaN());
  for (index_t r = 0; r < n.num_rows; ++r) {
    for (index_t t = 0; t < round_up(n.count, key_lanes); ++t)
      weights[static_cast<std::size_t>(r * n.block_size + t)] =
          t >= n.count || random.chance(0.3) ? 0.0F : random.uniform(0, 1);
  }
  for (const integer_kernels& k : all_integer_kernels()) {
    CAPTURE(k.name);
    REQUIRE(wrong_scores(k, b, n, queries, scores_of(k, b, n, queries)) == 0);
    std::vector<float> sums = before;
    k.kernels.accumulate(b.g, reinterpret_cast<const std::byte*>(b.values.data()), b.scales.data(), n.count,
                         weights.data(), n.num_rows, sums.data(), nullptr);
    REQUIRE(wrong_sums(k, b, n, weights, before, sums) == 0);
  }
}

}  // namespace

TEST_CASE("integer operands give the same scores and sums on every level", "[kernel]") {
  test::random random;
  for (const index_t head_dim : {1, 3, 8, 20, 64, 72, 80, 128, 256}) {
    for (const index_t count : {0, 1, 15, 16, 17, 63, 64}) {
      for (const index_t num_rows : {1, 3, 4, 8, 9, 16})
        require_all_alike({64, head_dim, count, num_rows}, random);
    }
  }
}

TEST_CASE("integer operands: many rows, small and large blocks, the longest rows", "[kernel]") {
  test::random random;
  for (const index_t count : {1, 17, 64}) require_all_alike({64, 128, count, 64}, random);
  for (const index_t count : {1, 16}) require_all_alike({16, 20, count, 9}, random);
  for (const index_t count : {65, 127, 200, 256}) require_all_alike({256, 72, count, 9}, random);
  require_all_alike({256, 512, 256, 17}, random);
}
