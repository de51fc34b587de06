// SPDX-License-Identifier: MIT
// recover: the sequence of a journal, as far as the file is whole. What a crash left behind that is cut off.
#pragma once

#include <kvcache/codec/description.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/crc32c.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/format.hpp>
#include <kvcache/store/identity.hpp>
#include <kvcache/store/io.hpp>
#include <kvcache/store/journal_record.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/log_output.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

/// What a journal had.
struct recovery {
  stored_sequence about;                            ///< who.tokens are the ids of the tokens in the cache
  journal_position at = journal_position(0, 0, 0);  ///< where a journal goes on
  std::uint64_t damaged_bytes = 0;                  ///< behind the newest whole record
  /// Tokens of the record that is damaged, if enough is left of it to tell.
  std::optional<index_t> lost_tokens = {};
  /// At most so many tokens more had come since the newest record, or the damaged one, and were not written yet.
  index_t unwritten_at_most = 0;
};

/// A sequence from a journal.
template <class Cache>
struct recovered : recovery {
  Cache cache;
};

namespace detail {

/// Reads record after record into a cache.
template <class Cache>
class replay {
 public:
  /// \param cache  empty, of the journal's shape and codec
  replay(const byte_source& source, const contents& file, Cache& cache) : source_(&source), cache_(&cache) {
    result_.about = file.about;
    result_.at.bytes = file.end;
    std::array<std::byte, 4> chain{};
    source.read(checksum_offset, chain);
    std::memcpy(&result_.at.chain, chain.data(), chain.size());
    blocks_ = file.about.layers;
    for (auto& l : blocks_) l = {};
  }

  /// Throws load_error where a record is whole and still cannot be, capacity_error.
  recovery run() {
    while (next()) {
    }
    result_.damaged_bytes = source_->size() - result_.at.bytes;
    result_.about.layers = blocks_;
    return std::move(result_);
  }

 private:
  [[noreturn]] void refuse(const char* reason) const {
    throw load_error(source_->name(), result_.at.bytes, reason);
  }

  bool next() {
    const std::uint64_t start = result_.at.bytes;
    const std::uint64_t left = source_->size() - start;
    if (left < record_header_bytes) return false;
    std::array<std::byte, record_header_bytes> bytes{};
    source_->read(start, bytes);
    const std::optional<record_header> header = decode(bytes, result_.at);
    if (!header) return false;
    if (header->first_token < 0 || header->first_token > size_ || header->num_tokens < header->first_token ||
        header->num_tokens > (index_t{1} << 56))
      refuse("a record is for other tokens than those before it");
    const std::uint64_t payload = start + record_header_bytes;
    if (header->payload_bytes > left - record_header_bytes || !is_whole(*header, payload)) {
      result_.lost_tokens = std::max(header->num_tokens - size_, index_t{0});
      result_.unwritten_at_most = std::max<index_t>(header->every, 1) - 1;
      return false;
    }
    apply(*header, payload);
    result_.at = {payload + header->payload_bytes, header->number + 1, header->checksum};
    result_.unwritten_at_most = std::max<index_t>(header->every, 1) - 1;
    return true;
  }

  [[nodiscard]] bool is_whole(const record_header& header, std::uint64_t offset) {
    buffer_.resize(run_bytes);
    std::uint32_t checksum = 0;
    for (std::uint64_t done = 0; done < header.payload_bytes;) {
      const auto n =
          static_cast<std::size_t>(std::min<std::uint64_t>(run_bytes, header.payload_bytes - done));
      source_->read(offset + done, std::span(buffer_).first(n));
      checksum = crc32c(std::span(buffer_).first(n), checksum);
      done += n;
    }
    return checksum == header.payload_checksum;
  }

  void apply(const record_header& header, std::uint64_t offset) {
    const stored_sequence& s = result_.about;
    const std::uint64_t table_bytes = record_tables::bytes(s, header);
    if (table_bytes > header.payload_bytes) refuse("a record is shorter than its tables");
    std::vector<std::byte> bytes(static_cast<std::size_t>(table_bytes));
    source_->read(offset, bytes);
    const auto tables = record_tables::decode(s, header, byte_reader(bytes, source_->name(), offset));
    check(header, tables, table_bytes);
    position_map positions =
        loading(*source_, result_.at.bytes, [&] { return position_map(tables.segments, header.num_tokens); });
    std::vector<kvcache::detail::layer_blocks> now;
    for (const record_layer& l : tables.layers) now.push_back(l.now);
    if (const status code = access::prepare(*cache_, now, header.first_token / s.shape.block_size);
        code != status::ok)
      throw capacity_error("recover", code);
    std::uint64_t at = offset + table_bytes;
    const auto read = [&](std::span<std::byte> to) {
      source_->read(at, to);
      at += to.size();
    };
    runs<std::byte, decltype(read)> joined(read, run_bytes);
    const blocks_in_place<Cache> blocks{*cache_};
    for (index_t layer = 0; layer < s.shape.num_layers; ++layer) {
      for_each_block(blocks, s, layer, tables.layers[static_cast<std::size_t>(layer)],
                     [&](std::byte* data, std::size_t size) { joined.add(data, size); });
    }
    joined.flush();
    access::finish(*cache_, now, std::move(positions));
    auto& tokens = result_.about.who.tokens;
    tokens.resize(static_cast<std::size_t>(header.first_token));
    tokens.insert(tokens.end(), tables.tokens.begin(), tables.tokens.end());
    result_.about.positions = tables.segments;
    blocks_ = std::move(now);
    size_ = header.num_tokens;
  }

