// SPDX-License-Identifier: MIT
// token_policy: which tokens of a sequence matter least, as a score for each of them.
//
//   attend, add_token_weights  ->  policy.observe(weights)      or the keys, or nothing: what the policy wants to see
//   policy.score(scores)       ->  select_tokens(scores, ...)   eviction/select_tokens.hpp
//   cache.keep_tokens(kept)    ->  policy.keep(kept)            eviction/evict_tokens.hpp does these three
//
// Tokens are counted as in the cache. There is one score for each token of the sequence, since a cache keeps the same tokens in
// all layers and heads: what policies see is summed, or averaged, over those. The papers choose for each head anew.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/eviction/select_tokens.hpp>

#include <concepts>
#include <limits>
#include <span>

namespace kvcache::inline v0::eviction {

/// What a policy is shown.
enum class token_evidence {
  none,     ///< nothing: the index of a token says all
  weights,  ///< how much attention tokens get
  keys,     ///< the stored keys
};

/// For num_queries(): of every query there was.
inline constexpr index_t every_query = std::numeric_limits<index_t>::max();

/// `evidence`             what `observe` wants
/// `num_queries()`        for weights: of how many of the newest queries; 1, or every_query, or 0 where it wants none
/// `observe(weights)`     for weights: [size], summed over those queries, over heads and layers (add_token_weights), before
///                        tokens are chosen; with every_query as often as there is news, each query once. Throws std::bad_alloc.
/// `observe(keys)`        for keys: see keydiff
/// `score(scores)`        writes [size]: the higher, the longer a token stays. `size` is that of the newest evidence.
/// `keep(tokens)`         the sequence was cut to these, ascending. Never allocates, never fails.
/// `selection(budget)`    what the paper protects, for this many tokens in all
template <class P>
concept token_policy = std::copyable<P> && requires(P& policy, const P& settled, std::span<float> scores,
                                                    std::span<const index_t> tokens, index_t n) {
  { P::name } -> std::convertible_to<const char*>;
  { P::evidence } -> std::convertible_to<token_evidence>;
  { settled.num_queries() } -> std::same_as<index_t>;
  settled.score(scores);
  { policy.keep(tokens) }
  noexcept;
  { settled.selection(n) } -> std::same_as<token_selection>;
} &&(P::evidence != token_evidence::weights ||
     requires(P & policy, std::span<const float> weights) { policy.observe(weights); });

/// What policies without books of their own inherit.
struct no_token_books {
  [[nodiscard]] static index_t num_queries() noexcept { return 0; }
  static void keep(std::span<const index_t> /*tokens*/) noexcept {}
};

}  // namespace kvcache::inline v0::eviction
