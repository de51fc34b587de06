// SPDX-License-Identifier: MIT
// low_rank_bases: the bases that low_rank stores rows in, one for the keys and one for the values of each head.
//
//   stored  c = (in x) / spread             rank numbers in place of the head_dim of x
//   read    q . x  ~  (spread * out q) . c       x  ~  out^T (spread * c)        out in^T = identity
//
// For values, and for keys where no queries were seen, in and out are one matrix with orthonormal rows.
// How they are found: codec/low_rank.hpp, the only part that needs Eigen.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kvcache::inline v0::codec {

/// What low_rank_bases are made from, for instance from a file. Matrices are row-major.
struct low_rank_matrices {
  low_rank_layout key_layout = {};
  low_rank_layout value_layout = {};
  std::vector<float> keys_in = {};        ///< [num_layers, num_kv_heads, key rank, head_dim]
  std::vector<float> keys_out = {};       ///< the same size, or empty: keys_in
  std::vector<float> values = {};         ///< [num_layers, num_kv_heads, value rank, head_dim]
  std::vector<float> key_spreads = {};    ///< [num_layers, num_kv_heads, key rank], above zero
  std::vector<float> value_spreads = {};  ///< [num_layers, num_kv_heads, value rank]
};

/// What the rows of one head are multiplied by. Components are padded to a multiple of 16 by zeros, spreads by ones.
struct low_rank_basis {
  const float* in = nullptr;   ///< keys: [rank/16][head_dim][16], the block order; values: [rank][head_dim]
  const float* out = nullptr;  ///< the same order; may be `in`
  const float* spreads = nullptr;  ///< [rank]
};

/// What is calibrated: rows as they are appended, and what the queries looked like.
struct low_rank_sample {
  std::span<const float>
      k;  ///< [num_layers, tokens, num_kv_heads, head_dim], keys rotated as they are stored
  std::span<const float> v;  ///< the same
  /// Sum or mean of q q^T over the queries that read a head, [num_layers, num_kv_heads, head_dim, head_dim]; or empty.
  std::span<const float> query_moments = {};
};

/// Shared by the copies of a codec, never changed.
class low_rank_bases {
 public:
  /// Throws shape_error if a size is wrong, a layout does not fit head_dim or a number is not finite, or above 1e15.
  low_rank_bases(const cache_shape& shape, const low_rank_matrices& matrices);

  /// The best bases for sample rows, keys and values by the same options or each by its own. Defined in
  /// codec/low_rank.hpp. Throws shape_error if options, sizes or numbers cannot be.
  static std::shared_ptr<const low_rank_bases> fit(const cache_shape& shape, const low_rank_options& options,
                                                   const low_rank_sample& sample);
  static std::shared_ptr<const low_rank_bases> fit(const cache_shape& shape, const low_rank_options& keys,
                                                   const low_rank_options& values,
                                                   const low_rank_sample& sample);
  /// The same for the tokens that a cache has now. \tparam Cache  any kv_cache
  template <class Cache>
  static std::shared_ptr<const low_rank_bases> fit_from(const Cache& cache, const low_rank_options& options,
                                                        std::span<const float> query_moments = {}) {
    return fit_from(cache, options, options, query_moments);
  }
  template <class Cache>
  static std::shared_ptr<const low_rank_bases> fit_from(const Cache& cache, const low_rank_options& keys,
                                                        const low_rank_options& values,
                                                        std::span<const float> query_moments = {});

  /// The settings of one side, keys or values, and bases of that side made from them; the other side is of no use then.
  /// See codec/description.hpp and docs/format.md. from_settings throws shape_error.
  void put_settings(bool of_keys, std::vector<std::byte>& out) const;
  static std::shared_ptr<const low_rank_bases> from_settings(bool of_keys,
                                                             std::span<const std::byte> settings,
                                                             const cache_shape& shape);

