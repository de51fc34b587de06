// SPDX-License-Identifier: MIT
// Stored numbers as floats: the element types of weight files, and reading many of them in bounded memory.
#pragma once

#include "llama/input_file.hpp"

#include <kvcache/core/half.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace llama {

/// Bytes of one element, 0 for a name that is none.
[[nodiscard]] inline std::uint64_t element_bytes(std::string_view dtype) noexcept {
  constexpr std::array<std::pair<std::string_view, std::uint64_t>, 15> sizes{{{"F32", 4},
                                                                              {"F16", 2},
                                                                              {"BF16", 2},
                                                                              {"F64", 8},
                                                                              {"I64", 8},
                                                                              {"U64", 8},
                                                                              {"I32", 4},
                                                                              {"U32", 4},
                                                                              {"I16", 2},
                                                                              {"U16", 2},
                                                                              {"I8", 1},
                                                                              {"U8", 1},
                                                                              {"BOOL", 1},
                                                                              {"F8_E4M3", 1},
                                                                              {"F8_E5M2", 1}}};
  for (const auto& [name, bytes] : sizes) {
    if (name == dtype) return bytes;
  }
  return 0;
}

[[nodiscard]] inline bool is_float_type(std::string_view dtype) noexcept {
  return dtype == "F32" || dtype == "F16" || dtype == "BF16";
}

/// One stored element as float.
[[nodiscard]] inline float decode_element(std::string_view dtype, const unsigned char* bytes) noexcept {
  if (dtype == "F16") return kvcache::to_float(kvcache::half{load_little_endian<std::uint16_t>(bytes)});
  if (dtype == "BF16") return kvcache::to_float(kvcache::bfloat16{load_little_endian<std::uint16_t>(bytes)});
  return std::bit_cast<float>(load_little_endian<std::uint32_t>(bytes));
}

/// Reads `out.size()` elements at `offset`, a piece at a time. Throws model_error for a NaN or infinity.
inline void read_floats(input_file& file, std::uint64_t offset, std::string_view dtype, std::span<float> out,
                        std::string_view field) {
  constexpr std::size_t piece_elements = 16384;
  const auto bytes_each = static_cast<std::size_t>(element_bytes(dtype));
  std::vector<unsigned char> piece(std::min(piece_elements, out.size()) * bytes_each);
  for (std::size_t first = 0; first < out.size(); first += piece_elements) {
    const std::size_t count = std::min(piece_elements, out.size() - first);
    file.read(offset + first * bytes_each, {piece.data(), count * bytes_each}, field);
    for (std::size_t i = 0; i < count; ++i) {
      const float value = decode_element(dtype, piece.data() + i * bytes_each);
      if (!std::isfinite(value)) file.fail(field, "element " + std::to_string(first + i) + " is not finite");
      out[first + i] = value;
    }
  }
}

}  // namespace llama
