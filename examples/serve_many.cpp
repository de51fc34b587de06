// SPDX-License-Identifier: MIT
// Serves dozens of conversations that share system prompts, by continuous batching, under a budget that does not hold
// them all; ends with a table of what reuse was worth. With --verify, every conversation is also run alone, and must
// come out the same to the last bit of its logits.
//
//   serve_many
//   serve_many --conversations 96 --budget 16MiB --policy s3_fifo --verify
//   serve_many --budget 8MiB --spill spilled --verify     what is evicted goes to files, and comes back
#include "common/program.hpp"
#include "serving/alone.hpp"
#include "serving/batch_decoder.hpp"
#include "serving/command_line.hpp"
#include "serving/conversation.hpp"
#include "serving/process_memory.hpp"
#include "serving/report.hpp"
#include "serving/server.hpp"
#include "serving/spill_folder.hpp"

#include "llama/load_model.hpp"
#include "llama/tokenizer.hpp"

#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/eviction/arc.hpp>
#include <kvcache/eviction/lru.hpp>
#include <kvcache/eviction/priority.hpp>
#include <kvcache/eviction/s3_fifo.hpp>
#include <kvcache/serving/cache_manager.hpp>
#include <kvcache/serving/metrics.hpp>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using kvcache::page_pool;
using kvcache::serving::rung;
using serving::command_line;
using serving::conversation;
using serving::index_t;

using pool_type = page_pool<kvcache::codec::bf16>;
using cold_pool_type = page_pool<kvcache::codec::int8>;

constexpr index_t block_size = 16;       // tokens; what conversations share is shared by whole blocks
constexpr index_t slab_bytes = 1 << 19;  // small beside the budget: memory goes back by whole slabs

/// What happens to the block of the policy's choice.
kvcache::serving::ladder_options ladder_of(const command_line& options) {
  kvcache::serving::ladder_options ladder;
  if (options.recode) ladder.high = 0.85, ladder.low = 0.75;  // room for both forms at once
  if (options.recode && !options.spill.empty()) {
    ladder.rungs = {rung::recode, rung::spill, rung::drop, rung::refuse};
  } else if (options.recode) {
    ladder.rungs = {rung::recode, rung::drop, rung::refuse, rung::spill};
  } else if (!options.spill.empty()) {
    ladder.rungs = {rung::spill, rung::drop, rung::refuse, rung::recode};
  } else {
    ladder.rungs = {rung::drop, rung::refuse, rung::recode, rung::spill};
  }
  return ladder;
}

/// Serves conversations that have just begun to their ends.
template <class Policy>
serving::served serve(const char* name, const serving::batch_decoder& model, const command_line& options,
                      serving::workload& work, bool reuse) {
  using manager_type =
      kvcache::serving::cache_manager<pool_type, Policy, cold_pool_type, serving::spill_folder,
                                      kvcache::serving::metrics_recorder>;
  const auto shape = llama::cache_shape_of(model.config(), block_size);
  serving::mapped_memory mapped;
  // A slab with a page in use stays with its pool. Of one page each, or few, they go from one pool to the other.
  const kvcache::pool_options slabs{.memory = &mapped, .slab_bytes = options.recode ? 1 : slab_bytes};
  const kvcache::pool_options cold_slabs{.memory = &mapped, .slab_bytes = slab_bytes / 4};
  const pool_type pool(shape, slabs);
  const cold_pool_type cold(shape, cold_slabs);
  std::optional<serving::spill_folder> spilled;
  if (!options.spill.empty()) spilled.emplace(options.spill);
  manager_type manager(pool, {.budget_bytes = options.budget_bytes, .ladder = ladder_of(options)}, cold,
                       spilled ? &*spilled : nullptr);
  serving::server_options how = options.server;
  how.reuse = reuse;
  how.maps_files = spilled.has_value();
  serving::live_line line(name);
  serving::server<manager_type> server(model, manager, work.systems, work.conversations, how);
  if (spilled) spilled->watch = [&] { server.look(); };
  auto figures = server.run([&](const serving::serving_figures& f) { line(f); });
  manager.check();
  std::optional<serving::spill_figures> through;
  if (spilled) through = spilled->figures();
  return {name, std::move(figures), manager.observer().values, through};
}

