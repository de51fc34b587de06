// SPDX-License-Identifier: MIT
// A table as kernel::trellis_kernels takes it.
#pragma once

#include "support/random.hpp"

#include <kvcache/kernel/table.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace test {

/// Random numbers, the second half of them the first one negated.
inline std::vector<std::int8_t> random_trellis_table(random& numbers) {
  constexpr std::size_t half = kvcache::kernel::trellis_states / 2;
  std::vector<std::int8_t> table(2 * half);
  for (std::size_t s = 0; s < half; ++s) {
    table[s] = static_cast<std::int8_t>(numbers.between(-127, 127));
    table[s + half] = static_cast<std::int8_t>(-table[s]);
  }
  return table;
}

}  // namespace test
