// SPDX-License-Identifier: MIT
// The choice of the next token.
#include "support/catch.hpp"

#include "llama/sampler.hpp"

#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace {

using llama::index_t;
using llama::sampler;

/// How often each token is chosen in `num_draws`.
std::vector<int> histogram(const std::vector<float>& logits, const llama::sampler_options& options,
                           int num_draws) {
  sampler choose(options);
  std::vector<int> counts(logits.size(), 0);
  for (int i = 0; i < num_draws; ++i) ++counts[static_cast<std::size_t>(choose.next(logits))];
  return counts;
}

}  // namespace

TEST_CASE("splitmix64 gives the published numbers", "[examples]") {
  llama::splitmix64 random(1234567);
  CHECK(random.next() == 6457827717110365317ULL);
  CHECK(random.next() == 3203168211198807973ULL);
  CHECK(random.next() == 9817491932198370423ULL);
  for (int i = 0; i < 1000; ++i) {
    const double u = random.unit();
    CHECK((u >= 0 && u < 1));
  }
}

TEST_CASE("greedy is the first of the largest, and never a NaN", "[examples]") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  CHECK(llama::greedy_token(std::vector<float>{1, 3, 2}) == 1);
  CHECK(llama::greedy_token(std::vector<float>{3, 3, 2}) == 0);
  CHECK(llama::greedy_token(std::vector<float>{nan, 1, 2}) == 2);
  CHECK(llama::greedy_token(std::vector<float>{1, nan, 0}) == 0);
  CHECK(llama::greedy_token(std::vector<float>{-inf, -inf}) == 0);
  CHECK(llama::greedy_token(std::vector<float>{nan}) == 0);
  sampler greedy({.temperature = 0});
  CHECK(greedy.next(std::vector<float>{0, 5, 1}) == 1);
}

TEST_CASE("tokens come as often as their probabilities say", "[examples]") {
  const std::vector<float> logits{std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  const auto all = histogram(logits, {.temperature = 1, .top_p = 1, .seed = 7}, 20000);
  CHECK(std::abs(all[0] - 10000) < 300);
  CHECK(std::abs(all[1] - 6000) < 300);
  CHECK(std::abs(all[2] - 4000) < 300);
  const auto nucleus = histogram(logits, {.temperature = 1, .top_p = 0.7, .seed = 7}, 16000);
  CHECK(std::abs(nucleus[0] - 10000) < 300);
  CHECK(std::abs(nucleus[1] - 6000) < 300);
  CHECK(nucleus[2] == 0);
  const auto colder =
      histogram(logits, {.temperature = 0.5, .top_p = 1, .seed = 7}, 38000);  // squares: 25, 9, 4
  CHECK(std::abs(colder[0] - 25000) < 600);
  CHECK(std::abs(colder[1] - 9000) < 600);
  const auto one = histogram(logits, {.temperature = 1, .top_p = 0.01, .seed = 7}, 100);
  CHECK(one[0] == 100);
}

TEST_CASE("a seed gives the same choices every time", "[examples]") {
  const std::vector<float> logits(50, 0.0f);
  sampler a({.temperature = 1, .top_p = 1, .seed = 42}), b({.temperature = 1, .top_p = 1, .seed = 42}),
      c({.temperature = 1, .top_p = 1, .seed = 43});
  std::vector<index_t> from_a, from_b, from_c;
  for (int i = 0; i < 20; ++i) {
    from_a.push_back(a.next(logits)), from_b.push_back(b.next(logits)), from_c.push_back(c.next(logits));
  }
  CHECK(from_a == from_b);
  CHECK(from_a != from_c);
}

TEST_CASE("extreme temperatures and logits still give a token", "[examples]") {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const double temperature : {1e-300, 1e-6, 1.0, 1e6, 1e300}) {
    sampler choose({.temperature = temperature, .top_p = 0.9});
    for (const auto& logits : std::vector<std::vector<float>>{{1e30f, -1e30f, 0},
                                                              {-inf, 0, -inf},
                                                              {-inf, -inf, -inf},
                                                              {nan, nan, nan},
                                                              {nan, 1, nan},
                                                              {inf, 0, 1}}) {
      const index_t id = choose.next(logits);
      CHECK((id >= 0 && id < 3));
    }
    CHECK(choose.next(std::vector<float>{-inf, 0, -inf}) == 1);
  }
}
