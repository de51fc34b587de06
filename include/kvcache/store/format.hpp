// SPDX-License-Identifier: MIT
// The frame of every file: a header of 64 bytes, a table of sections, the sections. docs/format.md has it to the byte.
//
//   | header, 64 | section entry, 64 | entry | ... | section, padded to 64 | section | ... |
//
// Sections follow each other without gaps, in the order of their entries, so that there is one way only to write what
// they hold. Header and table share a checksum, and each section has its own.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/bytes.hpp>
#include <kvcache/store/crc32c.hpp>
#include <kvcache/store/io.hpp>
#include <kvcache/version.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

/// A change to what any byte means is a new version. All versions up to this one are read, but for codes of trellises in files of
/// version 1, which stood for other numbers.
inline constexpr std::uint32_t format_version = 2;

enum class file_kind : std::uint32_t { snapshot = 1, journal = 2 };

enum class section_kind : std::uint32_t {
  description = 1,     ///< shape, codec, identity, sizes of the layers
  key_settings = 2,    ///< as the codec's keys wrote them
  value_settings = 3,  ///< and its values
  tokens = 4,          ///< 32 bits each; empty if the caller gave none
  positions = 5,       ///< segments, three numbers of 64 bits each
  blocks = 6,          ///< of one layer: [num_kv_heads][blocks], in the encoding of the codec
  exact = 7,           ///< of one layer of a sealing codec: for each head its exact blocks, then its sinks
};

struct section {
  section_kind kind = section_kind::description;
  std::uint32_t layer = 0;
  std::uint64_t offset = 0;        ///< a multiple of 64
  std::uint64_t stored_bytes = 0;  ///< in the file
  std::uint64_t raw_bytes = 0;     ///< once it is decompressed
  std::uint32_t checksum = 0;      ///< CRC32C of the stored bytes
  std::uint32_t compression = 0;   ///< 0: none; else section_compressor::id

  friend bool operator==(const section&, const section&) = default;
};

namespace detail {

inline constexpr std::array<unsigned char, 8> file_magic = {0x89, 'K', 'V', 'C', '\r', '\n', 0x1a, '\n'};
inline constexpr std::uint32_t endianness_mark = 0x01020304;
inline constexpr std::uint64_t header_bytes = 64;
inline constexpr std::uint64_t entry_bytes = 64;
inline constexpr std::size_t checksum_offset = 60;
/// A compressed section stands for at most so many times its bytes: what a small file can make a reader allocate.
inline constexpr std::uint64_t max_compression = 64;

constexpr std::uint64_t padded(std::uint64_t bytes) noexcept { return (bytes + 63) / 64 * 64; }

/// Gives sections their places. \return where the last one ends
inline std::uint64_t place(std::vector<section>& sections) {
  std::uint64_t at = header_bytes + entry_bytes * sections.size();
  for (section& s : sections) {
    s.offset = at;
    at += padded(s.stored_bytes);
  }
  return at;
}

/// Header and table of sections that have their places and checksums.
inline std::vector<std::byte> encode_header(file_kind kind, const std::vector<section>& sections,
                                            std::uint64_t file_bytes) {
  std::vector<std::byte> out;
  byte_writer to(out);
  to.raw(std::as_bytes(std::span(file_magic)));
  to.number(endianness_mark);
  to.number(format_version);
  to.number(static_cast<std::uint32_t>(kind));
  to.number(static_cast<std::uint32_t>(version_major << 16 | version_minor << 8 | version_patch));
  to.number(header_bytes + entry_bytes * sections.size());
  to.number(file_bytes);
  to.number(static_cast<std::uint32_t>(sections.size()));
  to.pad(header_bytes);
  for (const section& s : sections) {
    to.number(static_cast<std::uint32_t>(s.kind));
    to.number(s.layer);
    to.number(s.offset);
    to.number(s.stored_bytes);
    to.number(s.raw_bytes);
    to.number(s.checksum);
    to.number(s.compression);
    to.pad(entry_bytes);
  }
  const std::uint32_t checksum = crc32c(out);
  std::memcpy(out.data() + checksum_offset, &checksum, sizeof(checksum));
  return out;
}

/// Reads what encode_header wrote, and proves it: places, order, sizes within the file. Throws load_error.
class header_reader {
 public:
  header_reader(const byte_source& source, file_kind kind) : name_(source.name()) {
    if (source.size() < header_bytes) refuse(source.size(), "the file ends within the header");
    std::vector<std::byte> bytes(header_bytes);
    source.read(0, bytes);
    read_fixed(source, bytes, kind);
    bytes.resize(table_end_);
    source.read(0, bytes);
    std::uint32_t stored;
    std::memcpy(&stored, bytes.data() + checksum_offset, sizeof(stored));
    std::fill_n(bytes.begin() + checksum_offset, sizeof(stored), std::byte{0});
    if (crc32c(bytes) != stored) refuse(checksum_offset, "the checksum of the header does not match");
    read_table(bytes);
  }

