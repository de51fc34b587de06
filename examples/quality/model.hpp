// SPDX-License-Identifier: MIT
// What a codec does to a model: distributions of the next token against those over an f32 cache, along the same tokens,
// which enter one by one, so that every key and value was computed over a compressed cache. And facts recalled.
#pragma once

#include "llama/byte_tokenizer.hpp"
#include "llama/decoder.hpp"
#include "llama/generation.hpp"
#include "llama/input_file.hpp"
#include "llama/load_model.hpp"
#include "llama/model_error.hpp"
#include "quality/calibration.hpp"
#include "quality/metrics.hpp"
#include "quality/random_numbers.hpp"

#include <kvcache/codec/concepts.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace quality {

using kvcache::index_t;

struct model_settings {
  index_t num_tokens = 1024;  ///< of each text; at most the model's context
  index_t num_texts = 8;
  index_t num_documents = 64;  ///< recall documents, as many as there are
  index_t block_size = 128;    ///< tokens
};

/// "klt3.4": codec::klt behind centred keys, of 3.4 bits, calibrated on what is left of the model's sample.
[[nodiscard]] inline bool is_klt_spec(std::string_view spec) { return spec.starts_with("klt"); }
/// Throws std::invalid_argument if it names no number of bits from 1 to 8.
[[nodiscard]] inline double klt_bits_in(std::string_view spec) {
  const std::string_view number = spec.substr(3, std::min(spec.find(','), spec.size()) - 3);
  double bits = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), bits);
  if (error != std::errc{} || end != number.data() + number.size() || !(bits >= 1 && bits <= 8))
    throw std::invalid_argument("'" + std::string(spec) + "' names no bits from 1 to 8, as in klt3.4");
  return bits;
}

/// The tail and the sinks of such a spec, and how they are stored. Throws std::invalid_argument if it says anything else behind the bits.
[[nodiscard]] inline any_codec klt_tail_in(std::string_view spec) {
  const std::size_t end = std::min(spec.find(','), spec.size());
  any_codec options = kvcache::make_codec("bf16" + std::string(spec.substr(end)));
  if (options.keys.side_name() != "bf16" || options.values.side_name() != "bf16")
    throw std::invalid_argument("'" + std::string(spec) +
                                "': behind klt's bits there is tail=, sinks=, exact=");
  return options;
}

/// Token ids; questions are asked from `first_question` on: key, value, key, value ...
struct recall_document {
  std::vector<index_t> ids;
  std::size_t first_question = 0;
};

struct model_quality {
  double median = 0;  ///< divergence of the next token's distribution, nats
  double mean = 0;
  double extreme = 0;     ///< what 99.9 % of all positions do not exceed
  double same_first = 0;  ///< share of positions with the same likeliest token
  index_t correct = 0;    ///< answers, of `questions`
  index_t questions = 0;
};

/// The texts and documents that a model is measured on, and what it says over an f32 cache.
/// The second half of each text is measured, so that there is always a context.
class model_reference {
 public:
  /// \param folder  a model as llama::load_model takes it; texts are from the sample.txt in it, or the model writes them;
  ///                recall documents from its reference.json, if there is one
  /// Throws llama::model_error.
  model_reference(const std::filesystem::path& folder, const model_settings& settings);

  /// \param spec  of a codec, see make_codec; or "klt3.4", see is_klt_spec
  [[nodiscard]] model_quality measure(const std::string& spec) const;

  /// Bits per number of a block of the codec in this model, scales and padding included, mean over layers.
  [[nodiscard]] double bits(const std::string& codec) const {
    const auto g = kvcache::geometry_of(shape());
    const layered_codec made = codec_of(codec);
    index_t bytes = 0;
    for (index_t layer = 0; layer < config().num_layers; ++layer)
      bytes += kvcache::block_bytes_at(made, layer, g);
    return 8.0 * static_cast<double>(bytes) /
           static_cast<double>(config().num_layers * 2 * g.block_size * g.head_dim);
  }

  [[nodiscard]] const llama::model_config& config() const noexcept { return model_.config(); }
  [[nodiscard]] std::size_t num_positions() const noexcept { return expected_.size(); }

 private:
  using ids = std::vector<index_t>;

