// SPDX-License-Identifier: MIT
// centred_keys: keys of a block less their mean before RoPE, and what is left in another encoding.
//
//   key[t] = R_t m + rest[t]          R_t turns as RoPE does from slot 0 to slot t, m is one row for each block
//   score  = q . R_t m + q . rest[t]  the first from tables (codec/rope_turns.hpp), the second from the other encoding
//
//   section: | the rest, as its codec stores it | m [head_dim], bfloat16, padded to 64 |
//
// Before RoPE a head's keys have much in common; after it the common part turns from token to token, where means of
// channels cannot see it. It is most of a key in some models: 67 to 91 % of the energy in the bundled one. What is left is
// that much smaller, and so is the error at the same bits. m is the mean of the keys of a block, turned back to its first
// slot, so nothing need be known of positions: where the slots of a block are not neighbours it only fits worse.
// 16 / block_size bits per number on top of the other encoding's. Blocks are encoded whole.
// Without turns m is the plain mean of each channel. Source of the observation: KVQuant, Hooper et al. 2024.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvcache::inline v0::codec {

namespace detail {

/// "centred_" in front of a side's name, put together at compile time.
template <class Keys>
struct centred_name {
  static constexpr std::string_view prefix = "centred_";
  static constexpr auto text = [] {
    std::array<char, prefix.size() + Keys::side_name().size()> all{};
    const auto rest = std::copy(prefix.begin(), prefix.end(), all.begin());
    std::copy(Keys::side_name().begin(), Keys::side_name().end(), rest);
    return all;
  }();
};

using mean_row = std::array<float, max_head_dim>;

/// Throws shape_error where turns were made for rows of another size: their frequencies depend on it.
/// \param turns  null: nothing turns
inline void require_turns_for(const rope_turns* turns, index_t head_dim) {
  if (turns == nullptr) return;
  if (turns->head_dim() != 0 && turns->head_dim() != head_dim)
    throw shape_error("kvcache: centred: rope head_dim is " + std::to_string(turns->head_dim()) +
                      ", that of the cache " + std::to_string(head_dim));
  if (turns->rotary_dim() > head_dim)
    throw shape_error("kvcache: centred: rope turns more dims than head_dim");
}

/// A mean as it is in slot t. \param turns  null: nothing turns
inline void turn_mean(const rope_turns* turns, const float* mean, index_t t, index_t head_dim,
                      float* out) noexcept {
  if (turns != nullptr) {
    turns->turn(mean, t, head_dim, out);
  } else {
    std::copy_n(mean, head_dim, out);
  }
}

/// The mean of rows, turned back to slot 0, apart, of numbers in bfloat16 that may be turned anywhere without passing float;
/// where rows are beyond that, their mean is cut off. \param first  slot of row 0
inline mean_row mean_before_rope(const rope_turns* turns, index_t head_dim, index_t first, index_t count,
                                 const_rows rows) noexcept {
  mean_row mean;
  mean.fill(0.0F);
  mean_row back;
  const float share = 1.0F / static_cast<float>(count);
  for (index_t t = first; t < first + count; ++t) {
    const float* row = rows.row(t - first);
    if (turns != nullptr) {
      turns->turn_back(row, t, head_dim, back.data());
      row = back.data();
    }
    lanes::transform(
        head_dim, mean.data(), [share](auto sum, auto x) { return sum + lanes::rounded(x * share); },
        mean.data(), row);
  }
  constexpr float largest = 0x1p126F;
  for (float& x : mean)
    x = x == x ? to_float(to_finite_bfloat16(std::clamp(x, -largest, largest)))
               : 0.0F;  // infinity less infinity
  return mean;
}

/// out = row - mean as it is in slot t, within the range of bfloat16.
inline void take_off(const rope_turns* turns, const float* mean, index_t t, index_t head_dim,
                     const float* row, float* out) noexcept {
  mean_row turned;
  turn_mean(turns, mean, t, head_dim, turned.data());
  codec::take_off(row, turned.data(), head_dim, out);
}

}  // namespace detail

