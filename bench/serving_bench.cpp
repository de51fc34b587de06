// SPDX-License-Identifier: MIT
// What serving many sequences costs: finding, storing and evicting prefixes among 1k to 1M blocks, a fork of 32k
// tokens, and what a cache_manager adds to a decode step.
#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/paged.hpp>
#include <kvcache/serving/cache_manager.hpp>
#include <kvcache/serving/prefix_index.hpp>

#include "support/measure.hpp"
#include "support/rows.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

namespace kvcache::bench {
namespace {

// Keys and values as small as they get: the index is measured, not the memory behind it.
constexpr cache_shape tiny{.num_layers = 1, .num_kv_heads = 1, .head_dim = 2};
constexpr serving::prefix_space space{.model = "bench"};
constexpr index_t long_prompt = 32'768;            // tokens
constexpr index_t long_blocks = long_prompt / 64;  // of 64 tokens
constexpr index_t turn = 4096;                     // tokens
constexpr index_t turn_blocks = turn / 64;

std::uint32_t mixed(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return static_cast<std::uint32_t>(z >> 32);
}

/// The tokens of conversation `i`; all of them begin with the same token, as with a model that has a BOS.
void write_prompt(std::uint64_t i, std::vector<token_id>& tokens) {
  for (std::size_t t = 1; t < tokens.size(); ++t)
    tokens[t] = static_cast<token_id>(mixed((i + 1) * 0x9E3779B97F4A7C15U + t) % 32'000);
  tokens[0] = 1;
}

/// An index with so many blocks: conversations of `length` tokens.
class full_index {
 public:
  full_index(index_t num_blocks, index_t length)
      : pool_(tiny), index_(tiny.block_size, {.num_blocks = num_blocks + 1024}), prompt_(size(length)) {
    num_ = num_blocks * tiny.block_size / length;
    for (index_t i = 0; i < num_; ++i) {
      write_prompt(static_cast<std::uint64_t>(i), prompt_);
      index_.insert(space, prompt_, sequence(length));
    }
  }

  serving::prefix_index<paged_cache<>>& index() { return index_; }
  const std::vector<token_id>& prompt() const { return prompt_; }
  /// Pages of its own.
  paged_cache<> sequence(index_t length) {
    auto made = pool_.sequence();
    made[0].append(std::span(rows_).first(size(2 * length)), std::span(rows_).first(size(2 * length)));
    return made;
  }
  /// Any stored conversation, not one after the other.
  void choose(index_t sample) {
    write_prompt(mixed(static_cast<std::uint64_t>(sample) * 77) % static_cast<std::uint64_t>(num_), prompt_);
  }
  /// One that is not stored.
  void choose_new() { write_prompt(static_cast<std::uint64_t>(num_ + next_++), prompt_); }

 private:
  static std::size_t size(index_t n) { return static_cast<std::size_t>(n); }

  page_pool<> pool_;
  serving::prefix_index<paged_cache<>> index_;
  std::vector<token_id> prompt_;
  std::vector<float> rows_ = std::vector<float>(size(2 * long_prompt), 1.0F);
  index_t num_ = 0;
  index_t next_ = 0;
};

row_name index_row(const char* what, index_t num_blocks, index_t num_tokens) {
  return row_name(what).add("blocks", num_blocks).add("tokens", num_tokens).add("threads", 1);
}

void add_match(index_t num_blocks, index_t length) {
  register_row(index_row("prefix_match", num_blocks, length), [=](benchmark::State& state) {
    full_index full(num_blocks, length);
    using hit_type = serving::prefix_index<paged_cache<>>::hit;
    std::optional<hit_type> hit;
    measured measurement;
    full.choose(0);
    measurement.op = [&](index_t) { hit.emplace(full.index().match(space, full.prompt())); };
    measurement.restore = [&](index_t sample) {
      if (hit->size != length) throw std::logic_error("a stored prompt was not found");
      hit.reset();
      full.choose(sample);
    };
    measure(state, measurement);
  });
}

void add_insert_and_evict(index_t num_blocks) {
  register_row(index_row("prefix_insert", num_blocks, turn), [=](benchmark::State& state) {
    full_index full(num_blocks, turn);
    std::optional<paged_cache<>> sequence(full.sequence(turn));
    measured measurement;
    full.choose_new();
    measurement.op = [&](index_t) {
      if (!full.index().insert(space, full.prompt(), std::move(*sequence)))
        throw std::logic_error("a new prompt was there");
    };
    measurement.restore = [&](index_t) {
      for (index_t i = 0; i < turn_blocks; ++i) full.index().evict();
      full.choose_new();
      sequence.emplace(full.sequence(turn));
    };
    measure(state, measurement);
  });
  register_row(index_row("prefix_evict", num_blocks, 64), [=](benchmark::State& state) {
    full_index full(num_blocks, turn);
    measured measurement;
    measurement.ops_per_sample = turn_blocks;
    measurement.op = [&](index_t) {
      for (index_t i = 0; i < turn_blocks; ++i)
        if (!full.index().evict()) throw std::logic_error("nothing may go");
    };
    measurement.restore = [&](index_t) {
      full.choose_new();
      full.index().insert(space, full.prompt(), full.sequence(turn));
    };
    measure(state, measurement);
  });
}

void add_fork() {
  register_row(row_name("fork_paged").add("tokens", long_prompt).add("threads", 1),
               [](benchmark::State& state) {
                 page_pool<> pool(tiny);
                 auto sequence = pool.sequence();
                 const std::vector<float> rows(static_cast<std::size_t>(2 * long_prompt), 1.0F);
                 sequence[0].append(rows, rows);
                 std::optional<paged_cache<>> child;
                 measured measurement;
                 measurement.op = [&](index_t) { child.emplace(sequence.fork()); };
                 measurement.restore = [&](index_t) { child.reset(); };
                 measure(state, measurement);
               });
}

// Tokens through a manager, beside the same into a sequence of its own, and one decode step's attention.
void add_manager(index_t num_layers, index_t kv_len) {
  const auto name =
      row_name("manager_append").add("layers", num_layers).add("kv_len", kv_len).add("threads", 1);
  register_row(name, [=](benchmark::State& state) {
    const cache_shape shape{.num_layers = num_layers, .num_kv_heads = 8, .head_dim = 128};
    constexpr index_t num_q_heads = 32;
    const page_pool<> pool(shape);
    page_pool<> plain_pool(shape);
    serving::cache_manager<page_pool<>> manager(pool,
                                                {.budget_bytes = 4 * pool.page_bytes() * (kv_len / 64 + 2)});
    const index_t first = kv_len - 64;
    const std::vector<token_id> prompt(static_cast<std::size_t>(first), 7);
    const serving::sequence_id id = manager.acquire(space, prompt).id;
    auto plain = plain_pool.sequence();
    const std::vector<float> rows(static_cast<std::size_t>(first * 1024), 0.5F);
    for (index_t layer = 0; layer < num_layers; ++layer) {
      if (manager.try_append(id, layer, rows, rows) != status::ok) throw std::logic_error("no room");
      plain[layer].append(rows, rows);
    }
    const std::span<const float> row = std::span(rows).first(1024);
    const token_id token = 9;
    std::vector<float> q(num_q_heads * 128, 0.25F), out(q.size());
    attend_workspace workspace;
    attend_options options;
    options.workspace = &workspace;

    measured measurement;
    measurement.ops_per_sample = 64;
    measurement.op = [&](index_t) {
      for (index_t i = 0; i < 64; ++i) {
        for (index_t layer = 0; layer < num_layers; ++layer) (void)manager.try_append(id, layer, row, row);
        (void)manager.extend(id, std::span(&token, 1));
      }
    };
    measurement.compare = {[&](index_t) {
                             for (index_t i = 0; i < 64; ++i)
                               for (index_t layer = 0; layer < num_layers; ++layer)
                                 plain[layer].append(row, row);
                           },
                           [&](index_t) {
                             for (index_t layer = 0; layer < num_layers; ++layer)
                               attend(std::span<const float>(q), manager.cache(id)[layer],
                                      std::span<float>(out), options);
                           }};
    measurement.restore = [&](index_t) {
      if (manager.cache(id).size() != kv_len) throw std::logic_error("tokens are missing");
      manager.truncate(id, first);
      plain.truncate(first);
    };
    const medians m = measure(state, measurement);
    const double append = m.compare[0] / 64;
    state.counters["append_ns"] = append * 1e9;
    state.counters["attend_ns"] = m.compare[1] * 1e9;
    state.counters["overhead_pct"] = 100 * (m.op - append) / (append + m.compare[1]);
  });
}

}  // namespace

void register_rows() {
  for (const index_t num_blocks : {1'000, 10'000, 100'000, 1'000'000}) {
    add_match(num_blocks, turn / 4);
    if (num_blocks >= long_blocks) add_match(num_blocks, long_prompt);
    add_insert_and_evict(num_blocks);
  }
  add_fork();
  add_manager(8, 4096);
  add_manager(2, 256);
}

}  // namespace kvcache::bench
