// SPDX-License-Identifier: MIT
// element_kernels::attend: many query rows over several whole blocks at once, against softmax and sums in double precision.
#include "support/catch.hpp"
#include "support/kernels_on_tiles.hpp"
#include "support/random.hpp"

#include <kvcache/block/order.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

using namespace kvcache;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr index_t tokens = 64;  // of a block

float in_bf16(float x) { return to_float(from_float<bfloat16>(x)); }

/// Those of the levels that run here that have an `attend`.
std::vector<const kernel::table*> levels() {
  auto all = test::every_table();
  std::erase_if(all, [](const kernel::table* level) { return level->bf16.attend == nullptr; });
  return all;
}

/// Blocks one after the other, the stored numbers beside them.
class run_of_blocks {
 public:
  using order = block_order<bfloat16>;

  /// \param growth  keys of each block are so many times as large as those of the one before
  run_of_blocks(const kernel::table& kernels, index_t head_dim, index_t count, float growth,
                test::random& random)
      : g_{tokens, head_dim}, count_(count), kernels_(&kernels) {
    float size = 1;
    for (index_t b = 0; b < count; ++b, size *= growth) {
      std::vector<float> k_rows = random.floats(tokens * head_dim);
      for (float& x : k_rows) x = in_bf16(x * size);
      std::vector<float> v_rows = random.floats(tokens * head_dim);
      for (float& x : v_rows) x = in_bf16(x);
      k.insert(k.end(), k_rows.begin(), k_rows.end());
      v.insert(v.end(), v_rows.begin(), v_rows.end());
    }
    store();
  }

  /// Puts what is in k and v into the blocks.
  void store() {
    memory_.clear();
    blocks_.fill(nullptr);
    for (index_t b = 0; b < count_; ++b) {
      memory_.emplace_back(values_offset() + order::value_size(g_) * 2, huge_page_resource());
      blocks_[static_cast<std::size_t>(b)] = memory_.back().data();
      const float* k_rows = k.data() + b * tokens * g_.head_dim;
      const float* v_rows = v.data() + b * tokens * g_.head_dim;
      kernels_->bf16.encode_keys(g_, memory_.back().data(), 0, tokens, {k_rows, g_.head_dim});
      kernels_->bf16.encode_values(g_, memory_.back().data() + values_offset(), 0, tokens,
                                   {v_rows, g_.head_dim});
    }
    if (count_ > 1) blocks_[static_cast<std::size_t>(count_)] = blocks_[0];  // what comes next, of some
  }

  [[nodiscard]] kernel::block_run run() const { return {blocks_.data(), count_, values_offset()}; }
  [[nodiscard]] const block_geometry& geometry() const { return g_; }

  std::vector<float> k, v;  // [count * 64, head_dim]

 private:
  [[nodiscard]] index_t values_offset() const { return order::key_size(g_) * 2; }

  block_geometry g_;
  index_t count_;
  const kernel::table* kernels_;
  std::vector<memory_block> memory_;
  std::array<const std::byte*, 2 * kernel::max_blocks_at_once> blocks_{};
};

/// head_dim 64, keys of zeros, and values by which sums are the weights of the first block.
run_of_blocks showing_weights(const kernel::table& kernels, index_t count, test::random& random) {
  run_of_blocks blocks(kernels, tokens, count, 1.0F, random);
  std::fill(blocks.k.begin(), blocks.k.end(), 0.0F);
  std::fill(blocks.v.begin(), blocks.v.end(), 0.0F);
  for (std::size_t t = 0; t < 64; ++t) blocks.v[t * 64 + t] = 1.0F;
  return blocks;
}

/// The running softmax of some rows, and their sums.
struct state {
  state(index_t num_rows, index_t head_dim)
      : rows(static_cast<std::size_t>(num_rows), {-infinity, 0.0F}),
        sums(static_cast<std::size_t>(num_rows * head_dim), 0.0F) {}
  std::vector<kernel::softmax_row> rows;
  std::vector<float> sums;
};

void attend(const kernel::table& kernels, const run_of_blocks& blocks, const std::vector<float>& q,
            state& to) {
  const index_t dim = blocks.geometry().head_dim;
  const auto num_rows = static_cast<index_t>(to.rows.size());
  const memory_block prepared(num_rows * kernel::prepared_element_floats(dim) * 4, huge_page_resource());
  const float* rows =
      kernels.bf16.prepare(dim, q.data(), num_rows, reinterpret_cast<float*>(prepared.data()));
  REQUIRE(kernels.bf16.attends(blocks.geometry(), num_rows));
  kernels.bf16.attend(blocks.geometry(), blocks.run(), rows, num_rows, to.rows.data(), to.sums.data());
}

