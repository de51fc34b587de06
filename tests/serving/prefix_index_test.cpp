// SPDX-License-Identifier: MIT
#include "serving/tokens.hpp"
#include "support/heap.hpp"

#include <kvcache/cache/contiguous.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>

#include <map>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>

using namespace serving_test;
using kvcache::serving::prefix_index;

namespace {

/// What is stored, as whole sequences. Two bounds: whether one that was continued stays depends on leases.
class model {
 public:
  void insert(std::size_t space, const tokens& path) {
    at_least_[space].push_back(path);
    at_most_[space].push_back(path);
    std::erase_if(at_least_[space],
                  [&](const tokens& t) { return t.size() < path.size() && common(t, path) == ssize(t); });
  }
  void cut(std::size_t space, const tokens& path, index_t to) {
    const auto size = static_cast<std::size_t>(to);
    for (tokens& t : at_least_[space])
      if (t.size() > size && t.size() <= path.size() && common(t, path) == ssize(t)) t.resize(size);
    for (tokens& t : at_most_[space])
      if (t.size() > size && t == path) t.resize(size);
  }
  [[nodiscard]] std::pair<index_t, index_t> longest(std::size_t space, const tokens& path) const {
    return {longest(at_least_, space, path), longest(at_most_, space, path)};
  }
  /// Whether a stored sequence goes on behind these tokens.
  [[nodiscard]] bool continues(std::size_t space, const tokens& path) const {
    const auto found = at_least_.find(space);
    if (found == at_least_.end()) return false;
    return std::any_of(found->second.begin(), found->second.end(), [&](const tokens& t) {
      return t.size() > path.size() && common(t, path) == ssize(path);
    });
  }

 private:
  using stored = std::map<std::size_t, std::vector<tokens>>;
  static index_t ssize(const tokens& t) { return static_cast<index_t>(t.size()); }
  static index_t longest(const stored& all, std::size_t space, const tokens& path) {
    index_t most = 0;
    if (const auto found = all.find(space); found != all.end())
      for (const tokens& t : found->second) most = std::max(most, common(t, path));
    return most;
  }
  stored at_least_, at_most_;
};

std::size_t number_of(const prefix_space& s) {
  return static_cast<std::size_t>(std::find(std::begin(spaces), std::end(spaces), s) - std::begin(spaces));
}

/// An index over one kind of cache, driven by random calls and compared with the model after each.
template <class Cache, class Policy, class MakeCache>
void run_script(MakeCache make, float tolerance, int num_steps) {
  test::random random;
  const auto index = std::make_unique<prefix_index<Cache, Policy>>(
      shape.block_size, serving::prefix_index_options{.num_blocks = 2});
  struct leased {
    std::size_t space;
    tokens path;
    typename prefix_index<Cache, Policy>::hit hit;
  };
  std::vector<leased> held;
  std::vector<tokens> earlier;
  std::vector<std::size_t> earlier_spaces;
  model want;
  index_t hits = 0, evictions = 0, erased = 0;
  for (int step = 0; step < num_steps; ++step) {
    CAPTURE(step);
    index->tick();
    const auto s = static_cast<std::size_t>(random.below(std::size(spaces)));
    const tokens path = some_prompt(random, earlier, 200);
    const double what = random.unit();
    if (what < 0.5) {  // a conversation: look up, compute the rest, store
      auto hit = index->match(spaces[s], path);
      const auto [least, most] = want.longest(s, path);
      REQUIRE(hit.size >= least);
      REQUIRE(hit.size <= most);
      REQUIRE(hit.sequence.has_value() == (hit.size > 0));
      hits += hit.size > 0 ? 1 : 0;
      Cache cache = hit.sequence ? std::move(*hit.sequence) : make();
      REQUIRE(holds(cache, spaces[s], std::span(path).first(static_cast<std::size_t>(hit.size)), tolerance));
      compute(cache, spaces[s], path);
      if (random.chance(0.2)) {  // goes on, not stored yet
        hit.sequence = std::move(cache);
        held.push_back({s, path, std::move(hit)});
      } else {
        if (random.chance(0.5)) hit.held.release();
        if (index->insert(spaces[s], path, std::move(cache), {.priority = static_cast<int>(random.below(2))}))
          want.insert(s, path);
        REQUIRE(index->longest(spaces[s], path) == static_cast<index_t>(path.size()));
        earlier.push_back(path);
        earlier_spaces.push_back(s);
      }
    } else if (what < 0.7) {
      const index_t before = index->num_blocks();
      if (auto victim = index->next_victim()) {
        const tokens gone = victim->tokens();
        const std::size_t of = number_of(victim->space());
        const index_t first = victim->first();
        REQUIRE(of < std::size(spaces));
        REQUIRE(holds(victim->sequence(), spaces[of], gone, tolerance));
        REQUIRE(victim->last() == static_cast<index_t>(gone.size()));
        if (gone.size() % 16 == 0) REQUIRE_FALSE(want.continues(of, gone));
        const bool all = random.chance(0.3);
        const index_t alone_from = victim->alone_from();
        if (all) {
          const index_t went = std::move(*victim).take();
          want.cut(of, gone, first);
          const index_t left = index->longest(spaces[of], gone);
          REQUIRE(went <= static_cast<index_t>(gone.size()) - alone_from);
          want.cut(of, gone, std::max(left, index_t{0}));
        } else {
          want.cut(of, gone, first);
        }
        victim.reset();
        REQUIRE(index->num_blocks() < before);
        ++evictions;
      } else {
        REQUIRE(index->num_blocks() <= index->num_leased() * 13);
      }
    } else if (what < 0.8 && !held.empty()) {
      const auto i = static_cast<std::size_t>(random.below(static_cast<std::ptrdiff_t>(held.size())));
      leased& l = held[i];
      REQUIRE(index->longest(spaces[l.space], l.path) >= l.hit.size);  // pinned all the while
      REQUIRE(holds(*l.hit.sequence, spaces[l.space], l.path, tolerance));
      if (random.chance(0.5) && index->insert(spaces[l.space], l.path, std::move(*l.hit.sequence)))
        want.insert(l.space, l.path);
      std::swap(held[i], held.back());
      held.pop_back();
    } else if (what < 0.9) {
      if (earlier.empty()) continue;
      const auto i = static_cast<std::size_t>(random.below(std::ssize(earlier)));
      const prefix_space& space = spaces[earlier_spaces[i]];
      const index_t went = index->erase(space, earlier[i], random.below(40));
      const index_t left = index->longest(space, earlier[i]);
      if (went > 0) want.cut(earlier_spaces[i], earlier[i], left);
      if (went > 0) REQUIRE(left == std::ssize(earlier[i]) - went);
      erased += went;
    } else {
      const auto [least, most] = want.longest(s, path);
      const index_t got = index->longest(spaces[s], path);
      REQUIRE(got >= least);
      REQUIRE(got <= most);
    }
    index->check();
  }
  CHECK(hits > num_steps / 10);
  CHECK(evictions > num_steps / 20);
  CHECK(erased > 0);
  held.clear();
  index->check();
  CHECK(index->num_leased() == 0);
  while (index->evict()) index->check();
  CHECK(index->num_blocks() == 0);
  CHECK(index->num_sequences() == 0);
  CHECK(index->num_edges() == 0);
}

using pool_type = page_pool<codec::bf16>;
using sealed = codec::exact_tail<codec::int8, 16>;

}  // namespace