/// \tparam Keys  how what is left is stored: a side that takes tokens one by one
template <key_side Keys>
struct centred_keys : plain_side {
  static_assert(!Keys::needs_whole_blocks, "centred_keys needs an encoding that takes tokens one by one");
  static constexpr bool needs_whole_blocks = true;

  std::shared_ptr<const rope_turns> turns = nullptr;  ///< null: nothing turns
  [[no_unique_address]] Keys rest = {};

  static constexpr std::string_view side_name() noexcept {
    return {detail::centred_name<Keys>::text.data(), detail::centred_name<Keys>::text.size()};
  }
  void validate(const cache_shape& shape) const {
    detail::require_turns_for(turns.get(), shape.head_dim);
    kvcache::validate(rest, shape);
  }
  [[nodiscard]] index_t settings_bytes() const noexcept {
    return kvcache::settings_bytes(rest) + (turns ? turns->bytes_held() : 0);
  }
  /// u32 pairs, u32 1 where they are interleaved, their frequencies in double; then what the rest writes.
  void put_settings(std::vector<std::byte>& out) const;
  /// Throws shape_error.
  static centred_keys from_settings(std::span<const std::byte> settings, const cache_shape& shape);

  [[nodiscard]] auto at(index_t layer, index_t head) const {
    return centred_keys{{}, turns, codec_at(rest, layer, head)};
  }

