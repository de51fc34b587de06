// SPDX-License-Identifier: MIT
// layer_descriptions: what a by_layer codec is stored as. A side of it is described by the name "by_layer" and, as
// settings, little-endian:
//
//   u32 number of codecs | for each: u32 bytes of its name, name, u64 bytes of its settings, settings | u32 of each layer: its codec
#pragma once

#include <kvcache/codec/description.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::codec {

/// The sides of the codecs of a by_layer, and which of them each layer has.
struct layer_descriptions {
  static constexpr std::string_view side_name = "by_layer";
  /// A few hundred bytes of settings may stand for tables of some hundred KiB (rope_turns); a file is believed no more.
  static constexpr std::size_t max_sides = 256;

  std::vector<side_description> sides = {};
  std::vector<index_t> of_layer = {};  ///< [num_layers]

  /// Throws std::bad_alloc.
  [[nodiscard]] side_description as_side() const {
    side_description made{std::string(side_name), {}};
    const auto put = [&](const void* data, std::size_t bytes) {
      const auto* from = static_cast<const std::byte*>(data);
      made.settings.insert(made.settings.end(), from, from + bytes);
    };
    const auto put_number = [&](auto number) { put(&number, sizeof number); };
    put_number(static_cast<std::uint32_t>(sides.size()));
    for (const side_description& side : sides) {
      put_number(static_cast<std::uint32_t>(side.name.size()));
      put(side.name.data(), side.name.size());
      put_number(static_cast<std::uint64_t>(side.settings.size()));
      put(side.settings.data(), side.settings.size());
    }
    for (const index_t i : of_layer) put_number(static_cast<std::uint32_t>(i));
    return made;
  }

  /// Throws shape_error where the bytes are none of as_side() for so many layers; std::bad_alloc.
  static layer_descriptions from_side(const side_description& side, index_t num_layers) {
    std::span<const std::byte> left = side.settings;
    const auto take = [&](std::uint64_t bytes) {
      if (bytes > left.size()) throw shape_error("kvcache: the codecs by layer end too early");
      const auto taken = left.first(static_cast<std::size_t>(bytes));
      left = left.subspan(taken.size());
      return taken;
    };
    const auto take_number = [&]<class Number>(Number number) {
      std::memcpy(&number, take(sizeof number).data(), sizeof number);
      return number;
    };
    layer_descriptions made;
    const auto num_codecs = take_number(std::uint32_t{});
    if (num_codecs > std::min(max_sides, static_cast<std::size_t>(num_layers)))
      throw shape_error("kvcache: there are more codecs by layer than a file may have, or layers");
    for (std::uint32_t i = 0; i < num_codecs; ++i) {
      side_description& next = made.sides.emplace_back();
      const auto name = take(take_number(std::uint32_t{}));
      next.name.assign(reinterpret_cast<const char*>(name.data()), name.size());
      const auto settings = take(take_number(std::uint64_t{}));
      next.settings.assign(settings.begin(), settings.end());
      if (next.name == side_name) throw shape_error("kvcache: codecs by layer within codecs by layer");
    }
    if (left.size() / sizeof(std::uint32_t) != static_cast<std::size_t>(num_layers) ||
        left.size() % sizeof(std::uint32_t) != 0)
      throw shape_error("kvcache: the codecs by layer are not for " + std::to_string(num_layers) + " layers");
    for (index_t layer = 0; layer < num_layers; ++layer)
      made.of_layer.push_back(index_t{take_number(std::uint32_t{})});
    return made;
  }
};

}  // namespace kvcache::inline v0::codec
