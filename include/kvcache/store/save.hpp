// SPDX-License-Identifier: MIT
// save: a sequence of any container and codec, or a range of its tokens, to a file, a stream or memory.
//
//   store::save(cache, {.model = sha256_of_weights, .tokens = ids}, "chat.kv");
//
// What is written and why: store/format.hpp and docs/format.md.
#pragma once

#include <kvcache/codec/description.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/crc32c.hpp>
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
#include <limits>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

struct save_options {
  index_t first_token = 0;  ///< of the range that is saved
  index_t last_token =
      std::numeric_limits<index_t>::max();          ///< the first one behind it; at most the sequence
  const section_compressor* compression = nullptr;  ///< of the blocks; none can be mapped then
  std::string spec = {};                            ///< see stored_sequence::spec
};

namespace detail {

/// The sections of `about` but those of the layers, and their bytes.
class small_sections {
 public:
  explicit small_sections(const stored_sequence& about) {
    add(section_kind::description, encode_description(about));
    add(section_kind::key_settings, about.codec.keys.settings);
    add(section_kind::value_settings, about.codec.values.settings);
    const auto tokens = std::as_bytes(std::span(about.who.tokens));
    add(section_kind::tokens, {tokens.begin(), tokens.end()});
    add(section_kind::positions, encode_positions(about.positions));
  }

  std::vector<section> table;
  std::vector<std::vector<std::byte>> contents;

 private:
  void add(section_kind kind, std::vector<std::byte> bytes) {
    section s;
    s.kind = kind;
    s.stored_bytes = s.raw_bytes = bytes.size();
    s.checksum = crc32c(bytes);
    table.push_back(s);
    contents.push_back(std::move(bytes));
  }
};

/// Writes one image: first a pass for sizes and checksums, which the header begins with, then one for the bytes.
template <class Cache>
class snapshot_writer {
 public:
  snapshot_writer(const Cache& cache, const identity& who, index_t last, const save_options& options)
      : image_(cache, who, options.first_token, last), compression_(options.compression), small_([&] {
          image_.about().spec = options.spec;
          return small_sections(image_.about());
        }()) {
    for (index_t layer = 0; layer < image_.about().shape.num_layers; ++layer) {
      measure(section_kind::blocks, layer);
      if (image_.about().codec.seals) measure(section_kind::exact, layer);
    }
  }

  void write(byte_sink& sink) {
    const std::uint64_t file_bytes = place(small_.table);
    sink.write(encode_header(file_kind::snapshot, small_.table, file_bytes));
    for (std::size_t i = 0; i < small_.table.size(); ++i) {
      const section& s = small_.table[i];
      if (i < small_.contents.size()) {
        sink.write(small_.contents[i]);
      } else if (s.compression != 0) {
        sink.write(compressed_[i - small_.contents.size()]);
      } else {
        emit(s.kind, s.layer, [&](std::span<const std::byte> run) { sink.write(run); });
      }
      write_padding(sink, s.stored_bytes);
    }
  }

 private:
  /// Calls use(run) for the bytes of a section of a layer.
  template <class Use>
  void emit(section_kind kind, index_t layer, Use use) {
    runs<const std::byte, Use> joined(use, run_bytes);
    const auto add = [&](const std::byte* data, std::size_t size) {
      joined.add(data, size);
      if (image_.is_copy(data)) joined.flush();
    };
    if (kind == section_kind::blocks) {
      image_.blocks(layer, add);
    } else {
      image_.exact(layer, add);
    }
    joined.flush();
  }

  void measure(section_kind kind, index_t layer) {
    section s;
    s.kind = kind;
    s.layer = static_cast<std::uint32_t>(layer);
    std::vector<std::byte> raw;
    emit(kind, layer, [&](std::span<const std::byte> run) {
      s.raw_bytes += run.size();
      s.checksum = crc32c(run, s.checksum);
      if (compression_ != nullptr) raw.insert(raw.end(), run.begin(), run.end());
    });
    s.stored_bytes = s.raw_bytes;
    std::vector<std::byte> smaller;
    if (!raw.empty()) smaller = compression_->compress(raw);
    if (!raw.empty() && smaller.size() < raw.size() && raw.size() / max_compression <= smaller.size()) {
      s.compression = compression_->id();
      s.stored_bytes = smaller.size();
      s.checksum = crc32c(smaller);
    }
    compressed_.push_back(std::move(smaller));
    small_.table.push_back(s);
  }

  sequence_image<Cache> image_;
  const section_compressor* compression_;
  small_sections small_;  // its table becomes that of all sections
  std::vector<std::vector<std::byte>> compressed_;
};

template <class Cache>
index_t longest_layer(const Cache& cache) noexcept {
  index_t most = 0;
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer)
    most = std::max(most, cache.layer_size(layer));
  return most;
}

}  // namespace detail

/// Saves tokens [first_token, last_token) of every layer, as far as it has them, with their positions.
///
/// \param cache  a sequence_cache of any codec that can be described; see codec/description.hpp
/// \param who    whose it is; with the token ids of the sequence from token 0 up to last_token at least, of which those of the
///               range are saved, or none
/// Throws shape_error if the range cannot be saved: one that begins behind the first token begins at a multiple of the
/// block size, unless the codec is f32, f16 or bf16 without a tail, and has no sinks; write_error if the sink fails.
/// O(bytes): each is read twice, once for the checksums. Threads: reads the cache only, but for a range of a codec with a
/// tail in a pool, which is forked.
template <class Cache>
requires described_codec<typename Cache::codec_type>
void save(const Cache& cache, const identity& who, byte_sink& sink, const save_options& options = {}) {
  const index_t longest = detail::longest_layer(cache);
  const index_t last = std::min(options.last_token, longest);
  if (last < longest && detail::access::seals(cache)) {
    if (last < 0 || last > cache.size())
      throw shape_error("kvcache: save: the range must lie in the sequence");
    const Cache cut = cache.fork(last);
    return detail::snapshot_writer<Cache>(cut, who, last, options).write(sink);
  }
  detail::snapshot_writer<Cache>(cache, who, last, options).write(sink);
}

/// To a file, which is replaced as a whole or not at all, and is on disk afterwards. Throws std::system_error as well.
template <class Cache>
requires described_codec<typename Cache::codec_type>
void save(const Cache& cache, const identity& who, const std::filesystem::path& path,
          const save_options& options = {}) {
  atomic_file file(path);
  save(cache, who, file, options);
  file.commit();
}

/// To a stream, in order; what a stream that fails has got by then stays there.
template <class Cache>
requires described_codec<typename Cache::codec_type>
void save(const Cache& cache, const identity& who, std::ostream& stream, const save_options& options = {}) {
  stream_sink sink(stream);
  save(cache, who, sink, options);
}

/// To memory.
template <class Cache>
requires described_codec<typename Cache::codec_type>
[[nodiscard]] std::vector<std::byte> save(const Cache& cache, const identity& who,
                                          const save_options& options = {}) {
  std::vector<std::byte> bytes;
  vector_sink sink(bytes);
  save(cache, who, sink, options);
  return bytes;
}

}  // namespace kvcache::inline v0::store
