// SPDX-License-Identifier: MIT
// Reads the fixtures in this directory: whitespace-separated text, see make_golden.py for the format.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace golden {

/// Numbers with their dimensions, row-major; a scalar has no dimensions and one value.
struct tensor {
  std::vector<std::ptrdiff_t> dims;
  std::vector<double> values;

  /// The values rounded to another type, for calls that take spans of float or of index_t.
  template <class T>
  [[nodiscard]] std::vector<T> as() const {
    std::vector<T> out;
    out.reserve(values.size());
    for (const double value : values) out.push_back(static_cast<T>(value));
    return out;
  }
};

/// One named case: tensors and words by name.
struct test_case {
  std::string name;
  std::map<std::string, tensor> tensors;
  std::map<std::string, std::string> words;

  [[nodiscard]] bool has(const std::string& key) const { return tensors.count(key) != 0; }

  [[nodiscard]] const tensor& at(const std::string& key) const {
    const auto found = tensors.find(key);
    if (found == tensors.end()) throw std::runtime_error("golden case " + name + " has no tensor " + key);
    return found->second;
  }

  [[nodiscard]] double number(const std::string& key) const { return at(key).values.at(0); }

  [[nodiscard]] std::ptrdiff_t integer(const std::string& key) const {
    return static_cast<std::ptrdiff_t>(number(key));
  }

  template <class T>
  [[nodiscard]] std::vector<T> get(const std::string& key) const {
    return has(key) ? at(key).as<T>() : std::vector<T>{};
  }
};

/// The directory that holds the fixtures: KVCACHE_GOLDEN_DIR where it is defined, else that of this header.
inline std::filesystem::path directory() {
#ifdef KVCACHE_GOLDEN_DIR
  return KVCACHE_GOLDEN_DIR;
#else
  return std::filesystem::path(__FILE__).parent_path();
#endif
}

/// All cases of one fixture file. Throws std::runtime_error when the file is missing or not of the format.
inline std::vector<test_case> load(const std::string& file) {
  const std::filesystem::path path = directory() / file;
  std::ifstream in(path);
  if (!in) throw std::runtime_error("cannot open golden fixture " + path.string());
  const auto fail = [&](const std::string& why) { throw std::runtime_error(path.string() + ": " + why); };

  std::vector<test_case> cases;
  test_case current;
  std::string token;
  while (in >> token) {
    if (token[0] == '#') {
      std::getline(in, token);
    } else if (token == "case") {
      current = test_case{};
      in >> current.name;
    } else if (token == "word") {
      std::string key;
      std::string value;
      in >> key >> value;
      current.words[key] = value;
    } else if (token == "tensor") {
      std::string key;
      std::ptrdiff_t rank = 0;
      in >> key >> rank;
      tensor t;
      std::ptrdiff_t count = 1;
      for (std::ptrdiff_t i = 0; i < rank; ++i) {
        std::ptrdiff_t dim = 0;
        in >> dim;
        t.dims.push_back(dim);
        count *= dim;
      }
      for (std::ptrdiff_t i = 0; i < count; ++i) {
        if (!(in >> token)) fail("case " + current.name + ": tensor " + key + " is cut short");
        char* end = nullptr;
        t.values.push_back(std::strtod(token.c_str(), &end));  // reads inf too, which `in >> double` does not
        if (*end != '\0') fail("case " + current.name + ": tensor " + key + ": not a number: " + token);
      }
      current.tensors[key] = std::move(t);
    } else if (token == "end") {
      cases.push_back(std::move(current));
      current = test_case{};
    } else {
      fail("unknown word " + token);
    }
  }
  if (cases.empty()) fail("no cases");
  return cases;
}

}  // namespace golden
