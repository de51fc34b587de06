// SPDX-License-Identifier: MIT
// directory_tier: a tier of plain files, one for each record, that any number of processes use at once.
//
//   folder/books           the lock, and the bytes that are there
//   folder/3f/3f09...c2    a record, under the digest of its key; its time of change is when it was last used
//   folder/3f/*.tmp        a record on its way
//
// A record is written under another name and renamed, so a reader sees a whole one or none, and needs no lock. Whoever
// changes what is there holds the lock, waits for it a bounded time only, and keeps the books; a process that is killed
// at any moment leaves at worst books that say too much, which the next one to make room puts right, and a file *.tmp,
// which the next one to make room or to start removes when it is old.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/tier.hpp>
#include <kvcache/store/tier_folder.hpp>
#include <kvcache/store/tier_record.hpp>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace kvcache::inline v0::store {

struct directory_options {
  index_t budget_bytes = 4_GiB;         ///< of all records, each file rounded up to 4 KiB
  index_t max_payload_bytes = 512_MiB;  ///< of one record
  bool sync =
      false;  ///< wait for the disk at each put; without, a record may be torn after a power cut, and is a miss
  std::chrono::milliseconds patience{
      250};  ///< longest wait for other processes before a put or erase is given up
  std::chrono::seconds stale_after{600};  ///< age at which a file *.tmp is nobody's any more
  bool group_may_read = false;  ///< files are for the owner alone unless set: they tell what was asked
};

class directory_tier {
 public:
  /// Makes the folder when it is not there, and counts what is in it. Throws shape_error for a budget or limit below 1;
  /// a folder that cannot be used is no error here: it is counted, and everything misses until it can be.
  explicit directory_tier(std::filesystem::path folder, directory_options options = {});

  /// O(record): one read of the file, which also counts as its use.
  [[nodiscard]] bool get(std::string_view space, std::span<const token_id> tokens,
                         std::vector<std::byte>& out) noexcept;
  /// O(record); when the budget is used up, the files used least recently go until a tenth of it is free, which looks at
  /// every file once.
  bool put(std::string_view space, std::span<const token_id> tokens,
           std::span<const std::byte> payload) noexcept;
  [[nodiscard]] bool contains(std::string_view space, std::span<const token_id> tokens) noexcept;
  bool erase(std::string_view space, std::span<const token_id> tokens) noexcept;

  [[nodiscard]] const tier_stats& stats() const noexcept { return stats_; }

  /// Bytes of all records, of every process; 0 if that cannot be found out.
  [[nodiscard]] index_t bytes() noexcept;

 private:
  struct entry {
    std::string path;
    std::filesystem::file_time_type used;
    std::uint64_t charged;
  };

  [[nodiscard]] unsigned file_mode() const noexcept { return options_.group_may_read ? 0640 : 0600; }
  [[nodiscard]] detail::folder_books lock() const {
    return {root_ + "books", file_mode(), options_.patience};
  }
  [[nodiscard]] std::string path_of(const tier_key& key) const {
    const std::string name = to_hex(record_name(key));
    return root_ + name.substr(0, 2) + '/' + name;
  }

  bool read_record(const tier_key& key, std::vector<std::byte>& out);
  [[nodiscard]] detail::descriptor open_record(const tier_key& key, const std::string& path,
                                               record_check& head);
  bool write_record(const tier_key& key, std::span<const std::byte> payload);
  [[nodiscard]] bool publish(const std::string& temporary, const std::string& path, std::uint64_t charged);
  bool remove(const std::string& path);
  [[nodiscard]] std::uint64_t recount(std::vector<entry>* entries);
  [[nodiscard]] std::uint64_t make_room(std::uint64_t wanted);
  bool make_folder(const std::string& path) const noexcept;
  [[nodiscard]] std::string temporary_name(const std::string& path);

  /// Runs `body`, which may run out of memory.
  template <class Body>
  bool guarded(Body body) noexcept {
    try {
      return body();
    } catch (const std::exception&) {
      ++stats_.errors;
      return false;
    }
  }

  std::string root_;  // ends in a slash
  directory_options options_;
  tier_stats stats_;
  std::vector<std::byte> head_;
  std::string writing_;  // the file *.tmp of the put under way
  std::uint64_t num_temporaries_ = 0;
};

static_assert(tier<directory_tier>);

inline directory_tier::directory_tier(std::filesystem::path folder, directory_options options)
    : root_(folder.string() + '/'), options_(options) {
  if (options_.budget_bytes < 1 || options_.max_payload_bytes < 1)
    throw shape_error("kvcache: directory_tier: the budget and the limit must be at least one byte");
  (void)guarded([&] {
    std::error_code error;
    std::filesystem::create_directories(folder.parent_path(), error);
    (void)make_folder(root_);
    const auto books = lock();
    if (!books.held() || !books.set_total(recount(nullptr))) ++stats_.errors;
    return true;
  });
}

