// SPDX-License-Identifier: MIT
// One safetensors file: 8 bytes of header length, a JSON header, then the bytes of the tensors.
//
//   | u64 n | {"name": {"dtype": "F16", "shape": [256, 64], "data_offsets": [0, 32768]}, ...} | data ... |
//   0       8                                                                              8 + n     size
//
// Offsets count from the start of the data. The tensors must fill the data without holes or overlaps, so
// every byte of the file is accounted for before one of them is read.
// Source: https://huggingface.co/docs/safetensors, section Format.
#pragma once

#include "llama/float_reader.hpp"
#include "llama/input_file.hpp"
#include "llama/json_fields.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace llama {

/// "[256, 64]", as error messages show it.
[[nodiscard]] inline std::string shape_text(std::span<const index_t> shape) {
  std::string text = "[";
  for (const index_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

struct tensor_info {
  std::string dtype;           // "F32", "F16", "BF16" or one this reader does not convert
  std::vector<index_t> shape;  // outermost first
  std::uint64_t begin = 0;     // bytes from the start of the file
  std::uint64_t end = 0;
};

class safetensors_file {
 public:
  /// Reads and checks the header. Throws model_error. Allocates in proportion to the header, which the file
  /// holds.
  explicit safetensors_file(const std::filesystem::path& path);

  [[nodiscard]] const std::filesystem::path& path() const noexcept { return file_.path(); }
  [[nodiscard]] const std::map<std::string, tensor_info>& tensors() const noexcept { return tensors_; }

  /// Throws model_error unless tensor `name` is there as F32, F16 or BF16 of this shape.
  void require(const std::string& name, std::span<const index_t> shape) const;

  /// Converts a tensor to floats. \pre `require` accepted it; `out` has as many elements
  void read(const std::string& name, std::span<float> out);

 private:
  tensor_info read_info(const std::string& name, const nlohmann::json& entry, std::uint64_t data_begin) const;
  void check_coverage(std::uint64_t data_begin) const;

  input_file file_;
  std::map<std::string, tensor_info> tensors_;
};

inline safetensors_file::safetensors_file(const std::filesystem::path& path) : file_(path) {
  constexpr std::uint64_t max_header = 100'000'000;  // bytes, the limit of the format
  std::array<unsigned char, 8> length_bytes{};
  file_.read(0, length_bytes, "header length");
  const auto length = load_little_endian<std::uint64_t>(length_bytes.data());
  if (length > max_header) {
    file_.fail("header length", std::to_string(length) + " bytes are more than the format's limit of " +
                                    std::to_string(max_header));
  }
  const auto header = parse_json_object(file_.read_text(8, length, "header"), path, "header");
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) file_.fail(name, "not a JSON object");
      continue;
    }
    tensors_.emplace(name, read_info(name, entry, 8 + length));
  }
  check_coverage(8 + length);
}

inline tensor_info safetensors_file::read_info(const std::string& name, const nlohmann::json& entry,
                                               std::uint64_t data_begin) const {
  if (!entry.is_object()) file_.fail(name, "not a JSON object");
  const json_fields fields(entry, path(), name + ".");
  const std::uint64_t data_bytes = file_.size() - data_begin;

  tensor_info info;
  info.dtype = fields.text("dtype");
  std::uint64_t bytes = element_bytes(info.dtype);
  if (bytes == 0) fields.fail("dtype", "\"" + printable(info.dtype) + "\" is not a known type");
  for (const auto& value : fields.array("shape")) {
    const auto size = as_index(value);
    if (!size || *size < 0) fields.fail("shape", "holds something that is not a size");
    info.shape.push_back(*size);
    bytes = saturating_multiply(bytes, static_cast<std::uint64_t>(*size));
  }
  const auto& offsets = fields.array("data_offsets");
  const index_t begin = offsets.size() == 2 ? as_index(offsets[0]).value_or(-1) : -1;
  const index_t end = offsets.size() == 2 ? as_index(offsets[1]).value_or(-1) : -1;
  if (begin < 0 || end < begin) fields.fail("data_offsets", "not [begin, end] in bytes");
  if (static_cast<std::uint64_t>(end) > data_bytes) {
    fields.fail("data_offsets", "ends at byte " + std::to_string(end) + " of " + std::to_string(data_bytes) +
                                    " that the file holds");
  }
  if (static_cast<std::uint64_t>(end - begin) != bytes) {
    fields.fail("data_offsets", std::to_string(end - begin) + " bytes do not fit shape " +
                                    shape_text(info.shape) + " of " + info.dtype);
  }
  info.begin = data_begin + static_cast<std::uint64_t>(begin);
  info.end = data_begin + static_cast<std::uint64_t>(end);
  return info;
}

inline void safetensors_file::check_coverage(std::uint64_t data_begin) const {
  std::vector<std::pair<std::uint64_t, const std::string*>> order;  // begin, name
  for (const auto& [name, info] : tensors_) {
    if (info.begin < info.end) order.emplace_back(info.begin, &name);
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::uint64_t covered = data_begin;
  for (const auto& [begin, name] : order) {
    if (begin < covered) file_.fail(*name, "overlaps the tensor before it");
    if (begin > covered)
      file_.fail(*name, std::to_string(begin - covered) + " bytes before it belong to no tensor");
    covered = tensors_.at(*name).end;
  }
  if (covered != file_.size()) {
    file_.fail("data", std::to_string(file_.size() - covered) + " bytes at the end belong to no tensor");
  }
}

inline void safetensors_file::require(const std::string& name, std::span<const index_t> shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) file_.fail(name, "missing tensor");
  const tensor_info& info = found->second;
  if (!is_float_type(info.dtype)) file_.fail(name, "dtype " + info.dtype + " is not F32, F16 or BF16");
  if (!std::equal(shape.begin(), shape.end(), info.shape.begin(), info.shape.end())) {
    file_.fail(name,
               "has shape " + shape_text(info.shape) + ", the configuration needs " + shape_text(shape));
  }
}

inline void safetensors_file::read(const std::string& name, std::span<float> out) {
  const tensor_info& info = tensors_.at(name);
  read_floats(file_, info.begin, info.dtype, out, name);
}

}  // namespace llama
