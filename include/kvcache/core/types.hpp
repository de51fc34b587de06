// SPDX-License-Identifier: MIT
// The integer types everything else counts with.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvcache::inline v0 {

/// Every index and every count: tokens, heads, blocks, elements, bytes. Signed, so that differences are safe.
using index_t = std::ptrdiff_t;

/// A page of a pool. Its own type, so that a physical place is never mistaken for a logical position.
enum class page_id : std::uint32_t {};

/// A token of a vocabulary: the 32 bits that files and tiers have, signed as those of files are and of most tokenizers.
/// Ids are compared, hashed and copied, never used as an index; so any bits are an id, and what comes from outside needs
/// no check.
using token_id = std::int32_t;

inline namespace literals {

// NOLINTBEGIN(google-runtime-int): the standard fixes the type of literal operators
constexpr index_t operator""_KiB(unsigned long long n) { return static_cast<index_t>(n) << 10; }
constexpr index_t operator""_MiB(unsigned long long n) { return static_cast<index_t>(n) << 20; }
constexpr index_t operator""_GiB(unsigned long long n) { return static_cast<index_t>(n) << 30; }
// NOLINTEND(google-runtime-int)

}  // namespace literals
}  // namespace kvcache::inline v0
