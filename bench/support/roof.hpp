// SPDX-License-Identifier: MIT
// The roof: how fast this machine only reads the bytes that attention has to read.
//
// Wide loads chosen at run time, so that a plain build measures the machine and not its compiler flags. Three
// readers compete on each ring and the fastest one is the roof: one stream per thread, four, and four with
// software prefetch. (Which one wins depends on the machine and on whether the bytes are in a cache.)
#pragma once

#include <kvcache/core/executor.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvcache::bench {

/// Bytes side by side in memory, a multiple of 512 and 64-byte aligned.
struct extent {
  const std::byte* data;
  index_t bytes;
};

/// Sorted by address, neighbours merged.
inline std::vector<extent> join(std::vector<extent> stretches) {
  std::sort(stretches.begin(), stretches.end(),
            [](const extent& a, const extent& b) { return a.data < b.data; });
  std::vector<extent> joined;
  for (const extent& next : stretches) {
    if (!joined.empty() && joined.back().data + joined.back().bytes == next.data) {
      joined.back().bytes += next.bytes;
    } else {
      joined.push_back(next);
    }
  }
  return joined;
}

/// Cut into pieces of at most `piece_bytes` bytes, a multiple of 512.
inline std::vector<extent> cut(const std::vector<extent>& stretches, index_t piece_bytes) {
  std::vector<extent> pieces;
  for (const extent& whole : stretches) {
    for (index_t at = 0; at < whole.bytes; at += piece_bytes)
      pieces.push_back({whole.data + at, std::min(piece_bytes, whole.bytes - at)});
  }
  return pieces;
}

/// How a worker walks an extent.
struct read_style {
  bool four_streams = true;    ///< a quarter of the extent each
  index_t prefetch_bytes = 0;  ///< how far ahead; 0: not at all
};

inline constexpr std::array read_styles = {read_style{false, 0}, read_style{true, 0}, read_style{true, 1024}};

// Four loads a step; `apart` bytes from one to the next, `step` bytes from one step to the next.
// A macro, because a template or lambda would not inherit the target of the function that calls it.
#define KVCACHE_BENCH_READER(name, width, target)                                         \
  target inline std::uint64_t name(const std::byte* p, index_t bytes, read_style style) { \
    using vec = std::uint64_t __attribute__((vector_size(width), may_alias));             \
    constexpr index_t load = sizeof(vec);                                                 \
    const index_t apart = style.four_streams ? bytes / 4 : load;                          \
    const index_t step = style.four_streams ? load : 4 * load;                            \
    const index_t end = style.four_streams ? bytes / 4 : bytes;                           \
    const index_t ahead = style.prefetch_bytes;                                           \
    vec a{}, b{}, c{}, d{};                                                               \
    for (index_t i = 0; i < end; i += step) {                                             \
      const std::byte* q = p + i;                                                         \
      if (ahead > 0) {                                                                    \
        for (index_t s = 0; s < 4; ++s) __builtin_prefetch(q + s * apart + ahead);        \
      }                                                                                   \
      a ^= *reinterpret_cast<const vec*>(q);                                              \
      b ^= *reinterpret_cast<const vec*>(q + apart);                                      \
      c ^= *reinterpret_cast<const vec*>(q + 2 * apart);                                  \
      d ^= *reinterpret_cast<const vec*>(q + 3 * apart);                                  \
    }                                                                                     \
    const vec all = a ^ b ^ c ^ d;                                                        \
    return all[0] ^ all[1];                                                               \
  }

KVCACHE_BENCH_READER(read_16, 16, )
#if defined(__x86_64__)
KVCACHE_BENCH_READER(read_32, 32, __attribute__((target("avx2"))))
KVCACHE_BENCH_READER(read_64, 64, __attribute__((target("avx512f"))))
#endif
#undef KVCACHE_BENCH_READER

using reader = std::uint64_t (*)(const std::byte*, index_t, read_style);

/// The widest loads of this processor.
inline reader widest_reader() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_64;
  if (__builtin_cpu_supports("avx2")) return read_32;
#endif
  return read_16;
}

/// Reads every byte once; the pieces are the tasks.
template <executor Executor>
void read_all(std::span<const extent> pieces, read_style style, Executor& workers) {
  static const reader read = widest_reader();
  static std::atomic<std::uint64_t> sink{0};  // so that no compiler can leave a load out
  workers.run(static_cast<index_t>(pieces.size()), [&](index_t task, index_t) {
    const extent& piece = pieces[static_cast<std::size_t>(task)];
    sink.fetch_xor(read(piece.data, piece.bytes, style), std::memory_order_relaxed);
  });
}

}  // namespace kvcache::bench
