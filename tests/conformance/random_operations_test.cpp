// SPDX-License-Identifier: MIT
// Hundreds of random operations on several sequences at once, each followed by the proof of all books and
// compared number by number with the model: vectors of rows.

#include "conformance/caches.hpp"

#include <deque>
#include <optional>
#include <string>
#include <utility>

using namespace conformance;

namespace {

template <class Cache>
struct sequence {
  Cache cache;
  oracle::cache model;
};

template <class Source>
class game {
 public:
  game(Source& source, const cache_shape& shape, std::uint64_t seed)
      : source_(source), shape_(shape), random_(seed), seed_(seed) {
    add(source_.make(), model_of<Source>(shape_));
  }

  void play(int moves) {
    for (int i = 0; i < moves; ++i) {
      sequence<typename Source::cache>& s = pick();
      last_ = "";
      move(s);
      INFO("stream " << seed_ << ", move " << i << ": " << last_);
      for (auto& each : alive_) {
        each.cache.check();
        REQUIRE(each.cache.size() == each.model.size());
      }
      if (!alive_.empty()) compare(pick());
      if (i % 16 == 15)
        for (auto& each : alive_) compare(each);
    }
    for (auto& each : alive_) compare(each);
  }

 private:
  using entry = sequence<typename Source::cache>;

  entry& pick() {
    return alive_[static_cast<std::size_t>(random_.below(static_cast<index_t>(alive_.size())))];
  }

  void add(typename Source::cache cache, oracle::cache model) {
    alive_.push_back({std::move(cache), std::move(model)});
  }

  void drop(entry& s) {  // the last takes its place: moves are exercised as well
    if (&s != &alive_.back()) s = std::move(alive_.back());
    alive_.pop_back();
  }

  index_t some_tokens() {
    if (random_.chance(0.5)) return random_.below(4);
    return random_.chance(0.8) ? random_.below(shape_.block_size + 2) : random_.below(3 * shape_.block_size);
  }

  void compare(entry& s) { require_same(s.cache, s.model); }

  /// Appends to one layer; where that fails, proves that nothing changed. \return whether it went well
  bool append_to(entry& s, index_t layer, index_t tokens) {
    const std::vector<float> k = random_rows(random_, shape_, tokens);
    const std::vector<float> v = random_rows(random_, shape_, tokens);
    const auto before = s.cache.bytes();
    const status result = s.cache[layer].try_append(k, v);
    if (result == status::ok) {
      s.model.append(layer, k, v);
      return true;
    }
    REQUIRE(s.cache.bytes() == before);
    compare(s);
    return false;
  }

  [[nodiscard]] bool level(const entry& s) const { return s.model.size() == s.model.longest(); }

