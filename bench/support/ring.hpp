// SPDX-License-Identifier: MIT
// A ring of layers larger than the last-level cache. Walking it, each step finds its layer in memory and not
// in a cache, as a decode step does that has just streamed through the other layers of a model.
//
//   sequence 0                sequence 1 (a clone)       ...
//   | layer 0 | 1 | 2 | 3 |   | layer 0 | 1 | 2 | 3 |          step s -> group s / layers, layer s % layers
//
// Batches: a step takes the same layer of `batch` sequences.
#pragma once

#include "support/layouts.hpp"
#include "support/machine.hpp"
#include "support/measure.hpp"
#include "support/noise.hpp"
#include "support/roof.hpp"

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

namespace kvcache::bench {

struct ring_size {
  cache_shape shape;  ///< num_layers is chosen by the ring
  index_t kv_len;     ///< tokens in every layer, a multiple of block_size
  index_t batch = 1;  ///< sequences read in one step
  bool hot = false;   ///< one step only, read over and over: it stays in a cache if it fits
};

/// Appends `num_tokens` tokens of noise to every layer.
template <class Cache>
void fill(Cache& cache, index_t num_tokens) {
  const noise rows(cache.shape().num_kv_heads * cache.shape().head_dim);
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer) {
    for (index_t t = 0; t < num_tokens; t += rows.chunk()) {
      const index_t count = std::min(rows.chunk(), num_tokens - t);
      cache[layer].append(rows.keys(t, count), rows.values(t, count));
    }
  }
}

template <class Layout, class Codec>
class kv_ring {
 public:
  using cache_type = decltype(Layout::template make<Codec>(cache_shape{}, index_t{}));

  explicit kv_ring(const ring_size& size) : batch_(size.batch) {
    cache_shape shape = size.shape;
    shape.num_layers = 1;
    step_bytes_ = size.batch * size.kv_len * shape.num_kv_heads *
                  codec_for<Codec>(shape).token_bytes({shape.block_size, shape.head_dim});
    const index_t wanted = size.hot ? 1 : std::max(ceil_div(ring_bytes(), step_bytes_), index_t{3});
    // More layers are more like a model; fewer are quicker to fill, since the rest are clones.
    const index_t several = std::clamp(256_MiB / step_bytes_, index_t{1}, index_t{4});
    shape.num_layers = size.batch > 1 ? wanted : std::min(wanted, several);
    const index_t groups = ceil_div(wanted, shape.num_layers);
    const index_t available = available_memory_bytes();
    if (available > 0 && groups * shape.num_layers * step_bytes_ > available / 2)
      throw std::runtime_error("not enough free memory for a ring of this size");

    sequences_.reserve(static_cast<std::size_t>(groups * size.batch));
    sequences_.push_back(Layout::template make<Codec>(shape, size.kv_len));
    fill(sequences_.front(), size.kv_len);
    while (sequences_.size() < sequences_.capacity()) sequences_.push_back(sequences_.front().clone());
    collect_pieces();
    // As in a decode loop, which reads every layer over and over: on some servers the first time after writing takes longer.
    for (index_t step = 0; step < this->size(); ++step) read(step, 1);
  }

  /// Steps until the first layer comes again.
  [[nodiscard]] index_t size() const { return static_cast<index_t>(pieces_.size()); }
  /// Bytes of keys and values of one step, without padding.
  [[nodiscard]] index_t step_bytes() const { return step_bytes_; }

  [[nodiscard]] decltype(auto) layer(index_t step, index_t item = 0) const {
    step %= size();
    const auto sequence = static_cast<std::size_t>(step / num_layers() * batch_ + item);
    return sequences_[sequence][step % num_layers()];
  }

  /// Reads the bytes of one step, nothing else, as fast as this machine can.
  void read(index_t step, index_t threads) {
    read_all(pieces_[static_cast<std::size_t>(step % size())], best_style(threads), pinned_workers(threads));
  }

  /// For the step farthest from another, whose bytes left the caches longest ago.
  [[nodiscard]] index_t far_from(index_t step) const { return step + size() / 2; }

  /// Something worked out once per ring and name.
  template <class F>
  double remembered(const std::string& name, F&& work_out) {
    const auto [at, added] = numbers_.try_emplace(name, 0.0);
    if (added) at->second = work_out();
    return at->second;
  }

 private:
  [[nodiscard]] index_t num_layers() const { return sequences_.front().shape().num_layers; }

  void collect_pieces() {
    const index_t piece = std::clamp(step_bytes_ / 16, 32_KiB, 1_MiB);
    const index_t steps = static_cast<index_t>(sequences_.size()) / batch_ * num_layers();
    pieces_.resize(static_cast<std::size_t>(steps));
    for (index_t step = 0; step < steps; ++step) {
      auto& pieces = pieces_[static_cast<std::size_t>(step)];
      for (index_t item = 0; item < batch_; ++item) {
        const auto more = pieces_of(layer(step, item), piece);
        pieces.insert(pieces.end(), more.begin(), more.end());
      }
    }
  }

  /// The winner among read_styles: the best of three rounds over some steps each.
  read_style best_style(index_t threads) {
    const double winner = remembered("style " + std::to_string(threads), [&] {
      const index_t steps = std::clamp(64_MiB / step_bytes_, index_t{1}, size());
      std::size_t best = 0;
      double best_seconds = std::numeric_limits<double>::infinity();
      for (std::size_t i = 0; i < 3 * read_styles.size(); ++i) {
        const std::size_t style = i % read_styles.size();
        const double seconds = seconds_of([&] {
          for (index_t s = 0; s < steps; ++s)
            read_all(pieces_[static_cast<std::size_t>(s)], read_styles[style], pinned_workers(threads));
        });
        if (seconds < best_seconds) best_seconds = seconds, best = style;
      }
      return static_cast<double>(best);
    });
    return read_styles[static_cast<std::size_t>(winner)];
  }

  index_t batch_;
  index_t step_bytes_ = 0;
  std::vector<cache_type> sequences_;
  std::vector<std::vector<extent>> pieces_;  // [size()]
  std::map<std::string, double> numbers_;
};

/// Holds the ring of the last row, whatever its type.
struct ring_slot {
  std::string name;
  std::shared_ptr<void> ring;

  static ring_slot& only() {
    static ring_slot slot;
    return slot;
  }
};

/// The ring of the last row if it has the same name, else a new one in its place: rows that share a ring are
/// registered side by side, and there is memory for one only.
template <class Layout, class Codec>
kv_ring<Layout, Codec>& shared_ring(const ring_size& size) {
  const auto& shape = size.shape;
  std::string name = std::string(Layout::name) + "/" + typeid(Codec).name();  // Codec::name may be shared
  for (const index_t n : {shape.num_kv_heads, shape.head_dim, shape.block_size, size.kv_len, size.batch})
    name += "/" + std::to_string(n);
  if (size.hot) name += "/hot";

  ring_slot& slot = ring_slot::only();
  if (slot.name != name) {
    slot = {};  // first free the old one, then make the new one
    slot.ring = std::make_shared<kv_ring<Layout, Codec>>(size);
    slot.name = name;
  }
  return *static_cast<kv_ring<Layout, Codec>*>(slot.ring.get());
}

}  // namespace kvcache::bench