TEMPLATE_TEST_CASE("a random script finds what a plain list of sequences finds, in a pool", "[serving]",
                   eviction::lru, eviction::arc, eviction::s3_fifo, eviction::priority) {
  pool_type pool(shape);
  run_script<paged_cache<>, TestType>([&] { return pool.sequence(); }, 0, 1200);
  pool.check();
  CHECK(pool.num_in_use() == 0);
}

TEST_CASE("a random script finds the same where a codec seals blocks", "[serving]") {
  page_pool<sealed> pool(shape);
  run_script<paged_cache<sealed>, eviction::lru>([&] { return pool.sequence(); }, 1.0F, 600);
  pool.check();
  CHECK(pool.num_in_use() == 0);
}

TEST_CASE("a random script finds the same where sequences are copied", "[serving]") {
  run_script<contiguous_cache<>, eviction::lru>([] { return contiguous_cache<>(shape); }, 0, 600);
}

TEST_CASE("a match shares pages, and copies one when it goes on inside a block", "[serving]") {
  pool_type pool(shape);
  prefix_index<paged_cache<>> index(16);
  const tokens prompt = counted(0, 40);
  auto first = pool.sequence();
  compute(first, spaces[0], prompt);
  REQUIRE(index.insert(spaces[0], prompt, std::move(first)));
  REQUIRE(pool.num_in_use() == 3);
  tokens other(prompt.begin(), prompt.begin() + 20);  // parts inside block 1
  other.push_back(1000);
  auto hit = index.match(spaces[0], other);
  CHECK(hit.size == 20);
  CHECK(pool.num_in_use() == 3);
  compute(*hit.sequence, spaces[0], other);
  CHECK(pool.num_in_use() == 4);
  CHECK(index.insert(spaces[0], other, std::move(*hit.sequence)));
  CHECK(index.num_blocks() == 4);  // blocks are as many as pages
  CHECK(index.num_leased() == 1);  // the block that the match ended in
  for (int i = 0; i < 2; ++i) CHECK(index.evict());
  CHECK(index.num_blocks() == 2);
  CHECK_FALSE(index.evict());
  hit.held.release();
  CHECK(index.evict());
  CHECK(index.evict());
  CHECK(pool.num_in_use() == 0);
}

TEST_CASE("a sequence that is continued is not kept twice", "[serving]") {
  pool_type pool(shape);
  prefix_index<paged_cache<>> index(16);
  tokens path = counted(0, 10);
  for (int turn = 0; turn < 5; ++turn) {
    auto hit = index.match(spaces[0], path);
    auto cache = hit.sequence ? std::move(*hit.sequence) : pool.sequence();
    compute(cache, spaces[0], path);
    hit.held.release();
    CHECK(index.insert(spaces[0], path, std::move(cache)));
    CHECK(index.num_sequences() == 1);
    CHECK(index.num_edges() == 1);
    CHECK(pool.num_in_use() == (static_cast<index_t>(path.size()) + 15) / 16);
    for (const token_id t : counted(100, 21)) path.push_back(t);
    index.check();
  }
  auto again = pool.sequence();
  path.resize(15);
  compute(again, spaces[0], path);
  CHECK_FALSE(index.insert(spaces[0], path, std::move(again)));
  CHECK(again.size() == 15);  // still the caller's
}

