// SPDX-License-Identifier: MIT
// A redis-server (or valkey-server) of a test's own, on a free port of the loopback interface: started with the object,
// stopped with it, and by the system should the test be killed. Nothing is written to disk but in a folder of its own.
#pragma once

#include "examples/temporary_folder.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <chrono>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace tiers {

/// The server's program, or nothing where none is installed.
inline std::optional<std::string> find_redis_server() {
  const char* search = std::getenv("PATH");
  for (const char* name : {"redis-server", "valkey-server"}) {
    std::string folder;
    for (const char c : std::string(search == nullptr ? "" : search) + ":/usr/bin:") {
      if (c != ':') {
        folder += c;
        continue;
      }
      if (::access((folder + '/' + name).c_str(), X_OK) == 0) return folder + '/' + name;
      folder.clear();
    }
  }
  return std::nullopt;
}

/// Whether a server could listen there now.
inline bool is_free(int port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  ::sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const bool free = ::bind(fd, reinterpret_cast<const ::sockaddr*>(&address), sizeof(address)) == 0;
  (void)::close(fd);
  return free;
}

/// A port that is free, and so is the one 10000 above, which a cluster talks on.
inline int free_port() {
  static unsigned next = static_cast<unsigned>(::getpid()) * 131;
  for (int i = 0; i < 2000; ++i) {
    const int port = 12'000 + static_cast<int>(next++ % 10'000);
    if (is_free(port) && is_free(port + 10'000)) return port;
  }
  throw std::runtime_error("no free port");
}

class redis_server {
 public:
  explicit redis_server(std::vector<std::string> options = {}) : options_(std::move(options)) {
    for (int attempt = 1;; ++attempt) {
      port_ = free_port();
      try {
        start();
        return;
      } catch (const std::runtime_error&) {  // somebody else took the port first
        stop();
        if (attempt == 3) throw;
      }
    }
  }
  redis_server(const redis_server&) = delete;
  redis_server& operator=(const redis_server&) = delete;
  ~redis_server() { stop(); }

  [[nodiscard]] int port() const { return port_; }

  /// Starts it on the same port again and waits until it answers, ten seconds at most.
  void start() {
    std::vector<std::string> words{find_redis_server().value(),
                                   "--port",
                                   std::to_string(port_),
                                   "--bind",
                                   "127.0.0.1",
                                   "--save",
                                   "",
                                   "--appendonly",
                                   "no",
                                   "--daemonize",
                                   "no",
                                   "--dir",
                                   folder_.path().string()};
    words.insert(words.end(), options_.begin(), options_.end());
    std::vector<char*> arguments;
    for (auto& w : words) arguments.push_back(w.data());
    arguments.push_back(nullptr);
    const ::pid_t parent = ::getpid();
    process_ = ::fork();
    if (process_ == 0) {
#ifdef __linux__
      (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
      const int null = ::open("/dev/null", O_RDWR);
      for (const int fd : {0, 1, 2}) (void)::dup2(null, fd);
      if (::getppid() == parent) (void)::execv(arguments[0], arguments.data());
      ::_exit(127);
    }
    for (int i = 0; i < 1000; ++i) {
      try {
        if (const std::string answer = say({"PING"}); answer == "PONG" || answer.starts_with("NOAUTH"))
          return;
      } catch (const std::runtime_error&) {
      }
      if (::waitpid(process_, nullptr, WNOHANG) == process_) {
        process_ = -1;
        throw std::runtime_error("redis-server ended");
      }
      ::usleep(10'000);
    }
    throw std::runtime_error("redis-server does not answer");
  }

  void signal(int number) const { (void)::kill(process_, number); }

  void stop() {
    if (process_ <= 0) return;
    (void)::kill(process_, SIGKILL);
    (void)::waitpid(process_, nullptr, 0);
    process_ = -1;
  }

  /// What the server answers, errors as they are; arrays as nothing.
  std::string say(const std::vector<std::string>& words) const {
    const ::timeval patience{5, 0};
    const std::unique_ptr<redisContext, void (*)(redisContext*)> context(
        ::redisConnectWithTimeout("127.0.0.1", port_, patience), ::redisFree);
    if (context == nullptr || context->err != 0) throw std::runtime_error("no connection");
    (void)::redisSetTimeout(context.get(), patience);
    std::vector<const char*> texts;
    std::vector<std::size_t> sizes;
    for (const auto& w : words) {
      texts.push_back(w.data());
      sizes.push_back(w.size());
    }
    auto* reply = static_cast<redisReply*>(
        ::redisCommandArgv(context.get(), static_cast<int>(words.size()), texts.data(), sizes.data()));
    if (reply == nullptr) throw std::runtime_error("no answer");
    std::string answer = reply->type == REDIS_REPLY_INTEGER ? std::to_string(reply->integer)
                         : reply->str == nullptr            ? std::string()
                                                            : std::string(reply->str, reply->len);
    ::freeReplyObject(reply);
    return answer;
  }

 private:
  std::vector<std::string> options_;
  int port_ = 0;
  ::pid_t process_ = -1;
  model_files::temporary_folder folder_;
};

/// A process that answers everybody who connects with the same bytes, whatever they say, and then with silence, or
/// with more of the same for ever.
class rude_server {
 public:
  rude_server(const std::string& answer, bool for_ever) : port_(free_port()) {
    const int listener = ::socket(AF_INET, SOCK_STREAM, 0);
    const int on = 1;
    (void)::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    ::sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port_));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::bind(listener, reinterpret_cast<const ::sockaddr*>(&address), sizeof(address)) != 0 ||
        ::listen(listener, 16) != 0)
      throw std::runtime_error("cannot listen");
    const ::pid_t parent = ::getpid();
    process_ = ::fork();
    if (process_ == 0) {
#ifdef __linux__
      (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
      for (int fd = -1; ::getppid() == parent;) {
        const int next = ::accept(listener, nullptr, nullptr);
        if (fd >= 0) (void)::close(fd);
        fd = next;
        char question[512];
        (void)!::recv(fd, question, sizeof(question), 0);
        while (::send(fd, answer.data(), answer.size(), MSG_NOSIGNAL) > 0 && for_ever) {
        }
      }
      ::_exit(0);
    }
    (void)::close(listener);
  }
  rude_server(const rude_server&) = delete;
  rude_server& operator=(const rude_server&) = delete;
  ~rude_server() {
    (void)::kill(process_, SIGKILL);
    (void)::waitpid(process_, nullptr, 0);
  }

  [[nodiscard]] int port() const { return port_; }

 private:
  int port_;
  ::pid_t process_ = -1;
};

}  // namespace tiers
