// SPDX-License-Identifier: MIT
// What a prefix_tree is made of: edges that hold tokens, and the blocks that a policy orders.
//
//   tokens   | block 0 | block 1 | block 2 |          block_size tokens each, the last one of a sequence may be shorter
//   root --[ edge a ........ ]-+--[ edge b ... ]      a block belongs to the edge in which its last token lies
//                              +--[ edge c ]
//
// So paths that part inside a block have that block each, as they have a page each in a pool that copies on write.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/eviction/concepts.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace kvcache::inline v0::serving {

/// Whose prefixes these are. Nothing is ever shared between two spaces that differ in any of the three strings, which
/// are compared in full.
struct prefix_space {
  std::string_view model = {};    ///< what computed the keys and values
  std::string_view adapter = {};  ///< LoRA or the like
  std::string_view tenant = {};   ///< or any salt: who must not learn what others have asked

  friend auto operator<=>(const prefix_space&,
                          const prefix_space&) = default;  // NOLINT(modernize-use-nullptr)
};

namespace detail {

/// A prefix_space that owns its strings.
struct stored_space {
  stored_space(const prefix_space& s, std::pmr::memory_resource* memory)
      : model(s.model, memory), adapter(s.adapter, memory), tenant(s.tenant, memory) {}

  [[nodiscard]] prefix_space view() const noexcept { return {model, adapter, tenant}; }

  std::pmr::string model;
  std::pmr::string adapter;
  std::pmr::string tenant;
};

struct space_less {
  using is_transparent = void;
  static const prefix_space& view(const prefix_space& s) noexcept { return s; }
  static prefix_space view(const stored_space& s) noexcept { return s.view(); }
  template <class A, class B>
  bool operator()(const A& a, const B& b) const noexcept {
    return view(a) < view(b);
  }
};

/// Mixes 64 bits (splitmix64).
inline std::uint64_t mixed_bits(std::uint64_t z) noexcept {
  z += 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

/// Where the chain of keys of a space begins.
inline eviction::block_key first_key(const prefix_space& space) noexcept {
  std::uint64_t h = 0;
  for (const std::string_view text : {space.model, space.adapter, space.tenant}) {
    for (const char c : text) h = mixed_bits(h ^ static_cast<unsigned char>(c));
    h = mixed_bits(h + text.size());
  }
  return h;
}

/// What names a block for a policy: a hash of its tokens and of those before it. It orders, it never identifies: two
/// blocks with one hash get different keys, and what is found is found by comparing tokens.
inline eviction::block_key next_key(eviction::block_key before, std::span<const token_id> tokens) noexcept {
  std::uint64_t h = before;
  for (const token_id t : tokens) h = mixed_bits(h ^ static_cast<std::uint32_t>(t));
  return mixed_bits(h + tokens.size());
}

/// How many tokens are the same from the beginning.
inline index_t common_prefix(std::span<const token_id> a, std::span<const token_id> b) noexcept {
  constexpr std::size_t at_a_time = 64;
  const std::size_t most = std::min(a.size(), b.size());
  std::size_t same = 0;
  while (same + at_a_time <= most &&
         std::memcmp(a.data() + same, b.data() + same, at_a_time * sizeof(token_id)) == 0)
    same += at_a_time;
  while (same < most && a[same] == b[same]) ++same;
  return static_cast<index_t>(same);
}

using kvcache::detail::require;

template <class Cache>
struct prefix_node;

/// A block that the policy knows.
template <class Cache>
struct stored_block {
  prefix_node<Cache>* owner = nullptr;  // the edge in which its last token lies
  index_t index = 0;                    // tokens [index * block_size, ..)
  index_t last_use = 0;                 // ticks
  index_t pins = 0;
};

template <class Cache>
using block_map = std::pmr::unordered_map<eviction::block_key, stored_block<Cache>>;

/// A block with its key; stays where it is until it goes.
template <class Cache>
using block_ref = typename block_map<Cache>::value_type*;

/// One edge, and the point at its end.
template <class Cache>
struct prefix_node {
  explicit prefix_node(std::pmr::memory_resource* memory) : tokens(memory), blocks(memory) {}

  [[nodiscard]] index_t size() const noexcept { return last - first; }
  [[nodiscard]] token_id token(index_t t) const noexcept {
    return tokens[static_cast<std::size_t>(t - base)];
  }
  [[nodiscard]] std::span<const token_id> edge() const noexcept {
    return std::span(tokens).subspan(static_cast<std::size_t>(first - base));
  }
  /// The whole block `index`. \pre its last token lies on this edge
  [[nodiscard]] block_ref<Cache>& block(index_t index, index_t block_size) noexcept {
    return blocks[static_cast<std::size_t>(index - base / block_size)];
  }
  [[nodiscard]] bool is_root() const noexcept { return parent == nullptr; }

  prefix_node* parent = nullptr;
  prefix_node* first_child = nullptr;
  prefix_node* next = nullptr;  // the children of one parent, in no order
  prefix_node* before = nullptr;
  prefix_node* provider = nullptr;      // this one or one below it, which has a sequence
  const stored_space* space = nullptr;  // of a root

  index_t first = 0;  // the edge is tokens [first, last) of every path through it
  index_t last = 0;
  index_t base =
      0;  // <= first: where `tokens` begins; what lies before `first` was split off, and may come back
  std::pmr::vector<token_id> tokens;          // of [base, last)
  std::pmr::vector<block_ref<Cache>> blocks;  // whole ones that end in (base, last]
  block_ref<Cache> tail = nullptr;            // the last block of `sequence`, where that is not whole
  std::optional<Cache> sequence;              // of tokens [0, last)
  index_t sequence_bytes = 0;                 // own_bytes() of it
};

// -- children and providers ---

template <class Cache>
void link(prefix_node<Cache>* parent, prefix_node<Cache>* child) noexcept {
  child->parent = parent;
  child->before = nullptr;
  child->next = parent->first_child;
  if (child->next != nullptr) child->next->before = child;
  parent->first_child = child;
}
template <class Cache>
void unlink(prefix_node<Cache>* child) noexcept {
  (child->before != nullptr ? child->before->next : child->parent->first_child) = child->next;
  if (child->next != nullptr) child->next->before = child->before;
}
/// `child` takes the place of `other` among the children of its parent.
template <class Cache>
void replace(prefix_node<Cache>* other, prefix_node<Cache>* child) noexcept {
  child->parent = other->parent;
  child->before = other->before;
  child->next = other->next;
  (child->before != nullptr ? child->before->next : child->parent->first_child) = child;
  if (child->next != nullptr) child->next->before = child;
}
/// From `n` up, whoever was served by `gone` is served by another.
template <class Cache>
void find_providers(prefix_node<Cache>* n, const prefix_node<Cache>* gone) noexcept {
  for (; n != nullptr && n->provider == gone; n = n->parent)
    n->provider = n->sequence ? n : n->first_child != nullptr ? n->first_child->provider : nullptr;
}

}  // namespace detail
}  // namespace kvcache::inline v0::serving