  void move(entry& s) {
    const index_t tokens = some_tokens();
    switch (random_.below(16)) {
      case 0:
      case 1:
      case 2: {
        last_ = "append " + std::to_string(tokens) + " to every layer";
        auto step = s.cache.try_begin(tokens);
        if (!step) break;
        for (index_t layer = 0; layer < shape_.num_layers; ++layer) REQUIRE(append_to(s, layer, tokens));
        step->commit();
        break;
      }
      case 3:
      case 4:
      case 5: {
        last_ = "decode " + std::to_string(tokens % 5) + " tokens without a step";
        for (index_t t = 0; t < tokens % 5; ++t)
          for (index_t layer = 0; layer < shape_.num_layers; ++layer)
            if (s.model.size(layer) == s.model.size()) (void)append_to(s, layer, 1);
        break;
      }
      case 6:
        last_ = "append to one layer only";
        (void)append_to(s, random_.below(shape_.num_layers), tokens % 20);
        break;
      case 7: {
        last_ = "a step that is dropped";
        const oracle::cache before = s.model;
        const index_t announced = tokens + random_.below(20);
        {
          auto step = s.cache.try_begin(announced);
          if (!step) break;
          for (index_t layer = 0; layer < shape_.num_layers && random_.chance(0.8); ++layer)
            (void)append_to(s, layer, tokens);
        }
        s.model = before;
        break;
      }
      case 8: {
        const index_t n = random_.below(s.model.longest() + 5);
        last_ = "truncate to " + std::to_string(n);
        s.cache.truncate(n);
        s.model.truncate(n);
        break;
      }
      case 9:
        last_ = "truncate by a little";
        {
          const index_t n = std::max<index_t>(0, s.model.size() - random_.below(4));
          s.cache.truncate(n);
          s.model.truncate(n);
        }
        break;
      case 10:
        if (random_.chance(0.3)) {
          last_ = "clear";
          s.cache.clear();
          s.model.clear();
        }
        break;
      case 11:
      case 12: {
        const index_t n = random_.chance(0.3) ? s.model.size() : random_.below(s.model.size() + 1);
        last_ = "fork at " + std::to_string(n);
        if (alive_.size() >= 6) drop(pick());
        entry& from = pick();
        const index_t at = std::min(n, from.model.size());
        if (auto child = from.cache.try_fork(at)) {
          auto model = from.model.fork(at);
          add(std::move(*child), std::move(model));
        }
        break;
      }
      case 13: {
        last_ = "clone";
        if (alive_.size() >= 6) drop(pick());
        entry& from = pick();
        if (auto copy = from.cache.try_clone()) {
          auto model = from.model;
          add(std::move(*copy), std::move(model));
        }
        break;
      }
      case 14:
        last_ = "shift";
        if (level(s)) {
          const index_t first = random_.below(s.model.size() + 1);
          const index_t last = first + random_.below(s.model.size() - first + 1);
          const index_t delta = random_.below(41) - 20;
          s.cache.shift(first, last, delta);
          s.model.shift(first, last, delta);
        }
        break;
      default:
        last_ = "reserve, shrink to fit, or begin anew";
        if (random_.chance(0.3)) {
          s.cache.shrink_to_fit();
        } else if (random_.chance(0.7)) {
          const auto before = s.cache.bytes();
          if (s.cache.reserve(s.model.longest() + tokens) != status::ok) REQUIRE(s.cache.bytes() == before);
        } else {
          s.cache = source_.make();
          s.model = model_of<Source>(shape_);
        }
        break;
    }
  }

  Source& source_;
  cache_shape shape_;
  test::random random_;
  std::uint64_t seed_;
  std::deque<entry> alive_;
  std::string last_;
};

}  // namespace

TEMPLATE_TEST_CASE("random operations agree with vectors of rows", "[conformance]", ALL_CACHES) {
  for (std::uint64_t stream = 1; stream <= 4; ++stream) {
    const cache_shape shape{.num_layers = 1 + static_cast<index_t>(stream % 3),
                            .num_kv_heads = 1 + static_cast<index_t>(stream % 2),
                            .head_dim = 2 * static_cast<index_t>(stream) - 1,
                            .block_size = stream == 4 ? 32 : 16};
    TestType source(shape);
    game<TestType>(source, shape, stream).play(300);
  }
}

TEMPLATE_TEST_CASE("random operations in a pool that keeps running out agree with vectors of rows",
                   "[conformance]", codec::f32, codec::bf16) {
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 3, .block_size = 16};
  const index_t page_bytes = kvcache::page_pool<TestType>(shape).page_bytes();
  for (std::uint64_t stream = 11; stream <= 14; ++stream) {
    paged<TestType> source(shape, kvcache::huge_page_resource(),
                           (4 + 4 * static_cast<index_t>(stream - 11)) * page_bytes);
    game<paged<TestType>>(source, shape, stream).play(400);
    REQUIRE(source.pool.num_in_use() == 0);
    source.pool.check();
  }
}

TEMPLATE_TEST_CASE("random operations in a memory that keeps running out agree with vectors of rows",
                   "[conformance]", EXHAUSTIBLE_CACHES) {
  const cache_shape shape{.num_layers = 2, .num_kv_heads = 1, .head_dim = 3, .block_size = 16};
  for (std::uint64_t stream = 21; stream <= 22; ++stream) {
    watched_memory memory;
    memory.limit(20000);
    {
      TestType source(shape, &memory);
      game<TestType>(source, shape, stream).play(300);
    }
    REQUIRE(memory.bytes_out() == 0);
    REQUIRE(memory.mistakes() == 0);
  }
}