/// Compares one row with the softmax over all blocks of all runs that it has seen.
void check_row(const std::vector<const run_of_blocks*>& seen, const float* q, const kernel::softmax_row& row,
               const float* sums) {
  const index_t dim = seen[0]->geometry().head_dim;
  std::vector<double> logits;
  double largest = -std::numeric_limits<double>::infinity();
  double q2 = 0;
  double k2 = 0;
  for (index_t d = 0; d < dim; ++d) q2 += double{q[d]} * double{q[d]};
  for (const run_of_blocks* blocks : seen) {
    for (std::size_t t = 0; t < blocks->k.size(); t += static_cast<std::size_t>(dim)) {
      double dot = 0;
      double of_key = 0;
      for (index_t d = 0; d < dim; ++d) {
        const double x = double{blocks->k[t + static_cast<std::size_t>(d)]};
        dot += double{q[d]} * x;
        of_key += x * x;
      }
      logits.push_back(dot);
      largest = std::max(largest, dot);
      k2 = std::max(k2, of_key);
    }
  }
  const double of_scores = std::sqrt(q2 * k2) / 250;
  REQUIRE(double{row.max} <= largest + of_scores);
  REQUIRE(double{row.max} >= largest - of_scores - double{kernel::softmax_slack});
  double sum = 0;
  std::vector<double> out(static_cast<std::size_t>(dim), 0.0);
  double v2 = 0;
  std::size_t i = 0;
  for (const run_of_blocks* blocks : seen) {
    for (std::size_t t = 0; t < blocks->v.size(); t += static_cast<std::size_t>(dim), ++i) {
      const double weight = std::exp(logits[i] - largest);
      sum += weight;
      double of_value = 0;
      for (std::size_t d = 0; d < out.size(); ++d) {
        const double x = double{blocks->v[t + d]};
        out[d] += weight * x;
        of_value += x * x;
      }
      v2 = std::max(v2, of_value);
    }
  }
  const double lse = double{row.max} + std::log(double{row.sum});
  CHECK(std::abs(lse - largest - std::log(sum)) < 0x1p-7 + of_scores);
  double worst = 0;
  for (std::size_t d = 0; d < out.size(); ++d)
    worst = std::max(worst, std::abs(double{sums[d]} / double{row.sum} - out[d] / sum));
  CHECK(worst < (0x1p-6 + of_scores) * std::sqrt(v2));
}

}  // namespace

TEST_CASE("many rows attend to several blocks at once", "[kernel]") {
  test::random random;
  index_t done = 0;
  for (const kernel::table* level : levels()) {
    for (const index_t head_dim : {32, 96, 128, 160, 512}) {
      for (const index_t num_rows : {17, 20, 31, 32, 33, 48, 63, 64, 65, 127, 130}) {
        const index_t count = 1 + (done++ + num_rows) % kernel::max_blocks_at_once;
        const float growth = random.chance(0.5) ? 4.0F : 1.0F;  // maxima rise from block to block
        CAPTURE(head_dim, num_rows, count, growth);
        const run_of_blocks first(*level, head_dim, count, growth, random);
        const run_of_blocks second(*level, head_dim, kernel::max_blocks_at_once + 1 - count, growth, random);
        std::vector<float> q = random.floats(num_rows * head_dim);
        for (float& x : q) x *= 4 / std::sqrt(static_cast<float>(head_dim));
        state s(num_rows, head_dim);
        attend(*level, first, q, s);
        for (index_t r = 0; r < num_rows; r += 1 + num_rows / 16)
          check_row({&first}, &q[static_cast<std::size_t>(r * head_dim)], s.rows[static_cast<std::size_t>(r)],
                    &s.sums[static_cast<std::size_t>(r * head_dim)]);
        attend(*level, second, q, s);
        for (index_t r = 0; r < num_rows; r += 1 + num_rows / 16)
          check_row({&first, &second}, &q[static_cast<std::size_t>(r * head_dim)],
                    s.rows[static_cast<std::size_t>(r)], &s.sums[static_cast<std::size_t>(r * head_dim)]);
      }
    }
  }
  CHECK((done > 0 || test::kernels_on_emulated_tiles() == nullptr));
}

