// SPDX-License-Identifier: MIT
// How the blocks of a section are written and read: in runs of neighbours, and compressed if need be.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/crc32c.hpp>
#include <kvcache/store/format.hpp>
#include <kvcache/store/io.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace kvcache::inline v0::store {

/// Makes sections smaller; store/zstd.hpp has one.
class section_compressor {
 public:
  section_compressor() = default;
  section_compressor(const section_compressor&) = delete;
  section_compressor& operator=(const section_compressor&) = delete;
  virtual ~section_compressor() = default;

  /// What files call it; 1 is zstd.
  [[nodiscard]] virtual std::uint32_t id() const noexcept = 0;
  [[nodiscard]] virtual std::vector<std::byte> compress(std::span<const std::byte> raw) const = 0;
  /// \return false unless `stored` stands for exactly raw.size() bytes
  [[nodiscard]] virtual bool decompress(std::span<const std::byte> stored,
                                        std::span<std::byte> raw) const = 0;
};

namespace detail {

/// Joins pieces of memory that follow each other. \tparam Byte  std::byte, const or not
template <class Byte, class Use>
class runs {
 public:
  /// \param use  called with each run, a span of at most `most` bytes, unless a single piece is larger
  runs(Use use, std::size_t most) : use_(use), most_(most) {}

  void add(Byte* data, std::size_t size) {
    if (run_.data() + run_.size() == data && run_.size() + size <= most_) {
      run_ = {run_.data(), run_.size() + size};
      return;
    }
    flush();
    run_ = {data, size};
  }
  void flush() {
    if (!run_.empty()) use_(run_);
    run_ = {};
  }

 private:
  Use use_;
  std::size_t most_;
  std::span<Byte> run_ = {};
};

/// So much at a time that it is still in the cache of the processor when its checksum is computed.
inline constexpr std::size_t run_bytes = std::size_t{128} << 10U;

/// Reads a section in order and computes its checksum on the way.
class section_input {
 public:
  /// Throws load_error if the section is compressed in a way that `compression` does not know, or is damaged.
  section_input(const byte_source& source, const section& s, const section_compressor* compression)
      : source_(&source), section_(s) {
    if (s.compression == 0) return;
    if (compression == nullptr || compression->id() != s.compression)
      refuse("the section is compressed; see load_options::compression and store/zstd.hpp");
    section stored = s;
    stored.compression = 0;
    const std::vector<std::byte> bytes = read_section(source, stored);
    raw_.resize(static_cast<std::size_t>(s.raw_bytes));
    if (!compression->decompress(bytes, raw_)) refuse("the section cannot be decompressed");
  }

  void read(std::span<std::byte> to) {
    if (section_.compression == 0) {
      source_->read(section_.offset + at_, to);
      checksum_ = crc32c(to, checksum_);
    } else if (!to.empty()) {
      std::memcpy(to.data(), raw_.data() + at_, to.size());
    }
    at_ += to.size();
  }

  /// Throws load_error unless what was read is what was saved.
  void finish() const {
    if (section_.compression == 0 && checksum_ != section_.checksum)
      refuse("the checksum of a section does not match");
    check_padding(*source_, section_);
  }

 private:
  [[noreturn]] void refuse(const char* reason) const {
    throw load_error(source_->name(), section_.offset, reason);
  }

  const byte_source* source_;
  section section_;
  std::uint64_t at_ = 0;
  std::uint32_t checksum_ = 0;
  std::vector<std::byte> raw_;
};

/// Writes zeros up to the next multiple of 64.
inline void write_padding(byte_sink& sink, std::uint64_t stored_bytes) {
  static constexpr std::array<std::byte, 64> zeros{};
  sink.write(std::span(zeros).first(static_cast<std::size_t>(padded(stored_bytes) - stored_bytes)));
}

}  // namespace detail

}  // namespace kvcache::inline v0::store
