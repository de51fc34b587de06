// SPDX-License-Identifier: MIT
// The kernels for x86 with AMX (Intel since Sapphire Rapids): bf16 blocks are multiplied in tiles, blocks of bytes too
// (amx_int8.inl), everything else is AVX-512. The level needs AMX-BF16 and AVX-512 with BF16 and VBMI, which come together; a
// processor that has them without AMX-INT8, as a virtual machine may show one, multiplies bytes by AVX-512 VNNI, and one that has
// only AMX-INT8 runs avx512.
//
//   query rows    bf16 blocks are multiplied by
//   up to 8       AVX-512, float operands: a decode step, which waits for memory
//   up to 16      tiles, queries and weights as the sum of two bf16 each (amx_bf16.inl)
//   more          tiles, both as one bf16 (amx_many_rows.inl), of 64 tokens and a multiple of 32 dims that all rows see; else as above
//
// Accuracy: two bf16 have 16 bits of mantissa, a relative error of 2^-17, one has 2^-8, weights as one of them 0.0061; products are exact, sums are float. The
// tiles take subnormal numbers for zero: what is below 1.2e-38, in operands and sums. Results that are not finite come from
// the kernels of AVX-512. Whoever wants float operands, and the same numbers for few rows and many, takes select(isa::avx512).
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/amx_tiles.hpp>
#include <kvcache/kernel/avx512.hpp>
#include <kvcache/kernel/portable.hpp>
#include <kvcache/kernel/table.hpp>

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#define KVCACHE_TARGET \
  [[gnu::target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi")]]
#define KVCACHE_INLINE KVCACHE_TARGET [[gnu::always_inline]] inline

namespace kvcache::inline v0::kernel::amx {

#include <kvcache/kernel/amx_operands.inl>

// after what they build on
#include <kvcache/kernel/amx_bf16.inl>
#include <kvcache/kernel/amx_int8.inl>
#include <kvcache/kernel/amx_many_rows.inl>

template <class Tiles>
inline constexpr table kernels_on = {
    isa::amx,
    avx512::kernels_for<float>,
    avx512::kernels_for<half>,
    {avx512::encode_keys<bfloat16>, avx512::encode_values<bfloat16>, avx512::decode_keys<bfloat16>,
     avx512::decode_values<bfloat16>, scores<Tiles>, accumulate<Tiles>, prepare, attend_many<Tiles>,
     attends_many},
    kernels_for_bytes<Tiles, 2>,
    kernels_for_bytes<Tiles, 1>,
    kernels_for_packed<Tiles>,
    avx512::kernels_for_channels,
    avx512::kernels_for_trellis,
    avx512::softmax,
    avx512::soft_cap,
    tiles_in_use<Tiles>::enter,
    tiles_in_use<Tiles>::leave,
};

inline constexpr const table& kernels = kernels_on<hardware_tiles>;

/// Whether the processor has the vectors that this level takes beside tiles.
inline bool has_vectors() noexcept {
  return avx512::runs_here() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

/// Whether the processor has the tiles and AVX-512, and this process got leave to use them.
inline bool runs_here() noexcept {
  static const bool answer = has_vectors() && processor_tiles().bf16 && may_use_tiles();
  return answer;
}

}  // namespace kvcache::inline v0::kernel::amx

#undef KVCACHE_TARGET
#undef KVCACHE_INLINE

#endif