TEST_CASE("weights of many rows are exponentials, by six thousandths", "[kernel]") {
  test::random random;
  for (const kernel::table* level : levels()) {
    run_of_blocks blocks = showing_weights(*level, 1, random);
    std::vector<float> q(20 * 64, 0.0F);
    for (std::size_t r = 0; r < 20; ++r) q[r * 64] = 1.0F;
    for (const float most_below : {1.0F, 8.0F, 80.0F, 300.0F, 1e5F, 1e9F, 1e30F}) {
      std::vector<double> scores;
      for (std::size_t t = 0; t < 64; ++t) {
        blocks.k[t * 64] = in_bf16(-most_below * random.uniform());
        scores.push_back(double{blocks.k[t * 64]});
      }
      blocks.store();
      const double largest = *std::max_element(scores.begin(), scores.end());
      // as the first block, behind a maximum with room for all, and behind a higher one
      for (const float max :
           {-infinity, static_cast<float>(largest) - 7.5F, static_cast<float>(largest) + 3}) {
        state s(20, 64);
        for (kernel::softmax_row& row : s.rows) row.max = max;
        attend(*level, blocks, q, s);
        const std::size_t row = 17;
        const double top = max == -infinity ? largest : double{max};
        REQUIRE(double{s.rows[row].max} == top);
        for (std::size_t t = 0; t < 64; ++t) {
          const double want = std::exp(scores[t] - top);
          CAPTURE(most_below, max, scores[t], want, s.sums[row * 64 + t]);
          REQUIRE(std::abs(double{s.sums[row * 64 + t]} - want) <= 0.0061 * want + 2e-38);
        }
      }
    }
  }
}

TEST_CASE("a row is the same whatever rows are beside it, as long as they are many", "[kernel]") {
  test::random random;
  for (const kernel::table* level : levels()) {
    const run_of_blocks blocks(*level, 64, 3, 4.0F, random);
    const std::vector<float> q = random.floats(70 * 64);
    state all(70, 64);
    attend(*level, blocks, q, all);
    for (const index_t first : {0, 5, 37, 53}) {
      CAPTURE(first);
      state part(17, 64);
      attend(*level, blocks, {q.begin() + first * 64, q.begin() + (first + 17) * 64}, part);
      for (std::size_t r = 0; r < 17; ++r) {
        const std::size_t in_all = r + static_cast<std::size_t>(first);
        REQUIRE(part.rows[r].max == all.rows[in_all].max);
        REQUIRE(part.rows[r].sum == all.rows[in_all].sum);
      }
      REQUIRE(std::equal(part.sums.begin(), part.sums.end(), all.sums.begin() + first * 64));
    }
  }
}

TEST_CASE("many rows average, and large logits that are equal weigh the same", "[kernel]") {
  test::random random;
  for (const kernel::table* level : levels()) {
    run_of_blocks blocks(*level, 32, 4, 1.0F, random);
    std::fill(blocks.v.begin(), blocks.v.end(), 1.0F);
    blocks.store();
    state s(40, 32);
    attend(*level, blocks, random.floats(40 * 32), s);
    for (std::size_t i = 0; i < s.sums.size(); ++i) {
      const float average = s.sums[i] / s.rows[i / 32].sum;
      REQUIRE(std::abs(average - 1.0F) < 1e-6F);  // weights are rounded before they are added up
    }
    std::fill(blocks.k.begin(), blocks.k.end(), 1.0F);
    blocks.store();
    for (const float size : {1e3F, 1e6F, 3e9F, 1e12F, 1e37F}) {
      CAPTURE(size);
      state equal(32, 32);
      attend(*level, blocks, std::vector<float>(32 * 32, size / 32), equal);
      CHECK(equal.rows[31].sum == 256.0F);
      CHECK(equal.sums[31 * 32] == 256.0F);
    }
  }
}

TEST_CASE("a maximum rises where floats are so far apart that it and the room above it round to a score",
          "[kernel]") {
  test::random random;
  for (const kernel::table* level : levels()) {
    run_of_blocks blocks(*level, 32, 1, 1.0F, random);
    std::fill(blocks.k.begin(), blocks.k.end(), 0.0F);
    std::fill(blocks.v.begin(), blocks.v.end(), 0.0F);
    for (std::size_t t = 0; t < 64; ++t) {
      blocks.k[t * 32] = 0x1p27F;
      blocks.k[t * 32 + 1] = t == 40 ? 32.0F : 16.0F;
      blocks.v[t * 32 + t % 32] = 1.0F;
    }
    blocks.store();
    state s(17, 32);
    for (kernel::softmax_row& row : s.rows) row.max = 0x1p27F + 16;
    attend(*level, blocks, std::vector<float>(17 * 32, 1.0F), s);
    CHECK(s.rows[16].max == 0x1p27F + 32);
    CHECK(std::abs(s.rows[16].sum - 1.0F) < 1e-4F);
    std::vector<float> scores(64, 0x1p27F + 16);
    scores[40] += 16;
    kernel::softmax_row row{0x1p27F + 16, 0.0F};
    float rescale = 0;
    level->softmax(scores.data(), 64, 64, 1, &row, &rescale);
    CHECK(row.max == 0x1p27F + 32);
  }
}