  [[nodiscard]] const cache_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] const low_rank_layout& key_layout() const noexcept { return key_layout_; }
  [[nodiscard]] const low_rank_layout& value_layout() const noexcept { return value_layout_; }

  [[nodiscard]] low_rank_basis keys(index_t layer, index_t head) const noexcept {
    const float* at = floats() + head_index(layer, head) * key_floats();
    const float* out = weighted_ ? at + matrix_floats(key_layout_) : at;
    return {at, out, out + matrix_floats(key_layout_)};
  }
  [[nodiscard]] low_rank_basis values(index_t layer, index_t head) const noexcept {
    const float* at = floats() + num_heads() * key_floats() + head_index(layer, head) * value_floats();
    return {at, at, at + matrix_floats(value_layout_)};
  }

  /// Memory of the bases of the keys and of the values; part of what each cache with them reports as shared.
  [[nodiscard]] index_t key_bytes() const noexcept {
    return num_heads() * key_floats() * index_t{sizeof(float)};
  }
  [[nodiscard]] index_t value_bytes() const noexcept {
    return num_heads() * value_floats() * index_t{sizeof(float)};
  }

 private:
  [[nodiscard]] const float* floats() const noexcept {
    return reinterpret_cast<const float*>(memory_.data());
  }
  [[nodiscard]] index_t num_heads() const noexcept { return shape_.num_layers * shape_.num_kv_heads; }
  [[nodiscard]] index_t head_index(index_t layer, index_t head) const noexcept {
    return layer * shape_.num_kv_heads + head;
  }
  [[nodiscard]] index_t matrix_floats(const low_rank_layout& layout) const noexcept {
    return round_up(layout.rank(), key_lanes) * shape_.head_dim;
  }
  [[nodiscard]] index_t key_floats() const noexcept {
    return (weighted_ ? 2 : 1) * matrix_floats(key_layout_) + round_up(key_layout_.rank(), key_lanes);
  }
  [[nodiscard]] index_t value_floats() const noexcept {
    return matrix_floats(value_layout_) + round_up(value_layout_.rank(), key_lanes);
  }

  void check_layout(const low_rank_layout& layout) const {
    for (const index_t count : {layout.f32, layout.bf16, layout.int8, layout.bits4, layout.bits2}) {
      if (count < 0 || count > shape_.head_dim)
        throw shape_error("kvcache: low_rank: a group has 0 to head_dim components");
    }
    if (layout.rank() < 1 || layout.rank() > shape_.head_dim)
      throw shape_error("kvcache: low_rank: rank must be 1 to head_dim, got " +
                        std::to_string(layout.rank()));
  }
  static void check_floats(const std::vector<float>& floats, index_t count, bool above_zero) {
    if (static_cast<index_t>(floats.size()) != count)
      throw shape_error("kvcache: low_rank: bases must be [num_layers, num_kv_heads, rank, head_dim]");
    for (const float x : floats) {
      if (!(std::fabs(x) <= 1e15F) || (above_zero && !(x >= 1e-15F)))
        throw shape_error("kvcache: low_rank: the numbers of a basis must be finite, and spreads above zero");
    }
  }

  /// Rows [rank, head_dim] of one head into the block order of keys, zeros behind them.
  void put_lanes(const float* rows, index_t rank, float* to) const noexcept {
    const block_geometry g{round_up(rank, key_lanes), shape_.head_dim};
    for (index_t i = 0; i < rank; ++i) {
      for (index_t d = 0; d < shape_.head_dim; ++d)
        to[block_order<float>::key_index(g, i, d)] = rows[i * shape_.head_dim + d];
    }
  }

  cache_shape shape_;
  low_rank_layout key_layout_;
  low_rank_layout value_layout_;
  bool weighted_;  // keys have two matrices
  memory_block memory_;
};

inline low_rank_bases::low_rank_bases(const cache_shape& shape, const low_rank_matrices& matrices)
    : shape_(shape),
      key_layout_(matrices.key_layout),
      value_layout_(matrices.value_layout),
      weighted_(!matrices.keys_out.empty()) {
  validate(shape);
  check_layout(key_layout_);
  check_layout(value_layout_);
  const index_t key_rank = key_layout_.rank();
  const index_t value_rank = value_layout_.rank();
  const index_t dim = shape.head_dim;
  check_floats(matrices.keys_in, num_heads() * key_rank * dim, false);
  if (weighted_) check_floats(matrices.keys_out, num_heads() * key_rank * dim, false);
  check_floats(matrices.values, num_heads() * value_rank * dim, false);
  check_floats(matrices.key_spreads, num_heads() * key_rank, true);
  check_floats(matrices.value_spreads, num_heads() * value_rank, true);

  const index_t num_floats = num_heads() * (key_floats() + value_floats());
  memory_ = memory_block(num_floats * index_t{sizeof(float)}, huge_page_resource());
  auto* to = reinterpret_cast<float*>(memory_.data());
  std::fill_n(to, num_floats, 0.0F);
  const auto put_spreads = [](const std::vector<float>& spreads, index_t head, index_t rank, float* at) {
    std::fill_n(at, round_up(rank, key_lanes), 1.0F);
    std::copy_n(spreads.begin() + head * rank, rank, at);
  };
  for (index_t head = 0; head < num_heads(); ++head, to += key_floats()) {
    put_lanes(matrices.keys_in.data() + head * key_rank * dim, key_rank, to);
    float* out = weighted_ ? to + matrix_floats(key_layout_) : to;
    if (weighted_) put_lanes(matrices.keys_out.data() + head * key_rank * dim, key_rank, out);
    put_spreads(matrices.key_spreads, head, key_rank, out + matrix_floats(key_layout_));
  }
  for (index_t head = 0; head < num_heads(); ++head, to += value_floats()) {
    std::copy_n(matrices.values.begin() + head * value_rank * dim, value_rank * dim, to);
    put_spreads(matrices.value_spreads, head, value_rank, to + matrix_floats(value_layout_));
  }
}

