// SPDX-License-Identifier: MIT
// any_codec: keys and values of codecs that are chosen by a string at run time.
//
//   codec::bf16                               "bf16"
//   mixed<channel<4>, rotated<4>>, 128 tokens of exact tail, 4 of sinks      "k=channel4,v=rotated4,sinks=4,tail=128"
//
// One virtual call for each side of each block; the arithmetic is that of the typed codecs.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/sides.hpp>
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

namespace kvcache::inline v0 {

namespace detail {

/// Which head of which layer; unless it is said, none.
struct head_id {
  index_t layer = -1;
  index_t head = -1;
};

/// What any_keys and any_values call; one function for each member of a side.
class erased_side {
 public:
  erased_side() = default;
  erased_side(const erased_side&) = delete;
  erased_side& operator=(const erased_side&) = delete;
  virtual ~erased_side() = default;

  virtual void validate(const cache_shape& shape) const = 0;
  [[nodiscard]] virtual index_t settings_bytes() const noexcept = 0;
  [[nodiscard]] virtual std::string_view side_name() const noexcept = 0;
  virtual void put_settings(std::vector<std::byte>& out) const = 0;
  [[nodiscard]] virtual bool needs_whole_blocks() const noexcept = 0;
  [[nodiscard]] virtual bool stores_bf16() const noexcept = 0;
  [[nodiscard]] virtual index_t section_bytes(head_id where, const block_geometry& g) const noexcept = 0;
  [[nodiscard]] virtual index_t row_bytes(head_id where, const block_geometry& g) const noexcept = 0;
  [[nodiscard]] virtual status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                                       const_rows rows) const = 0;
  virtual void encode(head_id where, const kernel::table& kernels, const block_geometry& g,
                      std::byte* section, index_t first, index_t count, const_rows rows) const = 0;
  virtual void decode(head_id where, const kernel::table& kernels, const block_geometry& g,
                      const std::byte* section, index_t first, index_t count, mutable_rows rows) const = 0;
  [[nodiscard]] virtual bool moves_rows() const noexcept = 0;
  virtual void move_row(head_id where, const block_geometry& g, const std::byte* from, index_t from_slot,
                        std::byte* to, index_t to_slot) const noexcept = 0;
};

class erased_keys : public erased_side {
 public:
  /// The same keys with a mean that turns so; null where they have none that can.
  [[nodiscard]] virtual std::shared_ptr<const erased_keys> turning_with(
      const std::shared_ptr<const codec::rope_turns>& turns) const = 0;
  [[nodiscard]] virtual index_t prepared_floats(head_id where, const block_geometry& g) const noexcept = 0;
  virtual const float* prepare(head_id where, const kernel::table& kernels, const block_geometry& g,
                               const float* queries, index_t num_rows, float* prepared) const = 0;
  virtual void scores(head_id where, const kernel::table& kernels, const block_geometry& g,
                      const std::byte* section, index_t count, const float* prepared, index_t num_rows,
                      float* scores, const kernel::upcoming& next) const = 0;
};

class erased_values : public erased_side {
 public:
  [[nodiscard]] virtual bool turns_sums() const noexcept = 0;
  virtual void accumulate(head_id where, const kernel::table& kernels, const block_geometry& g,
                          const std::byte* section, index_t count, const float* weights, index_t num_rows,
                          float* sums, const kernel::upcoming& next) const = 0;
  virtual void finish(head_id where, const kernel::table& kernels, const block_geometry& g, index_t num_rows,
                      float* sums) const = 0;
};

/// \tparam Base  erased_keys or erased_values
template <class Base, codec::described_side Side>
class erased_side_of : public Base {
 public:
  explicit erased_side_of(const Side& side) : side_(side) {}

