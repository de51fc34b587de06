// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/codec/exact.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/select.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

using namespace kvcache;

namespace {

/// Stores one row as key and value and reads it back.
template <class Codec>
std::vector<float> through(const std::vector<float>& row) {
  const block_geometry g{16, static_cast<index_t>(row.size())};
  const memory_block block(Codec{}.block_bytes(g), huge_page_resource());
  const const_rows in{row.data(), g.head_dim};
  REQUIRE(Codec{}.encode(kernel::best(), g, block.data(), 3, 1, in, in) == status::ok);
  std::vector<float> k(row.size()), v(row.size());
  Codec{}.decode(kernel::best(), g, block.data(), 3, 1, {k.data(), g.head_dim}, {v.data(), g.head_dim});
  for (std::size_t i = 0; i < k.size(); ++i) CHECK((k[i] == v[i] || (std::isnan(k[i]) && std::isnan(v[i]))));
  return k;
}

}  // namespace

TEST_CASE("exact codecs keep their stated relative error", "[codec]") {
  test::random random;
  const std::vector<float> row = random.floats(512);
  CHECK(through<codec::f32>(row) == row);
  const std::vector<float> f16 = through<codec::f16>(row);
  const std::vector<float> bf16 = through<codec::bf16>(row);
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (std::abs(row[i]) > 6e-5F) CHECK(std::abs(f16[i] - row[i]) <= std::abs(row[i]) * 0x1p-11F);
    CHECK(std::abs(bf16[i] - row[i]) <= std::abs(row[i]) * 0x1p-8F);
  }
}

TEST_CASE("exact codecs store NaN and infinity", "[codec]") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> row{infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 1e30F};
  for (const auto& got : {through<codec::f32>(row), through<codec::f16>(row), through<codec::bf16>(row)}) {
    CHECK(got[0] == infinity);
    CHECK(got[1] == -infinity);
    CHECK(std::isnan(got[2]));
  }
  CHECK(through<codec::f16>(row)[3] == infinity);  // out of range for half
}

TEST_CASE("block sizes are what the layout adds up to", "[codec]") {
  STATIC_REQUIRE(codec::bf16{}.block_bytes({64, 128}) == 2 * 64 * 128 * 2);
  STATIC_REQUIRE(codec::f32{}.block_bytes({64, 128}) == 2 * 64 * 128 * 4);
  STATIC_REQUIRE(codec::bf16{}.token_bytes({64, 128}) == 512);
  // head_dim 3 in 16 bit: keys padded to 4 dims, 16 * 4 * 2 = 128 bytes; values 16 * 3 * 2 = 96, padded to 128
  STATIC_REQUIRE(codec::f16{}.block_bytes({16, 3}) == 256);
  STATIC_REQUIRE(codec::f16{}.token_bytes({16, 3}) == 12);
  for (const index_t dim : {1, 7, 64, 511}) CHECK(codec::bf16{}.block_bytes({32, dim}) % 64 == 0);
}

TEST_CASE("codecs go by the names that specs use", "[codec]") {
  CHECK(std::string(codec::f32::name) == "f32");
  CHECK(std::string(codec::f16::name) == "f16");
  CHECK(std::string(codec::bf16::name) == "bf16");
}
