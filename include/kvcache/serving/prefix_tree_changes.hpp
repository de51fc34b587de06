// SPDX-License-Identifier: MIT
// How a prefix_tree changes: sequences come (everything is allocated before anything moves), are cut, and go.
//
//   add [a b x y] where [a b c d] is:   --[ a b c d ]      ->     --[ a b ]-+--[ c d ]
//                                                                           +--[ x y ]
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/eviction/concepts.hpp>
#include <kvcache/serving/prefix_node.hpp>
#include <kvcache/serving/prefix_tree.hpp>

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <new>
#include <span>
#include <utility>

namespace kvcache::inline v0::serving::detail {

/// What an add has allocated, taken back unless it comes to its end.
template <class Cache>
struct prefix_tree<Cache>::edit {
  edit(prefix_tree& of, const place& known) : tree(of), at(known) {}
  edit(const edit&) = delete;
  edit& operator=(const edit&) = delete;
  ~edit() {
    if (done) return;
    for (const child_key& key : {branch, below})
      if (key.parent != nullptr) tree.children_.erase(key);
    if (target != nullptr) {
      for (; target->blocks.size() > blocks_before; target->blocks.pop_back())
        tree.forget_block(target->blocks.back());
      if (tail != nullptr) tree.forget_block(tail);
    }
    if (leaf != nullptr) tree.delete_node(leaf);
    if (upper != nullptr) tree.delete_node(upper);
    if (root != tree.spaces_.end()) {
      tree.delete_node(root->second);
      tree.spaces_.erase(root);
    }
  }

  void make_root(const prefix_space& space) {
    node* made = tree.new_node();
    try {
      root = tree.spaces_.emplace(stored_space(space, tree.memory_), made).first;
    } catch (...) {
      tree.delete_node(made);
      throw;
    }
    made->space = &root->first;
    at.at = made;
  }
  void make_upper() {
    const node& lower = *at.at;
    upper = tree.new_node();
    const auto size = static_cast<std::size_t>(at.size - lower.first);
    upper->tokens.assign(lower.edge().begin(), lower.edge().begin() + static_cast<std::ptrdiff_t>(size));
    upper->blocks.resize(
        static_cast<std::size_t>(at.size / tree.block_size_ - lower.first / tree.block_size_));
    below = add_child({upper, lower.token(at.size)}, at.at);
  }
  void make_leaf(token_id token) {
    leaf = tree.new_node();
    leaf->first = leaf->last = leaf->base = at.size;
    branch = add_child({upper != nullptr ? upper : at.at, token}, leaf);
  }
  child_key add_child(const child_key& key, node* child) {
    tree.children_.emplace(key, child);
    return key;
  }
  /// Blocks and tokens from the place on.
  void make_blocks(const prefix_space& space, std::span<const token_id> tokens, index_t now) {
    target = leaf != nullptr ? leaf : at.at;
    blocks_before = target->blocks.size();
    const auto size = static_cast<index_t>(tokens.size());
    const index_t block_size = tree.block_size_;
    const auto room = [](auto& v, index_t n) {
      const std::size_t needed = v.size() + static_cast<std::size_t>(n);
      if (needed > v.capacity()) v.reserve(v.empty() ? needed : std::max(needed, 2 * v.capacity()));
    };
    room(target->tokens, size - at.size);
    room(target->blocks, size / block_size - at.size / block_size);
    eviction::block_key key = at.last_whole != nullptr ? at.last_whole->first : first_key(space);
    for (index_t i = at.size / block_size; i * block_size < size; ++i) {
      const index_t end = std::min((i + 1) * block_size, size);
      key = next_key(key, tokens.subspan(static_cast<std::size_t>(i * block_size),
                                         static_cast<std::size_t>(end - i * block_size)));
      while (key == eviction::no_block || tree.blocks_.contains(key)) key = mixed_bits(key);
      block made = &*tree.blocks_.emplace(key, stored_block<Cache>{target, i, now, 0}).first;
      if (end % block_size == 0) {
        target->blocks.push_back(made);
      } else {
        tail = made;
      }
    }
  }

