// SPDX-License-Identifier: MIT
// by_layer: a codec for each layer, as where the first and the last layers, which cost the most when they are coarse, get more bits.
//
//   const auto codec = codec::by_layer<any_codec>::ends(32, 2, 2, make_codec("int8"), make_codec("k=channel4,v=rotated4"));
//
//   layer     0    1    2         3                     29        30   31
//   codec   int8 int8 channel4+rotated4   ...   channel4+rotated4 int8 int8      each layer's blocks have a size of their own
//
// Codec is one type with settings that differ, or any_codec. Tail and sinks are settings of the sequence, not of a layer: where
// one layer's codec needs whole blocks, every layer keeps its newest tokens exact until a block is full, and where one
// asks for a tail or sinks all have it, f32 layers too.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/layer_descriptions.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvcache::inline v0::codec {

namespace detail {

struct no_sealing_options {};

template <class Codec>
using by_layer_options = std::conditional_t<sealing_codec<Codec>, sealing_options, no_sealing_options>;

}  // namespace detail

/// Copies share the codecs. What it says of itself (`block_bytes`, `prepared_floats`, ...) is the most of any layer.
template <block_codec Codec>
class by_layer : public detail::by_layer_options<Codec> {
 public:
  static constexpr std::string_view name = "by_layer";

  /// One codec for every layer, however many there are.
  by_layer() : by_layer(Codec{}) {}
  by_layer(const Codec& everywhere) : by_layer(std::vector<Codec>{everywhere}, {}) {}

  /// \param layers  [num_layers]. Throws shape_error if there are none.
  explicit by_layer(const std::vector<Codec>& layers) : by_layer(layers, identity(layers.size())) {}

  /// \param codecs    those that occur, each once; others are left out
  /// \param of_layer  [num_layers] which of them a layer has; empty: every layer has the first
  /// Tail and sinks, where there are such settings, are the longest of any codec, and stored as the finest of them says. Throws shape_error if an index is wrong.
  by_layer(std::vector<Codec> codecs, std::vector<index_t> of_layer) {
    if (codecs.empty()) throw shape_error("kvcache: by_layer needs a codec");
    if (of_layer.empty()) codecs.erase(codecs.begin() + 1, codecs.end());  // no layer has them
    for (const index_t i : of_layer) {
      if (i < 0 || i >= static_cast<index_t>(codecs.size()))
        throw shape_error("kvcache: by_layer: a layer names codec " + std::to_string(i) + " of " +
                          std::to_string(codecs.size()));
    }
    if constexpr (sealing_codec<Codec>) {
      for (const Codec& codec : codecs) {
        this->tail_tokens = std::max(this->tail_tokens, codec.tail_tokens);
        this->sink_tokens = std::max(this->sink_tokens, codec.sink_tokens);
        this->exact_as = std::max(this->exact_as, codec.exact_as);
      }
    }
    leave_out_unused(codecs, of_layer);
    settings_ = std::make_shared<const settings>(settings{std::move(codecs), std::move(of_layer)});
  }

  /// The first `first` and the last `last` of `num_layers` layers with one codec, those between them with another.
  /// Throws shape_error if there are not so many.
  static by_layer ends(index_t num_layers, index_t first, index_t last, const Codec& at_ends,
                       const Codec& between) {
    if (first < 0 || last < 0 || first > num_layers || last > num_layers)
      throw shape_error("kvcache: by_layer: first and last must be 0 to num_layers, which is " +
                        std::to_string(num_layers));
    std::vector<index_t> of_layer;
    for (index_t layer = 0; layer < num_layers; ++layer)
      of_layer.push_back(layer < first || layer >= num_layers - last ? 0 : 1);
    return by_layer({at_ends, between}, std::move(of_layer));
  }

  /// The codec of a layer. \pre the layer exists
  [[nodiscard]] const Codec& of(index_t layer) const noexcept {
    const settings& s = *settings_;
    return s
        .codecs[s.of_layer.empty() ? 0
                                   : static_cast<std::size_t>(s.of_layer[static_cast<std::size_t>(layer)])];
  }
  /// Those that occur, and which of them each layer has; where that list is empty, all have the first.
  [[nodiscard]] const std::vector<Codec>& codecs() const noexcept { return settings_->codecs; }
  [[nodiscard]] const std::vector<index_t>& of_layer() const noexcept { return settings_->of_layer; }

