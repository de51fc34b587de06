// SPDX-License-Identifier: MIT
// Random attention problems: one set of numbers and options, computed by the library and by the oracle.
//
//   problem p = make_problem(random, {.q_len = 3, .kv_len = 40, .num_q_heads = 6, ...});
//   p.options.window = 7;                            // any option; spans are set from the problem's vectors
//   auto cache = filled<paged_cache<codec::bf16>>(p, 64);
//   require_close(computed(p, cache[0]), expected(p, "bf16"));
#pragma once

#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/exact.hpp>

#include "oracle/attention_oracle.hpp"
#include "oracle/cache_oracle.hpp"
#include "support/catch.hpp"
#include "support/kernels_on_tiles.hpp"
#include "support/random.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace attention_test {

using kvcache::attend_options;
using kvcache::cache_shape;
using kvcache::index_t;
namespace codec = kvcache::codec;

struct problem_size {
  index_t q_len = 1;
  index_t kv_len = 1;
  index_t num_q_heads = 1;
  index_t num_kv_heads = 1;
  index_t head_dim = 1;
};

struct problem {
  problem_size n;
  std::vector<float> q;  // [q_len, num_q_heads, head_dim]
  std::vector<float> k;  // [kv_len, num_kv_heads, head_dim]
  std::vector<float> v;

  attend_options options;  // the spans in it are set from these:
  std::vector<float> alibi_slopes;
  std::vector<std::uint8_t> mask;
  std::vector<index_t> q_positions;
  std::vector<index_t> k_positions;
};

struct answer {
  std::vector<float> out;
  std::vector<float> lse;
};

inline problem make_problem(test::random& random, const problem_size& n) {
  problem p;
  p.n = n;
  p.q = random.floats(n.q_len * n.num_q_heads * n.head_dim);
  p.k = random.floats(n.kv_len * n.num_kv_heads * n.head_dim);
  p.v = random.floats(n.kv_len * n.num_kv_heads * n.head_dim);
  return p;
}

/// Decode and prefill, short and beyond one span of attend, groups that fit the stack and one that does not.
inline std::vector<problem> varied_problems(test::random& random) {
  std::vector<problem> all;
  for (const problem_size& n : {problem_size{1, 33, 4, 2, 20},
                                {1, 5000, 2, 1, 16},
                                {7, 130, 6, 3, 33},
                                {40, 40, 2, 2, 8},
                                {3, 4500, 4, 2, 8},
                                {20, 2100, 2, 1, 4},
                                {1, 2500, 40, 1, 300}}) {
    all.push_back(make_problem(random, n));
    if (all.size() % 2 == 0) all.back().options.window = 70;
    if (all.size() % 3 == 0) all.back().options.soft_cap = 6;
    if (n.q_len == 7) all.back().options.sinks = 3;
  }
  return all;
}

inline cache_shape shape_of(const problem& p, index_t block_size) {
  return {
      .num_layers = 1, .num_kv_heads = p.n.num_kv_heads, .head_dim = p.n.head_dim, .block_size = block_size};
}

/// An empty cache of any container with small settings; a paged one brings its pool.
template <class Cache>
Cache empty_cache(const cache_shape& shape) {
  using codec_type = typename Cache::codec_type;
  if constexpr (std::is_same_v<Cache, kvcache::paged_cache<codec_type>>) {
    return kvcache::page_pool<codec_type>(shape).sequence();
  } else if constexpr (std::is_same_v<Cache, kvcache::contiguous_cache<codec_type>>) {
    return Cache(shape, {}, kvcache::contiguous_options{.max_tokens = 8192});
  } else {
    return Cache(shape);
  }
}

/// A cache with the keys and values of a problem.
template <class Cache>
Cache filled(const problem& p, index_t block_size) {
  Cache cache = empty_cache<Cache>(shape_of(p, block_size));
  cache[0].append(p.k, p.v);
  return cache;
}

/// The kernels that problems run on: the best ones, or, where ctest says so, those for AMX on emulated tiles.
inline const kvcache::kernel::table& kernels_under_test() {
  const kvcache::kernel::table& best = kvcache::kernel::best();  // throws where KVCACHE_ISA does not run here
  if (std::getenv("KVCACHE_TEST_EMULATED_TILES") == nullptr) return best;
  const kvcache::kernel::table* tiles = test::kernels_on_emulated_tiles();
  if (tiles == nullptr) throw std::runtime_error("no kernels named 'emulated_tiles' run here");  // skipped
  return *tiles;
}

/// The options of a problem with their spans set; `lse` is where the library writes.
inline attend_options options_of(const problem& p, std::span<float> lse) {
  attend_options o = p.options;
  if (o.kernel == nullptr) o.kernel = &kernels_under_test();
  o.q_len = p.n.q_len;
  o.alibi_slopes = p.alibi_slopes;
  o.mask = p.mask;
  o.q_positions = p.q_positions;
  o.k_positions = p.k_positions;
  o.lse = lse;
  return o;
}

