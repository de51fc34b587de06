// SPDX-License-Identifier: MIT
// The attention layer: the cache changes nothing, projections and norms are the formulas, misfits are refused.

#include <kvcache/attention/multi_head_attention.hpp>

#include "attention/problem.hpp"
#include "oracle/rope_oracle.hpp"

#include <cmath>
#include <optional>
#include <string>

using namespace attention_test;
using kvcache::attention_config;
using kvcache::attention_weights;
using kvcache::matrix;
using kvcache::multi_head_attention;

namespace {

matrix random_matrix(test::random& random, index_t rows, index_t columns, float size = 0.3F) {
  matrix m(rows, columns);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = size * random.normal();
  return m;
}

Eigen::VectorXf random_vector(test::random& random, index_t n, float around = 0) {
  Eigen::VectorXf x(n);
  for (index_t i = 0; i < n; ++i) x[i] = around + 0.3F * random.normal();
  return x;
}

struct kind {
  const char* name;
  index_t q_heads, kv_heads, head_dim, hidden;
  bool biases, norms, rope;
  index_t window = 0;
  float soft_cap = 0;
};

const kind kinds[] = {
    {"plain", 4, 4, 8, 20, false, false, false},
    {"grouped, RoPE", 6, 2, 10, 32, false, false, true},
    {"one key head, biases", 5, 1, 6, 17, true, false, true},
    {"norms", 4, 2, 16, 24, false, true, true},
    {"everything", 8, 2, 12, 33, true, true, true, 7, 4.0F},
};

multi_head_attention make(test::random& random, const kind& a) {
  attention_weights w{.wq = random_matrix(random, a.q_heads * a.head_dim, a.hidden),
                      .wk = random_matrix(random, a.kv_heads * a.head_dim, a.hidden),
                      .wv = random_matrix(random, a.kv_heads * a.head_dim, a.hidden),
                      .wo = random_matrix(random, a.hidden, a.q_heads * a.head_dim)};
  if (a.biases) {
    w.bq = random_vector(random, a.q_heads * a.head_dim);
    w.bk = random_vector(random, a.kv_heads * a.head_dim);
    w.bv = random_vector(random, a.kv_heads * a.head_dim);
    w.bo = random_vector(random, a.hidden);
  }
  if (a.norms) {
    w.q_norm = random_vector(random, a.head_dim, 1);
    w.k_norm = random_vector(random, a.head_dim, 1);
    w.norm_eps = 1e-3F;
  }
  attention_config c{.num_q_heads = a.q_heads, .num_kv_heads = a.kv_heads, .head_dim = a.head_dim};
  if (a.rope)
    c.rope = kvcache::rope_config{
        .head_dim = a.head_dim, .pairing = kvcache::rope_pairing::half, .rotary_dim = a.head_dim / 2 / 2 * 2};
  c.window = a.window;
  c.soft_cap = a.soft_cap;
  return {std::move(w), c, 16};
}

cache_shape shape_for(const multi_head_attention& attention, index_t block_size) {
  return {.num_layers = 1,
          .num_kv_heads = attention.config().num_kv_heads,
          .head_dim = attention.config().head_dim,
          .block_size = block_size};
}

bool same(const matrix& a, const matrix& b) {
  return same_bits({a.data(), a.data() + a.size()}, {b.data(), b.data() + b.size()});
}

/// The layer in double precision, plain loops.
std::vector<double> by_definition(const multi_head_attention& attention, const matrix& x) {
  const attention_weights& w = attention.weights();
  const attention_config& c = attention.config();
  const auto linear = [](const std::vector<double>& in, index_t tokens, const matrix& weight,
                         const Eigen::VectorXf& bias) {
    std::vector<double> out;
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t o = 0; o < weight.rows(); ++o) {
        double sum = bias.size() > 0 ? static_cast<double>(bias[o]) : 0;
        for (index_t i = 0; i < weight.cols(); ++i)
          sum += static_cast<double>(weight(o, i)) * in[static_cast<std::size_t>(t * weight.cols() + i)];
        out.push_back(sum);
      }
    }
    return out;
  };
  const auto norm = [&](std::vector<double>& rows, const Eigen::VectorXf& weight) {
    if (weight.size() == 0) return;
    const auto dim = static_cast<std::size_t>(c.head_dim);
    for (std::size_t first = 0; first < rows.size(); first += dim) {
      double squares = 0;
      for (std::size_t d = 0; d < dim; ++d) squares += rows[first + d] * rows[first + d];
      const double root = std::sqrt(squares / static_cast<double>(dim) + static_cast<double>(w.norm_eps));
      for (std::size_t d = 0; d < dim; ++d)
        rows[first + d] *= static_cast<double>(weight[static_cast<index_t>(d)]) / root;
    }
  };
  const std::vector<double> in(x.data(), x.data() + x.size());
  oracle::attention a;
  a.q_len = a.kv_len = x.rows();
  a.num_q_heads = c.num_q_heads;
  a.num_kv_heads = c.num_kv_heads;
  a.head_dim = c.head_dim;
  a.q = linear(in, x.rows(), w.wq, w.bq);
  a.k = linear(in, x.rows(), w.wk, w.bk);
  a.v = linear(in, x.rows(), w.wv, w.bv);
  norm(a.q, w.q_norm);
  norm(a.k, w.k_norm);
  a.window = c.window;
  a.sinks = c.sinks;
  a.soft_cap = static_cast<double>(c.soft_cap);
  if (c.scale) a.scale = static_cast<double>(*c.scale);
  if (c.rope) a.rotation = oracle::rope{.head_dim = c.head_dim, .rotary_dim = c.rope->rotary_dim};
  return linear(oracle::attend(a).out, x.rows(), w.wo, w.bo);
}

