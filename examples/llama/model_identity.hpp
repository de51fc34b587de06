// SPDX-License-Identifier: MIT
// Which model keys and values are of, as files and tiers remember it.
#pragma once

#include "llama/model_config.hpp"

#include <kvcache/interop/rope_identity.hpp>
#include <kvcache/store/crc32c.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/identity.hpp>

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace llama {

/// What must be the same for keys and values of one run to be of use in another: the weights, by their checksum, and the
/// rotation. \param model  Hugging Face folder or llama2.c checkpoint file. Reads the weights once.
[[nodiscard]] inline kvcache::store::identity identity_of(const std::filesystem::path& model,
                                                          const model_config& config) {
  const kvcache::store::file_source file(std::filesystem::is_directory(model) ? model / "model.safetensors"
                                                                              : model);
  std::vector<std::byte> bytes(static_cast<std::size_t>(file.size()));
  file.read(0, bytes);
  return {.model = "crc32c " + std::to_string(kvcache::store::crc32c(bytes)),
          .rope = kvcache::store::rope_identity_of(config.rope)};
}

}  // namespace llama
