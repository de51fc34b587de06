// SPDX-License-Identifier: MIT
// prefix_index: finds the longest prefix of some tokens whose keys and values are stored, and hands it out as a
// sequence of its own.
//
//   prefix_index<paged_cache<>> index(shape.block_size);
//   auto hit = index.match({.model = "m"}, prompt);          // hit.sequence has hit.size tokens, hit.held pins them
//   ... append the rest of the prompt and the answer ...
//   index.insert({.model = "m"}, all_tokens, std::move(*hit.sequence));
//   while (short_of_memory) index.evict();                   // deep blocks first, in the order of the policy
//
// A hash never decides what is found: tokens and the strings of the space are compared on every lookup. In a pool a
// match shares pages, also at a token inside a block; in other containers it copies.
#pragma once

#include <kvcache/cache/concepts.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/concepts.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/serving/counted_memory.hpp>
#include <kvcache/serving/prefix_node.hpp>
#include <kvcache/serving/prefix_tree.hpp>
#include <kvcache/serving/prefix_tree_changes.hpp>

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0::serving {

struct prefix_index_options {
  index_t num_blocks = 1024;  ///< room in the policy to begin with; doubles when it is used up
  std::pmr::memory_resource* memory =
      std::pmr::new_delete_resource();  ///< for the books; the policy uses the heap
};

/// A hold on the blocks of a prefix: while it lives they are not evicted. Move-only; the index must outlive it.
template <class Index>
class prefix_lease {
 public:
  prefix_lease() = default;
  prefix_lease(prefix_lease&& other) noexcept
      : index_(std::exchange(other.index_, nullptr)), block_(other.block_) {}
  prefix_lease& operator=(prefix_lease&& other) noexcept {
    release();
    index_ = std::exchange(other.index_, nullptr);
    block_ = other.block_;
    return *this;
  }
  ~prefix_lease() { release(); }

  [[nodiscard]] bool holds() const noexcept { return index_ != nullptr; }
  /// What the destructor does. A change of the index, as far as threads go.
  void release() noexcept {
    if (index_ != nullptr) std::exchange(index_, nullptr)->unpin(block_);
  }

 private:
  friend Index;
  prefix_lease(Index& index, typename Index::block block) noexcept : index_(&index), block_(block) {}

  Index* index_ = nullptr;
  typename Index::block block_ = nullptr;
};

/// A block that is about to go; see prefix_index::next_victim.
template <class Index>
class prefix_victim;

/// Sequences by their tokens. Neither copied nor moved: leases refer to it.
///
/// Threads: none inside; every member, and the end of a lease, needs the caller's lock, the same that guards the pool.
/// Attention over a sequence that a match gave needs no lock: see page_pool. Every change that throws leaves
/// it as it was.
template <kv_cache Cache, eviction::block_policy Policy = eviction::lru>
class prefix_index {
  using tree_type = detail::prefix_tree<Cache>;
  using node = typename tree_type::node;

 public:
  using cache_type = Cache;
  using lease = prefix_lease<prefix_index>;
  using victim = prefix_victim<prefix_index>;

  /// What a lookup found.
  struct hit {
    std::optional<Cache> sequence{};  ///< of `size` tokens; none where nothing was found
    index_t size = 0;                 ///< tokens that are the same from the beginning
    index_t distance = 0;             ///< ticks since the deepest block was used
    lease held{};
  };

  /// \param block_size  of the caches that will be stored. Throws std::bad_alloc, shape_error.
  explicit prefix_index(index_t block_size, const prefix_index_options& options = {})
      : memory_(options.memory), tree_(block_size, &memory_), policy_(options.num_blocks) {
    if (!is_block_size(block_size)) throw shape_error("kvcache: block_size must be 16, 32, 64, 128 or 256");
  }

  // -- finding --------------------------------------------------------------------------------------------------

  /// Counts a request, for ages and distances; they are measured in such ticks. \return their number so far
  index_t tick() noexcept { return ++now_; }

  /// How many of the tokens are stored from the beginning; not a use. O(tokens).
  [[nodiscard]] index_t longest(const prefix_space& space, std::span<const token_id> tokens) const {
    return tree_.walk(space, tokens, [](auto) {}).size;
  }

  /// The longest stored prefix of the tokens, as a sequence of its own. A use of its blocks.
  /// O(tokens), whatever is stored, and one fork. Throws what fork does, std::bad_alloc as a rule.
  [[nodiscard]] hit match(const prefix_space& space, std::span<const token_id> tokens);

  /// The stored sequence that match would fork, or null; not a use. Until the index changes. O(tokens).
  [[nodiscard]] const Cache* peek(const prefix_space& space, std::span<const token_id> tokens) const {
    const auto found = tree_.walk(space, tokens, [](auto) {});
    return found.size == 0 ? nullptr : &*tree_.holder(found).first->sequence;
  }
  /// A hold on what match would find, not a use. O(tokens).
  [[nodiscard]] lease hold(const prefix_space& space, std::span<const token_id> tokens);

  // -- storing --------------------------------------------------------------------------------------------------

  /// Stores the first `tokens.size()` tokens of a sequence. One that it continues is not kept beside it.
  /// \param info  class and cost of its blocks, for policies that ask; `parent` is ignored
  /// \return false if all of that was there: then it was a use of it, and the sequence remains the caller's
  /// \pre `cache.size() >= tokens.size()`, no step is open    O(tokens). Throws std::bad_alloc.
  bool insert(const prefix_space& space, std::span<const token_id> tokens, Cache&& cache,
              eviction::block_info info = {});

  /// Forgets blocks of the sequence that was stored for exactly these tokens, from its end, as far as they begin at
  /// `keep` or later, are not leased, and serve no other sequence. \return tokens that went
  index_t erase(const prefix_space& space, std::span<const token_id> tokens, index_t keep = 0) noexcept;

  /// The block that goes next by the policy, or nothing if none may. It goes when the victim is destroyed; until
  /// then no other member may be called.
  [[nodiscard]] std::optional<victim> next_victim() noexcept {
    const std::optional<eviction::block_key> key = policy_.evict();
    if (!key) return std::nullopt;
    return victim(*this, tree_.find_block(*key));
  }
  /// Forgets that block. \return whether there was one
  bool evict() noexcept { return next_victim().has_value(); }

  // -- the books ------------------------------------------------------------------------------------------------

  /// Blocks, each counted once however many sequences share it; those held by leases, themselves.
  [[nodiscard]] index_t num_blocks() const noexcept { return policy_.size(); }
  [[nodiscard]] index_t num_leased() const noexcept { return policy_.num_pinned(); }
  [[nodiscard]] index_t num_sequences() const noexcept { return tree_.num_sequences(); }
  [[nodiscard]] index_t num_edges() const noexcept { return tree_.num_nodes(); }
  [[nodiscard]] index_t now() const noexcept { return now_; }

  /// Memory of tree, policy and the sequences' own lists and tails, in bytes; pages are their pool's. A container
  /// without a pool is counted whole. O(1).
  [[nodiscard]] index_t bytes() const noexcept {
    return memory_.bytes() + policy_bytes() + tree_.sequence_bytes();
  }
  /// The most by which bytes() grows when `num_tokens` tokens are inserted, without the sequence itself. O(1).
  [[nodiscard]] index_t growth_bytes(const prefix_space& space, index_t num_tokens) const noexcept;

  /// Proves tree, policy, pins and bytes against each other. O(tokens). Throws invariant_error.
  void check() const;

 private:
  friend lease;
  friend victim;
  using block = typename tree_type::block;

  [[nodiscard]] index_t policy_bytes() const noexcept {
    if constexpr (requires { policy_.bytes(); }) return static_cast<index_t>(policy_.bytes());
    return 0;
  }
  lease pin(block held) noexcept {
    policy_.pin(held->first);
    ++held->second.pins;
    return lease(*this, held);
  }
  void unpin(block held) noexcept {
    policy_.unpin(held->first);
    --held->second.pins;
  }
  void use(block used) noexcept {
    used->second.last_use = now_;
    (void)policy_.touch(used->first);
  }
  void use_path(typename tree_type::place to) noexcept;
  void make_room(index_t new_blocks);
  void keep(block spared) noexcept;
  index_t drop(node* n, block first, index_t keep) noexcept;

  counted_memory memory_;
  tree_type tree_;
  Policy policy_;
  index_t now_ = 0;  // lookups
};

template <class Index>
class prefix_victim {
 public:
  prefix_victim(prefix_victim&& other) noexcept
      : index_(std::exchange(other.index_, nullptr)), block_(other.block_) {}
  prefix_victim& operator=(prefix_victim&&) = delete;
  ~prefix_victim() {
    if (index_ != nullptr) index_->drop(owner(), block_, first());
  }

  /// The tokens of the block: [first, last).
  [[nodiscard]] index_t first() const noexcept { return block_->second.index * index_->tree_.block_size(); }
  [[nodiscard]] index_t last() const noexcept { return owner()->last; }
  /// The sequence that ends with the block.
  [[nodiscard]] const typename Index::cache_type& sequence() const noexcept { return *owner()->sequence; }
  /// From this token on it serves no other sequence.
  [[nodiscard]] index_t alone_from() const noexcept {
    return owner()->first_child == nullptr ? owner()->first : last();
  }
  /// Ticks since the block was used.
  [[nodiscard]] index_t age() const noexcept { return index_->now_ - block_->second.last_use; }
  [[nodiscard]] prefix_space space() const noexcept {
    const auto* n = owner();
    while (!n->is_root()) n = n->parent;
    return n->space->view();
  }
  /// The tokens of the sequence. O(tokens). Throws std::bad_alloc.
  [[nodiscard]] std::vector<token_id> tokens() const {
    std::vector<token_id> path(static_cast<std::size_t>(last()));
    for (const auto* n = owner(); !n->is_root(); n = n->parent)
      std::copy(n->edge().begin(), n->edge().end(), path.begin() + n->first);
    return path;
  }

  /// Nothing goes after all; the policy takes the block for one of class 0 that was just used.
  void keep() && noexcept { std::exchange(index_, nullptr)->keep(block_); }

  /// Lets all blocks of the sequence go that erase() would, not only this one. \return tokens that went
  index_t take() && noexcept { return std::exchange(index_, nullptr)->drop(owner(), block_, 0); }

 private:
  friend Index;
  prefix_victim(Index& index, typename Index::block block) noexcept : index_(&index), block_(block) {}
  [[nodiscard]] const typename Index::node* owner() const noexcept { return block_->second.owner; }
  [[nodiscard]] typename Index::node* owner() noexcept { return block_->second.owner; }

  Index* index_;
  typename Index::block block_;
};

template <kv_cache Cache, eviction::block_policy Policy>
auto prefix_index<Cache, Policy>::match(const prefix_space& space, std::span<const token_id> tokens) -> hit {
  const auto found = tree_.walk(space, tokens, [](auto) {});
  if (found.size == 0) return {};
  const auto [provider, deepest] = tree_.holder(found);
  hit result{provider->sequence->fork(found.size), found.size, 0, {}};
  result.distance = now_ - deepest->second.last_use;
  use_path(found);
  use(deepest);
  result.held = pin(deepest);
  return result;
}

template <kv_cache Cache, eviction::block_policy Policy>
auto prefix_index<Cache, Policy>::hold(const prefix_space& space, std::span<const token_id> tokens) -> lease {
  const auto found = tree_.walk(space, tokens, [](auto) {});
  return found.size == 0 ? lease{} : pin(tree_.holder(found).second);
}

template <kv_cache Cache, eviction::block_policy Policy>
bool prefix_index<Cache, Policy>::insert(const prefix_space& space, std::span<const token_id> tokens,
                                         Cache&& cache, eviction::block_info info) {
  const auto size = static_cast<index_t>(tokens.size());
  KVCACHE_ASSERT(cache.size() >= size, "insert: the sequence must have a row for every token");
  KVCACHE_ASSERT(cache.shape().block_size == tree_.block_size(), "insert: block_size must be the index's");
  const auto known = tree_.walk(space, tokens, [](auto) {});
  if (known.size == size) {
    use_path(known);
    return false;
  }
  const index_t block_size = tree_.block_size();
  make_room(ceil_div(size, block_size) - known.size / block_size);
  const auto [n, replaced] = tree_.add(space, known, tokens, now_, cache);
  // Nothing below can fail.
  use_path(known);
  if (replaced != nullptr) {
    (void)policy_.erase(replaced->first);
    tree_.forget_block(replaced);
  }
  info.parent = known.last_whole != nullptr ? known.last_whole->first : eviction::no_block;
  for (index_t i = known.size / block_size; i * block_size < size; ++i) {
    const block added = (i + 1) * block_size <= size ? n->block(i, block_size) : n->tail;
    (void)policy_.insert(added->first, info);
    info.parent = added->first;
  }
  return true;
}

template <kv_cache Cache, eviction::block_policy Policy>
index_t prefix_index<Cache, Policy>::erase(const prefix_space& space, std::span<const token_id> tokens,
                                           index_t keep) noexcept {
  const auto found = tree_.walk(space, tokens, [](auto) {});
  if (found.size != static_cast<index_t>(tokens.size()) || found.size == 0) return 0;
  node* n = found.at;
  if (found.size != n->last || !n->sequence) return 0;
  const block last = n->tail != nullptr ? n->tail : found.last_whole;
  if (last->second.pins != 0 || last->second.index * tree_.block_size() < keep) return 0;
  (void)policy_.erase(last->first);
  return drop(n, last, keep);
}

/// Forgets the last block of a sequence, which the policy no longer has, and those before it down to `keep`.
template <kv_cache Cache, eviction::block_policy Policy>
index_t prefix_index<Cache, Policy>::drop(node* n, block first, index_t keep) noexcept {
  const index_t block_size = tree_.block_size();
  const index_t last = n->last;
  index_t index = first->second.index;
  const bool was_tail = n->tail == first;
  tree_.forget_block(first);
  if (was_tail) n->tail = nullptr;
  if (n->first_child != nullptr) {
    tree_.drop_sequence(n);  // others serve its tokens
    return 0;
  }
  for (; index > 0 && index * block_size > n->first && (index - 1) * block_size >= keep; --index) {
    const block before = n->block(index - 1, block_size);
    if (before->second.pins != 0) break;
    (void)policy_.erase(before->first);
    tree_.forget_block(before);
  }
  const index_t to = index * block_size;
  const index_t went = last - std::max(to, n->first);
  tree_.cut(n, to);
  return went;
}

template <kv_cache Cache, eviction::block_policy Policy>
void prefix_index<Cache, Policy>::use_path(typename tree_type::place to) noexcept {
  // From the end: what is behind goes before what it needs.
  const index_t block_size = tree_.block_size();
  for (node* n = to.at; n != nullptr && !n->is_root(); n = n->parent) {
    const index_t past = std::min(to.size, n->last) / block_size;
    for (index_t i = past - 1; i >= n->first / block_size; --i) use(n->block(i, block_size));
  }
}

/// Tells the policy again of a block that it no longer has.
template <kv_cache Cache, eviction::block_policy Policy>
void prefix_index<Cache, Policy>::keep(block spared) noexcept {
  eviction::block_info info;
  const index_t before = spared->second.index - 1;
  node* n = spared->second.owner;
  while (!n->is_root() && before < n->first / tree_.block_size()) n = n->parent;
  if (!n->is_root()) info.parent = n->block(before, tree_.block_size())->first;
  (void)policy_.insert(spared->first, info);
}

template <kv_cache Cache, eviction::block_policy Policy>
void prefix_index<Cache, Policy>::make_room(index_t new_blocks) {
  const index_t needed = policy_.size() + new_blocks;
  if (needed <= policy_.capacity()) return;
  Policy larger(policy_);  // growing may fail half-way
  larger.set_capacity(std::max(needed, 2 * policy_.capacity()));
  policy_ = std::move(larger);
}

template <kv_cache Cache, eviction::block_policy Policy>
index_t prefix_index<Cache, Policy>::growth_bytes(const prefix_space& space,
                                                  index_t num_tokens) const noexcept {
  const index_t new_blocks = num_tokens / tree_.block_size() + 2;
  index_t bytes = tree_.growth_bytes(space, num_tokens, new_blocks);
  const index_t needed = policy_.size() + new_blocks;
  if (needed > policy_.capacity()) {
    const index_t factor = std::max(index_t{2}, needed / std::max(policy_.capacity(), index_t{1}) + 1);
    bytes += 2 * factor * std::max(policy_bytes(), index_t{256});
  }
  return bytes;
}

template <kv_cache Cache, eviction::block_policy Policy>
void prefix_index<Cache, Policy>::check() const {
  tree_.check();
  policy_.check();
  index_t pinned = 0;
  for (const auto& [key, stored] : tree_.blocks()) {
    detail::require(policy_.contains(key), "the policy has every block");
    detail::require(stored.pins >= 0 && stored.last_use <= now_, "blocks know their past");
    pinned += stored.pins > 0 ? 1 : 0;
  }
  detail::require(policy_.size() == static_cast<index_t>(tree_.blocks().size()),
                  "the policy has no other block");
  detail::require(policy_.num_pinned() == pinned, "pins are counted");
}

}  // namespace kvcache::inline v0::serving
