// SPDX-License-Identifier: MIT
// What an eviction policy costs: replacing a block in a full policy, using one, pinning one; 1k to 1M blocks.
#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>

#include "support/measure.hpp"
#include "support/rows.hpp"

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::bench {
namespace {

constexpr index_t ops_per_sample = 4096;
constexpr index_t chain_length = 16;  // blocks

/// Different for different `i`, like hashes (splitmix64).
eviction::block_key key_of(index_t i) {
  eviction::block_key z = static_cast<eviction::block_key>(i) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

/// A full policy, and whose turn it is to come.
template <class Policy>
class full_policy {
 public:
  explicit full_policy(index_t num_blocks) : policy_(num_blocks) {
    for (index_t i = 0; i < num_blocks; ++i) insert_next();
    // Go through it twice, so that ghosts and queues are what they are in the long run.
    for (index_t i = 0; i < 2 * num_blocks; ++i) replace();
    for (index_t i = 0; i < 2 * num_blocks; ++i) {
      if (policy_.contains(key_of(next_ - 1 - i))) present_.push_back(key_of(next_ - 1 - i));
    }
    for (std::size_t i = present_.size(); i > 1; --i)
      std::swap(present_[i - 1], present_[static_cast<std::size_t>(key_of(static_cast<index_t>(i)) % i)]);
  }

  void replace() {
    if (!policy_.evict()) throw std::logic_error("nothing may go");
    insert_next();
  }

  Policy& policy() { return policy_; }

  /// Keys of blocks in random order, for ever.
  eviction::block_key any() {
    at_ = at_ + 1 < present_.size() ? at_ + 1 : 0;
    return present_[at_];
  }

 private:
  void insert_next() {
    eviction::block_info info{.recompute_cost = 1 + static_cast<double>(next_ % chain_length) / 32};
    if (next_ % chain_length != 0) info.parent = key_of(next_ - 1);
    if (!policy_.insert(key_of(next_++), info)) throw std::logic_error("no room after evict");
  }

  Policy policy_;
  index_t next_ = 0;
  std::vector<eviction::block_key> present_;
  std::size_t at_ = 0;
};

template <class Policy, class Op>
void add_row(const char* what, index_t num_blocks, Op op) {
  const auto name = row_name(std::string("evict_") + what)
                        .add("policy", Policy::name)
                        .add("blocks", num_blocks)
                        .add("threads", 1);
  register_row(name, [num_blocks, op](benchmark::State& state) {
    full_policy<Policy> full(num_blocks);
    measured measurement;
    measurement.op = [&](index_t) {
      for (index_t i = 0; i < ops_per_sample; ++i) op(full);
    };
    measurement.ops_per_sample = ops_per_sample;
    measure(state, measurement);
    full.policy().check();
  });
}

template <class Policy>
void add_rows() {
  for (const index_t num_blocks : {1'000, 10'000, 100'000, 1'000'000}) {
    add_row<Policy>("replace", num_blocks, [](auto& full) { full.replace(); });
    add_row<Policy>("touch", num_blocks, [](auto& full) { full.policy().touch(full.any()); });
    add_row<Policy>("pin", num_blocks, [](auto& full) {
      const eviction::block_key key = full.any();
      full.policy().pin(key);
      full.policy().unpin(key);
    });
  }
}

}  // namespace

void register_rows() {
  add_rows<eviction::lru>();
  add_rows<eviction::arc>();
  add_rows<eviction::s3_fifo>();
  add_rows<eviction::priority>();
}

}  // namespace kvcache::bench
