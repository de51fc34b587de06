// SPDX-License-Identifier: MIT
// load: a sequence from a snapshot, into a container of any kind with the same codec.
//
//   auto [cache, about] = store::load<chunked_cache<codec::int8>>("chat.kv", {.expect = {.model = sha256_of_weights}});
//   store::load_into(sequence_of_a_pool, "chat.kv");
//
// Nothing is believed that is not checked: sizes before memory is taken for them, checksums and settings before the
// sequence is used. On any damage: load_error, and the target is as before.
#pragma once

#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/layer_descriptions.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/format.hpp>
#include <kvcache/store/identity.hpp>
#include <kvcache/store/io.hpp>
#include <kvcache/store/section_io.hpp>
#include <kvcache/store/sequence_image.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <istream>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

struct load_options {
  expectation expect = {};
  /// Bytes that may be taken beyond those of the sections: an exact tail has room for more than a short sequence fills, and
  /// layers of different length take what the longest does. More than that is a load_error.
  index_t slack_limit_bytes = 256_MiB;
  const section_compressor* compression = nullptr;  ///< needed where save was given one
};

/// A sequence and what its file said of it.
template <class Cache>
struct loaded {
  Cache cache;
  stored_sequence about;
};

namespace detail {

/// A file's header and small sections, read and checked: all but the blocks.
struct contents {
  stored_sequence about;
  std::uint64_t end = 0;  ///< of the sections: where the records of a journal begin
  std::vector<section>
      layers;  ///< blocks of layer 0, exact of layer 0 if the codec seals, blocks of layer 1, ...

