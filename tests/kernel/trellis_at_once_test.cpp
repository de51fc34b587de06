// SPDX-License-Identifier: MIT
// The codec trellis multiplied without unpacking, or unpacked in one pass: the same scores, sums and numbers, to the bit, as
// those that the portable kernels decode.
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/trellis_table.hpp"

#include <kvcache/block/order.hpp>
#include <kvcache/block/packed.hpp>
#include <kvcache/codec/trellis_tables.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/avx512.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
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
        table(test::random_trellis_table(random)),
        scales(static_cast<std::size_t>(geometry.block_size)) {
    for (bfloat16& scale : scales) scale = from_float<bfloat16>(random.uniform(0.01F, 2.0F));
  }
};

template <int Bits>
bool same_scores(const problem& p, test::random& random) {
  const auto keys = random_section<Bits>(order::key_size(p.g), random, [&](const auto* codes, auto* numbers) {
    kernel::portable::decode_trellis_keys(Bits, p.g.head_dim, p.g.block_size / key_lanes, codes,
                                          p.table.data(), numbers, order::key_group_size(p.g));
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
                                                p.table.data(), numbers, order::pack * p.g.head_dim);
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

/// Puts one code of a section as klt does: 3, 5 and 6 bits as two or four, and the others behind them.
template <int Bits>
void put_code(std::byte* packed, index_t size, index_t i, std::uint8_t code) {
  constexpr int low = Bits == 3 ? 2 : 4;
  if constexpr (Bits == 3 || Bits > 4) {
    packed_order<low>::put(packed, i, static_cast<std::uint8_t>(code % (1U << low)));
    packed_order<Bits - low>::put(packed + packed_order<low>::section_bytes(size), i,
                                  static_cast<std::uint8_t>(code >> low));
  } else {
    packed_order<Bits>::put(packed, i, code);
  }
}

/// Tokens of a block unpacked in one pass against all of it decoded. \param Keys  keys, or values
/// \return whether it could be done
template <int Bits, bool Keys>
bool unpacks(const kernel::table& kernels, const block_geometry& g, test::random& random) {
  const index_t size = Keys ? order::key_size(g) : order::value_size(g);
  const index_t run_tokens = Keys ? key_lanes : order::pack;
  const index_t run_bytes = Keys ? order::key_group_size(g) : order::pack * g.head_dim;
  const problem p(kernels, g, g.block_size, 1, random);
  const memory_block packed =
      zeros(packed_order<3>::section_bytes(size) + packed_order<4>::section_bytes(size) +
            packed_order<2>::section_bytes(size));
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(size));
  for (index_t i = 0; i < size; ++i) {
    codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(random.below(1 << Bits));
    put_code<Bits>(packed.data(), size, i, codes[static_cast<std::size_t>(i)]);
  }
  const auto decode = Keys ? kernel::portable::decode_trellis_keys : kernel::portable::decode_trellis_values;
  std::vector<std::int8_t> numbers(static_cast<std::size_t>(size));
  decode(Bits, g.head_dim, g.block_size / run_tokens, codes.data(), p.table.data(), numbers.data(),
         run_bytes);

  const auto unpack = Keys ? kernels.trellis.unpack_keys : kernels.trellis.unpack_values;
  bool done = false;
  for (const index_t gap : {0, 64, 192}) {
    for (index_t token = 0; token < g.block_size; token += 64) {
      const index_t num_tokens = std::min(g.block_size - token, random.between(1, 64));
      const index_t num_runs = ceil_div(num_tokens, run_tokens);
      std::vector<std::int8_t> out(static_cast<std::size_t>(num_runs * (run_bytes + gap)), 99);
      std::vector<std::int8_t> expected = out;
      done = unpack({Bits, packed.data(), p.table.data()}, g, token, num_tokens, out.data(), run_bytes + gap,
                    random.chance(0.5) ? packed.data() : nullptr);
      for (index_t r = 0; r < num_runs && done; ++r)
        std::copy_n(numbers.begin() + (token / run_tokens + r) * run_bytes, run_bytes,
                    expected.begin() + r * (run_bytes + gap));
      CAPTURE(kernel::to_string(kernels.level), Bits, Keys, g.head_dim, g.block_size, token, num_tokens, gap);
      REQUIRE(out == expected);
    }
  }
  return done;
}

}  // namespace

TEST_CASE("packed codes are unpacked to the numbers that their states select", "[kernel]") {
  test::random random(2);
  for (const kernel::isa level : kernel::available()) {
    const kernel::table& kernels = kernel::select(level);
    if (kernels.trellis.unpack_keys == nullptr) continue;
    for (const index_t head_dim : {1, 4, 12, 16, 20, 32, 44, 64, 80, 128, 512}) {
      for (const index_t block_size : {16, 64, 128}) {
        const block_geometry g{block_size, head_dim};
        bool keys = unpacks<2, true>(kernels, g, random);
        keys = unpacks<3, true>(kernels, g, random) && keys;
        keys = unpacks<4, true>(kernels, g, random) && keys;
        keys = unpacks<5, true>(kernels, g, random) && keys;
        keys = unpacks<6, true>(kernels, g, random) && keys;
        bool values = unpacks<2, false>(kernels, g, random);
        values = unpacks<3, false>(kernels, g, random) && values;
        values = unpacks<4, false>(kernels, g, random) && values;
        values = unpacks<5, false>(kernels, g, random) && values;
        values = unpacks<6, false>(kernels, g, random) && values;
#if defined(__x86_64__)
        const bool can =
            (level == kernel::isa::avx512 || level == kernel::isa::amx) && kernel::avx512::vbmi::runs_here();
        CHECK(keys == can);
        CHECK(values == (can && head_dim % 16 == 0));
#endif
      }
    }
  }
}

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
