// SPDX-License-Identifier: MIT
// What a codec is: the meaning of a block's bytes. A plain struct whose members are its settings.
//
// Most codecs are put together from two sides (codec/sides.hpp), one for the keys' section of a block and one for the
// values' section, so that any keys go with any values. A side is written once for all instruction sets, over the
// functions of kernel::table.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvcache::inline v0 {

/// \tparam C  stores the keys and values of a block in `block_bytes(geometry)` bytes, 64-byte aligned
///
/// `encode` writes slots [first, first + count) from float rows and touches no other slot; on any status but
/// `ok` nothing was written. A codec that `needs_whole_blocks` is asked once for each block, for its last slots.
///
/// Attention calls `prepare` once for many blocks: it makes query rows ready, in `prepared_floats(geometry)` floats each, a multiple of 16,
/// or returns the rows themselves where nothing has to be done. `scores` and `accumulate` are those of
/// kernel::element_kernels, for this encoding; the last argument is a block that will be read soon, the next one or up to
/// four later, or null; taken as kernel::upcoming it also says which one comes next. Where `turns_sums` holds, sums are in coordinates of the codec's own until `finish` turns them back, once for many blocks.
/// Where there are `attends` and `attend`, as codec::sides has them, the latter may take the place of both for whole blocks: who
/// derives from a codec and replaces them replaces those too.
///
/// What differs between heads: `at(layer, head)`, where there is such a member, is the codec for that head. Its blocks are
/// as large as those of the other heads of the layer; layers may differ, and what the codec itself says of sizes is then the most
/// of any layer.
template <class C>
concept block_codec = std::copyable<C> && std::default_initializable<C> &&
    requires(const C& codec, const kernel::table& kernels, const block_geometry& g, std::byte* block,
             const std::byte* sealed, index_t n, const_rows in, mutable_rows out, const float* q,
             float* scores) {
  { C::name } -> std::convertible_to<std::string_view>;
  { codec.needs_whole_blocks() } -> std::same_as<bool>;
  { codec.turns_sums() } -> std::same_as<bool>;
  { codec.block_bytes(g) } -> std::same_as<index_t>;
  { codec.token_bytes(g) } -> std::same_as<index_t>;
  { codec.encode(kernels, g, block, n, n, in, in) } -> std::same_as<status>;
  codec.decode(kernels, g, sealed, n, n, out, out);
  { codec.prepared_floats(g) } -> std::same_as<index_t>;
  { codec.prepare(kernels, g, q, n, scores) } -> std::same_as<const float*>;
  codec.scores(kernels, g, sealed, n, q, n, scores, sealed);
  codec.accumulate(kernels, g, sealed, n, q, n, scores, sealed);
  codec.finish(kernels, g, n, scores);
};

/// The codec for one head: `codec.at(layer, head)` where there is such a member, else the codec itself.
template <class Codec>
constexpr decltype(auto) codec_at(const Codec& codec, [[maybe_unused]] index_t layer,
                                  [[maybe_unused]] index_t head) {
  if constexpr (requires { codec.at(layer, head); }) {
    return codec.at(layer, head);
  } else {
    return (codec);
  }
}

/// Bytes of one block of a layer.
template <class Codec>
index_t block_bytes_at(const Codec& codec, index_t layer, const block_geometry& g) {
  return codec_at(codec, layer, 0).block_bytes(g);
}
/// Bytes that one more token of a head takes in a layer, without padding.
template <class Codec>
index_t token_bytes_at(const Codec& codec, index_t layer, const block_geometry& g) {
  return codec_at(codec, layer, 0).token_bytes(g);
}

/// What containers ask before all else: `codec.validate(shape)`, where there is such a member, throws shape_error if the
/// codec's settings do not fit the shape.
template <class Codec>
void validate([[maybe_unused]] const Codec& codec, [[maybe_unused]] const cache_shape& shape) {
  if constexpr (requires { codec.validate(shape); }) codec.validate(shape);
}

/// Bytes of what a codec refers to besides its blocks, shared by its copies: `codec.settings_bytes()`, where there is such
/// a member.
template <class Codec>
index_t settings_bytes([[maybe_unused]] const Codec& codec) noexcept {
  if constexpr (requires { codec.settings_bytes(); }) {
    return codec.settings_bytes();
  } else {
    return 0;
  }
}

/// A codec of whose blocks one token can change its place as it is encoded: `move_token(geometry, from_block, from_slot,
/// to_block, to_slot)` copies keys and values byte for byte, within a block or from one to another, and touches no other
/// slot. `moves_tokens()`, where there is such a member, says whether it may be called.
template <class C>
concept token_moving_codec = requires(const C& codec, const block_geometry& g, std::byte* block,
                                      const std::byte* sealed, index_t n) {
  codec.move_token(g, sealed, n, block, n);
};