inline void low_rank_bases::put_settings(bool of_keys, std::vector<std::byte>& out) const {
  const low_rank_layout& layout = of_keys ? key_layout_ : value_layout_;
  const bool two = of_keys && weighted_;
  const std::array<std::int64_t, 6> numbers = {layout.f32,   layout.bf16,  layout.int8,
                                               layout.bits4, layout.bits2, two ? 1 : 0};
  const auto bytes = std::as_bytes(std::span(numbers));
  out.insert(out.end(), bytes.begin(), bytes.end());
  const index_t rank = layout.rank();
  const block_geometry g{round_up(rank, key_lanes), shape_.head_dim};
  std::vector<float> row(static_cast<std::size_t>(shape_.head_dim));
  const auto put = [&](auto of_head) {  // [rank, head_dim] of all heads
    for (index_t head = 0; head < num_heads(); ++head) {
      const float* matrix = of_head(head);
      for (index_t i = 0; i < rank; ++i) {
        for (index_t d = 0; d < shape_.head_dim; ++d)
          row[static_cast<std::size_t>(d)] =
              matrix[of_keys ? block_order<float>::key_index(g, i, d) : i * shape_.head_dim + d];
        kvcache::detail::put_floats(row, out);
      }
    }
  };
  const auto basis = [&](index_t head) {
    return of_keys ? keys(head / shape_.num_kv_heads, head % shape_.num_kv_heads)
                   : values(head / shape_.num_kv_heads, head % shape_.num_kv_heads);
  };
  put([&](index_t head) { return basis(head).in; });
  if (two) put([&](index_t head) { return basis(head).out; });
  for (index_t head = 0; head < num_heads(); ++head)
    kvcache::detail::put_floats({basis(head).spreads, static_cast<std::size_t>(rank)}, out);
}

inline std::shared_ptr<const low_rank_bases> low_rank_bases::from_settings(
    bool of_keys, std::span<const std::byte> settings, const cache_shape& shape) {
  std::array<std::int64_t, 6> numbers{};
  if (settings.size() < sizeof(numbers)) throw shape_error("kvcache: low_rank: the settings end too early");
  std::memcpy(numbers.data(), settings.data(), sizeof(numbers));
  for (const std::int64_t n : numbers) {
    if (n < 0 || n > shape.head_dim)
      throw shape_error("kvcache: low_rank: a group has 0 to head_dim components");
  }
  const low_rank_layout layout{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
  const bool two = of_keys && numbers[5] != 0;
  const index_t heads = checked_mul(shape.num_layers, shape.num_kv_heads);
  const index_t spreads_size = checked_mul(heads, layout.rank());
  const index_t matrix_size = checked_mul(spreads_size, shape.head_dim);
  const std::vector<float> floats = kvcache::detail::floats_in(
      settings.subspan(sizeof(numbers)), checked_add(checked_mul(matrix_size, two ? 2 : 1), spreads_size));
  const auto part = [&](index_t first, index_t count) {
    return std::vector<float>(floats.begin() + first, floats.begin() + first + count);
  };
  low_rank_matrices made;
  (of_keys ? made.key_layout : made.value_layout) = layout;
  (of_keys ? made.keys_in : made.values) = part(0, matrix_size);
  if (two) made.keys_out = part(matrix_size, matrix_size);
  (of_keys ? made.key_spreads : made.value_spreads) = part(matrix_size * (two ? 2 : 1), spreads_size);
  (of_keys ? made.value_layout : made.key_layout).f32 = 1;
  (of_keys ? made.values : made.keys_in).resize(static_cast<std::size_t>(checked_mul(heads, shape.head_dim)));
  (of_keys ? made.value_spreads : made.key_spreads).assign(static_cast<std::size_t>(heads), 1.0F);
  return std::make_shared<const low_rank_bases>(shape, made);
}

}  // namespace kvcache::inline v0::codec
