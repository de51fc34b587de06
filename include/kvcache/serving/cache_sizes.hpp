// SPDX-License-Identifier: MIT
// cache_sizes: what a paged cache of a shape and a codec takes, byte for byte, without making one.
//
//   memory = pages * page_bytes + sequences * tail_bytes       pages: of the pool; tails: of the sequences (sealing_blocks)
//
// The sizes of blocks are asked from the codecs, so that they cannot differ from what a cache then uses.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvcache::inline v0::serving {

/// A codec by name, as make_codec takes it.
struct codec_choice {
  std::string keys = "bf16";
  std::string values = "bf16";
  index_t sink_tokens = 0;                                     ///< as in codec::exact_sinks
  index_t tail_tokens = 0;                                     ///< as in codec::exact_tail
  codec::exact_element exact_as = codec::exact_element::bf16;  ///< how both are stored

  /// "int8", or "k=channel4,v=rotated4,sinks=4,tail=128,exact=f16".
  [[nodiscard]] std::string spec() const;

  /// Whether tokens are kept exact. False for codecs that there are not.
  [[nodiscard]] bool seals() const noexcept;

  friend bool operator==(const codec_choice&, const codec_choice&) = default;
};

namespace detail {

/// Sizes of one codec's two sides.
struct named_sizes {
  std::string_view name;
  index_t (*key_bytes)(const block_geometry&);  // of the section of a block
  index_t (*value_bytes)(const block_geometry&);
  bool whole_key_blocks;
  bool whole_value_blocks;
};

template <class Codec>
constexpr named_sizes sizes_of() {
  using keys = typename Codec::keys_type;
  using values = typename Codec::values_type;
  return {Codec::name, [](const block_geometry& g) { return keys{}.section_bytes(g); },
          [](const block_geometry& g) { return values{}.section_bytes(g); }, keys::needs_whole_blocks,
          values::needs_whole_blocks};
}

/// All codecs that make_codec knows (a test compares the names).
inline constexpr std::array known_sizes = {sizes_of<codec::f32>(),
                                           sizes_of<codec::f16>(),
                                           sizes_of<codec::bf16>(),
                                           sizes_of<codec::int8>(),
                                           sizes_of<codec::rotated<4>>(),
                                           sizes_of<codec::rotated<3>>(),
                                           sizes_of<codec::rotated<2>>(),
                                           sizes_of<codec::channel<4>>(),
                                           sizes_of<codec::channel<3>>(),
                                           sizes_of<codec::balanced<4>>(),
                                           sizes_of<codec::balanced<3>>(),
                                           sizes_of<codec::balanced<2>>(),
                                           sizes_of<codec::trellis<4>>(),
                                           sizes_of<codec::trellis<3>>(),
                                           sizes_of<codec::trellis<2>>(),
                                           sizes_of<codec::centred<codec::int8>>(),
                                           sizes_of<codec::centred<codec::rotated<4>>>(),
                                           sizes_of<codec::centred<codec::rotated<3>>>(),
                                           sizes_of<codec::centred<codec::rotated<2>>>(),
                                           sizes_of<codec::centred<codec::trellis<4>>>(),
                                           sizes_of<codec::centred<codec::trellis<3>>>(),
                                           sizes_of<codec::centred<codec::trellis<2>>>()};

/// Throws std::invalid_argument naming the codec that there is none of.
inline const named_sizes& sizes_named(std::string_view name) {
  const auto* found = std::find_if(known_sizes.begin(), known_sizes.end(),
                                   [name](const named_sizes& s) { return s.name == name; });
  if (found == known_sizes.end())
    throw std::invalid_argument("kvcache: there is no codec '" + std::string(name) + "' to plan with");
  return *found;
}

}  // namespace detail

inline bool codec_choice::seals() const noexcept {
  const auto whole = [](const std::string& name, bool detail::named_sizes::*side) {
    return std::any_of(detail::known_sizes.begin(), detail::known_sizes.end(),
                       [&](const detail::named_sizes& s) { return s.name == name && s.*side; });
  };
  return sink_tokens > 0 || tail_tokens > 0 || whole(keys, &detail::named_sizes::whole_key_blocks) ||
         whole(values, &detail::named_sizes::whole_value_blocks);
}

inline std::string codec_choice::spec() const {
  std::string text = keys == values ? keys : "k=" + keys + ",v=" + values;
  if (sink_tokens != 0) text += ",sinks=" + std::to_string(sink_tokens);
  if (tail_tokens != 0) text += ",tail=" + std::to_string(tail_tokens);
  if (exact_as != codec::exact_element::bf16 && seals())
    text.append(",exact=").append(codec::exact_tokens{exact_as}.name());
  return text;
}

