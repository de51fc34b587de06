// SPDX-License-Identifier: MIT
// redis_tier: a tier in Redis or Valkey, one server or a cluster, shared by any number of machines. Needs hiredis
// (CMake: kvcache::redis).
//
//   <prefix>:1:{<digest of the key>}      the first 4 MiB of the record
//   <prefix>:1:{<digest of the key>}:<i>  the i-th further 4 MiB; in the same slot, since the braces are
//
// A server that is dead, slow, full or wrong is a miss: no call takes longer than the timeouts, and after a failure the
// server is left alone for a while, in which calls return at once. Room on the server is the server's business: give
// it `maxmemory` with `maxmemory-policy allkeys-lru`, or a time_to_live here.
#pragma once

#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/redis_cluster.hpp>
#include <kvcache/store/redis_connection.hpp>
#include <kvcache/store/redis_parts.hpp>
#include <kvcache/store/tier.hpp>
#include <kvcache/store/tier_record.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store {

struct redis_options {
  std::vector<redis_address> servers = {redis_address{}};  ///< one, or some of a cluster
  bool is_cluster = false;
  redis_link link = {};
  std::string prefix = "kvcache";  ///< of all names; without braces
  std::chrono::milliseconds time_to_live{
      0};  ///< of a record since it was put; 0: until the server needs the room
  index_t max_payload_bytes = 512_MiB;
};

class redis_tier {
 public:
  /// Connects when first used. Throws shape_error without servers, with a prefix that has braces, or for limits below 1.
  explicit redis_tier(redis_options options = {});

  [[nodiscard]] bool get(std::string_view space, std::span<const token_id> tokens,
                         std::vector<std::byte>& out) noexcept;
  bool put(std::string_view space, std::span<const token_id> tokens,
           std::span<const std::byte> payload) noexcept;
  [[nodiscard]] bool contains(std::string_view space, std::span<const token_id> tokens) noexcept;
  bool erase(std::string_view space, std::span<const token_id> tokens) noexcept;

  /// Many at once: one round trip to each server, and one more for records of several parts.
  /// \param outs  [keys], as of `get`
  /// \return how many were found
  index_t get_many(std::span<const tier_key> keys, std::span<std::vector<std::byte>> outs) noexcept;
  /// \param payloads  [keys]
  /// \return how many are kept
  index_t put_many(std::span<const tier_key> keys,
                   std::span<const std::span<const std::byte>> payloads) noexcept;

  [[nodiscard]] const tier_stats& stats() const noexcept { return stats_; }

 private:
  static constexpr int most_readings = 8;  // one, unless a slot is being moved

  /// A record that is being read.
  struct reading {
    std::size_t index = 0;  // of the key
    std::size_t num_parts = 1;
    std::size_t next_part = 0;
    record_check head;
    std::uint32_t crc = 0;
    bool bad = false;
  };

  [[nodiscard]] std::string name_of(const tier_key& key) const {
    return options_.prefix + ":1:{" + to_hex(record_name(key)) + '}';
  }
  [[nodiscard]] std::uint64_t max_payload() const noexcept {
    return static_cast<std::uint64_t>(options_.max_payload_bytes);
  }
  [[nodiscard]] static std::string_view chars(std::span<const std::byte> bytes) noexcept {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  /// Runs commands, and counts what went wrong. on_reply is not called for errors and what is no `type`.
  template <class OnReply>
  void run(std::span<const detail::routed_command> commands, OnReply on_reply);

  index_t get_all(std::span<const tier_key> keys, std::span<std::vector<std::byte>> outs);
  void read_first(const tier_key& key, std::string_view text, std::vector<std::byte>& out, reading& r);
  bool read_others(std::span<const std::string> names, std::span<std::vector<std::byte>> outs,
                   std::span<reading> readings);
  index_t put_all(std::span<const tier_key> keys, std::span<const std::span<const std::byte>> payloads);
  [[nodiscard]] bool remove(const std::string& name);

  redis_options options_;
  detail::redis_router router_;
  tier_stats stats_;
};

static_assert(tier<redis_tier>);

inline redis_tier::redis_tier(redis_options options)
    : options_(std::move(options)), router_(options_.servers, options_.link, options_.is_cluster) {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw shape_error(std::string("kvcache: redis_tier: ") + rule);
  };
  require(!options_.servers.empty(), "there must be a server");
  require(options_.is_cluster || options_.servers.size() == 1,
          "several servers are a cluster; set is_cluster");
  require(options_.prefix.find_first_of("{}") == std::string::npos, "the prefix may have no braces");
  require(options_.max_payload_bytes > 0, "the limit must be at least one byte");
  require(options_.link.connect_timeout.count() > 0 && options_.link.command_timeout.count() > 0 &&
              options_.link.first_pause.count() > 0 && options_.link.least_bytes_per_second > 0,
          "timeouts and pauses must be more than nothing");
}

