// SPDX-License-Identifier: MIT
// The arguments of `plan`.
#pragma once

#include "common/program.hpp"
#include "plan/hf_shape.hpp"

#include <kvcache/core/checked.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/serving/planner.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace planning {

using program::usage_error;

struct command_line {
  model_shape shape;
  weight_source weights = weight_source::unknown;
  index_t memory_bytes = 0;
  index_t num_sequences = 1;
  index_t context = 0;
  kvcache::serving::plan_options options;
};

namespace detail {

/// 10^digits
constexpr index_t power_of_ten(std::size_t digits) noexcept {
  index_t power = 1;
  for (; digits > 0; --digits) power *= 10;
  return power;
}

/// What a unit stands for, as memory is sold: kB, KiB and K are 1,024 bytes.
inline std::optional<index_t> unit_bytes(std::string_view unit) {
  constexpr std::string_view letters = "KMGT";
  if (unit.empty() || unit == "B") return 1;
  const char letter = unit.front() == 'k' ? 'K' : unit.front();
  const std::size_t power = letters.find(letter);
  const std::string_view rest = unit.substr(1);
  if (power == std::string_view::npos || (!rest.empty() && rest != "B" && rest != "iB")) return std::nullopt;
  return index_t{1} << (10 * (power + 1));
}

}  // namespace detail

/// "16GB", "1.5 GiB", "4096": whole bytes, rounded down. Throws usage_error naming the option.
[[nodiscard]] inline index_t parse_bytes(const std::string& option, const std::string& text) {
  const auto refuse = [&]() -> usage_error {
    return usage_error(option + ": '" + text + "' is not a size such as 16GB, 512MB or 1.5GB");
  };
  constexpr std::string_view digits = "0123456789";
  const std::size_t whole_end = std::min(text.find_first_not_of(digits), text.size());
  std::size_t end = whole_end;
  std::string fraction;
  if (end < text.size() && text[end] == '.') {
    end = std::min(text.find_first_not_of(digits, end + 1), text.size());
    fraction = text.substr(whole_end + 1, end - whole_end - 1);
    if (fraction.empty() || fraction.size() > 6) throw refuse();
  }
  const std::size_t unit_at = std::min(text.find_first_not_of(' ', end), text.size());
  const auto unit = detail::unit_bytes(std::string_view(text).substr(unit_at));
  index_t whole = 0;
  const auto read = std::from_chars(text.data(), text.data() + whole_end, whole);
  if (whole_end == 0 || read.ec != std::errc() || !unit) throw refuse();
  index_t part = 0;
  std::from_chars(fraction.data(), fraction.data() + fraction.size(), part);
  try {
    return kvcache::checked_add(kvcache::checked_mul(whole, *unit),
                                part * *unit / detail::power_of_ten(fraction.size()));
  } catch (const kvcache::shape_error&) {
    throw refuse();
  }
}

/// "int8,sinks=4,tail=128" as a choice. Throws usage_error that lists the codecs there are.
[[nodiscard]] inline kvcache::serving::codec_choice parse_codec(const std::string& spec) {
  kvcache::serving::codec_choice choice;
  try {
    const kvcache::any_codec codec = kvcache::make_codec(spec);
    choice.sink_tokens = codec.sink_tokens;
    choice.tail_tokens = codec.tail_tokens;
    choice.exact_as = codec.exact_as;
  } catch (const std::invalid_argument& error) {
    throw usage_error(std::string("--codec: ") + error.what());
  }
  for (std::string_view rest = spec; !rest.empty();) {  // it is known to be one
    const std::string_view piece = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(piece.size() + 1, rest.size()));
    if (piece.find('=') == std::string_view::npos) choice.keys = choice.values = piece;
    if (piece.starts_with("k=")) choice.keys = piece.substr(2);
    if (piece.starts_with("v=")) choice.values = piece.substr(2);
  }
  // The values of channel are those of rotated, and so they have to be called beside other keys.
  if (choice.values != choice.keys && choice.values.starts_with("channel"))
    choice.values = "rotated" + choice.values.substr(std::string_view("channel").size());
  return choice;
}