  [[nodiscard]] const section& blocks(std::size_t layer) const {
    return layers[layer * (about.codec.seals ? 2 : 1)];
  }
  [[nodiscard]] const section& exact(std::size_t layer) const { return layers[2 * layer + 1]; }
};

/// Runs `body`; a shape_error it throws becomes a load_error at `offset`.
template <class Body>
decltype(auto) loading(const byte_source& source, std::uint64_t offset, Body body) {
  try {
    return body();
  } catch (const shape_error& error) {
    throw load_error(source.name(), offset, error.what());
  }
}

inline constexpr std::size_t num_small_sections = 5;

/// Throws load_error unless the sections are those of a sequence like `about`, in order.
inline void check_layer_sections(const byte_source& source, const contents& file) {
  const stored_sequence& s = file.about;
  const std::size_t each = s.codec.seals ? 2 : 1;
  if (file.layers.size() != each * static_cast<std::size_t>(s.shape.num_layers))
    throw load_error(source.name(), 40, "there are not as many sections as there must be");
  for (std::size_t i = 0; i < file.layers.size(); ++i) {
    const section& has = file.layers[i];
    const std::size_t layer = i / each;
    const bool is_exact_part = i % each == 1;
    const index_t bytes = loading(
        source, has.offset, [&] { return is_exact_part ? exact_bytes(s, layer) : blocks_bytes(s, layer); });
    if (has.kind != (is_exact_part ? section_kind::exact : section_kind::blocks) || has.layer != layer ||
        has.raw_bytes != static_cast<std::uint64_t>(bytes))
      throw load_error(source.name(), has.offset, "a section is not what belongs there");
  }
}

/// Sizes of layers as they can be at all; what the codec thinks of them is seen later.
inline void check_layers(const stored_sequence& s) {
  constexpr index_t most = index_t{1} << 56;
  for (const auto& l : s.layers) {
    const index_t all = ceil_div(l.size, s.shape.block_size);
    const bool possible =
        l.size <= most && l.num_sealed <= all && l.first_exact <= all &&
        (s.codec.seals ? l.first_exact <= l.num_sealed && l.num_sealed <= l.size / s.shape.block_size
                       : l.num_sealed == all && l.first_exact == all);
    if (!possible) throw shape_error("kvcache: a layer cannot have these blocks");
  }
  if (s.codec.sink_tokens > s.shape.block_size)
    throw shape_error("kvcache: there are more sinks than a block has tokens");
}

/// Whether a side is of those whose codes had other tables in files of version 1. Throws shape_error.
inline bool has_codes_of_trellises(const side_description& side, index_t num_layers) {
  if (side.name == codec::layer_descriptions::side_name) {
    const auto sides = codec::layer_descriptions::from_side(side, num_layers).sides;
    return std::any_of(sides.begin(), sides.end(),
                       [&](const side_description& s) { return has_codes_of_trellises(s, num_layers); });
  }
  std::string_view name = side.name;
  if (constexpr std::string_view centred = "centred_"; name.starts_with(centred))
    name.remove_prefix(centred.size());
  return name.starts_with("trellis") || name == "klt";
}

/// Throws load_error.
inline void check_codes(const byte_source& source, std::uint32_t version, const stored_sequence& s) {
  if (version > 1) return;
  const bool are_old = loading(source, header_bytes, [&] {
    return has_codes_of_trellises(s.codec.keys, s.shape.num_layers) ||
           has_codes_of_trellises(s.codec.values, s.shape.num_layers);
  });
  if (are_old)
    throw load_error(source.name(), 12,
                     "codes of trellis and klt in a file of format version 1 cannot be read");
}

inline contents read_contents(const byte_source& source, file_kind kind, const expectation& expected) {
  header_reader header(source, kind);
  std::vector<section> sections = header.take_sections();
  if (sections.size() < num_small_sections)
    throw load_error(source.name(), 40, "there are not as many sections as there must be");
  std::vector<std::vector<std::byte>> bytes;
  for (std::size_t i = 0; i < num_small_sections; ++i) {
    if (sections[i].kind != static_cast<section_kind>(i + 1) || sections[i].layer != 0)
      throw load_error(source.name(), sections[i].offset, "a section is not what belongs there");
    bytes.push_back(read_section(source, sections[i]));
    check_padding(source, sections[i]);
  }
  const auto reader = [&](std::size_t i) { return byte_reader(bytes[i], source.name(), sections[i].offset); };
  contents file;
  file.end = header.file_bytes();
  stored_sequence& s = file.about;
  s = decode_description(reader(0));
  check_expectation(s, expected, source.name(), sections[0].offset);
  loading(source, sections[0].offset, [&] { check_layers(s); });
  s.codec.keys.settings = std::move(bytes[1]);
  s.codec.values.settings = std::move(bytes[2]);
  check_codes(source, header.version(), s);
  s.who.tokens = decode_tokens(bytes[3]);
  if (bytes[3].size() % sizeof(token_id) != 0 ||
      (!s.who.tokens.empty() && static_cast<index_t>(s.who.tokens.size()) != s.size()))
    throw load_error(source.name(), sections[3].offset, "there is not one token id for each token");
  s.positions = decode_positions(reader(4));
  file.layers.assign(sections.begin() + num_small_sections, sections.end());
  const bool is_empty = file.layers.empty() &&
                        std::all_of(s.layers.begin(), s.layers.end(), [](auto& l) { return l.size == 0; });
  if (kind == file_kind::snapshot) {
    check_layer_sections(source, file);
  } else if (!is_empty) {
    throw load_error(source.name(), 40, "a journal has no blocks before its records");
  }
  return file;
}

/// Whether a cache of the file's codec fits its blocks. Throws shape_error.
template <class Cache>
void check_fit(const Cache& cache, const stored_sequence& s) {
  for (std::size_t i = 0; i < s.layers.size(); ++i) {
    if (s.block_bytes[i] != access::block_bytes(cache, static_cast<index_t>(i)))
      throw shape_error("kvcache: the blocks of this codec have another size");
    if (!access::is_possible(cache, s.layers[i]))
      throw shape_error("kvcache: a layer cannot have these blocks");
  }
}

/// Reads the sections of the layers into an empty cache. Throws load_error, capacity_error; the cache is of no use then.
template <class Cache>
void read_layers(const byte_source& source, const contents& file, const load_options& options, Cache& cache) {
  const stored_sequence& s = file.about;
  index_t longest = 0;
  for (const auto& l : s.layers) longest = std::max(longest, l.size);
  position_map positions =
      loading(source, file.layers.front().offset, [&] { return position_map(s.positions, longest); });
  if (const status code = access::prepare(cache, s.layers, 0); code != status::ok)
    throw capacity_error("load", code);
  const index_t heads = s.shape.num_kv_heads;
  const auto with_runs = [&](const section& part, auto body) {
    section_input input(source, part, options.compression);
    const auto read = [&](std::span<std::byte> to) { input.read(to); };
    runs<std::byte, decltype(read)> joined(read, run_bytes);
    body(joined);
    joined.flush();
    input.finish();
  };
  for (index_t layer = 0; layer < s.shape.num_layers; ++layer) {
    const auto i = static_cast<std::size_t>(layer);
    const auto& l = s.layers[i];
    with_runs(file.blocks(i), [&](auto& to) {
      for (index_t head = 0; l.num_sealed > 0 && head < heads; ++head) {
        for (index_t b = 0; b < l.num_sealed; ++b)
          to.add(access::block(cache, layer, head, b), static_cast<std::size_t>(s.block_bytes[i]));
      }
    });
    if (!s.codec.seals) continue;
    const index_t all = ceil_div(l.size, s.shape.block_size);
    std::vector<std::byte> unused(static_cast<std::size_t>(l.size == 0 ? sink_bytes(s) : 0));
    with_runs(file.exact(i), [&](auto& to) {
      for (index_t head = 0; file.exact(i).raw_bytes > 0 && head < heads; ++head) {
        for (index_t b = l.first_exact; b < all; ++b)
          to.add(access::exact_block(cache, layer, head, b), static_cast<std::size_t>(exact_block_bytes(s)));
        to.flush();
        if (s.codec.sink_tokens > 0)
          to.add(l.size == 0 ? unused.data() : access::sinks(cache, layer, head),
                 static_cast<std::size_t>(sink_bytes(s)));
        to.flush();
      }
    });
  }
  access::finish(cache, s.layers, std::move(positions));
}

/// Throws load_error unless a sequence has the shape of the cache, its codec and its settings.
template <class Cache>
void require_same_kind(const byte_source& source, const stored_sequence& s, const Cache& cache) {
  const auto require = [&](bool holds, const char* reason) {
    if (!holds) throw load_error(source.name(), header_bytes, reason);
  };
  require(s.shape == cache.shape(), "the shape is not that of the cache");
  require(s.codec == describe(cache.codec()), "the codec, or its settings, are not those of the cache");
}

/// Throws load_error if the blocks take more memory than the file, or the caller, gives reason for.
template <class Cache>
void check_memory(const byte_source& source, const contents& file, const Cache& cache,
                  const load_options& options) {
  const stored_sequence& s = file.about;
  const index_t needed = loading(source, header_bytes, [&] {
    index_t most = 0;
    index_t page_bytes = 0;  // of one block in every layer and head
    for (std::size_t i = 0; i < s.layers.size(); ++i) {
      most = std::max(most, s.layers[i].num_sealed);
      page_bytes = checked_add(page_bytes, checked_mul(s.shape.num_kv_heads, s.block_bytes[i]));
    }
    return checked_add(checked_mul(most, page_bytes), access::exact_memory(cache));
  });
  std::uint64_t bytes = 0;  // decompressed
  for (const section& part : file.layers) bytes += part.raw_bytes;
  const std::uint64_t limit = std::max(bytes, source.size()) +
                              static_cast<std::uint64_t>(std::max(options.slack_limit_bytes, index_t{0}));
  if (static_cast<std::uint64_t>(needed) > limit)
    throw load_error(
        source.name(), header_bytes,
        "it takes " + std::to_string(needed) + " bytes, more than it has and slack_limit_bytes allows");
}

/// An empty cache as the file says. Throws load_error.
template <class Cache, class Options>
Cache make_empty(const byte_source& source, const stored_sequence& s, const Options& settings) {
  return loading(source, header_bytes, [&] {
    Cache cache(s.shape, make_described<typename Cache::codec_type>(s.codec, s.shape), settings);
    check_fit(cache, s);
    return cache;
  });
}

}  // namespace detail

