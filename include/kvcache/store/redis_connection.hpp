// SPDX-License-Identifier: MIT
// redis_connection: one server, commands in a pipeline, and what keeps a dead or slow one from holding anybody up: a
// deadline for each exchange, and a pause after a failure in which nothing is tried. The one header that includes hiredis,
// which connects and parses replies.
//
//   closed --connect, AUTH, SELECT--> open --any failure--> closed, not before `retry_at`; the pause doubles each time
#pragma once

#include <kvcache/core/types.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <hiredis/hiredis.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

namespace kvcache::inline v0::store {

struct redis_address {
  std::string host =
      "127.0.0.1";  ///< an address; a name is looked up, which may take longer than the timeout
  int port = 6379;

  friend bool operator==(const redis_address&, const redis_address&) = default;
};

/// How servers are spoken to. Nothing is encrypted: use it inside a network that is trusted, or through a tunnel.
struct redis_link {
  std::string user = {};      ///< of the ACL; empty: the default user
  std::string password = {};  ///< empty: no AUTH
  int database = 0;           ///< not for a cluster
  std::chrono::milliseconds connect_timeout{200};
  std::chrono::milliseconds command_timeout{
      1000};                                   ///< for a call, apart from the time that its bytes may take
  index_t least_bytes_per_second = 32_MiB;     ///< what a connection must carry not to be given up
  std::chrono::milliseconds first_pause{100};  ///< after a failure; doubles with each further one
  std::chrono::milliseconds longest_pause{10'000};
};

namespace detail {

using redis_clock = std::chrono::steady_clock;

/// Two pieces that are sent as one argument; must outlive the exchange.
struct redis_argument {
  std::string_view first;
  std::string_view second = {};
};
using redis_command = std::vector<redis_argument>;

struct redis_reply_deleter {
  void operator()(redisReply* reply) const noexcept { ::freeReplyObject(reply); }
};
using redis_reply_ptr = std::unique_ptr<redisReply, redis_reply_deleter>;

inline std::string_view text_of(const redisReply& reply) noexcept {
  return reply.str == nullptr ? std::string_view() : std::string_view(reply.str, reply.len);
}
inline bool is_ok(const redisReply& reply) noexcept {
  return reply.type == REDIS_REPLY_STATUS && text_of(reply) == "OK";
}

/// Elements of all arrays of one reply, so that a few bytes that announce a large array do not take memory for it.
struct redis_reply_limit {
  static constexpr std::size_t most = std::size_t{1} << 20U;
  std::size_t left = most;
};

/// Functions for a reader that keep to the redis_reply_limit in its private data; otherwise those of hiredis.
class redis_reply_functions {
 public:
  static redisReplyObjectFunctions* get() noexcept {
    static redis_reply_functions functions;
    return &functions.limited_;
  }

 private:
  redis_reply_functions() noexcept {
    redisReader* reader = ::redisReaderCreate();
    if (reader == nullptr) return;
    original() = limited_ = *reader->fn;
    limited_.createArray = &limited_array;
    ::redisReaderFree(reader);
  }
  static redisReplyObjectFunctions& original() noexcept {
    static redisReplyObjectFunctions functions{};
    return functions;
  }
  // Count is int in hiredis 0.14 and size_t later.
  template <class Count>
  static void* limited_array(const redisReadTask* task, Count count) {
    auto* limit = static_cast<redis_reply_limit*>(task->privdata);
    const auto n = static_cast<std::size_t>(std::max<Count>(count, 0));
    if (limit == nullptr || n > limit->left) return nullptr;
    limit->left -= n;
    return original().createArray(task, count);
  }

  redisReplyObjectFunctions limited_{};
};

/// What an exchange sends: small parts copied into one text, large ones sent from where they are.
class redis_output {
 public:
  void clear() noexcept {
    text_.clear();
    parts_.clear();
    at_ = 0;
    sent_ = 0;
  }
  void add(const redis_command& command) {
    number('*', command.size());
    for (const redis_argument& a : command) {
      number('$', a.first.size() + a.second.size());
      piece(a.first);
      piece(a.second);
      piece("\r\n");
    }
  }
  [[nodiscard]] bool done() const noexcept { return at_ == parts_.size(); }