  void validate(const cache_shape& shape) const override { kvcache::validate(side_, shape); }
  [[nodiscard]] index_t settings_bytes() const noexcept override { return kvcache::settings_bytes(side_); }
  [[nodiscard]] std::string_view side_name() const noexcept override { return side_.side_name(); }
  void put_settings([[maybe_unused]] std::vector<std::byte>& out) const override {
    if constexpr (!std::is_empty_v<Side>) side_.put_settings(out);
  }
  [[nodiscard]] bool needs_whole_blocks() const noexcept override { return side_.needs_whole_blocks; }
  [[nodiscard]] bool stores_bf16() const noexcept override { return codec::stores_bf16(side_); }
  [[nodiscard]] index_t section_bytes(head_id where, const block_geometry& g) const noexcept override {
    return size_of(where, [&g](const auto& side) { return side.section_bytes(g); });
  }
  [[nodiscard]] index_t row_bytes(head_id where, const block_geometry& g) const noexcept override {
    return size_of(where, [&g](const auto& side) { return side.row_bytes(g); });
  }
  [[nodiscard]] status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                               const_rows rows) const override {
    return side_.accepts(kernels, g, count, rows);
  }
  void encode(head_id where, const kernel::table& kernels, const block_geometry& g, std::byte* section,
              index_t first, index_t count, const_rows rows) const override {
    at(where).encode(kernels, g, section, first, count, rows);
  }
  void decode(head_id where, const kernel::table& kernels, const block_geometry& g, const std::byte* section,
              index_t first, index_t count, mutable_rows rows) const override {
    at(where).decode(kernels, g, section, first, count, rows);
  }
  [[nodiscard]] bool moves_rows() const noexcept override { return codec::moves_rows(side_); }
  void move_row(head_id where, const block_geometry& g, const std::byte* from, index_t from_slot,
                std::byte* to, index_t to_slot) const noexcept override {
    if constexpr (codec::row_moving_side<Side>) at(where).move_row(g, from, from_slot, to, to_slot);
  }

 protected:
  /// Where no head is named, the first.
  [[nodiscard]] decltype(auto) at(head_id where) const {
    return codec_at(side_, std::max(where.layer, index_t{0}), std::max(where.head, index_t{0}));
  }
  [[nodiscard]] const Side& side() const noexcept { return side_; }
  /// What the side says for one head, or for none.
  template <class Size>
  [[nodiscard]] index_t size_of(head_id where, Size size) const noexcept {
    return where.layer < 0 ? size(side_) : size(at(where));
  }

 private:
  [[no_unique_address]] Side side_;
};

template <codec::key_side Keys>
class erased_keys_of final : public erased_side_of<erased_keys, Keys> {
 public:
  using erased_side_of<erased_keys, Keys>::erased_side_of;

  [[nodiscard]] std::shared_ptr<const erased_keys> turning_with(
      [[maybe_unused]] const std::shared_ptr<const codec::rope_turns>& turns) const override {
    if constexpr (requires(Keys & keys) { keys.turns = turns; }) {
      Keys keys = this->side();
      keys.turns = turns;
      return std::make_shared<erased_keys_of>(keys);
    } else {
      return nullptr;
    }
  }
  [[nodiscard]] index_t prepared_floats(head_id where, const block_geometry& g) const noexcept override {
    return this->size_of(where, [&g](const auto& side) { return side.prepared_floats(g); });
  }
  const float* prepare(head_id where, const kernel::table& kernels, const block_geometry& g,
                       const float* queries, index_t num_rows, float* prepared) const override {
    return this->at(where).prepare(kernels, g, queries, num_rows, prepared);
  }
  void scores(head_id where, const kernel::table& kernels, const block_geometry& g, const std::byte* section,
              index_t count, const float* prepared, index_t num_rows, float* scores,
              const kernel::upcoming& next) const override {
    this->at(where).scores(kernels, g, section, count, prepared, num_rows, scores, next);
  }
};

template <codec::value_side Values>
class erased_values_of final : public erased_side_of<erased_values, Values> {
 public:
  using erased_side_of<erased_values, Values>::erased_side_of;

  [[nodiscard]] bool turns_sums() const noexcept override { return this->side().turns_sums; }
  void accumulate(head_id where, const kernel::table& kernels, const block_geometry& g,
                  const std::byte* section, index_t count, const float* weights, index_t num_rows,
                  float* sums, const kernel::upcoming& next) const override {
    this->at(where).accumulate(kernels, g, section, count, weights, num_rows, sums, next);
  }
  void finish(head_id where, const kernel::table& kernels, const block_geometry& g, index_t num_rows,
              float* sums) const override {
    this->at(where).finish(kernels, g, num_rows, sums);
  }
};

/// What any_keys and any_values have in common. \tparam Erased  erased_keys or erased_values
template <class Erased>
struct any_side {
  std::shared_ptr<const Erased> erased;
  head_id where = {};
  bool needs_whole_blocks = erased->needs_whole_blocks();
  bool stores_bf16 = erased->stores_bf16();

  void validate(const cache_shape& shape) const { erased->validate(shape); }
  [[nodiscard]] index_t settings_bytes() const noexcept { return erased->settings_bytes(); }
  [[nodiscard]] std::string_view side_name() const noexcept { return erased->side_name(); }
  void put_settings(std::vector<std::byte>& out) const { erased->put_settings(out); }

