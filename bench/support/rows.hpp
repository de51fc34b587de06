// SPDX-License-Identifier: MIT
// Names of rows: "decode/codec:bf16/cache:paged/...". Readers of the JSON split them at '/' and ':'.
#pragma once

#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/core/types.hpp>

#include <benchmark/benchmark.h>

#include "support/measure.hpp"

#include <exception>
#include <string>
#include <string_view>
#include <utility>

namespace kvcache::bench {

/// Each bench registers its rows here; called once by main.
void register_rows();

class row_name {
 public:
  explicit row_name(std::string_view what) : text_(what) {}

  row_name& add(std::string_view key, std::string_view value) {
    text_.append("/").append(key).append(":").append(value);
    return *this;
  }
  row_name& add(std::string_view key, index_t value) { return add(key, std::to_string(value)); }
  /// Left out where it has its usual value, so that names stay short.
  row_name& add_unless(index_t usual, std::string_view key, index_t value) {
    return value == usual ? *this : add(key, value);
  }

  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  std::string text_;
};

/// Registers `run(state)`; what it throws becomes the row's error.
template <class F>
void register_row(const row_name& name, F run) {
  benchmark::RegisterBenchmark(name.text().c_str(),
                               [run, samples = index_t{0}](benchmark::State& state) mutable {
                                 samples_of_row = &samples;
                                 try {
                                   run(state);
                                 } catch (const std::exception& e) {
                                   state.SkipWithError(e.what());
                                 }
                               });
}

/// Calls `f` once for each codec, with a value of its type.
template <class F>
void for_each_codec(F f) {
  f(codec::f32{});
  f(codec::f16{});
  f(codec::bf16{});
  f(codec::int8{});
}

}  // namespace kvcache::bench
