// SPDX-License-Identifier: MIT
// low_rank_settings: the bases of keys, or of values, as a side of low_rank writes them and is made from them again.
//
//   u32 flags: 1 where the way out has a basis of its own, 4 of klt, 8 of klt with best_scales
//   for each layer: u32 components in f32, bf16, 8, (of klt: 6, 5,) 4, (of klt: 3,) 2 bits
//   for each layer and head, in float: in [rank, head_dim] | out, where there is one, the same size | spreads [rank]
//
// Little-endian; see codec/description.hpp.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/low_rank_bases.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

namespace kvcache::inline v0::codec::detail {

inline low_rank_basis basis_at(const low_rank_bases& bases, bool is_keys, index_t layer, index_t head) {
  return is_keys ? bases.keys(layer, head) : bases.values(layer, head);
}

/// Whose bases: what low_rank has no components of is not written for it.
enum class settings_of : std::uint32_t { low_rank = 0, klt = 4 };

inline constexpr index_t best_scales_flag = 8;

/// Whether layouts of this codec tell of counts()[i].
constexpr bool has_count(settings_of codec, std::size_t i) noexcept {
  return codec == settings_of::klt || (i != 3 && i != 4 && i != 6);
}

/// Appends the settings of one side. Throws std::bad_alloc.
inline void put_low_rank_settings(const low_rank_bases& bases, bool is_keys, settings_of codec,
                                  std::vector<std::byte>& out) {
  const cache_shape& shape = bases.shape();
  const auto put_number = [&](index_t number) {
    const auto narrow = static_cast<std::uint32_t>(number);
    const auto* bytes = reinterpret_cast<const std::byte*>(&narrow);
    out.insert(out.end(), bytes, bytes + sizeof narrow);
  };
  const low_rank_basis any = basis_at(bases, is_keys, 0, 0);
  put_number((any.out != any.in ? 1 : 0) + static_cast<index_t>(codec) +
             (codec == settings_of::klt && any.layout->best_scales ? best_scales_flag : 0));
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const low_rank_layout& l = is_keys ? bases.key_layout(layer) : bases.value_layout(layer);
    for (std::size_t i = 0; i < l.counts().size(); ++i) {
      if (has_count(codec, i)) put_number(l.counts()[i]);
    }
  }
  std::vector<float> rows;
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    for (index_t head = 0; head < shape.num_kv_heads; ++head) {
      const low_rank_basis basis = basis_at(bases, is_keys, layer, head);
      const index_t rank = basis.layout->rank();
      const block_geometry lanes{round_up(rank, key_lanes), shape.head_dim};
      rows.clear();
      const auto add_rows = [&](const float* matrix) {
        for (index_t i = 0; i < rank; ++i) {
          for (index_t d = 0; d < shape.head_dim; ++d)
            rows.push_back(
                matrix[is_keys ? block_order<float>::key_index(lanes, i, d) : i * shape.head_dim + d]);
        }
      };
      add_rows(basis.in);
      if (any.out != any.in) add_rows(basis.out);
      rows.insert(rows.end(), basis.spreads, basis.spreads + rank);
      kvcache::detail::put_floats(rows, out);
    }
  }
}

/// The bases that wrote these settings, without any for the other side. Throws shape_error where they cannot be.
inline std::shared_ptr<const low_rank_bases> low_rank_bases_from(std::span<const std::byte> settings,
                                                                 bool is_keys, settings_of codec,
                                                                 const cache_shape& shape) {
  const auto refuse = [] { throw shape_error("kvcache: the settings of low_rank have the wrong size"); };
  const auto take_number = [&] {
    std::uint32_t number = 0;
    if (settings.size() < sizeof number) refuse();
    std::memcpy(&number, settings.data(), sizeof number);
    settings = settings.subspan(sizeof number);
    return index_t{number};
  };
  const index_t flags = take_number();
  const bool best_scales = codec == settings_of::klt && (flags & best_scales_flag) != 0;
  const index_t weighted = flags - static_cast<index_t>(codec) - (best_scales ? best_scales_flag : 0);
  if (weighted < 0 || weighted > 1)
    throw shape_error("kvcache: the settings of low_rank, or klt, are of another codec or an older version");
  std::vector<low_rank_layout> layouts;
  index_t num_floats = 0;
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    low_rank_layout::counts_type counts{};
    for (std::size_t i = 0; i < counts.size(); ++i) {
      if (has_count(codec, i)) counts[i] = take_number();
    }
    low_rank_layout l = low_rank_layout::of(counts);
    l.best_scales = best_scales;
    if (l.rank() < 1 || l.rank() > shape.head_dim)
      throw shape_error("kvcache: low_rank: rank must be 1 to head_dim");
    layouts.push_back(l);
    num_floats = checked_add(num_floats,
                             checked_mul(shape.num_kv_heads, l.rank(), (1 + weighted) * shape.head_dim + 1));
  }
  const std::vector<float> floats = kvcache::detail::floats_in(settings, num_floats);
  low_rank_matrices made;
  (is_keys ? made.key_layouts : made.value_layouts) = layouts;
  const float* from = floats.data();
  const auto take_floats = [&](std::vector<float>& to, index_t count) {
    to.insert(to.end(), from, from + count);
    from += count;
  };
  for (const low_rank_layout& l : layouts) {
    for (index_t head = 0; head < shape.num_kv_heads; ++head) {
      take_floats(is_keys ? made.keys_in : made.values, l.rank() * shape.head_dim);
      if (weighted == 1) take_floats(is_keys ? made.keys_out : made.values_out, l.rank() * shape.head_dim);
      take_floats(is_keys ? made.key_spreads : made.value_spreads, l.rank());
    }
  }
  return std::make_shared<const low_rank_bases>(shape, made);
}

}  // namespace kvcache::inline v0::codec::detail
