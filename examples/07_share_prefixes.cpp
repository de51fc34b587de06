// SPDX-License-Identifier: MIT
// Requests that begin alike under one budget of bytes: what each finds there, who is kept apart, and what goes first when
// bytes run short. Tokens are letters here, and keys and values are made up.
#include <kvcache/cache/paged.hpp>
#include <kvcache/serving/cache_manager.hpp>

#include <cstddef>
#include <cstdio>
#include <string_view>
#include <vector>

using kvcache::index_t;
using kvcache::token_id;
using kvcache::serving::prefix_space;

int main() {
  const kvcache::cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 64, .block_size = 16};
  const kvcache::page_pool<> pool(shape, {.slab_bytes = 0});  // a page at a time: the budget is small
  kvcache::serving::cache_manager<kvcache::page_pool<>> manager(pool,
                                                                {.budget_bytes = 24 * pool.page_bytes()});

  const auto ask = [&](const char* who, const prefix_space& space, std::string_view text) {
    const std::vector<token_id> prompt(text.begin(), text.end());
    const auto got = manager.acquire(space, prompt);
    if (got.code != kvcache::status::ok) return std::printf("%-6s refused\n", who);
    // What is there already need not be computed; the model runs over the others.
    const index_t missing = static_cast<index_t>(prompt.size()) - got.reused;
    const std::vector<float> rows(static_cast<std::size_t>(missing * shape.num_kv_heads * shape.head_dim),
                                  0.5F);
    for (index_t layer = 0; layer < shape.num_layers; ++layer)
      if (manager.try_append(got.id, layer, rows, rows) != kvcache::status::ok)
        return std::printf("no room\n");
    manager.release(got.id);  // stays reusable until its bytes are needed
    return std::printf("%-6s %2td of %2zu tokens were there\n", who, got.reused, prompt.size());
  };

  const prefix_space shop{.model = "tiny", .tenant = "shop"};
  ask("Ann", shop, "You answer questions about shoes. Do you have them in red?");
  ask("Bob", shop, "You answer questions about shoes. Do they come in size 48?");
  ask("Ann", shop, "You answer questions about shoes. Do you have them in red? We do. And in blue?");
  ask("Eve", {.model = "tiny", .tenant = "other"}, "You answer questions about shoes. What did Ann ask?");

  for (const char* text :
       {"a long text about something else, one", "the next text, and it is not shorter",
        "third: texts like these push others out", "fourth of them, as long as the others"})
    ask("Carol", shop, text);
  std::printf("%s\n",
              manager.counts().of(kvcache::serving::rung::drop) > 0 ? "blocks had to go" : "all fits");
  ask("Bob", shop, "You answer questions about shoes. Do they come in size 48?");
  std::printf("%s\n", manager.bytes() <= manager.budget() ? "within the budget" : "over the budget");
}