double worst(const matrix& got, const std::vector<double>& want) {
  REQUIRE(static_cast<std::size_t>(got.size()) == want.size());
  double error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double off = std::abs(static_cast<double>(got.data()[i]) - want[i]);
    error = std::isnan(off) ? 1e9 : std::max(error, off);
  }
  return error;
}

}  // namespace

TEST_CASE("the layer computes the formula, cached or not", "[attention]") {
  test::random random;
  for (const kind& a : kinds) {
    CAPTURE(a.name);
    const multi_head_attention attention = make(random, a);
    REQUIRE(attention.hidden_size() == a.hidden);
    for (const index_t tokens : {1, 2, 16, 45}) {
      const matrix x = random_matrix(random, tokens, a.hidden, 1);
      const std::vector<double> want = by_definition(attention, x);
      CAPTURE(tokens);
      REQUIRE(worst(attention.forward(x), want) < 2e-5);
      kvcache::contiguous_cache<codec::f32> cache(shape_for(attention, 16));
      REQUIRE(worst(attention.forward(x, cache[0]), want) < 2e-5);
      REQUIRE(cache.size() == tokens);
    }
  }
}

TEMPLATE_TEST_CASE("the same call with and without a cache gives the same bits", "[attention]",
                   kvcache::contiguous_cache<codec::f32>, kvcache::chunked_cache<codec::f16>,
                   kvcache::paged_cache<codec::bf16>) {
  test::random random;
  for (const kind& a : kinds) {
    const multi_head_attention attention = make(random, a);
    for (const index_t tokens : {1, 5, 33}) {
      for (const index_t block_size : {16, 64}) {
        CAPTURE(a.name, tokens, block_size);
        const matrix x = random_matrix(random, tokens, a.hidden, 1);
        auto cache = empty_cache<TestType>(shape_for(attention, block_size));
        const matrix cached = attention.forward(x, cache[0]);
        const matrix uncached = attention.template forward<typename TestType::codec_type>(
            x, kvcache::serial_executor{}, block_size);
        REQUIRE(same(cached, uncached));
      }
    }
  }
}

TEMPLATE_TEST_CASE("prefill, prefill in pieces and decode agree", "[attention]",
                   kvcache::contiguous_cache<codec::f32>, kvcache::paged_cache<codec::bf16>) {
  test::random random;
  for (const kind& a : kinds) {
    CAPTURE(a.name);
    const multi_head_attention attention = make(random, a);
    const matrix x = random_matrix(random, 40, a.hidden, 1);
    const std::vector<double> want = by_definition(attention, x);
    auto whole = empty_cache<TestType>(shape_for(attention, 16));
    const matrix prefill = attention.forward(x, whole[0]);
    for (const index_t piece : {1, 3, 16, 17}) {
      auto cache = empty_cache<TestType>(shape_for(attention, 16));
      matrix y(x.rows(), a.hidden);
      for (index_t t = 0; t < x.rows(); t += piece) {
        const index_t n = std::min(piece, x.rows() - t);
        y.middleRows(t, n) = attention.forward(x.middleRows(t, n), cache[0]);
        REQUIRE(cache.size() == t + n);
      }
      CAPTURE(piece);
      // A projection that differs in the last bit may round to the next bf16.
      const double bound = std::is_same_v<typename TestType::codec_type, codec::f32> ? 2e-5 : 3e-2;
      REQUIRE((y - prefill).cwiseAbs().maxCoeff() < static_cast<float>(bound));
      REQUIRE(worst(y, want) < (bound < 1e-3 ? bound : 0.1));
    }
  }
}

TEST_CASE("decode continues after truncation as if the rest had never been", "[attention]") {
  test::random random;
  const multi_head_attention attention = make(random, kinds[4]);
  const matrix x = random_matrix(random, 30, kinds[4].hidden, 1);
  kvcache::contiguous_cache<codec::bf16> cache(shape_for(attention, 16));
  kvcache::contiguous_cache<codec::bf16> other(shape_for(attention, 16));
  (void)attention.forward(x, cache[0]);
  cache.truncate(18);
  (void)attention.forward(x.topRows(18), other[0]);
  // Products of 30 and of 18 rows may differ in the last bit, so compare loosely.
  const matrix a = attention.forward(x.middleRows(20, 1), cache[0]);
  const matrix b = attention.forward(x.middleRows(20, 1), other[0]);
  REQUIRE((a - b).cwiseAbs().maxCoeff() < 3e-2F);
}

