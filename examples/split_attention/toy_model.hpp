// SPDX-License-Identifier: MIT
// Stands for a model: queries, keys and values of a token in a layer, made up from its id and position, and the next
// token from what attention gave. A wrong output leads to other tokens.
#pragma once

#include "common/splitmix64.hpp"

#include <kvcache/attention/rope.hpp>
#include <kvcache/core/types.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace split_attention {

using kvcache::index_t;

struct model_shape {
  index_t num_layers = 4;
  index_t num_q_heads = 8;
  index_t num_kv_heads = 4;
  index_t head_dim = 64;
  index_t vocab_size = 128;  // tokens

  [[nodiscard]] index_t q_size() const noexcept { return num_q_heads * head_dim; }
  [[nodiscard]] index_t kv_size() const noexcept { return num_kv_heads * head_dim; }
};

/// What attention gets for some tokens of one layer, rotated for their positions in the whole sequence.
struct token_rows {
  std::vector<float> q;  // [tokens, num_q_heads, head_dim]
  std::vector<float> k;  // [tokens, num_kv_heads, head_dim]
  std::vector<float> v;  // [tokens, num_kv_heads, head_dim]
};

class toy_model {
 public:
  explicit toy_model(const model_shape& shape)
      : shape_(shape), rope_({.head_dim = shape.head_dim, .pairing = kvcache::rope_pairing::half}) {}

  [[nodiscard]] const model_shape& shape() const noexcept { return shape_; }

  /// Rows of `tokens`, the first of which sits at `pos`, appended to `rows`.
  void add_rows(std::span<const index_t> tokens, index_t pos, index_t layer, token_rows& rows) const {
    for (const index_t token : tokens) {
      const auto seed = static_cast<std::uint64_t>((token * 64 + layer) * 4);
      const auto q_begin = rows.q.size();
      const auto k_begin = rows.k.size();
      add_numbers(seed, shape_.q_size(), 2.0F, rows.q);
      add_numbers(seed + 1, shape_.kv_size(), 2.0F, rows.k);
      add_numbers(seed + 2, shape_.kv_size(), 1.0F, rows.v);
      kvcache::rope(std::span(rows.q).subspan(q_begin), std::span(rows.k).subspan(k_begin), pos++, rope_);
    }
  }

  /// \param out  of the newest token in the last layer, [num_q_heads, head_dim]
  [[nodiscard]] index_t next_token(std::span<const float> out) const {
    index_t best = 0;
    double best_score = -1e30;
    std::vector<float> embedding;
    for (index_t token = 0; token < shape_.vocab_size; ++token) {
      embedding.clear();
      add_numbers(static_cast<std::uint64_t>(token * 256 + 3), shape_.q_size(), 1.0F, embedding);
      double score = 0;
      for (std::size_t i = 0; i < out.size(); ++i) score += double{embedding[i]} * double{out[i]};
      if (score > best_score) best = token, best_score = score;
    }
    return best;
  }

 private:
  /// Appends `count` numbers in [-size, size), the same for the same seed on every machine.
  static void add_numbers(std::uint64_t seed, index_t count, float size, std::vector<float>& out) {
    program::splitmix64 random((seed + 1) * 0xD1B54A32D192ED03U);
    for (index_t i = 0; i < count; ++i)
      out.push_back((static_cast<float>(random.next() >> 40) / 8388608.0F - 1.0F) * size);
  }

  model_shape shape_;
  kvcache::rope_table rope_;
};

}  // namespace split_attention
