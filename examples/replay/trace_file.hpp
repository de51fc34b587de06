// SPDX-License-Identifier: MIT
// Reads traces in the format of the Mooncake project: one JSON object a line,
//
//   {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 49]}
//
// where a hash id names a block together with all blocks before it.
#pragma once

#include "llama/json_fields.hpp"
#include "llama/model_error.hpp"
#include "replay/trace.hpp"

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>
#include <unordered_set>

namespace replay {

namespace detail {

/// \param line  "line 7", for messages
[[nodiscard]] inline request parse_request(const std::string& text, const std::filesystem::path& file,
                                           const std::string& line) {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  const nlohmann::json object = llama::parse_json_object(text, file, line);
  const llama::json_fields fields(object, file, line + ": ");
  for (const char* name : {"timestamp", "input_length", "output_length"}) {
    if (fields.has(name)) (void)fields.number(name, 0, static_cast<double>(most));
  }
  request blocks;
  std::unordered_set<block_key> seen;
  for (const auto& element : fields.array("hash_ids")) {
    const auto id = llama::as_index(element);
    if (!id || *id < 0) fields.fail("hash_ids", llama::printable(element.dump()) + " is not a block id");
    if (!seen.insert(static_cast<block_key>(*id)).second)
      fields.fail("hash_ids", std::to_string(*id) + " appears twice");
    blocks.push_back(static_cast<block_key>(*id));
  }
  return blocks;
}

}  // namespace detail

/// Throws llama::model_error, which names the file, the line and the field. Empty lines are skipped.
[[nodiscard]] inline trace read_trace(const std::filesystem::path& file) {
  std::error_code error;
  if (!std::filesystem::exists(file, error)) throw llama::model_error(file, "", "no such file");
  if (std::filesystem::is_directory(file, error)) throw llama::model_error(file, "", "is a folder");
  std::ifstream in(file, std::ios::binary);
  if (!in) throw llama::model_error(file, "", "cannot be opened for reading");
  trace t{.name = file.filename().string(), .requests = {}};
  std::string text;
  for (index_t number = 1; std::getline(in, text); ++number) {
    if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
    t.requests.push_back(detail::parse_request(text, file, "line " + std::to_string(number)));
  }
  if (in.bad()) throw llama::model_error(file, "", "reading failed");
  if (t.num_blocks() == 0) throw llama::model_error(file, "", "no request with a block in it");
  return t;
}

}  // namespace replay
