// SPDX-License-Identifier: MIT
// A line of elements, and the factors it is multiplied by; included by vector_kernels.inl.

/// How a line is multiplied: each element of a pack, of all 16 keys or dims, by one factor. A kernel multiplies `num_factors`
/// times by factor(), and keeps `num_sums` vectors that make up total().
template <class Element>
struct single_line {
  static constexpr int pack = static_cast<int>(block_order<Element>::pack);
  static constexpr int num_factors = pack;
  static constexpr int num_sums = 1;

  KVCACHE_INLINE static widened<pack> load(const Element* p) { return widen(p); }
  /// \param p  [pack] factors, of which this is number j
  KVCACHE_INLINE static vec factor(const float* p, int j) { return broadcast(p[j]); }
  KVCACHE_INLINE static void add_products(vec (&sums)[1], vec factor, const widened<pack>& line, int j) {
    sums[0] = fma(factor, line.part[j], sums[0]);
  }
  KVCACHE_INLINE static vec total(const vec (&sums)[1]) { return sums[0]; }
};

template <class Element>
using line_of = std::conditional_t<std::is_same_v<Element, half>, half_line, single_line<Element>>;

/// One column of `Rows` rows, and those behind it. x86 adds multiples of a register to a pointer by itself; g++ would keep a
/// pointer for each row instead, and those for which there is no register in vectors, whose way back takes a multiplier's turn.
template <int Rows>
class row_column {
 public:
  KVCACHE_INLINE row_column(const float* first, index_t row_stride)
      : at_(reinterpret_cast<const char*>(first)) {
    for (int i = 0; i < num_odd; ++i) odd_[i] = (2 * i + 1) * row_stride * index_t{sizeof(float)};
  }
  KVCACHE_INLINE void go_on(index_t columns) {
    at_ += columns * index_t{sizeof(float)};
#if defined(__x86_64__)
    asm("" : "+r"(at_));  // so that nothing is known of their sums
#pragma GCC unroll 4
    for (index_t& bytes : odd_) asm("" : "+r"(bytes));
#endif
  }
  [[nodiscard]] KVCACHE_INLINE const float* row(int r) const {
    const int twos = r % 2 != 0 ? 1 : r % 4 != 0 ? 2 : 4;
    return reinterpret_cast<const float*>(at_ + (r == 0 ? 0 : odd_[r / twos / 2] * twos));
  }

 private:
  static_assert(Rows <= 8);
  static constexpr int num_odd = std::max(Rows / 2, 1);
  const char* at_;
  index_t odd_[num_odd];  // bytes to rows 1, 3, 5, 7
};