TEST_CASE("layers of one cache are apart", "[attention]") {
  test::random random;
  const multi_head_attention attention = make(random, kinds[1]);
  cache_shape shape = shape_for(attention, 16);
  shape.num_layers = 3;
  kvcache::chunked_cache<codec::f32> cache(shape);
  std::vector<matrix> inputs;
  for (index_t layer = 0; layer < 3; ++layer) inputs.push_back(random_matrix(random, 20, kinds[1].hidden, 1));
  for (index_t layer = 0; layer < 3; ++layer)
    REQUIRE(same(attention.forward(inputs[static_cast<std::size_t>(layer)], cache[layer]),
                 attention.forward<codec::f32>(inputs[static_cast<std::size_t>(layer)],
                                               kvcache::serial_executor{}, 16)));
}

TEST_CASE("an executor of the caller's is used, with and without a cache", "[attention]") {
  struct counting {
    int* runs;
    [[nodiscard]] static index_t num_workers() { return 1; }
    void run(index_t num_tasks, kvcache::task_ref task) const {
      ++*runs;
      kvcache::serial_executor::run(num_tasks, task);
    }
  };
  test::random random;
  const multi_head_attention attention = make(random, kinds[1]);
  const matrix x = random_matrix(random, 4, kinds[1].hidden, 1);
  int runs = 0;
  kvcache::contiguous_cache<codec::f32> cache(shape_for(attention, 64));
  const matrix cached = attention.forward(x, cache[0], counting{&runs});
  REQUIRE(runs > 0);
  runs = 0;
  const matrix uncached = attention.forward(x, counting{&runs});
  REQUIRE(runs > 0);
  REQUIRE(same(cached, uncached));
}

TEST_CASE("no tokens are no work", "[attention]") {
  test::random random;
  const multi_head_attention attention = make(random, kinds[2]);
  kvcache::contiguous_cache<codec::f32> cache(shape_for(attention, 16));
  const matrix y = attention.forward(matrix(0, kinds[2].hidden), cache[0]);
  REQUIRE(y.rows() == 0);
  REQUIRE(y.cols() == kinds[2].hidden);
  REQUIRE(cache.size() == 0);
}

TEST_CASE("a full cache refuses and stays as it was", "[attention]") {
  test::random random;
  const multi_head_attention attention = make(random, kinds[1]);
  const cache_shape shape = shape_for(attention, 16);
  const index_t page_bytes = kvcache::page_pool<codec::bf16>(shape).page_bytes();
  kvcache::page_pool<codec::bf16> pool(shape, {.budget_bytes = 2 * page_bytes});
  auto cache = pool.sequence();
  const matrix x = random_matrix(random, 20, kinds[1].hidden, 1);
  (void)attention.forward(x, cache[0]);
  REQUIRE_THROWS_AS((void)attention.forward(x, cache[0]), kvcache::capacity_error);
  REQUIRE(cache.size() == 20);
  cache.check();
  (void)attention.forward(x.topRows(12), cache[0]);
  REQUIRE(cache.size() == 32);
}

TEST_CASE("weights that do not fit are refused by name", "[attention]") {
  test::random random;
  const multi_head_attention good = make(random, kinds[4]);
  const auto refused = [&](const std::string& name, auto change) {
    CAPTURE(name);
    attention_weights w = good.weights();
    attention_config c = good.config();
    change(w, c);
    try {
      (void)multi_head_attention(std::move(w), c);
    } catch (const kvcache::shape_error& error) {
      return std::string(error.what()).find(name) != std::string::npos;
    }
    return false;
  };
  REQUIRE(refused("wq", [](auto& w, auto&) { w.wq.conservativeResize(w.wq.rows() - 1, w.wq.cols()); }));
  REQUIRE(refused("wk", [](auto& w, auto&) { w.wk.conservativeResize(w.wk.rows(), w.wk.cols() + 1); }));
  REQUIRE(refused("wv", [](auto& w, auto&) { w.wv.resize(0, 0); }));
  REQUIRE(refused("wo", [](auto& w, auto&) { w.wo.transposeInPlace(); }));
  REQUIRE(refused("bq", [](auto& w, auto&) { w.bq.conservativeResize(3); }));
  REQUIRE(refused("bk", [](auto& w, auto&) { w.bk.conservativeResize(3); }));
  REQUIRE(refused("bv", [](auto& w, auto&) { w.bv.conservativeResize(3); }));
  REQUIRE(refused("bo", [](auto& w, auto&) { w.bo.conservativeResize(3); }));
  REQUIRE(refused("q_norm", [](auto& w, auto&) { w.q_norm.conservativeResize(3); }));
  REQUIRE(refused("k_norm", [](auto& w, auto&) { w.k_norm.conservativeResize(3); }));
  REQUIRE(refused("num_q_heads", [](auto&, auto& c) { c.num_q_heads = 7; }));
  REQUIRE(refused("num_kv_heads", [](auto&, auto& c) { c.num_kv_heads = 0; }));
  REQUIRE(refused("rope", [](auto&, auto& c) { c.rope->head_dim = 10; }));
}
