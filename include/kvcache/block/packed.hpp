// SPDX-License-Identifier: MIT
// The packed order: where codes of 1, 2, 3 or 4 bits lie that stand for the bytes of a section in block order.
//
// A line is 64 bytes of the section. `lines_per_unit` lines are packed together, byte i of each into byte i of packed
// lines, so that shifts and masks give whole lines back:
//
//   4 bits   1 packed line  = 2 lines   line 2u in the low nibbles, line 2u + 1 in the high ones
//   2 bits   1 packed line  = 4 lines   line 4u + j in bits 2j and 2j + 1
//   1 bit    1 packed line  = 8 lines   line 8u + j in bit j
//   3 bits   3 packed lines = 8 lines   low two bits of lines 8u .. 8u + 3, those of lines 8u + 4 .. 8u + 7 (as for 2 bits),
//                                       then the top bit of line 8u + j in bit j
#pragma once

#include <kvcache/block/quads.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvcache::inline v0 {

/// Bytes of a line.
inline constexpr index_t packed_line_bytes = 64;

/// Index arithmetic of a packed section; byte_index counts bytes of the section that is packed.
template <int Bits>
struct packed_order {
  static_assert(1 <= Bits && Bits <= 4);

  static constexpr index_t lines_per_unit = Bits == 4 ? 2 : Bits == 2 ? 4 : 8;
  static constexpr index_t unit_bytes = Bits == 3 ? 3 * packed_line_bytes : packed_line_bytes;

  /// Packed bytes of a section of `num_bytes`, whole units.
  static constexpr index_t section_bytes(index_t num_bytes) {
    return ceil_div(num_bytes, lines_per_unit * packed_line_bytes) * unit_bytes;
  }

  /// Stores one code. \pre code < 2^Bits
  static void put(std::byte* packed, index_t byte_index, std::uint8_t code) noexcept {
    put_bits<std::uint8_t>(packed, byte_index, code);
  }

  static std::uint8_t get(const std::byte* packed, index_t byte_index) noexcept {
    const place p = place_of(byte_index);
    const auto low = std::to_integer<unsigned>(packed[p.at] >> p.shift) & low_mask;
    if constexpr (Bits != 3) return static_cast<std::uint8_t>(low);
    const auto top = std::to_integer<unsigned>(packed[p.top_at] >> p.top_shift) & 1U;
    return static_cast<std::uint8_t>(low | top << 2U);
  }

  /// Stores codes[i] at byte_index + 4 * i.
  static void put_every_fourth(std::byte* packed, index_t byte_index, const std::uint8_t* codes,
                               index_t count) noexcept {
    for (index_t done = 0; done < count;) {
      const index_t at = byte_index + 4 * done;
      const index_t in_line = std::min((packed_line_bytes - at % packed_line_bytes + 3) / 4, count - done);
      const place p = place_of(at);
      for (index_t i = 0; i < in_line; ++i) {
        const unsigned code = codes[done + i];
        replace<std::uint8_t>(packed + p.at + 4 * i, static_cast<std::uint8_t>(low_mask << p.shift),
                              static_cast<std::uint8_t>((code & low_mask) << p.shift));
        if constexpr (Bits == 3)
          replace<std::uint8_t>(packed + p.top_at + 4 * i, static_cast<std::uint8_t>(1U << p.top_shift),
                                static_cast<std::uint8_t>((code >> 2U & 1U) << p.top_shift));
      }
      done += in_line;
    }
  }

  /// Stores codes[4 * i ...] at line first_line + i, from its byte 4 * slot on: a row of keys. Where a whole unit of lines is
  /// the row's, nothing has to be read. \param codes  [4 * num_lines], below 2^Bits
  static void put_row_of_keys(std::byte* packed, index_t first_line, index_t slot, const std::uint8_t* codes,
                              index_t num_lines) noexcept {
    for (index_t i = 0; i < num_lines;) {
      const index_t line = first_line + i;
      if (line % lines_per_unit == 0 && i + lines_per_unit <= num_lines) {
        std::byte* to = packed + line / lines_per_unit * unit_bytes + 4 * slot;
        put_unit<std::uint32_t, 4>(codes + 4 * i, [to](index_t packed_line, std::uint32_t word) {
          std::memcpy(to + packed_line * packed_line_bytes, &word, sizeof(word));
        });
        i += lines_per_unit;
      } else {
        put_four(packed, line * packed_line_bytes + 4 * slot, word_at<std::uint32_t>(codes + 4 * i));
        ++i;
      }
    }
  }

