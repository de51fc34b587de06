// SPDX-License-Identifier: MIT
// mixed: the keys of one codec and the values of another, as in mixed<channel<4>, rotated<4>> or mixed<int8, rotated<4>>.
//
// Keys decide where attention looks and need more bits than values; each side goes with any other.
#pragma once

#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/sides.hpp>

#include <array>
#include <cstddef>
#include <string_view>
#include <type_traits>

namespace kvcache::inline v0::codec {

namespace detail {

/// "keys+values", put together at compile time.
template <class K, class V>
struct joined_name {
  static constexpr std::size_t size = K::name.size() + 1 + V::name.size();
  static constexpr std::array<char, size> text = [] {
    std::array<char, size> all{};
    std::size_t i = 0;
    for (const char c : K::name) all[i++] = c;
    all[i++] = '+';
    for (const char c : V::name) all[i++] = c;
    return all;
  }();
};

struct no_options {};

template <class K, class V>
using mixed_options =
    std::conditional_t<K::keys_type::needs_whole_blocks || V::values_type::needs_whole_blocks,
                       sealing_options, no_options>;

}  // namespace detail

template <class K, class V>
struct mixed : sides<typename K::keys_type, typename V::values_type>, detail::mixed_options<K, V> {
  static constexpr std::string_view name{detail::joined_name<K, V>::text.data(),
                                         detail::joined_name<K, V>::size};
};

}  // namespace kvcache::inline v0::codec
