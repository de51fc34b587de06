// SPDX-License-Identifier: MIT
// Codecs against bf16: attention over both in the same loop, each over a ring of its own, and what encoding a token costs.
#include <kvcache/attention/attend.hpp>
#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/klt.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/kernel/select.hpp>

#include "support/check.hpp"
#include "support/layouts.hpp"
#include "support/measure.hpp"
#include "support/noise.hpp"
#include "support/pin.hpp"
#include "support/ring.hpp"
#include "support/rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvcache::bench {
namespace {

constexpr index_t head_dim = 128;
constexpr index_t num_q_heads = 32;

/// Keys turn as those of Llama 3 do.
template <class Codec>
struct turning : codec::centred<Codec> {
  turning() : codec::centred<Codec>({.head_dim = head_dim, .pairing = rope_pairing::half, .theta = 5e5}) {}
};

/// Tokens whose dims are the less the further back they are, so that components have energies to be sorted by.
codec::low_rank_calibration falling_rows(const cache_shape& shape) {
  constexpr index_t tokens = 256;
  const noise rows(shape.num_kv_heads * shape.head_dim);
  codec::low_rank_calibration seen(shape);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const auto k = rows.keys(0, tokens);
    const auto v = rows.values(0, tokens);
    std::vector<float> keys(k.begin(), k.end());
    std::vector<float> values(v.begin(), v.end());
    for (auto* side : {&keys, &values}) {
      for (std::size_t i = 0; i < side->size(); ++i)
        (*side)[i] *= std::pow(0.97F, static_cast<float>(i % static_cast<std::size_t>(head_dim)));
    }
    seen.add(layer, keys, values);
  }
  return seen;
}

/// Half of the components, in bytes.
struct half_rank : codec::low_rank {
  using codec::low_rank::low_rank;
  static half_rank for_shape(const cache_shape& shape) {
    return half_rank(falling_rows(shape).bases({.rank = head_dim / 2}));
  }
};

/// klt of 3.25 bits without all_sizes: of keys and values a tenth in 6 bits, half in 4, a quarter in 2 and the rest in none, as a
/// layer of a model is stored. Noise has no components that matter more: these are its dims.
struct klt_of_3_bits : codec::klt {
  using codec::klt::klt;
  static klt_of_3_bits for_shape(const cache_shape& shape) {
    codec::low_rank_matrices made{.key_layout = {.bits6 = 12, .bits4 = 68, .bits2 = 28},
                                  .value_layout = {.bits6 = 16, .bits4 = 64, .bits2 = 32}};
    const auto add_dims = [&](index_t rank, std::vector<float>& matrix, std::vector<float>& spreads) {
      for (index_t i = 0; i < rank; ++i) {
        for (index_t d = 0; d < shape.head_dim; ++d) matrix.push_back(d == i ? 1.0F : 0.0F);
      }
      spreads.insert(spreads.end(), static_cast<std::size_t>(rank), 1.0F);
    };
    for (index_t i = 0; i < shape.num_layers * shape.num_kv_heads; ++i) {
      add_dims(made.key_layout.rank(), made.keys_in, made.key_spreads);
      add_dims(made.value_layout.rank(), made.values, made.value_spreads);
    }
    return klt_of_3_bits(std::make_shared<const codec::low_rank_bases>(shape, made));
  }
};

/// The same codec behind any_codec, as make_cache chooses it at run time.
template <class Codec>
struct at_run_time : any_codec {
  static at_run_time for_shape(const cache_shape& shape) {
    const Codec typed = codec_for<Codec>(shape);
    at_run_time made;
    made.keys = codec::any_keys::of(typed.keys);
    made.values = codec::any_values::of(typed.values);
    return made;
  }
};

struct codec_case {
  index_t kv_heads;
  index_t kv_len;
  index_t threads;
  kernel::isa isa;
  double max_error;  ///< of the output, relative

  [[nodiscard]] ring_size ring() const { return {{.num_kv_heads = kv_heads, .head_dim = head_dim}, kv_len}; }
};

using bf16_ring = kv_ring<contiguous, codec::bf16>;

/// The ring to compare with; kept beside that of the row, which shared_ring holds.
bf16_ring& ring_to_compare_with(const ring_size& size) {
  static std::unique_ptr<bf16_ring> ring;
  static index_t kv_heads = 0;
  static index_t kv_len = 0;
  if (ring == nullptr || kv_heads != size.shape.num_kv_heads || kv_len != size.kv_len) {
    ring = nullptr;  // there is memory for one
    ring = std::make_unique<bf16_ring>(size);
    kv_heads = size.shape.num_kv_heads;
    kv_len = size.kv_len;
  }
  return *ring;
}

