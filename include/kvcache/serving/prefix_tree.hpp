// SPDX-License-Identifier: MIT
// prefix_tree: a radix tree over tokens whose values are sequences; what prefix_index keeps its books in.
//
//   root --[ system prompt ]-+--[ question 1, answer 1 ]  sequence: all tokens from the root to here
//                            +--[ question 2 ]            sequence
//
// A sequence lies where it ends, and serves every prefix of it by fork(n). One that another continues is not needed any
// more. Edges split and merge in time proportional to their upper part: the lower one keeps its tokens where they are.
// Source of the idea: Zheng et al. 2023, "SGLang: Efficient Execution of Structured Language Model Programs" (radix
// attention).
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/concepts.hpp>
#include <kvcache/serving/prefix_node.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory_resource>
#include <new>
#include <span>
#include <unordered_map>
#include <utility>

namespace kvcache::inline v0::serving::detail {

template <class Cache>
class prefix_tree {
 public:
  using node = prefix_node<Cache>;
  using block = block_ref<Cache>;

  /// A point on an edge: `size` tokens from the root, at.first <= size <= at.last.
  struct place {
    node* at = nullptr;  // null: nothing of that space
    index_t size = 0;
    block last_whole = nullptr;  // the last whole block before it
  };

  prefix_tree(index_t block_size, std::pmr::memory_resource* memory)
      : block_size_(block_size), memory_(memory), spaces_(memory), children_(memory), blocks_(memory) {}
  prefix_tree(const prefix_tree&) = delete;
  prefix_tree& operator=(const prefix_tree&) = delete;
  ~prefix_tree() {
    for (auto& [key, child] : children_) delete_node(child);
    for (auto& [space, root] : spaces_) delete_node(root);
  }

  [[nodiscard]] index_t block_size() const noexcept { return block_size_; }
  [[nodiscard]] index_t num_nodes() const noexcept { return static_cast<index_t>(children_.size()); }
  [[nodiscard]] index_t num_sequences() const noexcept { return num_sequences_; }
  [[nodiscard]] index_t sequence_bytes() const noexcept { return sequence_bytes_; }
  [[nodiscard]] const block_map<Cache>& blocks() const noexcept { return blocks_; }
  [[nodiscard]] block find_block(eviction::block_key key) noexcept {
    const auto found = blocks_.find(key);
    return found == blocks_.end() ? nullptr : &*found;
  }
  void forget_block(block gone) noexcept { blocks_.erase(blocks_.find(gone->first)); }

  /// As far as the tokens are stored; calls visit(block) for each whole block on the way. O(tokens).
  template <class Visit>
  place walk(const prefix_space& space, std::span<const token_id> tokens, Visit visit) const;

  /// A sequence with the tokens up to a place, and the block that has the last of them. \pre size > 0
  /// O(block_size).
  [[nodiscard]] std::pair<node*, block> holder(place to) const noexcept;

  /// What add would do: continue the sequence that ends there, or begin an edge.
  [[nodiscard]] static bool continues(const place& at) noexcept {
    const node* n = at.at;
    return n != nullptr && at.size == n->last && n->sequence && n->first_child == nullptr &&
           (n->tail == nullptr || n->tail->second.pins == 0);
  }

  /// Stores a sequence of `tokens` that are known up to `at`. Returns where it lies, and the block that it replaces.
  /// Throws std::bad_alloc, then nothing changed. O(tokens).
  std::pair<node*, block> add(const prefix_space& space, const place& at, std::span<const token_id> tokens,
                              index_t now, Cache& cache);

  /// The sequence of a leaf ends after `to` tokens from now on, or goes if others serve those. \pre no block behind
  void cut(node* leaf, index_t to) noexcept;
  /// The sequence of a node that is no leaf goes. \pre it has no tail
  void drop_sequence(node* n) noexcept;

  /// The most by which the memory of the tree grows when a sequence is added. O(log spaces).
  [[nodiscard]] index_t growth_bytes(const prefix_space& space, index_t num_tokens,
                                     index_t new_blocks) const noexcept;

