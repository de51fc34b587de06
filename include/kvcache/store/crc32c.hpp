// SPDX-License-Identifier: MIT
// CRC32C (Castagnoli), the checksum of everything that is stored: all errors in up to 32 neighbouring bits are found,
// all others but one in 2^32. Finds damage, not forgery.
//
// Three ways to the same number: tables, eight bytes at a time; SSE4.2, three streams side by side that a carry-less
// multiplication joins; the CRC instructions of ARM. Chosen at run time.
// Source: polynomial of RFC 3720; slicing, Kounavis and Berry 2005; streams, Gopal et al. 2011, "Fast CRC Computation
// for iSCSI Polynomial Using CRC32 Instruction".
#pragma once

#include <kvcache/core/types.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define KVCACHE_CRC32C_X86 1
#elif defined(__aarch64__) && defined(__linux__) && defined(__GNUC__)
#include <sys/auxv.h>
#define KVCACHE_CRC32C_ARM 1
#endif

namespace kvcache::inline v0::store {

namespace detail {

inline constexpr std::uint32_t crc32c_polynomial = 0x82f63b78U;  // bits in reverse order

/// [k][b]: what byte b, followed by k bytes of zero, adds to a checksum.
inline constexpr auto crc32c_tables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1U) ^ ((crc & 1U) != 0 ? crc32c_polynomial : 0U);
    tables[0][b] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t b = 0; b < 256; ++b)
      tables[k][b] = (tables[k - 1][b] >> 8U) ^ tables[0][tables[k - 1][b] & 255U];
  }
  return tables;
}();

/// \param state  the checksum so far, bits inverted; the same for the other two
inline std::uint32_t crc32c_portable(std::uint32_t state, const std::byte* data, std::size_t size) noexcept {
  const auto& t = crc32c_tables;
  for (; size >= 8; data += 8, size -= 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= state;
    state = 0;
    for (std::size_t k = 0; k < 8; ++k) state ^= t[7 - k][(word >> (8 * k)) & 255U];
  }
  for (; size > 0; ++data, --size)
    state = (state >> 8U) ^ t[0][(state ^ std::to_integer<std::uint32_t>(*data)) & 255U];
  return state;
}

#ifdef KVCACHE_CRC32C_X86

/// x^(8 * num_bytes - 33) modulo the polynomial: a checksum times this, reduced, is the one after so many zeros.
constexpr std::uint32_t crc32c_shift_factor(std::size_t num_bytes) noexcept {
  std::uint32_t power = 0x80000000U;
  for (std::size_t i = 0; i < 8 * num_bytes - 33; ++i)
    power = (power >> 1U) ^ ((power & 1U) != 0 ? crc32c_polynomial : 0U);
  return power;
}

__attribute__((target("sse4.2"))) inline std::uint64_t crc32c_word(std::uint64_t state,
                                                                   const std::byte* data) noexcept {
  std::uint64_t word;
  std::memcpy(&word, data, 8);
  return _mm_crc32_u64(state, word);
}

__attribute__((target("sse4.2,pclmul"))) inline std::uint64_t crc32c_times(std::uint64_t crc,
                                                                           std::uint32_t factor) noexcept {
  const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(crc)),
                                               _mm_cvtsi32_si128(static_cast<int>(factor)), 0);
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(product));
}

/// Whole rounds of three streams of `Bytes` each; moves `data` and `size` past them.
template <std::size_t Bytes>
__attribute__((target("sse4.2,pclmul"))) inline std::uint64_t crc32c_streams(std::uint64_t a,
                                                                             const std::byte*& data,
                                                                             std::size_t& size) noexcept {
  static constexpr std::uint32_t by_one = crc32c_shift_factor(Bytes);
  static constexpr std::uint32_t by_two = crc32c_shift_factor(2 * Bytes);
  for (; size >= 3 * Bytes; data += 3 * Bytes, size -= 3 * Bytes) {
    std::uint64_t b = 0;
    std::uint64_t c = 0;
    for (std::size_t i = 0; i < Bytes - 8; i += 8) {
      a = crc32c_word(a, data + i);
      b = crc32c_word(b, data + Bytes + i);
      c = crc32c_word(c, data + 2 * Bytes + i);
    }
    a = crc32c_word(a, data + Bytes - 8);
    b = crc32c_word(b, data + 2 * Bytes - 8);
    std::uint64_t last;
    std::memcpy(&last, data + 3 * Bytes - 8, 8);
    a = _mm_crc32_u64(c, last ^ crc32c_times(a, by_two) ^ crc32c_times(b, by_one));
  }
  return a;
}

__attribute__((target("sse4.2,pclmul"))) inline std::uint32_t crc32c_sse(std::uint32_t state,
                                                                         const std::byte* data,
                                                                         std::size_t size) noexcept {
  std::uint64_t crc = state;
  crc = crc32c_streams<2048>(crc, data, size);
  crc = crc32c_streams<128>(crc, data, size);
  for (; size >= 8; data += 8, size -= 8) crc = crc32c_word(crc, data);
  for (; size > 0; ++data, --size)
    crc = _mm_crc32_u8(static_cast<std::uint32_t>(crc), std::to_integer<std::uint8_t>(*data));
  return static_cast<std::uint32_t>(crc);
}

#endif

#ifdef KVCACHE_CRC32C_ARM

inline std::uint32_t crc32c_arm(std::uint32_t state, const std::byte* data, std::size_t size) noexcept {
  // As text: which names the compilers have for it, and when, differs.
  for (; size >= 8; data += 8, size -= 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(state) : "r"(word));
  }
  for (; size > 0; ++data, --size) {
    const auto byte = std::to_integer<std::uint32_t>(*data);
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(state) : "r"(byte));
  }
  return state;
}

#endif

using crc32c_function = std::uint32_t (*)(std::uint32_t, const std::byte*, std::size_t) noexcept;

/// The fastest that this processor runs.
inline crc32c_function best_crc32c() noexcept {
#if defined(KVCACHE_CRC32C_X86)
  static const bool has_it = __builtin_cpu_supports("sse4.2") != 0 && __builtin_cpu_supports("pclmul") != 0;
  if (has_it) return crc32c_sse;
#elif defined(KVCACHE_CRC32C_ARM)
  static const bool has_it = (::getauxval(AT_HWCAP) & (1UL << 7U)) != 0;  // HWCAP_CRC32
  if (has_it) return crc32c_arm;
#endif
  return crc32c_portable;
}

}  // namespace detail

/// The checksum of `data`, or of what has the checksum `before` with `data` behind it. O(size), about 20 GB/s.
inline std::uint32_t crc32c(std::span<const std::byte> data, std::uint32_t before = 0) noexcept {
  static const detail::crc32c_function compute = detail::best_crc32c();
  return ~compute(~before, data.data(), data.size());
}

}  // namespace kvcache::inline v0::store