/// Sizes of a page_pool and its sequences. Not in them: page tables and the pool's lists (page_pool::books_bytes()), some 40
/// to 150 bytes a page.
class cache_sizes {
 public:
  /// Most pages that a pool can have.
  static constexpr index_t most_pages = index_t{std::numeric_limits<std::uint32_t>::max()};

  /// Throws shape_error for what a pool of that shape and codec would refuse, or sizes that overflow;
  /// std::invalid_argument for a codec that there is not.
  cache_sizes(const cache_shape& shape, const codec_choice& codec);

  /// Bytes of one page: the blocks of all layers and KV heads for block_size tokens.
  [[nodiscard]] index_t page_bytes() const noexcept { return page_bytes_; }

  /// Bytes of exact tokens that each sequence has outside the pool, from its first token on; 0 where nothing is sealed.
  [[nodiscard]] index_t tail_bytes() const noexcept { return tail_bytes_; }

  /// Bytes that a sequence has besides while a step of more than block_size tokens is open (`begin`).
  [[nodiscard]] index_t long_step_bytes() const noexcept { return long_step_bytes_; }

  /// Pages of a sequence of that many tokens, none of them shared. \pre `tokens >= 0`
  [[nodiscard]] index_t pages(index_t tokens) const noexcept {
    return seals_ ? std::max(tokens - tail_tokens_, index_t{0}) / block_size_ : ceil_div(tokens, block_size_);
  }

  /// The most tokens of a sequence that has `pages` pages: pages(tokens(n)) == n, pages(tokens(n) + 1) == n + 1.
  [[nodiscard]] index_t tokens(index_t pages) const {
    const index_t in_pages = checked_mul(pages, block_size_);
    return seals_ ? checked_add(in_pages, tail_tokens_ + block_size_ - 1) : in_pages;
  }

  /// What `bytes().total` of such a sequence says. Throws shape_error where that overflows.
  [[nodiscard]] index_t sequence_bytes(index_t tokens) const {
    return tokens == 0 ? 0 : checked_add(checked_mul(pages(tokens), page_bytes_), tail_bytes_);
  }

  /// Bits that a number of a full page takes, scales and padding included.
  [[nodiscard]] double bits_per_number() const noexcept { return bits_per_number_; }

 private:
  index_t block_size_;
  index_t tail_tokens_;
  bool seals_;
  index_t page_bytes_;
  index_t tail_bytes_ = 0;
  index_t long_step_bytes_ = 0;
  double bits_per_number_;
};

inline cache_sizes::cache_sizes(const cache_shape& shape, const codec_choice& codec)
    : block_size_(shape.block_size), tail_tokens_(codec.tail_tokens) {
  validate(shape);
  if (codec.values != codec.keys &&
      (codec.values.starts_with("channel") || codec.values.starts_with("centred_")))
    throw std::invalid_argument("kvcache: '" + codec.values + "' is for keys");
  if (codec.tail_tokens < 0) throw shape_error("kvcache: tail_tokens must not be negative");
  if (codec.sink_tokens < 0 || codec.sink_tokens > shape.block_size)
    throw shape_error("kvcache: sink_tokens must be 0 to block_size");
  const detail::named_sizes& keys = detail::sizes_named(codec.keys);
  const detail::named_sizes& values = detail::sizes_named(codec.values);
  const block_geometry g = geometry_of(shape);
  const index_t num_heads = checked_mul(shape.num_layers, shape.num_kv_heads);
  const index_t block_bytes = keys.key_bytes(g) + values.value_bytes(g);
  page_bytes_ = checked_mul(num_heads, block_bytes);
  bits_per_number_ =
      8.0 * static_cast<double>(block_bytes) / static_cast<double>(2 * g.block_size * g.head_dim);
  seals_ = codec.seals();
  if (!seals_) return;

  // Exact ring and sinks of every head, and two blocks of floats to work in: as in cache/sealing_blocks.hpp.
  const codec::exact_tokens exact{codec.exact_as};
  const block_geometry sinks{round_up(codec.sink_tokens, key_lanes), shape.head_dim};
  const index_t ring_blocks = checked_add(ceil_div(codec.tail_tokens, shape.block_size), 2);
  const index_t ring_bytes = checked_mul(ring_blocks, exact.block_bytes(g));
  const index_t sink_bytes = codec.sink_tokens == 0 ? 0 : exact.block_bytes(sinks);
  long_step_bytes_ = checked_mul(num_heads, checked_add(ring_bytes, sink_bytes));
  const index_t work_bytes = 2 * shape.block_size * shape.head_dim * index_t{sizeof(float)};
  tail_bytes_ = checked_add(long_step_bytes_, round_up(work_bytes, block_alignment));
}

}  // namespace kvcache::inline v0::serving
