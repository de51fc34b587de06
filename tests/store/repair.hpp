// SPDX-License-Identifier: MIT
// Checksums made right for what a file has now: what damage alone never does, and malice may. With them, everything behind
// the checksums can be tried out.
#pragma once

#include <kvcache/store/crc32c.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace stored {

/// Numbers at places of a file; those past its end read as zero and are not written.
class patched_file {
 public:
  explicit patched_file(std::vector<std::byte>& file) : file_(&file) {}

  template <class Number>
  [[nodiscard]] Number get(std::size_t at) const {
    Number value{};
    if (has(at, sizeof(value))) std::memcpy(&value, file_->data() + at, sizeof(value));
    return value;
  }
  template <class Number>
  void put(std::size_t at, Number value) {
    if (has(at, sizeof(value))) std::memcpy(file_->data() + at, &value, sizeof(value));
  }
  [[nodiscard]] bool has(std::size_t at, std::size_t size) const {
    return at <= file_->size() && size <= file_->size() - at;
  }
  [[nodiscard]] std::uint32_t checksum(std::size_t at, std::size_t size) const {
    return has(at, size) ? kvcache::store::crc32c(std::span<const std::byte>(*file_).subspan(at, size)) : 0;
  }

 private:
  std::vector<std::byte>* file_;
};

/// Header, table and sections; see docs/format.md.
inline void repair(std::vector<std::byte>& bytes) {
  patched_file file(bytes);
  const auto table_end = file.get<std::uint64_t>(24);
  for (std::size_t entry = 64; entry + 64 <= table_end && file.has(entry, 64); entry += 64)
    file.put(entry + 32,
             file.checksum(file.get<std::uint64_t>(entry + 8), file.get<std::uint64_t>(entry + 16)));
  file.put(60, std::uint32_t{0});
  file.put(60, file.checksum(0, table_end));
}

/// The same, and all records behind them.
inline void repair_journal(std::vector<std::byte>& bytes) {
  repair(bytes);
  patched_file file(bytes);
  auto chain = file.get<std::uint32_t>(60);
  std::uint64_t number = 0;
  for (std::size_t at = file.get<std::uint64_t>(32); at >= 64 && file.has(at, 64); ++number) {
    const auto payload = file.get<std::uint64_t>(at + 32);
    file.put(at + 8, number);
    file.put(at + 20, chain);
    file.put(at + 24, file.checksum(at + 64, payload));
    file.put(at + 16, std::uint32_t{0});
    chain = file.checksum(at, 64);
    file.put(at + 16, chain);
    if (!file.has(at + 64, payload)) break;
    at += 64 + payload;
  }
}

}  // namespace stored