/// A new cache from a snapshot. \tparam Cache  contiguous_cache or chunked_cache of the codec that was saved, or of any_codec
/// \param settings  the container's own options
/// Throws load_error; capacity_error where memory runs out; from a path, std::system_error if there is no such file. O(bytes).
template <class Cache>
requires described_codec<typename Cache::codec_type>
[[nodiscard]] loaded<Cache> load(const byte_source& source, const load_options& options = {},
                                 const typename Cache::storage_type::options& settings = {}) {
  detail::contents file = detail::read_contents(source, file_kind::snapshot, options.expect);
  auto cache = detail::make_empty<Cache>(source, file.about, settings);
  detail::check_memory(source, file, cache, options);
  detail::read_layers(source, file, options, cache);
  return {std::move(cache), std::move(file.about)};
}

/// Replaces the tokens of a sequence of the same shape and codec, settings included, by those of a snapshot. It takes memory
/// for both: until all has been checked the sequence stays as it was. Invalidates: all views of blocks.
/// \return what the file said. Throws as load.
template <class Cache>
requires described_codec<typename Cache::codec_type> stored_sequence
load_into(Cache& cache, const byte_source& source, const load_options& options = {}) {
  detail::contents file = detail::read_contents(source, file_kind::snapshot, options.expect);
  detail::require_same_kind(source, file.about, cache);
  Cache fresh = detail::access::empty_like(cache);
  detail::loading(source, detail::header_bytes, [&] { detail::check_fit(fresh, file.about); });
  detail::check_memory(source, file, fresh, options);
  detail::read_layers(source, file, options, fresh);
  cache = std::move(fresh);
  return std::move(file.about);
}

