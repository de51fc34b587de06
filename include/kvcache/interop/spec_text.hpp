// SPDX-License-Identifier: MIT
// Text of others in messages about specs: as much of it as can be read, and the name that it may have meant.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::detail {

/// The first 80 characters or so, "..." where there are more; what is not printable ASCII as \x00 to \xff.
inline std::string shown(std::string_view text) {
  constexpr std::size_t most = 80;
  constexpr std::string_view digits = "0123456789abcdef";
  std::string out;
  for (const char c : text) {
    if (out.size() >= most) return out + "...";
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out.append("\\x").append(1, digits[byte >> 4]).append(1, digits[byte & 15]);
    }
  }
  return out;
}

/// Characters to insert, delete or replace until one is the other. O(a.size() * b.size()).
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);  // from the first i characters of a to each beginning of b
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

/// " (did you mean int8?)" with the nearest of `names`, the first of several, if it is within two edits and has something of
/// `text`; else nothing.
inline std::string did_you_mean(std::string_view text, const std::vector<std::string_view>& names) {
  std::size_t best = 3;
  std::string_view nearest;
  for (const std::string_view name : names) {
    if (text.size() > name.size() + 2 || name.size() > text.size() + 2) continue;
    const std::size_t distance = edit_distance(text, name);
    if (distance < best && distance < text.size()) best = distance, nearest = name;
  }
  return nearest.empty() ? "" : " (did you mean " + std::string(nearest) + "?)";
}

}  // namespace kvcache::inline v0::detail
