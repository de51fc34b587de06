// SPDX-License-Identifier: MIT
// The byte-pair tokenizer of llama2.c, as its tokenizer .bin files describe it.
//
//   int32 longest | for each token: float32 score, int32 length, bytes
//
// Encoding starts from characters (a byte token <0xNN> for those that are no token) and joins, again and
// again, the neighbours whose union is the token of the highest score, the leftmost first among equals.
// Source: Karpathy, llama2.c, tokenizer.py (file) and run.c (rule); sentencepiece, bpe_model.cc (queue).
#pragma once

#include "llama/input_file.hpp"

#include <kvcache/core/types.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace llama {

using kvcache::index_t;

class bpe_tokenizer {
 public:
  /// Reads a tokenizer of exactly `vocab_size` tokens. Throws model_error.
  bpe_tokenizer(const std::filesystem::path& path, index_t vocab_size);

  /// Token ids of `text`, after BOS (1). Complexity: O(n log n) in the bytes of the text.
  [[nodiscard]] std::vector<index_t> encode(std::string_view text) const;

  /// The bytes of token `id` when it follows `previous`: after BOS a leading space is dropped.
  [[nodiscard]] std::string decode(index_t previous, index_t id) const;

  static constexpr index_t bos = 1;
  static constexpr index_t first_byte = 3;  // token 3 + b is byte b

 private:
  struct token {
    std::string text;
    float score = 0;
  };

  // A piece of the text being encoded: a token, and its neighbours as indices; a joined piece has id -1.
  struct piece {
    index_t id, left, right;
  };

  // Two neighbours that could be joined. Stale when either has changed since.
  struct join {
    float score;
    index_t left, right;        // pieces
    index_t left_id, right_id;  // their tokens when this was found
    index_t joined_id;
    friend bool operator<(const join& a, const join& b) {  // std::priority_queue takes the largest
      return a.score != b.score ? a.score < b.score : a.left > b.left;
    }
  };

  void read(input_file& file, index_t vocab_size);
  [[nodiscard]] index_t find(const std::string& text) const {
    const auto found = id_of_.find(text);
    return found == id_of_.end() ? -1 : found->second;
  }
  void split(std::string_view text, std::vector<piece>& pieces) const;
  void offer(const std::vector<piece>& pieces, index_t left, std::priority_queue<join>& joins) const;

  std::vector<token> tokens_;
  std::unordered_map<std::string, index_t> id_of_;
};

inline bpe_tokenizer::bpe_tokenizer(const std::filesystem::path& path, index_t vocab_size) {
  input_file file(path);
  read(file, vocab_size);
  for (index_t b = 0; b < 256; ++b) {
    constexpr std::string_view digits = "0123456789ABCDEF";
    const auto byte = static_cast<std::size_t>(b);
    const std::string text{'<', '0', 'x', digits[byte / 16], digits[byte % 16], '>'};
    const auto id = static_cast<std::size_t>(first_byte + b);
    if (id >= tokens_.size() || tokens_[id].text != text)
      file.fail("token " + std::to_string(id), "is not " + text);
  }
}

inline void bpe_tokenizer::read(input_file& file, index_t vocab_size) {
  constexpr std::uint64_t entry_bytes = 8;  // score and length
  std::array<unsigned char, entry_bytes> bytes{};
  file.read(0, std::span(bytes).first(4), "max_token_length");
  const auto longest = load_little_endian<std::uint32_t>(bytes.data());
  file.require(4, saturating_multiply(entry_bytes, static_cast<std::uint64_t>(vocab_size)), "tokens");

  std::uint64_t offset = 4;
  tokens_.reserve(static_cast<std::size_t>(vocab_size));
  for (index_t id = 0; id < vocab_size; ++id) {
    const std::string field = "token " + std::to_string(id);
    file.read(offset, bytes, field);
    const float score = std::bit_cast<float>(load_little_endian<std::uint32_t>(bytes.data()));
    const auto length = load_little_endian<std::uint32_t>(bytes.data() + 4);
    if (!std::isfinite(score)) file.fail(field, "score is not finite");
    if (length > longest) {
      file.fail(field, "length " + std::to_string(static_cast<std::int32_t>(length)) + " is not in 0 to " +
                           std::to_string(longest) + ", the file's max_token_length");
    }
    tokens_.push_back({file.read_text(offset + entry_bytes, length, field), score});
    id_of_.emplace(tokens_.back().text, id);  // the first of equal texts stays
    offset += entry_bytes + length;
  }
  if (offset != file.size()) {
    file.fail("tokens", std::to_string(file.size() - offset) + " bytes after the last of " +
                            std::to_string(vocab_size) + " tokens");
  }
}

