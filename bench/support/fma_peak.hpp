// SPDX-License-Identifier: MIT
// The other roof, for prefill: fp32 fused multiply-adds per second with everything in registers.
#pragma once

#include <kvcache/core/executor.hpp>
#include <kvcache/core/types.hpp>

#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvcache::bench {

// Ten independent chains: two pipes times a latency of four or five cycles.
#if defined(__x86_64__)
#define KVCACHE_BENCH_FMA_LOOP(vec, set1, fmadd)                                    \
  vec a = set1(1), b = set1(2), c = set1(3), d = set1(4), e = set1(5);              \
  vec f = set1(6), g = set1(7), h = set1(8), i = set1(9), j = set1(10);             \
  const vec x = set1(0.999F), y = set1(0.001F);                                     \
  for (index_t n = 0; n < rounds; ++n) {                                            \
    a = fmadd(a, x, y), b = fmadd(b, x, y), c = fmadd(c, x, y), d = fmadd(d, x, y); \
    e = fmadd(e, x, y), f = fmadd(f, x, y), g = fmadd(g, x, y), h = fmadd(h, x, y); \
    i = fmadd(i, x, y), j = fmadd(j, x, y);                                         \
  }                                                                                 \
  const vec all = fmadd(a, b, fmadd(c, d, fmadd(e, f, fmadd(g, h, fmadd(i, j, x)))))

__attribute__((target("avx512f"))) inline float fma_loop_16(index_t rounds) {
  KVCACHE_BENCH_FMA_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps);
  return _mm512_cvtss_f32(all);
}
__attribute__((target("avx2,fma"))) inline float fma_loop_8(index_t rounds) {
  KVCACHE_BENCH_FMA_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps);
  return _mm256_cvtss_f32(all);
}
#undef KVCACHE_BENCH_FMA_LOOP
#endif

/// Without fused instructions known here: 40 lanes for the compiler to vectorise, four at a time.
inline float fma_loop_4(index_t rounds) {
  std::array<float, 40> chain;
  chain.fill(1.0F);
  for (index_t n = 0; n < rounds; ++n) {
    for (float& x : chain) {
#if defined(__FP_FAST_FMAF)
      x = std::fma(x, 0.999F, 0.001F);
#else
      x = x * 0.999F + 0.001F;
#endif
    }
  }
  float sum = 0;
  for (const float x : chain) sum += x;
  return sum;
}

struct fma_kernel {
  float (*run)(index_t rounds);
  index_t flops_per_round;
};

inline fma_kernel widest_fma() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {fma_loop_16, 10 * 16 * 2};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {fma_loop_8, 10 * 8 * 2};
#endif
  return {fma_loop_4, 40 * 2};
}

/// Keeps every worker busy for a millisecond or two. \return the floating-point operations done
template <executor Executor>
double burn_fma(Executor& workers) {
  static const fma_kernel kernel = widest_fma();
  static std::atomic<float> sink{0};
  constexpr index_t rounds = 50'000;
  const index_t num_tasks = 8 * workers.num_workers();
  workers.run(num_tasks,
              [&](index_t, index_t) { sink.store(kernel.run(rounds), std::memory_order_relaxed); });
  return static_cast<double>(num_tasks * rounds * kernel.flops_per_round);
}

}  // namespace kvcache::bench
