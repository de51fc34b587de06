// SPDX-License-Identifier: MIT
// page_store: the pages of a pool, who refers to them, and the page tables of all sequences.
//
//   page    | layer 0, head 0 | layer 0, head 1 | ... | last layer, last head |   one span of block_size tokens
//   table   [ page 7, page 2, page 9 ]    one per sequence: logical block -> page, shared pages in many tables
//
// Knows sizes and counts only; what the bytes mean is the codec's business. The tables live here, so that
// `check` can prove every reference count by counting.
#pragma once

#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory_resource>
#include <new>
#include <span>
#include <vector>

namespace kvcache::inline v0 {

struct pool_options {
  index_t budget_bytes = 0;  ///< most bytes of pages at a time; 0 grows for as long as memory lasts
  std::pmr::memory_resource* memory = huge_page_resource();  ///< where slabs of pages are allocated
};

/// Memory of a pool's pages, in bytes. `total == in_use + free`.
struct pool_use {
  index_t total = 0;   ///< allocated from the memory resource
  index_t in_use = 0;  ///< pages that at least one sequence refers to, each counted once
  index_t free = 0;    ///< pages that none refers to
  index_t shared = 0;  ///< part of `in_use` that more than one sequence refers to

  friend bool operator==(const pool_use&, const pool_use&) = default;
};

/// Threads: none of the members may run at the same time as one that changes something.
class page_store {
 public:
  using table_id = std::size_t;

  /// Allocates nothing. Throws shape_error if the budget is negative or holds not even one page.
  page_store(index_t page_bytes, const pool_options& options)
      : page_bytes_(page_bytes), memory_(options.memory) {
    set_budget(options.budget_bytes);
  }

  page_store(const page_store&) = delete;  // sequences refer to it
  page_store& operator=(const page_store&) = delete;

  // -- the pool -------------------------------------------------------------------------------------------------

  [[nodiscard]] index_t page_bytes() const noexcept { return page_bytes_; }
  [[nodiscard]] index_t max_pages() const noexcept { return max_pages_; }

  /// Pages that can still be taken within the budget, allocated or not.
  [[nodiscard]] index_t num_free() const noexcept { return max_pages_ - num_in_use(); }
  [[nodiscard]] index_t num_in_use() const noexcept {
    return num_pages() - static_cast<index_t>(free_.size());
  }

  [[nodiscard]] std::pmr::memory_resource* memory() const noexcept { return memory_; }

  /// Gives slabs back to the memory resource, newest first, until one has a page in use. O(pages), never allocates.
  void release_free() noexcept;

  /// From now on at most `bytes` of pages; 0 is no limit. Throws shape_error if that is less than one page, or
  /// than what is still allocated after release_free().
  void set_budget(index_t bytes) {
    const index_t pages =
        bytes == 0 ? index_t{std::numeric_limits<std::uint32_t>::max()} : checked_add(bytes, 0) / page_bytes_;
    if (pages < 1) throw shape_error("kvcache: the pool's budget_bytes is smaller than one page");
    if (pages < num_pages()) release_free();
    if (pages < num_pages()) throw shape_error("kvcache: the pool has allocated more than that budget_bytes");
    max_pages_ = std::min(pages, index_t{std::numeric_limits<std::uint32_t>::max()});
  }

  [[nodiscard]] pool_use bytes() const noexcept {
    const index_t shared =
        std::count_if(ref_counts_.begin(), ref_counts_.end(), [](auto n) { return n > 1; });
    return {num_pages() * page_bytes_, num_in_use() * page_bytes_,
            static_cast<index_t>(free_.size()) * page_bytes_, shared * page_bytes_};
  }

  [[nodiscard]] std::byte* page(page_id id) const noexcept { return pages_[index(id)]; }
  [[nodiscard]] index_t ref_count(page_id id) const noexcept { return ref_counts_[index(id)]; }

  // -- page tables ----------------------------------------------------------------------------------------------

  /// A new, empty table. Throws std::bad_alloc.
  [[nodiscard]] table_id open_table();
  /// Gives all its pages back and forgets the table. Never allocates.
  void close_table(table_id id) noexcept;
  [[nodiscard]] std::span<const page_id> table(table_id id) const noexcept { return tables_[id].pages; }

  /// Makes the table `last` pages long or longer, and pages [first, last) its own: shared ones are copied.
  /// \return out_of_pages or out_of_memory; then nothing changed. O(last - first) when there is nothing to do.
  [[nodiscard]] status prepare_write(table_id id, index_t first, index_t last);

  /// Keeps the entries `kept`, ascending, of a table, and gives the other pages back; entries [own_first, own_last), counted
  /// anew, become its own. Pages that only this table had serve for the copies.
  /// \return as prepare_write
  [[nodiscard]] status keep(table_id id, std::span<const index_t> kept, index_t own_first, index_t own_last);

  /// Gives the pages from `num_pages` on back. Never allocates.
  void shrink(table_id id, index_t num_pages) noexcept;

