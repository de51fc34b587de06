// SPDX-License-Identifier: MIT
// page_pool and paged_cache: many sequences in one pool of pages, shared prefixes, copy on write, a byte budget.
//
//   sequence a: table [ 0, 1, 2 ]          pool: | page 0 | page 1 | page 2 | page 3 | free ...
//   b = a.fork(): [ 0, 1, 2 ]                      refs 2   refs 2   refs 2
//   b.append:     [ 0, 1, 3 ]                      refs 2   refs 2   refs 1   refs 1     only the last page is copied
//
// Source: Kwon et al. 2023, "Efficient Memory Management for LLM Serving with PagedAttention", sections 4.1-4.4.
#pragma once

#include <kvcache/cache/block_layout.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/page_store.hpp>
#include <kvcache/cache/sequence_cache.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>

#include <cstddef>
#include <memory>
#include <span>
#include <utility>

namespace kvcache::inline v0 {

/// The address function of paged_cache: a page table in a shared store; see block_storage.
class paged_storage {
 public:
  /// An empty table. Throws std::bad_alloc.
  paged_storage(const std::shared_ptr<page_store>& store, const block_layout& layout)
      : paged_storage(store, layout, store->open_table()) {}

  paged_storage(paged_storage&& other) noexcept
      : store_(std::move(other.store_)),
        layout_(std::move(other.layout_)),
        table_(other.table_),
        own_(other.own_) {}
  paged_storage& operator=(paged_storage&& other) noexcept {
    paged_storage before(std::move(*this));  // gives its pages back
    store_ = std::move(other.store_);
    layout_ = std::move(other.layout_);
    table_ = other.table_;
    own_ = other.own_;
    return *this;
  }
  ~paged_storage() {
    if (store_ != nullptr) store_->close_table(table_);
  }

  /// Takes pages until there are `last`, and copies those in [first, last) that are shared.
  [[nodiscard]] status prepare_write(index_t first, index_t last) {
    return store_->prepare_write(table_, first, last);
  }

  /// Drops the entries of other pages from the table, and copies shared ones in [own_first, own_last). O(pages).
  [[nodiscard]] status keep_blocks(std::span<const index_t> kept, index_t own_first, index_t own_last) {
    return store_->keep(table_, kept, own_first, own_last);
  }

  /// Gives pages back to the pool.
  void shrink(index_t num_blocks) noexcept { store_->shrink(table_, num_blocks); }

  /// The first `num_blocks` pages, shared. Throws std::bad_alloc.
  [[nodiscard]] paged_storage share(index_t num_blocks) const {
    return {store_, layout_, store_->share(table_, num_blocks)};
  }

  [[nodiscard]] std::byte* block(index_t layer, index_t head, index_t index) const noexcept {
    return own_->addresses[static_cast<std::size_t>(index)] + layout_.offset(1, layer, head, 0);
  }

  /// Logical block -> page. Invalidated by whatever changes the sequence.
  [[nodiscard]] std::span<const page_id> page_table() const noexcept { return own_->pages; }
  [[nodiscard]] index_t num_blocks() const noexcept { return static_cast<index_t>(page_table().size()); }
  [[nodiscard]] index_t total_bytes() const noexcept { return num_blocks() * store_->page_bytes(); }
  [[nodiscard]] index_t shared_bytes() const noexcept {
    index_t pages = 0;
    for (const page_id page : page_table()) pages += store_->ref_count(page) > 1 ? 1 : 0;
    return pages * store_->page_bytes();
  }
  [[nodiscard]] std::pmr::memory_resource* memory() const noexcept { return store_->memory(); }
  [[nodiscard]] paged_storage empty_like() const { return {store_, layout_}; }
  void check() const { store_->check(); }

 private:
  paged_storage(std::shared_ptr<page_store> store, const block_layout& layout,
                page_store::table_id table) noexcept
      : store_(std::move(store)), layout_(layout), table_(table), own_(store_->table_at(table)) {}

  std::shared_ptr<page_store> store_;  // null once moved from
  block_layout layout_;
  page_store::table_id table_;
  const struct page_table* own_;  // what `table_` names
};

/// One sequence in a pool. Cheap to fork; a handle that gives its pages back when it is destroyed.
template <block_codec Codec = codec::bf16>
using paged_cache = sequence_cache<Codec, paged_storage>;

/// Pages for any number of sequences of one shape and codec.
///
/// Pages are freed when the last sequence that refers to them goes; memory when pool and sequences are all gone.
/// Threads: attending over a sequence may run while other sequences of the pool change, are forked or
/// destroyed, and while
/// it is forked itself. Whatever changes the pool or a sequence needs a lock of the caller's, one for all of the pool.
template <block_codec Codec = codec::bf16>
class page_pool {
 public:
  /// Allocates nothing yet. Throws shape_error naming what cannot be.
  // Not inlined: g++ 12 would take an empty codec_ for uninitialised where it is handed on by reference.
  [[gnu::noinline]] explicit page_pool(const cache_shape& shape, const pool_options& options = {},
                                       const Codec& codec = {})
      : codec_(codec),
        layout_(make_layout(shape, codec_)),
        store_(std::make_shared<page_store>(layout_.page_bytes(), options)) {}

  /// A new, empty sequence. It may outlive the pool object. Throws std::bad_alloc.
  [[nodiscard]] paged_cache<Codec> sequence() {
    return paged_cache<Codec>(shape(), codec_, paged_storage(store_, layout_));
  }

  [[nodiscard]] const cache_shape& shape() const noexcept { return layout_.shape(); }

  /// Bytes of one page: the blocks of all layers and heads for block_size tokens.
  [[nodiscard]] index_t page_bytes() const noexcept { return store_->page_bytes(); }
  /// Pages within the budget, allocated or not; those free and those in use.
  [[nodiscard]] index_t num_pages() const noexcept { return store_->max_pages(); }
  [[nodiscard]] index_t num_free() const noexcept { return store_->num_free(); }
  [[nodiscard]] index_t num_in_use() const noexcept { return store_->num_in_use(); }
  [[nodiscard]] index_t ref_count(page_id page) const noexcept { return store_->ref_count(page); }
  [[nodiscard]] pool_use bytes() const noexcept { return store_->bytes(); }
  /// See page_store. O(1).
  [[nodiscard]] index_t allocated_bytes() const noexcept { return store_->allocated_bytes(); }
  [[nodiscard]] index_t books_bytes() const noexcept { return store_->books_bytes(); }
  [[nodiscard]] index_t growth_bytes(index_t new_pages, index_t table_pages, bool new_table) const noexcept {
    return store_->growth_bytes(new_pages, table_pages, new_table);
  }

  /// Gives back memory that no sequence uses, slab by slab. O(pages). See page_store::release_free.
  void release_free() noexcept { store_->release_free(); }
  /// See page_store::set_budget.
  void set_budget(index_t bytes) { store_->set_budget(bytes); }
  /// Proves the books of the pool and of all its sequences. Throws invariant_error.
  void check() const { store_->check(); }

 private:
  static block_layout make_layout(const cache_shape& shape, const Codec& codec) {
    validate(shape);
    validate(codec, shape);
    return layout_of(shape, codec);
  }

  [[no_unique_address]] Codec codec_;
  block_layout layout_;
  std::shared_ptr<page_store> store_;
};

static_assert(block_storage<paged_storage> && kv_cache<paged_cache<>>);

}  // namespace kvcache::inline v0