inline bool directory_tier::get(std::string_view space, std::span<const token_id> tokens,
                                std::vector<std::byte>& out) noexcept {
  const bool hit = guarded([&] { return read_record({space, tokens}, out); });
  if (!hit) out.clear();
  ++(hit ? stats_.hits : stats_.misses);
  return hit;
}

inline bool directory_tier::put(std::string_view space, std::span<const token_id> tokens,
                                std::span<const std::byte> payload) noexcept {
  return guarded([&] { return write_record({space, tokens}, payload); });
}

inline bool directory_tier::contains(std::string_view space, std::span<const token_id> tokens) noexcept {
  return guarded([&] {
    const tier_key key{space, tokens};
    record_check head;
    return within_limits(key) && open_record(key, path_of(key), head);
  });
}

inline bool directory_tier::erase(std::string_view space, std::span<const token_id> tokens) noexcept {
  return guarded([&] {
    const tier_key key{space, tokens};
    return within_limits(key) && remove(path_of(key));
  });
}

inline index_t directory_tier::bytes() noexcept {
  index_t result = 0;
  (void)guarded([&] {
    const auto books = lock();
    if (!books.held()) return false;
    result = static_cast<index_t>(books.total().value_or(0));
    return true;
  });
  return result;
}

/// The file of a good head whose size is what the head says; otherwise nothing, and a bad one is counted and removed.
inline detail::descriptor directory_tier::open_record(const tier_key& key, const std::string& path,
                                                      record_check& head) {
  detail::descriptor file(path, O_RDONLY);
  if (!file && errno == ELOOP) {  // a symbolic link: never followed
    count_bad_record(stats_, record_state::foreign);
    (void)remove(path);
    return {};
  }
  if (!file) {
    if (errno != ENOENT) ++stats_.errors;
    return {};
  }
  const auto size = file.size();
  const std::size_t head_bytes = record_head_bytes(key);
  head_.resize(static_cast<std::size_t>(std::min<std::uint64_t>(size.value_or(0), head_bytes)));
  head = file.read(0, head_) ? check_record_head(key, head_) : record_check{};
  if (head.state == record_state::good && *size - head_bytes != head.payload_bytes)
    head.state = record_state::damaged;
  if (head.state == record_state::good) return file;
  count_bad_record(stats_, head.state);
  (void)remove(path);
  return {};
}

inline bool directory_tier::read_record(const tier_key& key, std::vector<std::byte>& out) {
  if (!within_limits(key)) return false;
  const std::string path = path_of(key);
  record_check head;
  const detail::descriptor file = open_record(key, path, head);
  if (!file) return false;
  if (head.payload_bytes > static_cast<std::uint64_t>(options_.max_payload_bytes)) {
    ++stats_.refused;
    return false;
  }
  out.resize(static_cast<std::size_t>(head.payload_bytes));  // no more than the file has
  if (!file.read(head_.size(), out) || crc32c(out) != head.payload_crc) {
    count_bad_record(stats_, record_state::damaged);
    (void)remove(path);
    return false;
  }
  (void)::futimens(file.get(), nullptr);  // where that is not allowed, the file only looks older than it is
  return true;
}

inline bool directory_tier::write_record(const tier_key& key, std::span<const std::byte> payload) {
  if (!within_limits(key) || payload.size() > static_cast<std::size_t>(options_.max_payload_bytes) ||
      detail::charged_bytes(record_head_bytes(key) + payload.size()) >
          static_cast<std::uint64_t>(options_.budget_bytes)) {
    ++stats_.refused;
    return false;
  }
  write_record_head(key, payload, head_);
  const std::string path = path_of(key);
  const std::string& temporary = writing_ = temporary_name(path);
  const auto create = [&] { return detail::descriptor(temporary, O_WRONLY | O_CREAT | O_EXCL, file_mode()); };
  detail::descriptor file = create();
  if (!file && errno == ENOENT && make_folder(root_) && make_folder(path.substr(0, root_.size() + 2)))
    file = create();
  const bool written = file && file.write(0, head_) && file.write(head_.size(), payload) &&
                       (!options_.sync || ::fsync(file.get()) == 0);
  const bool kept = written && publish(temporary, path, detail::charged_bytes(head_.size() + payload.size()));
  if (!kept && file) (void)::unlink(temporary.c_str());
  if (kept && options_.sync) {
    const detail::descriptor parent(path.substr(0, root_.size() + 2), O_RDONLY | O_DIRECTORY);
    if (parent) (void)::fsync(parent.get());
  }
  ++(kept ? stats_.puts : stats_.errors);
  return kept;
}

