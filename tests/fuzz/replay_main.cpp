// SPDX-License-Identifier: MIT
// Runs a fuzz target over files instead of a fuzzer: every file of the folders named, the empty input, and each file cut
// short, and with a bit flipped, at a number of places. A target that fails throws, aborts or trips a sanitizer.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

constexpr std::size_t num_places = 32;  // per file

void run(const std::string& bytes, std::size_t size) {
  const std::vector<std::uint8_t> exact(bytes.data(),
                                        bytes.data() + size);  // so that reading past it is seen
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

void replay(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  run(bytes, bytes.size());
  const std::size_t step = std::max<std::size_t>(bytes.size() / num_places, 1);
  for (std::size_t at = 0; at < bytes.size(); at += step) {
    run(bytes, at);
    const char whole = bytes[at];
    bytes[at] = static_cast<char>(whole ^ (1 << (at / step % 8)));
    run(bytes, bytes.size());
    bytes[at] = whole;
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::filesystem::path> files;
  for (int i = 1; i < argc; ++i) {
    if (!std::filesystem::is_directory(argv[i])) {
      files.emplace_back(argv[i]);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  if (files.empty()) {
    std::fprintf(stderr, "usage: %s FILE_OR_FOLDER...   (no file found)\n", argc > 0 ? argv[0] : "replay");
    return 2;
  }
  run({}, 0);
  for (const auto& file : files) {
    try {
      replay(file);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: escaped: %s\n", file.string().c_str(), error.what());
      return 1;
    }
  }
  std::printf("%zu files replayed\n", files.size());
}
