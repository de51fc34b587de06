// SPDX-License-Identifier: MIT
// recoded: the tokens of one cache in another container or codec.
//
//   auto lean = recoded(cache, chunked_cache<codec::low_rank>(cache.shape(), codec::low_rank(bases)));
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

namespace detail {

inline index_t appended_at_a_time(index_t num_tokens) noexcept {
  return std::clamp(num_tokens, index_t{0}, index_t{256});
}

/// Bytes that append_tokens works in: keys and values of some tokens of one layer.
inline index_t append_tokens_bytes(const cache_shape& shape, index_t num_tokens) noexcept {
  return 2 * appended_at_a_time(num_tokens) * shape.num_kv_heads * shape.head_dim * index_t{sizeof(float)};
}

/// Appends tokens [first, last), as far as there are so many, of each layer.
template <class From, class To>
void append_tokens(const From& from, To& to, index_t first, index_t last) {
  const cache_shape shape = from.shape();
  const index_t row = shape.num_kv_heads * shape.head_dim;
  const index_t at_a_time = appended_at_a_time(last - first);
  std::vector<float> k(static_cast<std::size_t>(at_a_time * row));
  std::vector<float> v(k.size());
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const index_t end = std::min(last, from[layer].size());
    for (index_t t = first; t < end; t += at_a_time) {
      const index_t count = std::min(at_a_time, end - t);
      const auto size = static_cast<std::size_t>(count * row);
      const std::span<float> keys = std::span(k).first(size);
      const std::span<float> values = std::span(v).first(size);
      from[layer].copy_out(t, count, keys, values);
      codec::fit_into(to, keys);
      codec::fit_into(to, values);
      to[layer].append(keys, values);
    }
  }
}

}  // namespace detail

/// Encodes all tokens of `from` once more, and returns the cache they went into. Positions are the same as well.
///
/// \param from  any kv_cache, or any_cache
/// \param to    empty, with the same layers, heads and dims; what it is made of decides container and codec
/// Throws shape_error if they differ; capacity_error if `to` has no room, or refuses a row that is not finite; std::bad_alloc. Numbers beyond what exact
/// tokens of `to` can be are cut to that.
template <class From, class To>
[[nodiscard]] To recoded(const From& from, To to) {
  if (!same_heads(from.shape(), to.shape()))
    throw shape_error("kvcache: recoded needs a cache of the same layers, heads and dims");
  KVCACHE_ASSERT(to.size() == 0, "recoded: the cache to fill must be empty");
  index_t longest = 0;
  for (index_t layer = 0; layer < to.shape().num_layers; ++layer)
    longest = std::max(longest, from[layer].size());
  detail::append_tokens(from, to, 0, longest);
  to.set_positions(from.positions());
  return to;
}

}  // namespace kvcache::inline v0