  /// Stores codes[i] at byte_index + 4 * i: a row of values. \param codes  below 2^Bits
  static void put_row_of_values(std::byte* packed, index_t byte_index, const std::uint8_t* codes,
                                index_t count) noexcept {
    constexpr index_t dims_per_unit = lines_per_unit * packed_line_bytes / 4;
    index_t done = 0;
    if (byte_index % (4 * dims_per_unit) < 4) {
      const index_t slot = byte_index % 4;
      std::byte* to = packed + byte_index / (4 * dims_per_unit) * unit_bytes;
      for (; done + dims_per_unit <= count; done += dims_per_unit, to += unit_bytes) {
        put_unit<detail::byte_vector, 16>(codes + done, [&](index_t packed_line, detail::byte_vector bytes) {
          std::uint8_t sixteen[16];
          std::memcpy(sixteen, &bytes, sizeof(bytes));
          put_in_quads(to + packed_line * packed_line_bytes, slot, sixteen);
        });
      }
    }
    put_every_fourth(packed, byte_index + 4 * done, codes + done, count - done);
  }

  /// Stores four adjacent codes, one in each byte of `codes`, the first in memory order.
  /// \pre byte_index is a multiple of 4
  static void put_four(std::byte* packed, index_t byte_index, std::uint32_t codes) noexcept {
    put_bits<std::uint32_t>(packed, byte_index, codes);
  }

 private:
  template <class Word>
  static Word word_at(const std::uint8_t* codes) noexcept {
    Word word;
    std::memcpy(&word, codes, sizeof(word));
    return word;
  }

  /// Packs what one word of each line of a unit holds: store(packed line, word). Shifts stay within a byte.
  /// \param codes  for each line `Stride` codes, of which a word is made
  template <class Word, index_t Stride, class Store>
  static void put_unit(const std::uint8_t* codes, Store store) noexcept {
    const auto line = [codes](index_t i) { return word_at<Word>(codes + Stride * i); };
    if constexpr (Bits == 4) {
      store(0, line(0) | line(1) << 4);
    } else if constexpr (Bits == 2) {
      store(0, line(0) | line(1) << 2 | line(2) << 4 | line(3) << 6);
    } else if constexpr (Bits == 1) {
      Word packed = line(0);
      for (index_t i = 1; i < 8; ++i) packed |= line(i) << i;
      store(0, packed);
    } else {
      const Word ones = word_of<Word>(1);
      const Word low = word_of<Word>(3);
      Word packed[3] = {};
      for (index_t i = 0; i < 8; ++i) {
        packed[i / 4] |= (line(i) & low) << (2 * (i % 4));
        packed[2] |= (line(i) >> 2 & ones) << i;
      }
      for (index_t i = 0; i < 3; ++i) store(i, packed[i]);
    }
  }
  template <class Word>
  static Word word_of(std::uint8_t byte) noexcept {
    Word word;
    std::memset(&word, byte, sizeof(word));
    return word;
  }

  static constexpr unsigned low_bits = Bits == 3 ? 2U : unsigned{Bits};
  static constexpr unsigned low_mask = (1U << low_bits) - 1;

  struct place {
    index_t at;  // of the low bits
    unsigned shift;
    index_t top_at;  // of the third bit
    unsigned top_shift;
  };

  static constexpr place place_of(index_t byte_index) noexcept {
    constexpr index_t lines_per_packed_line = 8 / low_bits;
    const index_t line = byte_index / packed_line_bytes;
    const index_t byte = byte_index % packed_line_bytes;
    const index_t in_unit = line % lines_per_unit;
    const index_t unit = line / lines_per_unit * unit_bytes + byte;
    return {unit + in_unit / lines_per_packed_line * packed_line_bytes,
            static_cast<unsigned>(in_unit % lines_per_packed_line) * low_bits, unit + 2 * packed_line_bytes,
            static_cast<unsigned>(in_unit)};
  }

  /// Replaces `mask`, in every byte, of a word by `bits`.
  template <class Word>
  static void replace(std::byte* at, Word mask, Word bits) noexcept {
    Word word;
    std::memcpy(&word, at, sizeof(word));
    word = static_cast<Word>((word & static_cast<Word>(~mask)) | bits);
    std::memcpy(at, &word, sizeof(word));
  }

  /// As many codes as `Word` has bytes. Shifts never cross a byte: the bits that would are masked first.
  template <class Word>
  static void put_bits(std::byte* packed, index_t byte_index, Word codes) noexcept {
    constexpr auto ones = static_cast<Word>(0x01010101U);
    constexpr auto low = static_cast<Word>(ones * low_mask);
    const place p = place_of(byte_index);
    replace<Word>(packed + p.at, static_cast<Word>(low << p.shift),
                  static_cast<Word>((codes & low) << p.shift));
    if constexpr (Bits == 3)
      replace<Word>(packed + p.top_at, static_cast<Word>(ones << p.top_shift),
                    static_cast<Word>((codes >> 2U & ones) << p.top_shift));
  }
};

}  // namespace kvcache::inline v0
