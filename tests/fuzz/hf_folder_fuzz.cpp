// SPDX-License-Identifier: MIT
// The input is a Hugging Face folder: config.json up to the first zero byte, model.safetensors after it. Refused with
// model_error, or loaded.
#include "fuzz/input_as_file.hpp"
#include "llama/hf_loader.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::uint8_t> bytes(data, size);
  const auto config_size = static_cast<std::size_t>(std::find(bytes.begin(), bytes.end(), 0) - bytes.begin());
  const auto config = fuzz::input_as_file("config.json", bytes.first(config_size));
  fuzz::input_as_file("model.safetensors", bytes.subspan(std::min(config_size + 1, size)));
  try {
    const llama::model model = llama::load_hf_folder(config.parent_path());
    kvcache::validate(llama::cache_shape_of(model.config));
    (void)kvcache::rope_table(model.config.rope);
  } catch (const llama::model_error&) {
  }
  return 0;
}