  [[nodiscard]] index_t section_bytes(const block_geometry& g) const noexcept {
    return erased->section_bytes(where, g);
  }
  [[nodiscard]] index_t row_bytes(const block_geometry& g) const noexcept {
    return erased->row_bytes(where, g);
  }
  [[nodiscard]] status accepts(const kernel::table& kernels, const block_geometry& g, index_t count,
                               const_rows rows) const {
    return erased->accepts(kernels, g, count, rows);
  }
  void encode(const kernel::table& kernels, const block_geometry& g, std::byte* section, index_t first,
              index_t count, const_rows rows) const {
    erased->encode(where, kernels, g, section, first, count, rows);
  }
  void decode(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t first,
              index_t count, mutable_rows rows) const {
    erased->decode(where, kernels, g, section, first, count, rows);
  }
  [[nodiscard]] bool moves_rows() const noexcept { return erased->moves_rows(); }
  void move_row(const block_geometry& g, const std::byte* from, index_t from_slot, std::byte* to,
                index_t to_slot) const noexcept {
    erased->move_row(where, g, from, from_slot, to, to_slot);
  }
};

}  // namespace detail

namespace codec {

/// The keys of any codec; those of bf16 unless given.
struct any_keys : kvcache::detail::any_side<kvcache::detail::erased_keys> {
  any_keys() : any_keys(of(bf16::keys_type{})) {}
  template <key_side Keys>
  static any_keys of(const Keys& keys) {
    return any_keys(std::make_shared<kvcache::detail::erased_keys_of<Keys>>(keys));
  }
  /// As they were described, those of any codec that make_codec knows. Defined in interop/known_codecs.hpp. Throws
  /// shape_error.
  static any_keys from_description(const side_description& described, const cache_shape& shape);

  /// The same with a mean that turns so, where they are centred_keys; else as they are.
  [[nodiscard]] any_keys turning_with(const std::shared_ptr<const rope_turns>& turns) const {
    auto made = erased->turning_with(turns);
    return made ? any_keys(std::move(made)) : *this;
  }

  [[nodiscard]] any_keys at(index_t layer, index_t head) const {
    any_keys here = *this;
    here.where = {layer, head};
    return here;
  }
  [[nodiscard]] index_t prepared_floats(const block_geometry& g) const noexcept {
    return erased->prepared_floats(where, g);
  }
  const float* prepare(const kernel::table& kernels, const block_geometry& g, const float* queries,
                       index_t num_rows, float* prepared) const {
    return erased->prepare(where, kernels, g, queries, num_rows, prepared);
  }
  void scores(const kernel::table& kernels, const block_geometry& g, const std::byte* section, index_t count,
              const float* prepared, index_t num_rows, float* scores, const kernel::upcoming& next) const {
    erased->scores(where, kernels, g, section, count, prepared, num_rows, scores, next);
  }

 private:
  explicit any_keys(std::shared_ptr<const kvcache::detail::erased_keys> keys) : any_side{std::move(keys)} {}
};

/// The values of any codec; those of bf16 unless given.
struct any_values : kvcache::detail::any_side<kvcache::detail::erased_values> {
  bool turns_sums = erased->turns_sums();

  any_values() : any_values(of(bf16::values_type{})) {}
  template <value_side Values>
  static any_values of(const Values& values) {
    return any_values(std::make_shared<kvcache::detail::erased_values_of<Values>>(values));
  }
  static any_values from_description(const side_description& described, const cache_shape& shape);

  [[nodiscard]] any_values at(index_t layer, index_t head) const {
    any_values here = *this;
    here.where = {layer, head};
    return here;
  }
  void accumulate(const kernel::table& kernels, const block_geometry& g, const std::byte* section,
                  index_t count, const float* weights, index_t num_rows, float* sums,
                  const kernel::upcoming& next) const {
    erased->accumulate(where, kernels, g, section, count, weights, num_rows, sums, next);
  }
  void finish(const kernel::table& kernels, const block_geometry& g, index_t num_rows, float* sums) const {
    erased->finish(where, kernels, g, num_rows, sums);
  }

 private:
  explicit any_values(std::shared_ptr<const kvcache::detail::erased_values> values)
      : any_side{std::move(values)} {}
};

}  // namespace codec

/// A codec as a value. Copies share what cannot change.
struct any_codec : codec::sides<codec::any_keys, codec::any_values> {
  static constexpr std::string_view name = "any";
  index_t tail_tokens = 0;  ///< as in codec::exact_tail
  index_t sink_tokens = 0;  ///< as in codec::exact_sinks
  codec::exact_element exact_as =
      codec::exact_element::bf16;  ///< how they are stored, see codec/exact_tokens.hpp
};

static_assert(sealing_codec<any_codec>);

}  // namespace kvcache::inline v0
