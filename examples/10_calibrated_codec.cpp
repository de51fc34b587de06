// SPDX-License-Identifier: MIT
// klt: watch what a model's keys, values and queries look like, share out three bits where they matter, and keep the bases.
#include <kvcache/attention/rope.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/klt.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/kvcache.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/save.hpp>

#include "common/splitmix64.hpp"

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <vector>

using namespace kvcache;

/// Stands for a forward pass: rows whose dims matter less and less, mixed among their neighbours, around a common mean.
std::vector<float> rows(program::splitmix64& random, index_t count, float mean) {
  std::vector<float> x(static_cast<std::size_t>(count * 64), mean);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float size = 2 * std::exp(-static_cast<float>(i % 64) / 12);
    x[i] += size * static_cast<float>(2 * random.unit() - 1) + (i % 64 > 0 ? (x[i - 1] - mean) / 2 : 0);
  }
  return x;
}

int main() {
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 64};
  const rope_config rope_of_model{.head_dim = 64, .pairing = rope_pairing::half, .theta = 1e4};
  const rope_table table(rope_of_model);
  const codec::rope_turns turns(rope_of_model);
  program::splitmix64 random(1);
  const auto rotated = [&](std::vector<float> k) {
    for (index_t pos = 0; pos < 1024; ++pos)
      rope({}, std::span(k).subspan(static_cast<std::size_t>(pos) * 64, 64), pos, table);
    return k;
  };

  // What the bases are made from: some texts, every layer. Keys as they are appended, less the means that `centred` takes off.
  codec::low_rank_calibration seen(shape);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    std::vector<float> k = rotated(rows(random, 1024, 1.0F));
    codec::take_off_means(k, shape, &turns);
    seen.add(layer, k, rows(random, 1024, 0.0F));
    seen.add_queries(layer, rotated(rows(random, 1024, 0.5F)), 1);
  }
  const auto bases = codec::klt_bases(seen, {.bits_per_value = 3, .centred = true});

  using three_bits = codec::exact_tail<codec::centred<codec::klt>>;
  chunked_cache<three_bits> cache(shape,
                                  three_bits(codec::centred<codec::klt>(rope_of_model, codec::klt(bases))));
  chunked_cache<codec::exact_tail<codec::trellis<3>>> plain(shape);

  // The codec, bases included, is part of every file; that of an empty cache keeps it for later.
  const auto file = std::filesystem::temp_directory_path() / "kvcache_klt_bases.kv";
  store::save(cache, {}, file);
  chunked_cache<three_bits> later(shape, store::load<chunked_cache<three_bits>>(file).cache.codec());
  std::filesystem::remove(file);

  const std::vector<float> k = rotated(rows(random, 1024, 1.0F));
  const std::vector<float> v = rows(random, 1024, 0.0F);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    later[layer].append(k, v);
    plain[layer].append(k, v);
  }
  const auto error = [&](const auto& layer) {
    std::vector<float> back(512 * 64), values(512 * 64);
    layer.copy_out(0, 512, back, values);
    double off = 0;
    for (std::size_t i = 0; i < back.size(); ++i)
      off += std::pow(back[i] - k[i], 2) + std::pow(values[i] - v[i], 2);
    return off;
  };
  const double ratio = error(plain[0]) / error(later[0]);
  std::printf("squared error, trellis3 over klt of 3 bits: %s\n", ratio > 3 ? "more than 3" : "3 or less");
  std::printf("klt takes no more memory: %s\n",
              later.bytes().payload <= plain.bytes().payload ? "yes" : "no");
}
