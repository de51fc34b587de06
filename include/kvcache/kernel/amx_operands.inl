// SPDX-License-Identifier: MIT
// What the tiles of AMX-BF16 multiply: rows as the sum of two bf16 each, pieces of a block as stored, and the memory that is
// asked for meanwhile. Included by amx.hpp.

inline constexpr index_t tile_depth = 32;            // bf16 in a row of A
inline constexpr index_t most_rows = 2 * tile_rows;  // that are multiplied at a time
inline constexpr index_t few_rows = 8;  // that AVX-512 multiplies as fast as tiles, with float operands

// ---- reading ahead --------------------------------------------------------------------------------------------------

/// The lines of two sections, asked for a few at a time: one that is wanted later, into L2, and one that is wanted before it and
/// came into L2 in this way some time ago, into L1. What is at hand is touched a little before tiles are loaded from it.
///
/// All three by one instruction each, line after line: processors read ahead by themselves where the same instruction goes on
/// by equal steps, and tile loads do not (bench/NOTES.md, "Tiles and memory").
class sections_ahead {
 public:
  sections_ahead() noexcept = default;  // asks for nothing
  /// \param at_hand    the section that is multiplied
  /// \param num_bytes  of it
  /// \param passes     over it
  sections_ahead(const upcoming& next, const std::byte* at_hand, index_t num_bytes, index_t passes) noexcept
      : step_(64 * ceil_div(tile_rows, std::max(passes, index_t{1}))) {
    if (next.next == nullptr || num_bytes < 2 * touched_ahead) return;  // little to wait for
    far_ = next.next;
    near_ = next.soon != nullptr ? next.soon : next.next;
    end_ = next.next + num_bytes;
    touched_ = at_hand + touched_ahead;
    touched_end_ = at_hand + num_bytes;
  }

  /// Called before each right operand is loaded.
  [[gnu::always_inline]] void fetch() noexcept {
    if (far_ >= end_) return;
    if (touched_ + step_ > touched_end_) touched_ = touched_end_ - step_;
    __asm__ volatile(
        "1: prefetcht1 (%0)\n\tprefetcht0 (%1)\n\tmovl (%2), %%eax\n\t"
        "add $64, %0\n\tadd $64, %1\n\tadd $64, %2\n\tcmp %3, %0\n\tjb 1b"
        : "+r"(far_), "+r"(near_), "+r"(touched_)
        : "r"(far_ + step_)
        : "eax", "cc");
  }

 private:
  static constexpr index_t touched_ahead = 2048;  // bytes

  const std::byte* far_ = nullptr;
  const std::byte* near_ = nullptr;
  const std::byte* end_ = nullptr;
  const std::byte* touched_ = nullptr;
  const std::byte* touched_end_ = nullptr;
  index_t step_ = 64 * tile_rows;
};

// ---- left operands --------------------------------------------------------------------------------------------------

/// Rows as the sum of two bf16 each: [rows, 2, width], high parts before low ones, width a multiple of 32.
struct split_rows {
  const std::uint16_t* data;
  index_t width;

  [[nodiscard]] index_t stride_bytes() const noexcept { return 4 * width; }
  [[nodiscard]] split_rows row(index_t r) const noexcept { return {data + 2 * r * width, width}; }
  /// Columns from `column` on, the high or the low parts.
  [[nodiscard]] const void* part(index_t column, bool low) const noexcept {
    return data + column + (low ? width : 0);
  }
};

/// The high halves of 32 words, of two times 16.
KVCACHE_INLINE void store_high_halves(std::uint16_t* to, __m512i first, __m512i second) {
  alignas(64) static constexpr std::array<std::int16_t, 32> odd = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                                   23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                                   45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, _mm512_load_si512(odd.data()), second));
}

/// A float whose high half is x as bf16, half-way away from zero. The low half is to be ignored.
KVCACHE_INLINE __m512i rounded(__m512 x) {
  return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
}
KVCACHE_INLINE avx512::vec high_half(__m512i words) {
  return {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000U))))};
}

