// SPDX-License-Identifier: MIT
// An attention layer, its weights Eigen matrices: the same answer with a cache, token by token, or without.
#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/kvcache.hpp>

#include <cstdio>
#include <utility>

namespace {

using kvcache::index_t;
using kvcache::matrix;

/// Numbers in [-1, 1], the same on every machine.
matrix numbers(index_t rows, index_t cols, float scale) {
  unsigned state = static_cast<unsigned>(rows * 131 + cols);
  return matrix::NullaryExpr(rows, cols, [&](Eigen::Index, Eigen::Index) {
    state = state * 1664525u + 1013904223u;
    return scale * (static_cast<float>(state >> 16) / 32768.0f - 1.0f);
  });
}

}  // namespace

int main() {
  constexpr index_t hidden = 256, num_q_heads = 8, num_kv_heads = 2, head_dim = 32, num_tokens = 150;
  kvcache::attention_weights weights;
  weights.wq = numbers(num_q_heads * head_dim, hidden, 0.1f);
  weights.wk = numbers(num_kv_heads * head_dim, hidden, 0.1f);
  weights.wv = numbers(num_kv_heads * head_dim, hidden, 0.1f);
  weights.wo = numbers(hidden, num_q_heads * head_dim, 0.1f);
  kvcache::attention_config config{
      .num_q_heads = num_q_heads, .num_kv_heads = num_kv_heads, .head_dim = head_dim};
  config.rope = {.head_dim = head_dim, .pairing = kvcache::rope_pairing::half};
  const kvcache::multi_head_attention attention(std::move(weights), config);

  const matrix x = numbers(num_tokens, hidden, 1.0f);  // [tokens, hidden]
  const matrix whole = attention.forward(x);           // without a cache

  kvcache::contiguous_cache<kvcache::codec::f32> cache{{.num_kv_heads = num_kv_heads, .head_dim = head_dim}};
  matrix pieces(num_tokens, hidden);
  pieces.topRows(100) = attention.forward(x.topRows(100), cache[0]);  // prefill
  for (index_t t = 100; t < num_tokens; ++t) {
    pieces.row(t) = attention.forward(x.row(t), cache[0]);  // decode: the same call
  }
  const float difference = (whole - pieces).cwiseAbs().maxCoeff() / whole.cwiseAbs().maxCoeff();
  std::printf("tokens in the cache             %td\n", cache.size());
  std::printf("cached and uncached agree       %s\n", difference < 1e-5f ? "yes, to 5 digits" : "no");
}