namespace detail {

/// What CLI11 puts the arguments into.
struct arguments {
  std::filesystem::path model;
  std::optional<index_t> layers, q_heads, kv_heads, head_dim, model_context, context;
  index_t sequences = 1;
  std::string memory, preset, reserve, weights;
  std::vector<std::string> codecs;
  std::vector<index_t> block_sizes;
  bool slow_encoding = false;
  bool knows_rope = false;
  double worst = kvcache::serving::plan_options{}.worst_kl_ratio;
};

inline void declare(CLI::App& app, arguments& args) {
  app.add_option("model", args.model, "config.json of a Hugging Face model, or its folder");
  app.add_option("--layers", args.layers, "without a config.json: layers");
  app.add_option("--q-heads", args.q_heads, "query heads; as many as KV heads unless given");
  app.add_option("--kv-heads", args.kv_heads, "KV heads");
  app.add_option("--head-dim", args.head_dim, "numbers in a row of one head");
  app.add_option("--model-context", args.model_context, "tokens that the model was made for");
  app.add_option("--weights", args.weights,
                 "bytes of the weights: 4.6GB; 0 where the memory is the cache's alone");
  auto* preset =
      app.add_option("--preset", args.preset, "a machine: 8GB, 16GB, 24GB, 64GB, with a reserve [16GB]");
  app.add_option("--memory", args.memory, "for weights, reserve and cache; 1 GB is 2^30 bytes")
      ->excludes(preset);
  app.add_option("--reserve", args.reserve, "of the memory, for all else [the preset's, or 0]");
  app.add_option("--sequences", args.sequences, "at the same time")->capture_default_str();
  app.add_option("--context", args.context, "tokens of each sequence [what the model was made for, or 4096]");
  app.add_option("--codec", args.codecs, "only these: int8,sinks=4,tail=128,exact=f16; may be repeated");
  app.add_option("--block-size", args.block_sizes, "tokens, the best of them is taken [64,128]")
      ->delimiter(',');
  app.add_option("--worst", args.worst, "most loss to recommend, in times that of int8 behind a bf16 tail")
      ->capture_default_str();
  app.add_flag("--slow-encoding", args.slow_encoding, "recommend trellis, too");
  app.add_flag("--rope", args.knows_rope,
               "make_cache will get the model's rope_config: weigh centred codecs, too");
}

inline void read_model(const arguments& args, command_line& out) {
  if (!args.model.empty()) {
    if (args.layers || args.q_heads || args.kv_heads || args.head_dim || args.model_context)
      throw usage_error("a config.json and numbers of a model: one of them");
    const hf_model model = read_hf_shape(args.model);
    out.shape = model.shape;
    out.weights = model.weights;
  } else {
    if (!args.layers || !args.kv_heads || !args.head_dim)
      throw usage_error("needs a config.json, or --layers, --kv-heads and --head-dim");
    out.shape = {*args.layers,
                 args.q_heads.value_or(*args.kv_heads),
                 *args.kv_heads,
                 *args.head_dim,
                 0,
                 args.model_context.value_or(0)};
  }
  if (!args.weights.empty()) {
    out.shape.weight_bytes = parse_bytes("--weights", args.weights);
    out.weights = weight_source::given;
  }
}

inline void read_memory(const arguments& args, command_line& out) {
  if (!args.memory.empty()) {
    out.memory_bytes = parse_bytes("--memory", args.memory);
  } else {
    const std::string name = args.preset.empty() ? "16GB" : args.preset;
    const auto* preset = kvcache::serving::find_preset(name);
    if (preset == nullptr)
      throw usage_error("--preset: there is no '" + name + "'; there is 8GB, 16GB, 24GB, 64GB");
    out.memory_bytes = preset->memory_bytes;
    out.options.reserve_bytes = preset->reserve_bytes;
  }
  if (!args.reserve.empty()) out.options.reserve_bytes = parse_bytes("--reserve", args.reserve);
}

}  // namespace detail

/// \return the options, or the exit code when there is nothing to plan: 0 after --help, 2 after a bad argument
/// Throws usage_error, llama::model_error.
[[nodiscard]] inline std::optional<command_line> parse_command_line(int argc, char** argv, int& exit_code) {
  detail::arguments args;
  CLI::App app{
      "Which codec, block size and budget hold so many sequences of such a length in a machine's memory, "
      "what that "
      "costs in quality, and how long the sequences may become."};
  detail::declare(app, args);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  command_line out;
  detail::read_model(args, out);
  detail::read_memory(args, out);
  out.num_sequences = args.sequences;
  const index_t limit = out.shape.max_context;
  out.context = args.context.value_or(limit > 0 ? limit : 4096);
  out.options.knows_rope = args.knows_rope;
  out.options.codecs = kvcache::serving::default_choices(args.knows_rope);
  if (!args.codecs.empty()) out.options.codecs.clear();
  for (const std::string& spec : args.codecs) out.options.codecs.push_back(parse_codec(spec));
  if (!args.block_sizes.empty()) out.options.block_sizes = args.block_sizes;
  if (!(args.worst >= 0)) throw usage_error("--worst: 0 or more");
  out.options.worst_kl_ratio = args.worst;
  out.options.slow_encoding = args.slow_encoding;
  return out;
}

}  // namespace planning
