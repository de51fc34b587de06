// SPDX-License-Identifier: MIT
// cache_manager: many sequences by id under one budget of bytes. What a sequence leaves behind when it is released
// serves the next one that begins alike, until its bytes are needed.
//
//   page_pool<> pool(shape);
//   cache_manager<page_pool<>> manager(pool, {.budget_bytes = 4_GiB});
//   auto got = manager.acquire({.model = "m"}, prompt, prompt.size() - 1);   // got.id, got.reused tokens are there
//   for each layer: manager.try_append(got.id, layer, k, v);   attend(q, manager.cache(got.id)[layer], out);
//   manager.extend(got.id, answer);                             // which tokens those rows are of
//   manager.release(got.id);
//
// With a second pool of a smaller codec, and a tier to spill to:
//   cache_manager<page_pool<>, eviction::lru, page_pool<codec::rotated<4>>, my_tier>
//       manager(pool, options, cold, &tier);
#pragma once

#include <kvcache/cache/paged.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/concepts.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/serving/live_sequence.hpp>
#include <kvcache/serving/observer.hpp>
#include <kvcache/serving/prefix_index.hpp>
#include <kvcache/serving/pressure_ladder.hpp>
#include <kvcache/serving/released_prefixes.hpp>
#include <kvcache/serving/spill_tier.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <new>
#include <span>
#include <type_traits>
#include <unordered_map>
#include <utility>

namespace kvcache::inline v0::serving {

/// A live sequence of a manager. Never given twice.
enum class sequence_id : std::uint64_t {};

struct manager_options {
  index_t budget_bytes = 0;  ///< most bytes of everything; must be given
  ladder_options ladder = {};
  double (*clock)() = nullptr;  ///< seconds since any point, for the times that the observer is told
  std::pmr::memory_resource* memory = std::pmr::new_delete_resource();  ///< for the books
};

/// What acquire answers.
struct acquired {
  status code = status::ok;
  sequence_id id{};    ///< only where code is ok
  index_t reused = 0;  ///< tokens of the prompt that the sequence has already
};

/// Bytes of a manager. `total` holds the four below it, and books; with `work` it never exceeds the budget.
struct manager_use {
  index_t total = 0;
  index_t pages = 0;      ///< that some sequence uses, live or released
  index_t free = 0;       ///< pages allocated that none uses
  index_t cold = 0;       ///< of `pages`, those of the cold pool
  index_t sequences = 0;  ///< live ones' lists, tails and tokens
  index_t work = 0;       ///< kept free: the most that evicting, re-encoding and spilling work in
};

/// Threads: none inside; every member needs the caller's lock. Attention over a sequence, and reading it in any other
/// way, needs none while nothing is appended to that sequence: references from cache() stay until its release.
///
/// The pool, the cold pool and their budgets are the manager's from now on: nobody else takes pages from them.
/// The budget holds at any moment, also inside a verb: what evicting, re-encoding and spilling work in is kept free
/// (`use().work`): keys and values of 256 tokens of a layer as floats with a cold pool, of a page and a layer with a tier,
/// whichever is more, and for each token of the longest prefix stored 4 bytes and a bit, 4 more with a cold pool, 4 more
/// with a tier. Not counted are what a tier and an observer allocate, and policies that have no `bytes()`.
/// What was re-encoded comes back with the errors of the cold pool's codec, and keeps them.
template <class Pool, eviction::block_policy Policy = eviction::lru, class ColdPool = no_cold_pool,
          class Tier = no_spill_tier, class Observer = no_observer>
class cache_manager {
  static_assert(std::is_same_v<Tier, no_spill_tier> || spill_tier<Tier>, "the tier must be a spill_tier");
  using released_type = detail::released_prefixes<Pool, Policy, ColdPool, Tier, Observer>;

 public:
  using cache_type = decltype(std::declval<Pool&>().sequence());

  static constexpr index_t all = std::numeric_limits<index_t>::max();

  /// Throws shape_error if the budget does not hold the empty books and a page, or an option cannot be; std::bad_alloc.
  explicit cache_manager(const Pool& pool, const manager_options& options, const ColdPool& cold_pool = {},
                         Tier* tier = nullptr, Observer observer = {})
      : clock_(options.clock),
        released_(pool, options.ladder, options.budget_bytes, cold_pool, tier, std::move(observer),
                  options.memory),
        live_(&released_.memory) {
    if (bytes() + pool.page_bytes() + released_.warm.sequence_bytes > released_.ladder.most_bytes())
      throw shape_error("kvcache: budget_bytes must hold the books and a page");
  }
  cache_manager(const cache_manager&) = delete;
  cache_manager& operator=(const cache_manager&) = delete;

