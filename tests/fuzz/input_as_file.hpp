// SPDX-License-Identifier: MIT
// The bytes of a fuzzer as a file, for readers that take a path; and how a target says that a promise was broken.
#pragma once

#include "examples/temporary_folder.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>

namespace fuzz {

/// Ends the process, which is how a fuzzer and a test both see a finding.
inline void require(bool holds, const char* promise) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", promise);
  std::abort();
}

/// One file of a folder of this process, overwritten by each input. TMPDIR says where.
inline std::filesystem::path input_as_file(const std::string& name, std::span<const std::uint8_t> bytes) {
  static const model_files::temporary_folder folder;
  std::filesystem::path path = folder.path() / name;
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  out.close();
  require(out.good(), "the input can be written to a file");
  return path;
}

}  // namespace fuzz
