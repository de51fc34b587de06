// SPDX-License-Identifier: MIT
// What lmdb_tier is made of: an LMDB environment with the three tables of a tier, transactions that end by themselves.
// The one header that includes lmdb.h.
//
//   records   digest of the key -> record
//   uses      digest -> number of its last use
//   order     number of a use (big-endian, so that they sort) -> digest
#pragma once

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <utility>

#include <lmdb.h>
#include <unistd.h>

namespace kvcache::inline v0::store::detail {

inline MDB_val lmdb_value(std::span<const std::byte> bytes) noexcept {
  return {bytes.size(), const_cast<std::byte*>(bytes.data())};  // LMDB does not write to what it is given
}
inline std::span<const std::byte> lmdb_bytes(const MDB_val& value) noexcept {
  return {static_cast<const std::byte*>(value.mv_data), value.mv_size};
}

/// The number of a use, as a key of `order`.
using lmdb_use = std::array<std::byte, 8>;

inline lmdb_use encode_use(std::uint64_t number) noexcept {
  lmdb_use bytes;
  for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<std::byte>(number >> (56 - 8 * i));
  return bytes;
}
/// 0 for what cannot be one.
inline std::uint64_t decode_use(std::span<const std::byte> bytes) noexcept {
  std::uint64_t number = 0;
  if (bytes.size() != 8) return 0;
  for (const std::byte b : bytes) number = number << 8U | std::to_integer<std::uint64_t>(b);
  return number;
}

/// A transaction; undone unless committed.
class lmdb_transaction {
 public:
  lmdb_transaction() = default;
  lmdb_transaction(MDB_env* env, unsigned flags) noexcept {
    error_ = ::mdb_txn_begin(env, nullptr, flags, &txn_);
  }
  lmdb_transaction(lmdb_transaction&& other) noexcept
      : txn_(std::exchange(other.txn_, nullptr)), error_(other.error_) {}
  lmdb_transaction& operator=(lmdb_transaction&& other) noexcept {
    std::swap(txn_, other.txn_);
    std::swap(error_, other.error_);
    return *this;
  }
  ~lmdb_transaction() { abort(); }

  [[nodiscard]] MDB_txn* get() const noexcept { return txn_; }
  [[nodiscard]] int error() const noexcept { return error_; }
  [[nodiscard]] int commit() noexcept { return ::mdb_txn_commit(std::exchange(txn_, nullptr)); }
  void abort() noexcept {
    if (txn_ != nullptr) ::mdb_txn_abort(std::exchange(txn_, nullptr));
  }
  /// Leaves it to a process that forked.
  void forget() noexcept { txn_ = nullptr; }

 private:
  MDB_txn* txn_ = nullptr;
  int error_ = 0;
};

/// An open environment. LMDB forbids to open one twice in a process, and to use one across fork().
class lmdb_environment {
 public:
  lmdb_environment() = default;
  lmdb_environment(const lmdb_environment&) = delete;
  lmdb_environment& operator=(const lmdb_environment&) = delete;
  ~lmdb_environment() { close(); }

  /// \return 0, or what LMDB or the system said
  int open(const std::string& folder, std::size_t map_bytes, unsigned flags, unsigned mode) noexcept {
    close();
    int error = ::mdb_env_create(&env_);
    if (error == 0) error = ::mdb_env_set_mapsize(env_, map_bytes);
    if (error == 0) error = ::mdb_env_set_maxdbs(env_, 3);
    if (error == 0) error = ::mdb_env_set_maxreaders(env_, most_tiers);
    if (error == 0) error = ::mdb_env_open(env_, folder.c_str(), flags | MDB_NOTLS, mode);
    if (error == 0) error = open_tables();
    if (error == 0) {
      forget_dead_readers();
      reader_ = lmdb_transaction(env_, MDB_RDONLY);
      error = reader_.error();
      if (error == 0) ::mdb_txn_reset(reader_.get());
    }
    process_ = ::getpid();
    if (error != 0) close();
    return error;
  }

  void close() noexcept {
    if (env_ == nullptr) return;
    if (process_ == ::getpid() || process_ == 0) {
      reader_.abort();
      ::mdb_env_close(env_);
    } else {
      reader_.forget();
    }
    env_ = nullptr;
  }