  /// A new table that shares the first `num_pages` pages of another. Throws std::bad_alloc.
  [[nodiscard]] table_id share(table_id id, index_t num_pages);

  /// Proves free list, reference counts and byte accounting by counting them anew. Throws invariant_error.
  void check() const;

 private:
  struct page_table {
    std::vector<page_id> pages;
    bool open = false;
  };

  static std::size_t index(page_id id) noexcept { return static_cast<std::size_t>(id); }
  [[nodiscard]] index_t num_pages() const noexcept { return static_cast<index_t>(pages_.size()); }

  [[nodiscard]] status allocate_until_free(index_t needed);
  void copy_shared(std::vector<page_id>& table, index_t first, index_t last) noexcept;
  void add_slab(index_t num_new);
  page_id take() noexcept;
  void release(page_id id) noexcept;

  index_t page_bytes_;
  index_t max_pages_ = 0;
  std::pmr::memory_resource* memory_;
  std::vector<memory_block> slabs_;
  std::vector<std::byte*> pages_;          // [num_pages] addresses
  std::vector<std::uint32_t> ref_counts_;  // [num_pages]
  std::vector<page_id> free_;  // last in, first out; capacity for every page, so giving back never allocates
  std::vector<page_table> tables_;
  std::vector<table_id> closed_tables_;  // to be opened again; capacity for every table
};

inline page_store::table_id page_store::open_table() {
  if (closed_tables_.empty()) {
    tables_.emplace_back();
    try {
      closed_tables_.reserve(tables_.size());
    } catch (...) {
      tables_.pop_back();
      throw;
    }
    closed_tables_.push_back(tables_.size() - 1);
  }
  const table_id id = closed_tables_.back();
  closed_tables_.pop_back();
  tables_[id].open = true;
  return id;
}

inline void page_store::close_table(table_id id) noexcept {
  shrink(id, 0);
  tables_[id].open = false;
  closed_tables_.push_back(id);
}

inline status page_store::prepare_write(table_id id, index_t first, index_t last) {
  std::vector<page_id>& table = tables_[id].pages;
  const auto size = static_cast<index_t>(table.size());
  const index_t last_present = std::min(last, size);
  index_t to_copy = 0;
  for (index_t i = first; i < last_present; ++i)
    to_copy += ref_count(table[static_cast<std::size_t>(i)]) > 1 ? 1 : 0;
  const index_t to_add = std::max(last - size, index_t{0});
  if (to_copy + to_add == 0) return status::ok;

  // Everything that can fail comes first.
  if (to_copy + to_add > num_free()) return status::out_of_pages;
  try {
    if (to_add > 0 && static_cast<std::size_t>(last) > table.capacity())
      table.reserve(std::max(static_cast<std::size_t>(last), 2 * table.capacity()));
  } catch (const std::bad_alloc&) {
    return status::out_of_memory;
  }
  if (const status s = allocate_until_free(to_copy + to_add); s != status::ok) return s;
  copy_shared(table, first, last_present);
  for (index_t i = 0; i < to_add; ++i) table.push_back(take());
  return status::ok;
}

/// Makes shared pages of a table its own. \pre there are as many free ones
inline void page_store::copy_shared(std::vector<page_id>& table, index_t first, index_t last) noexcept {
  for (index_t i = first; i < last; ++i) {
    page_id& entry = table[static_cast<std::size_t>(i)];
    if (ref_count(entry) == 1) continue;
    const page_id own = take();
    std::memcpy(page(own), page(entry), static_cast<std::size_t>(page_bytes_));
    release(entry);
    entry = own;
  }
}

inline status page_store::keep(table_id id, std::span<const index_t> kept, index_t own_first,
                               index_t own_last) {
  std::vector<page_id>& table = tables_[id].pages;
  const auto entry = [&](index_t i) {
    return table[static_cast<std::size_t>(kept[static_cast<std::size_t>(i)])];
  };
  index_t to_copy = 0;
  for (index_t i = own_first; i < own_last; ++i) to_copy += ref_count(entry(i)) > 1 ? 1 : 0;
  index_t to_free = std::count_if(table.begin(), table.end(), [&](page_id p) { return ref_count(p) == 1; });
  for (index_t i = 0; i < static_cast<index_t>(kept.size()); ++i) to_free -= ref_count(entry(i)) == 1 ? 1 : 0;
  const index_t missing = to_copy - to_free;
  if (missing > 0) {
    if (missing > num_free()) return status::out_of_pages;
    if (const status s = allocate_until_free(missing); s != status::ok) return s;
  }
  std::size_t num_kept = 0;
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (num_kept < kept.size() && kept[num_kept] == static_cast<index_t>(i)) {
      table[num_kept++] = table[i];
    } else {
      release(table[i]);
    }
  }
  table.resize(num_kept);
  copy_shared(table, own_first, own_last);
  return status::ok;
}

inline void page_store::shrink(table_id id, index_t num_pages) noexcept {
  std::vector<page_id>& table = tables_[id].pages;
  while (static_cast<index_t>(table.size()) > num_pages) {
    release(table.back());
    table.pop_back();
  }
}

