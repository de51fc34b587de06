// SPDX-License-Identifier: MIT
// Rotation against complex numbers in double precision, and the rules a rotation has to keep.

#include <kvcache/attention/rope.hpp>

#include "oracle/rope_oracle.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <cmath>
#include <string>
#include <vector>

namespace {

using kvcache::index_t;
using kvcache::rope_config;
using kvcache::rope_pairing;
using kvcache::rope_table;

/// The same settings as the oracle takes them.
oracle::rope exact(const rope_config& c) {
  oracle::rope r;
  r.head_dim = c.head_dim;
  r.rotary_dim = c.rotary_dim == 0 ? c.head_dim : c.rotary_dim;
  r.pairing = c.pairing == rope_pairing::half ? oracle::rope::pairs::half : oracle::rope::pairs::interleaved;
  r.theta = c.theta;
  if (const auto* linear = std::get_if<kvcache::rope_scaling_linear>(&c.scaling)) {
    r.kind = oracle::rope::scaling::linear;
    r.factor = linear->factor;
  } else if (const auto* ntk = std::get_if<kvcache::rope_scaling_ntk>(&c.scaling)) {
    r.kind = oracle::rope::scaling::ntk;
    r.factor = ntk->factor;
  } else if (const auto* yarn = std::get_if<kvcache::rope_scaling_yarn>(&c.scaling)) {
    r.kind = oracle::rope::scaling::yarn;
    r.factor = yarn->factor;
    r.original_context = static_cast<double>(yarn->original_context);
    r.beta_fast = yarn->beta_fast;
    r.beta_slow = yarn->beta_slow;
    r.attention_factor = yarn->attention_factor;
  } else if (const auto* llama = std::get_if<kvcache::rope_scaling_llama3>(&c.scaling)) {
    r.kind = oracle::rope::scaling::llama3;
    r.factor = llama->factor;
    r.original_context = static_cast<double>(llama->original_context);
    r.low_freq_factor = llama->low_freq_factor;
    r.high_freq_factor = llama->high_freq_factor;
  }
  return r;
}

std::vector<rope_config> configurations() {
  std::vector<rope_config> all;
  for (const rope_pairing pairing : {rope_pairing::half, rope_pairing::interleaved}) {
    for (const index_t head_dim : {2, 8, 33, 64, 128, 512}) {
      const index_t even = head_dim - head_dim % 2;
      all.push_back({.head_dim = head_dim, .pairing = pairing, .rotary_dim = even});
      all.push_back({.head_dim = head_dim,
                     .pairing = pairing,
                     .theta = 5e5,
                     .rotary_dim = std::max<index_t>(2, even / 4 * 2)});
      if (even < 4) continue;
      all.push_back({.head_dim = head_dim,
                     .pairing = pairing,
                     .rotary_dim = even,
                     .scaling = kvcache::rope_scaling_linear{4}});
      all.push_back({.head_dim = head_dim,
                     .pairing = pairing,
                     .rotary_dim = even,
                     .scaling = kvcache::rope_scaling_ntk{8}});
      all.push_back({.head_dim = head_dim,
                     .pairing = pairing,
                     .rotary_dim = even,
                     .scaling = kvcache::rope_scaling_yarn{16, 4096}});
      all.push_back({.head_dim = head_dim,
                     .pairing = pairing,
                     .theta = 1e6,
                     .rotary_dim = even,
                     .scaling = kvcache::rope_scaling_yarn{.factor = 4,
                                                           .original_context = 32768,
                                                           .beta_fast = 20,
                                                           .beta_slow = 2,
                                                           .attention_factor = 1.5}});
      all.push_back({.head_dim = head_dim,
                     .pairing = pairing,
                     .theta = 5e5,
                     .rotary_dim = even,
                     .scaling = kvcache::rope_scaling_llama3{}});
      all.push_back({.head_dim = head_dim,
                     .pairing = pairing,
                     .rotary_dim = even,
                     .scaling = kvcache::rope_scaling_llama3{32, 2, 8, 1024}});
    }
  }
  return all;
}

std::string words(const rope_config& c) {
  return "head_dim " + std::to_string(c.head_dim) + ", rotary_dim " + std::to_string(c.rotary_dim) +
         (c.pairing == rope_pairing::half ? ", half" : ", interleaved") + ", scaling " +
         std::to_string(c.scaling.index());
}

/// The largest error of x against `want`, relative to the largest pair.
double worst(const std::vector<float>& x, const std::vector<double>& want) {
  REQUIRE(x.size() == want.size());
  double error = 0;
  double size = 1e-30;
  for (std::size_t i = 0; i < x.size(); ++i) {
    error = std::max(error, std::abs(static_cast<double>(x[i]) - want[i]));
    size = std::max(size, std::abs(want[i]));
  }
  return error / size;
}

const std::vector<index_t> positions{0, 1, 2, 17, 4095, 100000, 1048575, 16777217, -1, -3000};

}  // namespace

