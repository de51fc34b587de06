// SPDX-License-Identifier: MIT
// save and load for any_cache: the file names container and codec, and load_any makes them again.
//
//   store::save(any, who, "chat.kv");
//   auto [cache, about] = store::load_any("chat.kv");
#pragma once

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/identity.hpp>
#include <kvcache/store/io.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/save.hpp>

#include <cstddef>
#include <filesystem>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

namespace detail {

/// Calls use(cache) with the container that an any_cache of make_cache holds. Throws shape_error for others.
template <class Any, class Use>
decltype(auto) with_container(Any& any, Use use) {
  if (auto* cache = any.template get_if<contiguous_cache<any_codec>>()) return use(*cache);
  if (auto* cache = any.template get_if<chunked_cache<any_codec>>()) return use(*cache);
  if (auto* cache = any.template get_if<paged_cache<any_codec>>()) return use(*cache);
  throw shape_error("kvcache: this any_cache was not made by make_cache; save the cache it was made of");
}

}  // namespace detail

/// As for typed caches, see store/save.hpp; the spec goes into the file. Throws shape_error as well if `cache` was not made
/// by make_cache or load_any.
template <class To>
void save(const any_cache& cache, const identity& who, To&& to, save_options options = {}) {
  options.spec = cache.spec();
  detail::with_container(cache, [&](const auto& typed) { save(typed, who, std::forward<To>(to), options); });
}
[[nodiscard]] inline std::vector<std::byte> save(const any_cache& cache, const identity& who,
                                                 save_options options = {}) {
  options.spec = cache.spec();
  return detail::with_container(cache, [&](const auto& typed) { return save(typed, who, options); });
}

/// A cache like the one that was saved: of the codec with the settings it had, in the container that its spec names, or in
/// `container` ("contiguous", "chunked", "paged"). Files of typed caches can be read as well, in a chunked one unless
/// `container` says otherwise. Throws as load.
[[nodiscard]] inline loaded<any_cache> load_any(const byte_source& source, const load_options& options = {},
                                                std::string_view container = {}) {
  detail::contents file = detail::read_contents(source, file_kind::snapshot, options.expect);
  const std::string named = file.about.spec.substr(0, file.about.spec.find('/'));
  const std::string wanted(!container.empty() ? container
                           : named.empty()    ? std::string_view("chunked")
                                              : named);
  const std::string spec = wanted + file.about.spec.substr(named.size());
  any_cache made = detail::loading(source, detail::header_bytes, [&] {
    bool known = false;
    for (const std::string_view name : kvcache::detail::known_containers) known = known || name == wanted;
    if (!known) throw shape_error("kvcache: there is no container '" + wanted + "'");
    return kvcache::detail::make_container(
        spec, wanted, make_described<any_codec>(file.about.codec, file.about.shape), file.about.shape);
  });
  detail::with_container(made, [&](auto& typed) {
    detail::loading(source, detail::header_bytes, [&] { detail::check_fit(typed, file.about); });
    detail::check_memory(source, file, typed, options);
    detail::read_layers(source, file, options, typed);
  });
  return {std::move(made), std::move(file.about)};
}
[[nodiscard]] inline loaded<any_cache> load_any(const std::filesystem::path& path,
                                                const load_options& options = {},
                                                std::string_view container = {}) {
  return load_any(file_source(path), options, container);
}
[[nodiscard]] inline loaded<any_cache> load_any(std::span<const std::byte> bytes,
                                                const load_options& options = {},
                                                std::string_view container = {}) {
  return load_any(memory_source(bytes), options, container);
}

}  // namespace kvcache::inline v0::store
