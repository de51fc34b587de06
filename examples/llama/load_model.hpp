// SPDX-License-Identifier: MIT
// A folder is read as Hugging Face, a file as a llama2.c checkpoint. The readers of both, and of JSON, are compiled once, in
// load_model.cpp.
#pragma once

#include "llama/model_error.hpp"
#include "llama/weights.hpp"

#include <filesystem>

namespace llama {

/// Throws model_error, whatever is wrong with the files.
[[nodiscard]] model load_model(const std::filesystem::path& path);

}  // namespace llama
