// SPDX-License-Identifier: MIT
// Which sections attend says will be read next, seen by a codec that writes it down.
#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/core/prefetch.hpp>

#include "support/catch.hpp"

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

namespace {

using namespace kvcache;

struct reading {
  const std::byte* section;
  kernel::upcoming then;
};
std::vector<reading> keys_read;
std::vector<reading> values_read;

struct watched_keys : codec::int8_keys {
  [[nodiscard]] watched_keys at(index_t /*layer*/, index_t /*head*/) const { return *this; }
  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* out, kernel::upcoming then) const {
    keys_read.push_back({section, then});
    int8_keys::scores(kernels, g, section, count, prepared, num_rows, out, then);
  }
};

struct watched_values : codec::int8_values {
  static void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                         index_t count, const float* weights, index_t num_rows, float* sums,
                         kernel::upcoming then) {
    values_read.push_back({section, then});
    int8_values::accumulate(kernels, g, section, count, weights, num_rows, sums, then);
  }
};

struct watched : codec::sides<watched_keys, watched_values> {
  static constexpr std::string_view name = "watched";
};

/// Six blocks and a piece of a seventh, read by two query heads of one group.
template <class Cache>
void read_all(Cache& cache) {
  const cache_shape shape = cache.shape();
  const std::vector<float> rows(static_cast<std::size_t>((6 * shape.block_size + 5) * shape.head_dim), 0.5F);
  cache[0].append(std::span<const float>(rows), std::span<const float>(rows));
  const std::vector<float> q(static_cast<std::size_t>(2 * shape.head_dim), 1.0F);
  std::vector<float> out(q.size());
  keys_read.clear();
  values_read.clear();
  attend(std::span<const float>(q), cache[0], std::span(out));
  REQUIRE(keys_read.size() == 7);
  REQUIRE(values_read.size() == 7);
}

/// The section that is read `blocks` blocks after entry i, or null.
const std::byte* later(const std::vector<reading>& all, std::size_t i, std::size_t blocks) {
  return i + blocks < all.size() ? all[i + blocks].section : nullptr;
}

template <class Cache>
void check_small_blocks(Cache cache) {
  read_all(cache);
  constexpr std::size_t ahead = 3;  // 12 KiB of blocks of 4.25 KiB
  for (std::size_t i = 0; i < keys_read.size(); ++i) {
    CAPTURE(i);
    const std::byte* block_ahead = later(keys_read, i, ahead);
    CHECK(keys_read[i].then.next == (block_ahead != nullptr ? block_ahead : values_read[i].section));
    CHECK(values_read[i].then.next == later(values_read, i, ahead));
    CHECK(keys_read[i].then.soon == later(keys_read, i, 1));
    CHECK(values_read[i].then.soon == later(values_read, i, 1));
  }
}

TEST_CASE("where blocks are small, those ahead are named, wherever they lie", "[codec]") {
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 32};
  check_small_blocks(contiguous_cache<watched>(shape));
  check_small_blocks(chunked_cache<watched>(shape));
}

TEST_CASE("where blocks are large, the section behind this one is what is read soon", "[codec]") {
  contiguous_cache<watched> cache({.num_layers = 1, .num_kv_heads = 1, .head_dim = 256});
  read_all(cache);
  for (std::size_t i = 0; i < keys_read.size(); ++i) {
    CAPTURE(i);
    CHECK(keys_read[i].then.soon == values_read[i].section);
    CHECK(values_read[i].then.soon == later(keys_read, i, 1));
    const bool far = prefetch::by_levels && i + 1 < keys_read.size();
    CHECK(keys_read[i].then.next == (far ? later(keys_read, i, 1) : values_read[i].section));
    CHECK(values_read[i].then.next ==
          (prefetch::by_levels ? later(values_read, i, 1) : later(keys_read, i, 1)));
  }
}

TEST_CASE("parts of what is upcoming leave null alone", "[codec]") {
  const std::byte memory[2] = {};
  const kernel::upcoming nothing(nullptr);
  CHECK(nothing.part(64).next == nullptr);
  CHECK(nothing.part(64).soon == nullptr);
  CHECK(nothing.or_at_hand(memory).next == memory);
  CHECK(nothing.or_at_hand(memory).soon == memory);
  const kernel::upcoming both(memory, memory + 1);
  CHECK(both.part(1).next == memory + 1);
  CHECK(both.or_at_hand(nullptr).soon == memory + 1);
}

}  // namespace