  [[nodiscard]] index_t section_bytes(const block_geometry& g) const noexcept {
    return rest.section_bytes(g) + mean_bytes(g);
  }
  /// The share of one token in what a block needs, rounded up.
  [[nodiscard]] index_t row_bytes(const block_geometry& g) const noexcept {
    return rest.row_bytes(g) + ceil_div(g.head_dim * index_t{sizeof(bfloat16)}, g.block_size);
  }
  static status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                        const_rows rows) {
    return finite_rows(kernels, g, count, rows);
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    if (count == 0) return;
    const detail::mean_row mean = detail::mean_before_rope(turns.get(), g.head_dim, first, count, rows);
    for (index_t d = 0; d < g.head_dim; ++d)
      set_scale(section + rest.section_bytes(g), d, from_float<bfloat16>(mean[static_cast<std::size_t>(d)]));
    alignas(64) detail::mean_row left;
    for (index_t t = first; t < first + count; ++t) {
      detail::take_off(turns.get(), mean.data(), t, g.head_dim, rows.row(t - first), left.data());
      rest.encode(kernels, g, section, t, 1, {left.data(), 0});
    }
  }

  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t first,
              index_t count, mutable_rows rows) const {
    rest.decode(kernels, g, section, first, count, rows);
    detail::mean_row mean;
    for (index_t d = 0; d < g.head_dim; ++d)
      mean[static_cast<std::size_t>(d)] = to_float(stored_mean(g, section)[d]);
    detail::mean_row turned;
    for (index_t t = first; t < first + count; ++t) {
      detail::turn_mean(turns.get(), mean.data(), t, g.head_dim, turned.data());
      float* row = rows.row(t - first);
      lanes::transform(
          g.head_dim, row, [](auto x, auto m) { return x + m; }, row, turned.data());
    }
  }

  /// For each row: what the rest prepares, or the row; then the row with its pairs apart, times carrier_unit.
  [[nodiscard]] index_t prepared_floats(const block_geometry& g) const noexcept {
    return rest_floats(g) + round_up(g.head_dim, 16);
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    const float* made = rest.prepare(kernels, g, queries, num_rows, prepared);
    if (made != prepared) std::copy_n(made, num_rows * g.head_dim, prepared);
    float* own = prepared + num_rows * rest_floats(g);
    for (index_t r = 0; r < num_rows; ++r, own += round_up(g.head_dim, 16)) {
      if (turns) {
        turns->apart(queries + r * g.head_dim, g.head_dim, own);
        for (index_t d = 0; d < rotary_dim(); ++d) own[d] *= rope_turns::carrier_unit;
      } else {
        std::copy_n(queries + r * g.head_dim, g.head_dim, own);
      }
    }
    return prepared;
  }

  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const kernel::upcoming& next) const {
    rest.scores(kernels, g, section, count, prepared, num_rows, scores, next);
    fetch_behind(next, rest.section_bytes(g), section_bytes(g));
    const float* own = prepared + num_rows * rest_floats(g);
    const index_t stride = round_up(g.head_dim, 16);
    for (index_t first = 0; first < num_rows; first += rows_at_once) {
      const index_t n = std::min(rows_at_once, num_rows - first);
      add_mean_scores(kernels, g, stored_mean(g, section), count, own + first * stride, n,
                      scores + first * g.block_size);
    }
  }

 private:
  static constexpr index_t rows_at_once = 8;

  static index_t mean_bytes(const block_geometry& g) noexcept {
    return round_up(g.head_dim * index_t{sizeof(bfloat16)}, block_alignment);
  }
  [[nodiscard]] const bfloat16* stored_mean(const block_geometry& g,
                                            const std::byte* section) const noexcept {
    return codec::scales(section + rest.section_bytes(g));
  }
  [[nodiscard]] index_t rest_floats(const block_geometry& g) const noexcept {
    return round_up(std::max(rest.prepared_floats(g), g.head_dim), 16);
  }
  [[nodiscard]] index_t rotary_dim() const noexcept { return turns ? turns->rotary_dim() : 0; }

  /// scores[r, t] += q[r] . R_t m
  void add_mean_scores(const kernel::table& kernels, const block_geometry& g, const bfloat16* mean,
                       index_t count, const float* queries, index_t num_rows, float* scores) const {
    const index_t stride = round_up(g.head_dim, 16);
    const index_t num_scores = round_up(count, key_lanes);
    alignas(64) std::array<float, rows_at_once * max_block_size> of_mean;
    if (turns) {
      alignas(64) std::array<float, rows_at_once * max_head_dim> coupled;
      alignas(64) std::array<float, rows_at_once*(16 + max_head_dim)> made;
      const index_t dim = rotary_dim();
      kernels.channel.couple(queries, num_rows, stride, turns->num_pairs(), mean, coupled.data());
      const kernel::int8_kernels& bytes = bytes_in(kernels);
      bytes.prepare(dim, coupled.data(), num_rows, made.data());
      bytes.scores(turns->carrier_geometry(g.block_size), turns->carriers(), carrier_scales(), count,
                   made.data(), num_rows, of_mean.data(), nullptr);
    }
    for (index_t r = 0; r < num_rows; ++r) {
      float* row = scores + r * g.block_size;
      if (turns) kernels.channel.add_to(of_mean.data() + r * g.block_size, num_scores, row);
      if (rotary_dim() == g.head_dim) continue;
      float constant = 0;
      for (index_t d = rotary_dim(); d < g.head_dim; ++d)
        constant += queries[r * stride + d] * to_float(mean[d]);
      kernels.channel.shift(row, num_scores, constant);
    }
  }

  /// As exact as the rest needs them.
  static const kernel::int8_kernels& bytes_in(const kernel::table& kernels) noexcept {
    if constexpr (requires { Keys::coarse_queries; }) {
      return kernels.coarse;
    } else {
      return kernels.int8;
    }
  }

  static const bfloat16* carrier_scales() noexcept {
    static constexpr auto all = [] {
      std::array<bfloat16, max_block_size> scales{};
      scales.fill(rope_turns::carrier_scale);
      return scales;
    }();
    return all.data();
  }
};