  prefix_tree& tree;
  place at;
  node* target = nullptr;
  node* leaf = nullptr;
  node* upper = nullptr;
  block tail = nullptr;
  child_key branch{nullptr, 0};
  child_key below{nullptr, 0};
  typename decltype(prefix_tree::spaces_)::iterator root = tree.spaces_.end();
  std::size_t blocks_before = 0;
  bool done = false;
};

template <class Cache>
auto prefix_tree<Cache>::add(const prefix_space& space, const place& at, std::span<const token_id> tokens,
                             index_t now, Cache& cache) -> std::pair<node*, block> {
  edit made(*this, at);
  if (at.at == nullptr) made.make_root(space);
  if (!continues(at)) {
    if (at.size < made.at.at->last) made.make_upper();
    made.make_leaf(tokens[static_cast<std::size_t>(at.size)]);
  }
  made.make_blocks(space, tokens, now);
  // Nothing below can fail.
  made.done = true;
  node* parent = made.at.at;
  if (made.upper != nullptr) {
    split(parent, made.upper);
    parent = made.upper;
  }
  node* n = made.target;
  if (made.leaf != nullptr) {
    link(parent, n);
    ++num_sequences_;
  }
  const auto added = tokens.subspan(static_cast<std::size_t>(at.size));
  n->tokens.insert(n->tokens.end(), added.begin(), added.end());
  n->last = static_cast<index_t>(tokens.size());
  n->sequence.emplace(std::move(cache));
  n->sequence->truncate(n->last);
  count_sequence(n);
  n->provider = n;
  for (node* up = n->parent; up != nullptr && up->provider == nullptr; up = up->parent) up->provider = n;
  return {n, std::exchange(n->tail, made.tail)};
}

/// The edge of `lower` is cut where upper's tokens end; `lower` keeps what is behind.
template <class Cache>
void prefix_tree<Cache>::split(node* lower, node* upper) noexcept {
  upper->first = upper->base = lower->first;
  upper->last = lower->first + static_cast<index_t>(upper->tokens.size());
  upper->provider = lower->provider;
  for (index_t i = upper->first / block_size_; i < upper->last / block_size_; ++i) {
    upper->block(i, block_size_) = lower->block(i, block_size_);
    upper->block(i, block_size_)->second.owner = upper;
  }
  replace(lower, upper);
  children_.find(child_key{upper->parent, upper->token(upper->first)})->second = upper;
  lower->first = upper->last;
  link(upper, lower);
}

/// The only child takes over the edge of its parent, unless that would cost more than the edge is long.
template <class Cache>
void prefix_tree<Cache>::merge(node* upper) noexcept {
  node* lower = upper->first_child;
  if (!join_tokens(upper, lower)) return;
  for (index_t i = upper->first / block_size_; i < upper->last / block_size_; ++i) {
    lower->block(i, block_size_) = upper->block(i, block_size_);
    lower->block(i, block_size_)->second.owner = lower;
  }
  children_.erase(child_key{upper, lower->token(upper->last)});
  children_.find(child_key{upper->parent, upper->token(upper->first)})->second = lower;
  lower->first = upper->first;
  replace(upper, lower);
  delete_node(upper);
}

/// Makes the tokens of `lower` begin where those of `upper` do, with room for the blocks. \return false: not done
template <class Cache>
bool prefix_tree<Cache>::join_tokens(node* upper, node* lower) noexcept {
  if (lower->base <= upper->first) return true;
  if (lower->size() > 4 * upper->size() + 64) return false;
  try {
    std::pmr::vector<token_id> tokens(memory_);
    tokens.reserve(static_cast<std::size_t>(upper->size() + lower->size()));
    tokens.insert(tokens.end(), upper->edge().begin(), upper->edge().end());
    tokens.insert(tokens.end(), lower->edge().begin(), lower->edge().end());
    std::pmr::vector<block> blocks(memory_);
    blocks.resize(static_cast<std::size_t>(lower->last / block_size_ - upper->first / block_size_));
    for (index_t i = lower->first / block_size_; i < lower->last / block_size_; ++i)
      blocks[static_cast<std::size_t>(i - upper->first / block_size_)] = lower->block(i, block_size_);
    lower->tokens.swap(tokens);
    lower->blocks.swap(blocks);
    lower->base = upper->first;
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

template <class Cache>
void prefix_tree<Cache>::remove_leaf(node* n) noexcept {
  node* parent = n->parent;
  children_.erase(child_key{parent, n->token(n->first)});
  unlink(n);
  n->sequence.reset();
  count_sequence(n);
  --num_sequences_;
  find_providers(parent, n);
  delete_node(n);
}

template <class Cache>
void prefix_tree<Cache>::tidy(node* n) noexcept {
  if (n->is_root()) {
    if (n->first_child != nullptr) return;
    spaces_.erase(spaces_.find(*n->space));
    delete_node(n);
  } else if (!n->sequence && n->first_child->next == nullptr) {
    merge(n);
  }
}

template <class Cache>
void prefix_tree<Cache>::cut(node* leaf, index_t to) noexcept {
  while (to <= leaf->first) {
    node* parent = leaf->parent;
    const bool serves_parent =
        !parent->is_root() && !parent->sequence && parent->first_child->next == nullptr;
    if (!serves_parent) {
      remove_leaf(leaf);
      return tidy(parent);
    }
    // It could not be merged: the sequence moves up.
    parent->sequence.emplace(std::move(*leaf->sequence));
    ++num_sequences_;
    count_sequence(parent);
    remove_leaf(leaf);
    leaf = parent;
  }
  leaf->sequence->truncate(to);
  count_sequence(leaf);
  leaf->last = to;
  const auto keep = [](auto& v, index_t size) {
    v.resize(static_cast<std::size_t>(size));
    if (v.size() < v.capacity() / 2) v.shrink_to_fit();
  };
  keep(leaf->tokens, to - leaf->base);
  keep(leaf->blocks, to / block_size_ - leaf->base / block_size_);
}

template <class Cache>
void prefix_tree<Cache>::drop_sequence(node* n) noexcept {
  n->sequence.reset();
  count_sequence(n);
  --num_sequences_;
  find_providers(n, n);
  tidy(n);
}

}  // namespace kvcache::inline v0::serving::detail
