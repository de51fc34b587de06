// SPDX-License-Identifier: MIT
// Attention over codecs of bytes and less on AMX, emulated: what AVX-512 gives, bit by bit.

#include "attention/problem.hpp"

#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/trellis.hpp>

using namespace attention_test;

namespace {

using kvcache::kernel::isa;

template <class Codec>
void require_as_avx512(problem p, index_t block_size) {
  CAPTURE(Codec::name, block_size, p.n.q_len, p.n.kv_len, p.n.num_q_heads, p.n.num_kv_heads, p.n.head_dim);
  const auto cache = filled<kvcache::chunked_cache<Codec>>(p, block_size);
  const kvcache::kernel::table& avx512 = kvcache::kernel::select(isa::avx512);
  kvcache::kernel::table in_tiles = kernels_under_test();
  in_tiles.bf16 = avx512.bf16;  // tails that are exact: another accuracy in tiles
  p.options.kernel = &in_tiles;
  const answer got = computed(p, cache[0]);
  p.options.kernel = &avx512;
  require_same_bits(got, computed(p, cache[0]));
}

template <class Codec>
void require_as_avx512() {
  test::random random;
  for (const problem_size& n : {problem_size{1, 200, 8, 2, 128},
                                {1, 63, 4, 4, 64},
                                {1, 65, 8, 1, 80},
                                {1, 130, 16, 1, 128},
                                {1, 4500, 6, 1, 32},
                                {5, 130, 3, 1, 20},
                                {70, 100, 4, 2, 72},
                                {17, 17, 1, 1, 3},
                                {1, 40, 9, 1, 256}}) {
    for (const index_t block_size : {16, 64, 256})
      require_as_avx512<Codec>(make_problem(random, n), block_size);
  }
}

}  // namespace

TEST_CASE("bytes in tiles: int8", "[attention]") { require_as_avx512<codec::int8>(); }

TEST_CASE("bytes in tiles: codes below 8 bits", "[attention]") {
  require_as_avx512<codec::rotated<4>>();
  require_as_avx512<codec::rotated<3>>();
  require_as_avx512<codec::balanced<2>>();
  require_as_avx512<codec::mixed<codec::channel<4>, codec::rotated<2>>>();
  require_as_avx512<codec::trellis<2>>();
}
