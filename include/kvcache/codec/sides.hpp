// SPDX-License-Identifier: MIT
// sides: a codec put together from one for keys and one for values; codec/mixed.hpp takes them from two codecs.
//
//   block: | keys' section | values' section |      each a multiple of 64 bytes
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/prefetch.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <cstddef>
#include <type_traits>

namespace kvcache::inline v0::codec {

/// Whether a side is exact_keys<bfloat16> or exact_values<bfloat16>, or a choice at run time that holds one.
template <class Side>
constexpr bool stores_bf16([[maybe_unused]] const Side& side) noexcept {
  if constexpr (requires { typename Side::stored_element; }) {
    return std::is_same_v<Side, typename Side::itself> &&
           std::is_same_v<typename Side::stored_element, bfloat16>;
  } else if constexpr (requires { side.stores_bf16; }) {
    return side.stores_bf16;
  } else {
    return false;
  }
}

/// Whether a side's kernels read a section line by line once, and fetch as many lines of what comes next meanwhile.
template <class Side>
inline constexpr bool reads_lines = requires {
  requires Side::reads_lines;
};

template <key_side Keys, value_side Values>
struct sides {
  using keys_type = Keys;
  using values_type = Values;

  [[no_unique_address]] Keys keys = {};
  [[no_unique_address]] Values values = {};

  /// Throws shape_error if the settings of either side do not fit.
  void validate(const cache_shape& shape) const {
    kvcache::validate(keys, shape);
    kvcache::validate(values, shape);
  }

  /// Bytes of what both sides refer to.
  [[nodiscard]] index_t settings_bytes() const noexcept {
    return kvcache::settings_bytes(keys) + kvcache::settings_bytes(values);
  }

  [[nodiscard]] constexpr bool needs_whole_blocks() const noexcept {
    return keys.needs_whole_blocks || values.needs_whole_blocks;
  }
  [[nodiscard]] constexpr bool turns_sums() const noexcept { return values.turns_sums; }

  [[nodiscard]] constexpr index_t block_bytes(const block_geometry& g) const noexcept {
    return keys.section_bytes(g) + values.section_bytes(g);
  }
  /// Bytes that one more token takes, keys and values, without padding.
  [[nodiscard]] constexpr index_t token_bytes(const block_geometry& g) const noexcept {
    return keys.row_bytes(g) + values.row_bytes(g);
  }

  status encode(const kernel::table& kernels, const block_geometry& g, std::byte* block, index_t first,
                index_t count, const_rows k, const_rows v) const {
    if (const status s = keys.accepts(kernels, g, count, k); s != status::ok) return s;
    if (const status s = values.accepts(kernels, g, count, v); s != status::ok) return s;
    keys.encode(kernels, g, block, first, count, k);
    values.encode(kernels, g, block + keys.section_bytes(g), first, count, v);
    return status::ok;
  }

  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* block, index_t first,
              index_t count, mutable_rows k, mutable_rows v) const {
    keys.decode(kernels, g, block, first, count, k);
    values.decode(kernels, g, block + keys.section_bytes(g), first, count, v);
  }

  /// Whether both sides store rows that can change places; see move_token.
  [[nodiscard]] constexpr bool moves_tokens() const noexcept {
    return codec::moves_rows(keys) && codec::moves_rows(values);
  }
  /// Copies the token in one slot to another, of the same block or of another one, as it is stored.
  void move_token(const block_geometry& g, const std::byte* from_block, index_t from_slot,
                  std::byte* to_block,
                  index_t to_slot) const noexcept requires row_moving_side<Keys> && row_moving_side<Values> {
    keys.move_row(g, from_block, from_slot, to_block, to_slot);
    const index_t offset = keys.section_bytes(g);
    values.move_row(g, from_block + offset, from_slot, to_block + offset, to_slot);
  }