/// One piece per UTF-8 character that is a token, one per byte of the others.
inline void bpe_tokenizer::split(std::string_view text, std::vector<piece>& pieces) const {
  const auto push = [&](index_t id) {
    const auto at = static_cast<index_t>(pieces.size());
    pieces.push_back({id, at - 1, at + 1});
  };
  if (!text.empty()) {
    if (const index_t space = find(" "); space >= 0)
      push(space);  // the tokenizer was trained with a leading space
  }
  for (std::size_t first = 0; first < text.size();) {
    std::size_t end = first + 1;  // continuation bytes are 10xxxxxx, at most three
    while (end < text.size() && end - first < 4 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U)
      ++end;
    const std::string character(text.substr(first, end - first));
    if (const index_t id = find(character); id >= 0) {
      push(id);
    } else {
      for (const char c : character) push(first_byte + static_cast<unsigned char>(c));
    }
    first = end;
  }
  if (!pieces.empty()) pieces.back().right = -1;
}

/// Adds the join of piece `left` with its right neighbour, if that is a token.
inline void bpe_tokenizer::offer(const std::vector<piece>& pieces, index_t left,
                                 std::priority_queue<join>& joins) const {
  const auto text = [&](index_t id) -> const std::string& {
    return tokens_[static_cast<std::size_t>(id)].text;
  };
  const piece& a = pieces[static_cast<std::size_t>(left)];
  if (a.right < 0) return;
  const piece& b = pieces[static_cast<std::size_t>(a.right)];
  const index_t id = find(text(a.id) + text(b.id));
  if (id >= 0) joins.push({tokens_[static_cast<std::size_t>(id)].score, left, a.right, a.id, b.id, id});
}

inline std::vector<index_t> bpe_tokenizer::encode(std::string_view text) const {
  std::vector<piece> pieces;
  split(text, pieces);
  const auto at = [&](index_t index) -> piece& { return pieces[static_cast<std::size_t>(index)]; };

  std::priority_queue<join> joins;
  for (index_t i = 0; i < static_cast<index_t>(pieces.size()); ++i) offer(pieces, i, joins);
  while (!joins.empty()) {
    const join best = joins.top();
    joins.pop();
    if (at(best.left).id != best.left_id || at(best.right).id != best.right_id ||
        at(best.left).right != best.right) {
      continue;
    }
    const index_t after = at(best.right).right;
    at(best.left).id = best.joined_id;
    at(best.left).right = after;
    at(best.right).id = -1;
    if (after >= 0) at(after).left = best.left;
    if (at(best.left).left >= 0) offer(pieces, at(best.left).left, joins);
    offer(pieces, best.left, joins);
  }

  std::vector<index_t> ids{bos};
  for (const piece& p : pieces) {
    if (p.id >= 0) ids.push_back(p.id);
  }
  return ids;
}

inline std::string bpe_tokenizer::decode(index_t previous, index_t id) const {
  if (id == bos || id == bos + 1) return "";  // begin and end of text are not text
  if (id >= first_byte && id < first_byte + 256) {
    return {static_cast<char>(static_cast<unsigned char>(id - first_byte))};
  }
  const std::string& text = tokens_.at(static_cast<std::size_t>(id)).text;
  return previous == bos && text.starts_with(' ') ? text.substr(1) : text;
}

}  // namespace llama
