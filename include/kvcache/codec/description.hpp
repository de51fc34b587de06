// SPDX-License-Identifier: MIT
// codec_description: what tells the bytes of one codec's blocks from those of another, so that they can be stored and
// found to fit, or made again, later.
//
//   mixed<int8, rotated<4>> with key means, 128 tokens of tail   { "int8", means }, { "rotated4", {} }, 128, 0
//
// A side is described by a name, `side_name()`, that stands for its encoding: one that changes gets a new name, or the
// format of files a new version (store/format.hpp). What else its bytes depend on are its settings, which it writes and is
// made from again; a side without any is empty.
#pragma once

#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <concepts>
#include <cstddef>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvcache::inline v0 {

struct side_description {
  std::string name = {};
  std::vector<std::byte> settings = {};  ///< as the side wrote them, little-endian

  friend bool operator==(const side_description&, const side_description&) = default;
};

struct codec_description {
  side_description keys = {};
  side_description values = {};
  index_t tail_tokens = 0;
  index_t sink_tokens = 0;
  bool seals = false;  ///< newest or first tokens are kept exact; see cache/sealing_blocks.hpp
  codec::exact_element exact_as = codec::exact_element::bf16;  ///< how, if it seals

  friend bool operator==(const codec_description&, const codec_description&) = default;
};

namespace codec {

/// A side that can be stored. Unless it is empty, `put_settings` appends its settings to a vector, and
/// `from_settings(bytes, shape)` makes it again, or throws shape_error where the bytes cannot be its settings.
template <class S>
concept described_side = side<S> && requires(const S& s) {
  { s.side_name() } -> std::convertible_to<std::string_view>;
} &&(std::is_empty_v<S> || requires(const S& s, std::vector<std::byte>& out) { s.put_settings(out); });

}  // namespace codec

/// A codec that says itself how it is described, and is made again from that; throws shape_error where it cannot be.
template <class C>
concept self_describing_codec = requires(const C& codec, const codec_description& described,
                                         const cache_shape& shape) {
  { codec.description() } -> std::same_as<codec_description>;
  { C::from_description(described, shape) } -> std::same_as<C>;
};

/// A codec whose blocks can be stored: one made of sides that can, or that describes itself.
template <class C>
concept described_codec = block_codec<C> &&(self_describing_codec<C> || requires {
  typename C::keys_type;
  typename C::values_type;
  requires codec::described_side<typename C::keys_type>;
  requires codec::described_side<typename C::values_type>;
});

namespace detail {

template <codec::described_side Side>
side_description describe_side(const Side& side) {
  side_description made{std::string(std::string_view(side.side_name())), {}};
  if constexpr (!std::is_empty_v<Side>) side.put_settings(made.settings);
  return made;
}

/// Throws shape_error.
template <codec::described_side Side>
Side side_from(const side_description& described, const cache_shape& shape) {
  if constexpr (requires { Side::from_description(described, shape); }) {
    return Side::from_description(described, shape);  // any side
  } else {
    const std::string_view name = Side{}.side_name();
    if (described.name != name)
      throw shape_error("kvcache: the codec is '" + described.name + "', not '" + std::string(name) + "'");
    if constexpr (std::is_empty_v<Side>) {
      if (!described.settings.empty())
        throw shape_error("kvcache: the codec '" + described.name + "' has no settings");
      return Side{};
    } else {
      return Side::from_settings(described.settings, shape);
    }
  }
}

/// Appends numbers as they lie in memory: little-endian.
inline void put_floats(std::span<const float> floats, std::vector<std::byte>& out) {
  const auto bytes = std::as_bytes(floats);
  out.insert(out.end(), bytes.begin(), bytes.end());
}

/// `count` floats, all that `settings` has. Throws shape_error if it has not exactly that.
inline std::vector<float> floats_in(std::span<const std::byte> settings, index_t count) {
  if (settings.size() % sizeof(float) != 0 || static_cast<index_t>(settings.size() / sizeof(float)) != count)
    throw shape_error("kvcache: the settings of the codec have the wrong size");
  std::vector<float> floats(static_cast<std::size_t>(count));
  if (count > 0) std::memcpy(floats.data(), settings.data(), settings.size());
  return floats;
}

}  // namespace detail

namespace detail {

template <class Codec>
codec_description describe_sides(const Codec& codec) {
  codec_description made{describe_side(codec.keys), describe_side(codec.values)};
  made.seals = codec.needs_whole_blocks();
  if constexpr (sealing_codec<Codec>) {
    made.tail_tokens = codec.tail_tokens;
    made.sink_tokens = codec.sink_tokens;
    made.seals = keeps_exact(codec);
    if (made.seals) made.exact_as = codec.exact_as;
  }
  return made;
}

template <class Codec>
Codec from_sides(const codec_description& described, const cache_shape& shape) {
  Codec made{};
  made.keys = side_from<typename Codec::keys_type>(described.keys, shape);
  made.values = side_from<typename Codec::values_type>(described.values, shape);
  if constexpr (sealing_codec<Codec>) {
    made.tail_tokens = described.tail_tokens;
    made.sink_tokens = described.sink_tokens;
    made.exact_as = described.exact_as;
  }
  return made;
}

}  // namespace detail

/// O(bytes of the settings). Throws std::bad_alloc.
template <described_codec Codec>
codec_description describe(const Codec& codec) {
  if constexpr (self_describing_codec<Codec>) {
    return codec.description();
  } else {
    return detail::describe_sides(codec);
  }
}

/// The codec that describes itself so. Throws shape_error that says what is different, or what its settings lack.
template <described_codec Codec>
Codec make_described(const codec_description& described, const cache_shape& shape) {
  Codec made = [&] {
    if constexpr (self_describing_codec<Codec>) {
      return Codec::from_description(described, shape);
    } else {
      return detail::from_sides<Codec>(described, shape);
    }
  }();
  if (const codec_description again = describe(made);
      again.seals != described.seals || again.tail_tokens != described.tail_tokens ||
      again.sink_tokens != described.sink_tokens || again.exact_as != described.exact_as)
    throw shape_error(
        "kvcache: the codec keeps other tokens exact, or in another way: wrap it in exact_tail or "
        "exact_sinks, or not");
  return made;
}

}  // namespace kvcache::inline v0