/// Gives a file that is complete its name. The books say too much, not too little, while that is under way.
inline bool directory_tier::publish(const std::string& temporary, const std::string& path,
                                    std::uint64_t charged) {
  const auto books = lock();
  if (!books.held()) return false;
  const auto budget = static_cast<std::uint64_t>(options_.budget_bytes);
  struct ::stat replaced {};
  const auto replaced_bytes = [&]() -> std::uint64_t {
    return ::lstat(path.c_str(), &replaced) == 0 && S_ISREG(replaced.st_mode)
               ? detail::charged_bytes(static_cast<std::uint64_t>(replaced.st_size))
               : 0;
  };
  std::uint64_t total = books.total() ? *books.total() : recount(nullptr);
  if (total > budget || charged > budget - total) total = make_room(charged);
  const std::uint64_t old = std::min(replaced_bytes(), total);
  if (!books.set_total(total + charged)) return false;
  const bool renamed = ::rename(temporary.c_str(), path.c_str()) == 0;
  (void)books.set_total(renamed ? total + charged - old : total);
  return renamed;
}

inline bool directory_tier::remove(const std::string& path) {
  struct ::stat about {};
  if (::lstat(path.c_str(), &about) != 0) return false;
  const auto books = lock();
  if (!books.held() || ::lstat(path.c_str(), &about) != 0 || ::unlink(path.c_str()) != 0) {
    if (!books.held() || errno != ENOENT) ++stats_.errors;
    return false;
  }
  const std::uint64_t charged =
      S_ISREG(about.st_mode) ? detail::charged_bytes(static_cast<std::uint64_t>(about.st_size)) : 0;
  if (const auto total = books.total()) (void)books.set_total(*total - std::min(*total, charged));
  return true;
}

/// Bytes of all records, and what they are. Removes temporary files that are old. \pre the lock is held
inline std::uint64_t directory_tier::recount(std::vector<entry>* entries) {
  namespace fs = std::filesystem;
  const auto too_old = fs::file_time_type::clock::now() - options_.stale_after;
  std::uint64_t total = 0;
  std::error_code error;
  for (fs::directory_iterator folder(root_, error); !error && folder != fs::directory_iterator();
       folder.increment(error)) {
    std::error_code inner;
    if (folder->path().filename().native().size() != 2 || !folder->is_directory(inner) ||
        folder->is_symlink(inner))
      continue;
    for (fs::directory_iterator file(folder->path(), inner); !inner && file != fs::directory_iterator();
         file.increment(inner)) {
      std::error_code gone;
      if (file->is_symlink(gone) || !file->is_regular_file(gone)) continue;
      const auto used = file->last_write_time(gone);
      const auto charged = detail::charged_bytes(gone ? 0 : file->file_size(gone));
      if (gone) continue;
      if (file->path().extension() == ".tmp") {
        if (used < too_old && file->path() != writing_) (void)::unlink(file->path().c_str());
        continue;
      }
      total += charged;
      if (entries != nullptr) entries->push_back({file->path().string(), used, charged});
    }
  }
  return total;
}

/// Removes the files used least recently until there is room for `wanted` bytes. \return bytes that are left
inline std::uint64_t directory_tier::make_room(std::uint64_t wanted) {
  const auto budget = static_cast<std::uint64_t>(options_.budget_bytes);
  const std::uint64_t most = std::min(budget - wanted, budget - budget / 10);
  std::vector<entry> entries;
  std::uint64_t total = recount(&entries);
  if (total <= budget - wanted) return total;  // the books said too much
  std::sort(entries.begin(), entries.end(), [](const entry& a, const entry& b) { return a.used < b.used; });
  for (const entry& e : entries) {
    if (total <= most) break;
    if (::unlink(e.path.c_str()) != 0) continue;
    total -= e.charged;
    ++stats_.evicted;
  }
  return total;
}

inline bool directory_tier::make_folder(const std::string& path) const noexcept {
  return ::mkdir(path.c_str(), options_.group_may_read ? 0750 : 0700) == 0 || errno == EEXIST;
}

/// A name that no other process uses, in the folder of `path`.
inline std::string directory_tier::temporary_name(const std::string& path) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  return path + '.' + std::to_string(::getpid()) + '-' + std::to_string(now) + '-' +
         std::to_string(num_temporaries_++) + ".tmp";
}

}  // namespace kvcache::inline v0::store
