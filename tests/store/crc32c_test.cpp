// SPDX-License-Identifier: MIT
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/store/crc32c.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

using namespace kvcache;

namespace {

std::uint32_t of(std::span<const std::uint8_t> bytes) { return store::crc32c(std::as_bytes(bytes)); }

/// Bit by bit, from the definition: the remainder of the message, bits in reverse order, times x^32.
std::uint32_t by_definition(std::span<const std::byte> bytes) {
  std::uint32_t crc = 0xffffffffU;
  for (const std::byte byte : bytes) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      const std::uint32_t in = (std::to_integer<std::uint32_t>(byte) >> bit) & 1U;
      crc = ((crc ^ in) & 1U) != 0 ? (crc >> 1U) ^ 0x82f63b78U : crc >> 1U;
    }
  }
  return ~crc;
}

std::vector<std::byte> random_bytes(test::random& random, std::ptrdiff_t count) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(count));
  std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::byte>(random.below(256)); });
  return bytes;
}

}  // namespace

TEST_CASE("crc32c gives the checksums of RFC 3720", "[store]") {
  std::array<std::uint8_t, 32> bytes{};
  CHECK(of(bytes) == 0x8a9136aaU);
  bytes.fill(0xff);
  CHECK(of(bytes) == 0x62a8ab43U);
  std::iota(bytes.begin(), bytes.end(), std::uint8_t{0});
  CHECK(of(bytes) == 0x46dd794eU);
  std::reverse(bytes.begin(), bytes.end());
  CHECK(of(bytes) == 0x113fdb5cU);
  const std::array<std::uint8_t, 48> read_command = {
      0x01, 0xc0, 0, 0,    0, 0, 0, 0,    0,    0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0x04, 0,
      0,    0,    0, 0x14, 0, 0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0,    0};
  CHECK(of(read_command) == 0xd9963a56U);
  CHECK(store::crc32c({}) == 0);
}

TEST_CASE("every way to compute crc32c gives the same at every length and alignment", "[store]") {
  test::random random;
  const std::vector<std::byte> bytes = random_bytes(random, 20000);
  for (std::size_t size = 0; size < 1200; ++size) {
    const auto part = std::span(bytes).subspan(size % 9, size);
    const std::uint32_t expected = by_definition(part);
    REQUIRE(store::crc32c(part) == expected);
    REQUIRE(~store::detail::crc32c_portable(~0U, part.data(), part.size()) == expected);
  }
  for (const std::size_t size : {6143U, 6144U, 6145U, 12288U, 13000U, 19990U}) {
    const auto part = std::span(bytes).subspan(size % 9, size);
    REQUIRE(store::crc32c(part) == by_definition(part));
  }
}

TEST_CASE("crc32c of pieces is that of the whole", "[store]") {
  test::random random;
  const std::vector<std::byte> bytes = random_bytes(random, 15000);
  for (int round = 0; round < 100; ++round) {
    const auto cut = static_cast<std::size_t>(random.below(15001));
    const auto all = std::span<const std::byte>(bytes);
    REQUIRE(store::crc32c(all.subspan(cut), store::crc32c(all.first(cut))) == store::crc32c(all));
  }
}
