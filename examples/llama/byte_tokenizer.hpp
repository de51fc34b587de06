// SPDX-License-Identifier: MIT
// The tokenizer of a model with 256 tokens: a token is a byte.
#pragma once

#include <kvcache/core/types.hpp>

#include <string>
#include <string_view>
#include <vector>

namespace llama {

using kvcache::index_t;

struct byte_tokenizer {
  [[nodiscard]] std::vector<index_t> encode(std::string_view text) const {
    std::vector<index_t> ids;
    ids.reserve(text.size());
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }

  /// The bytes of token `id`. \param previous  the token before it, which does not matter here
  [[nodiscard]] std::string decode([[maybe_unused]] index_t previous, index_t id) const {
    return {static_cast<char>(static_cast<unsigned char>(id))};
  }
};

}  // namespace llama
