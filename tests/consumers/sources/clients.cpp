// SPDX-License-Identifier: MIT
// Tiers of the installed package; without a server the one in Redis misses.
#include <kvcache/store/lmdb_tier.hpp>
#include <kvcache/store/redis_tier.hpp>

#include <vector>

int main() {
  kvcache::store::lmdb_tier local("consumer-tier");
  kvcache::store::redis_tier remote({.servers = {{.host = "127.0.0.1", .port = 1}}});
  const std::vector<kvcache::token_id> tokens{1, 2, 3};
  const std::vector<std::byte> payload(100);
  std::vector<std::byte> out;
  const bool kept = local.put("space", tokens, payload) && local.get("space", tokens, out) && out == payload;
  return kept && !remote.get("space", tokens, out) ? 0 : 1;
}
