// SPDX-License-Identifier: MIT
// trellis<4>, <3>, <2>: as rotated, but each number's level depends on the codes before it: less error at the same bits than
// any codec that looks at numbers one by one.
//
// The last 8 bits of a row's codes are a state, and states index a table of 256 levels; encoding searches all paths for the
// one nearest to the row (Viterbi 1967), which costs some eleven times what the nearest level does. Rows begin in state
// zero, so nothing is stored but codes and scale: Bits + 16 / head_dim bits per number. Relative mean squared error of
// normally distributed rows of 128: under 0.0068, 0.0228, 0.082 for 4, 3, 2 bits (rotated: 0.0092, 0.0335, 0.1153).
// Source: trellis-coded quantisation, Marcellin and Fischer 1990; bitshift trellises as in QTIP, Tseng et al. 2024.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/rotated_rows.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/codec/trellis_tables.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvcache::inline v0::codec {

namespace detail {

/// What kernels rely on, see kernel::trellis_kernels.
constexpr bool has_sign_bit(const std::int8_t* table) noexcept {
  constexpr index_t half = kernel::trellis_states / 2;
  for (index_t s = 0; s < half; ++s) {
    if (table[s] == -128 || table[s + half] != -table[s]) return false;
  }
  return true;
}
static_assert(has_sign_bit(trellis_table(2)) && has_sign_bit(trellis_table(3)) &&
              has_sign_bit(trellis_table(4)));
static_assert(has_sign_bit(short_trellis_table(2)) && has_sign_bit(short_trellis_table(3)) &&
              has_sign_bit(short_trellis_table(4)) && has_sign_bit(short_trellis_table(5)) &&
              has_sign_bit(short_trellis_table(6)));

/// The numbers of a table that a row of codes stands for.
template <int Bits>
void trellis_levels(const std::uint8_t* codes, index_t count, const std::int8_t* table, float* row) noexcept {
  unsigned state = 0;
  for (index_t d = 0; d < count; ++d) {
    state = (state << static_cast<unsigned>(Bits) | codes[d]) % kernel::trellis_states;
    row[d] = static_cast<float>(table[state]);
  }
}

/// The path of least error through the states; see rotated_rows.
template <int Bits>
struct trellis_quantiser {
  static constexpr int bits = Bits;
  static constexpr std::string_view name = Bits == 4 ? "trellis4" : (Bits == 3 ? "trellis3" : "trellis2");

  static constexpr const std::int8_t* table() noexcept { return trellis_table(Bits); }

  /// Codes are unpacked as they are.
  static constexpr const std::int8_t* unpack_book() noexcept { return identity.data(); }

  static float encode(const kernel::table& kernels, float* row, index_t count, std::uint8_t* codes) {
    // Of a row of a few numbers the nearest path may point the other way; weights take no negative scales.
    return std::max(kernels.trellis.encode(Bits, row, count, table(), 0.0F, codes), 0.0F);
  }
  static void levels(const std::uint8_t* codes, index_t count, float* row) noexcept {
    trellis_levels<Bits>(codes, count, table(), row);
  }
  static void scores(const looked_up<Bits>& codes, const bfloat16* scales, const float* prepared,
                     index_t num_rows, float* scores) {
    const auto at_once = codes.kernels.trellis.scores;
    if (at_once != nullptr && at_once({Bits, codes.section, table()}, codes.g, scales, codes.count, prepared,
                                      num_rows, scores, codes.next))
      return;
    codes.template for_each_piece<keys_in_order>([&](index_t t, index_t num_tokens, std::int8_t* bytes) {
      codes.kernels.trellis.decode_keys(Bits, codes.g.head_dim, ceil_div(num_tokens, key_lanes),
                                        reinterpret_cast<const std::uint8_t*>(bytes), table(), bytes,
                                        keys_in_order::order::key_group_size(codes.g));
      codes.kernels.coarse.scores(codes.g, reinterpret_cast<const std::byte*>(bytes), scales + t, num_tokens,
                                  prepared, num_rows, scores + t, nullptr);
    });
  }
  static void accumulate(const looked_up<Bits>& codes, const bfloat16* scales, const float* weights,
                         index_t num_rows, float* sums) {
    const auto at_once = codes.kernels.trellis.accumulate;
    if (at_once != nullptr && at_once({Bits, codes.section, table()}, codes.g, scales, codes.count, weights,
                                      num_rows, sums, codes.next))
      return;
    codes.template for_each_piece<values_in_order>([&](index_t t, index_t num_tokens, std::int8_t* bytes) {
      codes.kernels.trellis.decode_values(Bits, codes.g.head_dim,
                                          ceil_div(num_tokens, values_in_order::order::pack),
                                          reinterpret_cast<const std::uint8_t*>(bytes), table(), bytes,
                                          values_in_order::order::pack * codes.g.head_dim);
      codes.kernels.coarse.accumulate(codes.g, reinterpret_cast<const std::byte*>(bytes), scales + t,
                                      num_tokens, weights + t, num_rows, sums, nullptr);
    });
  }

 private:
  static constexpr std::array<std::int8_t, 16> identity = {0, 1, 2,  3,  4,  5,  6,  7,
                                                           8, 9, 10, 11, 12, 13, 14, 15};
};

}  // namespace detail

template <int Bits>
using trellis_keys = detail::rotated_keys<detail::trellis_quantiser<Bits>>;
template <int Bits>
using trellis_values = detail::rotated_values<detail::trellis_quantiser<Bits>>;

template <int Bits>
struct trellis : sides<trellis_keys<Bits>, trellis_values<Bits>> {
  static constexpr std::string_view name = trellis_keys<Bits>::side_name();
};

static_assert(block_codec<trellis<4>> && block_codec<trellis<3>> && block_codec<trellis<2>>);

}  // namespace kvcache::inline v0::codec