  // -- sequences --------------------------------------------------------------------------------------------------

  /// A new sequence that has the longest stored prefix of `prompt`, at most `most` tokens of it, in whatever form it is
  /// stored. The rows of the others are the caller's to append; the tokens are noted already.
  /// \return out_of_pages or out_of_memory in `code`; then there is no new sequence
  /// O(prompt tokens), and decoding and encoding where the prefix was re-encoded or spilled.
  [[nodiscard]] acquired acquire(const prefix_space& space, std::span<const token_id> prompt,
                                 index_t most = all);

  /// Whether a prompt and so many new tokens could be held if all that is released went, live sequences counted as
  /// they are. Says no rather than yes where it does not know.
  /// O(pages of live sequences + pairs of them, each with what they share).
  [[nodiscard]] bool fits(index_t prompt_tokens, index_t new_tokens) const noexcept;

  /// Notes which tokens the rows after the prompt belong to; before or after they are appended.
  /// \return out_of_pages or out_of_memory, then nothing changed
  [[nodiscard]] status extend(sequence_id id, std::span<const token_id> tokens);

  /// As layer_ref::try_append. Climbs the ladder if there is no room.
  [[nodiscard]] status try_append(sequence_id id, index_t layer, std::span<const float> k,
                                  std::span<const float> v);

  /// Room for `num_tokens` more in every layer and in the list of ids, so that try_append and extend of those cannot
  /// run out. \return as they do; a part of the room may be there already
  [[nodiscard]] status reserve(sequence_id id, index_t num_tokens);

  /// Forgets rows and tokens from `num_tokens` on.
  void truncate(sequence_id id, index_t num_tokens) noexcept;

  /// The sequence itself, to attend over. Stays where it is until it is released.
  [[nodiscard]] const cache_type& cache(sequence_id id) const { return find(id).cache; }
  [[nodiscard]] std::span<const token_id> tokens(sequence_id id) const { return find(id).tokens; }
  [[nodiscard]] bool contains(sequence_id id) const { return live_.contains(id); }

  /// Ends a sequence. What it has of both rows and tokens stays reusable if its books fit.
  /// \param info  class and cost of its blocks, for policies that ask; `parent` is ignored. What is re-encoded has none.
  void release(sequence_id id, const eviction::block_info& info = {}) noexcept;
  /// Ends a sequence and keeps nothing that was not there before.
  void drop(sequence_id id) noexcept { forget(find_entry(id)); }

  // -- the books --------------------------------------------------------------------------------------------------

  /// Bytes of everything that is held; with use().work never above the budget. O(1).
  [[nodiscard]] index_t bytes() const noexcept { return released_.bytes(); }
  [[nodiscard]] manager_use use() const noexcept;
  [[nodiscard]] index_t budget() const noexcept { return released_.ladder.budget(); }
  /// Where the ladder keeps the bytes below, at the moment.
  [[nodiscard]] index_t limit() const noexcept { return released_.ladder.limit(); }
  [[nodiscard]] index_t num_live() const noexcept { return static_cast<index_t>(live_.size()); }
  [[nodiscard]] index_t num_released() const noexcept {
    if constexpr (released_type::has_cold)
      return released_.warm.index.num_sequences() + released_.cold.index.num_sequences();
    return released_.warm.index.num_sequences();
  }
  [[nodiscard]] const ladder_counts& counts() const noexcept { return released_.counts; }
  [[nodiscard]] double hit_rate() const noexcept { return released_.hits.value(); }
  [[nodiscard]] Observer& observer() noexcept { return released_.observer; }
  [[nodiscard]] const Observer& observer() const noexcept { return released_.observer; }
  /// Tells the observer of attention that the caller has computed.
  void attended(index_t num_tokens, double seconds) { tell_attend(released_.observer, num_tokens, seconds); }

  /// Proves all books against each other. O(everything). Throws invariant_error.
  void check() const;

 private:
  using live_sequence = typename released_type::live_sequence;
  using live_map = std::pmr::unordered_map<sequence_id, live_sequence>;
  using live_entry = typename live_map::iterator;

  [[nodiscard]] live_entry find_entry(sequence_id id) {
    const live_entry found = live_.find(id);
    KVCACHE_ASSERT(found != live_.end(), "the sequence must be live");
    return found;
  }
  [[nodiscard]] const live_sequence& find(sequence_id id) const {
    const auto found = live_.find(id);
    KVCACHE_ASSERT(found != live_.end(), "the sequence must be live");
    return found->second;
  }
  void count(live_sequence& s) noexcept {
    released_.own_bytes += s.cache.own_bytes() - s.own_bytes;
    s.own_bytes = s.cache.own_bytes();
  }
  void forget(live_entry entry) noexcept {
    released_.own_bytes -= entry->second.own_bytes;
    live_.erase(entry);
  }
  [[nodiscard]] index_t entry_bytes(const prefix_space& space, index_t num_tokens) const noexcept;

