// SPDX-License-Identifier: MIT
// The codecs and containers that have names, compiled once likewise: KVCACHE_SEPARATE_CODECS.
#include <kvcache/interop/known_containers.hpp>
