// SPDX-License-Identifier: MIT
// JSON from outside: strict parsing, and fields read with their type and range checked.
#pragma once

#include "llama/model_error.hpp"

#include <kvcache/core/types.hpp>

#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace llama {

using kvcache::index_t;

/// Parses `text` as one JSON object. Stricter than the standard asks for: a key may appear only once in an
/// object, and nesting ends at 32 levels. Throws model_error naming `field`, or the duplicate key.
[[nodiscard]] inline nlohmann::json parse_json_object(std::string_view text,
                                                      const std::filesystem::path& file,
                                                      std::string_view field) {
  using event = nlohmann::json::parse_event_t;
  constexpr std::size_t max_depth = 32;
  std::vector<std::set<std::string>> keys;  // of every object or array that is open; arrays have none
  const auto check = [&](int, event what, nlohmann::json& value) {
    if (what == event::object_start || what == event::array_start) {
      if (keys.size() == max_depth) throw model_error(file, field, "JSON is nested too deeply");
      keys.emplace_back();
    } else if (what == event::object_end || what == event::array_end) {
      keys.pop_back();
    } else if (what == event::key && !keys.back().insert(value.get<std::string>()).second) {
      throw model_error(file, value.get<std::string>(), "key appears twice");
    }
    return true;
  };
  if (text.find('\0') != std::string_view::npos) {  // the parser would take it for the end
    throw model_error(file, field, "not valid JSON (it has a zero byte)");
  }
  nlohmann::json parsed;
  try {
    parsed = nlohmann::json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& error) {
    throw model_error(file, field, "not valid JSON (" + printable(error.what()) + ")");
  }
  if (!parsed.is_object()) throw model_error(file, field, "not a JSON object");
  return parsed;
}

/// The fields of one JSON object, for as long as that object lives. Everything that is wrong throws
/// model_error.
class json_fields {
 public:
  /// \param prefix  path of `object` in the file, put before the name of each field: "" or "rope_scaling."
  json_fields(const nlohmann::json& object, std::filesystem::path file, std::string prefix = "")
      : object_(&object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  [[nodiscard]] const std::filesystem::path& file() const noexcept { return file_; }

  /// Whether the field is there and not null.
  [[nodiscard]] bool has(const std::string& name) const { return find(name) != nullptr; }

  /// A whole number in [low, high]. The second form gives `otherwise` when the field is missing or null.
  [[nodiscard]] index_t integer(const std::string& name, index_t low, index_t high) const;
  [[nodiscard]] index_t integer_or(const std::string& name, index_t otherwise, index_t low,
                                   index_t high) const {
    return has(name) ? integer(name, low, high) : otherwise;
  }

  /// A finite number in [low, high].
  [[nodiscard]] double number(const std::string& name, double low, double high) const;
  [[nodiscard]] double number_or(const std::string& name, double otherwise, double low, double high) const {
    return has(name) ? number(name, low, high) : otherwise;
  }

  [[nodiscard]] bool boolean_or(const std::string& name, bool otherwise) const;
  [[nodiscard]] std::string text(const std::string& name) const;
  [[nodiscard]] std::string text_or(const std::string& name, std::string otherwise) const {
    return has(name) ? text(name) : std::move(otherwise);
  }

  /// The object or array in this field; throws unless it is one.
  [[nodiscard]] json_fields object(const std::string& name) const;
  [[nodiscard]] const nlohmann::json& array(const std::string& name) const;

  [[noreturn]] void fail(const std::string& name, std::string_view reason) const {
    throw model_error(file_, prefix_ + name, reason);
  }

 private:
  [[nodiscard]] const nlohmann::json* find(const std::string& name) const {
    const auto found = object_->find(name);
    return found == object_->end() || found->is_null() ? nullptr : &*found;
  }
  [[nodiscard]] const nlohmann::json& at(const std::string& name) const {
    if (const auto* value = find(name)) return *value;
    fail(name, "missing");
  }

  const nlohmann::json* object_;
  std::filesystem::path file_;
  std::string prefix_;
};

/// `value` as an integer if it is one and fits an index_t; 2.0 and "2" are none.
[[nodiscard]] inline std::optional<index_t> as_index(const nlohmann::json& value) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<std::uint64_t>();
    if (number > static_cast<std::uint64_t>(PTRDIFF_MAX)) return std::nullopt;
    return static_cast<index_t>(number);
  }
  if (value.is_number_integer()) return static_cast<index_t>(value.get<std::int64_t>());
  return std::nullopt;
}

inline index_t json_fields::integer(const std::string& name, index_t low, index_t high) const {
  const auto value = as_index(at(name));
  if (!value) fail(name, "not an integer");
  if (*value < low || *value > high) {
    fail(name, std::to_string(*value) + " is not in " + std::to_string(low) + " to " + std::to_string(high));
  }
  return *value;
}

inline double json_fields::number(const std::string& name, double low, double high) const {
  const auto& value = at(name);
  if (!value.is_number()) fail(name, "not a number");
  const double number = value.get<double>();
  if (!std::isfinite(number) || number < low || number > high) fail(name, value.dump() + " is out of range");
  return number;
}

inline bool json_fields::boolean_or(const std::string& name, bool otherwise) const {
  const auto* value = find(name);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) fail(name, "not true or false");
  return value->get<bool>();
}

inline std::string json_fields::text(const std::string& name) const {
  const auto& value = at(name);
  if (!value.is_string()) fail(name, "not a string");
  return value.get<std::string>();
}

inline json_fields json_fields::object(const std::string& name) const {
  const auto& value = at(name);
  if (!value.is_object()) fail(name, "not a JSON object");
  return {value, file_, prefix_ + name + "."};
}

inline const nlohmann::json& json_fields::array(const std::string& name) const {
  const auto& value = at(name);
  if (!value.is_array()) fail(name, "not an array");
  return value;
}

}  // namespace llama