template <key_side Keys>
void centred_keys<Keys>::put_settings(std::vector<std::byte>& out) const {
  const auto put = [&out](const void* from, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(from);
    out.insert(out.end(), bytes, bytes + size);
  };
  const std::array<std::uint32_t, 2> head{turns ? static_cast<std::uint32_t>(turns->num_pairs()) : 0U,
                                          turns && turns->pairing() == rope_pairing::interleaved ? 1U : 0U};
  put(head.data(), sizeof(head));
  if (turns) put(turns->radians().data(), turns->radians().size() * sizeof(double));
  if constexpr (!std::is_empty_v<Keys>) rest.put_settings(out);
}

template <key_side Keys>
centred_keys<Keys> centred_keys<Keys>::from_settings(std::span<const std::byte> settings,
                                                     const cache_shape& shape) {
  std::array<std::uint32_t, 2> head{};
  if (settings.size() < sizeof(head)) throw shape_error("kvcache: the settings of centred are too short");
  std::memcpy(head.data(), settings.data(), sizeof(head));
  settings = settings.subspan(sizeof(head));
  const std::size_t size = std::size_t{head[0]} * sizeof(double);
  if (head[1] > 1 || 2 * index_t{head[0]} > shape.head_dim || settings.size() < size)
    throw shape_error("kvcache: the settings of centred are not those of this head_dim");
  centred_keys made;
  if (head[0] > 0) {
    std::vector<double> radians(head[0]);
    std::memcpy(radians.data(), settings.data(), size);
    made.turns = std::make_shared<const rope_turns>(
        head[1] == 1 ? rope_pairing::interleaved : rope_pairing::half, std::move(radians));
  }
  if constexpr (std::is_empty_v<Keys>) {
    if (settings.size() != size) throw shape_error("kvcache: the settings of centred have the wrong size");
  } else {
    made.rest = Keys::from_settings(settings.subspan(size), shape);
  }
  return made;
}

/// Keys of Codec centred, its values as they are.
template <block_codec Codec>
struct centred : sides<centred_keys<typename Codec::keys_type>, typename Codec::values_type>,
                 sealing_options {
  static constexpr std::string_view name = centred_keys<typename Codec::keys_type>::side_name();

  /// Nothing turns: each block loses the mean of its channels.
  centred() = default;
  /// Throws shape_error.
  explicit centred(const rope_config& rope, const Codec& codec = {}) {
    this->keys.turns = std::make_shared<const rope_turns>(rope);
    this->keys.rest = codec.keys;
    this->values = codec.values;
  }
};

/// What centred keys leave to their encoding of each block, in place: what low_rank_calibration is given for them.
/// \param k      [tokens, num_kv_heads, head_dim], blocks of shape.block_size tokens from the first on, rotated
/// \param turns  null: nothing turns
/// Throws shape_error if that is not a whole number of tokens, or turns are for another head_dim.
inline void take_off_means(std::span<float> k, const cache_shape& shape, const rope_turns* turns) {
  detail::require_turns_for(turns, shape.head_dim);
  const index_t stride = shape.num_kv_heads * shape.head_dim;
  const auto size = static_cast<index_t>(k.size());
  if (size % stride != 0) throw shape_error("kvcache: centred: rows must be a whole number of tokens");
  for (index_t first = 0; first < size / stride; first += shape.block_size) {
    const index_t count = std::min(shape.block_size, size / stride - first);
    for (index_t head = 0; head < shape.num_kv_heads; ++head) {
      float* rows = k.data() + first * stride + head * shape.head_dim;
      const detail::mean_row mean = detail::mean_before_rope(turns, shape.head_dim, 0, count, {rows, stride});
      for (index_t t = 0; t < count; ++t)
        detail::take_off(turns, mean.data(), t, shape.head_dim, rows + t * stride, rows + t * stride);
    }
  }
}

static_assert(sealing_codec<centred<int8>> && sealing_codec<centred<rotated<4>>> &&
              sealing_codec<centred<trellis<4>>>);

}  // namespace kvcache::inline v0::codec
