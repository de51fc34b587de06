// SPDX-License-Identifier: MIT
// What keeping a sequence costs: saving, loading and mapping a snapshot beside plain reads and writes of as many bytes,
// and a journal beside the decode steps that it goes along with. Files lie in the folder for temporary ones; their bytes
// in the page cache, but for what waits for the disk. KVCACHE_BENCH_STORE_MIB sets the size of the snapshot, 1024 unless given.
#include <kvcache/attention/attend.hpp>
#include <kvcache/cache/contiguous.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/store/file.hpp>
#include <kvcache/store/journal.hpp>
#include <kvcache/store/load.hpp>
#include <kvcache/store/mapped.hpp>
#include <kvcache/store/save.hpp>

#include "support/measure.hpp"
#include "support/noise.hpp"
#include "support/rows.hpp"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace kvcache::bench {
namespace {

using cache_type = contiguous_cache<codec::bf16>;

constexpr cache_shape shape{32, 8, 128, 64};
constexpr index_t q_heads = 32;

index_t snapshot_mib() {
  const char* text = std::getenv("KVCACHE_BENCH_STORE_MIB");
  return text != nullptr ? std::max(std::atoi(text), 8) : 1024;
}

/// A folder of this process, gone with it.
class scratch_folder {
 public:
  scratch_folder()
      : path_(std::filesystem::temp_directory_path() / ("kvcache-bench-" + std::to_string(::getpid()))) {
    std::filesystem::create_directories(path_);
  }
  scratch_folder(const scratch_folder&) = delete;
  scratch_folder& operator=(const scratch_folder&) = delete;
  ~scratch_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] std::filesystem::path file(const char* name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

cache_type filled(index_t num_tokens) {
  cache_type cache(shape);
  constexpr index_t at_once = 64;
  const index_t width = shape.num_kv_heads * shape.head_dim;
  const noise rows(width);
  for (index_t t = 0; t < num_tokens; t += at_once) {
    const index_t count = std::min(at_once, num_tokens - t);
    for (index_t layer = 0; layer < shape.num_layers; ++layer)
      cache[layer].append(rows.keys(t, count), rows.values(t, count));
  }
  return cache;
}

/// As many bytes as a file has, in memory that is new each time: what loading cannot do without.
void read_plainly(const std::filesystem::path& path) {
  const store::file_source file(path);
  constexpr std::size_t piece = std::size_t{256} << 10U;
  const memory_block memory(static_cast<index_t>(file.size()), huge_page_resource());
  for (std::uint64_t at = 0; at < file.size(); at += piece)
    file.read(
        at, {memory.data() + at, static_cast<std::size_t>(std::min<std::uint64_t>(piece, file.size() - at))});
}

/// The same into one small buffer: what the page cache gives at best.
void read_past(const std::filesystem::path& path) {
  const store::file_source file(path);
  std::vector<std::byte> buffer(store::detail::run_bytes);  // as verify() does; more at a time is slower
  for (std::uint64_t at = 0; at < file.size(); at += buffer.size())
    file.read(at, std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), file.size() - at)));
}

/// Seconds that this thread computes, or the system for it, and not those it waits: of use on a busy machine.
class cpu_clock {
 public:
  template <class F>
  void time(F&& run) {
    const double start = now();
    run();
    seconds_.push_back(now() - start);
  }
  [[nodiscard]] double typical() const { return median(seconds_); }
  [[nodiscard]] double total() const {
    double sum = 0;
    for (const double s : seconds_) sum += s;
    return sum;
  }

 private:
  static double now() {
    ::timespec t{};
    (void)::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
  }
  std::vector<double> seconds_;
};

/// Sets gigabytes per second, and the share of what the plain way gives.
void report(benchmark::State& state, const medians& m, std::uint64_t bytes, const cpu_clock& plain,
            const cpu_clock& ours) {
  state.counters["cpu_gb_per_s"] = static_cast<double>(bytes) / ours.typical() / 1e9;
  state.counters["cpu_of_plain_pct"] = 100 * plain.typical() / ours.typical();
  state.counters["gb_per_s"] = static_cast<double>(bytes) / m.op / 1e9;
  state.counters["ms"] = m.op * 1e3;
  if (!m.compare.empty()) state.counters["of_plain_pct"] = 100 * m.compare.front() / m.op;
}

void add_snapshot_row(const char* what,
                      void (*run)(benchmark::State&, const scratch_folder&, const cache_type&)) {
  const auto name = row_name(std::string("store_") + what)
                        .add("codec", "bf16")
                        .add("mib", snapshot_mib())
                        .add("threads", 1);
  register_row(name, [run](benchmark::State& state) {
    const scratch_folder folder;
    const index_t bytes_per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2;
    run(state, folder, filled((snapshot_mib() << 20) / bytes_per_token));
  });
}

