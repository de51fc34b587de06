// SPDX-License-Identifier: MIT
// The input is a cache spec, as a user types it: make_cache and make_codec refuse it with std::invalid_argument, or the
// cache takes tokens and is attended over.
#include "fuzz/input_as_file.hpp"

#include <kvcache/interop/any_cache.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr kvcache::cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 16, .block_size = 16};

void use(kvcache::any_cache cache) {
  constexpr kvcache::index_t num_tokens = 40;  // two blocks and a half
  std::vector<float> rows(static_cast<std::size_t>(num_tokens * shape.head_dim));
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 7) - 3.0F;
  for (kvcache::index_t layer = 0; layer < shape.num_layers; ++layer) {
    if (cache[layer].try_append(rows, rows) != kvcache::status::ok) return;
  }
  cache.check();
  fuzz::require(cache.bytes().total < 64 << 20, "a spec does not ask for memory beyond 65536 exact tokens");
  fuzz::require(cache.size() == num_tokens, "a cache holds what was appended");
  std::vector<float> out(static_cast<std::size_t>(shape.head_dim));
  kvcache::attend(std::span(rows).first(out.size()), cache[0], std::span(out));
  for (const float x : out) fuzz::require(std::isfinite(x), "attention over finite numbers is finite");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string spec(reinterpret_cast<const char*>(data), size);
  try {
    (void)kvcache::make_codec(spec);
  } catch (const std::invalid_argument&) {
  }
  try {
    use(kvcache::make_cache(spec, shape));
  } catch (const std::invalid_argument&) {
  }
  return 0;
}
