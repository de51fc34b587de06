// SPDX-License-Identifier: MIT
// The tile registers of AMX in plain C++, for kernel::amx on processors that have AVX-512 but no tiles.
#pragma once

#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/amx.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)

namespace test {

struct emulated_tiles {
  using shape = kvcache::kernel::amx::tile_shape;
  struct state {
    shape configured;
    std::array<std::array<std::byte, 1024>, 8> tiles{};
  };
  static state& registers() {
    thread_local state s;
    return s;
  }
  /// A tile instruction without a configuration is an illegal one.
  template <int Tile>
  static std::byte* tile() {
    if (registers().configured == shape{}) throw std::logic_error("tiles are not configured");
    return registers().tiles.at(Tile).data();
  }
  template <int Tile>
  static std::size_t rows() {
    return static_cast<std::size_t>(registers().configured.rows_of(Tile));
  }

  /// The tiles take subnormal numbers for zero.
  static float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? 0.0F * x : x; }

  /// Configuring clears all tiles.
  static void configure(const shape& wanted) {
    registers() = {};
    registers().configured = wanted;
  }
  static void release() { registers() = {}; }
  template <int Tile>
  static void zero() {
    std::memset(tile<Tile>(), 0, 1024);
  }
  template <int Tile>
  static void load(const void* from, kvcache::index_t stride) {
    std::memset(tile<Tile>(), 0, 1024);
    for (std::size_t r = 0; r < rows<Tile>(); ++r)
      std::memcpy(tile<Tile>() + r * 64,
                  static_cast<const std::byte*>(from) + static_cast<kvcache::index_t>(r) * stride, 64);
  }
  template <int Tile>
  static void store(void* to, kvcache::index_t stride) {
    for (std::size_t r = 0; r < rows<Tile>(); ++r)
      std::memcpy(static_cast<std::byte*>(to) + static_cast<kvcache::index_t>(r) * stride,
                  tile<Tile>() + r * 64, 64);
  }
  template <int C, int A, int B>
  static void multiply() {
    std::array<float, 256> c;
    std::array<kvcache::bfloat16, 512> a;
    std::array<kvcache::bfloat16, 512> b;
    std::memcpy(c.data(), tile<C>(), 1024);
    std::memcpy(a.data(), tile<A>(), 1024);
    std::memcpy(b.data(), tile<B>(), 1024);
    require_shape<C, A, B>();
    for (std::size_t m = 0; m < rows<C>(); ++m) {
      std::array<float, 16> sum{};
      for (std::size_t k = 0; k < 32; ++k) {
        const float x = flushed(kvcache::to_float(a[m * 32 + k]));
        for (std::size_t n = 0; n < 16; ++n) {
          const float y = flushed(kvcache::to_float(b[k / 2 * 32 + 2 * n + k % 2]));
          sum[n] = flushed(sum[n] + x * y);
        }
      }
      for (std::size_t n = 0; n < 16; ++n) c[m * 16 + n] = flushed(c[m * 16 + n] + sum[n]);
    }
    std::memcpy(tile<C>(), c.data(), 1024);
  }
  template <int C, int A, int B>
  static void multiply_signed() {
    multiply_bytes<std::int8_t, C, A, B>();
  }
  template <int C, int A, int B>
  static void multiply_unsigned() {
    multiply_bytes<std::uint8_t, C, A, B>();
  }
  static bool multiply_bytes_here() { return true; }

 private:
  /// An instruction on tiles that do not fit each other is an illegal one.
  template <int C, int A, int B>
  static void require_shape() {
    if (rows<C>() != rows<A>() || rows<B>() != 16) throw std::logic_error("tiles do not fit each other");
  }

  template <class Left, int C, int A, int B>
  static void multiply_bytes() {
    std::array<std::int32_t, 256> c;
    std::array<Left, 1024> a;
    std::array<std::int8_t, 1024> b;
    std::memcpy(c.data(), tile<C>(), 1024);
    std::memcpy(a.data(), tile<A>(), 1024);
    std::memcpy(b.data(), tile<B>(), 1024);
    require_shape<C, A, B>();
    for (std::size_t m = 0; m < rows<C>(); ++m) {
      for (std::size_t k = 0; k < 64; ++k) {
        for (std::size_t n = 0; n < 16; ++n) c[m * 16 + n] += a[m * 64 + k] * b[k / 4 * 64 + 4 * n + k % 4];
      }
    }
    std::memcpy(tile<C>(), c.data(), 1024);
  }
};

}  // namespace test

#endif
