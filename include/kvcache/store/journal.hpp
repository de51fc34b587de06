// SPDX-License-Identifier: MIT
// journal: a log beside a live sequence, so that a process that dies loses a few tokens at most.
//
//   store::journal log("chat.kvj", cache, {.model = sha256_of_weights});      // a new file, with what the cache has
//   for (;;) {
//     step(token, cache);
//     log.append({&token, 1});                                               // writes when 64 tokens have come together
//   }
//   ...
//   auto chat = store::recover<Cache>("chat.kvj");                            // after a crash; see store/recover.hpp
//   store::journal log("chat.kvj", chat.cache, chat.at);                      // goes on where it ends
//
// What a killed process has written stays: the system has it. Against the loss of power it has to be on disk, which sync()
// waits for, or the journal itself now and then; journal_options::sync_every.
#pragma once

#include <kvcache/cache/block_access.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/clean_blocks.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/format.hpp>
#include <kvcache/store/identity.hpp>
#include <kvcache/store/io.hpp>
#include <kvcache/store/journal_record.hpp>
#include <kvcache/store/log_output.hpp>
#include <kvcache/store/save.hpp>
#include <kvcache/store/section_io.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

struct journal_options {
  index_t every = 64;      ///< tokens: a record is written when the sequence passes a multiple of it
  index_t sync_every = 8;  ///< records after which the journal waits for the disk; 0: never
  bool replace = false;    ///< a new journal may take the place of a file that is there
};

/// The cache must outlive the journal, stay where it is, and be changed in these ways only: appended to, told to append();
/// truncated, through truncate(); shifted, with flush() afterwards. After anything else: rewrite(). All layers have the same
/// number of tokens whenever the journal is called. Threads: as the cache.
template <class Cache>
requires described_codec<typename Cache::codec_type>
class journal {
 public:
#if defined(KVCACHE_STORE_POSIX)
  /// A new journal; it appears with all that the cache has, for which who.tokens must have ids.
  /// Throws std::system_error, with std::errc::file_exists unless options.replace, write_error, shape_error.
  journal(const std::filesystem::path& path, Cache& cache, const identity& who,
          const journal_options& options = {})
      : journal(cache, who, options) {
    std::error_code error;
    if (!options.replace && std::filesystem::exists(path, error))
      throw std::system_error(std::make_error_code(std::errc::file_exists), "kvcache: " + path.string());
    path_ = path;
    compact();
  }

  /// Goes on with a journal that recover() has read into `cache`.
  journal(const std::filesystem::path& path, Cache& cache, const journal_position& at,
          const journal_options& options = {})
      : journal(cache, {}, options, at) {
    path_ = path;
    output_ = log_file::open(path, at.bytes);
  }
#endif

  /// A new journal at the beginning of some other output.
  journal(std::unique_ptr<log_output> output, Cache& cache, const identity& who,
          const journal_options& options = {})
      : journal(cache, who, options) {
    output_ = std::move(output);
    const std::vector<std::byte> header = encode_file_header();
    const std::span<const std::byte> piece = header;
    output_->append({&piece, 1});
    output_->sync();
    flush();
  }
  /// And one that goes on.
  journal(std::unique_ptr<log_output> output, Cache& cache, const journal_position& at,
          const journal_options& options = {})
      : journal(cache, {}, options, at) {
    output_ = std::move(output);
  }

  /// Tokens that the cache has got. Writes a record if there is now one due. Throws write_error: then the tokens are still
  /// to be written, and the next call tries again.
  /// Cost: nothing but the ids, or one write of the blocks that changed.
  void append(std::span<const token_id> tokens) {
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    require_in_step();
    if (size() / options_.every != recorded_size_ / options_.every) flush();
  }

  /// Writes what is not written yet. Throws write_error.
  void flush() {
    require_in_step();
    if (dirty_from_ == size() && size() == recorded_size_ && !has_moved()) return;
    write_record();
    if (options_.sync_every > 0 && ++unsynced_ >= options_.sync_every) sync_output();
  }

  /// Writes what is not written yet and waits until all is on disk. Throws write_error.
  void sync() {
    flush();
    if (unsynced_ > 0 || options_.sync_every == 0) sync_output();
  }

