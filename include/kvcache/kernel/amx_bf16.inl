// SPDX-License-Identifier: MIT
// Scores and weighted sums of bf16 blocks in tiles. A tile of a block as stored is a right operand:
//
//   scores   C[rows, 16 tokens] += A[rows, 32 dims]   * B[16 pairs of dims, 16 tokens]
//   sums     C[rows, 16 dims]   += A[rows, 32 tokens] * B[16 pairs of tokens, 16 dims]
//
// A number of C is its row's alone: for each 32 columns the high parts' products are added to it, then the low parts'. So it is
// the same however many rows are multiplied at a time, as far as tiles multiply them: from nine on. Included by amx.hpp.

// ---- scores ---------------------------------------------------------------------------------------------------------

/// Scores again where they are not finite: half of a split operand times infinity is NaN.
[[gnu::cold, gnu::noinline]] KVCACHE_TARGET inline void correct_scores(const block_geometry& g,
                                                                       const std::byte* keys, index_t count,
                                                                       split_rows rows, index_t num_rows,
                                                                       float* scores) {
  alignas(64) std::array<float, max_head_dim> query;
  alignas(64) std::array<float, max_block_size> exact;
  for (index_t r = 0; r < num_rows; ++r, rows = rows.row(1), scores += g.block_size) {
    for (index_t d = 0; d < rows.width; d += key_lanes)
      avx512::store(&query[static_cast<std::size_t>(d)],
                    avx512::add(avx512::widen_low(avx512::load_low_halves(rows.data + d)),
                                avx512::widen_low(avx512::load_low_halves(rows.data + rows.width + d))));
    avx512::scores<bfloat16>(g, keys, count, query.data(), 1, exact.data(), nullptr);
    for (index_t t = 0; t < round_up(count, key_lanes); ++t) {
      if (scores[t] - scores[t] != 0.0F) scores[t] = exact[static_cast<std::size_t>(t)];
    }
  }
}

template <class Tiles>
KVCACHE_TARGET inline void scores(const block_geometry& g, const std::byte* keys, index_t count,
                                  const float* prepared, index_t num_rows, float* out, const upcoming& next) {
  if (num_rows <= few_rows) return avx512::scores<bfloat16>(g, keys, count, prepared, num_rows, out, next);
  using order = block_order<bfloat16>;
  const auto* groups = reinterpret_cast<const bfloat16*>(keys);
  const index_t group_size = order::key_group_size(g);
  const index_t packs = order::key_packs(g);
  const index_t num_groups = ceil_div(count, key_lanes);
  sections_ahead ahead(next, keys, num_groups * group_size * index_t{sizeof(bfloat16)},
                       ceil_div(num_rows, most_rows));
  split_rows rows{reinterpret_cast<const std::uint16_t*>(prepared), round_up(g.head_dim, tile_depth)};
  padded_tile padded;
  for (; num_rows > 0; num_rows -= most_rows, rows = rows.row(most_rows), out += most_rows * g.block_size) {
    const tile_shape shape = tile_shape::of(std::min(num_rows, most_rows));
    const tiles_in_use<Tiles> in_use(shape);
    for (index_t first = 0; first < num_groups; first += most_operands(shape)) {
      const index_t n = std::min(most_operands(shape), num_groups - first);
      begin_products<Tiles>();
      for (index_t p = 0; p < packs; p += tile_rows) {
        const index_t num_lines = std::min(tile_rows, packs - p);
        multiply_columns<Tiles>(shape, rows, 2 * p, n, ahead, [&](index_t i) -> right_operand {
          const bfloat16* at = groups + (first + i) * group_size + p * tile_depth;
          if (num_lines == tile_rows) return {at, 2 * tile_depth};
          return padded.fill(at, tile_depth, num_lines, tile_depth);
        });
      }
      store_products<Tiles>(shape, n, out + first * key_lanes, g.block_size);
    }
    const index_t done = std::min(num_rows, most_rows);
    if (!all_finite(out, done, g.block_size, num_groups * key_lanes))
      correct_scores(g, keys, count, rows, done, out);
  }
}

// ---- weighted sums --------------------------------------------------------------------------------------------------

/// Up to 64 dims of up to 64 tokens of a values section.
struct value_piece {
  const bfloat16* values;  // pairs of tokens, `line` elements apart
  index_t line;
  index_t num_dims;
  index_t num_tokens;   // that have a weight
  index_t room_tokens;  // that may be read
};

/// to[r, d] = sum_t weights[r, t] * v[t, d]
template <class Tiles>
KVCACHE_INLINE void multiply_values(const tile_shape& shape, const split_rows& weights, const value_piece& v,
                                    float* to, index_t stride, sections_ahead& ahead) noexcept {
  padded_tile padded;
  const index_t n = ceil_div(v.num_dims, key_lanes);
  begin_products<Tiles>();
  for (index_t t = 0; t < v.num_tokens; t += tile_depth) {
    const index_t num_lines = std::min(tile_rows, (v.room_tokens - t) / 2);
    multiply_columns<Tiles>(shape, weights, t, n, ahead, [&](index_t i) -> right_operand {
      const bfloat16* at = v.values + t / 2 * v.line + 2 * i * key_lanes;
      const index_t num_dims = std::min(key_lanes, v.num_dims - i * key_lanes);
      if (num_dims == key_lanes && num_lines == tile_rows) return {at, 2 * v.line};
      return padded.fill(at, v.line, num_lines, 2 * num_dims);
    });
  }
  store_products<Tiles>(shape, n, to, stride);
}

