// SPDX-License-Identifier: MIT
// The input is a safetensors file. Whatever it holds, opening it refuses with model_error or yields tensors that cover
// the data exactly; each that can be converted is read, and every other refused.
#include "fuzz/input_as_file.hpp"
#include "llama/safetensors.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

/// Elements of a tensor, which its bytes in the file have been checked against.
std::size_t num_elements(const llama::tensor_info& info) {
  return static_cast<std::size_t>((info.end - info.begin) / llama::element_bytes(info.dtype));
}

void read_all(llama::safetensors_file& file, std::size_t file_bytes) {
  std::uint64_t covered = 0;
  for (const auto& [name, info] : file.tensors()) {
    fuzz::require(info.begin <= info.end && info.end <= file_bytes, "a tensor lies in the file");
    covered += info.end - info.begin;
    const std::size_t size = num_elements(info);
    try {
      file.require(name, info.shape);
      std::vector<float> out(size);
      file.read(name, out);
    } catch (const llama::model_error&) {  // of a type it does not convert, or not finite
    }
  }
  fuzz::require(covered <= file_bytes, "tensors do not overlap");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto path = fuzz::input_as_file("model.safetensors", {data, size});
  try {
    llama::safetensors_file file(path);
    read_all(file, size);
  } catch (const llama::model_error&) {
  }
  return 0;
}
