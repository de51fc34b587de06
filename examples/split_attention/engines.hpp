// SPDX-License-Identifier: MIT
// Three ways to keep some sequences and attend over them: whole; keys and values split by token; split by head.
//
//   split by token, 3 processes:   prompt     0 0 0 0 1 1 1 2 2 2          consecutive shares
//                                  decoded                        0 1 2 0   in turn, so that shares grow alike
//
// Each process has the queries of all tokens, as where the rest of the model is replicated or gathered before attention,
// and the keys and values of its share.
#pragma once

#include "split_attention/toy_model.hpp"

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/merge_parts.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/interop/mpi.hpp>

#include <algorithm>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

namespace split_attention {

using cache_type = kvcache::chunked_cache<kvcache::codec::bf16>;
using layer_type = decltype(std::declval<const cache_type&>()[0]);

/// What the example runs: attention over all that a sequence has, as one process sees it.
class engine {
 public:
  engine() = default;
  engine(const engine&) = delete;
  engine& operator=(const engine&) = delete;
  virtual ~engine() = default;

  /// The whole prompt of a sequence, one layer. \param out  [tokens, num_q_heads, head_dim]
  virtual void prefill(index_t sequence, index_t layer, const token_rows& rows, std::span<float> out) = 0;

  /// One token of every sequence, the `step`-th after the prompt. \param out  [sequences, num_q_heads, head_dim]
  virtual void decode(index_t step, index_t layer, const token_rows& rows, std::span<float> out) = 0;
};

/// A slice [first, first + count) of equal pieces.
template <class Float>
[[nodiscard]] std::span<Float> pieces(std::span<Float> all, index_t piece_size, index_t first,
                                      index_t count = 1) {
  return all.subspan(static_cast<std::size_t>(first * piece_size),
                     static_cast<std::size_t>(count * piece_size));
}

[[nodiscard]] inline std::vector<cache_type> make_caches(const model_shape& model, index_t num_kv_heads,
                                                         index_t num_sequences) {
  std::vector<cache_type> caches;
  for (index_t i = 0; i < num_sequences; ++i)
    caches.emplace_back(kvcache::cache_shape{
        .num_layers = model.num_layers, .num_kv_heads = num_kv_heads, .head_dim = model.head_dim});
  return caches;
}

/// One query of every sequence over what its cache has, all of it visible.
inline void attend_newest(const std::vector<cache_type>& caches, index_t layer, std::span<const float> q,
                          std::span<float> out, std::span<float> lse) {
  const auto num_sequences = static_cast<index_t>(caches.size());
  const auto row = static_cast<index_t>(q.size()) / num_sequences;
  const auto heads = static_cast<index_t>(lse.size()) / num_sequences;
  std::vector<kvcache::attend_item<layer_type>> batch;
  for (index_t s = 0; s < num_sequences; ++s)
    batch.push_back({.q = pieces(q, row, s),
                     .layer = caches[static_cast<std::size_t>(s)][layer],
                     .out = pieces(out, row, s),
                     .lse = pieces(lse, heads, s)});
  // Nothing in any part is younger than the queries: no part needs to know positions.
  kvcache::attend<layer_type>(batch, {.causal = false});
}

/// The keys and values of one part of every sequence.
class key_part {
 public:
  key_part(const model_shape& model, index_t num_sequences, index_t part, index_t num_parts)
      : model_(model),
        part_(part),
        num_parts_(num_parts),
        caches_(make_caches(model, model.num_kv_heads, num_sequences)) {}

  /// \param lse  [tokens, num_q_heads]
  void prefill(index_t sequence, index_t layer, const token_rows& rows, std::span<float> out,
               std::span<float> lse) {
    const index_t num_tokens = static_cast<index_t>(rows.q.size()) / model_.q_size();
    const auto [first, last] = kvcache::share_of(num_tokens, part_, num_parts_);
    cache_type& cache = caches_[static_cast<std::size_t>(sequence)];
    cache[layer].append(pieces(std::span(rows.k), model_.kv_size(), first, last - first),
                        pieces(std::span(rows.v), model_.kv_size(), first, last - first));
    // Rotated for the whole sequence, masked within the part: its first token counts as position 0.
    std::vector<index_t> positions(static_cast<std::size_t>(num_tokens));
    std::iota(positions.begin(), positions.end(), -first);
    kvcache::attend(rows.q, cache[layer], out, {.q_len = num_tokens, .q_positions = positions, .lse = lse});
  }

  /// \param lse  [sequences, num_q_heads]
  void decode(index_t step, index_t layer, const token_rows& rows, std::span<float> out,
              std::span<float> lse) {
    if (step % num_parts_ == part_) {
      for (std::size_t s = 0; s < caches_.size(); ++s)
        caches_[s][layer].append(pieces(std::span(rows.k), model_.kv_size(), static_cast<index_t>(s)),
                                 pieces(std::span(rows.v), model_.kv_size(), static_cast<index_t>(s)));
    }
    attend_newest(caches_, layer, rows.q, out, lse);
  }

  [[nodiscard]] index_t num_tokens() const noexcept {
    return std::accumulate(caches_.begin(), caches_.end(), index_t{0},
                           [](index_t sum, const cache_type& cache) { return sum + cache.size(); });
  }

 private:
  model_shape model_;
  index_t part_;
  index_t num_parts_;
  std::vector<cache_type> caches_;  // [sequences]
};

/// Sequences split into parts that are all here; one part: not split.
class local_engine final : public engine {
 public:
  local_engine(const model_shape& model, index_t num_sequences, index_t num_parts) : model_(model) {
    for (index_t p = 0; p < num_parts; ++p) parts_.emplace_back(model, num_sequences, p, num_parts);
  }

