// SPDX-License-Identifier: MIT
// The bundled model on a thread pool.
#include "support/catch.hpp"

#include "llama/byte_tokenizer.hpp"
#include "llama/decoder.hpp"
#include "llama/load_model.hpp"

#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/eigen_thread_pool.hpp>

TEST_CASE("threads change nothing", "[examples][threads]") {
  const llama::decoder model(llama::load_model(KVCACHE_MODEL_DIR));
  const auto prompt =
      llama::byte_tokenizer{}.encode("ROMEO:\nWhat is the matter? what say you will not stay?");
  kvcache::eigen_thread_pool_executor pool(3);
  auto one = kvcache::make_cache("paged/bf16", llama::cache_shape_of(model.config()));
  auto three = kvcache::make_cache("paged/bf16", llama::cache_shape_of(model.config()));
  CHECK(model.forward(prompt, one, 4) == model.forward(prompt, three, 4, pool));
  CHECK(model.forward(std::span(prompt).first(1), one) ==
        model.forward(std::span(prompt).first(1), three, 1, pool));
  CHECK(model.recompute(prompt, 4) == model.recompute(prompt, 4, pool));
}

TEST_CASE("a matrix product is the same in pieces on any number of workers", "[examples][threads]") {
  kvcache::serial_executor serial;
  kvcache::eigen_thread_pool_executor pool(4);
  const llama::matrix x = llama::matrix::Random(40, 300), w = llama::matrix::Random(1000, 300);  // 3 pieces
  const llama::matrix y = llama::linear(x, w, serial);
  CHECK(llama::linear(x, w, pool) == y);
  CHECK((y - x * w.transpose()).cwiseAbs().maxCoeff() < 1e-3f);
}
