// SPDX-License-Identifier: MIT
// What the concepts accept and refuse, decided while compiling: the defaults pass, near misses do not.

#include <kvcache/core/executor.hpp>

#include "conformance/caches.hpp"

#include <iterator>
#include <ranges>
#include <type_traits>

using namespace conformance;

namespace {

using bf16_cache = kvcache::contiguous_cache<>;
using layer = kvcache::layer_ref<bf16_cache>;
using const_layer = kvcache::layer_ref<const bf16_cache>;

template <class L>
concept appendable = requires(const L& l, std::span<const float> rows) {
  l.append(rows, rows);
};
template <class L>
concept try_appendable = requires(const L& l, std::span<const float> rows) {
  (void)l.try_append(rows, rows);
};

// -- codecs that miss by one thing

struct nameless : codec::f32 {
  static void name();
};
struct wide_bytes : codec::f32 {
  static int block_bytes(const kvcache::block_geometry&) noexcept { return 0; }
};
struct silent_encode : codec::f32 {
  static void encode(const kvcache::kernel::table&, const kvcache::block_geometry&, std::byte*, index_t,
                     index_t, kvcache::const_rows, kvcache::const_rows) {}
};
struct not_copyable : codec::f32 {
  not_copyable() = default;
  not_copyable(const not_copyable&) = delete;
};
struct needs_settings : codec::f32 {
  explicit needs_settings(int) {}
};
struct sealed_encode : codec::f32 {  // cannot write through what it is given
  static status encode(const kvcache::kernel::table&, const kvcache::block_geometry&, float*, index_t,
                       index_t, kvcache::const_rows, kvcache::const_rows) {
    return status::ok;
  }
};
struct derived : codec::f32 {};  // misses nothing

// -- storages and caches that miss by one thing

struct throwing_shrink : kvcache::chunked_storage {
  void shrink(index_t);
};
struct silent_prepare : kvcache::chunked_storage {
  void prepare_write(index_t, index_t);
};
struct read_only_blocks : kvcache::chunked_storage {
  const std::byte* block(index_t, index_t, index_t) const noexcept;
};
struct copyable_cache {
  copyable_cache(const copyable_cache&) = default;
};

// -- executors

struct own_threads {
  [[nodiscard]] index_t num_workers() const { return 3; }
  void run(index_t num_tasks, kvcache::task_ref task) const {
    for (index_t i = num_tasks; i-- > 0;) task(i, i % 3);
  }
};
struct no_count {
  void run(index_t, kvcache::task_ref) const {}
};
struct no_worker {
  [[nodiscard]] index_t num_workers() const { return 1; }
  void run(index_t, void (*)(index_t)) const {}
};

}  // namespace

TEST_CASE("codec concepts accept the codecs and refuse near misses", "[conformance]") {
  STATIC_REQUIRE(kvcache::block_codec<codec::f32>);
  STATIC_REQUIRE(kvcache::block_codec<codec::f16>);
  STATIC_REQUIRE(kvcache::block_codec<codec::bf16>);
  STATIC_REQUIRE(kvcache::block_codec<derived>);
  STATIC_REQUIRE(!kvcache::block_codec<nameless>);
  STATIC_REQUIRE(!kvcache::block_codec<wide_bytes>);
  STATIC_REQUIRE(!kvcache::block_codec<silent_encode>);
  STATIC_REQUIRE(!kvcache::block_codec<sealed_encode>);
  STATIC_REQUIRE(!kvcache::block_codec<not_copyable>);
  STATIC_REQUIRE(!kvcache::block_codec<needs_settings>);
  STATIC_REQUIRE(!kvcache::block_codec<int>);
  STATIC_REQUIRE(!kvcache::block_codec<const codec::f32>);
}

