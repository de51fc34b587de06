// SPDX-License-Identifier: MIT
// The main of every bench: writes down machine and build, then runs the rows.
#include <kvcache/kernel/select.hpp>
#include <kvcache/version.hpp>

#include <benchmark/benchmark.h>

#include "commit.hpp"
#include "support/machine.hpp"
#include "support/measure.hpp"
#include "support/pin.hpp"
#include "support/rows.hpp"

#include <cstdlib>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

namespace kvcache::bench {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang++ " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

std::string instruction_sets() {
  std::string names;
  for (const kernel::isa level : kernel::available())
    names.append(names.empty() ? "" : " ").append(kernel::to_string(level));
  return names;
}

void add_context() {
  const std::string version = std::to_string(version_major) + "." + std::to_string(version_minor) + "." +
                              std::to_string(version_patch);
  const auto mib = [](index_t bytes) { return std::to_string(bytes / 1_MiB); };
  benchmark::AddCustomContext("kvcache_version", version);
  benchmark::AddCustomContext("kvcache_commit", KVCACHE_BENCH_COMMIT);
  benchmark::AddCustomContext("cpu_model", cpu_model());
  benchmark::AddCustomContext("virtual_machine", is_virtual_machine() ? "yes" : "no");
  benchmark::AddCustomContext("usable_cpus", std::to_string(usable_cpus().size()));
  benchmark::AddCustomContext("last_level_cache_mib", mib(last_level_cache_bytes()));
  benchmark::AddCustomContext("memory_mib", mib(total_memory_bytes()));
  benchmark::AddCustomContext("ring_mib", mib(ring_bytes()));
  benchmark::AddCustomContext("huge_pages", huge_page_mode());
  benchmark::AddCustomContext("isa_available", instruction_sets());
  benchmark::AddCustomContext("isa_best", std::string(kernel::to_string(kernel::best().level)));
  benchmark::AddCustomContext("compiler", compiler());
  benchmark::AddCustomContext("flags", KVCACHE_BENCH_FLAGS);
  benchmark::AddCustomContext("row_seconds", std::to_string(row_seconds));
#if defined(NDEBUG)
  benchmark::AddCustomContext("assertions", "off");
#else
  benchmark::AddCustomContext("assertions", "on");
#endif
}

/// Takes --benchmark_min_time for the time of a row (see measure.hpp) and tells the framework to stop after
/// one round.
std::vector<char*> arguments(int argc, char** argv) {
  static std::string shortest = "--benchmark_min_time=" KVCACHE_BENCH_SHORTEST;
  static std::string tabular = "--benchmark_counters_tabular=true";
  std::vector<char*> kept{argv[0], shortest.data(), tabular.data()};
  constexpr std::string_view min_time = "--benchmark_min_time=";
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]).starts_with(min_time)) {
      row_seconds = std::strtod(argv[i] + min_time.size(), nullptr);
    } else {
      kept.push_back(argv[i]);
    }
  }
  return kept;
}

}  // namespace
}  // namespace kvcache::bench

int main(int argc, char** argv) {
  using namespace kvcache::bench;
  std::vector<char*> args = arguments(argc, argv);
  argc = static_cast<int>(args.size());
  args.push_back(nullptr);
  (void)thread_counts();  // asks for the processors before anything is pinned
  try {
    add_context();
  } catch (const std::exception& e) {  // a name in KVCACHE_ISA that does not exist
    std::cerr << e.what() << '\n';
    return 2;
  }
  benchmark::Initialize(&argc, args.data());
  if (benchmark::ReportUnrecognizedArguments(argc, args.data())) return 1;
  pin_this_thread(0);
  register_rows();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