TEST_CASE("frequencies and attention factor are the formulas", "[attention]") {
  for (const rope_config& c : configurations()) {
    CAPTURE(words(c));
    const rope_table table(c);
    const std::vector<double> want = oracle::frequencies(exact(c));
    REQUIRE(table.frequencies().size() == want.size());
    for (std::size_t i = 0; i < want.size(); ++i) {
      CAPTURE(i);
      REQUIRE(std::abs(table.frequencies()[i] / want[i] - 1) < 1e-13);
    }
    REQUIRE(std::abs(table.attention_factor() / oracle::magnitude(exact(c)) - 1) < 1e-14);
  }
}

TEST_CASE("rows turn as complex numbers do, near and far, computed ahead or not", "[attention]") {
  test::random random;
  for (const rope_config& c : configurations()) {
    CAPTURE(words(c));
    for (const index_t ahead : {0, 18, 5000}) {
      CAPTURE(ahead);
      if (ahead == 5000 && c.head_dim > 64) continue;
      const rope_table table(c, ahead);
      const std::vector<float> x = random.floats(static_cast<index_t>(positions.size()) * 3 * c.head_dim);
      std::vector<float> turned = x;
      kvcache::rope(turned, positions, table);
      const auto want = oracle::rotated({x.begin(), x.end()}, positions, exact(c));
      REQUIRE(worst(turned, want) < 2.5e-7);
      // What is not rotated is left alone, bit for bit.
      const index_t rotary = c.rotary_dim;
      for (std::size_t i = 0; i < x.size(); ++i) {
        if (static_cast<index_t>(i) % c.head_dim >= rotary) REQUIRE(turned[i] == x[i]);
      }
    }
  }
}

TEST_CASE("queries and keys of consecutive tokens are rotated together", "[attention]") {
  test::random random;
  const rope_table table({.head_dim = 6, .pairing = rope_pairing::half, .rotary_dim = 4}, 12);
  for (const index_t tokens : {0, 1, 5}) {
    for (const index_t pos : {0, 9, 1000}) {
      std::vector<float> q = random.floats(tokens * 4 * 6);
      std::vector<float> k = random.floats(tokens * 2 * 6);
      std::vector<float> q_apart = q;
      std::vector<float> k_apart = k;
      std::vector<index_t> at;
      for (index_t t = 0; t < tokens; ++t) at.push_back(pos + t);
      kvcache::rope(q, k, pos, table, tokens);
      kvcache::rope(q_apart, at, table);
      kvcache::rope(k_apart, at, table);
      REQUIRE(q == q_apart);
      REQUIRE(k == k_apart);
    }
  }
  // One token unless said otherwise; heads of one of them may be missing.
  std::vector<float> q = random.floats(12);
  std::vector<float> again = q;
  kvcache::rope(q, {}, 7, table);
  const std::vector<index_t> seven{7};
  kvcache::rope(again, seven, table);
  REQUIRE(q == again);
}

TEST_CASE("position zero leaves rows alone, but for the attention factor", "[attention]") {
  test::random random;
  const std::vector<index_t> zero{0};
  const std::vector<float> x = random.floats(64);
  std::vector<float> turned = x;
  kvcache::rope(turned, zero, rope_table({.head_dim = 64, .pairing = rope_pairing::interleaved}));
  REQUIRE(turned == x);
}

