// SPDX-License-Identifier: MIT
// redis_router: which server a command goes to. One server, or a cluster whose map of slots is learned from CLUSTER SLOTS
// and corrected by what servers answer:
//
//   MOVED slot host:port   the slot lives there now: ask there, and remember
//   ASK slot host:port     the slot is on its way there: ask there this once, after ASKING
//
// Source: the Redis cluster specification; CRC16 is the one of XMODEM.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/store/redis_connection.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace kvcache::inline v0::store::detail {

inline constexpr std::size_t num_redis_slots = 16384;

/// The slot of a key: of what stands between the first { and the next }, if that is anything, else of all of it.
constexpr std::size_t redis_slot(std::string_view key) noexcept {
  if (const auto open = key.find('{'); open != std::string_view::npos) {
    const auto close = key.find('}', open + 1);
    if (close != std::string_view::npos && close > open + 1) key = key.substr(open + 1, close - open - 1);
  }
  std::uint32_t crc = 0;
  for (const char c : key) {
    crc ^= static_cast<std::uint32_t>(static_cast<unsigned char>(c)) << 8U;
    for (int bit = 0; bit < 8; ++bit) crc = (crc << 1U) ^ ((crc & 0x8000U) != 0 ? 0x1021U : 0U);
    crc &= 0xffffU;
  }
  return crc % num_redis_slots;
}

struct redis_redirect {
  bool ask = false;  // else moved
  std::size_t slot = 0;
  redis_address to;  // without a host: the one that answered
};

/// What an error says, if it is one of the two.
inline std::optional<redis_redirect> parse_redirect(std::string_view error) {
  redis_redirect result;
  result.ask = error.starts_with("ASK ");
  if (!result.ask && !error.starts_with("MOVED ")) return std::nullopt;
  error.remove_prefix(result.ask ? 4 : 6);
  const auto space = error.find(' ');
  const auto colon = error.rfind(':');
  if (space == std::string_view::npos || colon == std::string_view::npos || colon < space)
    return std::nullopt;
  const auto number = [](std::string_view text, auto& value) {
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
    return failed == std::errc() && end == text.data() + text.size();
  };
  if (!number(error.substr(0, space), result.slot) || result.slot >= num_redis_slots) return std::nullopt;
  if (!number(error.substr(colon + 1), result.to.port) || result.to.port < 1 || result.to.port > 65535)
    return std::nullopt;
  result.to.host = error.substr(space + 1, colon - space - 1);
  return result;
}

/// A command, and the slot of its key.
struct routed_command {
  redis_command command;
  std::size_t slot = 0;
};

class redis_router {
 public:
  /// \param servers  the server, or some of the cluster; at least one
  redis_router(std::vector<redis_address> servers, redis_link link, bool is_cluster)
      : link_(std::move(link)), is_cluster_(is_cluster) {
    if (is_cluster_) link_.database = 0;
    for (auto& server : servers) (void)node_of(std::move(server));
    if (is_cluster_) owners_.assign(num_redis_slots, nobody);
  }

  /// What became of the commands of one call, besides their replies.
  struct outcome {
    index_t unanswered = 0;  ///< commands without a reply
    bool tried = false;      ///< a server was asked; false: all that matter failed just before
  };

  /// Sends the commands to the servers of their slots, one pipeline for each, and calls on_reply(index, reply) at most
  /// once for each, in any order. Redirects are followed a few times. Throws std::bad_alloc, and what on_reply throws.
  template <class OnReply>
  outcome run(std::span<const routed_command> commands, OnReply on_reply) {
    outcome result;
    std::vector<errand> errands;
    num_answered_ = 0;
    deadline_ = redis_clock::now() + link_.command_timeout;
    if (is_cluster_ && map_is_stale_) refresh();
    for (std::size_t i = 0; i < commands.size(); ++i)
      errands.push_back({i, owner_of(commands[i].slot), false});
    for (int round = 0; round < most_rounds && !errands.empty(); ++round) {
      std::vector<errand> next;
      if (!run_round(commands, errands, next, result, on_reply)) {
        if (!is_cluster_ || round > 0) break;
        refresh();  // perhaps another server has taken over
        for (errand& e : next) {
          if (!e.asking) e.node = owner_of(commands[e.index].slot);
        }
      }
      errands = std::move(next);
    }
    result.unanswered = static_cast<index_t>(commands.size()) - num_answered_;
    return result;
  }

 private:
  static constexpr std::uint16_t nobody = std::numeric_limits<std::uint16_t>::max();
  static constexpr std::size_t most_nodes = 1024;
  static constexpr int most_rounds = 6;

  struct errand {
    std::size_t index;  // of the command
    std::uint16_t node;
    bool asking;
  };

  /// One pipeline for each server. `next` gets what was redirected, or not answered.
  /// \return false if a server failed
  template <class OnReply>
  bool run_round(std::span<const routed_command> commands, std::vector<errand>& errands,
                 std::vector<errand>& next, outcome& result, OnReply& on_reply) {
    bool sound = true;
    std::stable_sort(errands.begin(), errands.end(),
                     [](const errand& a, const errand& b) { return a.node < b.node; });
    for (auto first = errands.begin(); first != errands.end();) {
      const auto last =
          std::find_if(first, errands.end(), [&](const errand& e) { return e.node != first->node; });
      const std::span<const errand> group(first, last);
      first = last;
      if (group.front().node == nobody) {
        sound = false;
        next.insert(next.end(), group.begin(), group.end());
        continue;
      }
      sound = run_group(commands, group, next, result, on_reply) && sound;
    }
    return sound;
  }

