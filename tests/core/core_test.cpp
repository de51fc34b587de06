// SPDX-License-Identifier: MIT
#include "support/catch.hpp"

#include <kvcache/core/address_space.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/executor.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

using namespace kvcache;

namespace {

constexpr index_t largest = std::numeric_limits<index_t>::max();

bool is_aligned(const void* p, std::uintptr_t alignment) {
  return reinterpret_cast<std::uintptr_t>(p) % alignment == 0;
}

std::string refusal(const cache_shape& shape) {
  try {
    validate(shape);
  } catch (const shape_error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("sizes that overflow are an error, not a wrap", "[core]") {
  CHECK(checked_mul(3, 5, 7) == 105);
  CHECK(checked_mul(largest, 1) == largest);
  CHECK(checked_mul(largest, 0) == 0);
  CHECK_THROWS_AS(checked_mul(largest / 2 + 1, 2), shape_error);
  CHECK_THROWS_AS(checked_mul(index_t{1} << 32, index_t{1} << 31), shape_error);
  CHECK_THROWS_AS(checked_mul(-1, 2), shape_error);
  CHECK(checked_add(largest - 1, 1) == largest);
  CHECK_THROWS_AS(checked_add(largest, 1), shape_error);
  CHECK(round_up(65, 64) == 128);
  CHECK(round_up(0, 64) == 0);
  CHECK_THROWS_AS(round_up(largest, 64), shape_error);
}

TEST_CASE("a shape that cannot be is refused by the name of its field", "[core]") {
  CHECK(refusal({}).empty());
  CHECK(refusal({.num_layers = 0}).find("num_layers") != std::string::npos);
  CHECK(refusal({.num_kv_heads = -3}).find("num_kv_heads") != std::string::npos);
  CHECK(refusal({.head_dim = 0}).find("head_dim") != std::string::npos);
  CHECK(refusal({.head_dim = 513}).find("513") != std::string::npos);
  for (const index_t block_size : {0, 8, 48, 512, -64}) {
    CHECK(refusal({.block_size = block_size}).find("block_size") != std::string::npos);
  }
  CHECK(refusal({.num_layers = largest / 2, .num_kv_heads = 8}).find("overflow") != std::string::npos);
  for (const index_t block_size : {16, 32, 64, 128, 256}) CHECK(refusal({.block_size = block_size}).empty());
}

TEST_CASE("memory is 64-byte aligned, and large pieces lie on huge pages", "[core]") {
  for (const index_t bytes : {1, 64, 4096, 1 << 20}) {
    const memory_block block(bytes, huge_page_resource());
    CHECK(is_aligned(block.data(), 64));
    CHECK(block.size() == bytes);
  }
  const memory_block large(5_MiB, huge_page_resource());
  CHECK(is_aligned(large.data(), 2 << 20));
}

TEST_CASE("a memory block moves without copying and goes back to its resource", "[core]") {
  STATIC_REQUIRE(std::is_nothrow_move_constructible_v<memory_block>);
  STATIC_REQUIRE(std::is_nothrow_move_assignable_v<memory_block>);
  STATIC_REQUIRE(!std::is_copy_constructible_v<memory_block>);
  memory_block a(128, huge_page_resource());
  std::byte* where = a.data();
  memory_block b(std::move(a));
  CHECK(b.data() == where);
  a = memory_block(64, huge_page_resource());
  a = std::move(b);
  CHECK(a.data() == where);
  CHECK(a.size() == 128);
}

TEST_CASE("reserved addresses cost nothing until memory is granted, and read as zero then", "[core]") {
  address_space space = address_space::reserve(1_GiB * 64);
  if (!space) SUCCEED("this system does not reserve addresses");
  if (!space) return;
  const index_t page = address_space::granularity();
  CHECK(is_aligned(space.data(), 2 << 20));
  REQUIRE(space.grant(0, 4 * page));
  CHECK(space.data()[4 * page - 1] == std::byte{0});
  space.data()[page] = std::byte{7};
  space.revoke(page, 4 * page);
  REQUIRE(space.grant(page, 2 * page));
  CHECK(space.data()[page] == std::byte{0});  // what was given back does not come back
  address_space moved = std::move(space);
  CHECK(moved.data()[0] == std::byte{0});
  CHECK(!address_space::reserve(0));
  CHECK(!address_space::reserve(largest));
}

TEST_CASE("joined pages hold what they held", "[core]") {
  constexpr index_t size = 3 * address_space::huge_page;
  const address_space space = address_space::reserve(size);
  if (!space) return;
  const index_t page = address_space::granularity();
  for (index_t i = 0; i < size; i += page) {
    REQUIRE(space.grant(i, i + page));
    space.data()[i] = static_cast<std::byte>(i / page % 251);
  }
  CHECK(space.join(size, size));
  (void)space.join(0, 2 * address_space::huge_page);  // whether or not the system does it
  (void)space.join(0, size);
  space.revoke(size - page, size);
  bool same = true;
  for (index_t i = 0; i < size - page; i += page)
    same = same && space.data()[i] == static_cast<std::byte>(i / page % 251);
  CHECK(same);
}

TEST_CASE("every status has a name, and capacity_error carries its own", "[core]") {
  CHECK(std::string(to_string(status::ok)) == "ok");
  CHECK(std::string(to_string(status::not_finite)) == "not finite");
  const capacity_error error("append", status::out_of_pages);
  CHECK(error.code() == status::out_of_pages);
  CHECK(std::string(error.what()) == "kvcache: append: out of pages");
}

TEST_CASE("an executor reference runs every task on the executor it refers to", "[core]") {
  serial_executor serial;
  const executor_ref ref(serial);
  std::vector<index_t> ran;
  const auto task = [&](index_t i, index_t worker) {
    CHECK(worker == 0);
    ran.push_back(i);
  };
  ref.run(4, task);
  CHECK(ran == std::vector<index_t>{0, 1, 2, 3});
  CHECK(ref.num_workers() == 1);
  const serial_executor settled;
  executor_ref(settled).run(2, task);  // an executor may be const if its run is
  CHECK(ran.size() == 6);
}
