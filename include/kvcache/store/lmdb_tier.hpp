// SPDX-License-Identifier: MIT
// lmdb_tier: a tier in one memory-mapped file, which any number of processes of this machine use at once. Needs liblmdb
// (CMake: kvcache::lmdb).
//
// Reads take no lock and copy nothing: view() hands out the payload where it lies in the page cache. Writers wait for
// each other. A process may be killed at any moment. What was used least recently goes when the map fills up; the uses
// of a process are written down when it puts, or after some hundred of them, so the order is a rough one.
//
// Readers keep the pages that were freed since they began, so a process that stands still while it reads can leave no room to
// change anything, an erase included. Changes wait for it, 25 ms at most, and are refused then (stats().refused).
//
// LMDB trusts its own pages: the checksums find damage in records, but a file whose tree is forged, or that is cut short
// while it is mapped, can crash the reader. Keep the folder where only friends write. Not for network file systems.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/lmdb_environment.hpp>
#include <kvcache/store/tier.hpp>
#include <kvcache/store/tier_record.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>  // nanosleep
#include <exception>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace kvcache::inline v0::store {

struct lmdb_options {
  /// Of the file, at most, and of the address space it takes; a file that is larger already stays so. Records fill three
  /// quarters of it; the rest is what LMDB needs to change anything. One record may have an eighth.
  index_t map_bytes = 4_GiB;
  bool sync = true;  ///< false: faster puts, but a power cut may leave a file that has to be removed
  bool group_may_read = false;  ///< the file is for the owner alone unless set: it tells what was asked
};

class lmdb_tier {
 public:
  /// Makes the folder when it is not there. Throws shape_error for a map below 1 MiB; a file that cannot be opened is no
  /// error here: it is counted, everything misses, and it is tried again once a second.
  /// \pre no other lmdb_tier of this process has the folder open, under whatever name
  explicit lmdb_tier(const std::filesystem::path& folder, lmdb_options options = {});

  /// Calls use(payload) where it lies in the map, verified; aligned to nothing, and gone when `use` returns, which may not
  /// call this tier. Nothing is copied and no memory taken. O(record).
  /// \return false on a miss. Throws what `use` throws.
  template <class Use>
  bool view(std::string_view space, std::span<const token_id> tokens, Use use);

  [[nodiscard]] bool get(std::string_view space, std::span<const token_id> tokens,
                         std::vector<std::byte>& out) noexcept;
  /// O(record + log n) for n records, and for each that has to go; waits for a put of another process.
  bool put(std::string_view space, std::span<const token_id> tokens,
           std::span<const std::byte> payload) noexcept;
  [[nodiscard]] bool contains(std::string_view space, std::span<const token_id> tokens) noexcept;
  /// May be refused, see above; the record stays then.
  bool erase(std::string_view space, std::span<const token_id> tokens) noexcept;

  [[nodiscard]] const tier_stats& stats() const noexcept { return stats_; }

  /// Bytes of all records and tables, of every process.
  [[nodiscard]] index_t bytes() noexcept;

 private:
  static constexpr std::size_t most_touched = 256;
  static constexpr int most_attempts = 8;  // of a change, where the map is full

  [[nodiscard]] bool ready() noexcept;
  template <class Check>
  [[nodiscard]] record_state find(const digest256& name, Check check, bool& found);
  void note_use(const digest256& name);
  void wait_for_readers(int attempt) noexcept;
  bool erase_record(const digest256& name) noexcept;
  void count_failure(int error) noexcept;
  [[nodiscard]] int write_uses(MDB_txn* txn) noexcept;
  [[nodiscard]] int use_now(MDB_txn* txn, const digest256& name, std::uint64_t number) noexcept;
  [[nodiscard]] std::uint64_t next_number(MDB_txn* txn) noexcept;
  [[nodiscard]] int forget_use(MDB_txn* txn, const MDB_val& use) noexcept;
  [[nodiscard]] int remove(MDB_txn* txn, const digest256& name) noexcept;
  [[nodiscard]] int evict(MDB_txn* txn, std::size_t most_bytes) noexcept;
  [[nodiscard]] int evict_one(MDB_txn* txn) noexcept;
  [[nodiscard]] int store(MDB_txn* txn, const digest256& name, std::span<const std::byte> payload,
                          std::size_t needed) noexcept;