  template <class OnReply>
  bool run_group(std::span<const routed_command> commands, std::span<const errand> group,
                 std::vector<errand>& next, outcome& result, OnReply& on_reply) {
    redis_connection& node = nodes_[group.front().node];
    std::vector<redis_command> sent;
    std::vector<std::size_t> meaning;  // of each reply: its place in the group, or none
    constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
    for (std::size_t i = 0; i < group.size(); ++i) {
      if (group[i].asking) {
        sent.push_back({{"ASKING"}});
        meaning.push_back(none);
      }
      sent.push_back(commands[group[i].index].command);
      meaning.push_back(i);
    }
    std::vector<char> answered(group.size(), 0);
    result.tried = result.tried || node.may_try();
    const bool sound = node.exchange(sent, deadline_, [&](std::size_t i, const redisReply& reply) {
      if (meaning[i] == none) return;
      const errand& e = group[meaning[i]];
      answered[meaning[i]] = 1;
      if (is_cluster_ && reply.type == REDIS_REPLY_ERROR &&
          redirected(e, text_of(reply), node.address(), next))
        return;
      ++num_answered_;
      on_reply(e.index, reply);
    });
    for (std::size_t i = 0; i < group.size(); ++i) {
      if (answered[i] == 0) next.push_back(group[i]);
    }
    return sound;
  }

  bool redirected(const errand& e, std::string_view error, const redis_address& from,
                  std::vector<errand>& next) {
    auto redirect = parse_redirect(error);
    if (!redirect) return false;
    if (redirect->to.host.empty()) redirect->to.host = from.host;
    const std::uint16_t node = node_of(std::move(redirect->to));
    if (node == nobody) return false;
    if (!redirect->ask) {
      owners_[redirect->slot] = node;
      map_is_stale_ = true;  // one that moved is seldom the only one
    }
    next.push_back({e.index, node, redirect->ask});
    return true;
  }

  [[nodiscard]] std::uint16_t node_of(redis_address address) {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].address() == address) return static_cast<std::uint16_t>(i);
    }
    if (nodes_.size() >= most_nodes) return nobody;
    nodes_.emplace_back(std::move(address), link_);
    return static_cast<std::uint16_t>(nodes_.size() - 1);
  }

  /// The server of a slot; where that is not known, any that can be asked.
  [[nodiscard]] std::uint16_t owner_of(std::size_t slot) const noexcept {
    if (!is_cluster_) return 0;
    if (owners_[slot] != nobody) return owners_[slot];
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].may_try()) return static_cast<std::uint16_t>(i);
    }
    return 0;
  }

  /// Learns the map from the first server that tells it; not more often than once in a pause.
  void refresh() {
    const auto now = redis_clock::now();
    if (now < refresh_at_) return;
    refresh_at_ = now + link_.first_pause;
    static const std::vector<redis_command> question{{{"CLUSTER"}, {"SLOTS"}}};
    const std::size_t num_known = nodes_.size();
    for (std::size_t i = 0; i < num_known; ++i) {
      bool learned = false;
      if (!nodes_[i].may_try()) continue;
      const bool sound = nodes_[i].exchange(question, deadline_, [&](std::size_t, const redisReply& reply) {
        learned = learn(reply, nodes_[i].address().host);
      });
      if (!sound || !learned) continue;
      map_is_stale_ = false;
      return;
    }
  }

  /// [[first, last, [host, port, ...], replicas...], ...]; what is not like that is passed over.
  bool learn(const redisReply& reply, const std::string& host) {
    if (reply.type != REDIS_REPLY_ARRAY || reply.elements == 0) return false;
    for (std::size_t i = 0; i < reply.elements; ++i) {
      const redisReply& range = *reply.element[i];
      if (range.type != REDIS_REPLY_ARRAY || range.elements < 3) continue;
      const redisReply& first = *range.element[0];
      const redisReply& last = *range.element[1];
      const redisReply& server = *range.element[2];
      if (first.type != REDIS_REPLY_INTEGER || last.type != REDIS_REPLY_INTEGER || first.integer < 0 ||
          last.integer < first.integer || last.integer >= static_cast<long long>(num_redis_slots) ||
          server.type != REDIS_REPLY_ARRAY || server.elements < 2 ||
          server.element[1]->type != REDIS_REPLY_INTEGER || server.element[1]->integer < 1 ||
          server.element[1]->integer > 65535)
        continue;
      std::string name(server.element[0]->type == REDIS_REPLY_STRING ? text_of(*server.element[0]) : "");
      if (name.empty()) name = host;
      const std::uint16_t node = node_of({std::move(name), static_cast<int>(server.element[1]->integer)});
      std::fill(owners_.begin() + first.integer, owners_.begin() + last.integer + 1, node);
    }
    return true;
  }

  redis_link link_;
  bool is_cluster_;
  std::deque<redis_connection> nodes_;  // a connection stays where it is
  std::vector<std::uint16_t> owners_;   // [num_redis_slots], of a cluster
  bool map_is_stale_ = true;
  redis_clock::time_point refresh_at_{};
  index_t num_answered_ = 0;            // of the call under way
  redis_clock::time_point deadline_{};  // of it
};

}  // namespace kvcache::inline v0::store::detail
