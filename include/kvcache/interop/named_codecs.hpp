// SPDX-License-Identifier: MIT
// Codecs by name, as make_codec and make_cache find them.
//
// All of them together take a compiler some ten seconds in every source file that makes a cache by name. A program of many
// files may define KVCACHE_SEPARATE_CODECS for all of them and include interop/known_containers.hpp in one: only that one
// compiles them, and the others get codec_names, codec_named, from_description and make_container from there. They also
// have to include the containers and codecs that they name as types, which otherwise come along.
#pragma once

#include <kvcache/interop/any_codec.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// What is inline unless it is compiled in one source file only.
#ifdef KVCACHE_SEPARATE_CODECS
#define KVCACHE_CODECS_INLINE
#else
#define KVCACHE_CODECS_INLINE inline
#endif

namespace kvcache::inline v0 {

/// The names of all codecs.
KVCACHE_CODECS_INLINE std::vector<std::string> codec_names();

namespace detail {

/// A codec by name, keys and values; nothing if there is none.
KVCACHE_CODECS_INLINE std::optional<any_codec> codec_named(std::string_view name);

}  // namespace detail

}  // namespace kvcache::inline v0

#ifndef KVCACHE_SEPARATE_CODECS
#include <kvcache/interop/known_codecs.hpp>
#endif
