// SPDX-License-Identifier: MIT
// exact_tokens: tail and sinks of a cache that seals: blocks of codec::bf16, f16 or f32, which of them is chosen at run time.
//
//   bf16   any float, off by up to 2^-8 of itself        the default
//   f16    the same bytes, off by up to 2^-11             rows beyond 65504 are refused
//   f32    twice the bytes, as it is
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <optional>
#include <span>
#include <string_view>

namespace kvcache::inline v0::codec {

/// What a codec by that name is, which has no settings.
struct exact_tokens {
  exact_element element = exact_element::bf16;

  /// visit(codec::bf16{}), or another.
  template <class Visit>
  constexpr decltype(auto) visit(Visit visit) const {
    switch (element) {
      case exact_element::f16:
        return visit(f16{});
      case exact_element::f32:
        return visit(f32{});
      case exact_element::bf16:
        break;
    }
    return visit(bf16{});
  }

  [[nodiscard]] constexpr std::string_view name() const {
    return visit([](const auto& codec) { return codec.name; });
  }
  [[nodiscard]] constexpr index_t block_bytes(const block_geometry& g) const {
    return visit([&](const auto& codec) { return codec.block_bytes(g); });
  }
  [[nodiscard]] constexpr index_t token_bytes(const block_geometry& g) const {
    return visit([&](const auto& codec) { return codec.token_bytes(g); });
  }

  /// Numbers of a row have to be smaller than this. That of f32 is bf16's, beyond which codecs store no scales.
  [[nodiscard]] constexpr float limit() const noexcept {
    return element == exact_element::f16 ? 65520.0F : 0x1.FFp127F;
  }
  /// The largest of them once they are rounded.
  [[nodiscard]] constexpr float largest() const noexcept {
    return element == exact_element::f16 ? 65504.0F : 0x1.FEp127F;
  }

  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* block, index_t first,
              index_t count, const_rows k, const_rows v) const {
    visit([&](const auto& codec) { (void)codec.encode(kernels, g, block, first, count, k, v); });
  }
  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* block, index_t first,
              index_t count, mutable_rows k, mutable_rows v) const {
    visit([&](const auto& codec) { codec.decode(kernels, g, block, first, count, k, v); });
  }
  void move_token(const block_geometry& g, const std::byte* from_block, index_t from_slot,
                  std::byte* to_block, index_t to_slot) const noexcept {
    visit([&](const auto& codec) { codec.move_token(g, from_block, from_slot, to_block, to_slot); });
  }
  /// \param queries  as they are
  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* block, index_t count,
              const float* queries, index_t num_rows, float* scores,
              const kernel::upcoming& next_block) const {
    visit([&](const auto& codec) {
      codec.keys.scores_of_plain(kernels, g, block, count, queries, num_rows, scores,
                                 codec.while_keys_are_read(g, block, num_rows, next_block));
    });
  }
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const kernel::upcoming& next_block) const {
    visit([&](const auto& codec) {
      codec.accumulate(kernels, g, block, count, weights, num_rows, sums, next_block);
    });
  }
};

/// How a cache keeps tokens exact, if it does: `cache.exact_as()` where it says so itself, else by its codec.
template <class Cache>
constexpr std::optional<exact_element> exact_element_in(const Cache& cache) noexcept {
  if constexpr (requires { cache.exact_as(); }) {
    return cache.exact_as();
  } else {
    return keeps_exact(cache.codec()) ? std::optional(exact_element_of(cache.codec())) : std::nullopt;
  }
}

/// Rows that a codec gave back, cut to what a cache stores exactly, if it does: codecs overshoot. NaN and infinity stay.
template <class Cache>
void fit_into(const Cache& cache, std::span<float> rows) noexcept {
  const auto element = exact_element_in(cache);
  if (!element) return;
  const float most = exact_tokens{*element}.largest();
  for (float& x : rows) x = std::isfinite(x) ? std::clamp(x, -most, most) : x;
}

inline constexpr std::array exact_elements = {exact_element::bf16, exact_element::f16, exact_element::f32};

/// "bf16", "f16", "f32"; nothing where it is none of them.
constexpr std::optional<exact_element> exact_element_named(std::string_view name) {
  for (const exact_element element : exact_elements) {
    if (name == exact_tokens{element}.name()) return element;
  }
  return std::nullopt;
}

}  // namespace kvcache::inline v0::codec