/// element_kernels::prepare: queries as split_rows, zeros behind head_dim. What is not finite has no low part; what would round
/// to infinity is cut off instead.
KVCACHE_TARGET inline const float* prepare(index_t head_dim, const float* queries, index_t num_rows,
                                           float* prepared) {
  if (num_rows <= few_rows) return queries;
  const index_t width = round_up(head_dim, tile_depth);
  auto* to = reinterpret_cast<std::uint16_t*>(prepared);
  for (index_t r = 0; r < num_rows; ++r, to += 2 * width) {
    for (index_t i = 0; i < width; i += key_lanes) {
      const avx512::vec x =
          i < head_dim ? avx512::load_first(queries + r * head_dim + i, head_dim - i) : avx512::zero();
      const __mmask16 is_number = avx512::finite_lanes(x);
      const __m512 most = _mm512_set1_ps(0x1.FEp127F);  // what a bf16 holds
      __m512 in_range = _mm512_mask_min_ps(x.x, is_number, x.x, most);
      in_range = _mm512_mask_max_ps(in_range, is_number, in_range, -most);
      const auto high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(in_range));
      const __m512i widened = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
      const __m512 low = _mm512_maskz_sub_ps(is_number, x.x, _mm512_castsi512_ps(widened));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + width + i),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
    }
  }
  return prepared;
}

/// Up to 64 weights of up to 32 rows.
class weight_operand {
 public:
  KVCACHE_TARGET void take(const float* weights, index_t num_rows, index_t stride,
                           index_t num_tokens) noexcept {
    const index_t rest = num_tokens % tile_depth;  // 0 or 16
    for (index_t r = 0; r < num_rows; ++r) {
      const float* from = weights + r * stride;
      std::uint16_t* to = &parts_[static_cast<std::size_t>(2 * r * avx512::sum_tokens)];
      for (index_t t = 0; t < num_tokens - rest; t += tile_depth)
        split(_mm512_loadu_ps(from + t), _mm512_loadu_ps(from + t + key_lanes), to + t);
      if (rest != 0)
        split(_mm512_loadu_ps(from + num_tokens - rest), _mm512_setzero_ps(), to + num_tokens - rest);
    }
  }
  [[nodiscard]] split_rows rows() const noexcept { return {parts_.data(), avx512::sum_tokens}; }

 private:
  /// Weights are no infinities, and NaN makes the sum of weights NaN already.
  KVCACHE_INLINE static void split(__m512 a, __m512 b, std::uint16_t* to) noexcept {
    const __m512i high_a = rounded(a);
    const __m512i high_b = rounded(b);
    store_high_halves(to, high_a, high_b);
    store_high_halves(to + avx512::sum_tokens, rounded(_mm512_sub_ps(a, high_half(high_a).x)),
                      rounded(_mm512_sub_ps(b, high_half(high_b).x)));
  }
  // no bfloat16, which would start as zero
  alignas(64) std::array<std::uint16_t, most_rows * 2 * avx512::sum_tokens> parts_;
};

// ---- right operands and products ------------------------------------------------------------------------------------

/// 16 lines of 64 bytes, so many bytes apart.
struct right_operand {
  const void* lines;
  index_t stride_bytes;
};

/// A right operand's first lines, zeros below; for pieces where more would not be theirs.
struct padded_tile {
  alignas(64) std::array<std::byte, tile_rows * 64> lines;

  [[gnu::noinline]] right_operand fill(const bfloat16* from, index_t stride, index_t num_lines,
                                       index_t elements) noexcept {
    lines.fill({});
    for (index_t i = 0; i < num_lines; ++i)
      std::memcpy(&lines[static_cast<std::size_t>(i * 64)], from + i * stride,
                  static_cast<std::size_t>(elements) * sizeof(bfloat16));
    return {lines.data(), 64};
  }
};

/// How many right operands are multiplied at a time.
constexpr index_t most_operands(const tile_shape& shape) noexcept { return shape.second == 0 ? 4 : 2; }

