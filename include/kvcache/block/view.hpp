// SPDX-License-Identifier: MIT
// Views of block memory and of the caller's rows. None of them owns anything.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/core/types.hpp>

#include <cstddef>

namespace kvcache::inline v0 {

/// One encoded block as a container hands it out.
struct block_view {
  index_t index = 0;                ///< of the block within its sequence
  index_t first_token = 0;          ///< token index of slot 0
  index_t count = 0;                ///< slots that hold tokens; the others may hold anything
  const std::byte* data = nullptr;  ///< keys section, then values section; 64-byte aligned
  bool sealed = true;               ///< in the encoding of the cache's codec, else of codec::exact_tokens
};

/// The exact first tokens of a sealed block; `count` is 0 where there are none.
struct exact_sinks_view {
  const std::byte* data = nullptr;  ///< in the encoding of codec::exact_tokens; 64-byte aligned
  index_t count = 0;
  block_geometry geometry = {};
};

/// Float rows of one head inside a [token, head, dim] buffer: row i starts at `data + i * stride`.
template <class Float>
struct row_view {
  Float* data = nullptr;
  index_t stride = 0;  ///< floats from one token's row to the next

  constexpr Float* row(index_t token) const noexcept { return data + token * stride; }
};

using const_rows = row_view<const float>;
using mutable_rows = row_view<float>;

}  // namespace kvcache::inline v0
