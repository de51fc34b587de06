// SPDX-License-Identifier: MIT
// rope_turns: how far RoPE turns a key from one slot of a block to the next, as tables that centred keys are encoded and
// read with.
//
//   apart:     a row with the first numbers of all pairs, then the second, then the dims that RoPE leaves alone
//              | a[0] .. a[pairs-1] | b[0] .. b[pairs-1] | rest |
//   carriers:  | cos(t f[0]) .. cos(t f[pairs-1]) | sin(t f[0]) .. |   of every slot t, in bytes, in the block order of keys
//
// A row m that turns as RoPE does, R_t m, has products with a query that are sums over carriers:
//
//   q . R_t m = sum_i (q_a m_a + q_b m_b)[i] cos(t f[i]) + (q_b m_a - q_a m_b)[i] sin(t f[i]) + q_rest . m_rest
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvcache::inline v0::codec {

/// Shared by the copies of a codec, never changed. Memory: 5 * max_block_size * rotary_dim bytes.
class rope_turns {
 public:
  /// Throws shape_error naming the field that cannot be.
  explicit rope_turns(const rope_config& config)
      : rope_turns(config.pairing, frequencies_of(config).radians, config.head_dim) {}

  /// \param radians   from one token to the next, one for each pair. Throws shape_error if they are none, too many or not
  ///                  finite over a block.
  /// \param head_dim  of the rows they are for; 0: not known
  rope_turns(rope_pairing pairing, std::vector<double> radians, index_t head_dim = 0)
      : pairing_(pairing), head_dim_(head_dim), radians_(std::move(radians)) {
    if (radians_.empty() || 2 * num_pairs() > max_head_dim)
      throw shape_error("kvcache: rope turns 1 to 256 pairs of dims");
    if (!std::all_of(radians_.begin(), radians_.end(),
                     [](double f) { return std::isfinite(f * static_cast<double>(max_block_size)); }))
      throw shape_error("kvcache: rope frequencies must be finite, over a block too");
    const index_t dim = rotary_dim();
    angles_.resize(static_cast<std::size_t>(max_block_size * dim));
    const block_geometry g = carrier_geometry(max_block_size);
    carriers_ = memory_block(block_order<std::int8_t>::key_size(g), huge_page_resource());
    auto* bytes = reinterpret_cast<std::int8_t*>(carriers_.data());
    std::fill_n(bytes, carriers_.size(), std::int8_t{0});
    for (index_t t = 0; t < max_block_size; ++t) {
      float* at = angles_.data() + t * dim;
      for (index_t i = 0; i < num_pairs(); ++i) {
        const double angle = static_cast<double>(t) * radians_[static_cast<std::size_t>(i)];
        at[i] = static_cast<float>(std::cos(angle));
        at[num_pairs() + i] = static_cast<float>(std::sin(angle));
      }
      for (index_t d = 0; d < dim; ++d)
        bytes[block_order<std::int8_t>::key_index(g, t, d)] =
            static_cast<std::int8_t>(std::lround(at[d] * carrier_levels));
    }
  }

  [[nodiscard]] rope_pairing pairing() const noexcept { return pairing_; }
  /// Of the rope_config; 0 where frequencies alone are known, as from a file.
  [[nodiscard]] index_t head_dim() const noexcept { return head_dim_; }
  [[nodiscard]] const std::vector<double>& radians() const noexcept { return radians_; }
  [[nodiscard]] index_t num_pairs() const noexcept { return static_cast<index_t>(radians_.size()); }
  [[nodiscard]] index_t rotary_dim() const noexcept { return 2 * num_pairs(); }
  [[nodiscard]] index_t bytes_held() const noexcept {
    return carriers_.size() +
           static_cast<index_t>(angles_.size() * sizeof(float) + radians_.size() * sizeof(double));
  }

  /// A row of a token in slot t turned back by t slots, apart. \param out  [head_dim], not `row`
  void turn_back(const float* row, index_t t, index_t head_dim, float* out) const noexcept {
    const float* a = row;
    const float* b = row + num_pairs();
    float spread[max_head_dim];
    if (pairing_ == rope_pairing::interleaved) {
      apart(row, head_dim, spread);
      a = spread;
      b = spread + num_pairs();
    }
    const float* cosines = angles_.data() + t * rotary_dim();
    const float* sines = cosines + num_pairs();
    lanes::transform(
        num_pairs(), out,
        [](auto x, auto y, auto c, auto s) { return lanes::rounded(x * c) + lanes::rounded(y * s); }, a, b,
        cosines, sines);
    lanes::transform(
        num_pairs(), out + num_pairs(),
        [](auto x, auto y, auto c, auto s) { return lanes::rounded(y * c) - lanes::rounded(x * s); }, a, b,
        cosines, sines);
    std::copy(row + rotary_dim(), row + head_dim, out + rotary_dim());
  }

  /// The other way: a row that is apart, turned by t slots and put together. \param out  [head_dim], not `row`
  void turn(const float* row, index_t t, index_t head_dim, float* out) const noexcept {
    float spread[max_head_dim];
    const bool interleaved = pairing_ == rope_pairing::interleaved;
    float* to = interleaved ? spread : out;
    const float* a = row;
    const float* b = row + num_pairs();
    const float* cosines = angles_.data() + t * rotary_dim();
    const float* sines = cosines + num_pairs();
    lanes::transform(
        num_pairs(), to,
        [](auto x, auto y, auto c, auto s) { return lanes::rounded(x * c) - lanes::rounded(y * s); }, a, b,
        cosines, sines);
    lanes::transform(
        num_pairs(), to + num_pairs(),
        [](auto x, auto y, auto c, auto s) { return lanes::rounded(y * c) + lanes::rounded(x * s); }, a, b,
        cosines, sines);
    for (index_t i = 0; interleaved && i < num_pairs(); ++i) {
      out[2 * i] = spread[i];
      out[2 * i + 1] = spread[num_pairs() + i];
    }
    std::copy(row + rotary_dim(), row + head_dim, out + rotary_dim());
  }

  /// The numbers of a row in the order that `turn_back` gives. \param out  [head_dim], not `row`
  void apart(const float* row, index_t head_dim, float* out) const noexcept {
    if (pairing_ == rope_pairing::half) {
      std::copy_n(row, head_dim, out);
      return;
    }
    for (index_t i = 0; i < num_pairs(); ++i) {
      out[i] = row[2 * i];
      out[num_pairs() + i] = row[2 * i + 1];
    }
    std::copy(row + rotary_dim(), row + head_dim, out + rotary_dim());
  }

  /// The section of a block of keys that kernels::int8 takes, times carrier_unit.
  [[nodiscard]] const std::byte* carriers() const noexcept { return carriers_.data(); }
  [[nodiscard]] block_geometry carrier_geometry(index_t block_size) const noexcept {
    return {block_size, rotary_dim()};
  }
  /// What a byte of the carriers counts, 1/128, is exact in bfloat16; what it should count is 1/127.
  static constexpr float carrier_unit = 128.0F / 127.0F;
  static constexpr bfloat16 carrier_scale{0x3c00};

 private:
  static constexpr float carrier_levels = 127.0F;

  rope_pairing pairing_;
  index_t head_dim_;
  std::vector<double> radians_;
  std::vector<float> angles_;  // [max_block_size][2 * pairs]: cosines, sines
  memory_block carriers_;
};

}  // namespace kvcache::inline v0::codec