TEST_CASE("the product of a query and a key depends on their distance only", "[attention]") {
  test::random random;
  for (const rope_pairing pairing : {rope_pairing::half, rope_pairing::interleaved}) {
    const rope_table table(
        {.head_dim = 32, .pairing = pairing, .scaling = kvcache::rope_scaling_yarn{4, 4096}});
    const std::vector<float> q = random.floats(32);
    const std::vector<float> k = random.floats(32);
    const auto product = [&](index_t p, index_t c) {
      std::vector<float> a = q;
      std::vector<float> b = k;
      kvcache::rope(a, std::vector<index_t>{p}, table);
      kvcache::rope(b, std::vector<index_t>{c}, table);
      double sum = 0;
      for (std::size_t i = 0; i < 32; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
      return sum;
    };
    const double near = product(20, 3);
    for (const index_t further : {1, 100, 30000, 1000000}) {
      CAPTURE(further);
      REQUIRE(std::abs(product(20 + further, 3 + further) - near) < 2e-5);
    }
  }
}

TEST_CASE("turning on by some positions is being there in the first place", "[attention]") {
  test::random random;
  for (const rope_config& c : configurations()) {
    CAPTURE(words(c));
    const rope_table table(c, 10);
    for (const index_t delta : {0, 5, -40, 70000}) {
      std::vector<float> x = random.floats(2 * c.head_dim);
      const auto want = oracle::rotated({x.begin(), x.end()}, std::vector<index_t>{100 + delta}, exact(c));
      kvcache::rope(x, std::vector<index_t>{100}, table);
      table.turn_by(x.data(), 2, delta);
      REQUIRE(worst(x, want) < 5e-7);
    }
  }
}

TEST_CASE("the two pairings are one rotation of reordered rows", "[attention]") {
  test::random random;
  constexpr std::size_t dim = 16;
  const rope_table half({.head_dim = dim, .pairing = rope_pairing::half});
  const rope_table interleaved({.head_dim = dim, .pairing = rope_pairing::interleaved});
  std::vector<float> x = random.floats(dim);
  std::vector<float> reordered(dim);
  for (std::size_t j = 0; j < dim / 2; ++j) {
    reordered[2 * j] = x[j];
    reordered[2 * j + 1] = x[j + dim / 2];
  }
  const std::vector<index_t> at{321};
  kvcache::rope(x, at, half);
  kvcache::rope(reordered, at, interleaved);
  for (std::size_t j = 0; j < dim / 2; ++j) {
    REQUIRE(reordered[2 * j] == x[j]);
    REQUIRE(reordered[2 * j + 1] == x[j + dim / 2]);
  }
}

TEST_CASE("impossible configurations are refused with the field's name", "[attention]") {
  const auto refused = [](const rope_config& c, const std::string& field, index_t ahead = 0) {
    CAPTURE(field);
    try {
      (void)rope_table(c, ahead);
    } catch (const kvcache::shape_error& error) {
      return std::string(error.what()).find(field) != std::string::npos;
    }
    return false;
  };
  const auto half = rope_pairing::half;
  REQUIRE(refused({.head_dim = 0, .pairing = half}, "head_dim"));
  REQUIRE(refused({.head_dim = 513, .pairing = half}, "head_dim"));
  REQUIRE(refused({.head_dim = 7, .pairing = half}, "rotary_dim"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .rotary_dim = 3}, "rotary_dim"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .rotary_dim = 10}, "rotary_dim"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .rotary_dim = -2}, "rotary_dim"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .theta = 0}, "theta"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .theta = std::nan("")}, "theta"));
  REQUIRE(refused({.head_dim = 8, .pairing = half}, "max_positions", -1));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .scaling = kvcache::rope_scaling_linear{0.5}}, "factor"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .scaling = kvcache::rope_scaling_ntk{0}}, "factor"));
  REQUIRE(refused({.head_dim = 2, .pairing = half, .scaling = kvcache::rope_scaling_ntk{2}}, "rotary_dim"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .scaling = kvcache::rope_scaling_yarn{2, 0}},
                  "original_context"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .scaling = kvcache::rope_scaling_llama3{8, 1, 4, -1}},
                  "original_context"));
  REQUIRE(refused({.head_dim = 8, .pairing = half, .scaling = kvcache::rope_scaling_llama3{8, 4, 4, 8192}},
                  "high_freq_factor"));
}

TEST_CASE("YaRN settings without a meaning are refused", "[attention]") {
  const auto refused = [](kvcache::rope_scaling_yarn yarn, double theta = 10000) {
    CHECK_THROWS_AS(
        kvcache::rope_table(
            {.head_dim = 8, .pairing = kvcache::rope_pairing::half, .theta = theta, .scaling = yarn}),
        kvcache::shape_error);
  };
  refused({.factor = 4}, 1);  // the logarithm of theta divides
  refused({.factor = 4, .beta_fast = 1, .beta_slow = 2});
  refused({.factor = 4, .beta_fast = -1, .beta_slow = -2});
  refused({.factor = 4, .attention_factor = -2});
  refused({.factor = 0.5});
}
