// SPDX-License-Identifier: MIT
// Runs a fuzz target over the files of its corpus, and over each of them cut and changed a little: what an ordinary
// compiler can do of it. tools/fuzz.sh does the rest.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  int files = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
      std::ifstream stream(entry.path(), std::ios::binary);
      std::vector<std::uint8_t> bytes{std::istreambuf_iterator<char>(stream), {}};
      (void)LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
      ++files;
      const std::size_t step = std::max<std::size_t>(bytes.size() / 100, 1);
      for (std::size_t at = 0; at < bytes.size(); at += step) {
        (void)LLVMFuzzerTestOneInput(bytes.data(), at);
        bytes[at] ^= static_cast<std::uint8_t>(1U << (at % 8));
        (void)LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
        bytes[at] ^= static_cast<std::uint8_t>(1U << (at % 8));
      }
    }
  }
  std::printf("%d files\n", files);
  return files == 0 ? 1 : 0;
}