  [[nodiscard]] kvcache::cache_shape shape() const {
    return llama::cache_shape_of(model_.config(), settings_.block_size);
  }
  [[nodiscard]] ids written_text() const;
  void read_documents(const std::filesystem::path& file);

  /// The codec of a spec; that of a klt spec from texts that are not measured, which takes some seconds once.
  [[nodiscard]] layered_codec codec_of(const std::string& spec) const;
  [[nodiscard]] const klt_calibration& calibration() const;

  /// Calls back(position, logits) after each token of `text`, which enter one by one.
  template <class Back>
  void stream(const ids& text, const layered_codec& codec, Back back) const {
    auto cache = cache_of(codec, shape());
    for (std::size_t i = 0; i < text.size(); ++i) {
      const llama::matrix logits = model_.forward(std::span(&text[i], 1), cache);
      back(i, llama::row_of(logits, 0));
    }
  }
  /// Calls back(logarithms) at each position of the second half of each text.
  template <class Back>
  void stream_texts(std::span<const ids> texts, const layered_codec& codec, Back back) const {
    for (const ids& text : texts) {
      stream(text, codec, [&](std::size_t at, std::span<const float> logits) {
        if (at >= text.size() / 2) back(log_softmax(logits));
      });
    }
  }
  void count_answers(const layered_codec& codec, model_quality& result) const;

  llama::decoder model_;
  model_settings settings_;
  std::vector<ids> texts_;
  std::vector<ids> other_texts_;  // for calibration
  std::vector<recall_document> documents_;
  std::vector<std::vector<double>> expected_;  // of each measured position, logarithms
  mutable std::unique_ptr<const klt_calibration> calibration_;
};

inline model_reference::model_reference(const std::filesystem::path& folder, const model_settings& settings)
    : model_(llama::load_model(folder)), settings_(settings) {
  settings_.num_tokens = std::min(settings.num_tokens, model_.config().max_context);
  ids all;
  if (std::ifstream sample(folder / "sample.txt", std::ios::binary); sample && config().vocab_size == 256) {
    all = llama::byte_tokenizer{}.encode(std::string{std::istreambuf_iterator<char>(sample), {}});
  } else {
    all = written_text();
  }
  const auto length = static_cast<std::size_t>(settings_.num_tokens);
  for (std::size_t at = 0; at + length <= all.size(); at += length) {
    auto& texts = std::ssize(texts_) < settings_.num_texts ? texts_ : other_texts_;
    texts.emplace_back(all.begin() + static_cast<std::ptrdiff_t>(at),
                       all.begin() + static_cast<std::ptrdiff_t>(at + length));
  }
  if (texts_.empty()) throw llama::model_error(folder / "sample.txt", "", "is shorter than one text");
  read_documents(folder / "reference.json");
  stream_texts(texts_, codec_of("f32"),
               [&](std::vector<double> logs) { expected_.push_back(std::move(logs)); });
}

/// Tokens of as many texts as asked for, drawn from the model itself.
inline model_reference::ids model_reference::written_text() const {
  kvcache::serial_executor serial;
  ids all;
  for (index_t i = 0; i < settings_.num_texts; ++i) {
    auto cache = kvcache::make_cache("paged/f32", shape());
    const ids start{config().bos_id.value_or(0)};
    const llama::generation_options options{
        .num_tokens = settings_.num_tokens - 1,
        .sampling = {.temperature = 0.8, .top_p = 1, .seed = static_cast<std::uint64_t>(i + 1)}};
    auto text = llama::generate(model_, start, cache, options, serial, {}).tokens;
    text.resize(static_cast<std::size_t>(settings_.num_tokens), start.front());  // it may have ended early
    all.insert(all.end(), text.begin(), text.end());
  }
  return all;
}

inline void model_reference::read_documents(const std::filesystem::path& file) {
  std::ifstream in(file);
  if (!in) return;
  try {
    const auto reference = nlohmann::json::parse(in);
    for (const auto& document : reference.at("recall_documents")) {
      if (std::ssize(documents_) == settings_.num_documents) break;
      documents_.push_back({document.at("ids").get<ids>(), document.at("first_question").get<std::size_t>()});
    }
  } catch (const nlohmann::json::exception& error) {
    throw llama::model_error(file, "recall_documents", llama::printable(error.what()));
  }
}

