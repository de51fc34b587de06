// SPDX-License-Identifier: MIT
// Numbers as people read them, and columns that line up.
#pragma once

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace llama {

using kvcache::index_t;

/// 1234567 as "1,234,567".
[[nodiscard]] inline std::string with_commas(index_t number) {
  std::string digits = std::to_string(number);
  const std::size_t sign = number < 0 ? 1 : 0;
  for (std::size_t at = digits.size(); at > sign + 3;) digits.insert(at -= 3, ",");
  return digits;
}

/// printf-style text of one number: "%.1f", "%.1e".
[[nodiscard]] inline std::string formatted(const char* format, double number) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), format, number);
  return text.data();
}

/// A rate with three or more significant digits: 1,234 or 12.3 or 0.123.
[[nodiscard]] inline std::string rate_text(double rate) {
  if (rate >= 1000) return with_commas(static_cast<index_t>(rate));
  return formatted(rate >= 100 ? "%.0f" : rate >= 1 ? "%.1f" : "%.3f", rate);
}

/// Rows of cells, each column right-aligned to its widest cell; a first column of names is left-aligned.
class text_table {
 public:
  enum first_column { numbers_first, names_first };

  explicit text_table(std::vector<std::string> titles, first_column first = numbers_first)
      : rows_{std::move(titles)}, first_(first) {}

  /// \pre as many cells as titles
  void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }

  friend std::ostream& operator<<(std::ostream& out, const text_table& table) {
    std::vector<std::size_t> widths(table.rows_.front().size(), 0);
    for (const auto& row : table.rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    }
    for (const auto& row : table.rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) {
        const std::string padding(widths[i] - row[i].size(), ' ');
        const bool left = i == 0 && table.first_ == names_first;
        out << (i == 0 ? "" : "   ") << (left ? row[i] + padding : padding + row[i]);
      }
      out << '\n';
    }
    return out;
  }

 private:
  std::vector<std::vector<std::string>> rows_;
  first_column first_;
};

}  // namespace llama
