// SPDX-License-Identifier: MIT
// The kernels for x86 with AMX (Intel since Sapphire Rapids): bf16 blocks are multiplied in tiles, blocks of bytes too
// (amx_int8.hpp), everything else is AVX-512. The level needs AMX-BF16; a processor that has it without AMX-INT8, as
// a virtual machine may show one, multiplies bytes by AVX-512 VNNI, and one that has only AMX-INT8 runs avx512.
//
//   scores   C[rows, 16 tokens] += A[rows, 32 dims]   * B[16 pairs of dims, 16 tokens]     B: a piece of the keys as stored
//   sums     C[rows, 16 dims]   += A[rows, 32 tokens] * B[16 pairs of tokens, 16 dims]     B: a piece of the values
//
// Accuracy: queries and weights enter as the sum of two bf16 (16 bits of mantissa), products are exact, sums are
// float. So operands carry a relative error of 2^-17, where the other levels have none. The tiles take subnormal numbers
// for zero: what is below 1.2e-38, in operands and sums. Results that are not finite come from the kernels of AVX-512.
// Whoever wants float operands takes select(isa::avx512).
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/amx_int8.hpp>
#include <kvcache/kernel/amx_tiles.hpp>
#include <kvcache/kernel/avx512.hpp>
#include <kvcache/kernel/table.hpp>

#if defined(__x86_64__) && defined(__linux__)

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#define KVCACHE_TARGET [[gnu::target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]]
#define KVCACHE_INLINE KVCACHE_TARGET [[gnu::always_inline]] inline

namespace kvcache::inline v0::kernel::amx {

inline constexpr index_t tile_depth = 32;   // bf16 in a row of A
inline constexpr index_t rows_at_once = 8;  // each takes two rows of a tile

/// Left operand: up to eight rows of floats, each as the sum of two bf16, the low parts in the lower half of the tile.
template <index_t MaxColumns>
class operand {
 public:
  /// \param rows  [num_rows, stride]; columns [0, count) are taken, zeros follow up to a multiple of 32
  KVCACHE_TARGET operand(const float* rows, index_t num_rows, index_t stride, index_t count) noexcept {
    for (index_t piece = 0; piece * tile_depth < count; ++piece) {
      std::fill_n(&parts_[at(piece, 0)], tile_rows * tile_depth, bfloat16{});
      for (index_t r = 0; r < num_rows; ++r) {
        for (index_t i = piece * tile_depth; i < std::min(count, (piece + 1) * tile_depth); i += key_lanes)
          split(rows + r * stride + i, count - i, at(piece, r) + static_cast<std::size_t>(i % tile_depth));
      }
    }
  }

  /// The tile of columns [32 * piece, 32 * piece + 32).
  [[nodiscard]] const void* tile(index_t piece) const noexcept { return &parts_[at(piece, 0)]; }

 private:
  static constexpr std::size_t at(index_t piece, index_t row) noexcept {
    return static_cast<std::size_t>((piece * tile_rows + row) * tile_depth);
  }

  KVCACHE_INLINE void split(const float* from, index_t count, std::size_t to) noexcept {
    const avx512::vec x = avx512::load_first(from, count);
    const avx512::bits high = avx512::narrow<bfloat16>(x);
    const avx512::bits low = avx512::narrow<bfloat16>(avx512::sub(x, avx512::widen_low(high)));
    avx512::store_low_halves(&parts_[to], high);
    avx512::store_low_halves(&parts_[to + at(0, rows_at_once)], low);
  }

  alignas(64) std::array<bfloat16, ceil_div(MaxColumns, tile_depth) * tile_rows * tile_depth> parts_;
};

/// `num_lines` lines of a right operand, zeros below; for pieces where more would not be theirs.
using padded_tile = std::array<bfloat16, tile_rows * tile_depth>;

inline const void* pad(const bfloat16* from, index_t stride, index_t num_lines, index_t elements,
                       padded_tile& to) noexcept {
  to.fill({});
  for (index_t i = 0; i < num_lines; ++i)
    std::copy_n(from + i * stride, elements, &to[static_cast<std::size_t>(i * tile_depth)]);
  return to.data();
}

/// C += A * B. A in tile 4, B in 5, C in tiles 0 to 3.
template <class Tiles, int C>
inline void multiply_by(const void* b, index_t b_stride) noexcept {
  Tiles::template load<5>(b, b_stride);
  Tiles::template multiply<C, 4, 5>();
}

/// What tiles 0 to 3 hold in the end.
struct product {
  alignas(64) std::array<float, 4 * tile_rows * tile_rows> c;

