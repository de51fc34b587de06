// SPDX-License-Identifier: MIT
// The tokenizer that goes with a model, chosen when it is loaded.
#pragma once

#include "llama/bpe_tokenizer.hpp"
#include "llama/byte_tokenizer.hpp"
#include "llama/model_config.hpp"

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <variant>
#include <vector>

namespace llama {

class tokenizer {
 public:
  tokenizer(byte_tokenizer bytes) : kind_(bytes) {}            // NOLINT(google-explicit-constructor)
  tokenizer(bpe_tokenizer pairs) : kind_(std::move(pairs)) {}  // NOLINT(google-explicit-constructor)

  /// Ids of a prompt, with the token that starts a text where the tokenizer was trained with one.
  [[nodiscard]] std::vector<index_t> encode(std::string_view text) const {
    return std::visit([&](const auto& t) { return t.encode(text); }, kind_);
  }

  /// The bytes of token `id` when it follows `previous`.
  [[nodiscard]] std::string decode(index_t previous, index_t id) const {
    return std::visit([&](const auto& t) { return t.decode(previous, id); }, kind_);
  }

 private:
  std::variant<byte_tokenizer, bpe_tokenizer> kind_;
};

/// The tokenizer file of a llama2.c checkpoint when none is named: tok<vocab_size>.bin or tokenizer.bin
/// beside it.
[[nodiscard]] inline std::optional<std::filesystem::path> find_tokenizer(const std::filesystem::path& model,
                                                                         index_t vocab_size) {
  std::error_code error;
  const auto folder = std::filesystem::is_directory(model, error) ? model : model.parent_path();
  for (const auto& name : {"tok" + std::to_string(vocab_size) + ".bin", std::string("tokenizer.bin")}) {
    if (std::filesystem::is_regular_file(folder / name, error)) return folder / name;
  }
  return std::nullopt;
}

/// \param file  a llama2.c tokenizer; if empty, bytes for a vocabulary of 256, else a file beside the model
/// Throws model_error when there is none or it does not fit.
[[nodiscard]] inline tokenizer load_tokenizer(const std::filesystem::path& model,
                                              const std::filesystem::path& file, index_t vocab_size) {
  if (!file.empty()) return bpe_tokenizer(file, vocab_size);
  if (vocab_size == 256) return byte_tokenizer{};
  if (const auto found = find_tokenizer(model, vocab_size)) return bpe_tokenizer(*found, vocab_size);
  throw model_error(model, "tokenizer",
                    "none is known for a vocabulary of " + std::to_string(vocab_size) +
                        "; name a llama2.c tokenizer file with --tokenizer");
}

}  // namespace llama