serving::served serve_by(const std::string& policy, const char* name, const serving::batch_decoder& model,
                         const command_line& options, serving::workload& work, bool reuse) {
  namespace eviction = kvcache::eviction;
  if (policy == "arc") return serve<eviction::arc>(name, model, options, work, reuse);
  if (policy == "s3_fifo") return serve<eviction::s3_fifo>(name, model, options, work, reuse);
  if (policy == "priority") return serve<eviction::priority>(name, model, options, work, reuse);
  return serve<eviction::lru>(name, model, options, work, reuse);
}

/// What people and system prompts say: the sample beside the model, or a sentence.
std::vector<index_t> source_text(const command_line& options, const llama::model_config& config) {
  std::string text =
      "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n";
  if (std::ifstream sample(options.model / "sample.txt"); sample)
    text.assign(std::istreambuf_iterator<char>(sample), {});
  return llama::load_tokenizer(options.model, {}, config.vocab_size).encode(text);
}

/// Of the keys and values of so many tokens.
index_t size_bytes(const serving::batch_decoder& model, index_t num_tokens) {
  const auto shape = llama::cache_shape_of(model.config(), block_size);
  return num_tokens * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim;  // two of 16 bits
}

/// How many conversations came out as they do alone, to the last bit.
index_t count_identical(const serving::batch_decoder& model, const std::vector<conversation>& begun,
                        const std::vector<conversation>& ended) {
  pool_type pool(llama::cache_shape_of(model.config(), block_size), {.slab_bytes = slab_bytes});
  index_t same = 0;
  for (std::size_t i = 0; i < begun.size(); ++i)
    same += serving::run_alone(model, begun[i], pool.sequence()) == ended[i] ? 1 : 0;
  return same;
}

/// Takes the memory that any run needs besides its cache, and reads the program, before that is measured.
void warm_up(const serving::batch_decoder& model, const command_line& options,
             const serving::workload& work) {
  constexpr std::size_t few = 3;
  serving::workload little{{}, {}};
  for (std::size_t i = 0; i < std::min(few, work.conversations.size()); ++i)
    little.conversations.push_back(work.conversations[i]);
  command_line tight = options;  // one at a time, so that something is evicted
  tight.server.max_active = 1;
  tight.budget_bytes =
      std::min(options.budget_bytes, 5 * size_bytes(model, options.workload.total_size()) / 2);
  (void)serve_by(options.policy, "starting", model, tight, little, true);
}

/// \return exit code
int run(const command_line& options) {
  const serving::batch_decoder model(llama::load_model(options.model));
  if (options.workload.total_size() > model.config().max_context)
    throw serving::usage_error("a conversation has " + std::to_string(options.workload.total_size()) +
                               " tokens at its end, the model's context " +
                               std::to_string(model.config().max_context));
  const auto begun = serving::make_workload(options.workload, source_text(options, model.config()));
  warm_up(model, options, begun);

  std::vector<serving::served> ways;
  serving::workload ended = begun, ended_without = begun;
  ways.push_back(serve_by(options.policy, "reuse", model, options, ended, true));
  if (options.compare)
    ways.push_back(serve_by(options.policy, "no reuse", model, options, ended_without, false));

  const index_t all_bytes =
      size_bytes(model, options.workload.num_conversations * options.workload.total_size());
  std::cout << options.workload.num_conversations << " conversations of " << options.workload.num_turns
            << " turns, " << options.workload.total_size() << " tokens each at the end, "
            << llama::with_commas(all_bytes) << " bytes of keys and values; policy " << options.policy
            << (options.recode ? ", re-encoding" : "");
  if (!options.spill.empty()) std::cout << ", spilling (" << serving::spill_folder::kind << ")";
  std::cout << "\n\n";
  serving::write_table(std::cout, ways);
  if (!options.spill.empty())
    std::cout << "\nOf the process: its anonymous memory (RssAnon), looked at after every step and every "
                 "block that\n"
                 "goes or comes. Pages of files that the system lends, and takes back at will, are apart.\n";
  bool good = true;
  if (options.verify) {
    const index_t same = count_identical(model, begun.conversations, ended.conversations);
    std::cout << "\nidentical to running alone: " << same << " of " << options.workload.num_conversations
              << " conversations\n";
    if (options.recode) std::cout << "(what was re-encoded comes back with errors: texts may differ)\n";
    good = same == options.workload.num_conversations &&
           (!options.compare || ended_without.conversations == ended.conversations);
    good = good || options.recode;  // which loses something, as was asked for
  }
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  return program::exit_code_of("serve_many", [&] {
    int exit_code = 0;
    const auto options = serving::parse_command_line(argc, argv, exit_code);
    return options ? run(*options) : exit_code;
  });
}
