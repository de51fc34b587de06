// SPDX-License-Identifier: MIT
// One side of a codec alone, over rows of one head: encoded block by block, then read as attention reads it.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/kernel/select.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

namespace quality {

using kvcache::block_geometry;
using kvcache::index_t;

/// Floats on a boundary of 64 bytes, zero to begin with.
class aligned_floats {
 public:
  explicit aligned_floats(index_t count)
      : block_(std::max<index_t>(kvcache::round_up(count * index_t{sizeof(float)}, 64), 64),
               kvcache::huge_page_resource()),
        data_(reinterpret_cast<float*>(block_.data())) {
    std::fill_n(data_, block_.size() / index_t{sizeof(float)}, 0.0F);
  }
  [[nodiscard]] float* data() const noexcept { return data_; }

 private:
  kvcache::memory_block block_;
  float* data_;
};

/// \tparam Side  codec::any_keys or codec::any_values
template <class Side>
class coded_rows {
 public:
  /// \param rows  [num_tokens, head_dim], whole blocks of them
  /// Throws std::invalid_argument when the codec refuses the rows.
  coded_rows(Side side, const block_geometry& g, std::span<const float> rows)
      : side_(std::move(side)),
        g_(g),
        num_blocks_(static_cast<index_t>(rows.size()) / (g.block_size * g.head_dim)),
        bytes_(num_blocks_ * side_.section_bytes(g), kvcache::huge_page_resource()) {
    std::fill_n(bytes_.data(), bytes_.size(), std::byte{0});
    for (index_t b = 0; b < num_blocks_; ++b) {
      const kvcache::const_rows from{rows.data() + b * g.block_size * g.head_dim, g.head_dim};
      if (side_.accepts(kernels_, g, g.block_size, from) != kvcache::status::ok)
        throw std::invalid_argument("the codec refuses the rows");
      side_.encode(kernels_, g, block(b), 0, g.block_size, from);
    }
  }

  /// Bits that a number takes, scales and padding included.
  [[nodiscard]] double bits() const {
    return 8.0 * static_cast<double>(side_.section_bytes(g_)) /
           static_cast<double>(g_.block_size * g_.head_dim);
  }

  /// The rows as they are stored, [num_tokens, head_dim].
  [[nodiscard]] std::vector<float> decoded() const {
    const index_t block_floats = g_.block_size * g_.head_dim;
    std::vector<float> rows(static_cast<std::size_t>(num_blocks_ * block_floats));
    for (index_t b = 0; b < num_blocks_; ++b)
      side_.decode(kernels_, g_, block(b), 0, g_.block_size, {rows.data() + b * block_floats, g_.head_dim});
    return rows;
  }

  /// scores[r, t] = sum_d queries[r, d] * keys[t, d].
  /// \param queries  [num_rows, head_dim]
  /// \return         [num_rows, num_tokens]
  [[nodiscard]] std::vector<float> scores(std::span<const float> queries) const;

  /// sums[r, d] = sum_t weights[r, t] * values[t, d].
  /// \param weights  [num_rows, num_tokens]
  /// \return         [num_rows, head_dim]
  [[nodiscard]] std::vector<float> sums(std::span<const float> weights) const;

 private:
  [[nodiscard]] std::byte* block(index_t b) const noexcept {
    return const_cast<kvcache::memory_block&>(bytes_).data() + b * side_.section_bytes(g_);
  }
  [[nodiscard]] index_t num_tokens() const noexcept { return num_blocks_ * g_.block_size; }

  const kvcache::kernel::table& kernels_ = kvcache::kernel::best();
  Side side_;
  block_geometry g_;
  index_t num_blocks_;
  kvcache::memory_block bytes_;
};

using coded_keys = coded_rows<kvcache::codec::any_keys>;
using coded_values = coded_rows<kvcache::codec::any_values>;

template <class Side>
std::vector<float> coded_rows<Side>::scores(std::span<const float> queries) const {
  const index_t num_rows = static_cast<index_t>(queries.size()) / g_.head_dim;
  std::vector<float> all(static_cast<std::size_t>(num_rows * num_tokens()));
  aligned_floats query(g_.head_dim);
  aligned_floats prepared(side_.prepared_floats(g_));
  aligned_floats block_scores(g_.block_size);
  for (index_t r = 0; r < num_rows; ++r) {
    std::copy_n(queries.data() + r * g_.head_dim, g_.head_dim, query.data());
    const float* ready = side_.prepare(kernels_, g_, query.data(), 1, prepared.data());
    for (index_t b = 0; b < num_blocks_; ++b) {
      side_.scores(kernels_, g_, block(b), g_.block_size, ready, 1, block_scores.data(), nullptr);
      std::copy_n(block_scores.data(), g_.block_size, all.data() + r * num_tokens() + b * g_.block_size);
    }
  }
  return all;
}

template <class Side>
std::vector<float> coded_rows<Side>::sums(std::span<const float> weights) const {
  const index_t num_rows = static_cast<index_t>(weights.size()) / num_tokens();
  std::vector<float> all(static_cast<std::size_t>(num_rows * g_.head_dim));
  aligned_floats block_weights(g_.block_size);
  for (index_t r = 0; r < num_rows; ++r) {
    aligned_floats sum(g_.head_dim);
    for (index_t b = 0; b < num_blocks_; ++b) {
      std::copy_n(weights.data() + r * num_tokens() + b * g_.block_size, g_.block_size, block_weights.data());
      side_.accumulate(kernels_, g_, block(b), g_.block_size, block_weights.data(), 1, sum.data(), nullptr);
    }
    side_.finish(kernels_, g_, 1, sum.data());
    std::copy_n(sum.data(), g_.head_dim, all.data() + r * g_.head_dim);
  }
  return all;
}

}  // namespace quality
