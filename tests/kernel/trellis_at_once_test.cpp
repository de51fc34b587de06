// SPDX-License-Identifier: MIT
// The codec trellis multiplied without unpacking: the same scores and sums, to the bit, as of the numbers that the portable
// kernels decode.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/block/order.hpp>
#include <kvcache/block/packed.hpp>
#include <kvcache/codec/trellis_tables.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/avx512.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/select.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

using namespace kvcache;

namespace {

using order = block_order<std::int8_t>;

/// A section of random codes, packed, and one of the numbers that they stand for.
struct section_of_codes {
  memory_block packed;
  memory_block numbers;
};

memory_block zeros(index_t size) {
  memory_block block(round_up(size, 64), huge_page_resource());
  std::memset(block.data(), 0, static_cast<std::size_t>(block.size()));
  return block;
}

template <int Bits, class Decode>
section_of_codes random_section(index_t size, test::random& random, Decode decode) {
  section_of_codes out{zeros(packed_order<Bits>::section_bytes(size)), zeros(size)};
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(size));
  for (index_t i = 0; i < size; ++i) {
    auto& code = codes[static_cast<std::size_t>(i)];
    code = static_cast<std::uint8_t>(random.below(1 << Bits));
    packed_order<Bits>::put(out.packed.data(), i, code);
  }
  decode(codes.data(), reinterpret_cast<std::int8_t*>(out.numbers.data()));
  return out;
}

struct problem {
  const kernel::table& kernels;
  block_geometry g;
  index_t count;
  index_t num_rows;
  std::vector<std::int8_t> table;
  std::vector<bfloat16> scales;

  problem(const kernel::table& level, block_geometry geometry, index_t tokens, index_t rows,
          test::random& random)
      : kernels(level),
        g(geometry),
        count(tokens),
        num_rows(rows),
        table(256),
        scales(static_cast<std::size_t>(geometry.block_size)) {
    for (std::int8_t& x : table) x = static_cast<std::int8_t>(random.between(-127, 127));
    for (bfloat16& scale : scales) scale = from_float<bfloat16>(random.uniform(0.01F, 2.0F));
  }
};

template <int Bits>
bool same_scores(const problem& p, test::random& random) {
  const auto keys = random_section<Bits>(order::key_size(p.g), random, [&](const auto* codes, auto* numbers) {
    kernel::portable::decode_trellis_keys(Bits, p.g.head_dim, p.g.block_size / key_lanes, codes,
                                          p.table.data(), numbers);
  });
  const std::vector<float> queries = random.floats(p.num_rows * p.g.head_dim);
  const memory_block prepared =
      zeros(p.num_rows * kernel::prepared_query_floats(p.g.head_dim) * index_t{sizeof(float)});
  auto* ready = reinterpret_cast<float*>(prepared.data());
  p.kernels.coarse.prepare(p.g.head_dim, queries.data(), p.num_rows, ready);
  std::vector<float> got(static_cast<std::size_t>(p.num_rows * p.g.block_size), 7.0F);
  std::vector<float> expected = got;
  if (!p.kernels.trellis.scores({Bits, keys.packed.data(), p.table.data()}, p.g, p.scales.data(), p.count,
                                ready, p.num_rows, got.data(), nullptr))
    return got == expected;
  p.kernels.coarse.scores(p.g, keys.numbers.data(), p.scales.data(), p.count, ready, p.num_rows,
                          expected.data(), nullptr);
  return got == expected;
}

template <int Bits>
bool same_sums(const problem& p, test::random& random) {
  const auto values =
      random_section<Bits>(order::value_size(p.g), random, [&](const auto* codes, auto* numbers) {
        kernel::portable::decode_trellis_values(Bits, p.g.head_dim, p.g.block_size / order::pack, codes,
                                                p.table.data(), numbers);
      });
  std::vector<float> weights(static_cast<std::size_t>(p.num_rows * p.g.block_size));
  for (index_t r = 0; r < p.num_rows; ++r) {
    for (index_t i = 0; i < p.count; ++i)
      weights[static_cast<std::size_t>(r * p.g.block_size + i)] =
          random.chance(0.2) ? 0.0F : random.uniform(0, 1);
  }
  std::vector<float> got = random.floats(p.num_rows * p.g.head_dim);
  std::vector<float> expected = got;
  if (!p.kernels.trellis.accumulate({Bits, values.packed.data(), p.table.data()}, p.g, p.scales.data(),
                                    p.count, weights.data(), p.num_rows, got.data(), values.packed.data()))
    return got == expected;
  p.kernels.coarse.accumulate(p.g, values.numbers.data(), p.scales.data(), p.count, weights.data(),
                              p.num_rows, expected.data(), nullptr);
  return got == expected;
}

template <int Bits>
void require_same(const problem& p, test::random& random) {
  CAPTURE(kernel::to_string(p.kernels.level), Bits, p.g.head_dim, p.g.block_size, p.count, p.num_rows);
  REQUIRE(same_scores<Bits>(p, random));
  REQUIRE(same_sums<Bits>(p, random));
}

}  // namespace

TEST_CASE("packed states are multiplied as the numbers that they select", "[kernel]") {
  test::random random;
  for (const kernel::isa level : kernel::available()) {
    const kernel::table& kernels = kernel::select(level);
    if (kernels.trellis.scores == nullptr) continue;
    for (const index_t head_dim : {1, 8, 16, 20, 32, 64, 80, 96, 128, 192, 256, 512}) {
      for (const index_t block_size : {16, 64, 128}) {
        for (const index_t count : {0, 1, 15, 16, 17, 50, 63, 64, 128}) {
          if (count > block_size) continue;
          for (const index_t num_rows : {1, 2, 3, 4, 8, 9, 16}) {
            const problem p(kernels, {block_size, head_dim}, count, num_rows, random);
            require_same<2>(p, random);
            require_same<3>(p, random);
            require_same<4>(p, random);
          }
        }
      }
    }
  }
}

TEST_CASE("the head_dims of models are multiplied at once where the processor can", "[kernel]") {
#if defined(__x86_64__)
  if (!kernel::avx512::runs_here() || !kernel::avx512::vbmi::runs_here()) return;
  test::random random(1);
  for (const index_t head_dim : {128, 256}) {
    const problem p(kernel::select(kernel::isa::avx512), {64, head_dim}, 64, 8, random);
    const memory_block codes = zeros(packed_order<4>::section_bytes(order::key_size(p.g)));
    std::vector<float> rows(static_cast<std::size_t>(8 * (head_dim + 64)));
    const memory_block prepared = zeros(8 * kernel::prepared_query_floats(head_dim) * index_t{sizeof(float)});
    for (const int bits : {2, 3, 4}) {
      const kernel::packed_section section{bits, codes.data(), p.table.data()};
      CHECK(p.kernels.trellis.scores(section, p.g, p.scales.data(), 64,
                                     reinterpret_cast<const float*>(prepared.data()), 8, rows.data(),
                                     nullptr));
      CHECK(p.kernels.trellis.accumulate(section, p.g, p.scales.data(), 64, rows.data(), 8,
                                         rows.data() + 8 * 64, nullptr));
    }
  }
#endif
}
