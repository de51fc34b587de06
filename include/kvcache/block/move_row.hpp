// SPDX-License-Identifier: MIT
// Rows that change places as they are stored: the element (token, dim) of one section into another slot, of the same
// section or of another block's, byte for byte.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/core/types.hpp>

#include <cstddef>
#include <cstring>

namespace kvcache::inline v0 {

/// Copies one row of a keys section, padding included. O(head_dim), and so are the others.
/// \param from,to  sections of one geometry, may be the same
template <class Element>
void move_key_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                  index_t to_slot) noexcept {
  using order = block_order<Element>;
  constexpr auto bytes = static_cast<index_t>(sizeof(Element));
  constexpr auto pack_bytes = static_cast<std::size_t>(order::pack * bytes);
  for (index_t d = 0; d < g.head_dim; d += order::pack)
    std::memcpy(to + order::key_index(g, to_slot, d) * bytes,
                from + order::key_index(g, from_slot, d) * bytes, pack_bytes);
}

/// Copies one row of a values section.
template <class Element>
void move_value_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                    index_t to_slot) noexcept {
  using order = block_order<Element>;
  constexpr auto bytes = static_cast<index_t>(sizeof(Element));
  const std::byte* source = from + order::value_index(g, from_slot, 0) * bytes;
  std::byte* target = to + order::value_index(g, to_slot, 0) * bytes;
  for (index_t d = 0; d < g.head_dim; ++d)
    std::memcpy(target + d * order::pack * bytes, source + d * order::pack * bytes, sizeof(Element));
}

}  // namespace kvcache::inline v0