template <class Codec>
void run_decode(benchmark::State& state, const codec_case& c) {
  auto& ring = shared_ring<contiguous, Codec>(c.ring());
  auto& plain = ring_to_compare_with(c.ring());
  attend_workspace workspace;
  const attend_options options{.kernel = &kernel::select(c.isa), .workspace = &workspace};
  const auto q = noise::queries(num_q_heads * head_dim);
  std::vector<float> out(q.size());
  auto& workers = pinned_workers(c.threads);

  const double error = ring.remembered("error " + std::string(kernel::to_string(c.isa)), [&] {
    attend(q, ring.layer(0), std::span(out), options, workers);
    return error_against_reference({1, c.kv_len, num_q_heads, c.kv_heads, head_dim},
                                   noise(c.kv_heads * head_dim), q, out);
  });
  if (!(error <= c.max_error)) return state.SkipWithError("the result is wrong");

  measured what{.op = [&](index_t i) { attend(q, ring.layer(i), std::span(out), options, workers); }};
  what.compare.push_back([&](index_t i) { attend(q, plain.layer(i), std::span(out), options, workers); });
  what.compare.push_back([&](index_t i) { ring.read(ring.far_from(i), c.threads); });
  const medians m = measure(state, what);

  const auto values = static_cast<double>(2 * c.kv_len * c.kv_heads * head_dim);
  state.counters["times_bf16"] = m.compare[0] / m.op;
  state.counters["roof_pct"] = 100 * m.compare[1] / m.op;
  state.counters["bits_per_value"] = 8 * static_cast<double>(ring.step_bytes()) / values;
  state.counters["ns_per_token_and_head"] = 1e9 * m.op / static_cast<double>(c.kv_len * c.kv_heads);
  state.counters["rel_err"] = error;
}

/// One token of 8 heads after the other; blocks are sealed on the way.
template <class Codec>
void run_encode(benchmark::State& state, kernel::isa isa) {
  constexpr index_t kv_heads = 8;
  constexpr index_t tokens = 256;
  auto cache = chunked::make<Codec>({.num_layers = 1, .num_kv_heads = kv_heads, .head_dim = head_dim}, 0);
  cache.use_kernels(kernel::select(isa));
  fill(cache, 512);
  const noise rows(kv_heads * head_dim);
  measured what;
  what.op = [&](index_t) {
    for (index_t t = 0; t < tokens; ++t) cache[0].append(rows.keys(t, 1), rows.values(t, 1));
  };
  what.restore = [&](index_t) { cache.truncate(512); };
  what.ops_per_sample = tokens;
  const medians m = measure(state, what);
  state.counters["us_per_token"] = 1e6 * m.op;
}

/// \param max_error  half as much again as was seen; below 1, which an output of zeros has. Noise averages out, so what is left
///                   of the output is small beside the numbers it is made of.
template <class Codec>
void add_rows(std::string_view name, double max_error) {
  for (const index_t kv_heads : {8, 4}) {  // groups of 4 and 8 query heads
    for (const index_t kv_len : {16384, 65536}) {
      for (const kernel::isa isa : kernel::available()) {
        if (isa == kernel::isa::portable) continue;
        for (const index_t threads : thread_counts()) {
          const codec_case c{kv_heads, kv_len, threads, isa, max_error};
          register_row(row_name("codec_decode")
                           .add("codec", name)
                           .add("cache", contiguous::name)
                           .add("heads", num_q_heads)
                           .add("kv_heads", kv_heads)
                           .add("dim", head_dim)
                           .add("kv_len", kv_len)
                           .add("isa", kernel::to_string(isa))
                           .add("threads", threads),
                       [c](benchmark::State& state) { run_decode<Codec>(state, c); });
        }
      }
    }
  }
  for (const kernel::isa isa : kernel::available()) {
    register_row(row_name("codec_encode").add("codec", name).add("isa", kernel::to_string(isa)),
                 [isa](benchmark::State& state) { run_encode<Codec>(state, isa); });
  }
}

}  // namespace

void register_rows() {
  using namespace codec;
  add_rows<int8>("int8", 0.013);
  add_rows<rotated<4>>("rotated4", 0.22);
  add_rows<rotated<3>>("rotated3", 0.4);
  add_rows<mixed<channel<4>, rotated<4>>>("channel4+rotated4", 0.2);
  add_rows<mixed<channel<3>, rotated<3>>>("channel3+rotated3", 0.4);
  add_rows<mixed<balanced<4>, rotated<4>>>("balanced4+rotated4", 0.22);
  add_rows<mixed<balanced<3>, rotated<3>>>("balanced3+rotated3", 0.4);
  add_rows<mixed<balanced<2>, rotated<2>>>("balanced2+rotated2", 0.7);
  add_rows<rotated<2>>("rotated2", 0.7);
  add_rows<turning<int8>>("centred_int8", 0.02);
  add_rows<turning<rotated<4>>>("centred_rotated4", 0.22);
  add_rows<turning<trellis<3>>>("centred_trellis3", 0.33);
  add_rows<turning<trellis<2>>>("centred_trellis2", 0.6);
  add_rows<klt_of_3_bits>("klt3.25", 0.8);
  add_rows<half_rank>("low_rank64", 0.95);
  add_rows<trellis<4>>("trellis4", 0.18);
  add_rows<trellis<3>>("trellis3", 0.33);
  add_rows<trellis<2>>("trellis2", 0.6);
  add_rows<at_run_time<int8>>("any:int8", 0.013);
  add_rows<at_run_time<rotated<4>>>("any:rotated4", 0.22);
  add_rows<at_run_time<klt_of_3_bits>>("any:klt3.25", 0.8);
  add_rows<exact_sinks<exact_tail<mixed<channel<4>, rotated<4>>>>>("channel4+rotated4,sinks=4,tail=128", 0.2);
}

}  // namespace kvcache::bench
