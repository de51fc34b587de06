// SPDX-License-Identifier: MIT
// BLAKE2b with 256 bits: names for what is too long to be a name. Nobody finds two inputs with one digest.
// Source: Saarinen and Aumasson 2015, RFC 7693.
#pragma once

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kvcache::inline v0::store {

/// 256 bits that stand for any number of bytes.
using digest256 = std::array<std::byte, 32>;

/// Digests bytes piece by piece: the digest is that of all pieces in a row, wherever they were cut.
class blake2b {
 public:
  blake2b() noexcept {
    state_[0] ^= 0x01010000U ^ digest256 {}.size();
  }

  /// O(size), about 1 GB/s.
  void add(std::span<const std::byte> bytes) noexcept {
    while (!bytes.empty()) {
      if (buffered_ == buffer_.size()) compress(false);  // never the last block, more follows
      const std::size_t n = std::min(bytes.size(), buffer_.size() - buffered_);
      std::memcpy(buffer_.data() + buffered_, bytes.data(), n);
      buffered_ += n;
      bytes = bytes.subspan(n);
    }
  }

  /// What was added so far. Nothing may be added after it.
  [[nodiscard]] digest256 finish() noexcept {
    std::fill(buffer_.begin() + static_cast<std::ptrdiff_t>(buffered_), buffer_.end(), std::byte{0});
    compress(true);
    digest256 digest;
    std::memcpy(digest.data(), state_.data(), digest.size());
    return digest;
  }

 private:
  using words = std::array<std::uint64_t, 16>;

  static_assert(std::endian::native == std::endian::little);

  static void mix(words& v, std::size_t a, std::size_t b, std::size_t c, std::size_t d, std::uint64_t x,
                  std::uint64_t y) noexcept {
    v[a] += v[b] + x;
    v[d] = std::rotr(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = std::rotr(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = std::rotr(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = std::rotr(v[b] ^ v[c], 63);
  }

  void compress(bool is_last) noexcept {
    static constexpr std::uint8_t order[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                                   {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                                   {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                                   {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                                   {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                                   {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                                   {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                                   {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                                   {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                                   {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
    total_ += buffered_;
    words m;
    std::memcpy(m.data(), buffer_.data(), sizeof(m));
    words v;
    std::copy(state_.begin(), state_.end(), v.begin());
    std::copy(start.begin(), start.end(), v.begin() + 8);
    v[12] ^= total_;
    if (is_last) v[14] = ~v[14];
    for (std::size_t round = 0; round < 12; ++round) {
      const auto& s = order[round % 10];
      for (std::size_t i = 0; i < 4; ++i) mix(v, i, i + 4, i + 8, i + 12, m[s[2 * i]], m[s[2 * i + 1]]);
      for (std::size_t i = 0; i < 4; ++i)
        mix(v, i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
    }
    for (std::size_t i = 0; i < 8; ++i) state_[i] ^= v[i] ^ v[i + 8];
    buffered_ = 0;
  }

  static constexpr std::array<std::uint64_t, 8> start = {
      0x6a09e667f3bcc908U, 0xbb67ae8584caa73bU, 0x3c6ef372fe94f82bU, 0xa54ff53a5f1d36f1U,
      0x510e527fade682d1U, 0x9b05688c2b3e6c1fU, 0x1f83d9abfb41bd6bU, 0x5be0cd19137e2179U};

  std::array<std::uint64_t, 8> state_ = start;
  std::array<std::byte, 128> buffer_{};
  std::size_t buffered_ = 0;
  std::uint64_t total_ = 0;  // bytes
};

}  // namespace kvcache::inline v0::store
