// SPDX-License-Identifier: MIT
// What PyTorch and transformers say (tests/golden/), against the oracle, the reference, every container and
// codec, the rotation and the attention layer.

#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/attention/reference.hpp>
#include <kvcache/attention/rope.hpp>

#include "attention/problem.hpp"
#include "golden/golden.hpp"

#include <algorithm>
#include <cmath>
#include <string>

using namespace attention_test;

namespace {

/// Expectations are written with 9 digits.
constexpr double digits = 1e-8;

template <class T>
double worst(const std::vector<T>& got, const std::vector<double>& want) {
  REQUIRE(got.size() == want.size());
  double error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const auto x = static_cast<double>(got[i]);
    if (x == want[i]) continue;
    const double off = std::abs(x - want[i]) / std::max(1.0, std::abs(want[i]));
    error = std::isnan(off) ? 1e9 : std::max(error, off);
  }
  return error;
}

problem problem_of(const golden::test_case& c) {
  problem p;
  const auto& q = c.at("q").dims;
  const auto& k = c.at("k").dims;
  p.n = {.q_len = q[0], .kv_len = k[0], .num_q_heads = q[1], .num_kv_heads = k[1], .head_dim = q[2]};
  p.q = c.get<float>("q");
  p.k = c.get<float>("k");
  p.v = c.get<float>("v");
  p.options.causal = c.number("causal") != 0;
  p.options.window = c.integer("window");
  p.options.sinks = c.integer("sinks");
  p.options.soft_cap = static_cast<float>(c.number("soft_cap"));
  p.options.scale = static_cast<float>(c.number("scale"));
  p.alibi_slopes = c.get<float>("alibi_slopes");
  p.mask = c.get<std::uint8_t>("mask");
  p.q_positions = c.get<index_t>("q_positions");
  p.k_positions = c.get<index_t>("k_positions");
  return p;
}

template <class Cache>
void check_cache(const problem& p, const golden::test_case& c) {
  for (const index_t block_size : {16, 64}) {
    CAPTURE(block_size);
    const answer a = computed(p, filled<Cache>(p, block_size)[0]);
    const double bound = kernels_under_test().level == kvcache::kernel::isa::amx ? 2.4e-5 : 3e-6;
    REQUIRE(worst(a.out, c.at("out").values) < bound);
    REQUIRE(worst(a.lse, c.at("lse").values) < bound);
  }
}

kvcache::rope_scaling scaling_of(const golden::test_case& c) {
  const std::string& kind = c.words.at("scaling");
  if (kind == "linear") return kvcache::rope_scaling_linear{c.number("factor")};
  if (kind == "ntk") return kvcache::rope_scaling_ntk{c.number("factor")};
  if (kind == "yarn")
    return kvcache::rope_scaling_yarn{.factor = c.number("factor"),
                                      .original_context = c.integer("original_context"),
                                      .beta_fast = c.number("beta_fast"),
                                      .beta_slow = c.number("beta_slow"),
                                      .attention_factor = c.number("attention_factor")};
  if (kind == "llama3")
    return kvcache::rope_scaling_llama3{.factor = c.number("factor"),
                                        .low_freq_factor = c.number("low_freq_factor"),
                                        .high_freq_factor = c.number("high_freq_factor"),
                                        .original_context = c.integer("original_context")};
  REQUIRE(kind == "none");
  return {};
}

oracle::rope oracle_rope(const golden::test_case& c, kvcache::rope_pairing pairing) {
  using scaling = oracle::rope::scaling;
  const std::string& kind = c.words.at("scaling");
  const auto or_else = [&](const char* name, double otherwise) {
    return c.has(name) ? c.number(name) : otherwise;
  };
  oracle::rope r;
  r.head_dim = c.integer("head_dim");
  r.rotary_dim = c.integer("rotary_dim");
  r.pairing =
      pairing == kvcache::rope_pairing::half ? oracle::rope::pairs::half : oracle::rope::pairs::interleaved;
  r.theta = c.number("theta");
  r.kind = kind == "linear"   ? scaling::linear
           : kind == "ntk"    ? scaling::ntk
           : kind == "yarn"   ? scaling::yarn
           : kind == "llama3" ? scaling::llama3
                              : scaling::none;
  r.factor = or_else("factor", 1);
  r.original_context = or_else("original_context", 0);
  r.beta_fast = or_else("beta_fast", 32);
  r.beta_slow = or_else("beta_slow", 1);
  r.attention_factor = or_else("attention_factor", 0);
  r.low_freq_factor = or_else("low_freq_factor", 1);
  r.high_freq_factor = or_else("high_freq_factor", 4);
  return r;
}

kvcache::matrix matrix_of(const golden::tensor& t) {
  kvcache::matrix m(t.dims.at(0), t.dims.at(1));
  for (std::size_t i = 0; i < t.values.size(); ++i) m.data()[i] = static_cast<float>(t.values[i]);
  return m;
}

Eigen::VectorXf vector_of(const golden::test_case& c, const std::string& key) {
  const std::vector<float> values = c.get<float>(key);
  return Eigen::Map<const Eigen::VectorXf>(values.data(), static_cast<index_t>(values.size()));
}

std::vector<float> floats_of(const kvcache::matrix& m) { return {m.data(), m.data() + m.size()}; }

}  // namespace

