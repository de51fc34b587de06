// SPDX-License-Identifier: MIT
// The containers of make_cache, for codecs chosen at run time.
//
// Included by interop/any_cache.hpp, or, where KVCACHE_SEPARATE_CODECS is defined, by one source file of the program.
#pragma once

#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/known_codecs.hpp>
#include <kvcache/interop/named_codecs.hpp>

#include <string>
#include <string_view>

namespace kvcache::inline v0::detail {

KVCACHE_CODECS_INLINE any_cache make_container(const std::string& spec, std::string_view container,
                                               const codec::by_layer<any_codec>& codec,
                                               const cache_shape& shape) {
  using codecs = codec::by_layer<any_codec>;
  if (container == "contiguous") return {spec, contiguous_cache<codecs>(shape, codec)};
  if (container == "chunked") return {spec, chunked_cache<codecs>(shape, codec)};
  return {spec, page_pool<codecs>(shape, {}, codec).sequence()};  // a pool of its own, without a limit
}

}  // namespace kvcache::inline v0::detail