template <class Tiles>
inline void begin_products() noexcept {
  for_tiles(
      4, []<int I>(index_t) __attribute__((always_inline)) { Tiles::template zero<I>(); });
}

/// C += A * B: 32 columns of all rows times n right operands, operand(i).
template <class Tiles, class Operand>
KVCACHE_INLINE void multiply_columns(const tile_shape& shape, const split_rows& rows, index_t column,
                                     index_t n, sections_ahead& ahead, Operand operand) noexcept {
  const index_t stride = rows.stride_bytes();
  if (shape.second == 0) {
    Tiles::template load<4>(rows.part(column, false), stride);
    Tiles::template load<5>(rows.part(column, true), stride);
    for_tiles(
        n, [&]<int I>(index_t i) __attribute__((always_inline)) {
          const right_operand b = operand(i);
          ahead.fetch();
          Tiles::template load<6 + I % 2>(b.lines, b.stride_bytes);
          Tiles::template multiply<I, 4, 6 + I % 2>();
          Tiles::template multiply<I, 5, 6 + I % 2>();
        });
    return;
  }
  for_tiles(
      n, [&]<int I>(index_t i) __attribute__((always_inline)) {
        const right_operand b = operand(i);
        ahead.fetch();
        Tiles::template load<6 + I % 2>(b.lines, b.stride_bytes);
      });
  for (const bool low : {false, true}) {
    Tiles::template load<4>(rows.part(column, low), stride);
    Tiles::template multiply<0, 4, 6>();
    if (n > 1) Tiles::template multiply<1, 4, 7>();
    Tiles::template load<5>(rows.row(tile_rows).part(column, low), stride);
    Tiles::template multiply<2, 5, 6>();
    if (n > 1) Tiles::template multiply<3, 5, 7>();
  }
}

/// Calls move.operator()<C>(where) for each tile C of products with n right operands, of [rows, stride] numbers at `first`.
template <class Move>
KVCACHE_INLINE void for_products(const tile_shape& shape, index_t n, float* first, index_t stride,
                                 Move move) noexcept {
  for_tiles(
      n, [&]<int I>(index_t i) __attribute__((always_inline)) {
        move.template operator()<I>(first + i * key_lanes);
        if constexpr (I < 2) {
          if (shape.second != 0) move.template operator()<I + 2>(first + tile_rows * stride + i * key_lanes);
        }
      });
}

template <class Tiles>
KVCACHE_INLINE void load_products(const tile_shape& shape, index_t n, float* from, index_t stride) noexcept {
  for_products(
      shape, n, from, stride, [stride]<int C>(float* at) __attribute__((always_inline)) {
        Tiles::template load<C>(at, stride * index_t{sizeof(float)});
      });
}
template <class Tiles>
KVCACHE_INLINE void store_products(const tile_shape& shape, index_t n, float* to, index_t stride) noexcept {
  for_products(
      shape, n, to, stride, [stride]<int C>(float* at) __attribute__((always_inline)) {
        Tiles::template store<C>(at, stride * index_t{sizeof(float)});
      });
}

/// Whether [num_rows, stride] floats are all finite, of which each row has `num_lanes`.
KVCACHE_TARGET inline bool all_finite(const float* from, index_t num_rows, index_t stride,
                                      index_t num_lanes) {
  avx512::vec probe[2] = {avx512::zero(), avx512::zero()};  // NaN once a product with zero was
  for (index_t r = 0; r < num_rows; ++r, from += stride) {
    for (index_t i = 0; i < num_lanes; i += 2 * key_lanes) {
      probe[0] = avx512::fma(avx512::load(from + i), avx512::zero(), probe[0]);
      if (i + key_lanes < num_lanes)
        probe[1] = avx512::fma(avx512::load(from + i + key_lanes), avx512::zero(), probe[1]);
    }
  }
  return avx512::all_finite(avx512::add(probe[0], probe[1]));
}
