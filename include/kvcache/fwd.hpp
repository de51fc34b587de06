// SPDX-License-Identifier: MIT
// The names that headers of users mention, without what stands behind them.
#pragma once

namespace kvcache::inline v0 {

struct cache_shape;
struct attend_options;
struct rope_config;
struct memory_use;
class rope_table;
class attend_workspace;
class multi_head_attention;
class any_cache;
class any_layer;
enum class status;
enum class rope_pairing;
enum class kv_layout;

}  // namespace kvcache::inline v0