  /// Truncates the cache; where tokens go that were written, that is written at once, and they stay in the file, void, until
  /// compact(). Throws write_error, the cache being
  /// truncated.
  void truncate(index_t num_tokens) {
    if (num_tokens >= size()) return;
    cache_->truncate(num_tokens);
    tokens_.resize(static_cast<std::size_t>(std::max(num_tokens - dirty_from_, index_t{0})));
    dirty_from_ = std::min(dirty_from_, num_tokens);
    for (std::size_t i = 0; i < sealed_.size(); ++i)
      sealed_[i] = std::min(sealed_[i], detail::access::layer(*cache_, static_cast<index_t>(i)).num_sealed);
    if (num_tokens < recorded_size_) flush();
  }

  /// Writes all blocks anew: after the cache was changed in a way that the journal does not follow.
  /// \param tokens  ids of all its tokens
  void rewrite(std::span<const token_id> tokens) {
    tokens_.assign(tokens.begin(), tokens.end());
    dirty_from_ = 0;
    std::fill(sealed_.begin(), sealed_.end(), index_t{0});
    require_in_step();
    write_record();
  }

#if defined(KVCACHE_STORE_POSIX)
  /// Replaces the file by one with a single record of all there is, on disk. What a journal of a sequence that is often
  /// truncated needs now and then; a crash leaves the old file or the new one.
  /// \param tokens  ids of all tokens of the cache
  void compact(std::span<const token_id> tokens) {
    tokens_.assign(tokens.begin(), tokens.end());
    dirty_from_ = 0;
    std::fill(sealed_.begin(), sealed_.end(), index_t{0});
    require_in_step();
    compact();
  }
#endif

  /// Tokens of the newest record: what recover() would give back now.
  [[nodiscard]] index_t recorded_size() const noexcept { return recorded_size_; }
  /// Where the next record goes.
  [[nodiscard]] const journal_position& position() const noexcept { return at_; }

 private:
  journal(Cache& cache, const identity& who, const journal_options& options,
          const journal_position& at = journal_position(0, 0, 0))
      : cache_(&cache),
        options_(options),
        about_(about_of(cache, who)),
        at_(at),
        tokens_(who.tokens),
        blocks_(cache, about_) {
    if (options.every < 1 || options.every > (index_t{1} << 30) || options.sync_every < 0)
      throw shape_error("kvcache: journal: every must be at least 1, and sync_every not negative");
    about_.layers.resize(static_cast<std::size_t>(cache.shape().num_layers));
    for (index_t layer = 0; layer < cache.shape().num_layers; ++layer) {
      about_.block_bytes.push_back(detail::access::block_bytes(cache, layer));
      sealed_.push_back(at.bytes == 0 ? 0 : detail::access::layer(cache, layer).num_sealed);
    }
    if (at.bytes != 0) {
      settle();
    } else if (static_cast<index_t>(tokens_.size()) != cache.size()) {
      throw shape_error("kvcache: journal: who.tokens must have the ids of the tokens in the cache");
    }
  }

  static stored_sequence about_of(const Cache& cache, const identity& who) {
    stored_sequence made;
    made.shape = cache.shape();
    made.codec = describe(cache.codec());
    made.who = who;
    made.who.tokens.clear();
    return made;
  }
  [[nodiscard]] index_t size() const noexcept { return cache_->size(); }
  void require_in_step() const {
    KVCACHE_ASSERT(dirty_from_ + static_cast<index_t>(tokens_.size()) == size() &&
                       detail::longest_layer(*cache_) == size(),
                   "journal: it must be told of every token, after all layers have it");
  }
  [[nodiscard]] bool has_moved() const noexcept {
    const auto now = cache_->positions().segments();
    return !std::equal(now.begin(), now.end(), positions_.begin(), positions_.end());
  }

  /// Sets where the first record goes.
  std::vector<std::byte> encode_file_header() {
    detail::small_sections small(about_);
    const std::uint64_t bytes = detail::place(small.table);
    std::vector<std::byte> file = detail::encode_header(file_kind::journal, small.table, bytes);
    at_ = {bytes, 0, 0};
    std::memcpy(&at_.chain, file.data() + detail::checksum_offset, sizeof(at_.chain));
    for (const std::vector<std::byte>& section : small.contents) {
      file.insert(file.end(), section.begin(), section.end());
      file.resize(static_cast<std::size_t>(detail::padded(file.size())));
    }
    return file;
  }

