// SPDX-License-Identifier: MIT
// The weights of a model as float matrices, row-major, [out, in] as in y = W x.
#pragma once

#include "llama/model_config.hpp"

#include <Eigen/Core>

#include <vector>

namespace llama {

using kvcache::matrix;  // Eigen, row-major, float

struct layer_weights {
  Eigen::VectorXf attention_norm;        // [hidden]
  kvcache::attention_weights attention;  // wq, wk, wv, wo and what else the library's attention knows
  Eigen::VectorXf mlp_norm;              // [hidden]
  matrix w_gate;                         // [mlp, hidden]
  matrix w_up;                           // [mlp, hidden]
  matrix w_down;                         // [hidden, mlp]
};

struct model_weights {
  matrix embedding;                   // [vocab, hidden]
  std::vector<layer_weights> layers;  // [num_layers]
  Eigen::VectorXf final_norm;         // [hidden]
  matrix output;                      // [vocab, hidden]; 0 x 0 when tied to the embedding
};

/// What a loader returns.
struct model {
  model_config config;
  model_weights weights;
};

}  // namespace llama
