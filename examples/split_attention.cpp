// SPDX-License-Identifier: MIT
// Attention over several processes, by MPI: keys and values split by token, or by head, a prompt and then tokens one by
// one for three sequences at once. Compared with one process, and what goes over the wire counted.
//
//   mpirun -n 4 split_attention --decode 64
#include "split_attention/engines.hpp"
#include "split_attention/toy_model.hpp"

#include <kvcache/interop/mpi.hpp>
#include <kvcache/kernel/select.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace {

using kvcache::index_t;
using split_attention::engine;
using split_attention::toy_model;

struct settings {
  std::vector<index_t> prompts{700, 37, 2};  // tokens of each sequence
  index_t num_decoded = 48;                  // tokens of each
};

/// Everything that attention said, and the tokens that came of it.
struct transcript {
  std::vector<float> prefill;  // outputs in the order they were computed
  std::vector<float> decode;
  std::vector<index_t> tokens;  // [num_decoded + 1, sequences]
  index_t prefill_bytes = 0;    // received by this process
  index_t decode_bytes = 0;
};

/// The largest Euclidean norms of rows, for the bound.
struct norms {
  double q = 0, k = 0, v = 0;

  static void update(double& most, std::span<const float> rows, index_t head_dim) {
    for (std::size_t first = 0; first < rows.size(); first += static_cast<std::size_t>(head_dim)) {
      double sum = 0;
      for (const float x : rows.subspan(first, static_cast<std::size_t>(head_dim)))
        sum += double{x} * double{x};
      most = std::max(most, std::sqrt(sum));
    }
  }
};

/// Prompts, then token by token. \param received  bytes this process has received so far
template <class Received>
transcript generate(const toy_model& model, const settings& run, engine& attention, Received received,
                    norms* seen = nullptr) {
  const auto& shape = model.shape();
  const auto num_sequences = static_cast<index_t>(run.prompts.size());
  const auto note_norms = [&](const split_attention::token_rows& rows) {
    if (seen == nullptr) return;
    norms::update(seen->q, rows.q, shape.head_dim);
    norms::update(seen->k, rows.k, shape.head_dim);
    norms::update(seen->v, rows.v, shape.head_dim);
  };
  transcript said;
  std::vector<float> out;

  const index_t before_prefill = received();
  for (index_t s = 0; s < num_sequences; ++s) {
    std::vector<index_t> prompt(static_cast<std::size_t>(run.prompts[static_cast<std::size_t>(s)]));
    for (std::size_t t = 0; t < prompt.size(); ++t)
      prompt[t] = (static_cast<index_t>(t) * 31 + s * 7) % shape.vocab_size;
    out.resize(prompt.size() * static_cast<std::size_t>(shape.q_size()));
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      split_attention::token_rows rows;
      model.add_rows(prompt, 0, layer, rows);
      note_norms(rows);
      attention.prefill(s, layer, rows, out);
      said.prefill.insert(said.prefill.end(), out.begin(), out.end());
    }
    said.tokens.push_back(model.next_token(std::span(out).last(static_cast<std::size_t>(shape.q_size()))));
  }
  const index_t before_decode = received();
  for (index_t step = 0; step < run.num_decoded; ++step) {
    const std::vector<index_t> newest(said.tokens.end() - num_sequences, said.tokens.end());
    out.resize(static_cast<std::size_t>(num_sequences * shape.q_size()));
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      split_attention::token_rows rows;
      for (std::size_t s = 0; s < newest.size(); ++s)
        model.add_rows({&newest[s], 1}, run.prompts[s] + step, layer, rows);
      note_norms(rows);
      attention.decode(step, layer, rows, out);
      said.decode.insert(said.decode.end(), out.begin(), out.end());
    }
    for (index_t s = 0; s < num_sequences; ++s)
      said.tokens.push_back(
          model.next_token(split_attention::pieces(std::span<const float>(out), shape.q_size(), s)));
  }
  said.prefill_bytes = before_decode - before_prefill;
  said.decode_bytes = received() - before_decode;
  return said;
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    if (!(difference <= most)) most = difference;  // NaN too
  }
  return most;
}

bool same_bits(const transcript& a, const transcript& b) {
  const auto same = [](const std::vector<float>& x, const std::vector<float>& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
  };
  return same(a.prefill, b.prefill) && same(a.decode, b.decode) && a.tokens == b.tokens;
}

/// Whether all processes have the same outputs, to the bit.
bool same_everywhere(const transcript& said) {
  std::uint64_t hash = 0xcbf29ce484222325U;  // FNV-1a
  for (const auto* outs : {&said.prefill, &said.decode})
    for (const float x : *outs) hash = (hash ^ std::bit_cast<std::uint32_t>(x)) * 0x100000001b3U;
  std::uint64_t least = 0, most = 0;
  MPI_Allreduce(&hash, &least, 1, MPI_UINT64_T, MPI_MIN, MPI_COMM_WORLD);
  MPI_Allreduce(&hash, &most, 1, MPI_UINT64_T, MPI_MAX, MPI_COMM_WORLD);
  return least == most;
}

/// Whether a statement that each process judges holds in all of them.
bool holds_everywhere(bool here) {
  int mine = here ? 1 : 0, all = 0;
  MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_LAND, MPI_COMM_WORLD);
  return all != 0;
}

index_t sum_over_processes(index_t here) {
  long long mine = here, all = 0;
  MPI_Allreduce(&mine, &all, 1, MPI_LONG_LONG, MPI_SUM, MPI_COMM_WORLD);
  return static_cast<index_t>(all);
}

