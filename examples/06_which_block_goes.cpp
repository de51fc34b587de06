// SPDX-License-Identifier: MIT
// A cache of six blocks that two conversations share: what an eviction policy is told, and which block it gives up. The
// policy keeps books only; the blocks themselves may lie anywhere.
#include <kvcache/eviction/lru.hpp>

#include <cstdio>

using kvcache::eviction::block_key;

int main() {
  // Keys stand for content: a hash of a block's tokens and of the blocks before it, say.
  constexpr block_key system_prompt = 100, ann_1 = 201, ann_2 = 202, bob_1 = 301, bob_2 = 302, carol_1 = 401;
  kvcache::eviction::lru policy(6);
  const auto evict = [&] {
    if (const auto key = policy.evict()) {
      std::printf("block %d goes\n", static_cast<int>(*key));
    } else {
      std::printf("nothing may go\n");
    }
  };

  policy.insert(system_prompt);
  policy.insert(ann_1, {.parent = system_prompt});
  policy.insert(ann_2, {.parent = ann_1});
  policy.touch(system_prompt);  // Bob's request hits it
  policy.insert(bob_1, {.parent = system_prompt});
  policy.insert(bob_2, {.parent = bob_1});
  std::printf("%td of %td blocks\n", policy.size(), policy.capacity());

  policy.pin(bob_2);  // Bob's answer is being written: that holds his whole chain
  evict();            // Ann was quiet for longer; her chain goes from its tail
  evict();
  evict();

  policy.unpin(bob_2);  // Bob is done; what he has stays until the room is needed
  policy.touch(system_prompt);
  policy.insert(carol_1, {.parent = system_prompt});
  while (policy.size() > 0) evict();  // the head that all of them share is the last
}
