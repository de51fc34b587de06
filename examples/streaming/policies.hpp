// SPDX-License-Identifier: MIT
// Every token policy by its name.
#pragma once

#include <kvcache/eviction/h2o.hpp>
#include <kvcache/eviction/keydiff.hpp>
#include <kvcache/eviction/snapkv.hpp>
#include <kvcache/eviction/tova.hpp>
#include <kvcache/eviction/window.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace streaming {

using kvcache::index_t;
namespace eviction = kvcache::eviction;

using any_policy = std::variant<eviction::sliding_window, eviction::sinks_window, eviction::h2o,
                                eviction::tova, eviction::snapkv, eviction::keydiff>;

/// One of each.
[[nodiscard]] inline std::vector<any_policy> all_policies() {
  return {eviction::sliding_window{}, eviction::sinks_window{}, eviction::h2o{},
          eviction::tova{},           eviction::snapkv{},       eviction::keydiff{}};
}

[[nodiscard]] inline std::string_view name_of(const any_policy& policy) {
  return std::visit([](const auto& p) { return std::string_view(p.name); }, policy);
}

[[nodiscard]] inline std::optional<any_policy> policy_named(std::string_view name) {
  for (const any_policy& policy : all_policies()) {
    if (name_of(policy) == name) return policy;
  }
  return std::nullopt;
}

/// "window, sinks, ..."
[[nodiscard]] inline std::string policy_names() {
  std::string names;
  for (const any_policy& policy : all_policies())
    names.append(names.empty() ? "" : ", ").append(name_of(policy));
  return names;
}

}  // namespace streaming
