// SPDX-License-Identifier: MIT
// page_slabs: the memory of a pool's pages, which of them are free, and how many tables refer to each.
//
//   slab      | page 0 | page 1 | page 2 | page 3 |    allocated in one piece, given back when none of its pages is in use
//   refs          2        0        1        1
//   free list   [ 1 ]
#pragma once

#include <kvcache/cache/page_table.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

/// Threads: none of the members may run at the same time as one that changes something.
class page_slabs {
 public:
  /// Allocates nothing. Throws shape_error if the budget is negative or holds not even one page.
  page_slabs(index_t page_bytes, const pool_options& options)
      : page_bytes_(page_bytes),
        slab_pages_(std::max(options.slab_bytes / page_bytes, index_t{1})),
        memory_(options.memory) {
    set_budget(options.budget_bytes);
  }

  page_slabs(const page_slabs&) = delete;
  page_slabs& operator=(const page_slabs&) = delete;

  [[nodiscard]] index_t page_bytes() const noexcept { return page_bytes_; }
  [[nodiscard]] std::pmr::memory_resource* memory() const noexcept { return memory_; }
  [[nodiscard]] index_t max_pages() const noexcept { return max_pages_; }
  /// Pages that have memory.
  [[nodiscard]] index_t num_pages() const noexcept {
    return static_cast<index_t>(pages_.size() - vacant_.size());
  }
  [[nodiscard]] index_t num_in_use() const noexcept {
    return num_pages() - static_cast<index_t>(free_.size());
  }
  /// Pages that can still be taken within the budget, allocated or not.
  [[nodiscard]] index_t num_free() const noexcept { return max_pages_ - num_in_use(); }

  [[nodiscard]] std::byte* page(page_id id) const noexcept { return pages_[index(id)]; }
  [[nodiscard]] index_t ref_count(page_id id) const noexcept { return ref_counts_[index(id)]; }

  /// See page_store::set_budget.
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

  /// Allocates slabs until so many pages are free. \return out_of_memory; then nothing changed \pre within the budget
  [[nodiscard]] status allocate_until_free(index_t needed);
  /// A page for one table. Never allocates. \pre one is free
  page_id take() noexcept;
  /// One more table refers to the page.
  void share(page_id id) noexcept { ++ref_counts_[index(id)]; }
  /// One table less. Never allocates.
  void release(page_id id) noexcept;
  /// Gives slabs that have no page in use back to the memory resource. O(pages), never allocates.
  void release_free() noexcept;

  /// Memory of addresses, counts and lists.
  [[nodiscard]] index_t books_bytes() const noexcept;
  /// The most by which pages and books grow when so many pages are taken.
  [[nodiscard]] index_t growth_bytes(index_t new_pages) const noexcept;

  /// Proves the books. Throws invariant_error. \param counted  by id, how many table entries name each page
  void check(std::span<const std::uint32_t> counted) const;
  /// One more than the largest id there was.
  [[nodiscard]] std::size_t num_ids() const noexcept { return pages_.size(); }

 private:
  struct slab {
    memory_block memory;  // empty: its place is free
    index_t in_use = 0;   // pages
  };

  static std::size_t index(page_id id) noexcept { return static_cast<std::size_t>(id); }

  void add_slab(index_t num_new);
  template <class Gone>
  void release_slabs(Gone gone) noexcept;

  index_t page_bytes_;
  index_t slab_pages_;  // in a whole slab
  index_t max_pages_ = 0;
  std::pmr::memory_resource* memory_;
  std::vector<slab> slabs_;
  std::vector<std::byte*> pages_;          // by id: addresses, null where vacant
  std::vector<std::uint32_t> ref_counts_;  // by id
  std::vector<std::uint32_t> slab_of_;     // by id
  std::vector<page_id> free_;  // last in, first out; capacity for every page, so giving back never allocates
  std::vector<page_id> vacant_;  // ids whose slab was given back; capacity for every page
};

inline status page_slabs::allocate_until_free(index_t needed) {
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

inline void page_slabs::add_slab(index_t num_new) {
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
void page_slabs::release_slabs(Gone gone) noexcept {
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

inline void page_slabs::release_free() noexcept {
  release_slabs([this](std::uint32_t s) { return slabs_[s].in_use == 0; });
}

inline page_id page_slabs::take() noexcept {
  const page_id id = free_.back();
  free_.pop_back();
  ref_counts_[index(id)] = 1;
  ++slabs_[slab_of_[index(id)]].in_use;
  return id;
}

inline void page_slabs::release(page_id id) noexcept {
  if (--ref_counts_[index(id)] != 0) return;
  free_.push_back(id);
  --slabs_[slab_of_[index(id)]].in_use;
}

inline index_t page_slabs::books_bytes() const noexcept {
  const auto bytes = [](const auto& v) { return static_cast<index_t>(v.capacity() * sizeof(v[0])); };
  return bytes(slabs_) + bytes(pages_) + bytes(ref_counts_) + bytes(slab_of_) + bytes(free_) + bytes(vacant_);
}

inline index_t page_slabs::growth_bytes(index_t new_pages) const noexcept {
  constexpr index_t per_page = sizeof(std::byte*) + 2 * sizeof(std::uint32_t) + 2 * sizeof(page_id);
  const index_t to_allocate = std::max(new_pages - static_cast<index_t>(free_.size()), index_t{0});
  if (to_allocate == 0) return 0;
  const index_t slabs = ceil_div(to_allocate, slab_pages_);
  index_t bytes =
      std::min(slabs * slab_pages_, std::max(max_pages_ - num_pages(), to_allocate)) * page_bytes_;
  const index_t pages =
      static_cast<index_t>(pages_.size()) + slabs * slab_pages_ - static_cast<index_t>(vacant_.size());
  const auto room = static_cast<index_t>(pages_.capacity());
  if (pages > room) bytes += std::max(pages - room, room) * per_page;
  return bytes + (static_cast<index_t>(slabs_.capacity()) + 2 * slabs + 1) * index_t{sizeof(slab)};
}

inline void page_slabs::check(std::span<const std::uint32_t> counted) const {
  using kvcache::detail::require;
  require(std::equal(counted.begin(), counted.end(), ref_counts_.begin(), ref_counts_.end()),
          "every page's reference count is the number of tables that name it");
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
  index_t slab_bytes = 0;
  std::vector<index_t> in_use(slabs_.size(), 0);
  for (std::size_t id = 0; id < pages_.size(); ++id)
    if (counted[id] > 0) ++in_use[slab_of_[id]];
  for (std::size_t i = 0; i < slabs_.size(); ++i) {
    require(in_use[i] == slabs_[i].in_use, "a slab counts its pages in use");
    slab_bytes += slabs_[i].memory.size();
  }
  require(slab_bytes == bytes().total, "the slabs hold exactly the pages");
  require(num_pages() <= max_pages_, "the pages keep to the budget");
}

}  // namespace kvcache::inline v0