  std::string folder_;
  lmdb_options options_;
  detail::lmdb_environment env_;
  tier_stats stats_;
  std::vector<digest256> touched_;  // read since the last write
  std::vector<std::byte> head_;
  std::chrono::steady_clock::time_point retry_at_{};
  index_t evicted_now_ = 0;  // by the transaction under way
};

static_assert(tier<lmdb_tier>);

inline lmdb_tier::lmdb_tier(const std::filesystem::path& folder, lmdb_options options)
    : folder_(folder.string()), options_(options) {
  if (options_.map_bytes < 1_MiB) throw shape_error("kvcache: lmdb_tier: the map must have at least 1 MiB");
  touched_.reserve(most_touched);
  (void)ready();
}

/// Opens the file unless it is open, or failed to just now.
inline bool lmdb_tier::ready() noexcept {
  if (env_.usable()) return true;
  const auto now = std::chrono::steady_clock::now();
  if (now < retry_at_) {
    ++stats_.unreachable;
    return false;
  }
  retry_at_ = now + std::chrono::seconds(1);
  int error = 0;
  try {
    std::error_code ignored;  // opening tells
    if (std::filesystem::create_directories(folder_, ignored))
      std::filesystem::permissions(
          folder_, static_cast<std::filesystem::perms>(options_.group_may_read ? 0750 : 0700), ignored);
    error = env_.open(folder_, static_cast<std::size_t>(options_.map_bytes),
                      options_.sync ? MDB_NOMETASYNC : MDB_NOSYNC, options_.group_may_read ? 0640 : 0600);
  } catch (const std::exception&) {
    error = -1;
  }
  if (error != 0) ++stats_.errors;
  return error == 0;
}

/// Calls check(record) if there is one, inside a read transaction. What it finds wrong is counted and removed.
template <class Check>
record_state lmdb_tier::find(const digest256& name, Check check, bool& found) {
  record_state state = record_state::damaged;
  found = false;
  int error = 0;
  const int opened = env_.read([&](MDB_txn* txn) {
    MDB_val key = detail::lmdb_value(name);
    MDB_val value{};
    error = ::mdb_get(txn, env_.records(), &key, &value);
    if (error != 0) return;
    found = true;
    state = check(detail::lmdb_bytes(value));
  });
  if (opened != 0 || (error != 0 && error != MDB_NOTFOUND)) ++stats_.errors;
  if (found && state != record_state::good) {
    count_bad_record(stats_, state);
    (void)erase_record(name);
  }
  return state;
}

template <class Use>
bool lmdb_tier::view(std::string_view space, std::span<const token_id> tokens, Use use) {
  const tier_key key{space, tokens};
  bool found = false;
  record_state state = record_state::damaged;
  if (within_limits(key) && ready()) {
    const digest256 name = record_name(key);
    state = find(
        name,
        [&](std::span<const std::byte> record) {
          std::span<const std::byte> payload;
          const record_state checked = check_record(key, record, payload);
          if (checked == record_state::good) use(payload);
          return checked;
        },
        found);
    if (found && state == record_state::good) note_use(name);
  }
  const bool hit = found && state == record_state::good;
  ++(hit ? stats_.hits : stats_.misses);
  return hit;
}

inline bool lmdb_tier::get(std::string_view space, std::span<const token_id> tokens,
                           std::vector<std::byte>& out) noexcept {
  try {
    if (view(space, tokens,
             [&](std::span<const std::byte> payload) { out.assign(payload.begin(), payload.end()); }))
      return true;
  } catch (const std::exception&) {
    ++stats_.errors;
    ++stats_.misses;
  }
  out.clear();
  return false;
}

inline bool lmdb_tier::contains(std::string_view space, std::span<const token_id> tokens) noexcept {
  const tier_key key{space, tokens};
  if (!within_limits(key) || !ready()) return false;
  bool found = false;
  const auto check = [&](std::span<const std::byte> record) { return check_record_head(key, record).state; };
  return find(record_name(key), check, found) == record_state::good && found;
}

inline bool lmdb_tier::erase(std::string_view space, std::span<const token_id> tokens) noexcept {
  const tier_key key{space, tokens};
  if (!within_limits(key) || !ready()) return false;
  return erase_record(record_name(key));
}

