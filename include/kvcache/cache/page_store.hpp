// SPDX-License-Identifier: MIT
// page_store: the page tables of all sequences of a pool, and its pages (page_slabs).
//
//   page    | layer 0, head 0 | layer 0, head 1 | ... | last layer, last head |   one span of block_size tokens
//   table   [ page 7, page 2, page 9 ]    one per sequence: logical block -> page, shared pages in many tables
//
// Knows sizes and counts only; what the bytes mean is the codec's business. The tables live here, so that
// `check` can prove every reference count by counting.
#pragma once

#include <kvcache/cache/page_slabs.hpp>
#include <kvcache/cache/page_table.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <memory_resource>
#include <new>
#include <span>
#include <vector>

namespace kvcache::inline v0 {

/// Threads: a table that does not change may be read while others do, through `table_at`. Otherwise none of the members
/// may run at the same time as one that changes something.
class page_store {
 public:
  using table_id = std::size_t;

  /// Allocates nothing. Throws shape_error if the budget is negative or holds not even one page.
  page_store(index_t page_bytes, const pool_options& options) : slabs_(page_bytes, options) {}

  page_store(const page_store&) = delete;  // sequences refer to it
  page_store& operator=(const page_store&) = delete;

  // -- the pool -------------------------------------------------------------------------------------------------

  [[nodiscard]] index_t page_bytes() const noexcept { return slabs_.page_bytes(); }
  [[nodiscard]] index_t max_pages() const noexcept { return slabs_.max_pages(); }

  /// Pages that can still be taken within the budget, allocated or not.
  [[nodiscard]] index_t num_free() const noexcept { return slabs_.num_free(); }
  [[nodiscard]] index_t num_in_use() const noexcept { return slabs_.num_in_use(); }

  [[nodiscard]] std::pmr::memory_resource* memory() const noexcept { return slabs_.memory(); }

  /// Gives slabs that have no page in use back to the memory resource, and room that closed tables keep.
  /// O(pages + tables), never allocates.
  void release_free() noexcept;

  /// Memory of the pages, in use or free; bytes().total in O(1).
  [[nodiscard]] index_t allocated_bytes() const noexcept { return slabs_.num_pages() * page_bytes(); }
  /// Memory of the books: page tables, reference counts, free list. O(1).
  [[nodiscard]] index_t books_bytes() const noexcept;
  /// The most by which allocated_bytes() + books_bytes() grow when one sequence takes `new_pages` pages, so that it
  /// has `table_pages`, in a new table or not. O(1).
  [[nodiscard]] index_t growth_bytes(index_t new_pages, index_t table_pages, bool new_table) const noexcept;

  /// From now on at most `bytes` of pages; 0 is no limit. Throws shape_error if that is less than one page, or
  /// than what is still allocated after release_free().
  void set_budget(index_t bytes) { slabs_.set_budget(bytes); }

  [[nodiscard]] pool_use bytes() const noexcept { return slabs_.bytes(); }

  [[nodiscard]] std::byte* page(page_id id) const noexcept { return slabs_.page(id); }
  [[nodiscard]] index_t ref_count(page_id id) const noexcept { return slabs_.ref_count(id); }

  // -- page tables ----------------------------------------------------------------------------------------------

  /// A new, empty table. Throws std::bad_alloc.
  [[nodiscard]] table_id open_table();
  /// Gives all its pages back and forgets the table. Never allocates.
  void close_table(table_id id) noexcept;
  /// Stays where it is until it is closed.
  [[nodiscard]] const page_table* table_at(table_id id) const noexcept { return tables_[id].get(); }

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
  void copy_shared(page_table& table, index_t first, index_t last) noexcept;
  void reserve_table(page_table& table, std::size_t num_pages);

  page_slabs slabs_;
  index_t table_entries_ = 0;                        // capacity of all tables
  std::vector<std::unique_ptr<page_table>> tables_;  // stay where they are
  std::vector<table_id> closed_tables_;              // to be opened again; capacity for every table
};

inline page_store::table_id page_store::open_table() {
  if (closed_tables_.empty()) {
    const std::size_t room = std::max(tables_.size() + 1, 2 * closed_tables_.capacity());
    if (tables_.size() == closed_tables_.capacity()) closed_tables_.reserve(room);
    tables_.reserve(closed_tables_.capacity());
    tables_.push_back(std::make_unique<page_table>());
    closed_tables_.push_back(tables_.size() - 1);
  }
  const table_id id = closed_tables_.back();
  closed_tables_.pop_back();
  tables_[id]->open = true;
  return id;
}

inline void page_store::close_table(table_id id) noexcept {
  shrink(id, 0);
  tables_[id]->open = false;
  closed_tables_.push_back(id);
}

inline status page_store::prepare_write(table_id id, index_t first, index_t last) {
  std::vector<page_id>& table = tables_[id]->pages;
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
      reserve_table(*tables_[id], std::max(static_cast<std::size_t>(last), 2 * table.capacity()));
  } catch (const std::bad_alloc&) {
    return status::out_of_memory;
  }
  if (const status s = slabs_.allocate_until_free(to_copy + to_add); s != status::ok) return s;
  copy_shared(*tables_[id], first, last_present);
  for (index_t i = 0; i < to_add; ++i) {
    table.push_back(slabs_.take());
    tables_[id]->addresses.push_back(page(table.back()));
  }
  return status::ok;
}

