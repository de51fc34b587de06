// SPDX-License-Identifier: MIT
// Attention over codecs, containers, groupings, lengths, instruction sets and threads: decode, prefill,
// batches. Every row stands beside the read bandwidth of the same bytes, measured in the same loop. See
// README.md.
#include <kvcache/attention/attend.hpp>
#include <kvcache/kernel/select.hpp>

#include "support/check.hpp"
#include "support/fma_peak.hpp"
#include "support/layouts.hpp"
#include "support/measure.hpp"
#include "support/pin.hpp"
#include "support/ring.hpp"
#include "support/rows.hpp"

#include <cstddef>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvcache::bench {
namespace {

struct attend_case {
  index_t kv_heads = 8;
  index_t kv_len = 4096;
  index_t q_len = 1;
  index_t batch = 1;
  index_t block = 64;
  bool hot = false;
  kernel::isa isa = kernel::isa::portable;
  index_t threads = 1;
  index_t heads = 32;
  index_t dim = 128;

  [[nodiscard]] ring_size ring() const {
    return {{.num_kv_heads = kv_heads, .head_dim = dim, .block_size = block}, kv_len, batch, hot};
  }
  [[nodiscard]] index_t q_floats() const { return q_len * heads * dim; }
  /// Two products of one multiplication and one addition each, over the keys that each query sees.
  [[nodiscard]] double flops() const {
    const double pairs = static_cast<double>(q_len * (2 * kv_len - q_len + 1)) / 2;
    return 4.0 * static_cast<double>(batch * heads * dim) * pairs;
  }
};

template <class Layout, class Codec>
std::string name_of(const attend_case& c) {
  return row_name(c.q_len > 1   ? "prefill"
                  : c.batch > 1 ? "batch"
                                : "decode")
             .add("codec", Codec::name)
             .add("cache", Layout::name)
             .add("heads", c.heads)
             .add("kv_heads", c.kv_heads)
             .add("dim", c.dim)
             .add("kv_len", c.kv_len)
             .add("isa", kernel::to_string(c.isa))
             .add("threads", c.threads)
             .add_unless(1, "q_len", c.q_len)
             .add_unless(1, "batch", c.batch)
             .add_unless(64, "block", c.block)
             .text() +
         (c.hot ? "/memory:hot" : "");
}

/// The operation of a row on step `step` of its ring.
template <class Ring>
class attend_step {
 public:
  using layer_type = std::remove_cvref_t<decltype(std::declval<Ring&>().layer(0))>;

  attend_step(Ring& ring, const attend_case& c)
      : ring_(&ring),
        case_(c),
        options_{.q_len = c.q_len, .kernel = &kernel::select(c.isa), .workspace = &workspace_},
        q_(noise::queries(c.q_floats())),
        out_(static_cast<std::size_t>(c.batch * c.q_floats())) {}

  void operator()(index_t step) {
    auto& workers = pinned_workers(case_.threads);
    if (case_.batch == 1) return attend(q_, ring_->layer(step), std::span(out_), options_, workers);
    items_.clear();
    for (index_t i = 0; i < case_.batch; ++i) {
      const auto offset = static_cast<std::size_t>(i * case_.q_floats());
      items_.push_back({q_, ring_->layer(step, i), std::span(out_).subspan(offset, q_.size()), case_.q_len});
    }
    attend(std::span<const attend_item<layer_type>>(items_), options_, workers);
  }

  /// Of the last sequence, as the last call left it.
  [[nodiscard]] double error() const {
    const checked_shape n{case_.q_len, case_.kv_len, case_.heads, case_.kv_heads, case_.dim};
    return error_against_reference(n, noise(case_.kv_heads * case_.dim), q_, std::span(out_).last(q_.size()));
  }

