// SPDX-License-Identifier: MIT
// Everything that needs no more than Eigen/Core; without Eigen on the include path, everything that needs no library. Solvers
// and clients of others are included by name: codec/low_rank.hpp, codec/klt.hpp, interop/eigen_thread_pool.hpp, store/lmdb_tier.hpp.
#pragma once

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/dense_kv.hpp>
#include <kvcache/attention/merge_parts.hpp>
#include <kvcache/attention/reference.hpp>
#include <kvcache/attention/rope.hpp>
#include <kvcache/attention/softmax_state.hpp>
#include <kvcache/attention/weights.hpp>
#include <kvcache/cache/block_layout.hpp>
#include <kvcache/cache/chunked.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/cache/recoded.hpp>
#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/layer_descriptions.hpp>
#include <kvcache/codec/low_rank_chooser.hpp>
#include <kvcache/codec/low_rank_rows.hpp>
#include <kvcache/codec/low_rank_settings.hpp>
#include <kvcache/codec/mixed.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/sealing.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/evict_tokens.hpp>
#include <kvcache/eviction/h2o.hpp>
#include <kvcache/eviction/keydiff.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>
#include <kvcache/eviction/snapkv.hpp>
#include <kvcache/eviction/tova.hpp>
#include <kvcache/eviction/window.hpp>
#include <kvcache/fwd.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_snapshot.hpp>
#include <kvcache/interop/openmp.hpp>
#include <kvcache/interop/rope_identity.hpp>
#include <kvcache/kernel/select.hpp>
#include <kvcache/serving/cache_manager.hpp>
#include <kvcache/serving/gauges.hpp>
#include <kvcache/serving/observer.hpp>
#include <kvcache/serving/planner.hpp>
#include <kvcache/serving/prometheus.hpp>
#include <kvcache/serving/recommend.hpp>
#include <kvcache/store/journal.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/mapped.hpp>
#include <kvcache/store/recover.hpp>
#include <kvcache/store/save.hpp>
#include <kvcache/store/spill_to.hpp>
#include <kvcache/version.hpp>

#if defined(__unix__) || defined(__APPLE__)
#include <kvcache/store/directory_tier.hpp>
#endif

#if __has_include(<Eigen/Core>)
#include <kvcache/attention/multi_head_attention.hpp>
#include <kvcache/interop/eigen.hpp>
#endif