  /// The next record: its header and tables, and all its pieces in order. They lie in this object and in the cache; as in a
  /// snapshot, nothing is in them but the tokens that there are.
  detail::record_header make_record() {
    detail::record_tables tables;
    const auto segments = cache_->positions().segments();
    tables.tokens = tokens_;
    tables.segments.assign(segments.begin(), segments.end());
    for (index_t layer = 0; layer < about_.shape.num_layers; ++layer)
      tables.layers.push_back(detail::plan_layer(about_, detail::access::layer(*cache_, layer), dirty_from_,
                                                 sealed_[static_cast<std::size_t>(layer)]));
    buffer_.clear();
    tables.encode(about_, buffer_);
    pieces_.assign(1, {});  // for the header
    const auto use = [this](std::span<const std::byte> run) { pieces_.push_back(run); };
    detail::runs<const std::byte, decltype(use)> joined(use, most_at_once);
    joined.add(buffer_.data(), buffer_.size());
    joined.flush();
    blocks_.reuse();
    for (index_t layer = 0; layer < about_.shape.num_layers; ++layer)
      detail::for_each_block(blocks_, about_, layer, tables.layers[static_cast<std::size_t>(layer)],
                             [&](const std::byte* data, std::size_t size) { joined.add(data, size); });
    joined.flush();
    detail::record_header header;
    for (const auto piece : pieces_) {
      header.payload_bytes += piece.size();
      header.payload_checksum = crc32c(piece, header.payload_checksum);
    }
    header.number = at_.next_record;
    header.previous = at_.chain;
    header.every = static_cast<std::uint32_t>(options_.every);
    header.first_token = dirty_from_;
    header.num_tokens = size();
    header.num_segments = static_cast<std::uint32_t>(segments.size());
    return header;
  }

  void write_record() {
    detail::record_header header = make_record();
    const auto bytes = detail::encode(header);
    pieces_.front() = bytes;
    if (is_torn_) {
      output_->cut(at_.bytes);
      is_torn_ = false;
    }
    try {
      output_->append(pieces_);
    } catch (...) {
      take_back();
      throw;
    }
    took_record(header);
    if (options_.sync_every > 0) output_->start_sync();
  }

  void took_record(const detail::record_header& header) {
    at_.bytes += detail::record_header_bytes + header.payload_bytes;
    ++at_.next_record;
    at_.chain = header.checksum;
    settle();
  }

  /// The file has now what the cache has.
  void settle() {
    dirty_from_ = recorded_size_ = size();
    tokens_.clear();
    for (std::size_t i = 0; i < sealed_.size(); ++i)
      sealed_[i] = detail::access::layer(*cache_, static_cast<index_t>(i)).num_sealed;
    const auto now = cache_->positions().segments();
    positions_.assign(now.begin(), now.end());
  }

  /// Cuts off what a failed write left. Where that fails too, it is tried again before the next record.
  void take_back() noexcept {
    is_torn_ = true;
    try {
      output_->cut(at_.bytes);
      is_torn_ = false;
    } catch (...) {  // NOLINT(bugprone-empty-catch): the write's own error is the one to report
    }
  }

  void sync_output() {
    output_->sync();
    unsynced_ = 0;
  }

#if defined(KVCACHE_STORE_POSIX)
  void compact() {
    atomic_file file(path_);
    const journal_position before = at_;
    try {
      file.write(encode_file_header());
      detail::record_header header = make_record();
      const auto bytes = detail::encode(header);
      pieces_.front() = bytes;
      const bool header_is_used = size() > 0;
      for (const auto piece : pieces_) {
        if (header_is_used) file.write(piece);
      }
      auto output = std::make_unique<log_file>(file.replace(), path_);
      output_ = std::move(output);
      settle();
      if (header_is_used) took_record(header);
    } catch (...) {
      at_ = before;
      throw;
    }
    unsynced_ = 0;
    is_torn_ = false;
    detail::sync_folder_of(path_);
  }
#endif

  static constexpr std::size_t most_at_once = std::size_t{1} << 20U;  // bytes of a piece

  Cache* cache_;
  journal_options options_;
  stored_sequence about_;  // what the file begins with
  journal_position at_;
  std::filesystem::path path_;
  std::unique_ptr<log_output> output_;
  std::vector<token_id> tokens_;  // ids from dirty_from_ on
  index_t dirty_from_ = 0;        // token from which on the cache has other tokens than the file
  index_t recorded_size_ = 0;     // tokens of the newest record
  std::vector<index_t> sealed_;   // [num_layers] sealed blocks that are written and unchanged
  std::vector<position_segment> positions_ = std::vector<position_segment>(1);  // of the newest record
  index_t unsynced_ = 0;                                                        // records
  bool is_torn_ = false;  // a failed write left something behind
  detail::copied_blocks<Cache> blocks_;
  std::vector<std::byte> buffer_;
  std::vector<std::span<const std::byte>> pieces_;
};

}  // namespace kvcache::inline v0::store