TEST_CASE("memory that runs out at any point leaves the index as it was", "[serving]") {
  pool_type pool(shape);
  const tokens a = counted(0, 50), b = [] {
    tokens t = counted(0, 40);
    t.push_back(7);
    return t;
  }();
  const tokens longer = counted(0, 90), stranger = counted(500, 20);
  const auto attempt = [&](const prefix_space& space, const tokens& path, index_t& failures) {
    for (std::ptrdiff_t n = 0;; ++n) {
      CAPTURE(n);
      prefix_index<paged_cache<>> index(16, {.num_blocks = 1});
      auto first = pool.sequence();
      compute(first, spaces[0], a);
      REQUIRE(index.insert(spaces[0], a, std::move(first)));
      auto cache = pool.sequence();
      compute(cache, space, path);
      const index_t blocks = index.num_blocks(), edges = index.num_edges(),
                    found = index.longest(space, path);
      bool failed = false;
      {
        const heap::failing out_of_memory(n);
        try {
          (void)index.insert(space, path, std::move(cache));
        } catch (const std::bad_alloc&) {
          failed = true;
        }
      }
      index.check();
      if (!failed) {
        CHECK(index.longest(space, path) == static_cast<index_t>(path.size()));
        return;
      }
      ++failures;
      REQUIRE(cache.size() == static_cast<index_t>(path.size()));  // still the caller's
      REQUIRE(index.num_blocks() == blocks);
      REQUIRE(index.num_edges() == edges);
      REQUIRE(index.longest(space, path) == found);
      REQUIRE(holds(*index.match(spaces[0], a).sequence, spaces[0], a));
    }
  };
  for (const tokens* path : {&b, &longer, &stranger}) {
    index_t failures = 0;
    attempt(spaces[0], *path, failures);
    CHECK(failures >= 4);
  }
  const prefix_space long_names{"a model with a name too long to fit", "an adapter with a long name as well",
                                "and a tenant whose name does not fit either"};
  index_t failures = 0;
  attempt(long_names, stranger, failures);
  CHECK(failures >= 7);
}

TEST_CASE("a match that runs out of memory pins nothing, and eviction needs none", "[serving]") {
  pool_type pool(shape);
  prefix_index<paged_cache<>> index(16);
  for (index_t i = 0; i < 20; ++i) {
    tokens path = counted(0, 3 * i + 1);
    path.push_back(static_cast<token_id>(1000 + i));
    auto cache = pool.sequence();
    compute(cache, spaces[0], path);
    REQUIRE(index.insert(spaces[0], path, std::move(cache)));
  }
  const tokens prompt = counted(0, 55);
  index_t failures = 0;
  for (std::ptrdiff_t n = 0;; ++n) {
    bool failed = false;
    {
      const heap::failing out_of_memory(n);
      try {
        (void)index.match(spaces[0], prompt);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    }
    index.check();
    pool.check();
    REQUIRE(index.num_leased() == 0);
    if (!failed) break;
    ++failures;
  }
  CHECK(failures >= 3);
  index_t blocks = index.num_blocks();
  CHECK(blocks > 20);
  for (; blocks > 0; --blocks) {
    {
      const heap::failing out_of_memory(0);
      REQUIRE(index.evict());
    }
    index.check();
    REQUIRE(index.num_blocks() == blocks - 1);
  }
  CHECK(pool.num_in_use() == 0);
}

TEST_CASE("the bytes of an index are what it has on the heap", "[serving]") {
  test::random random;
  pool_type pool(shape);
  prefix_index<paged_cache<>> index(16, {.num_blocks = 4});
  std::vector<tokens> earlier;
  for (int i = 0; i < 300; ++i) {
    CAPTURE(i);
    const tokens path = some_prompt(random, earlier, 150);
    const prefix_space& space = spaces[static_cast<std::size_t>(random.below(std::size(spaces)))];
    auto cache = pool.sequence();
    compute(cache, space, path);
    const index_t own = cache.own_bytes(),
                  growth = index.growth_bytes(space, static_cast<index_t>(path.size()));
    const index_t bytes = index.bytes();
    const auto heap_before = heap::bytes_out.load();
    const auto pool_before = pool.books_bytes();
    const bool stored = index.insert(space, path, std::move(cache));
    REQUIRE(pool.books_bytes() == pool_before);
    // What the sequence has was on the heap before.
    REQUIRE(index.bytes() - bytes == heap::bytes_out.load() - heap_before + (stored ? own : 0));
    REQUIRE(index.bytes() - bytes <= growth + own);
    earlier.push_back(path);
    if (random.chance(0.5)) (void)index.evict();
  }
}