/// What the library says. Outputs start out as NaN, so that what is not written shows.
template <class Layer, class Executor = kvcache::serial_executor>
answer computed(const problem& p, const Layer& layer, Executor&& executor = {}) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  answer a{std::vector<float>(p.q.size(), nan),
           std::vector<float>(static_cast<std::size_t>(p.n.q_len * p.n.num_q_heads), nan)};
  kvcache::attend(p.q, layer, a.out, options_of(p, a.lse), executor);
  return a;
}

/// The problem as the oracle takes it, keys and values rounded as the codec stores them.
inline oracle::attention exact_problem(const problem& p, std::string_view codec) {
  oracle::attention a;
  a.q_len = p.n.q_len;
  a.kv_len = p.n.kv_len;
  a.num_q_heads = p.n.num_q_heads;
  a.num_kv_heads = p.n.num_kv_heads;
  a.head_dim = p.n.head_dim;
  a.q.assign(p.q.begin(), p.q.end());
  const std::vector<float> k = oracle::stored_rows(p.k, p.n.head_dim, codec);
  const std::vector<float> v = oracle::stored_rows(p.v, p.n.head_dim, codec);
  a.k.assign(k.begin(), k.end());
  a.v.assign(v.begin(), v.end());
  if (p.options.scale) a.scale = static_cast<double>(*p.options.scale);
  a.causal = p.options.causal;
  a.window = p.options.window;
  a.sinks = p.options.sinks;
  a.soft_cap = static_cast<double>(p.options.soft_cap);
  a.alibi_slopes.assign(p.alibi_slopes.begin(), p.alibi_slopes.end());
  a.mask = p.mask;
  a.q_positions = p.q_positions;
  a.k_positions = p.k_positions;
  return a;
}

/// What the oracle says.
inline oracle::attention_result expected(const problem& p, std::string_view codec) {
  oracle::attention_result r = oracle::attend(exact_problem(p, codec));
  const bool on_amx = kernels_under_test().level == kvcache::kernel::isa::amx;
  const index_t rows = p.n.q_len * p.n.num_q_heads / p.n.num_kv_heads;
  if (on_amx && codec == "bf16" && rows > 16 && p.n.head_dim % 32 == 0) {
    r.weight_rounding = 0x1p-7;
    r.query_rounding = 1.0 / 250;
  }
  return r;
}

/// The largest error in units of the bound that attend states, 1e-6 * (4 + scale * max|q| * max|k|) * max|v|,
/// eight times that on AMX, where ALiBi's share of a logit counts as well; twice that, without the value, for lse. Where AMX may
/// multiply more than 16 rows at a time, (2^-6 + N / 250) * max|v| for outputs and 2^-7 + N / 250 for lse on top of it, N =
/// scale * max|q| * max|k|. `slack` multiplies the bound. Rows that see nothing must be exactly zero and -infinity.
inline double worst_error(const answer& got, const oracle::attention_result& want, double slack = 1) {
  if (kernels_under_test().level == kvcache::kernel::isa::amx) slack *= 8;
  const std::size_t rows = want.lse.size();
  const std::size_t dim = rows == 0 ? 0 : want.out.size() / rows;
  if (got.out.size() != want.out.size() || got.lse.size() != rows)
    return std::numeric_limits<double>::infinity();
  double worst = 0;
  const auto add = [&worst](double error, double bound) {
    if (error == 0) return;
    worst = std::isnan(error) || std::isnan(worst) ? std::numeric_limits<double>::quiet_NaN()
                                                   : std::fmax(worst, error / bound);
  };
  for (std::size_t r = 0; r < rows; ++r) {
    const double bound = slack * 1e-6 * (4 + std::fmax(want.max_norms[r], want.max_logit[r]));
    const double lse = static_cast<double>(got.lse[r]);
    const double of_scores = want.query_rounding * want.max_norms[r];
    if (lse != want.lse[r]) add(std::fabs(lse - want.lse[r]), 2 * bound + want.weight_rounding + of_scores);
    for (std::size_t d = r * dim; d < (r + 1) * dim; ++d)
      add(std::fabs(static_cast<double>(got.out[d]) - want.out[d]),
          (bound + 2 * want.weight_rounding + of_scores) * want.max_value[r] + 1e-44);
  }
  return worst;
}

inline void require_close(const answer& got, const oracle::attention_result& want, double slack = 1) {
  REQUIRE(worst_error(got, want, slack) <= 1);
}

/// Whether what is computed in few rows has the bits of what is computed in many, for blocks of one codec.
inline bool rows_are_alone(std::string_view codec) {
  return kernels_under_test().level != kvcache::kernel::isa::amx || codec != "bf16";
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::bit_cast<std::uint32_t>(a[i]) != std::bit_cast<std::uint32_t>(b[i])) return false;
  return true;
}

inline void require_same_bits(const answer& a, const answer& b) {
  REQUIRE(same_bits(a.out, b.out));
  REQUIRE(same_bits(a.lse, b.lse));
}

}  // namespace attention_test