/// From a file, a stream (all that is left of it), or memory.
template <class Cache>
[[nodiscard]] loaded<Cache> load(const std::filesystem::path& path, const load_options& options = {},
                                 const typename Cache::storage_type::options& settings = {}) {
  return load<Cache>(file_source(path), options, settings);
}
template <class Cache>
[[nodiscard]] loaded<Cache> load(std::istream& stream, const load_options& options = {},
                                 const typename Cache::storage_type::options& settings = {}) {
  const std::vector<std::byte> bytes = read_all(stream);
  return load<Cache>(memory_source(bytes, "stream"), options, settings);
}
template <class Cache>
[[nodiscard]] loaded<Cache> load(std::span<const std::byte> bytes, const load_options& options = {},
                                 const typename Cache::storage_type::options& settings = {}) {
  return load<Cache>(memory_source(bytes), options, settings);
}
template <class Cache>
stored_sequence load_into(Cache& cache, const std::filesystem::path& path, const load_options& options = {}) {
  return load_into(cache, file_source(path), options);
}
template <class Cache>
stored_sequence load_into(Cache& cache, std::span<const std::byte> bytes, const load_options& options = {}) {
  return load_into(cache, memory_source(bytes), options);
}

/// What a snapshot says of itself, and nothing of its blocks. O(sections and tokens). Throws load_error; from a path,
/// std::system_error if there is no such file.
[[nodiscard]] inline stored_sequence inspect(const byte_source& source) {
  return detail::read_contents(source, file_kind::snapshot, {}).about;
}
[[nodiscard]] inline stored_sequence inspect(const std::filesystem::path& path) {
  return inspect(file_source(path));
}

}  // namespace kvcache::inline v0::store
