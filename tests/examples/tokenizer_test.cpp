// SPDX-License-Identifier: MIT
// Text to tokens and back.
#include "examples/model_files.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include "llama/tokenizer.hpp"

namespace {

using namespace model_files;
using llama::bpe_tokenizer;
using ids = std::vector<index_t>;

/// A tokenizer of the byte tokens, then these.
bpe_tokenizer tokenizer_of(const token_list& more) {
  auto list = byte_tokens();
  list.insert(list.end(), more.begin(), more.end());
  const temporary_folder folder;
  return {folder.write("tok.bin", tokenizer_bytes(list)), static_cast<index_t>(list.size())};
}

std::string decoded(const bpe_tokenizer& tokenizer, const ids& tokens) {
  std::string text;
  for (std::size_t i = 1; i < tokens.size(); ++i) text += tokenizer.decode(tokens[i - 1], tokens[i]);
  return text;
}

/// The rule as llama2.c states it: join the best pair, the leftmost of equals, until none is left.
ids joined_by_rescanning(const token_list& all, ids tokens) {
  const auto find = [&](const std::string& text) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (all[i].first == text) return static_cast<index_t>(i);
    }
    return index_t{-1};
  };
  while (true) {
    float best_score = -1e10f;
    index_t best_id = -1;
    std::size_t best_at = 0;
    for (std::size_t i = 1; i + 1 < tokens.size(); ++i) {
      const index_t id = find(all[static_cast<std::size_t>(tokens[i])].first +
                              all[static_cast<std::size_t>(tokens[i + 1])].first);
      if (id >= 0 && all[static_cast<std::size_t>(id)].second > best_score) {
        best_score = all[static_cast<std::size_t>(id)].second, best_id = id, best_at = i;
      }
    }
    if (best_id < 0) return tokens;
    tokens[best_at] = best_id;
    tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
  }
}

}  // namespace

TEST_CASE("the byte tokenizer maps every byte to itself", "[examples]") {
  const llama::byte_tokenizer bytes;
  std::string text;
  for (int b = 0; b < 256; ++b) text += static_cast<char>(b);
  const ids tokens = bytes.encode(text);
  REQUIRE(tokens.size() == 256);
  std::string back;
  for (index_t b = 0; b < 256; ++b) {
    CHECK(tokens[static_cast<std::size_t>(b)] == b);
    back += bytes.decode(0, b);
  }
  CHECK(back == text);
  CHECK(bytes.encode("").empty());
}

TEST_CASE("pairs are joined by score, and a space goes before the text", "[examples]") {
  const auto tokenizer =
      tokenizer_of({{" ", -9.0f}, {"a", -9.0f}, {"b", -9.0f}, {"ab", -2.0f}, {"ba", -1.0f}, {" ab", -3.0f}});
  const index_t space = 259, a = 260, b = 261, ab = 262, ba = 263, space_ab = 264;
  CHECK(tokenizer.encode("") == ids{1});
  CHECK(tokenizer.encode("ab") == ids{1, space_ab});
  CHECK(tokenizer.encode("ba") == ids{1, space, ba});
  CHECK(tokenizer.encode("aba") == ids{1, space, a, ba});  // ba scores higher than ab
  CHECK(tokenizer.encode("abab") == ids{1, space, a, ba, b});
  CHECK(tokenizer.encode("bb") == ids{1, space, b, b});
  CHECK(tokenizer.encode("xab") == ids{1, space, 3 + 'x', ab});
  CHECK(decoded(tokenizer, tokenizer.encode("abab")) == "abab");
  CHECK(tokenizer.decode(1, space_ab) == "ab");  // the space that encoding put there
  CHECK(tokenizer.decode(a, space_ab) == " ab");
  CHECK(tokenizer.decode(a, 2).empty());
  CHECK_THROWS_AS(tokenizer.decode(a, 265), std::out_of_range);
  CHECK_THROWS_AS(tokenizer.decode(a, -1), std::out_of_range);
}

TEST_CASE("characters of several bytes are tokens or fall back to bytes", "[examples]") {
  const auto tokenizer = tokenizer_of({{" ", -9.0f}, {"\xc3\xa9", -1.0f}});
  CHECK(tokenizer.encode("\xc3\xa9") == ids{1, 259, 260});
  CHECK(tokenizer.encode("\xc3\xa8") == ids{1, 259, 3 + 0xc3, 3 + 0xa8});
  CHECK(tokenizer.encode("\xc3") == ids{1, 259, 3 + 0xc3});
  CHECK(tokenizer.encode("\xa9\xa9") == ids{1, 259, 3 + 0xa9, 3 + 0xa9});
  std::string every;
  for (int b = 0; b < 256; ++b) every += static_cast<char>(b);
  CHECK(decoded(tokenizer, tokenizer.encode(every)) == every);
}

TEST_CASE("joining with a queue gives what rescanning gives", "[examples]") {
  const token_list more{{" ", -90.0f}, {"a", -90.0f},  {"b", -90.0f},  {"c", -90.0f},
                        {"ab", -3.0f}, {"bc", -3.0f},  {"abc", -8.0f}, {"ca", -5.0f},
                        {"aa", -4.0f}, {"bca", -1.0f}, {" a", -2.0f},  {"caab", -1.5f}};
  auto all = byte_tokens();
  all.insert(all.end(), more.begin(), more.end());
  const auto tokenizer = tokenizer_of(more);
  test::random random;
  for (int round = 0; round < 300; ++round) {
    std::string text;
    ids pieces{1, 259};
    const index_t length = 1 + static_cast<index_t>(random.below(24));
    for (index_t i = 0; i < length; ++i) {
      const auto letter = static_cast<index_t>(random.below(3));
      text += static_cast<char>('a' + letter);
      pieces.push_back(260 + letter);
    }
    CAPTURE(text);
    CHECK(tokenizer.encode(text) == joined_by_rescanning(all, pieces));
    CHECK(decoded(tokenizer, tokenizer.encode(text)) == text);
  }
}

TEST_CASE("a long text is encoded in reasonable time", "[examples]") {
  const auto tokenizer =
      tokenizer_of({{" ", -9.0f}, {"a", -9.0f}, {"aa", -1.0f}, {"aaaa", -2.0f}, {"aaaaaaaa", -3.0f}});
  const std::string text(200000, 'a');
  const ids tokens = tokenizer.encode(text);
  CHECK(tokens.size() < 30000);
  CHECK(decoded(tokenizer, tokens) == text);
}

TEST_CASE("a tokenizer is found beside its model, or its absence is an error", "[examples]") {
  const temporary_folder folder;
  const auto model = folder.write("model.bin", "");
  CHECK_THROWS_AS(llama::load_tokenizer(model, "", 259), llama::model_error);
  CHECK_THROWS_AS(llama::load_tokenizer(model, folder.path() / "nowhere.bin", 259), llama::model_error);
  CHECK(llama::load_tokenizer(model, "", 256).encode("A") == ids{65});
  folder.write("tok259.bin", tokenizer_bytes(byte_tokens()));
  CHECK(llama::load_tokenizer(model, "", 259).encode("A") == ids{1, 3 + 'A'});
  CHECK(llama::load_tokenizer(folder.path(), "", 259).encode("A") == ids{1, 3 + 'A'});
}