  /// Proves everything but what a policy knows. O(tokens). Throws invariant_error.
  void check() const;

 private:
  struct child_key {
    const node* parent;
    token_id token;
    friend bool operator==(const child_key&, const child_key&) = default;
  };
  struct child_hash {
    std::size_t operator()(const child_key& k) const noexcept {
      return static_cast<std::size_t>(mixed_bits(reinterpret_cast<std::uintptr_t>(k.parent) ^
                                                 (std::uint64_t{static_cast<std::uint32_t>(k.token)} << 32)));
    }
  };
  struct edit;  // an add under way

  [[nodiscard]] node* new_node() {
    return std::pmr::polymorphic_allocator<>(memory_).new_object<node>(memory_);
  }
  void delete_node(node* n) noexcept { std::pmr::polymorphic_allocator<>(memory_).delete_object(n); }
  static index_t bytes_of(const Cache& cache) noexcept {
    if constexpr (requires { cache.storage().page_table(); }) {
      return cache.own_bytes();
    } else {
      return cache.bytes().total;
    }
  }
  void count_sequence(node* n) noexcept {
    sequence_bytes_ -= n->sequence_bytes;
    n->sequence_bytes = n->sequence ? bytes_of(*n->sequence) : 0;
    sequence_bytes_ += n->sequence_bytes;
  }

  void split(node* lower, node* upper) noexcept;
  void merge(node* upper) noexcept;
  [[nodiscard]] bool join_tokens(node* upper, node* lower) noexcept;
  void remove_leaf(node* n) noexcept;
  void tidy(node* n) noexcept;
  void check_node(const node* n, index_t& num_blocks, index_t& sequence_bytes) const;

