// SPDX-License-Identifier: MIT
// Encoding of the codec trellis<b>, b = 2, 3 or 4, written once over the primitives that vector_kernels.inl lists, and included by it.
// The steps and the bounds are those of portable_trellis.hpp; here the costs of 256 states are 16 vectors.
//
// Costs are multiples of 2^b, so their low bits are free to say which state they came from: the high bits of each state,
// put there when it is reached, survive the minimum of the next step, and decide it between equals.
//
//   best[p] = min over j of cost[j << (8 - b) | p]               p: vectors that lie 16 >> b apart
//   cost[p << b | c] = best[p] without low bits | p >> (8 - 2b), + 2^b (x^2 - 2 t x)
//
// The last term is one sum of two products of 16-bit numbers: 2^b x * -2 t + x^2 * 64, t in fixed point.

template <int Bits>
struct trellis_constants {
  static constexpr int num_vectors = 16 >> Bits;                  // of best costs
  alignas(64) std::array<std::int32_t, trellis_states> products;  // low half 2^b x, high half x^2
  alignas(64) std::array<std::int32_t, 64> high_bits;  // of the states that follow suffix p: p >> (8 - 2b)

  explicit trellis_constants(const std::int8_t* table) noexcept {
    for (std::size_t s = 0; s < products.size(); ++s) {
      const std::int8_t x = table[s];
      products[s] = (x * x << 16) | ((x * (1 << Bits)) & 0xffff);
    }
    for (std::size_t p = 0; p < high_bits.size(); ++p)
      high_bits[p] = static_cast<std::int32_t>(p >> (8 - 2 * Bits));
  }
};

/// best[p] for one vector of suffixes, and where it came from.
template <int Bits>
KVCACHE_INLINE bits best_costs(const bits* cost) {
  constexpr int stride = 16 >> Bits;
  bits best[1 << (Bits - 1)];
#pragma GCC unroll 8
  for (int j = 0; j < (1 << (Bits - 1)); ++j)
    best[j] = smaller_words(cost[2 * j * stride], cost[(2 * j + 1) * stride]);
#pragma GCC unroll 4
  for (int width = 1 << (Bits - 2); width > 0; width /= 2) {
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) best[j] = smaller_words(best[j], best[j + width]);
  }
  return best[0];
}

template <int Bits>
KVCACHE_TARGET inline void walk_states(const portable::trellis_row& row, index_t count,
                                       const std::int8_t* table, portable::trellis_path& path) {
  constexpr int num_best = 16 >> Bits;
  const trellis_constants<Bits> constants(table);
  const bits without_low_bits = broadcast_word(-(1 << Bits));
  alignas(64) std::array<std::int32_t, num_best * 16> best;
  bits cost[16];
  path.start();
#pragma GCC unroll 16
  for (int v = 0; v < 16; ++v) cost[v] = load_bits(path.cost.data() + 16 * v);
  std::uint8_t* from = path.from.data();
  for (index_t d = 0; d < count; ++d, from += num_best * 16) {
#pragma GCC unroll 4
    for (int v = 0; v < num_best; ++v) {
      const bits b = best_costs<Bits>(cost + v);
      store_low_bytes(from + 16 * v, b);
      const bits high_bits = load_bits(constants.high_bits.data() + 16 * v);
      store_bits(best.data() + 16 * v, masked_or(b, without_low_bits, high_bits));
    }
    const std::int32_t target = row.targets[static_cast<std::size_t>(d)];
    const bits factors = broadcast_word((64 << 16) | ((-2 * target) & 0xffff));
#pragma GCC unroll 16
    for (int v = 0; v < 16; ++v) {
      const bits products = load_bits(constants.products.data() + 16 * v);
      cost[v] = add_products(spread<1 << Bits>(best.data() + ((16 * v) >> Bits)), products, factors);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < 16; ++v) store_bits(path.cost.data() + 16 * v, cost[v]);
}

KVCACHE_TARGET inline float encode_trellis(int num_bits, const float* row, index_t count,
                                           const std::int8_t* table, float unit, std::uint8_t* codes) {
  if (num_bits > 4) return portable::encode_trellis(num_bits, row, count, table, unit, codes);
  portable::trellis_row prepared;
  if (!portable::prepare_trellis(num_bits, row, count, unit, prepared)) {
    std::fill_n(codes, count, std::uint8_t{0});
    return 0.0F;
  }
  portable::trellis_path path;
  if (num_bits == 2) {
    walk_states<2>(prepared, count, table, path);
  } else if (num_bits == 3) {
    walk_states<3>(prepared, count, table, path);
  } else {
    walk_states<4>(prepared, count, table, path);
  }
  return portable::trace_trellis(num_bits, prepared, count, table, path, codes);
}