TEST_CASE("each step of an octave becomes the bf16 that is nearest, but for what a table of 64 leaves",
          "[kernel]") {
  test::random random;
  for (const kernel::table* level : levels()) {
    run_of_blocks blocks = showing_weights(*level, 4, random);
    std::vector<float> q(20 * 64, 0.0F);
    for (std::size_t r = 0; r < 20; ++r) q[r * 64] = q[r * 64 + 1] = 1.0F;
    for (std::size_t first = 0; first < 256; first += 63) {
      for (std::size_t t = 0; t < 256; ++t) {
        const float score = t < 64 ? -static_cast<float>(first + t) * 0.693147181F / 256 : -100.0F;
        blocks.k[t * 64] = in_bf16(score);
        blocks.k[t * 64 + 1] = in_bf16(score - blocks.k[t * 64]);
      }
      blocks.k[0] = blocks.k[1] = 0.0F;  // the maximum
      blocks.store();
      state s(20, 64);
      attend(*level, blocks, q, s);
      for (std::size_t t = 1; t < 64; ++t) {
        const double want = std::exp2(-static_cast<double>(first + t) / 256);
        CAPTURE(first, t);
        REQUIRE(std::abs(double{s.sums[18 * 64 + t]} / want - 1) < 0.00475);
      }
    }
  }
}

TEST_CASE("a score that only overflows in tiles shows as well", "[kernel]") {
  test::random random;
  for (const kernel::table* level : levels()) {
    run_of_blocks blocks(*level, 32, 1, 1.0F, random);
    std::fill(blocks.k.begin(), blocks.k.end(), 0.0F);
    for (std::size_t i = 0; i < blocks.k.size(); i += 32) blocks.k[i] = -0x1.FEp127F;
    blocks.store();
    std::vector<float> q(17 * 32, 0.0F);
    for (std::size_t i = 0; i < q.size(); i += 32) q[i] = 1.0F + 0x1.01p-8F;  // 1 + 2^-7 in bf16
    state s(17, 32);
    attend(*level, blocks, q, s);
    CHECK_FALSE(std::isfinite(s.rows[0].sum));
  }
}

TEST_CASE("what is not finite shows in many rows, for whoever computes again", "[kernel]") {
  test::random random;
  const float not_a_number = std::numeric_limits<float>::quiet_NaN();
  for (const kernel::table* level : levels()) {
    const auto shows = [](const state& s) {  // in every row
      for (std::size_t r = 0; r < s.rows.size(); ++r) {
        bool finite = std::isfinite(s.rows[r].sum);
        for (std::size_t d = 0; d < 32; ++d) finite = finite && std::isfinite(s.sums[r * 32 + d]);
        if (finite) return false;
      }
      return true;
    };
    const std::vector<float> q = random.floats(32 * 32);
    for (int i = 0; i < 24; ++i) {
      const float bad = i % 2 == 0 ? not_a_number : infinity;
      for (const bool in_keys : {false, true}) {
        const auto token = static_cast<std::size_t>(random.between(0, 191));
        CAPTURE(bad, in_keys, token);
        run_of_blocks blocks(*level, 32, 3, 1.0F, random);
        (in_keys ? blocks.k : blocks.v)[token * 32 + 5] = bad;
        blocks.store();
        state s(32, 32);
        attend(*level, blocks, q, s);
        CHECK(shows(s));
      }
    }
    const run_of_blocks blocks(*level, 32, 1, 1.0F, random);
    for (const float bad : {not_a_number, infinity}) {
      std::vector<float> with_one = q;
      with_one[3] = bad;
      state s(32, 32);
      attend(*level, blocks, with_one, s);
      CHECK_FALSE(std::isfinite(s.rows[0].sum));
      CHECK(std::isfinite(s.rows[4].sum));  // those computed side by side with it may show it too
    }
    const auto attends = level->bf16.attends;
    CHECK(attends({64, 32}, 17));
    CHECK_FALSE(attends({64, 32}, 16));
    CHECK_FALSE(attends({16, 32}, 32));
    CHECK_FALSE(attends({64, 33}, 32));
  }
}
