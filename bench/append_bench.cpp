// SPDX-License-Identifier: MIT
// Appending one token and 512 tokens to every layer, beside a memcpy of the same float rows into flat arrays.
//
// Both work on warm memory: the sequence grows to kv_len, is cut back and grows again over the same blocks.
#include <kvcache/kernel/select.hpp>

#include "support/layouts.hpp"
#include "support/measure.hpp"
#include "support/noise.hpp"
#include "support/recycling_memory.hpp"
#include "support/ring.hpp"
#include "support/rows.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

namespace kvcache::bench {
namespace {

struct append_case {
  kernel::isa isa;
  index_t tokens;  ///< in one append
  index_t kv_heads = 8;
  index_t dim = 128;
  index_t kv_len = 4096;  ///< tokens when a sample is done
  index_t num_layers = 4;

  [[nodiscard]] index_t row_size() const { return kv_heads * dim; }
  /// A sample is a block's worth of single tokens, or one append of many.
  [[nodiscard]] index_t tokens_per_sample() const { return std::max(tokens, index_t{64}); }
  [[nodiscard]] index_t first_token() const { return kv_len - tokens_per_sample(); }
};

/// What memcpy does: the rows of every append to [layer][token][row] of floats, keys and values.
class float_rows {
 public:
  explicit float_rows(const append_case& c)
      : case_(c),
        floats_(static_cast<std::size_t>(2 * c.num_layers * c.tokens_per_sample() * c.row_size())) {}

  void copy(index_t layer, index_t token, std::span<const float> k, std::span<const float> v) {
    float* to = floats_.data() + 2 * (layer * case_.tokens_per_sample() + token) * case_.row_size();
    std::memcpy(to, k.data(), k.size_bytes());
    std::memcpy(to + k.size(), v.data(), v.size_bytes());
  }

 private:
  append_case case_;
  std::vector<float> floats_;
};

/// Calls `f(layer, token, k, v)` for every append of a sample: layer by layer, as a model does, token by
/// token.
template <class F>
void for_each_append(const append_case& c, const noise& rows, F f) {
  for (index_t t = 0; t < c.tokens_per_sample(); t += c.tokens) {
    const auto k = rows.keys(t, c.tokens);
    const auto v = rows.values(t, c.tokens);
    for (index_t layer = 0; layer < c.num_layers; ++layer) f(layer, t, k, v);
  }
}

template <class Layout, class Codec>
void run(benchmark::State& state, const append_case& c) {
  recycling_memory memory;
  auto cache = Layout::template make<Codec>({c.num_layers, c.kv_heads, c.dim}, c.kv_len, &memory);
  cache.use_kernels(kernel::select(c.isa));
  fill(cache, c.first_token());
  float_rows plain(c);
  const noise rows(c.row_size());

  measured what;
  what.op = [&](index_t) {
    for_each_append(c, rows, [&](index_t layer, index_t, auto k, auto v) { cache[layer].append(k, v); });
  };
  what.restore = [&](index_t) { cache.truncate(c.first_token()); };
  what.compare.push_back([&](index_t) {
    for_each_append(c, rows, [&](index_t layer, index_t t, auto k, auto v) { plain.copy(layer, t, k, v); });
  });
  what.ops_per_sample = c.tokens_per_sample() / c.tokens * c.num_layers;
  const medians m = measure(state, what);

  const double copy = m.compare[0] / static_cast<double>(what.ops_per_sample);
  const auto float_bytes = static_cast<double>(2 * c.tokens * c.row_size() * index_t{sizeof(float)});
  state.counters["memcpy_ratio"] = m.op / copy;
  state.counters["ns_per_token"] = 1e9 * m.op / static_cast<double>(c.tokens);
  state.counters["memcpy_ns_per_token"] = 1e9 * copy / static_cast<double>(c.tokens);
  state.counters["bytes_per_second"] = float_bytes / m.op;
}

template <class Layout, class Codec>
void add_rows(Layout, Codec) {
  for (const index_t tokens : {1, 512}) {
    for (const kernel::isa isa : kernel::available()) {
      const append_case c{isa, tokens};
      const auto name = row_name("append")
                            .add("codec", Codec::name)
                            .add("cache", Layout::name)
                            .add("kv_heads", c.kv_heads)
                            .add("dim", c.dim)
                            .add("kv_len", c.kv_len)
                            .add("tokens", tokens)
                            .add("isa", kernel::to_string(isa))
                            .add("threads", 1);
      register_row(name, [c](benchmark::State& state) { run<Layout, Codec>(state, c); });
    }
  }
}

}  // namespace

void register_rows() {
  for_each_codec([](auto codec) {
    add_rows(contiguous{}, codec);
    add_rows(chunked{}, codec);
    add_rows(paged{}, codec);
  });
}

}  // namespace kvcache::bench