void save_row(benchmark::State& state, const scratch_folder& folder, const cache_type& cache) {
  const auto path = folder.file("saved.kv");
  store::save(cache, {}, path);
  const auto bytes = std::filesystem::file_size(path);
  const std::vector<std::byte> plain(bytes, std::byte{1});
  measured what;
  cpu_clock plain_time;
  cpu_clock our_time;
  what.compare = {[&](index_t) {
    plain_time.time([&] {
      store::atomic_file file(folder.file("plain"));
      file.write(plain);
      file.commit();
    });
  }};
  what.op = [&](index_t) { our_time.time([&] { store::save(cache, {}, path); }); };
  report(state, measure(state, what), bytes, plain_time, our_time);
}

void load_row(benchmark::State& state, const scratch_folder& folder, const cache_type& cache) {
  const auto path = folder.file("saved.kv");
  store::save(cache, {}, path);
  measured what;
  cpu_clock plain_time;
  cpu_clock our_time;
  what.compare = {[&](index_t) { plain_time.time([&] { read_plainly(path); }); }};
  what.op = [&](index_t) {
    our_time.time([&] {
      if (store::load<cache_type>(path).cache.size() != cache.size())
        throw std::logic_error("tokens are missing");
    });
  };
  report(state, measure(state, what), std::filesystem::file_size(path), plain_time, our_time);
}

void verify_row(benchmark::State& state, const scratch_folder& folder, const cache_type& cache) {
  const auto path = folder.file("saved.kv");
  store::save(cache, {}, path);
  measured what;
  cpu_clock plain_time;
  cpu_clock our_time;
  what.compare = {[&](index_t) { plain_time.time([&] { read_past(path); }); }};
  what.op = [&](index_t) { our_time.time([&] { store::mapped_snapshot<codec::bf16>(path).verify(); }); };
  report(state, measure(state, what), std::filesystem::file_size(path), plain_time, our_time);
}

/// Opening a snapshot, up to the first attend, which reads a layer.
void map_row(benchmark::State& state, const scratch_folder& folder, const cache_type& cache) {
  const auto path = folder.file("saved.kv");
  store::save(cache, {}, path);
  const noise rows(q_heads * shape.head_dim);
  std::vector<float> out(static_cast<std::size_t>(q_heads * shape.head_dim));
  std::vector<float> expected(out.size());
  attend(rows.keys(0, 1), cache[0], expected);
  measured what;
  what.compare = {[&](index_t) { const store::mapped_snapshot<codec::bf16> mapped(path); }};
  what.op = [&](index_t) {
    const store::mapped_snapshot<codec::bf16> mapped(path);
    attend(rows.keys(0, 1), mapped[0], out);
  };
  const medians m = measure(state, what);
  if (out != expected) throw std::logic_error("a mapped layer gives another result");
  state.counters["open_ms"] = m.compare.front() * 1e3;
  state.counters["first_attend_ms"] = m.op * 1e3;
}

/// 64 decode steps, of which only what concerns the cache is done, and the journal of them.
void journal_row(benchmark::State& state, index_t kv_len, index_t sync_every) {
  const scratch_folder folder;
  cache_type cache = filled(kv_len);
  const noise rows(q_heads * shape.head_dim);
  const index_t width = shape.num_kv_heads * shape.head_dim;
  const noise kv(width);
  store::identity who;
  who.tokens.resize(static_cast<std::size_t>(kv_len));
  store::journal log(folder.file("live.kvj"), cache, who, {.sync_every = sync_every});
  std::vector<float> out(static_cast<std::size_t>(q_heads * shape.head_dim));
  constexpr index_t steps = 64;
  index_t token = kv_len;
  const auto step = [&] {
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      cache[layer].append(kv.keys(token, 1), kv.values(token, 1));
      attend(rows.keys(token, 1), cache[layer], out);
    }
    ++token;
  };
  double decode_seconds = 0;
  double log_seconds = 0;
  cpu_clock decode_time;
  cpu_clock log_time;
  measured what;
  what.op = [&](index_t) {
    for (index_t i = 0; i < steps; ++i) {
      decode_seconds += seconds_of([&] { decode_time.time(step); });
      const token_id id = 7;
      log_seconds += seconds_of([&] { log_time.time([&] { log.append({&id, 1}); }); });
    }
  };
  what.ops_per_sample = steps;
  measure(state, what);
  state.counters["step_ms"] = decode_seconds / static_cast<double>(token - kv_len) * 1e3;
  state.counters["journal_ms"] = log_seconds / static_cast<double>(token - kv_len) * 1e3;
  state.counters["of_step_pct"] = 100 * log_seconds / decode_seconds;
  state.counters["cpu_of_step_pct"] = 100 * log_time.total() / decode_time.total();
}

}  // namespace

void register_rows() {
  add_snapshot_row("save", save_row);
  add_snapshot_row("load", load_row);
  add_snapshot_row("verify", verify_row);
  add_snapshot_row("map", map_row);
  for (const index_t kv_len : {512, 4096}) {
    for (const index_t sync_every : {0, 1, 8}) {
      const auto name = row_name("store_journal")
                            .add("codec", "bf16")
                            .add("kv_len", kv_len)
                            .add("sync_every", sync_every)
                            .add("threads", 1);
      register_row(name, [=](benchmark::State& state) { journal_row(state, kv_len, sync_every); });
    }
  }
}

}  // namespace kvcache::bench