  index_t block_size_;
  std::pmr::memory_resource* memory_;
  std::pmr::map<stored_space, node*, space_less> spaces_;
  std::pmr::unordered_map<child_key, node*, child_hash> children_;  // every node that is no root
  block_map<Cache> blocks_;
  index_t num_sequences_ = 0;
  index_t sequence_bytes_ = 0;
};

template <class Cache>
template <class Visit>
auto prefix_tree<Cache>::walk(const prefix_space& space, std::span<const token_id> tokens, Visit visit) const
    -> place {
  const auto root = spaces_.find(space);
  if (root == spaces_.end()) return {};
  place found{root->second, 0, nullptr};
  const auto asked = static_cast<index_t>(tokens.size());
  while (found.size == found.at->last && found.size < asked) {
    const auto child = children_.find(child_key{found.at, tokens[static_cast<std::size_t>(found.size)]});
    if (child == children_.end()) break;
    node* n = child->second;
    const auto rest = tokens.subspan(static_cast<std::size_t>(found.size));
    const index_t before = found.size;
    found.at = n;
    found.size += common_prefix(n->edge(), rest);
    for (index_t i = before / block_size_; i < found.size / block_size_; ++i) {
      found.last_whole = n->block(i, block_size_);
      visit(found.last_whole);
    }
  }
  return found;
}

template <class Cache>
auto prefix_tree<Cache>::holder(place to) const noexcept -> std::pair<node*, block> {
  const index_t index = (to.size - 1) / block_size_;
  const index_t end = (index + 1) * block_size_;
  node* n = to.at;
  // Each step down is an edge inside this block.
  while (n->last < end && !n->sequence) n = n->first_child;
  if (n->last < end) return {n, n->tail};
  return {n->sequence ? n : n->provider, n->block(index, block_size_)};
}

template <class Cache>
index_t prefix_tree<Cache>::growth_bytes(const prefix_space& space, index_t num_tokens,
                                         index_t new_blocks) const noexcept {
  // A node of a map: its value and at most five words; a table of buckets: at most thrice the needed or present.
  constexpr index_t map_node = 5 * sizeof(void*);
  const auto buckets = [](const auto& map, index_t more) {
    const auto needed = static_cast<index_t>(map.size()) + more;
    const auto present = static_cast<index_t>(map.bucket_count());
    return needed < present ? index_t{0} : 3 * std::max(needed, present) * index_t{sizeof(void*)};
  };
  index_t bytes = 3 * index_t{sizeof(node)};
  bytes += 4 * num_tokens * index_t{sizeof(token_id)} + 4 * new_blocks * index_t{sizeof(block)};
  bytes += new_blocks * (index_t{sizeof(*block{})} + map_node) + buckets(blocks_, new_blocks);
  bytes += 2 * (index_t{sizeof(child_key) + sizeof(node*)} + map_node) + buckets(children_, 2);
  if (!spaces_.contains(space)) {
    bytes += index_t{sizeof(stored_space)} + map_node;
    bytes += static_cast<index_t>(space.model.size() + space.adapter.size() + space.tenant.size()) + 3;
  }
  return bytes;
}

template <class Cache>
void prefix_tree<Cache>::check() const {
  index_t num_blocks = 0, bytes = 0, nodes = 0, sequences = 0;
  for (const auto& [space, root] : spaces_) {
    detail::require(root->space == &space && root->first_child != nullptr && !root->sequence,
                    "a space has prefixes");
    const node* n = root;
    while (n != nullptr) {
      check_node(n, num_blocks, bytes);
      nodes += n->is_root() ? 0 : 1;
      sequences += n->sequence ? 1 : 0;
      const node* next = n->first_child;
      for (; next == nullptr && n != nullptr; n = n->parent) next = n->next;
      n = next;
    }
  }
  detail::require(nodes == num_nodes(), "every edge is found by its parent and first token");
  detail::require(num_blocks == static_cast<index_t>(blocks_.size()), "every block lies on an edge");
  detail::require(sequences == num_sequences_ && bytes == sequence_bytes_, "sequences are counted");
}

template <class Cache>
void prefix_tree<Cache>::check_node(const node* n, index_t& num_blocks, index_t& sequence_bytes) const {
  const node* holds = n->provider;
  detail::require(holds != nullptr && holds->sequence, "every edge is served by a sequence");
  while (holds != nullptr && holds != n) holds = holds->parent;
  detail::require(holds == n, "a sequence serves the edges above it");
  if (n->is_root()) return;
  const node* parent = n->parent;
  detail::require(n->first == parent->last && n->first < n->last && n->base <= n->first,
                  "edges are not empty");
  detail::require(static_cast<index_t>(n->tokens.size()) == n->last - n->base, "an edge has its tokens");
  const auto known = children_.find(child_key{parent, n->token(n->first)});
  detail::require(known != children_.end() && known->second == n, "an edge is found by its first token");
  detail::require(n->before != nullptr ? n->before->next == n : parent->first_child == n,
                  "children are linked");
  detail::require(n->sequence || n->first_child != nullptr, "a leaf has a sequence");
  const index_t past = n->last / block_size_;
  detail::require(static_cast<index_t>(n->blocks.size()) == past - n->base / block_size_,
                  "an edge has its blocks");
  for (index_t i = n->first / block_size_; i < past; ++i, ++num_blocks) {
    const auto& b = n->blocks[static_cast<std::size_t>(i - n->base / block_size_)];
    detail::require(b->second.owner == n && b->second.index == i, "a block knows where it lies");
  }
  detail::require((n->tail != nullptr) == (n->sequence && n->last % block_size_ != 0),
                  "a sequence that ends inside a block has a tail");
  if (n->tail != nullptr) {
    ++num_blocks;
    detail::require(n->tail->second.owner == n && n->tail->second.index == past,
                    "a tail knows where it lies");
  }
  if (n->sequence) {
    detail::require(n->sequence->size() == n->last, "a sequence ends where it lies");
    detail::require(n->sequence_bytes == bytes_of(*n->sequence), "a sequence is counted as it is");
  }
  sequence_bytes += n->sequence_bytes;
}

}  // namespace kvcache::inline v0::serving::detail
