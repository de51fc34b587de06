// SPDX-License-Identifier: MIT
// rotated<4>, <3>, <2>: rows rotated, every number one of 2^Bits levels, one scale for each row.
//
//   section: | codes, packed | scales [block_size], bfloat16 |   each padded to 64
//
// Bits + 16 / head_dim bits per number. Relative mean squared error of normally distributed rows of 128, and of any rows
// that the rotation makes so: 0.0092, 0.0335, 0.1153 for 4, 3, 2 bits. The scale is the least-squares one. Tokens are
// encoded as they come; the query is rotated once for many blocks, and so is the output. Rows that are not finite are
// refused; rows of zeros stay zero.
// Source: Lloyd-Max levels after a random rotation, as in TurboQuant (Zandieh et al. 2025) without its second stage, and
// EDEN (Vargaftik et al. 2022).
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/gaussian_codebook.hpp>
#include <kvcache/codec/low_bit.hpp>
#include <kvcache/codec/rotation.hpp>
#include <kvcache/codec/scales.hpp>
#include <kvcache/codec/sides.hpp>
#include <kvcache/core/half.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvcache::inline v0::codec {

namespace detail {

/// What keys and values have in common; `Order` says which of them they are.
template <int Bits, class Order>
struct rotated_rows : plain_side {
  using codes = packed_codes<Bits, Order>;
  static constexpr kernel::scalar_codebook book = gaussian_codebook<Bits>();

  codec::rotation rotation = {};

  [[nodiscard]] static constexpr index_t section_bytes(const block_geometry& g) noexcept {
    return codes::section_bytes(g) + scales_bytes(g);
  }
  [[nodiscard]] static constexpr index_t row_bytes(const block_geometry& g) noexcept {
    return codes::row_bytes(g) + index_t{sizeof(bfloat16)};
  }
  static status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                        const_rows rows) {
    return finite_rows(kernels, g, count, rows);
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    alignas(64) std::array<float, max_head_dim> row;
    code_row row_codes;
    for (index_t t = first; t < first + count; ++t) {
      const float unit = to_unit_range(kernels, rows.row(t - first), g.head_dim, row.data());
      rotation.turn(kernels, row.data(), g.head_dim);
      const float scale = kernels.low_bit.nearest(row.data(), g.head_dim, book, row_codes.data());
      set_scale(section + codes::section_bytes(g), t, to_finite_bfloat16(scale * unit));
      codes::put(g, section, t, row_codes.data());
    }
  }

  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t first,
              index_t count, mutable_rows rows) const {
    for (index_t t = first; t < first + count; ++t) {
      const float scale = to_float(section_scales(g, section)[t]);
      float* row = rows.row(t - first);
      for (index_t d = 0; d < g.head_dim; ++d)
        row[d] = static_cast<float>(book.levels[codes::get(g, section, t, d)]);
      rotation.turn_back(kernels, row, g.head_dim);
      for (index_t d = 0; d < g.head_dim; ++d) row[d] *= scale;
    }
  }

 protected:
  static const bfloat16* section_scales(const block_geometry& g, const std::byte* section) noexcept {
    return scales(section + codes::section_bytes(g));
  }
};

}  // namespace detail

template <int Bits>
struct rotated_keys : detail::rotated_rows<Bits, detail::keys_in_order> {
  using rows = detail::rotated_rows<Bits, detail::keys_in_order>;

  [[nodiscard]] rotated_keys at(index_t layer, index_t head) const {
    return {{{}, this->rotation.at(layer, head)}};
  }
  [[nodiscard]] static constexpr index_t prepared_floats(const block_geometry& g) noexcept {
    return kernel::prepared_query_floats(g.head_dim);
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    alignas(64) std::array<float, max_head_dim> row;
    for (index_t r = 0; r < num_rows; ++r) {
      std::copy_n(queries + r * g.head_dim, g.head_dim, row.begin());
      this->rotation.turn(kernels, row.data(), g.head_dim);
      kernels.coarse.prepare(g.head_dim, row.data(), 1, prepared + r * prepared_floats(g));
    }
    return prepared;
  }
  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const std::byte* next) const {
    rows::codes::for_each_piece(g, section, count, next,
                                detail::unpack_through<Bits>(kernels, rows::book.levels),
                                [&](index_t t, index_t num_tokens, const std::byte* bytes) {
                                  kernels.coarse.scores(g, bytes, rows::section_scales(g, section) + t,
                                                        num_tokens, prepared, num_rows, scores + t, nullptr);
                                });
  }
};

template <int Bits>
struct rotated_values : detail::rotated_rows<Bits, detail::values_in_order> {
  using rows = detail::rotated_rows<Bits, detail::values_in_order>;
  static constexpr bool turns_sums = true;

  [[nodiscard]] rotated_values at(index_t layer, index_t head) const {
    return {{{}, this->rotation.at(layer, head)}};
  }
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const std::byte* next) const {
    rows::codes::for_each_piece(g, section, count, next,
                                detail::unpack_through<Bits>(kernels, rows::book.levels),
                                [&](index_t t, index_t num_tokens, const std::byte* bytes) {
                                  kernels.coarse.accumulate(g, bytes, rows::section_scales(g, section) + t,
                                                            num_tokens, weights + t, num_rows, sums, nullptr);
                                });
  }
  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    for (index_t r = 0; r < num_rows; ++r)
      this->rotation.turn_back(kernels, sums + r * g.head_dim, g.head_dim);
  }
};

template <int Bits>
struct rotated : sides<rotated_keys<Bits>, rotated_values<Bits>> {
  static constexpr std::string_view name = Bits == 4 ? "rotated4" : (Bits == 3 ? "rotated3" : "rotated2");
};

static_assert(block_codec<rotated<4>> && block_codec<rotated<3>> && block_codec<rotated<2>>);

}  // namespace kvcache::inline v0::codec