inline bool redis_tier::get(std::string_view space, std::span<const token_id> tokens,
                            std::vector<std::byte>& out) noexcept {
  const tier_key key{space, tokens};
  return get_many({&key, 1}, {&out, 1}) == 1;
}

inline bool redis_tier::put(std::string_view space, std::span<const token_id> tokens,
                            std::span<const std::byte> payload) noexcept {
  const tier_key key{space, tokens};
  return put_many({&key, 1}, {&payload, 1}) == 1;
}

inline index_t redis_tier::get_many(std::span<const tier_key> keys,
                                    std::span<std::vector<std::byte>> outs) noexcept {
  index_t found = 0;
  try {
    found = get_all(keys, outs);
  } catch (const std::exception&) {
    ++stats_.errors;
    for (auto& out : outs) out.clear();
  }
  stats_.hits += found;
  stats_.misses += static_cast<index_t>(keys.size()) - found;
  return found;
}

inline index_t redis_tier::put_many(std::span<const tier_key> keys,
                                    std::span<const std::span<const std::byte>> payloads) noexcept {
  try {
    const index_t kept = put_all(keys, payloads);
    stats_.puts += kept;
    return kept;
  } catch (const std::exception&) {
    ++stats_.errors;
    return 0;
  }
}

inline bool redis_tier::contains(std::string_view space, std::span<const token_id> tokens) noexcept {
  const tier_key key{space, tokens};
  if (!within_limits(key)) return false;
  try {
    const std::string name = name_of(key);
    const std::string last = std::to_string(record_head_bytes(key) - 1);
    const detail::routed_command command{{{"GETRANGE"}, {name}, {"0"}, {last}}, detail::redis_slot(name)};
    record_check head;
    bool is_there = false;
    run({&command, 1}, [&](std::size_t, const redisReply& reply) {
      const std::string_view text = detail::text_of(reply);
      is_there = !text.empty();
      head = check_record_head(key, detail::bytes_of(text));
    });
    if (is_there && head.state != record_state::good) {
      count_bad_record(stats_, head.state);
      (void)remove(name);
    }
    return is_there && head.state == record_state::good;
  } catch (const std::exception&) {
    ++stats_.errors;
    return false;
  }
}

inline bool redis_tier::erase(std::string_view space, std::span<const token_id> tokens) noexcept {
  const tier_key key{space, tokens};
  try {
    return within_limits(key) && remove(name_of(key));
  } catch (const std::exception&) {
    ++stats_.errors;
    return false;
  }
}

template <class OnReply>
void redis_tier::run(std::span<const detail::routed_command> commands, OnReply on_reply) {
  const auto outcome = router_.run(commands, [&](std::size_t i, const redisReply& reply) {
    if (reply.type == REDIS_REPLY_ERROR) {
      ++stats_.errors;  // out of memory, not allowed, of another type, ...
    } else {
      on_reply(i, reply);
    }
  });
  if (outcome.unanswered > 0) ++(outcome.tried ? stats_.errors : stats_.unreachable);
}

