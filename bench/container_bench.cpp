// SPDX-License-Identifier: MIT
// The containers against each other and against plain float arrays (support/plain_twin.hpp): appending,
// walking, decoding, forking, truncating, and growing from nothing. One thread, the best kernels of this
// processor.
#include <kvcache/kernel/select.hpp>

#include "support/check.hpp"
#include "support/layouts.hpp"
#include "support/measure.hpp"
#include "support/noise.hpp"
#include "support/ring.hpp"
#include "support/roof.hpp"
#include "support/rows.hpp"

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvcache::bench {
namespace {

struct layout_case {
  index_t kv_len;
  index_t num_layers = 4;
  index_t heads = 32;
  index_t kv_heads = 8;
  index_t dim = 128;

  [[nodiscard]] cache_shape shape() const { return {num_layers, kv_heads, dim}; }
};

template <class Layout, class Codec>
auto filled(const layout_case& c) {
  auto cache = Layout::template make<Codec>(c.shape(), c.kv_len);
  fill(cache, c.kv_len);
  return cache;
}

/// One token to every layer; the sequence grows by a block, is cut back and grows again.
template <class Layout, class Codec>
void append(benchmark::State& state, const layout_case& c) {
  constexpr index_t tokens = 64;
  auto cache = filled<Layout, Codec>(c);
  const noise rows(c.kv_heads * c.dim);
  cache.truncate(c.kv_len - tokens);
  measured what;
  what.op = [&](index_t) {
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t layer = 0; layer < c.num_layers; ++layer)
        cache[layer].append(rows.keys(t, 1), rows.values(t, 1));
    }
  };
  what.restore = [&](index_t) { cache.truncate(c.kv_len - tokens); };
  what.ops_per_sample = tokens * c.num_layers;
  const medians m = measure(state, what);
  state.counters["ns_per_token"] = 1e9 * m.op;
}

/// Visits every block (or array) of a layer and reads it; what remains between it and the roof is the walk.
template <class Layer>
void walk(const Layer& layer) {
  const auto g = block_geometry{layer.shape().block_size, layer.shape().head_dim};
  for (index_t head = 0; head < layer.shape().num_kv_heads; ++head) {
    for (const block_view& block : layer.blocks(head)) {
      const extent whole{block.data, layer.codec().block_bytes(g)};
      read_all(std::span(&whole, 1), read_styles[1], pinned_workers(1));
    }
  }
}
void walk(const plain_layer& layer) {
  const index_t bytes = layer.size * layer.shape.head_dim * index_t{sizeof(float)};
  for (index_t head = 0; head < layer.shape.num_kv_heads; ++head) {
    for (const auto* rows : {&layer.keys, &layer.values}) {
      const extent whole{reinterpret_cast<const std::byte*>(rows->data() + layer.row(head, 0)), bytes};
      read_all(std::span(&whole, 1), read_styles[1], pinned_workers(1));
    }
  }
}

template <class Ring>
measured beside_roof(Ring& ring, sample_function op) {
  return {.op = std::move(op), .compare = {[&ring](index_t i) { ring.read(ring.far_from(i), 1); }}};
}

void set_roof(benchmark::State& state, index_t step_bytes, const medians& m) {
  const auto bytes = static_cast<double>(step_bytes);
  state.counters["bytes_per_second"] = bytes / m.op;
  state.counters["roof_bytes_per_second"] = bytes / m.compare[0];
  state.counters["roof_pct"] = 100 * m.compare[0] / m.op;
}

template <class Layout, class Codec>
void walk_ring(benchmark::State& state, const layout_case& c) {
  auto& ring = shared_ring<Layout, Codec>({c.shape(), c.kv_len});
  const medians m = measure(state, beside_roof(ring, [&](index_t i) { walk(ring.layer(i)); }));
  set_roof(state, ring.step_bytes(), m);
}

template <class Layout, class Codec>
void decode_ring(benchmark::State& state, const layout_case& c) {
  auto& ring = shared_ring<Layout, Codec>({c.shape(), c.kv_len});
  const auto q = noise::queries(c.heads * c.dim);
  std::vector<float> out(q.size());
  attend_call call{1, &kernel::best(), 1};
  call(q, ring.layer(0), out);
  const checked_shape n{1, c.kv_len, c.heads, c.kv_heads, c.dim};
  const double error = error_against_reference(n, noise(c.kv_heads * c.dim), q, out);
  if (!(error <= largest_error(Codec::name))) return state.SkipWithError("the result is wrong");
  const medians m = measure(state, beside_roof(ring, [&](index_t i) { call(q, ring.layer(i), out); }));
  set_roof(state, ring.step_bytes(), m);
  state.counters["rel_err"] = error;
}

