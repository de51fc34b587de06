// SPDX-License-Identifier: MIT
// Where evicted blocks go with --spill: a tier in a folder of its own, which goes when the run ends, and counts of what
// passed through. An LMDB file where this was built with it, else a file for each block.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/serving/prefix_node.hpp>
#include <kvcache/serving/spill_tier.hpp>
#include <kvcache/store/spill_to.hpp>

#ifdef SERVE_MANY_LMDB
#include <kvcache/store/lmdb_tier.hpp>
#else
#include <kvcache/store/directory_tier.hpp>
#endif

#include <cstddef>
#include <filesystem>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <utility>

namespace serving {

using kvcache::index_t;

/// What went to the tier and what came back.
struct spill_figures {
  index_t blocks_out = 0, bytes_out = 0;
  index_t blocks_back = 0, bytes_back = 0;
};

/// Makes a folder inside another one, and removes it with all that is in it.
class temporary_folder {
 public:
  /// Throws std::filesystem::filesystem_error.
  explicit temporary_folder(const std::filesystem::path& inside) {
    std::filesystem::create_directories(inside);
    std::random_device random;
    do path_ = inside / ("serve_many." + std::to_string(random()));
    while (!std::filesystem::create_directory(path_));
  }
  temporary_folder(const temporary_folder&) = delete;
  temporary_folder& operator=(const temporary_folder&) = delete;
  ~temporary_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }

 private:
  std::filesystem::path path_;
};

/// A spill_tier. Begins empty: a folder that was left behind could be of another model.
class spill_folder {
 public:
  using space = kvcache::serving::prefix_space;
  using tokens = std::span<const kvcache::token_id>;

#ifdef SERVE_MANY_LMDB
  static constexpr const char* kind = "LMDB";
  explicit spill_folder(const std::filesystem::path& inside)
      : folder_(inside), tier_(folder_.path(), {.sync = false}), to_(tier_) {}
#else
  static constexpr const char* kind = "directory";
  explicit spill_folder(const std::filesystem::path& inside)
      : folder_(inside), tier_(folder_.path()), to_(tier_) {}
#endif

  /// Called after whatever takes memory.
  std::function<void()> watch{};

  bool put(const space& s, tokens t, std::span<const std::byte> bytes) {
    const bool done = to_.put(s, t, bytes);
    figures_.blocks_out += done ? 1 : 0;
    figures_.bytes_out += done ? std::ssize(bytes) : 0;
    if (watch) watch();
    return done;
  }
  index_t get(const space& s, tokens t, std::span<std::byte> out) {
    const index_t size = to_.get(s, t, out);
    figures_.blocks_back += size >= 0 ? 1 : 0;
    figures_.bytes_back += size >= 0 ? size : 0;
    if (watch) watch();
    return size;
  }
  [[nodiscard]] bool contains(const space& s, tokens t) { return to_.contains(s, t); }
  bool erase(const space& s, tokens t) { return to_.erase(s, t); }

  [[nodiscard]] const spill_figures& figures() const noexcept { return figures_; }

 private:
#ifdef SERVE_MANY_LMDB
  using tier_type = kvcache::store::lmdb_tier;
#else
  using tier_type = kvcache::store::directory_tier;
#endif

  temporary_folder folder_;
  tier_type tier_;
  kvcache::store::spill_to<tier_type> to_;
  spill_figures figures_;
};

static_assert(kvcache::serving::spill_tier<spill_folder>);

}  // namespace serving
