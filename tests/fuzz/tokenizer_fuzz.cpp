// SPDX-License-Identifier: MIT
// The input is a size of vocabulary (two bytes, least significant first) and a llama2.c tokenizer file: refused with
// model_error, or a tokenizer that encodes any text into its vocabulary and decodes every token.
#include "fuzz/input_as_file.hpp"
#include "llama/bpe_tokenizer.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace {

std::string decoded(const llama::bpe_tokenizer& tokenizer, const std::vector<llama::index_t>& ids) {
  std::string text;
  for (std::size_t i = 1; i < ids.size(); ++i) text += tokenizer.decode(ids[i - 1], ids[i]);
  return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const auto vocab_size = static_cast<llama::index_t>(data[0] + 256 * data[1]);
  const auto path = fuzz::input_as_file("tokenizer.bin", {data + 2, size - 2});
  try {
    const llama::bpe_tokenizer tokenizer(path, vocab_size);
    for (const std::string text : {"", "To be, or not", "a\xC3\xA9\xFF\n  b", "\xE2\x82"}) {
      const auto ids = tokenizer.encode(text);
      for (const llama::index_t id : ids)
        fuzz::require(0 <= id && id < vocab_size, "an id lies in the vocabulary");
      (void)decoded(tokenizer, ids);
    }
    for (llama::index_t id = 0; id < vocab_size; ++id) (void)tokenizer.decode(id / 2, id);
  } catch (const llama::model_error&) {
  }
  return 0;
}
