// SPDX-License-Identifier: MIT
// kill_resume <resume> <folder> <kills> [seed]: starts the example again and again and kills it with SIGKILL at random
// moments; each text that gets finished must be the one that an undisturbed run writes.
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fcntl.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

namespace {

using clock_type = std::chrono::steady_clock;

struct program {
  std::string path;
  std::filesystem::path folder;

  [[nodiscard]] std::filesystem::path journal() const { return folder / "text.kvj"; }
  [[nodiscard]] std::filesystem::path output() const { return folder / "text.txt"; }

  /// Starts it, with output to the file.
  [[nodiscard]] ::pid_t start() const {
    const std::string log = journal().string();
    const std::string out = output().string();
    const ::pid_t child = ::fork();
    if (child < 0) throw std::runtime_error("fork failed");
    if (child > 0) return child;
    const int fd = ::open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    const int quiet = ::open("/dev/null", O_WRONLY);
    if (fd < 0 || quiet < 0 || ::dup2(fd, 1) < 0 || ::dup2(quiet, 2) < 0) ::_exit(126);
    // A prompt of two pieces, and records at every size of step.
    ::execl(path.c_str(), path.c_str(), "--journal", log.c_str(), "--tokens", "60", "--every", "4",
            "--prompt", "JULIET:\nWhat man art thou that thus bescreen'd in night\n",
            static_cast<char*>(nullptr));
    ::_exit(127);
  }

  [[nodiscard]] std::string text() const {
    std::ifstream file(output(), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void forget() const {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) std::filesystem::remove(entry);
  }
};

/// Waits for a child that ends by itself. Throws unless it ends well.
void expect_success(int status) {
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw std::runtime_error("resume ended with status " + std::to_string(status));
}

/// Lets it run for so long. \return whether it had to be killed
bool run_for(const program& resume, std::chrono::microseconds time) {
  const ::pid_t child = resume.start();
  const auto end = clock_type::now() + time;
  int status = 0;
  while (clock_type::now() < end) {
    if (::waitpid(child, &status, WNOHANG) == child) {
      expect_success(status);
      return false;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  (void)::kill(child, SIGKILL);
  if (::waitpid(child, &status, 0) != child) throw std::runtime_error("waitpid failed");
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return true;
  expect_success(status);
  return false;
}

void run(const program& resume, int num_kills, std::uint64_t seed) {
  const auto begin = clock_type::now();
  if (run_for(resume, std::chrono::minutes(5)))
    throw std::runtime_error("resume takes more than five minutes");
  const auto whole = std::chrono::duration_cast<std::chrono::microseconds>(clock_type::now() - begin);
  const std::string expected = resume.text();
  if (expected.size() < 100) throw std::runtime_error("resume wrote too little: " + expected);
  resume.forget();

  std::mt19937_64 random(seed);
  const auto deadline = clock_type::now() + std::chrono::minutes(8);
  int kills = 0;
  int texts = 0;
  int resumed = 0;  // kills of a process that found a journal
  while (kills < num_kills || texts == 0) {
    if (clock_type::now() > deadline) throw std::runtime_error("out of time");
    const bool found = std::filesystem::exists(resume.journal());
    const auto time =
        static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(whole.count() * 6 / 10 + 1000));
    // Once there were kills enough, the text may end.
    const auto limit = kills < num_kills ? std::chrono::microseconds(time) : std::chrono::minutes(5);
    if (run_for(resume, limit)) {
      ++kills;
      resumed += found ? 1 : 0;
      continue;
    }
    if (resume.text() != expected)
      throw std::runtime_error("after " + std::to_string(kills) + " kills (seed " + std::to_string(seed) +
                               ") the text is\n" + resume.text() + "\nand not\n" + expected);
    ++texts;
    resume.forget();
  }
  std::cout << kills << " kills, " << resumed << " of them with a journal to go on from; " << texts
            << " texts finished, all as they should be\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "kill_resume <resume> <folder> <kills> [seed]\n";
    return 2;
  }
  try {
    const program resume{argv[1], argv[2]};
    std::filesystem::create_directories(resume.folder);
    resume.forget();
    run(resume, std::atoi(argv[3]), argc > 4 ? std::strtoull(argv[4], nullptr, 10) : 1);
    std::filesystem::remove_all(resume.folder);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "kill_resume: " << error.what() << '\n';
    return 1;
  }
}
