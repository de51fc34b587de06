// SPDX-License-Identifier: MIT
// Rows of whole blocks through a codec and back.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/select.hpp>

#include "support/catch.hpp"

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

namespace test {

using kvcache::block_geometry;
using kvcache::index_t;

/// Floats on a boundary of 64 bytes, zero to begin with.
class aligned_floats {
 public:
  explicit aligned_floats(index_t count)
      : block_(count * index_t{sizeof(float)}, kvcache::huge_page_resource()) {
    std::memset(block_.data(), 0, static_cast<std::size_t>(block_.size()));
  }
  [[nodiscard]] float* data() const noexcept { return reinterpret_cast<float*>(block_.data()); }

 private:
  kvcache::memory_block block_;
};

struct key_value_rows {
  std::vector<float> k;  // [tokens, head_dim]
  std::vector<float> v;
};

/// A block of memory for one codec, zeroed.
template <class Codec>
kvcache::memory_block zero_block(const block_geometry& g, const Codec& codec) {
  kvcache::memory_block block(codec.block_bytes(g), kvcache::huge_page_resource());
  std::memset(block.data(), 0, static_cast<std::size_t>(block.size()));
  return block;
}

/// Rows of one whole block, there and back.
template <class Codec>
key_value_rows through(const block_geometry& g, const key_value_rows& rows, const Codec& codec = {},
                       const kvcache::kernel::table& kernels = kvcache::kernel::best()) {
  const auto block = zero_block(g, codec);
  const index_t n = static_cast<index_t>(rows.k.size()) / g.head_dim;
  REQUIRE(codec.encode(kernels, g, block.data(), 0, n, {rows.k.data(), g.head_dim},
                       {rows.v.data(), g.head_dim}) == kvcache::status::ok);
  key_value_rows back{std::vector<float>(rows.k.size()), std::vector<float>(rows.v.size())};
  codec.decode(kernels, g, block.data(), 0, n, {back.k.data(), g.head_dim}, {back.v.data(), g.head_dim});
  return back;
}

inline double relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += std::pow(double{got[i]} - double{expected[i]}, 2);
    size += std::pow(double{expected[i]}, 2);
  }
  return size == 0 ? (error == 0 ? 0 : std::numeric_limits<double>::infinity()) : error / size;
}

}  // namespace test
