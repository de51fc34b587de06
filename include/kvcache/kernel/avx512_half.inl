// SPDX-License-Identifier: MIT
// How halves are multiplied with AVX-512; included by avx512.hpp.

/// As single_line in vector_lines.inl, but the numbers stay as they lie, the two of each pack side by side: they are multiplied by
/// two factors in turn, and sums of either are added at the end. A conversion that loads its halves takes one unit; one
/// that has to gather them from a register takes another, and so does gathering.
struct half_line {
  static constexpr int pack = 2;
  static constexpr int num_factors = 1;
  static constexpr int num_sums = 2;

  KVCACHE_INLINE static widened<2> load(const half* p) {
    const auto* halves = reinterpret_cast<const __m256i*>(p);
    return {{vec{_mm512_maskz_cvtph_ps(all, _mm256_loadu_si256(halves))},
             vec{_mm512_maskz_cvtph_ps(all, _mm256_loadu_si256(halves + 1))}}};
  }
  KVCACHE_INLINE static vec factor(const float* p, int /*j*/) {
    double both;
    std::memcpy(&both, p, sizeof both);
    return {_mm512_castpd_ps(_mm512_set1_pd(both))};
  }
  KVCACHE_INLINE static void add_products(vec (&sums)[2], vec factors, const widened<2>& line, int /*j*/) {
    sums[0] = fma(factors, line.part[0], sums[0]);
    sums[1] = fma(factors, line.part[1], sums[1]);
  }
  KVCACHE_INLINE static vec total(const vec (&sums)[2]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_add_ps(_mm512_permutex2var_ps(sums[0].x, even, sums[1].x),
                          _mm512_permutex2var_ps(sums[0].x, odd, sums[1].x))};
  }
};