  [[nodiscard]] std::vector<section> take_sections() { return std::move(sections_); }
  [[nodiscard]] std::uint64_t file_bytes() const noexcept { return file_bytes_; }
  [[nodiscard]] std::uint32_t version() const noexcept { return version_; }

 private:
  [[noreturn]] void refuse(std::uint64_t offset, const std::string& reason) const {
    throw load_error(name_, offset, reason);
  }

  void read_fixed(const byte_source& source, std::span<const std::byte> bytes, file_kind kind) {
    if (std::memcmp(bytes.data(), file_magic.data(), file_magic.size()) != 0)
      refuse(0, "this is no file of kvcache");
    byte_reader from(bytes.subspan(file_magic.size()), name_, file_magic.size());
    if (from.number<std::uint32_t>() != endianness_mark) from.refuse("the bytes are in another order", 4);
    version_ = from.number<std::uint32_t>();
    if (version_ < 1 || version_ > format_version)
      from.refuse("format version " + std::to_string(version_) + "; versions up to " +
                      std::to_string(format_version) + " are known",
                  4);
    if (from.number<std::uint32_t>() != static_cast<std::uint32_t>(kind))
      from.refuse(kind == file_kind::snapshot ? "this is no snapshot" : "this is no journal", 4);
    (void)from.number<std::uint32_t>();  // which version of the library wrote it
    table_end_ = from.number<std::uint64_t>();
    file_bytes_ = from.number<std::uint64_t>();
    const auto num_sections = from.number<std::uint32_t>();
    const bool fits =
        kind == file_kind::snapshot ? file_bytes_ == source.size() : file_bytes_ <= source.size();
    if (!fits)
      refuse(source.size(), "the file should have " + std::to_string(file_bytes_) + " bytes, and has " +
                                std::to_string(source.size()));
    if (table_end_ != header_bytes + entry_bytes * num_sections || table_end_ > file_bytes_)
      refuse(24, "the table of sections does not fit the file");
    require_zero(bytes.subspan(44, checksum_offset - 44), 44);
  }

  void read_table(std::span<const std::byte> bytes) {
    std::uint64_t at = table_end_;
    for (std::uint64_t entry = header_bytes; entry < table_end_; entry += entry_bytes) {
      byte_reader from(bytes.subspan(entry, entry_bytes), name_, entry);
      section s;
      s.kind = static_cast<section_kind>(from.number<std::uint32_t>());
      s.layer = from.number<std::uint32_t>();
      s.offset = from.number<std::uint64_t>();
      s.stored_bytes = from.number<std::uint64_t>();
      s.raw_bytes = from.number<std::uint64_t>();
      s.checksum = from.number<std::uint32_t>();
      s.compression = from.number<std::uint32_t>();
      require_zero(from.raw(from.left()), entry + 40);
      if (s.offset != at) refuse(entry + 8, "a section is not where the one before it ends");
      if (s.stored_bytes > file_bytes_ || padded(s.stored_bytes) > file_bytes_ - at)
        refuse(entry + 16, "a section reaches past the end of the file");
      at += padded(s.stored_bytes);
      const bool possible = s.compression == 0 ? s.raw_bytes == s.stored_bytes
                                               : s.raw_bytes / max_compression <= s.stored_bytes;
      if (!possible) refuse(entry + 24, "a section cannot have that many bytes");
      sections_.push_back(s);
    }
    if (at != file_bytes_) refuse(32, "the sections do not fill the file");
  }

  void require_zero(std::span<const std::byte> bytes, std::uint64_t offset) const {
    if (std::any_of(bytes.begin(), bytes.end(), [](std::byte b) { return b != std::byte{0}; }))
      refuse(offset, "bytes that are not used must be zero");
  }

  std::string name_;
  std::uint64_t table_end_ = 0;
  std::uint64_t file_bytes_ = 0;
  std::uint32_t version_ = 0;
  std::vector<section> sections_;
};

/// Reads and checks a whole section that is not compressed. Throws load_error.
inline std::vector<std::byte> read_section(const byte_source& source, const section& s) {
  if (s.compression != 0) throw load_error(source.name(), s.offset, "this section may not be compressed");
  std::vector<std::byte> bytes(static_cast<std::size_t>(s.stored_bytes));
  source.read(s.offset, bytes);
  if (crc32c(bytes) != s.checksum)
    throw load_error(source.name(), s.offset, "the checksum of a section does not match");
  return bytes;
}

/// Throws load_error unless the bytes behind a section are zero.
inline void check_padding(const byte_source& source, const section& s) {
  std::array<std::byte, 64> pad{};
  const std::uint64_t end = s.offset + s.stored_bytes;
  const auto size = static_cast<std::size_t>(padded(s.stored_bytes) - s.stored_bytes);
  source.read(end, std::span(pad).first(size));
  if (std::any_of(pad.begin(), pad.end(), [](std::byte b) { return b != std::byte{0}; }))
    throw load_error(source.name(), end, "the padding of a section must be zero");
}

}  // namespace detail

}  // namespace kvcache::inline v0::store
