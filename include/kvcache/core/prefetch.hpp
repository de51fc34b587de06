// SPDX-License-Identifier: MIT
// Asking for memory before it is read, in the way that suits the processor.
//
// A core of Intel's waits for few lines in its first-level cache and for three times as many in its second (16 and 48 in recent
// servers): lines from memory have to be asked into L2, and from there into L1 soon before they are read. AMD's bring them
// into L1 at once as fast. What either loses by the other's way is in bench/NOTES.md.
//
// All of it is inlined whatever the compiler thinks: g++ drops calls of functions that do nothing but ask.
#pragma once

#include <cstddef>

namespace kvcache::inline v0::prefetch {

/// Into L2 first.
#if defined(__x86_64__)
inline const bool by_levels = [] {
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
}();
#else
inline constexpr bool by_levels = false;
#endif

/// Asks for a line that is read after a hundred others or more.
[[gnu::always_inline]] inline void line(const void* at) noexcept {
  if (by_levels)
    __builtin_prefetch(at, 0, 2);
  else
    __builtin_prefetch(at, 0, 3);
}

/// Asks for a line of each of the first four pages of so many bytes.
[[gnu::always_inline]] inline void first_pages(const std::byte* at, std::ptrdiff_t num_bytes) noexcept {
  constexpr std::ptrdiff_t page = 4096;
  for (std::ptrdiff_t i = 0; i < 4 * page && i < num_bytes; i += page) line(at + i);
}

/// The same as `line`, and by levels for a line that is read before it and came into L2 in this way some time ago.
[[gnu::always_inline]] inline void lines(const void* at, const void* near) noexcept {
  line(at);
  if (by_levels) __builtin_prefetch(near, 0, 3);
}

}  // namespace kvcache::inline v0::prefetch