  /// Every block that the sequence is to have is in this record, or was in one before and is still there.
  void check(const record_header& header, const record_tables& tables, std::uint64_t table_bytes) const {
    const stored_sequence& s = result_.about;
    index_t bytes = static_cast<index_t>(table_bytes);
    for (std::size_t i = 0; i < tables.layers.size(); ++i) {
      const record_layer& l = tables.layers[i];
      const auto& before = blocks_[i];
      if (!access::is_possible(*cache_, l.now)) refuse("a record has blocks that cannot be");
      const index_t first_block = header.first_token / s.shape.block_size;
      if (s.codec.seals && (l.first_sealed > before.num_sealed ||
                            (l.now.first_exact < before.first_exact && l.now.first_exact < first_block)))
        refuse("a record lacks blocks that no record before it has");
      bytes = loading(*source_, result_.at.bytes, [&] { return checked_add(bytes, blocks_bytes(s, i, l)); });
    }
    if (static_cast<std::uint64_t>(bytes) != header.payload_bytes)
      refuse("a record has another size than its blocks");
  }

  const byte_source* source_;
  Cache* cache_;
  recovery result_;
  std::vector<kvcache::detail::layer_blocks> blocks_;
  index_t size_ = 0;
  std::vector<std::byte> buffer_;
};

/// Cuts what is damaged off a journal, so that it ends with a whole record.
inline void cut_damage([[maybe_unused]] const std::filesystem::path& path,
                       [[maybe_unused]] const recovery& found) {
#if defined(KVCACHE_STORE_POSIX)
  if (found.damaged_bytes > 0) (void)log_file::open(path, found.at.bytes);
#else
  if (found.damaged_bytes > 0) std::filesystem::resize_file(path, found.at.bytes);
#endif
}

}  // namespace detail

/// The longest sequence that a journal has whole. \tparam Cache  as for load
/// Throws load_error if the file is no journal of such a sequence; capacity_error; from a path, std::system_error if there is
/// no such file. O(bytes), each read twice.
template <class Cache>
requires described_codec<typename Cache::codec_type>
[[nodiscard]] recovered<Cache> recover(const byte_source& source, const load_options& options = {},
                                       const typename Cache::storage_type::options& settings = {}) {
  detail::contents file = detail::read_contents(source, file_kind::journal, options.expect);
  auto cache = detail::make_empty<Cache>(source, file.about, settings);
  detail::check_memory(source, file, cache, options);
  recovery found = detail::replay<Cache>(source, file, cache).run();
  return {std::move(found), std::move(cache)};
}

/// The same for a sequence of the caller's, of a pool for instance, whose tokens are replaced. Until all is read it stays as
/// it was.
template <class Cache>
requires described_codec<typename Cache::codec_type> recovery recover_into(Cache& cache,
                                                                           const byte_source& source,
                                                                           const load_options& options = {}) {
  const detail::contents file = detail::read_contents(source, file_kind::journal, options.expect);
  detail::require_same_kind(source, file.about, cache);
  Cache fresh = detail::access::empty_like(cache);
  detail::loading(source, detail::header_bytes, [&] { detail::check_fit(fresh, file.about); });
  recovery found = detail::replay<Cache>(source, file, fresh).run();
  cache = std::move(fresh);
  return found;
}

/// From a file, which is cut behind its newest whole record. Throws write_error if it cannot be.
template <class Cache>
[[nodiscard]] recovered<Cache> recover(const std::filesystem::path& path, const load_options& options = {},
                                       const typename Cache::storage_type::options& settings = {}) {
  auto found = recover<Cache>(file_source(path), options, settings);
  detail::cut_damage(path, found);
  return found;
}
template <class Cache>
recovery recover_into(Cache& cache, const std::filesystem::path& path, const load_options& options = {}) {
  recovery found = recover_into(cache, file_source(path), options);
  detail::cut_damage(path, found);
  return found;
}
template <class Cache>
[[nodiscard]] recovered<Cache> recover(std::span<const std::byte> bytes, const load_options& options = {},
                                       const typename Cache::storage_type::options& settings = {}) {
  return recover<Cache>(memory_source(bytes), options, settings);
}

}  // namespace kvcache::inline v0::store
