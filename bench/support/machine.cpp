// SPDX-License-Identifier: MIT
#include "support/machine.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <string>

namespace kvcache::bench {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

/// The text behind `key ... :` in a file of such lines.
std::string value_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, key.size(), key) != 0) continue;
    const auto text = line.find_first_not_of(" \t", colon + 1);
    return text == std::string::npos ? std::string() : line.substr(text);
  }
  return {};
}

index_t kib_in_meminfo(const std::string& key) {
  return static_cast<index_t>(std::strtoll(value_of("/proc/meminfo", key).c_str(), nullptr, 10));
}

}  // namespace

std::string cpu_model() {
  for (const char* key : {"model name", "Model", "Hardware", "uarch"}) {
    std::string model = value_of("/proc/cpuinfo", key);
    if (!model.empty()) return model;
  }
  return "unknown processor";
}

bool is_virtual_machine() {
  return value_of("/proc/cpuinfo", "flags").find("hypervisor") != std::string::npos;
}

std::string huge_page_mode() { return first_line("/sys/kernel/mm/transparent_hugepage/enabled"); }

index_t last_level_cache_bytes() {
  index_t largest = 0;
  for (int i = 0; i < 8; ++i) {
    const std::string size =
        first_line("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size");
    const auto number = static_cast<index_t>(std::strtoll(size.c_str(), nullptr, 10));
    const char unit = size.empty() ? ' ' : size.back();
    largest = std::max(largest, unit == 'K' ? number * 1_KiB : unit == 'M' ? number * 1_MiB : number);
  }
  return largest > 0 ? largest : 32_MiB;
}

index_t total_memory_bytes() { return kib_in_meminfo("MemTotal") * 1_KiB; }
index_t available_memory_bytes() { return kib_in_meminfo("MemAvailable") * 1_KiB; }

index_t ring_bytes() {
  if (const char* forced = std::getenv("KVCACHE_BENCH_RING_MIB"); forced != nullptr && *forced != '\0')
    return std::max(static_cast<index_t>(std::strtoll(forced, nullptr, 10)), index_t{1}) * 1_MiB;
  static const index_t bytes = [] {
    const index_t wanted = std::max(1_GiB, 4 * last_level_cache_bytes());
    const index_t available = available_memory_bytes();
    return available > 0 ? std::min(wanted, available / 4) : wanted;
  }();
  return bytes;
}

}  // namespace kvcache::bench