  [[nodiscard]] decltype(auto) at(index_t layer, index_t head) const {
    return codec_at(of(layer), layer, head);
  }

  /// Throws shape_error if there are codecs for another number of layers, or the settings of one do not fit.
  void validate(const cache_shape& shape) const {
    const auto num_layers = static_cast<index_t>(settings_->of_layer.size());
    if (num_layers != 0 && num_layers != shape.num_layers)
      throw shape_error("kvcache: by_layer has codecs for " + std::to_string(num_layers) +
                        " layers, the shape has " + std::to_string(shape.num_layers));
    for (const Codec& codec : settings_->codecs) kvcache::validate(codec, shape);
  }

  /// Bytes of what the codecs refer to, each codec counted once for all of its layers.
  [[nodiscard]] index_t settings_bytes() const noexcept {
    index_t bytes = 0;
    for (const Codec& codec : settings_->codecs) bytes += kvcache::settings_bytes(codec);
    return bytes;
  }

  [[nodiscard]] bool needs_whole_blocks() const noexcept {
    return any([](const Codec& codec) { return codec.needs_whole_blocks(); });
  }
  [[nodiscard]] bool turns_sums() const noexcept {
    return any([](const Codec& codec) { return codec.turns_sums(); });
  }
  [[nodiscard]] index_t block_bytes(const block_geometry& g) const noexcept {
    return most([&](const Codec& codec) { return codec.block_bytes(g); });
  }
  [[nodiscard]] index_t token_bytes(const block_geometry& g) const noexcept {
    return most([&](const Codec& codec) { return codec.token_bytes(g); });
  }
  [[nodiscard]] index_t prepared_floats(const block_geometry& g) const noexcept {
    return most([&](const Codec& codec) { return codec.prepared_floats(g); });
  }

  /// Tokens change places where they can in every layer; each layer through at().
  [[nodiscard]] bool moves_tokens() const noexcept {
    return !any([](const Codec& codec) { return !kvcache::moves_tokens(codec); });
  }
  void move_token(const block_geometry& g, const std::byte* from_block, index_t from_slot,
                  std::byte* to_block, index_t to_slot) const noexcept requires token_moving_codec<Codec> {
    only().move_token(g, from_block, from_slot, to_block, to_slot);
  }

  /// One codec for all layers is described as that codec is; of equal ones the first counts. Throws shape_error if there are
  /// more different ones than layer_descriptions::max_sides, std::bad_alloc.
  [[nodiscard]] codec_description description() const requires described_codec<Codec>;
  /// Throws shape_error, as make_described.
  static by_layer from_description(const codec_description& described,
                                   const cache_shape& shape) requires described_codec<Codec>;

  // What is done to blocks is done through at(); these are for where all layers have the same codec.

  status encode(const kernel::table& kernels, const block_geometry& g, std::byte* block, index_t first,
                index_t count, const_rows k, const_rows v) const {
    return only().encode(kernels, g, block, first, count, k, v);
  }
  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* block, index_t first,
              index_t count, mutable_rows k, mutable_rows v) const {
    only().decode(kernels, g, block, first, count, k, v);
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    return only().prepare(kernels, g, queries, num_rows, prepared);
  }
  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* block, index_t count,
              const float* prepared, index_t num_rows, float* scores,
              const kernel::upcoming& next_block) const {
    only().scores(kernels, g, block, count, prepared, num_rows, scores, next_block);
  }
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* block,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const kernel::upcoming& next_block) const {
    only().accumulate(kernels, g, block, count, weights, num_rows, sums, next_block);
  }
  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    only().finish(kernels, g, num_rows, sums);
  }

 private:
  /// What no layer has must neither seal nor count.
  static void leave_out_unused(std::vector<Codec>& codecs, std::vector<index_t>& of_layer) {
    if (of_layer.empty()) return;
    std::vector<index_t> now(codecs.size(), -1);
    std::vector<Codec> used;
    for (std::size_t i = 0; i < codecs.size(); ++i) {
      if (std::find(of_layer.begin(), of_layer.end(), static_cast<index_t>(i)) == of_layer.end()) continue;
      now[i] = static_cast<index_t>(used.size());
      used.push_back(std::move(codecs[i]));
    }
    for (index_t& layer : of_layer) layer = now[static_cast<std::size_t>(layer)];
    codecs = std::move(used);
  }

  struct settings {
    std::vector<Codec> codecs;
    std::vector<index_t> of_layer;  // [num_layers], or empty: all have the first codec
  };

  static std::vector<index_t> identity(std::size_t num_layers) {
    std::vector<index_t> of_layer;
    for (std::size_t i = 0; i < num_layers; ++i) of_layer.push_back(static_cast<index_t>(i));
    return of_layer;
  }

  [[nodiscard]] const Codec& only() const noexcept {
    KVCACHE_ASSERT(settings_->codecs.size() == 1,
                   "by_layer: where layers differ, blocks are read and written through at(layer, head)");
    return settings_->codecs.front();
  }

  template <class Holds>
  [[nodiscard]] bool any(Holds holds) const noexcept {
    return std::any_of(settings_->codecs.begin(), settings_->codecs.end(), holds);
  }
  template <class Count>
  [[nodiscard]] index_t most(Count count) const noexcept {
    index_t largest = 0;
    for (const Codec& codec : settings_->codecs) largest = std::max(largest, count(codec));
    return largest;
  }

  std::shared_ptr<const settings> settings_;
};