inline bool lmdb_tier::put(std::string_view space, std::span<const token_id> tokens,
                           std::span<const std::byte> payload) noexcept {
  const tier_key key{space, tokens};
  if (!within_limits(key) || payload.size() > static_cast<std::size_t>(options_.map_bytes) / 8 ||
      record_head_bytes(key) > static_cast<std::size_t>(options_.map_bytes) / 8) {
    ++stats_.refused;
    return false;
  }
  if (!ready()) return false;
  try {
    write_record_head(key, payload, head_);
  } catch (const std::exception&) {
    ++stats_.errors;
    return false;
  }
  const digest256 name = record_name(key);
  const std::size_t needed = head_.size() + payload.size() + 8 * env_.page_bytes();
  int error = 0;
  for (int attempt = 0; attempt < most_attempts; ++attempt) {
    evicted_now_ = 0;
    error = env_.write([&](MDB_txn* txn) { return store(txn, name, payload, needed); });
    if (error == 0) stats_.evicted += evicted_now_;
    if (error != MDB_MAP_FULL) break;
    const bool is_held = env_.num_commits_held() > 1;
    if (is_held) wait_for_readers(attempt);
    if (is_held && attempt < most_attempts / 2) continue;  // dropping records would free nothing
    // Free pages may lie in pieces that are too small, and those freed now are free only two commits later.
    evicted_now_ = 0;
    const int freed = env_.write([&](MDB_txn* txn) {
      const std::size_t used = env_.used_bytes(txn);
      return evict(txn, used - std::min(used, (2U << attempt) * needed));
    });
    if (freed == 0) stats_.evicted += evicted_now_;
  }
  if (error == 0) touched_.clear();
  if (error == 0) ++stats_.puts;
  count_failure(error);
  return error == 0;
}

inline index_t lmdb_tier::bytes() noexcept {
  std::size_t used = 0;
  if (ready() && env_.read([&](MDB_txn* txn) { used = env_.used_bytes(txn); }) != 0) ++stats_.errors;
  return static_cast<index_t>(used);
}

inline bool lmdb_tier::erase_record(const digest256& name) noexcept {
  int error = MDB_MAP_FULL;
  for (int attempt = 0; error == MDB_MAP_FULL && attempt < most_attempts; ++attempt) {
    if (attempt > 0) wait_for_readers(attempt - 1);
    error = env_.write([&](MDB_txn* txn) { return remove(txn, name); });
  }
  if (error != MDB_NOTFOUND) count_failure(error);
  return error == 0;
}