/// Makes shared pages of a table its own. \pre there are as many free ones
inline void page_store::copy_shared(page_table& table, index_t first, index_t last) noexcept {
  for (index_t i = first; i < last; ++i) {
    page_id& entry = table.pages[static_cast<std::size_t>(i)];
    if (ref_count(entry) == 1) continue;
    const page_id own = slabs_.take();
    std::memcpy(page(own), page(entry), static_cast<std::size_t>(page_bytes()));
    slabs_.release(entry);
    entry = own;
    table.addresses[static_cast<std::size_t>(i)] = page(own);
  }
}

inline status page_store::keep(table_id id, std::span<const index_t> kept, index_t own_first,
                               index_t own_last) {
  page_table& table = *tables_[id];
  const auto entry = [&](index_t i) {
    return table.pages[static_cast<std::size_t>(kept[static_cast<std::size_t>(i)])];
  };
  index_t to_copy = 0;
  for (index_t i = own_first; i < own_last; ++i) to_copy += ref_count(entry(i)) > 1 ? 1 : 0;
  index_t to_free =
      std::count_if(table.pages.begin(), table.pages.end(), [&](page_id p) { return ref_count(p) == 1; });
  for (index_t i = 0; i < static_cast<index_t>(kept.size()); ++i) to_free -= ref_count(entry(i)) == 1 ? 1 : 0;
  const index_t missing = to_copy - to_free;
  if (missing > 0) {
    if (missing > num_free()) return status::out_of_pages;
    if (const status s = slabs_.allocate_until_free(missing); s != status::ok) return s;
  }
  std::size_t num_kept = 0;
  for (std::size_t i = 0; i < table.pages.size(); ++i) {
    if (num_kept < kept.size() && kept[num_kept] == static_cast<index_t>(i)) {
      table.pages[num_kept] = table.pages[i];
      table.addresses[num_kept++] = table.addresses[i];
    } else {
      slabs_.release(table.pages[i]);
    }
  }
  table.pages.resize(num_kept);
  table.addresses.resize(num_kept);
  copy_shared(table, own_first, own_last);
  return status::ok;
}

inline void page_store::shrink(table_id id, index_t num_pages) noexcept {
  std::vector<page_id>& table = tables_[id]->pages;
  while (static_cast<index_t>(table.size()) > num_pages) {
    slabs_.release(table.back());
    table.pop_back();
    tables_[id]->addresses.pop_back();
  }
}

/// Room for so many pages in all.
inline void page_store::reserve_table(page_table& table, std::size_t num_pages) {
  if (num_pages <= table.pages.capacity()) return;
  table.addresses.reserve(num_pages);
  const std::size_t before = table.pages.capacity();
  table.pages.reserve(num_pages);
  table_entries_ += static_cast<index_t>(table.pages.capacity() - before);
}

inline page_store::table_id page_store::share(table_id id, index_t num_pages) {
  const table_id child = open_table();
  const page_table& from = *tables_[id];
  KVCACHE_ASSERT(num_pages <= static_cast<index_t>(from.pages.size()),
                 "share: the pages must be in the table");
  try {
    reserve_table(*tables_[child], static_cast<std::size_t>(num_pages));
  } catch (...) {
    close_table(child);
    throw;
  }
  tables_[child]->pages.assign(from.pages.begin(), from.pages.begin() + num_pages);
  tables_[child]->addresses.assign(from.addresses.begin(), from.addresses.begin() + num_pages);
  for (const page_id shared : tables_[child]->pages) slabs_.share(shared);
  return child;
}

inline void page_store::release_free() noexcept {
  slabs_.release_free();
  for (const table_id id : closed_tables_) {
    table_entries_ -= static_cast<index_t>(tables_[id]->pages.capacity());
    std::vector<page_id>().swap(tables_[id]->pages);
    std::vector<std::byte*>().swap(tables_[id]->addresses);
  }
}

inline index_t page_store::books_bytes() const noexcept {
  const auto bytes = [](const auto& v) { return static_cast<index_t>(v.capacity() * sizeof(v[0])); };
  return slabs_.books_bytes() + bytes(closed_tables_) + bytes(tables_) +
         static_cast<index_t>(tables_.size() * sizeof(page_table)) +
         table_entries_ * index_t{sizeof(page_id) + sizeof(std::byte*)};
}

inline index_t page_store::growth_bytes(index_t new_pages, index_t table_pages,
                                        bool new_table) const noexcept {
  // A table that grows doubles.
  index_t bytes =
      slabs_.growth_bytes(new_pages) + 2 * table_pages * index_t{sizeof(page_id) + sizeof(std::byte*)};
  if (new_table && closed_tables_.empty()) {
    const auto room = static_cast<index_t>(closed_tables_.capacity()) + 1;
    bytes += index_t{sizeof(page_table)} + room * index_t{sizeof(table_id) + sizeof(tables_[0])};
  }
  return bytes;
}

inline void page_store::check() const {
  using kvcache::detail::require;
  std::vector<std::uint32_t> counted(slabs_.num_ids(), 0);
  index_t entries = 0;
  for (const auto& known : tables_) {
    const page_table& table = *known;
    require(table.open || table.pages.empty(), "a closed page table is empty");
    require(table.pages.size() == table.addresses.size(), "a page table has the address of every page");
    entries += static_cast<index_t>(table.pages.capacity());
    for (std::size_t i = 0; i < table.pages.size(); ++i) {
      const page_id id = table.pages[i];
      require(static_cast<std::size_t>(id) < counted.size() && page(id) != nullptr,
              "page tables name pages that exist");
      require(table.addresses[i] == page(id), "a page table has the address of every page");
      ++counted[static_cast<std::size_t>(id)];
    }
  }
  require(entries == table_entries_, "the room of all tables is counted");
  slabs_.check(counted);
}

}  // namespace kvcache::inline v0
