// SPDX-License-Identifier: MIT
// A batch of caches chosen by a string does what single calls and batches of typed caches do, bit by bit.

#include <kvcache/interop/any_cache.hpp>

#include "conformance/caches.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using namespace conformance;
using kvcache::any_cache;
using kvcache::any_layer;
using kvcache::attend_item;

namespace {

constexpr cache_shape small{.num_layers = 2, .num_kv_heads = 2, .head_dim = 16, .block_size = 16};
constexpr cache_shape other{.num_layers = 3, .num_kv_heads = 1, .head_dim = 40, .block_size = 32};
constexpr index_t group_size = 2;

/// Two threads, each taking the next task.
struct two_threads {
  [[nodiscard]] static index_t num_workers() { return 2; }
  static void run(index_t num_tasks, kvcache::task_ref task) {
    std::atomic<index_t> next{0};
    const auto work = [&](index_t worker) {
      for (index_t i = next++; i < num_tasks; i = next++) task(i, worker);
    };
    std::thread second(work, 1);
    work(0);
    second.join();
  }
};

/// One worker that says how often it was called, and for how many tasks in all.
struct counting_executor {
  index_t num_runs = 0;
  index_t num_tasks = 0;

  [[nodiscard]] static index_t num_workers() { return 1; }
  void run(index_t tasks, kvcache::task_ref task) {
    ++num_runs;
    num_tasks += tasks;
    kvcache::serial_executor::run(tasks, task);
  }
};

struct answer {
  std::vector<float> out;
  std::vector<float> lse;
};

/// What one item of a batch is given.
struct request {
  index_t q_len = 1;
  std::vector<float> q;
  std::vector<std::uint8_t> mask;
  std::vector<index_t> q_positions;
  std::vector<index_t> k_positions;

  /// Requests of every kind in turn.
  request(index_t kind, const cache_shape& shape, index_t kv_len, test::random& random) {
    if (kind % 4 != 0) q_len = kind % 4 == 1 ? 37 : 5;
    q = random.floats(q_len * shape.num_kv_heads * group_size * shape.head_dim);
    if (kind % 4 == 2 || q_len > kv_len) {
      mask.resize(static_cast<std::size_t>(q_len * kv_len));
      for (std::uint8_t& bit : mask) bit = random.chance(0.7) ? 1 : 0;
    }
    if (kind % 4 != 3 && q_len <= kv_len) return;
    for (index_t t = 0; t < kv_len; ++t) k_positions.push_back(2 * t + 1);
    for (index_t i = 0; i < q_len; ++i) q_positions.push_back(2 * kv_len - 3 * i);
  }

  [[nodiscard]] answer empty_answer(const cache_shape& shape) const {
    return {std::vector<float>(q.size(), 7.0F),
            std::vector<float>(static_cast<std::size_t>(q_len * shape.num_kv_heads * group_size), 7.0F)};
  }
  template <class Layer>
  [[nodiscard]] attend_item<Layer> item(Layer layer, answer& to) const {
    return {q, layer, to.out, q_len, mask, q_positions, k_positions, to.lse};
  }
};

/// Sequences of different lengths, one of them without tokens, and what is asked of each.
struct sequences {
  std::vector<any_cache> caches;
  std::vector<request> requests;

  void add(any_cache cache, index_t kv_len, test::random& random) {
    const cache_shape shape = cache.shape();
    const std::vector<float> k = random_rows(random, shape, kv_len);
    const std::vector<float> v = random_rows(random, shape, kv_len);
    for (index_t layer = 0; layer < shape.num_layers; ++layer) cache[layer].append(k, v);
    requests.emplace_back(std::ssize(requests), shape, kv_len, random);
    caches.push_back(std::move(cache));
  }

  [[nodiscard]] std::vector<answer> empty_answers() const {
    std::vector<answer> answers;
    for (std::size_t i = 0; i < caches.size(); ++i)
      answers.push_back(requests[i].empty_answer(caches[i].shape()));
    return answers;
  }

  /// \param layer_of  a layer of a cache, of any type
  template <class LayerOf, class Executor>
  [[nodiscard]] std::vector<answer> batched(LayerOf layer_of, kvcache::attend_options options,
                                            Executor&& executor) const {
    std::vector<answer> answers = empty_answers();
    using layer = decltype(layer_of(caches[0]));
    std::vector<attend_item<layer>> batch;
    for (std::size_t i = 0; i < caches.size(); ++i)
      batch.push_back(requests[i].item(layer_of(caches[i]), answers[i]));
    kvcache::attend(std::span<const attend_item<layer>>(batch), options, executor);
    return answers;
  }
  template <class Executor>
  [[nodiscard]] std::vector<answer> batched(kvcache::attend_options options, Executor&& executor) const {
    return batched([](const any_cache& cache) { return cache[1]; }, options, executor);
  }