/// sums[d] += sum_t weights[t] * v[t, d] for one row, with zeros where its weight is zero: for when what lies there is not
/// finite. What is not finite all the same comes from AVX-512.
template <class Tiles>
[[gnu::cold, gnu::noinline]] KVCACHE_TARGET inline void add_visible(const float* weights, value_piece v,
                                                                    float* sums) {
  alignas(64) std::array<bfloat16, avx512::sum_tokens * 64> visible{};
  for (index_t t = 0; t < v.num_tokens; ++t) {
    for (index_t d = 0; weights[t] != 0.0F && d < v.num_dims; ++d)
      visible[static_cast<std::size_t>(t / 2 * 128 + 2 * d + t % 2)] =
          v.values[t / 2 * v.line + 2 * d + t % 2];
  }
  const auto* bytes = reinterpret_cast<const std::byte*>(visible.data());
  alignas(64) std::array<float, 64> exact{};
  const block_geometry g{avx512::sum_tokens, 64};
  avx512::accumulate<bfloat16>(g, bytes, v.num_tokens, weights, 1, exact.data(), nullptr);

  sections_ahead nothing;
  weight_operand w;
  w.take(weights, 1, 0, v.num_tokens);
  v = {visible.data(), 128, v.num_dims, v.num_tokens, avx512::sum_tokens};
  alignas(64) std::array<float, 2 * tile_rows * 64> total;  // compilers do not see that one row is stored
  const tile_shape shape = tile_shape::of(1);
  const tiles_in_use<Tiles> in_use(shape);
  for (index_t d = 0; d < v.num_dims; d += 64)
    multiply_values<Tiles>(shape, w.rows(), v, total.data(), 64, nothing);
  for (index_t d = 0; d < v.num_dims; ++d) {
    const auto i = static_cast<std::size_t>(d);
    sums[d] += total[i] - total[i] == 0.0F ? total[i] : exact[i];
  }
}

/// sums[r, d] += from[r, d]
KVCACHE_TARGET inline void add_rows(const float* from, index_t from_stride, index_t num_rows,
                                    index_t num_dims, float* sums, index_t stride) {
  for (index_t r = 0; r < num_rows; ++r, from += from_stride, sums += stride) {
    index_t d = 0;
    for (; d + key_lanes <= num_dims; d += key_lanes)
      avx512::store(sums + d, avx512::add(avx512::load(sums + d), avx512::load(from + d)));
    for (; d < num_dims; ++d) sums[d] += from[d];
  }
}

template <class Tiles>
KVCACHE_TARGET inline void accumulate(const block_geometry& g, const std::byte* values, index_t count,
                                      const float* weights, index_t num_rows, float* sums,
                                      const upcoming& next) {
  if (num_rows <= few_rows)
    return avx512::accumulate<bfloat16>(g, values, count, weights, num_rows, sums, next);
  sections_ahead ahead(next, values, round_up(count, 2) * g.head_dim * index_t{sizeof(bfloat16)},
                       ceil_div(num_rows, most_rows));
  weight_operand w;
  alignas(64) std::array<float, most_rows * 64> products;
  for (index_t t = 0; t < count; t += avx512::sum_tokens) {
    const index_t num_tokens = std::min(avx512::sum_tokens, round_up(count - t, key_lanes));
    for (index_t row = 0; row < num_rows; row += most_rows) {
      const index_t rows = std::min(num_rows - row, most_rows);
      const tile_shape shape = tile_shape::of(rows);
      const tiles_in_use<Tiles> in_use(shape);
      const float* first_weight = weights + row * g.block_size + t;
      w.take(first_weight, rows, g.block_size, num_tokens);
      const index_t step = most_operands(shape) * key_lanes;
      for (index_t d = 0; d < g.head_dim; d += step) {
        const value_piece v{reinterpret_cast<const bfloat16*>(values) + t * g.head_dim + 2 * d,
                            2 * g.head_dim, std::min(step, g.head_dim - d), num_tokens, g.block_size - t};
        multiply_values<Tiles>(shape, w.rows(), v, products.data(), step, ahead);
        float* to = sums + row * g.head_dim + d;
        if (all_finite(products.data(), rows, step, round_up(v.num_dims, key_lanes))) [[likely]] {
          add_rows(products.data(), step, rows, v.num_dims, to, g.head_dim);
        } else {
          for (index_t r = 0; r < rows; ++r) {
            if (all_finite(products.data() + r * step, 1, step, round_up(v.num_dims, key_lanes)))
              add_rows(products.data() + r * step, step, 1, v.num_dims, to + r * g.head_dim, g.head_dim);
            else
              add_visible<Tiles>(first_weight + r * g.block_size, v, to + r * g.head_dim);
          }
          in_use.configure();
        }
      }
    }
  }
}
