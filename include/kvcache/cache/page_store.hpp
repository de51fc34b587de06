// SPDX-License-Identifier: MIT
// page_store: the pages of a pool, who refers to them, and the page tables of all sequences.
//
//   page    | layer 0, head 0 | layer 0, head 1 | ... | last layer, last head |   one span of block_size tokens
//   table   [ page 7, page 2, page 9 ]    one per sequence: logical block -> page, shared pages in many tables
//
// Knows sizes and counts only; what the bytes mean is the codec's business. The tables live here, so that
// `check` can prove every reference count by counting.
#pragma once

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
#include <vector>

namespace kvcache::inline v0 {

/// Threads: a table that does not change may be read while others do, through `table_at`. Otherwise none of the members
/// may run at the same time as one that changes something.
class page_store {
 public:
  using table_id = std::size_t;

  /// Allocates nothing. Throws shape_error if the budget is negative or holds not even one page.
  page_store(index_t page_bytes, const pool_options& options)
      : page_bytes_(page_bytes),
        slab_pages_(std::max(options.slab_bytes / page_bytes, index_t{1})),
        memory_(options.memory) {
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

  /// Gives slabs that have no page in use back to the memory resource, and room that closed tables keep.
  /// O(pages + tables), never allocates.
  void release_free() noexcept;

  /// Memory of the pages, in use or free; bytes().total in O(1).
  [[nodiscard]] index_t allocated_bytes() const noexcept { return num_pages() * page_bytes_; }
  /// Memory of the books: page tables, reference counts, free list. O(1).
  [[nodiscard]] index_t books_bytes() const noexcept;
  /// The most by which allocated_bytes() + books_bytes() grow when one sequence takes `new_pages` pages, so that it
  /// has `table_pages`, in a new table or not. O(1).
  [[nodiscard]] index_t growth_bytes(index_t new_pages, index_t table_pages, bool new_table) const noexcept;

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
    const auto shared = std::count_if(ref_counts_.begin(), ref_counts_.end(), [](auto n) { return n > 1; });
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
  /// Stays where it is until it is closed.
  [[nodiscard]] const page_table* table_at(table_id id) const noexcept { return tables_[id].get(); }

  /// Makes the table `last` pages long or longer, and pages [first, last) its own: shared ones are copied.
  /// \return out_of_pages or out_of_memory; then nothing changed. O(last - first) when there is nothing to do.
  [[nodiscard]] status prepare_write(table_id id, index_t first, index_t last);

  /// Gives the pages from `num_pages` on back. Never allocates.
  void shrink(table_id id, index_t num_pages) noexcept;

  /// A new table that shares the first `num_pages` pages of another. Throws std::bad_alloc.
  [[nodiscard]] table_id share(table_id id, index_t num_pages);

  /// Proves free list, reference counts and byte accounting by counting them anew. Throws invariant_error.
  void check() const;

 private:
  struct slab {
    memory_block memory;  // empty: its place is free
    index_t in_use = 0;   // pages
  };

  static std::size_t index(page_id id) noexcept { return static_cast<std::size_t>(id); }
  /// Pages that have memory.
  [[nodiscard]] index_t num_pages() const noexcept {
    return static_cast<index_t>(pages_.size() - vacant_.size());
  }

  [[nodiscard]] status allocate_until_free(index_t needed);
  void add_slab(index_t num_new);
  void reserve_table(page_table& table, std::size_t num_pages);
  template <class Gone>
  void release_slabs(Gone gone) noexcept;
  page_id take() noexcept;
  void release(page_id id) noexcept;

  index_t page_bytes_;
  index_t slab_pages_;  // in a whole slab
  index_t max_pages_ = 0;
  index_t table_entries_ = 0;  // capacity of all tables
  std::pmr::memory_resource* memory_;
  std::vector<slab> slabs_;
  std::vector<std::byte*> pages_;          // by id: addresses, null where vacant
  std::vector<std::uint32_t> ref_counts_;  // by id
  std::vector<std::uint32_t> slab_of_;     // by id
  std::vector<page_id> free_;  // last in, first out; capacity for every page, so giving back never allocates
  std::vector<page_id> vacant_;                      // ids whose slab was given back; capacity for every page
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
  std::vector<std::byte*>& addresses = tables_[id]->addresses;
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
  if (const status s = allocate_until_free(to_copy + to_add); s != status::ok) return s;
  for (index_t i = first; i < last_present; ++i) {
    page_id& entry = table[static_cast<std::size_t>(i)];
    if (ref_count(entry) == 1) continue;
    const page_id own = take();
    std::memcpy(page(own), page(entry), static_cast<std::size_t>(page_bytes_));
    release(entry);
    entry = own;
    addresses[static_cast<std::size_t>(i)] = page(own);
  }
  for (index_t i = 0; i < to_add; ++i) {
    table.push_back(take());
    addresses.push_back(page(table.back()));
  }
  return status::ok;
}

inline void page_store::shrink(table_id id, index_t num_pages) noexcept {
  std::vector<page_id>& table = tables_[id]->pages;
  while (static_cast<index_t>(table.size()) > num_pages) {
    release(table.back());
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
  for (const page_id shared : tables_[child]->pages) ++ref_counts_[index(shared)];
  return child;
}

inline status page_store::allocate_until_free(index_t needed) {
  if (exceeds_memory(needed - static_cast<index_t>(free_.size()), page_bytes_, memory_))
    return status::out_of_memory;
  const std::size_t free_before = free_.size();
  try {
    while (static_cast<index_t>(free_.size()) < needed)  // never past the budget
      add_slab(std::min(slab_pages_, max_pages_ - num_pages()));
  } catch (const std::bad_alloc&) {  // not even the slabs that could be had are kept
    while (free_.size() > free_before) {
      const std::uint32_t last = slab_of_[index(free_.back())];
      release_slabs([last](std::uint32_t s) { return s == last; });
    }
    return status::out_of_memory;
  }
  return status::ok;
}

inline void page_store::add_slab(index_t num_new) {
  const auto count = static_cast<std::size_t>(num_new);
  const std::size_t fresh = count - std::min(count, vacant_.size());
  const std::size_t size = pages_.size() + fresh;
  const auto grow = [size](auto& by_id) {
    if (size > by_id.capacity()) by_id.reserve(std::max(size, 2 * by_id.capacity()));
  };
  std::size_t place = 0;
  while (place < slabs_.size() && slabs_[place].memory.data() != nullptr) ++place;
  if (place == slabs_.capacity()) slabs_.reserve(2 * place + 1);
  grow(pages_);
  grow(ref_counts_);
  grow(slab_of_);
  grow(free_);
  grow(vacant_);
  memory_block memory(checked_mul(num_new, page_bytes_), memory_);
  // Nothing below can fail. Handed out in order of address: the list is taken from its end.
  for (std::size_t i = 0; i < fresh; ++i) vacant_.push_back(static_cast<page_id>(size - 1 - i));
  pages_.resize(size);
  ref_counts_.resize(size);
  slab_of_.resize(size);
  free_.resize(free_.size() + count);
  for (std::size_t i = 0; i < count; ++i) {
    const page_id id = vacant_.back();
    vacant_.pop_back();
    pages_[index(id)] = memory.data() + static_cast<index_t>(i) * page_bytes_;
    slab_of_[index(id)] = static_cast<std::uint32_t>(place);
    free_[free_.size() - 1 - i] = id;
  }
  if (place == slabs_.size()) slabs_.emplace_back();
  slabs_[place].memory = std::move(memory);
}

/// Gives back the slabs for which gone(number) holds. \pre none of them has a page in use
template <class Gone>
void page_store::release_slabs(Gone gone) noexcept {
  const auto in_slab = [&](page_id id) {
    if (!gone(slab_of_[index(id)])) return false;
    pages_[index(id)] = nullptr;
    vacant_.push_back(id);
    return true;
  };
  free_.erase(std::remove_if(free_.begin(), free_.end(), in_slab), free_.end());
  for (std::size_t s = 0; s < slabs_.size(); ++s)
    if (gone(static_cast<std::uint32_t>(s))) slabs_[s].memory = {};
  while (!slabs_.empty() && slabs_.back().memory.data() == nullptr) slabs_.pop_back();
}

inline void page_store::release_free() noexcept {
  release_slabs([this](std::uint32_t s) { return slabs_[s].in_use == 0; });
  for (const table_id id : closed_tables_) {
    table_entries_ -= static_cast<index_t>(tables_[id]->pages.capacity());
    std::vector<page_id>().swap(tables_[id]->pages);
    std::vector<std::byte*>().swap(tables_[id]->addresses);
  }
}

inline page_id page_store::take() noexcept {
  const page_id id = free_.back();
  free_.pop_back();
  ref_counts_[index(id)] = 1;
  ++slabs_[slab_of_[index(id)]].in_use;
  return id;
}

inline void page_store::release(page_id id) noexcept {
  if (--ref_counts_[index(id)] != 0) return;
  free_.push_back(id);
  --slabs_[slab_of_[index(id)]].in_use;
}

inline index_t page_store::books_bytes() const noexcept {
  const auto bytes = [](const auto& v) { return static_cast<index_t>(v.capacity() * sizeof(v[0])); };
  return bytes(slabs_) + bytes(pages_) + bytes(ref_counts_) + bytes(slab_of_) + bytes(free_) +
         bytes(vacant_) + bytes(closed_tables_) + bytes(tables_) +
         static_cast<index_t>(tables_.size() * sizeof(page_table)) +
         table_entries_ * index_t{sizeof(page_id) + sizeof(std::byte*)};
}

inline index_t page_store::growth_bytes(index_t new_pages, index_t table_pages,
                                        bool new_table) const noexcept {
  constexpr index_t per_entry = sizeof(page_id) + sizeof(std::byte*);
  constexpr index_t per_page = sizeof(std::byte*) + 2 * sizeof(std::uint32_t) + 2 * sizeof(page_id);
  index_t bytes = 2 * table_pages * per_entry;  // a table that grows doubles
  const index_t to_allocate = std::max(new_pages - static_cast<index_t>(free_.size()), index_t{0});
  if (to_allocate > 0) {
    const index_t slabs = ceil_div(to_allocate, slab_pages_);
    bytes += std::min(slabs * slab_pages_, std::max(max_pages_ - num_pages(), to_allocate)) * page_bytes_;
    const auto pages =
        static_cast<index_t>(pages_.size()) + slabs * slab_pages_ - static_cast<index_t>(vacant_.size());
    if (pages > static_cast<index_t>(pages_.capacity()))
      bytes +=
          std::max(pages - static_cast<index_t>(pages_.capacity()), static_cast<index_t>(pages_.capacity())) *
          per_page;
    bytes += (static_cast<index_t>(slabs_.capacity()) + 2 * slabs + 1) * index_t{sizeof(slab)};
  }
  if (new_table && closed_tables_.empty()) {
    const auto room = static_cast<index_t>(closed_tables_.capacity()) + 1;
    bytes += index_t{sizeof(page_table)} + room * index_t{sizeof(table_id) + sizeof(tables_[0])};
  }
  return bytes;
}

inline void page_store::check() const {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw invariant_error(std::string("kvcache: ") + rule);
  };
  std::vector<std::uint32_t> counted(pages_.size(), 0);
  index_t slab_bytes = 0, entries = 0;
  for (const auto& known : tables_) {
    const page_table& table = *known;
    require(table.open || table.pages.empty(), "a closed page table is empty");
    require(table.pages.size() == table.addresses.size(), "a page table has the address of every page");
    entries += static_cast<index_t>(table.pages.capacity());
    for (std::size_t i = 0; i < table.pages.size(); ++i) {
      const page_id id = table.pages[i];
      require(index(id) < pages_.size() && page(id) != nullptr, "page tables name pages that exist");
      require(table.addresses[i] == page(id), "a page table has the address of every page");
      ++counted[index(id)];
    }
  }
  require(entries == table_entries_, "the room of all tables is counted");
  require(counted == ref_counts_, "every page's reference count is the number of tables that name it");
  std::vector<bool> listed(pages_.size(), false);
  for (const page_id id : free_) {
    require(index(id) < pages_.size() && !listed[index(id)], "the free list names each page at most once");
    require(ref_counts_[index(id)] == 0, "a page on the free list is not referred to");
    listed[index(id)] = true;
  }
  for (const page_id id : vacant_)
    require(page(id) == nullptr && ref_counts_[index(id)] == 0, "a page without memory is not referred to");
  const auto unused = std::count(counted.begin(), counted.end(), 0U) - static_cast<index_t>(vacant_.size());
  require(unused == static_cast<index_t>(free_.size()), "a page that none refers to is on the free list");
  for (const slab& s : slabs_) slab_bytes += s.memory.size();
  std::vector<index_t> in_use(slabs_.size(), 0);
  for (std::size_t id = 0; id < pages_.size(); ++id)
    if (counted[id] > 0) ++in_use[slab_of_[id]];
  for (std::size_t i = 0; i < slabs_.size(); ++i)
    require(in_use[i] == slabs_[i].in_use, "a slab counts its pages in use");
  require(slab_bytes == bytes().total, "the slabs hold exactly the pages");
  require(num_pages() <= max_pages_, "the pages keep to the budget");
}

}  // namespace kvcache::inline v0
