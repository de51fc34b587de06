// SPDX-License-Identifier: MIT
// The list of codecs that have a name, and any_keys and any_values made from one: by name, or as they were described.
//
// Included by interop/named_codecs.hpp, or, where KVCACHE_SEPARATE_CODECS is defined, by known_containers.hpp and nothing else.
#pragma once

#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/klt_rows.hpp>
#include <kvcache/codec/low_rank_rows.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/named_codecs.hpp>
#include <kvcache/interop/spec_text.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvcache::inline v0 {

namespace detail {

template <class... Codecs>
struct codec_list {};

/// What make_codec knows. A new codec is one more name here.
using known_codecs = codec_list<
    codec::f32, codec::f16, codec::bf16, codec::int8, codec::rotated<4>, codec::rotated<3>, codec::rotated<2>,
    codec::channel<4>, codec::channel<3>, codec::balanced<4>, codec::balanced<3>, codec::balanced<2>,
    codec::trellis<4>, codec::trellis<3>, codec::trellis<2>, codec::centred<codec::int8>,
    codec::centred<codec::rotated<4>>, codec::centred<codec::rotated<3>>, codec::centred<codec::rotated<2>>,
    codec::centred<codec::trellis<4>>, codec::centred<codec::trellis<3>>, codec::centred<codec::trellis<2>>>;

template <class... Codecs>
std::vector<std::string> names_in(codec_list<Codecs...>) {
  return {std::string(Codecs::name)...};
}

template <class... Codecs>
std::optional<any_codec> codec_in(codec_list<Codecs...>, std::string_view name) {
  std::optional<any_codec> found;
  const auto take_if = [&]<class Codec>() {
    if (name != Codec::name) return;
    found.emplace();
    found->keys = codec::any_keys::of(typename Codec::keys_type{});
    found->values = codec::any_values::of(typename Codec::values_type{});
  };
  (take_if.template operator()<Codecs>(), ...);
  return found;
}

/// AnySide::of for the side of `known_codecs`, or one that specs do not name, that is called so. Throws shape_error.
template <class AnySide, class... Codecs>
AnySide any_side_from(codec_list<Codecs...>, const side_description& described, const cache_shape& shape) {
  std::optional<AnySide> found;
  const auto take_if = [&]<class Side>() {
    if (!found && described.name == Side{}.side_name())
      found = AnySide::of(side_from<Side>(described, shape));
  };
  if constexpr (std::is_same_v<AnySide, codec::any_keys>) {
    (take_if.template operator()<typename Codecs::keys_type>(), ...);
    take_if.template operator()<codec::centred_keys<codec::f32::keys_type>>();
    take_if.template operator()<codec::centred_keys<codec::f16::keys_type>>();
    take_if.template operator()<codec::centred_keys<codec::bf16::keys_type>>();
    take_if.template operator()<codec::low_rank_keys>();
    take_if.template operator()<codec::klt_keys>();
    take_if.template operator()<codec::centred_keys<codec::low_rank_keys>>();
    take_if.template operator()<codec::centred_keys<codec::klt_keys>>();
  } else {
    (take_if.template operator()<typename Codecs::values_type>(), ...);
    take_if.template operator()<codec::low_rank_values>();
    take_if.template operator()<codec::klt_values>();
  }
  if (!found) throw shape_error("kvcache: there is no codec '" + shown(described.name) + "'");
  return *found;
}

KVCACHE_CODECS_INLINE std::optional<any_codec> codec_named(std::string_view name) {
  return codec_in(known_codecs{}, name);
}

}  // namespace detail

KVCACHE_CODECS_INLINE std::vector<std::string> codec_names() {
  return detail::names_in(detail::known_codecs{});
}

KVCACHE_CODECS_INLINE codec::any_keys codec::any_keys::from_description(const side_description& described,
                                                                        const cache_shape& shape) {
  return kvcache::detail::any_side_from<any_keys>(kvcache::detail::known_codecs{}, described, shape);
}
KVCACHE_CODECS_INLINE codec::any_values codec::any_values::from_description(const side_description& described,
                                                                            const cache_shape& shape) {
  return kvcache::detail::any_side_from<any_values>(kvcache::detail::known_codecs{}, described, shape);
}

}  // namespace kvcache::inline v0
