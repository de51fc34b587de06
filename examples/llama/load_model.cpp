// SPDX-License-Identifier: MIT
#include "llama/load_model.hpp"

#include "llama/hf_loader.hpp"
#include "llama/llama2c_loader.hpp"

#include <filesystem>
#include <new>
#include <system_error>

namespace llama {

model load_model(const std::filesystem::path& path) {
  if (path.extension() == ".safetensors") {
    throw model_error(path, "", "is the weights only; name its folder, which has a config.json as well");
  }
  std::error_code unreadable;  // then the loader of files says what is wrong
  try {
    return std::filesystem::is_directory(path, unreadable) ? load_hf_folder(path) : load_llama2c(path);
  } catch (const std::bad_alloc&) {  // consistent, and larger than this machine
    throw model_error(path, "weights", "do not fit in memory");
  }
}

}  // namespace llama
