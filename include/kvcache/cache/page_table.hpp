// SPDX-License-Identifier: MIT
// page_table: which pages hold the tokens of one sequence; and what a pool is told, and says of its memory.
#pragma once

#include <kvcache/core/memory.hpp>
#include <kvcache/core/types.hpp>

#include <cstddef>
#include <memory_resource>
#include <vector>

namespace kvcache::inline v0 {

struct pool_options {
  index_t budget_bytes = 0;  ///< most bytes of pages at a time; 0 grows for as long as memory lasts
  std::pmr::memory_resource* memory = huge_page_resource();  ///< where slabs of pages are allocated
  index_t slab_bytes = 2_MiB;  ///< pages are allocated in pieces of about that size, at least one page
};

/// Memory of a pool's pages, in bytes. `total == in_use + free`.
struct pool_use {
  index_t total = 0;   ///< allocated from the memory resource
  index_t in_use = 0;  ///< pages that at least one sequence refers to, each counted once
  index_t free = 0;    ///< pages that none refers to
  index_t shared = 0;  ///< part of `in_use` that more than one sequence refers to

  friend bool operator==(const pool_use&, const pool_use&) = default;
};

/// The pages of one sequence, in order. Has addresses of its own, so that whoever reads one sequence depends on nothing
/// that changes when others do.
struct page_table {
  std::vector<page_id> pages;
  std::vector<std::byte*> addresses;  // of the same pages
  bool open = false;
};

}  // namespace kvcache::inline v0
