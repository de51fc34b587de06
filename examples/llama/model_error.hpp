// SPDX-License-Identifier: MIT
// The one exception of the loaders: which file, which field of it, and why it cannot be used.
#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>

namespace llama {

/// Text from a file, fit for an error message: control characters shown as '?', at most 120 bytes.
inline std::string printable(std::string_view text) {
  constexpr std::size_t max_bytes = 120;
  std::string out(text.substr(0, max_bytes));
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text.size() > max_bytes ? out + "..." : out;
}

/// A model or tokenizer file that cannot be used. `what()` is "file: field: reason".
class model_error : public std::runtime_error {
 public:
  /// \param field  the tensor, header or JSON field that is wrong; empty when it is the file itself
  model_error(const std::filesystem::path& file, std::string_view field, std::string_view reason)
      : std::runtime_error(message(file, field, reason)), file_(file), field_(field) {}

  [[nodiscard]] const std::filesystem::path& file() const noexcept { return file_; }
  [[nodiscard]] const std::string& field() const noexcept { return field_; }

 private:
  static std::string message(const std::filesystem::path& file, std::string_view field,
                             std::string_view reason) {
    std::string text = file.string() + ": ";
    if (!field.empty()) text += printable(field) + ": ";
    return text.append(reason);
  }

  std::filesystem::path file_;
  std::string field_;
};

}  // namespace llama
