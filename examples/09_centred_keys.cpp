// SPDX-License-Identifier: MIT
// Keys that have much in common before RoPE, as those of many models do, in 3 bits: as they come, and without their mean.
#include <kvcache/attention/rope.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/kvcache.hpp>

#include "common/splitmix64.hpp"

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

using namespace kvcache;

std::vector<float> noise(program::splitmix64& random, index_t count, float size) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& each : x) each = size * static_cast<float>(2 * random.unit() - 1);
  return x;
}

int main() {
  const cache_shape shape{.num_layers = 1, .num_kv_heads = 1, .head_dim = 128};
  const rope_config rope_of_model{.head_dim = 128, .pairing = rope_pairing::half, .theta = 5e5};
  const rope_table table(rope_of_model);

  using three_bits = codec::exact_tail<codec::centred<codec::trellis<3>>>;
  chunked_cache<three_bits> typed(shape, three_bits(codec::centred<codec::trellis<3>>(rope_of_model)));
  auto exact = make_cache("chunked/f32", shape);
  auto plain = make_cache("chunked/trellis3,tail=128", shape);
  auto centred = make_cache("chunked/centred_trellis3,rope=half:500000,tail=128", shape);

  program::splitmix64 random(1);
  const std::vector<float> common = noise(random, 128, 1.5F);
  std::vector<float> q;
  for (index_t pos = 0; pos < 1024; ++pos) {
    std::vector<float> k = noise(random, 128, 1.0F);
    for (std::size_t d = 0; d < k.size(); ++d) k[d] += common[d];
    q = noise(random, 128, 1.0F);
    rope(q, k, pos, table);
    const std::vector<float> v = noise(random, 128, 1.0F);
    typed[0].append(k, v);
    for (any_cache* cache : {&exact, &plain, &centred}) (*cache)[0].append(k, v);
  }

  std::vector<float> expected(512 * 128), k(expected.size()), v(expected.size()), out(128);
  exact[0].copy_out(0, 512, expected, v);
  const auto error = [&](const auto& layer) {  // of keys that are no longer exact
    layer.copy_out(0, 512, k, v);
    double off = 0;
    double size = 0;
    for (std::size_t i = 0; i < k.size(); ++i) {
      off += std::pow(k[i] - expected[i], 2);
      size += std::pow(expected[i], 2);
    }
    return off / size;
  };
  const double ratio = error(plain[0]) / error(centred[0]);
  std::printf("the typed cache and that of the string agree: %s\n",
              error(typed[0]) == error(centred[0]) ? "yes" : "no");
  std::printf("squared error of keys, plain over centred: %s\n", ratio > 3 ? "more than 3" : "3 or less");
  std::printf("bytes more for a block of 64 tokens: %td\n",
              (centred.bytes().payload - plain.bytes().payload) / (1024 / 64 - 2));
  attend(q, centred[0], out);  // as over any other cache
}
