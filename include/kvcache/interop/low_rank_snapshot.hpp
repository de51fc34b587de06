// SPDX-License-Identifier: MIT
// load_any_with_low_rank: load_any, and caches of make_cache_with_low_rank that were saved before they had bases.
//
//   any_cache cache = make_cache_with_low_rank("chunked/low_rank48,fit=512", shape);
//   ... 300 tokens ...
//   store::save(cache, who, "chat.kv");
//   auto [again, about] = store::load_any_with_low_rank("chat.kv");        // finds its bases after 212 more
//
// Needs Eigen's solvers, so kvcache.hpp leaves it out.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_snapshot.hpp>
#include <kvcache/interop/low_rank_spec.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/format.hpp>
#include <kvcache/store/io.hpp>
#include <kvcache/store/load.hpp>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace kvcache::inline v0::store {

/// As load_any, see interop/any_snapshot.hpp. Bases that were found are in the file and stay; where there are none yet, they
/// are found as the cache that was saved would have found them. Throws as load_any.
[[nodiscard]] inline loaded<any_cache> load_any_with_low_rank(const byte_source& source,
                                                              const load_options& options = {},
                                                              std::string_view container = {}) {
  detail::contents file = detail::read_contents(source, file_kind::snapshot, options.expect);
  const std::string spec = detail::spec_in(file.about, container);
  if (!detail::waits_for_bases(file.about))
    return {detail::load_container(source, file, options, spec), std::move(file.about)};
  const auto plan = detail::loading(source, detail::header_bytes, [&] {
    try {
      return std::make_shared<const kvcache::detail::low_rank_plan>(spec, file.about.shape);
    } catch (const std::invalid_argument& error) {
      throw shape_error(error.what());
    }
  });
  any_cache exact = plan->exact_cache();
  detail::with_container(exact, [&](auto& typed) { detail::require_same_kind(source, file.about, typed); });
  detail::fill(exact, source, file, options);
  any_cache made(spec, std::make_unique<kvcache::detail::fitting_cache>(plan, std::move(exact)));
  return {std::move(made), std::move(file.about)};
}
[[nodiscard]] inline loaded<any_cache> load_any_with_low_rank(const std::filesystem::path& path,
                                                              const load_options& options = {},
                                                              std::string_view container = {}) {
  return load_any_with_low_rank(file_source(path), options, container);
}
[[nodiscard]] inline loaded<any_cache> load_any_with_low_rank(std::span<const std::byte> bytes,
                                                              const load_options& options = {},
                                                              std::string_view container = {}) {
  return load_any_with_low_rank(memory_source(bytes), options, container);
}

}  // namespace kvcache::inline v0::store