  [[nodiscard]] bool usable() const noexcept { return env_ != nullptr && process_ == ::getpid(); }
  [[nodiscard]] MDB_env* get() const noexcept { return env_; }
  [[nodiscard]] MDB_dbi records() const noexcept { return tables_[0]; }
  [[nodiscard]] MDB_dbi uses() const noexcept { return tables_[1]; }
  [[nodiscard]] MDB_dbi order() const noexcept { return tables_[2]; }

  /// Gives back the slots of processes that were killed, and the pages they kept.
  void forget_dead_readers() noexcept {
    int dead = 0;
    (void)::mdb_reader_check(env_, &dead);
  }
  /// How many commits there were since the oldest reader under way began: what they freed cannot be used yet.
  [[nodiscard]] std::size_t num_commits_held() const noexcept {
    MDB_envinfo info{};
    if (::mdb_env_info(env_, &info) != 0) return 0;
    std::size_t oldest = info.me_last_txnid;
    const auto note = [](const char* line, void* to) {  // "<process> <thread> <transaction, or ->"
      const char* last = std::strrchr(line, ' ');
      char* end = nullptr;
      const auto transaction = last == nullptr ? 0 : std::strtoull(last + 1, &end, 10);
      auto& least = *static_cast<std::size_t*>(to);
      if (last != nullptr && end != last + 1) least = std::min<std::size_t>(least, transaction);
      return 0;
    };
    (void)::mdb_reader_list(env_, note, &oldest);
    return info.me_last_txnid - oldest;
  }

  [[nodiscard]] std::size_t page_bytes() const noexcept {
    MDB_stat stat{};
    return ::mdb_env_stat(env_, &stat) == 0 ? stat.ms_psize : 4096;
  }
  [[nodiscard]] std::size_t map_bytes() const noexcept {
    MDB_envinfo info{};
    return ::mdb_env_info(env_, &info) == 0 ? info.me_mapsize : 0;
  }
  /// Bytes of all pages that the tables use, as a transaction sees them.
  [[nodiscard]] std::size_t used_bytes(MDB_txn* txn) const noexcept {
    std::size_t pages = 0;
    std::size_t page = 4096;
    for (const MDB_dbi table : tables_) {
      MDB_stat stat{};
      if (::mdb_stat(txn, table, &stat) != 0) continue;
      pages += stat.ms_branch_pages + stat.ms_leaf_pages + stat.ms_overflow_pages;
      page = stat.ms_psize;
    }
    return pages * page;
  }

  /// Calls use(transaction) with what is stored now, without a lock. \return what LMDB said, 0 if `use` was called
  template <class Use>
  int read(Use use) {
    int error = renew();
    if (error != 0) return error;
    const struct reset_at_end {
      MDB_txn* txn;
      ~reset_at_end() { ::mdb_txn_reset(txn); }
    } guard{reader_.get()};
    use(reader_.get());
    return 0;
  }

  /// Calls change(transaction), which returns what LMDB said, and commits if that is 0. Waits for other writers.
  template <class Change>
  int write(Change change) noexcept {
    lmdb_transaction txn(env_, 0);
    if (txn.error() == MDB_MAP_RESIZED) {
      (void)::mdb_env_set_mapsize(env_, 0);
      txn = lmdb_transaction(env_, 0);
    }
    if (txn.error() != 0) return txn.error();
    const int error = change(txn.get());
    return error != 0 ? error : txn.commit();
  }

 private:
  int renew() noexcept {
    int error = ::mdb_txn_renew(reader_.get());
    if (error == MDB_MAP_RESIZED) {  // another process made it larger
      error = ::mdb_env_set_mapsize(env_, 0);
      if (error == 0) error = ::mdb_txn_renew(reader_.get());
    }
    return error;
  }

  int open_tables() noexcept {
    static constexpr const char* names[3] = {"records-1", "uses-1", "order-1"};  // of record_version 1
    return write([&](MDB_txn* txn) {
      int error = 0;
      for (std::size_t i = 0; i < 3 && error == 0; ++i)
        error = ::mdb_dbi_open(txn, names[i], MDB_CREATE, &tables_[i]);
      return error;
    });
  }

  static constexpr unsigned most_tiers = 1024;  // that have the file open; who makes it decides

  MDB_env* env_ = nullptr;
  std::array<MDB_dbi, 3> tables_{};
  lmdb_transaction reader_;
  ::pid_t process_ = 0;
};

}  // namespace kvcache::inline v0::store::detail