template <block_codec Codec>
codec_description by_layer<Codec>::description() const requires described_codec<Codec> {
  const settings& s = *settings_;
  codec_description made = describe(s.codecs.front());
  if (s.codecs.size() > 1) {
    layer_descriptions keys;
    layer_descriptions values;
    std::vector<index_t> place;  // of each codec among those that are told apart
    for (const Codec& codec : s.codecs) {
      codec_description one = describe(codec);
      made.seals = made.seals || one.seals;
      std::size_t i = 0;
      while (i < keys.sides.size() && (keys.sides[i] != one.keys || values.sides[i] != one.values)) ++i;
      place.push_back(static_cast<index_t>(i));
      if (i < keys.sides.size()) continue;
      keys.sides.push_back(std::move(one.keys));
      values.sides.push_back(std::move(one.values));
    }
    if (keys.sides.size() > layer_descriptions::max_sides)
      throw shape_error("kvcache: by_layer: files hold " + std::to_string(layer_descriptions::max_sides) +
                        " different codecs, not " + std::to_string(keys.sides.size()));
    for (const index_t i : s.of_layer) keys.of_layer.push_back(place[static_cast<std::size_t>(i)]);
    values.of_layer = keys.of_layer;
    made.keys = keys.as_side();
    made.values = values.as_side();
  }
  if constexpr (sealing_codec<Codec>) {
    made.tail_tokens = this->tail_tokens;
    made.sink_tokens = this->sink_tokens;
    made.seals = made.seals || made.tail_tokens != 0 || made.sink_tokens != 0;
    made.exact_as = made.seals ? this->exact_as : exact_element::bf16;
  }
  return made;
}

template <block_codec Codec>
by_layer<Codec> by_layer<Codec>::from_description(const codec_description& described,
                                                  const cache_shape& shape) requires described_codec<Codec> {
  const auto codec_from = [&](const side_description& keys, const side_description& values) {
    codec_description one{
        keys, values, described.tail_tokens, described.sink_tokens, described.seals, described.exact_as};
    return kvcache::detail::from_sides<Codec>(one, shape);
  };
  const bool keys_by_layer = described.keys.name == layer_descriptions::side_name;
  if (keys_by_layer != (described.values.name == layer_descriptions::side_name))
    throw shape_error("kvcache: keys and values are not both of codecs by layer");
  if (!keys_by_layer) return by_layer({codec_from(described.keys, described.values)}, {});
  const auto keys = layer_descriptions::from_side(described.keys, shape.num_layers);
  const auto values = layer_descriptions::from_side(described.values, shape.num_layers);
  if (keys.sides.size() != values.sides.size() || keys.of_layer != values.of_layer)
    throw shape_error("kvcache: keys and values have other codecs by layer");
  std::vector<Codec> codecs;
  for (std::size_t i = 0; i < keys.sides.size(); ++i)
    codecs.push_back(codec_from(keys.sides[i], values.sides[i]));
  return by_layer(std::move(codecs), keys.of_layer);
}

}  // namespace kvcache::inline v0::codec