  double (*clock_)();
  released_type released_;
  live_map live_;
  std::uint64_t next_id_ = 0;
};

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
acquired cache_manager<Pool, Policy, ColdPool, Tier, Observer>::acquire(const prefix_space& space,
                                                                        std::span<const token_id> prompt,
                                                                        index_t most) {
  const auto asked = static_cast<index_t>(prompt.size());
  const auto wanted = prompt.first(static_cast<std::size_t>(std::clamp(most, index_t{0}, asked)));
  auto& warm = released_.warm;
  warm.index.tick();
  if constexpr (released_type::has_cold) released_.cold.index.tick();
  try {
    auto held = warm.index.hold(space, wanted);  // not to be evicted for its own sake
    const index_t pages = warm.pages_for(warm.index.longest(space, wanted));
    if (const status s = released_.ensure({.table_pages = std::max(pages, index_t{1}),
                                           .new_table = true,
                                           .other = warm.sequence_bytes + entry_bytes(space, asked)});
        s != status::ok)
      return {s};
    auto hit = warm.index.match(space, wanted);
    const sequence_id id{next_id_};
    const live_entry entry =
        live_
            .try_emplace(id, hit.sequence ? std::move(*hit.sequence) : warm.pool.sequence(), space,
                         &released_.memory)
            .first;
    live_sequence& s = entry->second;
    try {
      s.tokens.assign(prompt.begin(), prompt.end());
    } catch (...) {
      live_.erase(entry);
      throw;
    }
    ++next_id_;
    s.held = std::move(hit.held);
    count(s);
    const index_t reused =
        hit.size + detail::recall(released_, s, wanted) + detail::restore(released_, s, wanted);
    count(s);
    released_.hits.add(asked, s.cache.size());
    tell_lookup(released_.observer, asked, s.cache.size());
    if (hit.size > 0) tell_reuse(released_.observer, hit.distance);
    return {status::ok, id, reused};
  } catch (const std::bad_alloc&) {
    return {status::out_of_memory};
  } catch (const capacity_error& e) {
    return {e.code()};
  }
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
index_t cache_manager<Pool, Policy, ColdPool, Tier, Observer>::entry_bytes(
    const prefix_space& space, index_t num_tokens) const noexcept {
  const auto buckets = static_cast<index_t>(std::max(live_.bucket_count(), live_.size() + 1));
  const bool rehash = live_.size() + 1 > live_.bucket_count();
  return index_t{sizeof(typename live_map::value_type) + 5 * sizeof(void*)} +
         (rehash ? 3 * buckets * index_t{sizeof(void*)} : 0) + num_tokens * index_t{sizeof(token_id)} +
         static_cast<index_t>(space.model.size() + space.adapter.size() + space.tenant.size()) + 3;
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
status cache_manager<Pool, Policy, ColdPool, Tier, Observer>::try_append(sequence_id id, index_t layer,
                                                                         std::span<const float> k,
                                                                         std::span<const float> v) {
  live_sequence& s = find_entry(id)->second;
  const cache_shape& shape = s.cache.shape();
  const double start = clock_ != nullptr ? clock_() : 0;
  const index_t num_tokens = static_cast<index_t>(k.size()) / (shape.num_kv_heads * shape.head_dim);
  const index_t size = s.cache[layer].size();
  const detail::demand needs = detail::demand_of(released_, s, size, size + num_tokens);
  if (needs.pages > 0 || needs.other > 0) {
    if (const status code = released_.ensure(needs); code != status::ok) return code;
  }
  if (const status code = s.cache.try_append(layer, k, v); code != status::ok) return code;
  if (needs.other > 0) count(s);
  if (clock_ != nullptr) s.append_seconds += clock_() - start;
  if (layer + 1 == shape.num_layers)
    tell_append(released_.observer, num_tokens, std::exchange(s.append_seconds, 0.0));
  return status::ok;
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
status cache_manager<Pool, Policy, ColdPool, Tier, Observer>::reserve(sequence_id id, index_t num_tokens) {
  live_sequence& s = find_entry(id)->second;
  const index_t size = s.cache.size();
  if (const status code = released_.ensure(detail::demand_of(released_, s, size, size + num_tokens));
      code != status::ok)
    return code;
  const status code = s.cache.reserve(size + num_tokens);
  count(s);
  return code == status::ok ? detail::reserve_ids(released_, s, size + num_tokens) : code;
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
status cache_manager<Pool, Policy, ColdPool, Tier, Observer>::extend(sequence_id id,
                                                                     std::span<const token_id> tokens) {
  live_sequence& s = find_entry(id)->second;
  auto& known = s.tokens;
  const std::size_t size = known.size() + tokens.size();
  if (size > known.capacity()) {
    const auto capacity = static_cast<index_t>(std::max(size, 2 * known.capacity()));
    if (const status code = detail::reserve_ids(released_, s, capacity); code != status::ok) return code;
  }
  known.insert(known.end(), tokens.begin(), tokens.end());
  return status::ok;
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
void cache_manager<Pool, Policy, ColdPool, Tier, Observer>::truncate(sequence_id id,
                                                                     index_t num_tokens) noexcept {
  live_sequence& s = find_entry(id)->second;
  s.cache.truncate(num_tokens);
  s.tokens.resize(std::min(s.tokens.size(), static_cast<std::size_t>(num_tokens)));
  count(s);
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
void cache_manager<Pool, Policy, ColdPool, Tier, Observer>::release(
    sequence_id id, const eviction::block_info& info) noexcept {
  const live_entry entry = find_entry(id);
  live_sequence& s = entry->second;
  const prefix_space space = s.space.view();
  const index_t size = std::min(s.cache.size(), static_cast<index_t>(s.tokens.size()));
  s.held.release();
  if (size > 0) {
    const index_t longest = std::max(released_.longest, size);
    const index_t growth = released_.warm.index.growth_bytes(space, size) + released_.work_bytes(longest) -
                           released_.ladder.kept_free();
    if (released_.make_room({.other = growth})) {
      released_.longest = longest;
      released_.ladder.keep_free(released_.work_bytes(longest));
      try {
        (void)released_.warm.index.insert(space, std::span(s.tokens).first(static_cast<std::size_t>(size)),
                                          std::move(s.cache), info);
      } catch (const std::bad_alloc&) {  // then it is not kept
      }
    } else {
      tell_decision(released_.observer, decision::keep_nothing, size,
                    static_cast<double>(bytes() + growth - released_.ladder.most_bytes()));
    }
  }
  forget(entry);
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
bool cache_manager<Pool, Policy, ColdPool, Tier, Observer>::fits(index_t prompt_tokens,
                                                                 index_t new_tokens) const noexcept {
  const auto& warm = released_.warm;
  const index_t pages = warm.pages_for(prompt_tokens + new_tokens);
  const index_t page = warm.pool.page_bytes();
  // Page, its books, tokens in vectors that double, and the books of an empty space.
  index_t needed =
      pages * (page + 128) + warm.sequence_bytes + entry_bytes({}, 2 * (prompt_tokens + new_tokens));
  if (released_.ladder.num_rungs() == 0) return released_.used() + needed <= released_.ladder.most_bytes();
  needed += detail::live_pages(live_) * page;
  index_t books = released_.live_bytes() + warm.pool.books_bytes() + warm.index.bytes();
  if constexpr (released_type::has_cold)
    books += released_.cold.pool.books_bytes() + released_.cold.index.bytes();
  return books + needed <= released_.ladder.most_bytes();
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
manager_use cache_manager<Pool, Policy, ColdPool, Tier, Observer>::use() const noexcept {
  const auto& warm = released_.warm;
  manager_use use{bytes(),
                  warm.pool.num_in_use() * warm.pool.page_bytes(),
                  warm.free_bytes(),
                  0,
                  released_.live_bytes(),
                  released_.ladder.kept_free()};
  if constexpr (released_type::has_cold) {
    use.cold = released_.cold.pool.num_in_use() * released_.cold.pool.page_bytes();
    use.pages += use.cold;
    use.free += released_.cold.free_bytes();
  }
  return use;
}

template <class Pool, eviction::block_policy Policy, class ColdPool, class Tier, class Observer>
void cache_manager<Pool, Policy, ColdPool, Tier, Observer>::check() const {
  released_.warm.index.check();
  released_.warm.pool.check();
  if constexpr (released_type::has_cold) {
    released_.cold.index.check();
    released_.cold.pool.check();
    detail::require(released_.cold.index.num_leased() == 0, "nothing holds what is cold");
  }
  index_t own = 0, held = 0;
  for (const auto& [id, s] : live_) {
    s.cache.check();
    detail::require(s.own_bytes == s.cache.own_bytes(), "a live sequence is counted as it is");
    own += s.own_bytes;
    held += s.held.holds() ? 1 : 0;
  }
  detail::require(own == released_.own_bytes, "live sequences are counted");
  detail::require(released_.warm.index.num_leased() <= held, "only live sequences hold prefixes");
  detail::require(bytes() <= released_.ladder.most_bytes(), "the bytes keep to the budget");
}

}  // namespace kvcache::inline v0::serving
