// SPDX-License-Identifier: MIT
// spill_to: a tier as a cache_manager takes it, which names whose blocks they are by three strings.
//
//   store::lmdb_tier tier("spill");
//   store::spill_to spill(tier);
//   cache_manager<page_pool<>, eviction::lru, no_cold_pool, decltype(spill)> manager(pool, options, {}, &spill);
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/store/tier.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::store {

/// The space of a tier_key for a model, an adapter and a tenant: different for different ones, wherever they are cut.
/// Throws std::bad_alloc.
inline std::string space_of(std::string_view model, std::string_view adapter, std::string_view tenant) {
  std::string space;
  for (const std::string_view part : {model, adapter, tenant}) {
    const std::uint64_t size = part.size();
    space.append(reinterpret_cast<const char*>(&size), sizeof(size));
    space += part;
  }
  return space;
}

/// Space is a prefix_space, or whatever has `model`, `adapter` and `tenant`. Members throw std::bad_alloc only. The tier must
/// outlive it; one thread at a time.
template <tier Tier>
class spill_to {
 public:
  explicit spill_to(Tier& to) noexcept : tier_(&to) {}

  template <class Space>
  bool put(const Space& space, std::span<const token_id> tokens, std::span<const std::byte> bytes) {
    return tier_->put(space_of(space.model, space.adapter, space.tenant), tokens, bytes);
  }

  /// Writes what was put to the front of `out`. \return how many bytes, -1 if there are none or more than fit
  template <class Space>
  index_t get(const Space& space, std::span<const token_id> tokens, std::span<std::byte> out) {
    const std::string name = space_of(space.model, space.adapter, space.tenant);
    index_t size = -1;
    const auto take = [&](std::span<const std::byte> payload) {
      if (payload.size() > out.size()) return;
      if (!payload.empty()) std::memcpy(out.data(), payload.data(), payload.size());
      size = static_cast<index_t>(payload.size());
    };
    if constexpr (requires { tier_->view(name, tokens, take); }) {
      (void)tier_->view(name, tokens, take);  // without a copy in between
    } else {
      if (tier_->get(name, tokens, buffer_)) take(buffer_);
    }
    return size;
  }

  template <class Space>
  [[nodiscard]] bool contains(const Space& space, std::span<const token_id> tokens) {
    return tier_->contains(space_of(space.model, space.adapter, space.tenant), tokens);
  }

  template <class Space>
  bool erase(const Space& space, std::span<const token_id> tokens) {
    return tier_->erase(space_of(space.model, space.adapter, space.tenant), tokens);
  }

 private:
  Tier* tier_;
  std::vector<std::byte> buffer_;
};

}  // namespace kvcache::inline v0::store