  [[nodiscard]] std::vector<answer> one_by_one(kvcache::attend_options options) const {
    std::vector<answer> answers = empty_answers();
    for (std::size_t i = 0; i < caches.size(); ++i) {
      const request& r = requests[i];
      options.q_len = r.q_len;
      options.mask = r.mask;
      options.q_positions = r.q_positions;
      options.k_positions = r.k_positions;
      options.lse = answers[i].lse;
      kvcache::attend(r.q, caches[i][1], answers[i].out, options);
    }
    return answers;
  }
};

void require_same(const std::vector<answer>& got, const std::vector<answer>& want) {
  REQUIRE(got.size() == want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    CAPTURE(i);
    REQUIRE(same_numbers(got[i].out, want[i].out));
    REQUIRE(same_numbers(got[i].lse, want[i].lse));
  }
}

/// Calls use(layer_of) with the type that make_cache gives the containers of a spec.
template <class Use>
void with_typed_layers(const std::string& spec, Use use) {
  using codecs = codec::by_layer<kvcache::any_codec>;
  const auto with = [&]<class Cache>(std::type_identity<Cache>) {
    use([](const any_cache& cache) { return (*cache.get_if<Cache>())[1]; });
  };
  if (spec.starts_with("contiguous")) with(std::type_identity<kvcache::contiguous_cache<codecs>>{});
  if (spec.starts_with("chunked")) with(std::type_identity<kvcache::chunked_cache<codecs>>{});
  if (spec.starts_with("paged")) with(std::type_identity<kvcache::paged_cache<codecs>>{});
}

const std::vector<std::string> specs = {"paged/bf16",
                                        "chunked/bf16",
                                        "contiguous/int8",
                                        "paged/int8",
                                        "chunked/k=channel4,v=rotated4,tail=64",
                                        "paged/k=channel4,v=rotated4,sinks=4,tail=20"};
constexpr index_t lengths[] = {1, 64, 500, 0, 31, 2100, 200};

}  // namespace

TEST_CASE("a batch of one spec gives the bits of single calls and of a typed batch",
          "[conformance][threads]") {
  test::random random;
  for (const std::string& spec : specs) {
    CAPTURE(spec);
    sequences all;
    for (const index_t kv_len : lengths) all.add(kvcache::make_cache(spec, small), kv_len, random);
    for (const index_t window : {0, 50}) {
      const kvcache::attend_options options{.window = window, .sinks = 3};
      const std::vector<answer> want = all.one_by_one(options);
      require_same(all.batched(options, kvcache::serial_executor{}), want);
      require_same(all.batched(options, two_threads{}), want);
      with_typed_layers(spec, [&](auto layer_of) {
        require_same(all.batched(layer_of, options, kvcache::serial_executor{}), want);
        require_same(all.batched(layer_of, options, two_threads{}), want);
      });
    }
  }
}

TEST_CASE("a batch may mix containers, codecs, shapes and types of a program's own",
          "[conformance][threads]") {
  test::random random;
  sequences all;
  kvcache::page_pool<codec::bf16> pool(small);
  index_t turn = 0;
  for (const index_t kv_len : lengths) {
    for (const std::string& spec : specs) {
      if (++turn % 4 == 0) continue;  // no length with all of them
      all.add(kvcache::make_cache(spec, random.chance(0.5) ? small : other), kv_len, random);
    }
    all.add({"pool", pool.sequence()}, kv_len, random);
    all.add({"typed", kvcache::chunked_cache<codec::f32>(other)}, kv_len, random);
  }
  REQUIRE(all.caches.size() > 32);  // whose offsets need memory
  const std::vector<answer> want = all.one_by_one({});
  kvcache::attend_workspace workspace;
  require_same(all.batched({}, kvcache::serial_executor{}), want);
  require_same(all.batched({.workspace = &workspace}, two_threads{}), want);
  require_same(all.batched({.workspace = &workspace}, kvcache::serial_executor{}), want);
}

TEST_CASE("caches of one type are attended over in one run of the executor", "[conformance]") {
  test::random random;
  sequences all;
  for (const char* spec : {"paged/bf16", "chunked/bf16", "paged/int8", "chunked/int8", "paged/rotated4"})
    all.add(kvcache::make_cache(spec, small), 40, random);
  index_t tasks = 0;
  for (const request& r : all.requests)
    tasks += small.num_kv_heads * kvcache::ceil_div(r.q_len * group_size, kvcache::detail::tile_rows);
  counting_executor executor;
  (void)all.batched({}, executor);
  CHECK(executor.num_runs == 2);
  CHECK(executor.num_tasks == tasks);
}

TEST_CASE("a batch may be empty, and items without queries or keys", "[conformance]") {
  counting_executor executor;
  kvcache::attend(std::span<const attend_item<any_layer>>(), {}, executor);
  kvcache::attend(std::vector<attend_item<any_layer>>{}, {}, executor);
  CHECK(executor.num_runs == 0);

  test::random random;
  const any_cache empty = kvcache::make_cache("chunked/int8", small);
  any_cache filled = kvcache::make_cache("paged/int8", small);
  const std::vector<float> rows = random_rows(random, small, 20);
  filled[0].append(rows, rows);
  const std::vector<float> q = random.floats(4 * small.head_dim);
  std::vector<float> of_empty(q.size(), 7.0F), of_filled(q.size()), want(q.size()), lse(4, 7.0F);
  const std::vector<index_t> position = {0};
  const std::vector<attend_item<any_layer>> batch = {
      {.q = {}, .layer = filled[0], .out = {}, .q_len = 0},
      {.q = q, .layer = empty[0], .out = of_empty, .q_positions = position, .lse = lse},
      {.q = q, .layer = filled[0], .out = of_filled},
      {.q = {}, .layer = empty[1], .out = {}, .q_len = 0}};
  attend(batch);
  attend(q, filled[0], want);
  CHECK(of_empty == std::vector<float>(q.size(), 0.0F));
  CHECK(lse == std::vector<float>(4, -std::numeric_limits<float>::infinity()));
  CHECK(same_numbers(of_filled, want));
}
