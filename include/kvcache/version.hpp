// SPDX-License-Identifier: MIT
// The version of the library; the build files read it from here.
#pragma once

#define KVCACHE_VERSION_MAJOR 0
#define KVCACHE_VERSION_MINOR 1
#define KVCACHE_VERSION_PATCH 0

namespace kvcache::inline v0 {

inline constexpr int version_major = KVCACHE_VERSION_MAJOR;
inline constexpr int version_minor = KVCACHE_VERSION_MINOR;
inline constexpr int version_patch = KVCACHE_VERSION_PATCH;

}  // namespace kvcache::inline v0
