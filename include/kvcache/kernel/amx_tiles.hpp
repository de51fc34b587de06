// SPDX-License-Identifier: MIT
// The tile registers of AMX, and whether they are there. Linux only, since a process must ask for them.
#pragma once

#include <kvcache/core/types.hpp>

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvcache::inline v0::kernel::amx {

inline constexpr index_t tile_rows = 16;  // rows of a tile, and words of 32 bits in one of them

/// What the processor has and the system saves: the tiles with multiplications of bf16, with those of bytes.
struct tile_support {
  bool bf16 = false;
  bool int8 = false;
};

/// Looked up at the first call; thread-safe.
inline tile_support processor_tiles() noexcept {
  static const tile_support found = [] {
    constexpr unsigned bf16 = 1U << 22;
    constexpr unsigned tiles = 1U << 24;
    constexpr unsigned int8 = 1U << 25;
    constexpr unsigned saved_tiles = (1U << 17) | (1U << 18);
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return tile_support{};
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    if ((a & saved_tiles) != saved_tiles) return tile_support{};
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & tiles) == 0) return tile_support{};
    return tile_support{(d & bf16) != 0, (d & int8) != 0};
  }();
  return found;
}

/// Asks Linux for leave to use the tiles. \return whether this process got it
inline bool may_use_tiles() noexcept {
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/// How many rows the tiles of a product have. Up to 16 rows of a left operand are multiplied by four right ones at a time, up
/// to 32 by two. Multiplying takes a cycle for each row, and no less than eight.
///
///   rows        C: tiles 0 to 3           A: tiles 4, 5                           B: tiles 6, 7
///   up to 16    of four right operands    two left ones, `first` rows each        16 rows
///   up to 32    0, 1: `first` rows        4: `first` = 16 rows, 5: `second`       16 rows
///               2, 3: `second` rows
struct tile_shape {
  index_t first = 0;
  index_t second = 0;

  static constexpr tile_shape of(index_t num_rows) noexcept {
    return num_rows <= tile_rows ? tile_shape{num_rows, 0} : tile_shape{tile_rows, num_rows - tile_rows};
  }
  [[nodiscard]] constexpr index_t rows_of(int tile) const noexcept {
    if (tile > 5) return tile_rows;
    return second != 0 && (tile == 2 || tile == 3 || tile == 5) ? second : first;
  }
  friend constexpr bool operator==(const tile_shape&, const tile_shape&) = default;
};

/// The tile registers: eight of up to 16 rows of 64 bytes. Kernels take them as a parameter, so that tests can run on
/// emulated ones anywhere. Instructions are spelled as text because intrinsics want literal tile numbers.
struct hardware_tiles {
  static void configure(const tile_shape& shape) noexcept {
    struct configuration {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::array<std::uint8_t, 14> reserved{};
      std::array<std::uint16_t, 16> row_bytes{64, 64, 64, 64, 64, 64, 64, 64};
      std::array<std::uint8_t, 16> num_rows{};
    };
    static_assert(sizeof(configuration) == 64);
    alignas(64) configuration c;
    for (int tile = 0; tile < 8; ++tile)
      c.num_rows[static_cast<std::size_t>(tile)] = static_cast<std::uint8_t>(shape.rows_of(tile));
    __asm__ volatile("ldtilecfg %0" : : "m"(c));
  }
  static void release() noexcept { __asm__ volatile("tilerelease"); }

  template <int Tile>
  static void zero() noexcept {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
  }
  template <int Tile>
  static void load(const void* rows, index_t stride) noexcept {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
  }
  template <int Tile>
  static void store(void* rows, index_t stride) noexcept {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(Tile) : "memory");
  }
  /// Whether there are multiplications of bytes, which AMX-BF16 does not promise.
  static bool multiply_bytes_here() noexcept { return processor_tiles().int8; }

  /// C[m, n] += sum_k A[m, 2k] * B[k, 2n] + A[m, 2k+1] * B[k, 2n+1], bf16 into float.
  template <int C, int A, int B>
  static void multiply() noexcept {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  /// C[m, n] += sum_k sum_{i < 4} A[m, 4k + i] * B[k, 4n + i], signed bytes into 32 bits.
  template <int C, int A, int B>
  static void multiply_signed() noexcept {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  /// The same with unsigned bytes in A.
  template <int C, int A, int B>
  static void multiply_unsigned() noexcept {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

/// While it lives, this thread's tiles are configured. Configuring takes 45 ns, as long as a tenth of a block: tiles stay as they
/// are until the last of these is gone, and between enter() and leave(), which attend calls around all blocks of a span.
template <class Tiles>
class tiles_in_use {
 public:
  explicit tiles_in_use(tile_shape shape) noexcept : shape_(shape) {
    enter();
    configure();
  }
  tiles_in_use(const tiles_in_use&) = delete;
  tiles_in_use& operator=(const tiles_in_use&) = delete;
  ~tiles_in_use() { leave(); }

  /// As this one wants them, after others wanted something else.
  void configure() const noexcept {
    if (shape_ == configured) return;
    Tiles::configure(shape_);
    configured = shape_;
  }

  static void enter() noexcept { ++users; }
  static void leave() noexcept {
    if (--users > 0 || configured == tile_shape{}) return;
    Tiles::release();
    configured = {};
  }

 private:
  tile_shape shape_;
  static constinit inline thread_local tile_shape configured;
  static constinit inline thread_local int users = 0;
};

/// Calls f.operator()<i>(i) for i in [0, n), n <= 4.
template <class F>
[[gnu::always_inline]] inline void for_tiles(index_t n, F f) {
  f.template operator()<0>(0);
  if (n > 1) f.template operator()<1>(1);
  if (n > 2) f.template operator()<2>(2);
  if (n > 3) f.template operator()<3>(3);
}

}  // namespace kvcache::inline v0::kernel::amx

#endif
