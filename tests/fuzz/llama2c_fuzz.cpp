// SPDX-License-Identifier: MIT
// The input is a llama2.c checkpoint: refused with model_error, or loaded into matrices that the file had room for.
#include "fuzz/input_as_file.hpp"
#include "llama/llama2c_loader.hpp"

#include <cstddef>
#include <cstdint>

namespace {

std::size_t weight_bytes(const llama::model& model) {
  auto floats =
      model.weights.embedding.size() + model.weights.output.size() + model.weights.final_norm.size();
  for (const auto& layer : model.weights.layers) {
    const auto& attention = layer.attention;
    floats += layer.attention_norm.size() + layer.mlp_norm.size();
    floats += attention.wq.size() + attention.wk.size() + attention.wv.size() + attention.wo.size();
    floats += layer.w_gate.size() + layer.w_up.size() + layer.w_down.size();
  }
  return static_cast<std::size_t>(floats) * sizeof(float);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto path = fuzz::input_as_file("model.bin", {data, size});
  try {
    const llama::model model = llama::load_llama2c(path);
    fuzz::require(weight_bytes(model) < size, "the weights are no larger than the file");
    kvcache::validate(llama::cache_shape_of(model.config));
    (void)kvcache::rope_table(model.config.rope);
  } catch (const llama::model_error&) {
  }
  return 0;
}