 private:
  Ring* ring_;
  attend_case case_;
  attend_workspace workspace_;
  attend_options options_;
  std::span<const float> q_;
  std::vector<float> out_;
  std::vector<attend_item<layer_type>> items_;
};

template <class Layout, class Codec>
void run(benchmark::State& state, const attend_case& c) {
  auto& ring = shared_ring<Layout, Codec>(c.ring());
  attend_step step(ring, c);

  const std::string checked =
      "error " + std::string(kernel::to_string(c.isa)) + " " + std::to_string(c.q_len);
  const double error = ring.remembered(checked, [&] {
    step(0);
    return step.error();
  });
  if (!(error <= largest_error(Codec::name))) return state.SkipWithError("the result is wrong");

  double flops_of_burn = 0;
  measured what{.op = [&](index_t i) { step(i); }};
  what.compare.push_back([&](index_t i) { ring.read(ring.far_from(i), c.threads); });
  if (c.q_len > 1)
    what.compare.push_back([&](index_t) { flops_of_burn = burn_fma(pinned_workers(c.threads)); });
  const medians m = measure(state, what);

  const auto bytes = static_cast<double>(ring.step_bytes());
  state.counters["bytes_per_second"] = bytes / m.op;
  state.counters["roof_bytes_per_second"] = bytes / m.compare[0];
  state.counters["roof_pct"] = 100 * m.compare[0] / m.op;
  state.counters["rel_err"] = error;
  if (c.q_len > 1) {
    const double peak = flops_of_burn / m.compare[1];
    state.counters["flops_per_second"] = c.flops() / m.op;
    state.counters["fma_peak_flops_per_second"] = peak;
    state.counters["fma_peak_pct"] = 100 * c.flops() / m.op / peak;
  }
}

/// One row for each instruction set and number of threads; they share a ring.
template <class Layout, class Codec>
void add_rows(attend_case c) {
  for (const kernel::isa isa : kernel::available()) {
    for (const index_t threads : thread_counts()) {
      c.isa = isa;
      c.threads = threads;
      register_row(row_name(name_of<Layout, Codec>(c)),
                   [c](benchmark::State& s) { run<Layout, Codec>(s, c); });
    }
  }
}

/// KVCACHE_BENCH_GRID=full: every combination. Otherwise ungrouped and large-group rows at one length only,
/// and prefill and batches in fewer containers.
bool full_grid() {
  const char* grid = std::getenv("KVCACHE_BENCH_GRID");
  return grid != nullptr && std::string_view(grid) == "full";
}

template <class Layout, class Codec>
void add_all(Layout, Codec) {
  constexpr bool is_paged = std::is_same_v<Layout, paged>;
  constexpr bool is_bf16 = std::is_same_v<Codec, codec::bf16>;
  for (const index_t kv_heads : {8, 32, 4}) {  // groups of 4, 1 and 8 query heads
    for (const index_t kv_len : {512, 4096, 16384}) {
      const attend_case decode{.kv_heads = kv_heads, .kv_len = kv_len};
      if (kv_heads == 8 || kv_len == 16384 || full_grid()) add_rows<Layout, Codec>(decode);

      attend_case prefill = decode;
      prefill.q_len = 512;
      if (kv_heads == 8 && kv_len == 4096 && (is_paged || full_grid())) add_rows<Layout, Codec>(prefill);
    }
  }
  if (is_paged || is_bf16 || full_grid()) add_rows<Layout, Codec>({.kv_len = 4096, .batch = 8});
  if (is_bf16 || full_grid()) add_rows<Layout, Codec>({.kv_len = 512, .hot = true});
  if (is_paged && (is_bf16 || full_grid())) {
    for (const index_t block : {16, 256}) add_rows<Layout, Codec>({.kv_len = 16384, .block = block});
  }
}

}  // namespace

void register_rows() {
  for_each_codec([](auto codec) {
    add_all(contiguous{}, codec);
    add_all(chunked{}, codec);
    add_all(paged{}, codec);
  });
}

}  // namespace kvcache::bench
