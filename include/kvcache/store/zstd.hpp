// SPDX-License-Identifier: MIT
// zstd: sections compressed by libzstd, which a program that includes this header links (CMake: kvcache::zstd).
//
//   const store::zstd compression;
//   store::save(cache, who, "chat.kv", {.compression = &compression});
//   auto chat = store::load<Cache>("chat.kv", {.compression = &compression});
//
// Rows of bf16 lose a fifth to a third, those of low-bit codecs next to nothing.
#pragma once

#include <kvcache/store/io.hpp>
#include <kvcache/store/section_io.hpp>

#include <zstd.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvcache::inline v0::store {

class zstd final : public section_compressor {
 public:
  /// \param level  1 (fast) to 19 (small)
  explicit zstd(int level = 1) noexcept : level_(level) {}

  [[nodiscard]] std::uint32_t id() const noexcept override { return 1; }

  /// Throws write_error, std::bad_alloc.
  [[nodiscard]] std::vector<std::byte> compress(std::span<const std::byte> raw) const override {
    std::vector<std::byte> out(::ZSTD_compressBound(raw.size()));
    const std::size_t size = ::ZSTD_compress(out.data(), out.size(), raw.data(), raw.size(), level_);
    if (::ZSTD_isError(size) != 0)
      throw write_error(std::string("kvcache: zstd: ") + ::ZSTD_getErrorName(size));
    out.resize(size);
    return out;
  }

  [[nodiscard]] bool decompress(std::span<const std::byte> stored, std::span<std::byte> raw) const override {
    if (::ZSTD_getFrameContentSize(stored.data(), stored.size()) != raw.size()) return false;
    return ::ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size()) == raw.size();
  }

 private:
  int level_;
};

}  // namespace kvcache::inline v0::store