inline index_t redis_tier::get_all(std::span<const tier_key> keys, std::span<std::vector<std::byte>> outs) {
  std::vector<std::string> names(keys.size());
  std::vector<detail::routed_command> commands;
  std::vector<reading> readings;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    outs[i].clear();
    if (!within_limits(keys[i])) continue;
    names[i] = name_of(keys[i]);
    commands.push_back({{{"GET"}, {names[i]}}, detail::redis_slot(names[i])});
    readings.emplace_back().index = i;
  }
  std::vector<reading> found;
  run(commands, [&](std::size_t i, const redisReply& reply) {
    if (reply.type != REDIS_REPLY_STRING) return;
    reading& r = readings[i];
    read_first(keys[r.index], detail::text_of(reply), outs[r.index], r);
    found.push_back(r);
  });
  for (int i = 0; i < most_readings && read_others(names, outs, found); ++i) {
  }

  index_t num_found = 0;
  for (reading& r : found) {
    const bool whole = !r.bad && r.next_part == r.num_parts;
    if (whole && outs[r.index].size() == r.head.payload_bytes && r.crc == r.head.payload_crc) {
      ++num_found;
      continue;
    }
    if (!r.bad && !whole) {  // too large, or the server went away between two parts
      outs[r.index].clear();
      continue;
    }
    count_bad_record(stats_, r.head.state == record_state::good ? record_state::damaged : r.head.state);
    outs[r.index].clear();
    (void)remove(names[r.index]);
  }
  return num_found;
}

/// The part with the head.
inline void redis_tier::read_first(const tier_key& key, std::string_view text, std::vector<std::byte>& out,
                                   reading& r) {
  const auto bytes = detail::bytes_of(text);
  r.head = check_record_head(key, bytes);
  r.bad = r.head.state != record_state::good;
  if (r.bad) return;
  const std::uint64_t record_bytes = record_head_bytes(key) + r.head.payload_bytes;
  r.num_parts = detail::num_redis_parts(record_bytes);
  if (r.head.payload_bytes > max_payload()) {
    ++stats_.refused;
    r.next_part = r.num_parts + 1;  // others may have room for it
    return;
  }
  r.bad = bytes.size() != std::min<std::uint64_t>(record_bytes, detail::redis_part_bytes);
  if (r.bad) return;
  const auto payload = bytes.subspan(record_head_bytes(key));
  out.assign(payload.begin(), payload.end());
  r.crc = crc32c(payload);
  r.next_part = 1;
}

/// The parts behind it, all in one pipeline; memory grows as they come. \return whether any was of use
inline bool redis_tier::read_others(std::span<const std::string> names,
                                    std::span<std::vector<std::byte>> outs, std::span<reading> readings) {
  std::deque<std::string> parts;
  std::vector<detail::routed_command> commands;
  std::vector<std::pair<reading*, std::size_t>> meaning;
  for (reading& r : readings) {
    for (std::size_t part = r.next_part; !r.bad && part < r.num_parts; ++part) {
      parts.push_back(detail::redis_part_name(names[r.index], part));
      commands.push_back({{{"GET"}, {parts.back()}}, detail::redis_slot(parts.back())});
      meaning.emplace_back(&r, part);
    }
  }
  if (commands.empty()) return false;
  bool moved_on = false;
  run(commands, [&](std::size_t i, const redisReply& reply) {
    auto [r, part] = meaning[i];
    if (part != r->next_part)
      return;  // redirected ones come late; the caller asks again for what lies behind
    moved_on = true;
    std::vector<std::byte>& out = outs[r->index];
    const auto bytes = detail::bytes_of(detail::text_of(reply));
    const std::uint64_t left = r->head.payload_bytes - out.size();
    r->bad = r->bad || reply.type != REDIS_REPLY_STRING ||
             bytes.size() != std::min<std::uint64_t>(left, detail::redis_part_bytes);
    if (r->bad) return;
    out.insert(out.end(), bytes.begin(), bytes.end());
    r->crc = crc32c(bytes, r->crc);
    ++r->next_part;
  });
  return moved_on;
}