/// The text with facts scattered through its first three quarters and asked for at its end, as in recall documents: bytes 128
/// to 191 are keys, 192 to 255 values. Texts of less than 192 tokens get fewer facts.
inline std::vector<index_t> with_facts(std::vector<index_t> text, std::uint64_t seed) {
  random_numbers random(seed);
  const std::size_t num_facts = std::min(text.size() / 8, std::size_t{24});
  std::size_t question = text.size() - 2 * num_facts;
  for (std::size_t fact = 0; fact < num_facts; ++fact, question += 2) {
    const auto key = static_cast<index_t>(128 + (fact * 37 + seed) % 64);  // each once
    const auto value = static_cast<index_t>(192 + random.below(64));
    const std::size_t at = 2 * random.below(text.size() * 3 / 8);
    for (const std::size_t place : {at, question}) {
      text[place] = key;
      text[place + 1] = value;
    }
  }
  return text;
}

inline layered_codec model_reference::codec_of(const std::string& spec) const {
  if (!is_klt_spec(spec)) {
    const auto turns = std::make_shared<const kvcache::codec::rope_turns>(config().rope);
    return kvcache::make_codec_by_layer(spec, config().num_layers, config().head_dim, turns);
  }
  any_codec codec = calibration().codec(klt_bits_in(spec));
  const any_codec options = klt_tail_in(spec);
  codec.tail_tokens = options.tail_tokens;
  codec.sink_tokens = options.sink_tokens;
  codec.exact_as = options.exact_as;
  return codec;
}

inline const klt_calibration& model_reference::calibration() const {
  if (calibration_ != nullptr) return *calibration_;
  constexpr std::size_t num_weighed = 3;
  if (other_texts_.size() <= num_weighed)
    throw std::invalid_argument(
        "klt needs more of sample.txt than is measured: fewer --texts, or shorter ones");
  std::vector<ids> texts = other_texts_;
  for (std::size_t i = 0; !documents_.empty() && i < texts.size(); i += 2) texts[i] = with_facts(texts[i], i);
  auto made = std::make_unique<klt_calibration>(model_, shape(), texts);
  const auto weighed = std::span(texts).last(num_weighed);
  std::vector<std::vector<double>> exact;
  stream_texts(weighed, codec_of("f32"), [&](std::vector<double> logs) { exact.push_back(std::move(logs)); });
  made->weigh([&](const layered_codec& codec) {
    std::vector<double> divergences;
    stream_texts(weighed, codec, [&](const std::vector<double>& logs) {
      divergences.push_back(divergence(exact[divergences.size()], logs));
    });
    return quantile(divergences, 0.5);
  });
  calibration_ = std::move(made);
  return *calibration_;
}

inline void model_reference::count_answers(const layered_codec& codec, model_quality& result) const {
  for (const recall_document& document : documents_) {
    stream(document.ids, codec, [&](std::size_t at, std::span<const float> logits) {
      const bool is_key = at >= document.first_question && (at - document.first_question) % 2 == 0;
      if (!is_key || at + 1 == document.ids.size()) return;
      ++result.questions;
      if (llama::greedy_token(logits) == document.ids[at + 1]) ++result.correct;
    });
  }
}

inline model_quality model_reference::measure(const std::string& spec) const {
  const layered_codec codec = codec_of(spec);
  std::vector<double> divergences;
  std::size_t same = 0;
  stream_texts(texts_, codec, [&](const std::vector<double>& logs) {
    const std::vector<double>& exact = expected_[divergences.size()];
    divergences.push_back(divergence(exact, logs));
    const auto first = [](const std::vector<double>& of) {
      return std::max_element(of.begin(), of.end()) - of.begin();
    };
    if (first(exact) == first(logs)) ++same;
  });
  model_quality result{.median = quantile(divergences, 0.5),
                       .mean = quality::mean(divergences),
                       .extreme = quantile(divergences, 0.999),
                       .same_first = static_cast<double>(same) / static_cast<double>(divergences.size())};
  count_answers(codec, result);
  return result;
}

}  // namespace quality