  [[nodiscard]] constexpr index_t prepared_floats(const block_geometry& g) const noexcept {
    return keys.prepared_floats(g);
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    return keys.prepare(kernels, g, queries, num_rows, prepared);
  }

  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* block, index_t count,
              const float* prepared, index_t num_rows, float* scores,
              const kernel::upcoming& next_block) const {
    keys.scores(kernels, g, block, count, prepared, num_rows, scores,
                while_keys_are_read(g, block, num_rows, next_block));
  }

  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const kernel::upcoming& next_block) const {
    const index_t key_bytes = keys.section_bytes(g);
    values.accumulate(kernels, g, block + key_bytes, count, weights, num_rows, sums,
                      in_next_block(g, key_bytes, num_rows, next_block, next_block.next, next_block.soon));
  }
  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    values.finish(kernels, g, num_rows, sums);
  }

  /// kernel::element_kernels::attends
  [[nodiscard]] bool attends(const kernel::table& kernels, const block_geometry& g,
                             index_t num_rows) const noexcept {
    const auto takes = kernels.bf16.attends;
    return stores_bf16(keys) && stores_bf16(values) && takes != nullptr && takes(g, num_rows);
  }
  /// kernel::element_kernels::attend. \pre attends(kernels, g, num_rows)
  /// \param blocks  as kernel::block_run::blocks
  void attend(const kernel::table& kernels, const block_geometry& g, const std::byte* const* blocks,
              index_t num_blocks, const float* prepared, index_t num_rows, kernel::softmax_row* rows,
              float* sums) const {
    kernels.bf16.attend(g, {blocks, num_blocks, keys.section_bytes(g)}, prepared, num_rows, rows, sums);
  }

  /// What to fetch while keys are read.
  [[nodiscard]] kernel::upcoming while_keys_are_read(const block_geometry& g, const std::byte* block,
                                                     index_t num_rows,
                                                     const kernel::upcoming& next_block) const noexcept {
    const index_t key_bytes = keys.section_bytes(g);
    const std::byte* own_values = block + key_bytes;
    const bool beyond_the_block = values.section_bytes(g) < key_bytes;
    return in_next_block(g, 0, num_rows, next_block, own_values, beyond_the_block ? nullptr : own_values);
  }

  /// Both sides for one head, where either differs between heads.
  [[nodiscard]] auto at(index_t layer, index_t head) const requires requires(const Keys& k) {
    k.at(layer, head);
  } || requires(const Values& v) {
    v.at(layer, head);
  }
  { return sides{codec_at(keys, layer, head), codec_at(values, layer, head)}; }

 private:
  /// The section `offset` bytes in the next block, where that is soon enough to ask for.
  /// \param then  else  \param soon  what comes sooner where the next block does not
  [[nodiscard]] kernel::upcoming in_next_block(const block_geometry& g, index_t offset, index_t num_rows,
                                               const kernel::upcoming& next_block, const std::byte* then,
                                               const std::byte* soon) const noexcept {
    const index_t bytes = block_bytes(g);
    const bool far = next_block != nullptr && reads_far_ahead(bytes, num_rows);
    const kernel::upcoming section = next_block.part(offset);
    kernel::upcoming result(far ? section.next : then, bytes <= two_in_l1 ? section.soon : soon);
    if (far && page_by_page(num_rows, next_block)) result.set_block(offset, bytes);
    return result;
  }
  /// Whether the next block is fetched with its pages beside one another, by both sections in turn. It pays where blocks lie
  /// apart, and where multiplying takes as long as reading.
  [[nodiscard]] static bool page_by_page(index_t num_rows, const kernel::upcoming& next_block) noexcept {
    constexpr index_t many_rows = 8;
    return reads_lines<Keys> && reads_lines<Values> && (next_block.apart || num_rows >= many_rows);
  }
  /// Bytes of blocks of which the next one has room in the first-level cache beside the one at hand: what is asked for soon is
  /// the same section of that; of larger ones it is the section behind this one.
  static constexpr index_t two_in_l1 = 12 * 1024;

  /// Memory has to be asked some time before it answers: one section ahead, or the same one of a later block where sections
  /// are soon multiplied. Not further than first-level caches are large; one row, which reads as fast as memory delivers,
  /// takes less. Second-level caches have room for the usual block of any codec.
  [[nodiscard]] static bool reads_far_ahead(index_t block_bytes, index_t num_rows) noexcept {
    if (prefetch::by_levels) return true;
    const index_t small = num_rows > 1 ? index_t{20 * 1024} : index_t{12 * 1024};
    return block_bytes <= small;
  }
};

}  // namespace kvcache::inline v0::codec