TEST_CASE("cache concepts accept the containers and refuse near misses", "[conformance]") {
  STATIC_REQUIRE(kvcache::kv_cache<kvcache::contiguous_cache<>>);
  STATIC_REQUIRE(kvcache::kv_cache<kvcache::chunked_cache<>>);
  STATIC_REQUIRE(kvcache::kv_cache<kvcache::paged_cache<>>);
  STATIC_REQUIRE(kvcache::kv_cache<kvcache::contiguous_cache<codec::f32>>);
  STATIC_REQUIRE(kvcache::kv_cache<kvcache::paged_cache<codec::f16>>);
  STATIC_REQUIRE(!kvcache::kv_cache<kvcache::page_pool<>>);
  STATIC_REQUIRE(!kvcache::kv_cache<const kvcache::contiguous_cache<>>);
  STATIC_REQUIRE(!kvcache::kv_cache<copyable_cache>);
  STATIC_REQUIRE(!kvcache::kv_cache<layer>);
  STATIC_REQUIRE(!kvcache::kv_cache<std::vector<float>>);

  STATIC_REQUIRE(kvcache::block_storage<kvcache::contiguous_storage>);
  STATIC_REQUIRE(kvcache::block_storage<kvcache::chunked_storage>);
  STATIC_REQUIRE(kvcache::block_storage<kvcache::paged_storage>);
  STATIC_REQUIRE(!kvcache::block_storage<throwing_shrink>);
  STATIC_REQUIRE(!kvcache::block_storage<silent_prepare>);
  STATIC_REQUIRE(!kvcache::block_storage<read_only_blocks>);
}

TEST_CASE("layers are cheap handles, and const caches hand out read-only ones", "[conformance]") {
  STATIC_REQUIRE(kvcache::cache_layer<layer>);
  STATIC_REQUIRE(kvcache::cache_layer<const_layer>);
  STATIC_REQUIRE(!kvcache::cache_layer<bf16_cache>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<layer>);
  STATIC_REQUIRE(sizeof(layer) <= 2 * sizeof(void*));
  STATIC_REQUIRE(appendable<layer> && try_appendable<layer>);
  STATIC_REQUIRE(!appendable<const_layer> && !try_appendable<const_layer>);
  STATIC_REQUIRE(std::is_same_v<decltype(std::declval<const bf16_cache&>()[0]), const_layer>);
  using blocks = decltype(std::declval<const layer&>().blocks(0));
  STATIC_REQUIRE(std::ranges::forward_range<blocks>);
  STATIC_REQUIRE(std::ranges::sized_range<blocks>);
  STATIC_REQUIRE(std::is_same_v<std::ranges::range_value_t<blocks>, kvcache::block_view>);
}

TEST_CASE("caches move without throwing and copy only by name", "[conformance]") {
  const auto moves_only = []<class C>(std::type_identity<C>) {
    return std::is_nothrow_move_constructible_v<C> && std::is_nothrow_move_assignable_v<C> &&
           !std::is_copy_constructible_v<C> && !std::is_copy_assignable_v<C> &&
           std::is_nothrow_destructible_v<C>;
  };
  STATIC_REQUIRE(moves_only(std::type_identity<kvcache::contiguous_cache<codec::f32>>{}));
  STATIC_REQUIRE(moves_only(std::type_identity<kvcache::chunked_cache<codec::f16>>{}));
  STATIC_REQUIRE(moves_only(std::type_identity<kvcache::paged_cache<codec::bf16>>{}));
  using step = kvcache::contiguous_cache<>::step;
  STATIC_REQUIRE(std::is_nothrow_move_constructible_v<step>);
  STATIC_REQUIRE(!std::is_copy_constructible_v<step>);
}

TEST_CASE("settings are named, and a policy without settings takes no room", "[conformance]") {
  STATIC_REQUIRE(std::is_empty_v<codec::f32> && std::is_empty_v<codec::f16> && std::is_empty_v<codec::bf16>);
  STATIC_REQUIRE(std::is_aggregate_v<cache_shape>);
  STATIC_REQUIRE(std::is_aggregate_v<kvcache::contiguous_options>);
  STATIC_REQUIRE(std::is_aggregate_v<kvcache::chunked_options>);
  STATIC_REQUIRE(std::is_aggregate_v<kvcache::pool_options>);
  STATIC_REQUIRE(codec::f32::name == "f32");
  STATIC_REQUIRE(codec::f16::name == "f16");
  STATIC_REQUIRE(codec::bf16::name == "bf16");
  // A page is not a number, and a shape is not guessed from one.
  STATIC_REQUIRE(!std::is_convertible_v<kvcache::page_id, index_t>);
  STATIC_REQUIRE(!std::is_convertible_v<index_t, kvcache::page_id>);
  STATIC_REQUIRE(!std::is_convertible_v<cache_shape, bf16_cache>);
}

TEST_CASE("executor concepts accept a caller's own and refuse near misses", "[conformance]") {
  STATIC_REQUIRE(kvcache::executor<kvcache::serial_executor>);
  STATIC_REQUIRE(kvcache::executor<own_threads>);
  STATIC_REQUIRE(!kvcache::executor<no_count>);
  STATIC_REQUIRE(!kvcache::executor<no_worker>);
  STATIC_REQUIRE(!kvcache::executor<int>);
}