  /// Sends what the socket takes. \return bytes, or -1 with errno
  ::ssize_t send(int fd) noexcept {
    std::array<::iovec, 16> pieces{};
    std::size_t count = 0;
    std::size_t skip = sent_;
    for (std::size_t i = at_; i < parts_.size() && count < pieces.size(); ++i, skip = 0) {
      const char* data = parts_[i].data == nullptr ? text_.data() + parts_[i].begin : parts_[i].data;
      pieces[count++] = {const_cast<char*>(data) + skip, parts_[i].size - skip};
    }
    ::msghdr message{};
    message.msg_iov = pieces.data();
    message.msg_iovlen = count;
    const ::ssize_t n = ::sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    for (std::size_t left = n > 0 ? static_cast<std::size_t>(n) : 0; left > 0;) {
      const std::size_t taken = std::min(left, parts_[at_].size - sent_);
      left -= taken;
      sent_ += taken;
      if (sent_ == parts_[at_].size) {
        ++at_;
        sent_ = 0;
      }
    }
    return n;
  }

 private:
  struct part {
    const char* data;   // null: in text_
    std::size_t begin;  // there
    std::size_t size;
  };

  void number(char kind, std::size_t value) {
    std::array<char, 24> digits{};
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
    piece({&kind, 1});
    piece({digits.data(), static_cast<std::size_t>(end - digits.data())});
    piece("\r\n");
  }
  void piece(std::string_view bytes) {
    constexpr std::size_t small = 4096;
    if (bytes.empty()) return;
    if (bytes.size() > small) {
      parts_.push_back({bytes.data(), 0, bytes.size()});
      return;
    }
    if (parts_.empty() || parts_.back().data != nullptr) parts_.push_back({nullptr, text_.size(), 0});
    text_ += bytes;
    parts_.back().size += bytes.size();
  }

  std::string text_;
  std::vector<part> parts_;
  std::size_t at_ = 0;    // first part that is not sent
  std::size_t sent_ = 0;  // bytes of it that are
};

class redis_connection {
 public:
  /// The most that one reply may have, in bytes; more than that ends the connection.
  static constexpr std::size_t max_reply_bytes = std::size_t{5} << 20U;

  redis_connection(redis_address address, redis_link link)
      : address_(std::move(address)), link_(std::move(link)) {}

  [[nodiscard]] const redis_address& address() const noexcept { return address_; }

  /// Whether it is worth trying: it is open, or did not fail just now.
  [[nodiscard]] bool may_try() const noexcept { return open() || redis_clock::now() >= retry_at_; }

  /// Sends all commands at once, connecting when needed, and calls on_reply(index, reply) for each in order.
  /// \param deadline  moved on by the time that the bytes may take
  /// \return false if that failed; then the replies that came have been handed out. Throws std::bad_alloc, and what
  ///         on_reply throws; the connection is closed then.
  template <class OnReply>
  bool exchange(std::span<const redis_command> commands, redis_clock::time_point& deadline,
                OnReply on_reply) {
    if (commands.empty()) return true;
    if (!may_try() || redis_clock::now() >= deadline) return false;
    struct closes_unless_done {
      redis_connection* self;
      ~closes_unless_done() {
        if (self != nullptr) self->fail();
      }
    } guard{this};
    if (!connect(deadline) || !run(commands, deadline, on_reply)) return false;
    guard.self = nullptr;
    num_failures_ = 0;
    return true;
  }

 private:
  struct context_deleter {
    void operator()(redisContext* c) const noexcept { ::redisFree(c); }
  };
  struct reader_deleter {
    void operator()(redisReader* r) const noexcept { ::redisReaderFree(r); }
  };

  [[nodiscard]] bool open() const noexcept { return context_ != nullptr; }
  [[nodiscard]] int fd() const noexcept { return static_cast<int>(context_->fd); }

  void close() noexcept {
    context_.reset();
    reader_.reset();
  }

  void fail() noexcept {
    close();
    const auto most = link_.longest_pause;
    auto pause = std::min(link_.first_pause, most);
    for (int i = 0; i < num_failures_ && pause < most; ++i) pause = std::min(2 * pause, most);
    ++num_failures_;
    retry_at_ = redis_clock::now() + pause;
  }

  /// Waits for `events`. \return what is there, 0 when the deadline has passed
  [[nodiscard]] short wait(short events, redis_clock::time_point deadline) const noexcept {
    for (;;) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - redis_clock::now()).count();
      if (left <= 0) return 0;
      ::pollfd poll{fd(), events, 0};
      const int n = ::poll(&poll, 1, static_cast<int>(std::min<long long>(left, 1'000'000)));
      if (n > 0) return poll.revents;
      if (n < 0 && errno != EINTR) return 0;
    }
  }