TEST_CASE("attention is what PyTorch says", "[attention][golden]") {
  const auto cases = golden::load("attention.txt");
  REQUIRE(cases.size() >= 23);
  for (const auto& c : cases) {
    CAPTURE(c.name);
    const problem p = problem_of(c);

    const auto exact = expected(p, "f32");
    // Scale is a float in the library, 1/sqrt(head_dim) a double in the fixture.
    REQUIRE(worst(exact.out, c.at("out").values) < digits + 1e-7);
    REQUIRE(worst(exact.lse, c.at("lse").values) < digits + 1e-7);

    std::vector<double> out(p.q.size());
    std::vector<double> lse(exact.lse.size());
    kvcache::reference_attention({p.n.q_len, p.n.kv_len, p.n.num_q_heads, p.n.num_kv_heads, p.n.head_dim},
                                 p.q, p.k, p.v, out, options_of(p, {}), lse);
    REQUIRE(worst(out, c.at("out").values) < digits + 1e-7);
    REQUIRE(worst(lse, c.at("lse").values) < digits + 1e-7);

    // The inputs are exact in every codec.
    check_cache<kvcache::contiguous_cache<codec::f32>>(p, c);
    check_cache<kvcache::contiguous_cache<codec::bf16>>(p, c);
    check_cache<kvcache::chunked_cache<codec::f16>>(p, c);
    check_cache<kvcache::paged_cache<codec::bf16>>(p, c);
    check_cache<kvcache::paged_cache<codec::f32>>(p, c);
  }
}

TEST_CASE("rotation is what transformers says", "[attention][golden]") {
  const auto cases = golden::load("rope.txt");
  REQUIRE(cases.size() >= 16);
  for (const auto& c : cases) {
    const auto positions = c.get<index_t>("positions");
    for (const auto pairing : {kvcache::rope_pairing::half, kvcache::rope_pairing::interleaved}) {
      const std::string suffix = pairing == kvcache::rope_pairing::half ? "_half" : "_interleaved";
      CAPTURE(c.name, suffix);

      const oracle::rope exact = oracle_rope(c, pairing);
      REQUIRE(worst(oracle::frequencies(exact), c.at("inv_freq").values) < digits);
      for (const char* x : {"q", "k"})
        REQUIRE(worst(oracle::rotated(c.get<double>(x), positions, exact), c.at(x + suffix).values) < digits);

      const kvcache::rope_config config{.head_dim = c.integer("head_dim"),
                                        .pairing = pairing,
                                        .theta = c.number("theta"),
                                        .rotary_dim = c.integer("rotary_dim"),
                                        .scaling = scaling_of(c)};
      for (const index_t ahead : {0, 4096}) {
        const kvcache::rope_table table(config, ahead);
        for (std::size_t i = 0; i < table.frequencies().size(); ++i)
          REQUIRE(std::abs(table.frequencies()[i] / c.at("inv_freq").values[i] - 1) < digits);
        REQUIRE(std::abs(table.attention_factor() - c.number("attention_scaling")) < digits);
        for (const char* x : {"q", "k"}) {
          std::vector<float> rows = c.get<float>(x);
          kvcache::rope(rows, positions, table);
          REQUIRE(worst(rows, c.at(x + suffix).values) < 1e-6);
        }
      }
    }
  }
}

TEST_CASE("attention layers are what transformers says, in one call or token by token",
          "[attention][golden]") {
  for (const auto& c : golden::load("module.txt")) {
    CAPTURE(c.name);
    const index_t head_dim = c.integer("head_dim");
    kvcache::attention_weights weights{.wq = matrix_of(c.at("wq")),
                                       .wk = matrix_of(c.at("wk")),
                                       .wv = matrix_of(c.at("wv")),
                                       .wo = matrix_of(c.at("wo")),
                                       .bq = vector_of(c, "bq"),
                                       .bk = vector_of(c, "bk"),
                                       .bv = vector_of(c, "bv"),
                                       .bo = vector_of(c, "bo"),
                                       .q_norm = vector_of(c, "q_norm"),
                                       .k_norm = vector_of(c, "k_norm")};
    if (c.has("norm_eps")) weights.norm_eps = static_cast<float>(c.number("norm_eps"));
    const kvcache::multi_head_attention attention(
        weights, {.num_q_heads = c.integer("num_q_heads"),
                  .num_kv_heads = c.integer("num_kv_heads"),
                  .head_dim = head_dim,
                  .rope = kvcache::rope_config{.head_dim = head_dim,
                                               .pairing = kvcache::rope_pairing::half,
                                               .theta = c.number("theta")},
                  .window = c.integer("window"),
                  .soft_cap = static_cast<float>(c.number("soft_cap")),
                  .scale = static_cast<float>(c.number("scale"))});
    const kvcache::matrix x = matrix_of(c.at("x"));
    const std::vector<double>& want = c.at("y").values;
    REQUIRE(worst(floats_of(attention.forward(x)), want) < 1e-5);

    const cache_shape shape{
        .num_layers = 1, .num_kv_heads = c.integer("num_kv_heads"), .head_dim = head_dim, .block_size = 16};
    kvcache::contiguous_cache<codec::f32> whole(shape);
    REQUIRE(worst(floats_of(attention.forward(x, whole[0])), want) < 1e-5);

    kvcache::chunked_cache<codec::f32> stepwise(shape);
    kvcache::matrix y(x.rows(), attention.hidden_size());
    for (index_t t = 0; t < x.rows(); ++t) y.row(t) = attention.forward(x.row(t), stepwise[0]);
    REQUIRE(worst(floats_of(y), want) < 1e-5);

    // 16-bit caches are off by the rounding of what they store.
    kvcache::paged_cache<codec::bf16> rounded = kvcache::page_pool<codec::bf16>(shape).sequence();
    REQUIRE(worst(floats_of(attention.forward(x, rounded[0])), want) < 0.05);
  }
}
