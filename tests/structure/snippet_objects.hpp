// SPDX-License-Identifier: MIT
// What the code in README.md and docs/ takes for granted. check_snippets.cmake puts each block behind it into a function of
// a struct over snippet_objects, so that a block may have names of its own for the same things.
#pragma once

#include <kvcache/codec/low_rank.hpp>
#include <kvcache/kvcache.hpp>

#include <span>
#include <vector>

using namespace kvcache;

struct snippet_objects {
  static constexpr index_t num_layers = 4, num_kv_heads = 2, head_dim = 64, layer = 0, budget = 1024;
  using cache_type = chunked_cache<>;

  cache_shape shape;
  cache_type cache;
  rope_table rope;
  std::vector<float> q, k, v, out, lse, weights;
  std::vector<token_id> tokens, prompt;
  store::identity who;

  void project(index_t pos, index_t of_layer, std::span<float> row);
};
