// SPDX-License-Identifier: MIT
// save and load for any_cache: the file names container and codec, and load_any makes them again.
//
//   store::save(any, who, "chat.kv");
//   auto [cache, about] = store::load_any("chat.kv");
#pragma once

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/interop/spec_text.hpp>
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

template <class Cache>
Cache* container_in(any_cache& any) noexcept {
  return any.get_if<Cache>();
}
template <class Cache>
const Cache* container_in(const any_cache& any) noexcept {
  const auto* typed = dynamic_cast<const kvcache::detail::erased_cache_of<Cache>*>(&any.contents());
  return typed != nullptr ? &typed->cache() : nullptr;
}

/// Calls use(cache) with the container that an any_cache of make_cache holds. Throws shape_error for others.
template <class Any, class Use>
decltype(auto) with_container(Any& any, Use use) {
  if (auto* cache = container_in<contiguous_cache<codec::by_layer<any_codec>>>(any)) return use(*cache);
  if (auto* cache = container_in<chunked_cache<codec::by_layer<any_codec>>>(any)) return use(*cache);
  if (auto* cache = container_in<paged_cache<codec::by_layer<any_codec>>>(any)) return use(*cache);
  throw shape_error("kvcache: this any_cache was not made by make_cache; save the cache it was made of");
}

/// The spec of a file, in `container` if that is named; a chunked one where there is neither.
inline std::string spec_in(const stored_sequence& about, std::string_view container) {
  const std::string named = about.spec.substr(0, about.spec.find('/'));
  const std::string wanted(!container.empty() ? container
                           : named.empty()    ? std::string_view("chunked")
                                              : named);
  return wanted + about.spec.substr(named.size());
}

/// Whether it was saved by make_cache_with_low_rank's cache before that had bases.
inline bool waits_for_bases(const stored_sequence& about) noexcept {
  return about.spec.find("low_rank") != std::string::npos && is_exact(about.codec) &&
         about.codec.keys.name == about.codec.values.name;
}

/// Reads the blocks into an empty cache of the file's codec.
inline void fill(any_cache& made, const byte_source& source, const contents& file,
                 const load_options& options) {
  with_container(made, [&](auto& typed) {
    loading(source, header_bytes, [&] { check_fit(typed, file.about); });
    check_memory(source, file, typed, options);
    read_layers(source, file, options, typed);
  });
}

/// \param spec  what it says of itself, and the container it is in
inline any_cache load_container(const byte_source& source, const contents& file, const load_options& options,
                                const std::string& spec) {
  const std::string wanted = spec.substr(0, spec.find('/'));
  any_cache made = loading(source, header_bytes, [&] {
    bool known = false;
    for (const std::string_view name : kvcache::detail::known_containers) known = known || name == wanted;
    if (!known) throw shape_error("kvcache: there is no container '" + kvcache::detail::shown(wanted) + "'");
    return kvcache::detail::make_container(
        spec, wanted, make_described<codec::by_layer<any_codec>>(file.about.codec, file.about.shape),
        file.about.shape);
  });
  fill(made, source, file, options);
  return made;
}

}  // namespace detail

/// As for typed caches, see store/save.hpp; the spec goes into the file. Throws shape_error as well if `cache` was not made
/// by make_cache, make_cache_with_low_rank or load_any.
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
/// `container` says otherwise; its spec() is the container's name then. Throws as load; load_error as well for what make_cache_with_low_rank made and that had no
/// bases yet, which only load_any_with_low_rank, in interop/low_rank_snapshot.hpp, can find.
[[nodiscard]] inline loaded<any_cache> load_any(const byte_source& source, const load_options& options = {},
                                                std::string_view container = {}) {
  detail::contents file = detail::read_contents(source, file_kind::snapshot, options.expect);
  if (detail::waits_for_bases(file.about))
    throw load_error(source.name(), detail::header_bytes,
                     "it is exact until there are bases for '" + kvcache::detail::shown(file.about.spec) +
                         "': load_any_with_low_rank of interop/low_rank_snapshot.hpp goes on with it");
  any_cache made = detail::load_container(source, file, options, detail::spec_in(file.about, container));
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
