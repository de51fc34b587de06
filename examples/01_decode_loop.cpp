// SPDX-License-Identifier: MIT
// The loop of a decoder: rotate, append, attend, in every layer. One sequence, 8 query heads on 2 KV heads.
#include <kvcache/kvcache.hpp>

#include <cstdio>
#include <vector>

namespace {

using kvcache::index_t;

/// Stands for the matrix products of a model: some numbers for this token and layer.
void project(index_t pos, index_t layer, std::vector<float>& out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<float>((static_cast<index_t>(i) * 7 + pos * 13 + layer * 5) % 23 - 11) / 8.0f;
  }
}

}  // namespace

int main() {
  constexpr index_t num_layers = 4, num_q_heads = 8, num_kv_heads = 2, head_dim = 64;
  std::vector<float> q(num_q_heads * head_dim), k(num_kv_heads * head_dim), v(k.size()), out(q.size());

  // README begin
  kvcache::contiguous_cache<> cache{
      {.num_layers = num_layers, .num_kv_heads = num_kv_heads, .head_dim = head_dim}};
  const kvcache::rope_table table{{.head_dim = head_dim, .pairing = kvcache::rope_pairing::half}};
  for (index_t pos = 0; pos < 100; ++pos) {
    for (index_t layer = 0; layer < num_layers; ++layer) {
      project(pos, layer, q), project(pos, layer, k), project(pos, layer, v);  // q [8, 64], k and v [2, 64]
      kvcache::rope(q, k, pos, table);                                         // in place
      cache[layer].append(k, v);                                               // one token or many
      kvcache::attend(q, cache[layer], out);                                   // causal; all query heads
    }
  }
  // README end

  const auto memory = cache.bytes();
  std::printf("tokens           %td\n", cache.size());
  std::printf("bytes per token  %td = 2 x 4 layers x 2 KV heads x 64 dimensions x 2 bytes\n",
              memory.payload / cache.size());
  std::printf("out, head 0      %.2f %.2f %.2f ...\n", out[0], out[1], out[2]);
}