  [[nodiscard]] const float* tile(index_t i) const noexcept {
    return &c[static_cast<std::size_t>(i * tile_rows * tile_rows)];
  }
  /// Row `row` of tile i: what its high and its low part gave.
  [[nodiscard]] KVCACHE_INLINE avx512::vec row_of(index_t i, index_t row) const noexcept {
    return avx512::add(avx512::load(tile(i) + row * tile_rows),
                       avx512::load(tile(i) + (row + rows_at_once) * tile_rows));
  }
  template <class Tiles>
  static void begin() noexcept {
    for_tiles(4, []<int I>(index_t) { Tiles::template zero<I>(); });
  }
  template <class Tiles>
  void end() noexcept {
    for_tiles(4, [this]<int I>(index_t i) {
      Tiles::template store<I>(&c[static_cast<std::size_t>(i * tile_rows * tile_rows)], 4 * tile_rows);
    });
  }
};

/// Scores of 16 keys and one query again, where they are not finite: half of a split operand times infinity is NaN.
[[gnu::cold, gnu::noinline]] inline void correct_scores(const block_geometry& g, const bfloat16* keys,
                                                        const float* query, float* scores) {
  alignas(64) std::array<float, key_lanes> exact;
  avx512::scores<bfloat16>(g, reinterpret_cast<const std::byte*>(keys), key_lanes, query, 1, exact.data(),
                           nullptr);
  for (std::size_t i = 0; i < exact.size(); ++i) {
    if (scores[i] - scores[i] != 0.0F) scores[i] = exact[i];
  }
}

template <class Tiles>
KVCACHE_TARGET inline void scores(const block_geometry& g, const std::byte* keys, index_t count,
                                  const float* queries, index_t num_rows, float* out, const upcoming& next) {
  using order = block_order<bfloat16>;
  const auto* groups = reinterpret_cast<const bfloat16*>(keys);
  const index_t group_size = order::key_group_size(g);
  const index_t num_groups = ceil_div(count, key_lanes);
  avx512::read_ahead ahead =
      avx512::ahead_of(next, keys, std::max(ceil_div(num_rows, rows_at_once), index_t{1}));
  ahead.go_on(next, 0, nullptr);
  product c;
  alignas(64) padded_tile padded;
  Tiles::configure();
  for (index_t row = 0; row < num_rows; row += rows_at_once) {
    const index_t rows = std::min(num_rows - row, rows_at_once);
    const operand<max_head_dim> q(queries + row * g.head_dim, rows, g.head_dim, g.head_dim);
    for (index_t first = 0; first < num_groups; first += 4) {
      const index_t n = std::min(index_t{4}, num_groups - first);
      product::begin<Tiles>();
      for (index_t p = 0; p < order::key_packs(g); p += tile_rows) {
        const index_t num_lines = std::min(tile_rows, order::key_packs(g) - p);
        Tiles::template load<4>(q.tile(p / tile_rows), 2 * tile_depth);
        for_tiles(n, [&]<int I>(index_t i) {
          const bfloat16* at = groups + (first + i) * group_size + p * tile_depth;
          const void* b = num_lines == tile_rows ? at : pad(at, tile_depth, num_lines, tile_depth, padded);
          multiply_by<Tiles, I>(b, 2 * tile_depth);
          avx512::fetch<16>(ahead);
        });
      }
      c.end<Tiles>();
      for (index_t r = 0; r < rows; ++r) {
        for (index_t i = 0; i < n; ++i) {
          float* to = out + (row + r) * g.block_size + (first + i) * key_lanes;
          const avx512::vec x = c.row_of(i, r);
          avx512::store(to, x);
          if (!avx512::all_finite(x))
            correct_scores(g, groups + (first + i) * group_size, queries + (row + r) * g.head_dim, to);
        }
      }
    }
  }
  Tiles::release();
}

/// Up to 64 dims of up to 64 tokens of a values section.
struct value_piece {
  const bfloat16* values;  // pairs of tokens, `line` elements apart
  index_t line;
  index_t num_dims;
  index_t num_tokens;   // that have a weight
  index_t room_tokens;  // that may be read
};
using weight_operand = operand<avx512::sum_tokens>;

/// C = weights * values.
template <class Tiles>
inline void multiply_values(const weight_operand& w, const value_piece& v, product& c,
                            avx512::read_ahead& ahead) {
  alignas(64) padded_tile padded;
  product::begin<Tiles>();
  for (index_t t = 0; t < v.num_tokens; t += tile_depth) {
    Tiles::template load<4>(w.tile(t / tile_depth), 2 * tile_depth);
    const index_t num_lines = std::min(tile_rows, (v.room_tokens - t) / 2);
    for_tiles(ceil_div(v.num_dims, key_lanes), [&]<int I>(index_t i) {
      const bfloat16* at = v.values + t / 2 * v.line + 2 * i * key_lanes;
      const index_t num_dims = std::min(key_lanes, v.num_dims - i * key_lanes);
      if (num_dims == key_lanes && num_lines == tile_rows) {
        multiply_by<Tiles, I>(at, 2 * v.line);
      } else {
        multiply_by<Tiles, I>(pad(at, v.line, num_lines, 2 * num_dims, padded), 2 * tile_depth);
      }
      avx512::fetch<16>(ahead);
    });
  }
  c.end<Tiles>();
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

  const weight_operand w(weights, 1, 0, v.num_tokens);
  v = {visible.data(), 128, v.num_dims, v.num_tokens, avx512::sum_tokens};
  avx512::read_ahead nothing = avx512::ahead_of(nullptr, bytes, 1);
  product c;
  multiply_values<Tiles>(w, v, c, nothing);
  for (index_t d = 0; d < v.num_dims; ++d) {
    const float* high = c.tile(d / key_lanes) + d % key_lanes;
    const float total = high[0] + high[rows_at_once * tile_rows];
    sums[d] += total - total == 0.0F ? total : exact[static_cast<std::size_t>(d)];
  }
}

/// sums[d] += row `row` of C. \return whether that is finite; if not, nothing was added
KVCACHE_TARGET inline bool add_row(const product& c, index_t row, index_t num_dims, float* sums) {
  alignas(64) std::array<float, 64> total;
  avx512::vec probe = avx512::zero();
  for (index_t i = 0; i * key_lanes < num_dims; ++i) {
    const avx512::vec x = c.row_of(i, row);
    probe = avx512::add(probe, x);
    avx512::store(&total[static_cast<std::size_t>(i * key_lanes)], x);
  }
  if (!avx512::all_finite(probe)) return false;
  index_t d = 0;
  for (; d + key_lanes <= num_dims; d += key_lanes)
    avx512::store(sums + d,
                  avx512::add(avx512::load(sums + d), avx512::load(&total[static_cast<std::size_t>(d)])));
  for (; d < num_dims; ++d) sums[d] += total[static_cast<std::size_t>(d)];
  return true;
}

template <class Tiles>
KVCACHE_TARGET inline void accumulate(const block_geometry& g, const std::byte* values, index_t count,
                                      const float* weights, index_t num_rows, float* sums,
                                      const upcoming& next) {
  avx512::read_ahead ahead =
      avx512::ahead_of(next, values, std::max(ceil_div(num_rows, rows_at_once), index_t{1}));
  ahead.go_on(next, 0, nullptr);
  product c;
  Tiles::configure();
  for (index_t t = 0; t < count; t += avx512::sum_tokens) {
    const index_t num_tokens = std::min(avx512::sum_tokens, round_up(count - t, key_lanes));
    for (index_t row = 0; row < num_rows; row += rows_at_once) {
      const float* first_weight = weights + row * g.block_size + t;
      const index_t rows = std::min(num_rows - row, rows_at_once);
      const weight_operand w(first_weight, rows, g.block_size, num_tokens);
      for (index_t d = 0; d < g.head_dim; d += 64) {
        const value_piece v{reinterpret_cast<const bfloat16*>(values) + t * g.head_dim + 2 * d,
                            2 * g.head_dim, std::min(index_t{64}, g.head_dim - d), num_tokens,
                            g.block_size - t};
        multiply_values<Tiles>(w, v, c, ahead);
        for (index_t r = 0; r < rows; ++r) {
          float* to = sums + (row + r) * g.head_dim + d;
          if (!add_row(c, r, v.num_dims, to)) add_visible<Tiles>(first_weight + r * g.block_size, v, to);
        }
      }
    }
  }
  Tiles::release();
}

template <class Tiles>
inline constexpr table kernels_on = {
    isa::amx,
    avx512::kernels_for<float>,
    avx512::kernels_for<half>,
    {avx512::encode_keys<bfloat16>, avx512::encode_values<bfloat16>, avx512::decode_keys<bfloat16>,
     avx512::decode_values<bfloat16>, scores<Tiles>, accumulate<Tiles>},
    kernels_for_bytes<Tiles, 2>,
    kernels_for_bytes<Tiles, 1>,
    kernels_for_packed<Tiles>,
    avx512::kernels_for_channels,
    avx512::kernels_for_trellis,
    avx512::softmax,
    avx512::soft_cap,
};

inline constexpr const table& kernels = kernels_on<hardware_tiles>;

/// Whether the processor has the tiles and AVX-512, and this process got leave to use them.
inline bool runs_here() noexcept {
  static const bool answer = avx512::runs_here() && processor_tiles().bf16 && may_use_tiles();
  return answer;
}

}  // namespace kvcache::inline v0::kernel::amx

#undef KVCACHE_TARGET
#undef KVCACHE_INLINE

#endif