/// A copy of all tokens and, with `and_append`, one more token in every layer: a shared page is copied then.
template <class Layout, class Codec>
void fork(benchmark::State& state, const layout_case& c, bool and_append) {
  auto cache = filled<Layout, Codec>(c);
  const noise rows(c.kv_heads * c.dim);
  std::optional<decltype(cache.clone())> child;
  measured what;
  what.op = [&](index_t) {
    child.emplace(cache.fork(c.kv_len));
    for (index_t layer = 0; and_append && layer < c.num_layers; ++layer)
      (*child)[layer].append(rows.keys(0, 1), rows.values(0, 1));
  };
  what.restore = [&](index_t) { child.reset(); };
  measure(state, what);
  state.counters["payload_bytes"] = static_cast<double>(cache.bytes().payload);
}

template <class Layout, class Codec>
void truncate(benchmark::State& state, const layout_case& c) {
  const auto cache = filled<Layout, Codec>(c);
  auto copy = cache.clone();
  measured what;
  what.op = [&](index_t) { copy.truncate(c.kv_len / 2); };
  what.restore = [&](index_t) { copy = cache.clone(); };
  measure(state, what);
}

/// From an empty sequence to kv_len tokens, one at a time in every layer, with nothing reserved.
template <class Layout, class Codec>
void growth(benchmark::State& state, const layout_case& c) {
  constexpr index_t default_max_tokens = std::is_same_v<Layout, plain> ? 1 : index_t{1} << 18;
  const noise rows(c.kv_heads * c.dim);
  std::optional<decltype(Layout::template make<Codec>(c.shape(), index_t{}))> cache;
  measured what;
  what.op = [&](index_t) {
    cache.emplace(Layout::template make<Codec>(c.shape(), default_max_tokens));
    for (index_t t = 0; t < c.kv_len; ++t) {
      for (index_t layer = 0; layer < c.num_layers; ++layer)
        (*cache)[layer].append(rows.keys(t % 512, 1), rows.values(t % 512, 1));
    }
  };
  memory_use use;
  what.restore = [&](index_t) {
    use = cache->bytes();
    cache.reset();
  };
  const medians m = measure(state, what);
  state.counters["ns_per_token"] = 1e9 * m.op / static_cast<double>(c.kv_len * c.num_layers);
  state.counters["total_bytes"] = static_cast<double>(use.total);
  state.counters["overhead_pct"] = 100 * static_cast<double>(use.slack) / static_cast<double>(use.payload);
}

template <class Layout, class Codec, class F>
void add_row(const char* what, const layout_case& c, F run) {
  const auto name = row_name(std::string("layout_") + what)
                        .add("codec", Codec::name)
                        .add("cache", Layout::name)
                        .add("heads", c.heads)
                        .add("kv_heads", c.kv_heads)
                        .add("dim", c.dim)
                        .add("kv_len", c.kv_len)
                        .add("isa", kernel::to_string(kernel::best().level))
                        .add("threads", 1);
  register_row(name, [run, c](benchmark::State& state) { run(state, c); });
}

/// Walk and decode share a ring, so they are side by side.
template <class Layout, class Codec>
void add_ring_rows() {
  for (const index_t kv_len : {512, 4096}) {
    add_row<Layout, Codec>("walk", {kv_len}, walk_ring<Layout, Codec>);
    add_row<Layout, Codec>("decode", {kv_len}, decode_ring<Layout, Codec>);
  }
}

/// Lengths in the middle of a block: the last page is partly full, and has to be copied on the first append.
template <class Layout, class Codec>
void add_fork_rows() {
  for (const index_t kv_len : {250, 4090}) {
    for (const bool and_append : {false, true}) {
      add_row<Layout, Codec>(and_append ? "fork_append" : "fork", {kv_len},
                             [and_append](benchmark::State& state, const layout_case& c) {
                               fork<Layout, Codec>(state, c, and_append);
                             });
    }
  }
}

/// Calls `add` for every container and codec that is compared here, the plain twin first.
template <class F>
void for_each_layout(F add) {
  add(plain{}, codec::f32{});
  const auto add_containers = [&](auto codec) {
    add(contiguous{}, codec);
    add(chunked{}, codec);
    add(paged{}, codec);
  };
  add_containers(codec::f32{});
  add_containers(codec::bf16{});
}

}  // namespace

void register_rows() {
  for_each_layout([]<class L, class C>(L, C) { add_row<L, C>("append", {4096}, append<L, C>); });
  for_each_layout([]<class L, class C>(L, C) { add_ring_rows<L, C>(); });
  for_each_layout([]<class L, class C>(L, C) { add_fork_rows<L, C>(); });
  for_each_layout([]<class L, class C>(L, C) { add_row<L, C>("truncate", {4096}, truncate<L, C>); });
  for_each_layout([]<class L, class C>(L, C) {
    for (const index_t kv_len : {100, 5000}) add_row<L, C>("growth", {kv_len}, growth<L, C>);
  });
}

}  // namespace kvcache::bench
