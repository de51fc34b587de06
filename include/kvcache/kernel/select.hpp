// SPDX-License-Identifier: MIT
// Which instruction sets there are, and which one to use.
//
// The kernels take a compiler about ten seconds in every source file that attends. A program of many files may define
// KVCACHE_SEPARATE_KERNELS for all of them and include kernel/tables.hpp in one: only that one compiles the kernels. Nothing
// else depends on the macro.
#pragma once

#include <kvcache/kernel/table.hpp>
#ifndef KVCACHE_SEPARATE_KERNELS
#include <kvcache/kernel/tables.hpp>
#endif

#include <array>
#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvcache::inline v0::kernel {

constexpr std::string_view to_string(isa level) noexcept {
  switch (level) {
    case isa::portable:
      return "portable";
    case isa::avx2:
      return "avx2";
    case isa::avx512:
      return "avx512";
    case isa::amx:
      return "amx";
    case isa::neon:
      return "neon";
  }
  return "unknown";
}

namespace detail {

#ifdef KVCACHE_SEPARATE_KERNELS
/// All tables compiled into the program, best last; defined by kernel/tables.hpp.
std::span<const entry> tables() noexcept;
#endif

struct available_tables {
  std::array<isa, max_tables> levels{};
  std::size_t count = 0;

  available_tables() noexcept {
    for (const entry& e : tables()) {
      if (e.runs_here()) levels[count++] = e.kernels->level;
    }
  }
};

}  // namespace detail

/// The instruction sets this processor runs, best last. O(1) after the first call; thread-safe.
inline std::span<const isa> available() noexcept {
  static const detail::available_tables found;
  return {found.levels.data(), found.count};
}

/// The table of one instruction set. Throws std::invalid_argument if this processor does not run it.
inline const table& select(isa level) {
  for (const detail::entry& e : detail::tables()) {
    if (e.kernels->level == level && e.runs_here()) return *e.kernels;
  }
  throw std::invalid_argument("kvcache: this processor does not run the kernels for " +
                              std::string(to_string(level)));
}

/// The same by name, as in KVCACHE_ISA=portable. Throws std::invalid_argument that lists what there is.
inline const table& select(std::string_view name) {
  std::string known;
  for (const isa level : available()) {
    if (to_string(level) == name) return select(level);
    known.append(known.empty() ? "" : ", ").append(to_string(level));
  }
  throw std::invalid_argument("kvcache: no kernels named '" + std::string(name) +
                              "' run here; available: " + known);
}

/// The best table of this processor, or the one named by the environment variable KVCACHE_ISA, read at the
/// first call. Throws std::invalid_argument if that names none. O(1) afterwards; thread-safe.
inline const table& best() {
  static const table& chosen = []() -> const table& {
    const char* forced = std::getenv("KVCACHE_ISA");
    return forced != nullptr && *forced != '\0' ? select(std::string_view(forced))
                                                : select(available().back());
  }();
  return chosen;
}

}  // namespace kvcache::inline v0::kernel
