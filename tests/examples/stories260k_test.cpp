// SPDX-License-Identifier: MIT
// stories260K, a llama2.c checkpoint that is not part of the project, writes the text published with it.
// KVCACHE_REAL_DIR names the folder with models/stories260K.bin and models/tok512.bin; without them nothing
// is tested.
#include "support/catch.hpp"

#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/load_model.hpp"
#include "llama/tokenizer.hpp"

#include <kvcache/interop/any_cache.hpp>

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace {

using llama::index_t;

std::optional<std::filesystem::path> models_folder() {
  const char* set = std::getenv("KVCACHE_REAL_DIR");
  const auto real = set != nullptr ? std::filesystem::path(set)
                                   : std::filesystem::path(KVCACHE_SOURCE_DIR) / "../shared/real";
  const auto models = real / "models";
  if (std::filesystem::exists(models / "stories260K.bin") && std::filesystem::exists(models / "tok512.bin"))
    return models;
  WARN("skipped: no stories260K.bin and tok512.bin in " << models.string() << "; set KVCACHE_REAL_DIR");
  return std::nullopt;
}

const std::vector<index_t> published_ids{
    403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337,
    410, 408, 419, 292, 411, 322, 265, 282, 295, 433, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352,
    266, 268, 388, 426, 338, 391, 266, 267, 337, 335, 312, 432, 398, 312, 286, 267, 414, 270, 333, 415};
const std::string published_text =
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a "
    "big, red ball. She wanted to play with it, but it was too high";

}  // namespace

TEST_CASE("stories260K writes the published tokens through every f32 cache", "[examples]") {
  const auto folder = models_folder();
  if (!folder) return;
  const llama::decoder model(llama::load_model(*folder / "stories260K.bin"));
  const auto text = llama::load_tokenizer(*folder / "stories260K.bin", "", model.config().vocab_size);
  const auto prompt = text.encode("");
  REQUIRE(prompt == std::vector<index_t>{1});
  kvcache::serial_executor serial;
  for (const std::string spec : {"contiguous/f32", "chunked/f32", "paged/f32"}) {
    auto cache = kvcache::make_cache(spec, llama::cache_shape_of(model.config()));
    std::string written;
    llama::generation_events events;
    events.chosen = [&](index_t previous, index_t id) { written += text.decode(previous, id); };
    const auto result = llama::generate(
        model, prompt, cache,
        {.num_tokens = static_cast<index_t>(published_ids.size()), .sampling = {.temperature = 0}}, serial,
        events);
    CAPTURE(spec);
    CHECK(std::vector<index_t>(result.tokens.begin() + 1, result.tokens.end()) == published_ids);
    CHECK(written == published_text);
  }
}

TEST_CASE("its tokenizer encodes the text back to the published tokens", "[examples]") {
  const auto folder = models_folder();
  if (!folder) return;
  const auto text = llama::load_tokenizer(*folder / "stories260K.bin", "", 512);
  std::vector<index_t> expected{1};
  expected.insert(expected.end(), published_ids.begin(), published_ids.end());
  CHECK(text.encode(published_text) == expected);
}
