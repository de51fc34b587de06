// SPDX-License-Identifier: MIT
// KVCACHE_ASSERT: checks of the caller's side of a contract (core/status.hpp says what else there is).
//
// On in Debug builds (no NDEBUG). -DKVCACHE_ASSERTIONS=1 keeps it on in Release, =0 turns it off in Debug.
// The switch changes checks only, never a layout.
#pragma once

#include <cstdio>
#include <cstdlib>

#ifndef KVCACHE_ASSERTIONS
#ifdef NDEBUG
#define KVCACHE_ASSERTIONS 0
#else
#define KVCACHE_ASSERTIONS 1
#endif
#endif

namespace kvcache::inline v0::detail {

[[noreturn]] inline void assertion_failed(const char* expression, const char* rule, const char* file,
                                          int line) {
  std::fprintf(stderr, "%s:%d: kvcache: %s [%s]\n", file, line, rule, expression);
  std::abort();
}

}  // namespace kvcache::inline v0::detail

/// Aborts with `rule` (a sentence that says what the caller must do) unless `expression` holds.
#if KVCACHE_ASSERTIONS
#define KVCACHE_ASSERT(expression, rule) \
  ((expression) ? void(0) : ::kvcache::detail::assertion_failed(#expression, rule, __FILE__, __LINE__))
#else
#define KVCACHE_ASSERT(expression, rule) void(sizeof(!(expression)))
#endif