/// Bytes that all processes together receive for one token in one layer, as docs/across_machines.md states.
index_t stated_bytes(const split_attention::model_shape& shape, index_t n, bool by_token) {
  if (!by_token) return (n - 1) * shape.q_size() * 4;
  index_t whole = 1, rounds = 0;
  while (2 * whole <= n) whole *= 2, ++rounds;
  return (rounds * whole + 2 * (n - whole)) * 4 * shape.num_q_heads * (shape.head_dim + 1);
}

/// What the processes may differ by from one alone: both are off from exact arithmetic by what attend states, and every
/// level of merging adds what merge_parts states.
double bound(const norms& seen, const split_attention::model_shape& shape, index_t longest, index_t n) {
  const double scores = seen.q * seen.k / std::sqrt(static_cast<double>(shape.head_dim));
  const double levels = n == 1 ? 0 : std::ceil(std::log2(static_cast<double>(n))) + 1;
  const bool on_amx = kvcache::kernel::best().level == kvcache::kernel::isa::amx;
  const double attends = (on_amx ? 8 : 1) * 1e-6 * (4 + scores) + (on_amx ? 0x1p-6 + scores / 250 : 0);
  const double merges = levels * 1e-7 * (3 + scores + std::log(static_cast<double>(longest)));
  return (2 * attends + merges) * seen.v;
}

class report {
 public:
  explicit report(bool prints) : prints_(prints) {}

  void line(const std::string& what, const std::string& found, bool good) {
    if (prints_) std::printf("  %-47s %-34s %s\n", what.c_str(), found.c_str(), good ? "ok" : "WRONG");
    good_ = good_ && good;
  }
  [[nodiscard]] bool good() const noexcept { return good_; }

 private:
  bool prints_;
  bool good_ = true;
};

std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2g", x);
  return text;
}

/// One way to split: outputs against the whole, and bytes against the formula.
void compare(report& to, const transcript& split, const transcript& whole, double limit,
             index_t num_prompt_tokens, index_t num_decoded_tokens, index_t num_layers, index_t stated) {
  const auto phase = [&](const char* name, const auto& a, const auto& b, index_t bytes, index_t num_tokens) {
    const double off = largest_difference(a, b);
    to.line(std::string(name) + ": largest difference", number(off) + ", may be " + number(limit),
            holds_everywhere(off <= limit));
    const index_t sum = sum_over_processes(bytes);
    to.line(std::string(name) + ": bytes per token and layer",
            std::to_string(sum / (num_tokens * num_layers)) + ", stated " + std::to_string(stated),
            sum == stated * num_tokens * num_layers);
  };
  phase("prompts", split.prefill, whole.prefill, split.prefill_bytes, num_prompt_tokens);
  phase("decoding", split.decode, whole.decode, split.decode_bytes, num_decoded_tokens);
  const bool same_tokens = holds_everywhere(split.tokens == whole.tokens);
  to.line("tokens", std::to_string(whole.tokens.size()) + (same_tokens ? ", the same" : ", others"),
          same_tokens);
  to.line("the same bits in every process", "", same_everywhere(split));
}

bool run_all(const settings& run) {
  kvcache::mpi_group group(MPI_COMM_WORLD);
  const toy_model model({});
  const auto& shape = model.shape();
  const auto num_sequences = static_cast<index_t>(run.prompts.size());
  index_t num_prompt_tokens = 0;
  for (const index_t n : run.prompts) num_prompt_tokens += n;
  const index_t num_decoded_tokens = num_sequences * run.num_decoded;
  const auto received = [&group] { return group.bytes_received(); };
  const bool prints = group.rank() == 0;
  report results(prints);

  norms seen;
  split_attention::local_engine whole(shape, num_sequences, 1);
  const transcript expected = generate(model, run, whole, received, &seen);
  const index_t longest = *std::max_element(run.prompts.begin(), run.prompts.end()) + run.num_decoded;

  if (prints) {
    std::printf(
        "%td processes; %td sequences, %td tokens of prompts, then %td each; %td layers, %td query heads on "
        "%td "
        "of %td dimensions\n\nkeys and values split by token\n",
        group.size(), num_sequences, num_prompt_tokens, run.num_decoded, shape.num_layers, shape.num_q_heads,
        shape.num_kv_heads, shape.head_dim);
  }
  split_attention::split_keys_engine by_token(shape, num_sequences, group);
  const transcript keys = generate(model, run, by_token, received);
  compare(results, keys, expected, bound(seen, shape, longest, group.size()), num_prompt_tokens,
          num_decoded_tokens, shape.num_layers, stated_bytes(shape, group.size(), true));
  split_attention::local_engine parts_here(shape, num_sequences, group.size());
  results.line("the same bits as the same parts in one process", "",
               holds_everywhere(same_bits(keys, generate(model, run, parts_here, received))));
  const index_t kept = sum_over_processes(by_token.num_tokens());
  results.line("tokens kept, in all processes", std::to_string(kept),
               kept == num_prompt_tokens + num_decoded_tokens);

  if (prints) std::printf("\nheads split\n");
  split_attention::split_heads_engine by_head(shape, num_sequences, group);
  const transcript heads = generate(model, run, by_head, received);
  compare(results, heads, expected, 0, num_prompt_tokens, num_decoded_tokens, shape.num_layers,
          stated_bytes(shape, group.size(), false));
  return results.good();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Attention whose keys or heads are spread over processes; start it with mpirun.");
  settings run;
  app.add_option("--prompts", run.prompts, "tokens of each sequence's prompt")
      ->delimiter(',')
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  app.add_option("--decode", run.num_decoded, "tokens to decode after it")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  MPI_Init(&argc, &argv);
  bool good = false;
  try {
    good = run_all(run);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
  return good ? 0 : 1;
}