/// After a change for which the map was full: 0.1 ms, twice that the next time, 25 ms in most_attempts.
inline void lmdb_tier::wait_for_readers(int attempt) noexcept {
  env_.forget_dead_readers();
  const ::timespec pause{0, 100'000L << attempt};
  (void)::nanosleep(&pause, nullptr);
}

inline void lmdb_tier::count_failure(int error) noexcept {
  if (error != 0) ++(error == MDB_MAP_FULL ? stats_.refused : stats_.errors);
}

/// Remembers a use until the next write; after many of them, writes.
inline void lmdb_tier::note_use(const digest256& name) {
  if (touched_.empty() || touched_.back() != name) touched_.push_back(name);
  if (touched_.size() < most_touched) return;
  const int error = env_.write([&](MDB_txn* txn) { return write_uses(txn); });
  if (error != MDB_MAP_FULL) count_failure(error);  // without room the order is a rougher one, nothing else
  touched_.clear();
}

// ---- inside a write transaction: each returns what LMDB said --------------------------------------------------------

inline int lmdb_tier::store(MDB_txn* txn, const digest256& name, std::span<const std::byte> payload,
                            std::size_t needed) noexcept {
  int error = write_uses(txn);
  // The map of a file that was made with a larger one is larger than what was asked for.
  const std::size_t most = std::min(env_.map_bytes(), static_cast<std::size_t>(options_.map_bytes)) / 4 * 3;
  if (error == 0 && env_.used_bytes(txn) > most - std::min(most, needed))
    error = evict(txn, most - std::min(most, needed));
  if (error == 0) error = use_now(txn, name, next_number(txn));
  MDB_val key = detail::lmdb_value(name);
  MDB_val value{head_.size() + payload.size(), nullptr};
  if (error == 0) error = ::mdb_put(txn, env_.records(), &key, &value, MDB_RESERVE);
  if (error != 0) return error;
  auto* to = static_cast<std::byte*>(value.mv_data);
  std::memcpy(to, head_.data(), head_.size());
  if (!payload.empty()) std::memcpy(to + head_.size(), payload.data(), payload.size());
  return 0;
}

inline int lmdb_tier::write_uses(MDB_txn* txn) noexcept {
  for (const digest256& name : touched_) {
    MDB_val key = detail::lmdb_value(name);
    MDB_val value{};
    int error = ::mdb_get(txn, env_.records(), &key, &value);
    if (error == MDB_NOTFOUND) continue;
    if (error == 0) error = use_now(txn, name, next_number(txn));
    if (error != 0) return error;
  }
  return 0;
}

/// One more than the last; entries of `order` that no use has are removed.
inline std::uint64_t lmdb_tier::next_number(MDB_txn* txn) noexcept {
  constexpr std::uint64_t most = std::uint64_t{1} << 63U;  // never come to by counting
  MDB_cursor* cursor = nullptr;
  MDB_val key{};
  MDB_val value{};
  std::uint64_t last = 0;
  if (::mdb_cursor_open(txn, env_.order(), &cursor) != 0) return 1;
  while (::mdb_cursor_get(cursor, &key, &value, MDB_LAST) == 0) {
    last = detail::decode_use(detail::lmdb_bytes(key));
    if ((last > 0 && last < most) || ::mdb_cursor_del(cursor, 0) != 0) break;
    last = 0;
  }
  ::mdb_cursor_close(cursor);
  return last + 1;
}

/// Takes a use out of the order. \param use  copied first: what LMDB hands out may move with any change
inline int lmdb_tier::forget_use(MDB_txn* txn, const MDB_val& use) noexcept {
  const detail::lmdb_use number = detail::encode_use(detail::decode_use(detail::lmdb_bytes(use)));
  MDB_val key = detail::lmdb_value(number);
  return ::mdb_del(txn, env_.order(), &key, nullptr);
}

/// Moves `name` to the end of the order.
inline int lmdb_tier::use_now(MDB_txn* txn, const digest256& name, std::uint64_t number) noexcept {
  MDB_val key = detail::lmdb_value(name);
  MDB_val old{};
  int error = ::mdb_get(txn, env_.uses(), &key, &old);
  if (error == 0) error = forget_use(txn, old);
  if (error != 0 && error != MDB_NOTFOUND) return error;
  const detail::lmdb_use use = detail::encode_use(number);
  MDB_val use_value = detail::lmdb_value(use);
  error = ::mdb_put(txn, env_.uses(), &key, &use_value, 0);
  return error != 0 ? error : ::mdb_put(txn, env_.order(), &use_value, &key, 0);
}

inline int lmdb_tier::remove(MDB_txn* txn, const digest256& name) noexcept {
  MDB_val key = detail::lmdb_value(name);
  MDB_val use{};
  if (::mdb_get(txn, env_.uses(), &key, &use) == 0) {
    const int error = forget_use(txn, use);
    if (error != 0 && error != MDB_NOTFOUND) return error;
    if (const int failed = ::mdb_del(txn, env_.uses(), &key, nullptr); failed != 0) return failed;
  }
  return ::mdb_del(txn, env_.records(), &key, nullptr);
}

/// Removes the records used least recently until the tables have at most `most_bytes`, or nothing is left.
inline int lmdb_tier::evict(MDB_txn* txn, std::size_t most_bytes) noexcept {
  while (env_.used_bytes(txn) > most_bytes) {
    const int error = evict_one(txn);
    if (error == MDB_NOTFOUND) return 0;
    if (error != 0) return error;
  }
  return 0;
}

/// Removes one, and one entry of a table in any case, whatever the tables of a damaged file say of each other.
/// \return MDB_NOTFOUND if nothing is left
inline int lmdb_tier::evict_one(MDB_txn* txn) noexcept {
  for (const MDB_dbi table : {env_.order(), env_.records(), env_.uses()}) {
    MDB_cursor* cursor = nullptr;
    MDB_val key{};
    MDB_val value{};
    int error = ::mdb_cursor_open(txn, table, &cursor);
    if (error != 0) return error;
    error = ::mdb_cursor_get(cursor, &key, &value, MDB_FIRST);
    digest256 name{};  // copied: what LMDB hands out goes with the entry
    if (error == 0 && value.mv_size == name.size()) std::memcpy(name.data(), value.mv_data, name.size());
    if (error == 0) error = ::mdb_cursor_del(cursor, 0);
    ::mdb_cursor_close(cursor);
    if (error == MDB_NOTFOUND) continue;
    if (error == 0 && table == env_.order()) error = remove(txn, name);
    if (error != 0 && error != MDB_NOTFOUND) return error;
    ++evicted_now_;
    return 0;
  }
  return MDB_NOTFOUND;
}

}  // namespace kvcache::inline v0::store