template <class Codec>
constexpr bool moves_tokens([[maybe_unused]] const Codec& codec) noexcept {
  if constexpr (!token_moving_codec<Codec>) {
    return false;
  } else if constexpr (requires { codec.moves_tokens(); }) {
    return codec.moves_tokens();
  } else {
    return true;
  }
}

namespace codec {

/// How tokens are kept exact, see codec/exact_tokens.hpp.
enum class exact_element : std::uint8_t { bf16, f16, f32 };

}  // namespace codec

/// Whether a cache with this codec may keep some tokens exact and seal whole blocks; see cache/sealing_blocks.hpp.
template <class C>
concept sealing_codec = block_codec<C> && requires(const C& codec) {
  { codec.tail_tokens } -> std::convertible_to<index_t>;
  { codec.sink_tokens } -> std::convertible_to<index_t>;
  { codec.exact_as } -> std::convertible_to<codec::exact_element>;
};

/// Whether a cache with this codec keeps tokens exact: newest or first ones, or those that do not fill a block yet.
template <class Codec>
constexpr bool keeps_exact([[maybe_unused]] const Codec& codec) noexcept {
  if constexpr (sealing_codec<Codec>) {
    return codec.needs_whole_blocks() || codec.tail_tokens != 0 || codec.sink_tokens != 0;
  } else {
    return false;
  }
}

/// How, where it does.
template <class Codec>
constexpr codec::exact_element exact_element_of([[maybe_unused]] const Codec& codec) noexcept {
  if constexpr (sealing_codec<Codec>) {
    return codec.exact_as;
  } else {
    return codec::exact_element::bf16;
  }
}

namespace codec {

/// One side of a block, in a section of `section_bytes(geometry)` bytes, a multiple of 64.
///
/// `row_bytes`: what one more token takes, rounded up. `accepts` says whether rows can be stored, `encode` stores them;
/// slots and the rest are as for block_codec.
template <class S>
concept side = std::copyable<S> && std::default_initializable<S> &&
    requires(const S& s, const kernel::table& kernels, const block_geometry& g, std::byte* section,
             const std::byte* sealed, index_t n, const_rows in, mutable_rows out) {
  { S::needs_whole_blocks } -> std::convertible_to<bool>;
  { s.section_bytes(g) } -> std::same_as<index_t>;
  { s.row_bytes(g) } -> std::same_as<index_t>;
  { s.accepts(kernels, g, n, in) } -> std::same_as<status>;
  s.encode(kernels, g, section, n, n, in);
  s.decode(kernels, g, sealed, n, n, out);
};

template <class S>
concept key_side = side<S> && requires(const S& s, const kernel::table& kernels, const block_geometry& g,
                                       const std::byte* sealed, index_t n, const float* q, float* to) {
  { s.prepared_floats(g) } -> std::same_as<index_t>;
  { s.prepare(kernels, g, q, n, to) } -> std::same_as<const float*>;
  s.scores(kernels, g, sealed, n, q, n, to, sealed);
};

template <class S>
concept value_side = side<S> && requires(const S& s, const kernel::table& kernels, const block_geometry& g,
                                         const std::byte* sealed, index_t n, const float* w, float* to) {
  { S::turns_sums } -> std::convertible_to<bool>;
  s.accumulate(kernels, g, sealed, n, w, n, to, sealed);
  s.finish(kernels, g, n, to);
};

/// A side whose rows can change places as they are stored: `move_row` copies one from a section to another, or within one.
/// Where `moves_rows()` is a member, it says whether that may be asked.
template <class S>
concept row_moving_side = side<S> &&
    requires(const S& s, const block_geometry& g, std::byte* section, const std::byte* sealed, index_t n) {
  s.move_row(g, sealed, n, section, n);
};

template <side S>
constexpr bool moves_rows([[maybe_unused]] const S& s) noexcept {
  if constexpr (requires { s.moves_rows(); }) {
    return s.moves_rows();
  } else {
    return row_moving_side<S>;
  }
}

/// What sides inherit that need none of it.
struct plain_side {
  static constexpr bool needs_whole_blocks = false;
  static constexpr bool turns_sums = false;
  static status accepts(const kernel::table& /*kernels*/, const block_geometry& /*g*/, index_t /*count*/,
                        const_rows /*rows*/) noexcept {
    return status::ok;
  }
  [[nodiscard]] static constexpr index_t prepared_floats(const block_geometry& /*g*/) noexcept { return 0; }
  static const float* prepare(const kernel::table& /*kernels*/, const block_geometry& /*g*/,
                              const float* queries, index_t /*num_rows*/, float* /*prepared*/) noexcept {
    return queries;
  }
  static void finish(const kernel::table& /*kernels*/, const block_geometry& /*g*/, index_t /*num_rows*/,
                     float* /*sums*/) noexcept {}
};

}  // namespace codec

}  // namespace kvcache::inline v0