inline page_store::table_id page_store::share(table_id id, index_t num_pages) {
  const table_id child = open_table();
  const std::vector<page_id>& from = tables_[id].pages;
  KVCACHE_ASSERT(num_pages <= static_cast<index_t>(from.size()), "share: the pages must be in the table");
  try {
    tables_[child].pages.assign(from.begin(), from.begin() + num_pages);
  } catch (...) {
    close_table(child);
    throw;
  }
  for (const page_id shared : tables_[child].pages) ++ref_counts_[index(shared)];
  return child;
}

inline status page_store::allocate_until_free(index_t needed) {
  if (exceeds_memory(needed - static_cast<index_t>(free_.size()), page_bytes_, memory_))
    return status::out_of_memory;
  const std::size_t slabs_before = slabs_.size();
  const std::size_t pages_before = pages_.size();
  const std::size_t free_before = free_.size();
  try {
    while (static_cast<index_t>(free_.size()) < needed) {
      // Slabs of about 2 MiB, so that small pages share huge pages, but never past the budget.
      const index_t per_slab = std::max(2_MiB / page_bytes_, index_t{1});
      add_slab(std::min(per_slab, max_pages_ - num_pages()));
    }
  } catch (const std::bad_alloc&) {  // not even the slabs that could be had are kept
    slabs_.erase(slabs_.begin() + static_cast<std::ptrdiff_t>(slabs_before), slabs_.end());
    pages_.resize(pages_before);
    ref_counts_.resize(pages_before);
    free_.resize(free_before);
    return status::out_of_memory;
  }
  return status::ok;
}

inline void page_store::add_slab(index_t num_new) {
  const auto count = static_cast<std::size_t>(num_new);
  const auto grown = [count](std::size_t size, std::size_t capacity) {
    return size + count <= capacity ? capacity : std::max(size + count, 2 * capacity);
  };
  slabs_.reserve(slabs_.size() < slabs_.capacity() ? slabs_.capacity() : 2 * slabs_.capacity() + 1);
  pages_.reserve(grown(pages_.size(), pages_.capacity()));
  ref_counts_.reserve(grown(pages_.size(), ref_counts_.capacity()));
  free_.reserve(grown(pages_.size(), free_.capacity()));
  memory_block slab(checked_mul(num_new, page_bytes_), memory_);
  // Nothing below can fail. Handed out in order of address: the list is taken from its end.
  const std::size_t first = pages_.size();
  for (std::size_t i = 0; i < count; ++i) {
    pages_.push_back(slab.data() + static_cast<index_t>(i) * page_bytes_);
    ref_counts_.push_back(0);
    free_.push_back(static_cast<page_id>(first + count - 1 - i));
  }
  slabs_.push_back(std::move(slab));
}

inline void page_store::release_free() noexcept {
  while (!slabs_.empty()) {
    const auto slab_pages = static_cast<std::size_t>(slabs_.back().size() / page_bytes_);
    const std::size_t first = pages_.size() - slab_pages;
    const auto in_slab = [first](page_id id) { return index(id) >= first; };
    if (std::any_of(ref_counts_.begin() + static_cast<std::ptrdiff_t>(first), ref_counts_.end(),
                    [](auto n) { return n > 0; }))
      return;
    free_.erase(std::remove_if(free_.begin(), free_.end(), in_slab), free_.end());
    pages_.resize(first);
    ref_counts_.resize(first);
    slabs_.pop_back();
  }
}

inline page_id page_store::take() noexcept {
  const page_id id = free_.back();
  free_.pop_back();
  ref_counts_[index(id)] = 1;
  return id;
}

inline void page_store::release(page_id id) noexcept {
  if (--ref_counts_[index(id)] == 0) free_.push_back(id);
}

inline void page_store::check() const {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw invariant_error(std::string("kvcache: ") + rule);
  };
  std::vector<std::uint32_t> counted(pages_.size(), 0);
  for (const page_table& table : tables_) {
    require(table.open || table.pages.empty(), "a closed page table is empty");
    for (const page_id id : table.pages) {
      require(index(id) < pages_.size(), "page tables name pages that exist");
      ++counted[index(id)];
    }
  }
  require(counted == ref_counts_, "every page's reference count is the number of tables that name it");
  std::vector<bool> listed(pages_.size(), false);
  for (const page_id id : free_) {
    require(index(id) < pages_.size() && !listed[index(id)], "the free list names each page at most once");
    require(ref_counts_[index(id)] == 0, "a page on the free list is not referred to");
    listed[index(id)] = true;
  }
  const auto unused = std::count(counted.begin(), counted.end(), 0U);
  require(unused == static_cast<index_t>(free_.size()), "a page that none refers to is on the free list");
  index_t slab_bytes = 0;
  for (const memory_block& slab : slabs_) slab_bytes += slab.size();
  require(slab_bytes == bytes().total, "the slabs hold exactly the pages");
  require(num_pages() <= max_pages_, "the pages keep to the budget");
}

}  // namespace kvcache::inline v0
