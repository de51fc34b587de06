// SPDX-License-Identifier: MIT
// mapped_snapshot: a snapshot that is attended over where it lies in the file, read-only and without copying.
//
//   const store::mapped_snapshot<codec::bf16> saved("prefix.kv", {.model = sha256_of_weights});
//   attend(q, saved[layer], out);                    // pages of the file are read as they are needed
//
// Opening checks header, sizes and settings, and takes 0.1 ms for any size; blocks are checked by verify(), if at all.
// Damaged blocks that nobody verified give wrong numbers, and nothing worse.
#pragma once

#include <kvcache/block/order.hpp>
#include <kvcache/block/view.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/identity.hpp>
#include <kvcache/store/io.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/section_io.hpp>
#include <kvcache/store/sequence_image.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

template <described_codec Codec>
class mapped_snapshot;

/// One layer of a mapped snapshot, as attend takes it. Two words; invalidated when the snapshot is moved or destroyed.
template <class Codec>
class mapped_layer {
 public:
  mapped_layer(const mapped_snapshot<Codec>& of, index_t layer) noexcept : of_(&of), layer_(layer) {}

  [[nodiscard]] const cache_shape& shape() const noexcept { return of_->shape(); }
  [[nodiscard]] index_t size() const noexcept { return of_->layer_size(layer_); }
  [[nodiscard]] const Codec& codec() const noexcept { return of_->codec(); }
  [[nodiscard]] decltype(auto) codec(index_t head) const noexcept {
    return codec_at(of_->codec(), layer_, head);
  }
  [[nodiscard]] const position_map& positions() const noexcept { return of_->positions(); }
  [[nodiscard]] const std::byte* block(index_t head, index_t index) const noexcept {
    return of_->block(layer_, head, index);
  }
  [[nodiscard]] index_t num_sealed() const noexcept { return of_->num_sealed(layer_); }
  [[nodiscard]] exact_sinks_view sinks(index_t head) const noexcept { return of_->sinks(layer_, head); }

 private:
  const mapped_snapshot<Codec>* of_;
  index_t layer_;
};

/// Threads: any number of readers. Moved from, it may only be destroyed or assigned to.
template <described_codec Codec = codec::bf16>
class mapped_snapshot {
 public:
  /// Throws load_error, also where blocks are compressed, and std::system_error if there is no such file.
  explicit mapped_snapshot(const std::filesystem::path& path, const expectation& expected = {})
      : mapped_snapshot(std::make_unique<file_source>(path), expected) {}

  [[nodiscard]] const stored_sequence& about() const noexcept { return file_.about; }
  [[nodiscard]] const cache_shape& shape() const noexcept { return file_.about.shape; }
  [[nodiscard]] const Codec& codec() const noexcept { return codec_; }
  [[nodiscard]] const position_map& positions() const noexcept { return positions_; }
  /// Tokens that every layer has.
  [[nodiscard]] index_t size() const noexcept { return file_.about.size(); }
  [[nodiscard]] index_t layer_size(index_t layer) const noexcept { return blocks_of(layer).size; }
  [[nodiscard]] index_t num_sealed(index_t layer) const noexcept { return blocks_of(layer).num_sealed; }

  [[nodiscard]] mapped_layer<Codec> operator[](index_t layer) const noexcept {
    KVCACHE_ASSERT(0 <= layer && layer < shape().num_layers, "the layer must exist");
    return {*this, layer};
  }

  /// The codec's encoding, or codec::exact_tokens' from num_sealed on. \pre the block exists. O(1).
  [[nodiscard]] const std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    const auto i = static_cast<std::size_t>(layer);
    const auto& l = file_.about.layers[i];
    if (index < l.num_sealed)
      return at(file_.blocks(i).offset) + (head * l.num_sealed + index) * file_.about.block_bytes[i];
    return exact_of(i, head) + (index - l.first_exact) * detail::exact_block_bytes(file_.about);
  }
  /// See layer_ref::sinks.
  [[nodiscard]] exact_sinks_view sinks(index_t layer, index_t head) const noexcept {
    const auto i = static_cast<std::size_t>(layer);
    const stored_sequence& s = file_.about;
    if (!s.codec.seals || s.codec.sink_tokens == 0 || s.layers[i].num_sealed == 0) return {};
    return {exact_of(i, head) + detail::num_exact(s, i) * detail::exact_block_bytes(s), s.codec.sink_tokens,
            detail::sink_geometry(s)};
  }

  /// Throws load_error if a block of this layer, or of any, is not what was saved. Reads all of it.
  void verify(index_t layer) const {
    const auto i = static_cast<std::size_t>(layer);
    verify_section(file_.blocks(i));
    if (file_.about.codec.seals) verify_section(file_.exact(i));
  }
  void verify() const {
    for (index_t layer = 0; layer < shape().num_layers; ++layer) verify(layer);
  }

 private:
  mapped_snapshot(std::unique_ptr<const file_source> source_file, const expectation& expected)
      : source_(std::move(source_file)), mapping_(*source_), name_(source_->name()) {
    const memory_source source(mapping_.bytes(), name_);
    file_ = detail::read_contents(source, file_kind::snapshot, expected);
    const stored_sequence& s = file_.about;
    index_t longest = 0;
    for (const section& part : file_.layers) {
      if (part.compression != 0) throw load_error(name_, part.offset, "compressed blocks cannot be mapped");
    }
    for (const auto& l : s.layers) longest = std::max(longest, l.size);
    detail::loading(source, detail::header_bytes, [&] {
      codec_ = make_described<Codec>(s.codec, s.shape);
      kvcache::validate(codec_, s.shape);
      positions_ = position_map(s.positions, longest);
      for (std::size_t i = 0; i < s.layers.size(); ++i) {
        const auto& codec = codec_at(codec_, static_cast<index_t>(i), 0);
        if (s.block_bytes[i] != codec.block_bytes(geometry_of(s.shape)))
          throw shape_error("kvcache: the blocks of this codec have another size");
      }
    });
  }

  [[nodiscard]] const kvcache::detail::layer_blocks& blocks_of(index_t layer) const noexcept {
    return file_.about.layers[static_cast<std::size_t>(layer)];
  }
  [[nodiscard]] const std::byte* at(std::uint64_t offset) const noexcept {
    return mapping_.bytes().data() + offset;
  }
  [[nodiscard]] const std::byte* exact_of(std::size_t layer, index_t head) const noexcept {
    const stored_sequence& s = file_.about;
    const index_t each = detail::num_exact(s, layer) * detail::exact_block_bytes(s) + detail::sink_bytes(s);
    return at(file_.exact(layer).offset) + head * each;
  }

  // Reads the file: the same pages, without the faults that going through the mapping would cost.
  void verify_section(const section& part) const {
    std::vector<std::byte> buffer(detail::run_bytes);
    detail::section_input input(*source_, part, nullptr);
    for (std::uint64_t at = 0; at < part.stored_bytes; at += buffer.size())
      input.read(std::span(buffer).first(
          static_cast<std::size_t>(std::min<std::uint64_t>(buffer.size(), part.stored_bytes - at))));
    input.finish();
  }

  std::unique_ptr<const file_source> source_;
  file_mapping mapping_;
  std::string name_;
  detail::contents file_;
  Codec codec_ = {};
  position_map positions_;
};

static_assert(cache_layer<mapped_layer<codec::bf16>>);

}  // namespace kvcache::inline v0::store