  /// The other end has closed it, or said what nobody asked.
  [[nodiscard]] bool is_stale() const noexcept {
    ::pollfd poll{fd(), POLLIN, 0};
    return ::poll(&poll, 1, 0) != 0;
  }

  bool connect(redis_clock::time_point& deadline) {
    if (open() && is_stale()) close();
    if (open()) return true;
    context_.reset(::redisConnectNonBlock(address_.host.c_str(), address_.port));
    if (!open() || context_->err != 0) return false;
    if ((wait(POLLOUT, std::min(deadline, redis_clock::now() + link_.connect_timeout)) & POLLOUT) == 0)
      return false;
    int error = 0;
    ::socklen_t size = sizeof(error);
    if (::getsockopt(fd(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0) return false;
    const int on = 1;
    (void)::setsockopt(fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    reader_.reset(::redisReaderCreateWithFunctions(redis_reply_functions::get()));
    if (reader_ == nullptr) return false;
    reader_->privdata = &limit_;
    return introduce(deadline);
  }

  bool introduce(redis_clock::time_point& deadline) {
    std::vector<redis_command> commands;
    const std::string database = std::to_string(link_.database);
    if (!link_.password.empty() && link_.user.empty()) commands.push_back({{"AUTH"}, {link_.password}});
    if (!link_.user.empty()) commands.push_back({{"AUTH"}, {link_.user}, {link_.password}});
    if (link_.database != 0) commands.push_back({{"SELECT"}, {database}});
    bool welcome = true;
    const auto on_reply = [&](std::size_t, const redisReply& r) { welcome = welcome && is_ok(r); };
    return commands.empty() || (run(commands, deadline, on_reply) && welcome);
  }

  /// What `bytes` may take; nothing for what was not moved.
  [[nodiscard]] std::chrono::nanoseconds time_for(::ssize_t bytes) const noexcept {
    return std::chrono::nanoseconds(std::max<long long>(bytes, 0) * 1'000'000'000 /
                                    link_.least_bytes_per_second);
  }

  template <class OnReply>
  bool run(std::span<const redis_command> commands, redis_clock::time_point& deadline, OnReply& on_reply) {
    output_.clear();
    for (const redis_command& command : commands) output_.add(command);
    std::size_t num_replies = 0;
    while (num_replies < commands.size()) {
      const short ready = wait(static_cast<short>(output_.done() ? POLLIN : POLLIN | POLLOUT), deadline);
      if (ready == 0) return false;
      if ((ready & POLLOUT) != 0) {
        const auto n = output_.send(fd());
        if (n < 0 && errno != EAGAIN && errno != EINTR) return false;
        deadline += time_for(n);
      }
      if ((ready & (POLLIN | POLLHUP | POLLERR)) == 0) continue;
      const auto n = ::recv(fd(), buffer_.data(), buffer_.size(), MSG_DONTWAIT);
      if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return false;
      if (n < 0) continue;
      deadline += time_for(n);
      if (!feed({buffer_.data(), static_cast<std::size_t>(n)}, commands.size(), num_replies, on_reply))
        return false;
    }
    return output_.done();
  }

  template <class OnReply>
  bool feed(std::string_view bytes, std::size_t num_commands, std::size_t& num_replies, OnReply& on_reply) {
    if (::redisReaderFeed(reader_.get(), bytes.data(), bytes.size()) != REDIS_OK) return false;
    for (;;) {
      if (reader_->reply == nullptr) limit_.left = redis_reply_limit::most;
      void* raw = nullptr;
      if (::redisReaderGetReply(reader_.get(), &raw) != REDIS_OK) return false;
      if (raw == nullptr) return reader_->len - reader_->pos <= max_reply_bytes;
      const redis_reply_ptr reply(static_cast<redisReply*>(raw));
      if (num_replies == num_commands) return false;
      on_reply(num_replies++, std::as_const(*reply));
    }
  }

  redis_address address_;
  redis_link link_;
  std::unique_ptr<redisContext, context_deleter> context_;
  std::unique_ptr<redisReader, reader_deleter> reader_;
  redis_reply_limit limit_;
  redis_output output_;
  std::vector<char> buffer_ = std::vector<char>(std::size_t{64} << 10U);
  int num_failures_ = 0;
  redis_clock::time_point retry_at_{};
};

}  // namespace detail
}  // namespace kvcache::inline v0::store