  void prefill(index_t sequence, index_t layer, const token_rows& rows, std::span<float> out) override {
    run(out,
        [&](key_part& part, auto part_out, auto lse) { part.prefill(sequence, layer, rows, part_out, lse); });
  }
  void decode(index_t step, index_t layer, const token_rows& rows, std::span<float> out) override {
    run(out, [&](key_part& part, auto part_out, auto lse) { part.decode(step, layer, rows, part_out, lse); });
  }

 private:
  template <class Attend>
  void run(std::span<float> out, Attend attend) {
    const auto num_rows = out.size() / static_cast<std::size_t>(model_.head_dim);
    std::vector<std::vector<float>> outs(parts_.size(), std::vector<float>(out.size()));
    std::vector<std::vector<float>> lses(parts_.size(), std::vector<float>(num_rows));
    std::vector<kvcache::partial_result> results;
    for (std::size_t p = 0; p < parts_.size(); ++p) {
      attend(parts_[p], std::span(outs[p]), std::span(lses[p]));
      results.push_back({outs[p], lses[p]});
    }
    kvcache::merge_parts(results);
    std::copy(outs[0].begin(), outs[0].end(), out.begin());
  }

  model_shape model_;
  std::vector<key_part> parts_;
};

/// Sequences split by token: this process has one part, MPI merges.
class split_keys_engine final : public engine {
 public:
  split_keys_engine(const model_shape& model, index_t num_sequences, kvcache::mpi_group& group)
      : model_(model), group_(&group), part_(model, num_sequences, group.rank(), group.size()) {}

  void prefill(index_t sequence, index_t layer, const token_rows& rows, std::span<float> out) override {
    lse_.resize(out.size() / static_cast<std::size_t>(model_.head_dim));
    part_.prefill(sequence, layer, rows, out, lse_);
    group_->merge(out, lse_);
  }
  void decode(index_t step, index_t layer, const token_rows& rows, std::span<float> out) override {
    lse_.resize(out.size() / static_cast<std::size_t>(model_.head_dim));
    part_.decode(step, layer, rows, out, lse_);
    group_->merge(out, lse_);  // of all sequences at once
  }

  [[nodiscard]] index_t num_tokens() const noexcept { return part_.num_tokens(); }

 private:
  model_shape model_;
  kvcache::mpi_group* group_;
  key_part part_;
  std::vector<float> lse_;
};

/// Sequences split by head: this process has some KV heads of every token, and their query heads.
class split_heads_engine final : public engine {
 public:
  split_heads_engine(const model_shape& model, index_t num_sequences, kvcache::mpi_group& group)
      : model_(model), group_(&group), heads_(group.kv_heads(model.num_kv_heads)) {
    if (num_heads() > 0) caches_ = make_caches(model, num_heads(), num_sequences);
  }

  void prefill(index_t sequence, index_t layer, const token_rows& rows, std::span<float> out) override {
    const index_t num_tokens = static_cast<index_t>(rows.q.size()) / model_.q_size();
    const token_rows mine = my_heads(rows, num_tokens);
    std::vector<float> part(mine.q.size());
    if (num_heads() > 0) {
      cache_type& cache = caches_[static_cast<std::size_t>(sequence)];
      cache[layer].append(mine.k, mine.v);
      kvcache::attend(mine.q, cache[layer], part, {.q_len = num_tokens});
    }
    group_->gather_heads(part, out, num_tokens, model_.num_kv_heads);
  }

  void decode(index_t, index_t layer, const token_rows& rows, std::span<float> out) override {
    const index_t num_sequences = static_cast<index_t>(rows.q.size()) / model_.q_size();
    const token_rows mine = my_heads(rows, num_sequences);
    std::vector<float> part(mine.q.size());
    if (num_heads() > 0) {
      for (std::size_t s = 0; s < caches_.size(); ++s) {
        const index_t size = num_heads() * model_.head_dim;
        caches_[s][layer].append(pieces(std::span(mine.k), size, static_cast<index_t>(s)),
                                 pieces(std::span(mine.v), size, static_cast<index_t>(s)));
      }
      std::vector<float> lse(part.size() / static_cast<std::size_t>(model_.head_dim));
      attend_newest(caches_, layer, mine.q, part, lse);
    }
    group_->gather_heads(part, out, num_sequences, model_.num_kv_heads);  // of all sequences at once
  }

 private:
  [[nodiscard]] index_t num_heads() const noexcept { return heads_.last - heads_.first; }

  /// Of every token the heads that are this process's.
  [[nodiscard]] token_rows my_heads(const token_rows& all, index_t num_tokens) const {
    const auto cut = [&](const std::vector<float>& from, index_t heads_per_kv_head) {
      const index_t group = heads_per_kv_head * model_.head_dim;
      std::vector<float> to;
      for (index_t t = 0; t < num_tokens; ++t) {
        const auto heads =
            pieces(std::span(from), group, t * model_.num_kv_heads + heads_.first, num_heads());
        to.insert(to.end(), heads.begin(), heads.end());
      }
      return to;
    };
    return {cut(all.q, model_.num_q_heads / model_.num_kv_heads), cut(all.k, 1), cut(all.v, 1)};
  }

  model_shape model_;
  kvcache::mpi_group* group_;
  kvcache::token_range heads_;
  std::vector<cache_type> caches_;  // [sequences], none without heads
};

}  // namespace split_attention