inline index_t redis_tier::put_all(std::span<const tier_key> keys,
                                   std::span<const std::span<const std::byte>> payloads) {
  struct writing {
    std::string name;
    std::vector<std::byte> head;
    std::size_t num_parts = 0;
    std::size_t num_old_parts = 0;
    std::size_t num_written = 0;
  };
  const std::string lifetime = std::to_string(options_.time_to_live.count());
  const bool expires = options_.time_to_live.count() > 0;
  std::deque<writing> writings;
  std::deque<std::string> parts;
  std::vector<detail::routed_command> commands;
  std::vector<std::pair<writing*, bool>> meaning;  // of each command: whether it writes
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const auto payload = payloads[i];
    if (!within_limits(keys[i]) || payload.size() > max_payload()) {
      ++stats_.refused;
      continue;
    }
    writing& w = writings.emplace_back();
    w.name = name_of(keys[i]);
    write_record_head(keys[i], payload, w.head);
    w.num_parts = detail::num_redis_parts(w.head.size() + payload.size());
    const std::size_t slot = detail::redis_slot(w.name);
    commands.push_back({{{"GETRANGE"}, {w.name}, {"0"}, {"47"}}, slot});
    meaning.emplace_back(&w, false);
    for (std::size_t part = w.num_parts; part-- > 0;) {  // the head last: it says that the rest is there
      const std::size_t begin = part == 0 ? 0 : part * detail::redis_part_bytes - w.head.size();
      const std::size_t end = std::min(payload.size(), (part + 1) * detail::redis_part_bytes - w.head.size());
      parts.push_back(detail::redis_part_name(w.name, part));
      detail::redis_command set{
          {"SET"},
          {parts.back()},
          {part == 0 ? chars(w.head) : std::string_view(), chars(payload.subspan(begin, end - begin))}};
      if (expires) set.insert(set.end(), {{"PX"}, {lifetime}});
      commands.push_back({std::move(set), slot});
      meaning.emplace_back(&w, true);
    }
  }
  run(commands, [&](std::size_t i, const redisReply& reply) {
    auto [w, writes] = meaning[i];
    if (writes) {
      w->num_written += detail::is_ok(reply) ? 1 : 0;
    } else {
      w->num_old_parts = detail::redis_parts_of(detail::text_of(reply), max_payload());
    }
  });

  index_t kept = 0;
  commands.clear();
  parts.clear();
  for (const writing& w : writings) {
    if (w.num_written == w.num_parts) ++kept;
    for (std::size_t part = w.num_parts; part < w.num_old_parts; ++part) {
      parts.push_back(detail::redis_part_name(w.name, part));
      commands.push_back({{{"UNLINK"}, {parts.back()}}, detail::redis_slot(w.name)});
    }
  }
  if (!commands.empty()) run(commands, [](std::size_t, const redisReply&) {});
  return kept;
}

/// \return whether its first part was there
inline bool redis_tier::remove(const std::string& name) {
  const std::size_t slot = detail::redis_slot(name);
  std::vector<detail::routed_command> commands{{{{"GETRANGE"}, {name}, {"0"}, {"47"}}, slot},
                                               {{{"UNLINK"}, {name}}, slot}};
  std::size_t num_old_parts = 1;
  bool was_there = false;
  run(commands, [&](std::size_t i, const redisReply& reply) {
    if (i == 0) {
      num_old_parts = detail::redis_parts_of(detail::text_of(reply), max_payload());
    } else {
      was_there = reply.type == REDIS_REPLY_INTEGER && reply.integer > 0;
    }
  });
  std::deque<std::string> parts;
  commands.clear();
  for (std::size_t part = 1; part < num_old_parts; ++part) {
    parts.push_back(detail::redis_part_name(name, part));
    commands.push_back({{{"UNLINK"}, {parts.back()}}, slot});
  }
  if (!commands.empty()) run(commands, [](std::size_t, const redisReply&) {});
  return was_there;
}

}  // namespace kvcache::inline v0::store
