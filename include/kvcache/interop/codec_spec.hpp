// SPDX-License-Identifier: MIT
// make_codec: from a string to an any_codec; make_codec_by_layer: to one for each layer.
//
//   spec    = codec *( "," option )  |  option *( "," option )
//   codec   = name | name "+" name                                  keys + values
//   option  = "k=" name | "v=" name | "sinks=" tokens | "tail=" tokens | "exact=" ( "bf16" | "f16" | "f32" )
//           | "first=" n ":" codec | "last=" n ":" codec | "layers=" n [ "-" n ] ":" codec
//           | "rope=" ( "half" | "interleaved" ) ":" theta
//
//   "k=channel3,v=rotated3,first=2:int8,last=2:channel4+rotated4,tail=128,sinks=4"
//   "k=centred_trellis3,v=trellis3,rope=half:10000,tail=128"
//
// rope= says how the model rotates keys, all dims and without scaling; make_cache takes any rope_config instead. Codecs named
// centred_ take off the mean that turns so, and where they are told neither, the mean of each channel; without one of them
// rope= is refused, and so is one that says something else than the rope_config.
// Layers count from 0, "3-5" with both ends; of two options that name a layer the later counts, every other option is given
// once. Tail and sinks, and how these are stored, are the sequence's: where one layer's codec needs whole blocks, all layers
// have the tail (codec/by_layer.hpp). A tail is at most 65,536 tokens, sinks as many as a block has.
#pragma once

#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/named_codecs.hpp>
#include <kvcache/interop/spec_text.hpp>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

namespace detail {

/// Where a reader finds codecs; interop/low_rank_spec.hpp has one that knows more.
struct known_codec_source {
  /// Behind the options that every reader knows.
  static constexpr std::string_view more_options = {};

  [[nodiscard]] static std::optional<codec::any_keys> keys(std::string_view name) {
    const auto found = codec_named(name);
    return found ? std::optional(found->keys) : std::nullopt;
  }
  [[nodiscard]] static std::optional<codec::any_values> values(std::string_view name) {
    const auto found = codec_named(name);
    return found ? std::optional(found->values) : std::nullopt;
  }
  [[nodiscard]] static std::string list() {
    std::string all;
    for (const std::string& name : codec_names()) all.append(all.empty() ? "" : ", ").append(name);
    return all;
  }
  [[nodiscard]] static std::string names() {
    return list() + "; make_cache_with_low_rank also knows low_rank<rank>";
  }
};

/// Largest tail in a spec. It is allocated with the first token, so a string must not be able to ask for all memory; who
/// wants more sets any_codec::tail_tokens. Sinks are read up to it too, and the cache refuses more than a block has.
inline constexpr index_t max_spec_tokens = 65536;

using shared_turns = std::shared_ptr<const codec::rope_turns>;

/// Reads a codec's spec, piece by piece.
template <class Source = known_codec_source>
class codec_spec_reader {
 public:
  /// \param num_layers  0: options for some layers are refused
  /// \param head_dim    0: rope= is refused
  /// \param turns       how keys are rotated; null: rope= says it, or nothing does
  explicit codec_spec_reader(std::string_view spec, index_t num_layers = 0, index_t head_dim = 0,
                             const Source& source = {}, shared_turns turns = nullptr)
      : spec_(spec),
        source_(source),
        head_dim_(head_dim),
        turns_(std::move(turns)),
        of_layer_(static_cast<std::size_t>(num_layers), 0) {}

  /// Throws std::invalid_argument naming what was wrong and what there is, and shape_error where layers do not exist.
  any_codec read() {
    read_all();
    return codecs_.front();
  }

  codec::by_layer<any_codec> read_by_layer() {
    read_all();
    if (codecs_.size() == 1) of_layer_.clear();  // one for all
    return {std::move(codecs_), std::move(of_layer_)};
  }

 private:
  void read_all() {
    if (spec_.empty()) throw std::invalid_argument("kvcache: no codec is named; there is " + source_.names());
    if (spec_.back() == ',') refuse("it ends where a codec or an option is expected");
    bool first = true;
    for (std::string_view rest = spec_; !rest.empty(); first = false) {
      const std::string_view piece = rest.substr(0, rest.find(','));
      rest.remove_prefix(std::min(piece.size() + 1, rest.size()));
      const std::size_t equals = std::min(piece.find('='), piece.size());
      const std::string_view key = piece.substr(0, equals);
      if (first && equals == piece.size() && !is_option(key)) {
        codecs_.front() = codec_or_pair(piece);
        both_sides_ = piece;
        continue;
      }
      set_option(key, piece.substr(std::min(equals + 1, piece.size())));
    }
    if (!both_sides_.empty() && is_given("k") && is_given("v"))
      refuse("keys and values are given twice, by '" + shown(both_sides_) + "' and by k= and v=");
    if (is_given("exact") && std::none_of(codecs_.begin(), codecs_.end(), keeps_exact<any_codec>))
      refuse("exact= says how tail= and sinks= are stored, and there is neither");
    use_turns();
  }

  void use_turns() {
    bool turning = false;
    for (any_codec& codec : codecs_) {
      if (turns_ == nullptr) continue;
      auto turned = codec.keys.turning_with(turns_);
      turning = turning || turned.erased != codec.keys.erased;
      codec.keys = std::move(turned);
    }
    if (is_given("rope") && !turning) refuse("rope= is for codecs named centred_, and there is none");
  }

  [[noreturn]] void refuse(const std::string& reason) const {
    const std::string spec = "'" + shown(spec_) + "'";
    const bool named = reason.find(spec) != std::string::npos;  // no need to say it twice
    throw std::invalid_argument("kvcache: " + (named ? "" : spec + " is not a codec: ") + reason);
  }

  static bool is_option(std::string_view key) noexcept {
    constexpr std::string_view all[] = {"k",     "v",    "sinks",  "tail", "exact",
                                        "first", "last", "layers", "rope"};
    return std::find(std::begin(all), std::end(all), key) != std::end(all);
  }
  [[nodiscard]] bool is_given(std::string_view key) const noexcept {
    return std::find(given_.begin(), given_.end(), key) != given_.end();
  }

  void set_option(std::string_view key, std::string_view value) {
    any_codec& made = codecs_.front();
    if (!is_option(key))
      refuse((key.empty() ? "an option has no name" : "there is no option '" + shown(key) + "'") +
             "; there is k=, v=, sinks=, tail=, exact=, first=, last=, layers=, rope=" +
             std::string(Source::more_options));
    if (key == "first" || key == "last" || key == "layers") return set_layers(key, value);
    const std::string option = std::string(key) + "=";
    if (is_given(key)) refuse("'" + option + "' is given twice");
    given_.push_back(key);
    if (key == "rope") return set_rope(value);
    if (key == "exact") return set_exact(value);
    if (key == "k" || key == "v") {
      if (value.empty()) refuse("'" + option + "' lacks a codec; there is " + source_.names());
      if (key == "k") made.keys = keys_named(value);
      if (key == "v") made.values = values_named(value);
      return;
    }
    if (value.empty())
      refuse("'" + option + "' lacks a number of tokens, as in " + option + (key == "tail" ? "128" : "4"));
    (key == "tail" ? made.tail_tokens : made.sink_tokens) =
        number_in(value, "a number of tokens", max_spec_tokens);
  }

  /// "f16".
  void set_exact(std::string_view value) {
    const auto element = codec::exact_element_named(value);
    if (!element)
      refuse("'exact=" + shown(value) +
             "' does not say how tails and sinks are stored; there is bf16, f16, f32");
    codecs_.front().exact_as = *element;
  }

  /// "half:10000", "interleaved:500000".
  void set_rope(std::string_view value) {
    const std::string option = "'rope=" + shown(value) + "'";
    const std::size_t colon = value.find(':');
    const std::string_view pairing = value.substr(0, colon);
    const std::string_view number = colon == std::string_view::npos ? "" : value.substr(colon + 1);
    double theta = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), theta);
    if ((pairing != "half" && pairing != "interleaved") || error != std::errc{} ||
        end != number.data() + number.size() || !(theta > 0) || theta > 1e30)
      refuse(option + " does not say how keys are rotated; there is rope=half:10000, rope=interleaved:10000");
    if (head_dim_ == 0) refuse(option + " is for caches, which have a head_dim");
    auto said = std::make_shared<const codec::rope_turns>(
        rope_config{.head_dim = head_dim_,
                    .pairing = pairing == "half" ? rope_pairing::half : rope_pairing::interleaved,
                    .theta = theta});
    if (turns_ == nullptr)
      turns_ = std::move(said);
    else if (turns_->pairing() != said->pairing() || turns_->radians() != said->radians())
      refuse(option + " says something else than the rope_config");
  }

  /// "2:int8" for first and last; "3:int8", "3-5:channel4+rotated4" for layers. What is said later counts.
  void set_layers(std::string_view key, std::string_view value) {
    const std::string option = std::string(key) + "=" + shown(value);
    const std::size_t colon = std::min(value.find(':'), value.size());
    const std::string_view which = value.substr(0, colon);
    std::string lacks;
    if (which.empty()) lacks = "a number of layers";
    if (key == "layers" && which.substr(0, 1) == "-") lacks = "the layer that its range begins with";
    if (key == "layers" && which.size() > 1 && which.back() == '-')
      lacks = "the layer that its range ends with";
    if (colon + 1 >= value.size()) lacks.append(lacks.empty() ? "" : " and ").append("a codec behind ':'");
    if (!lacks.empty())
      refuse("'" + option + "' lacks " + lacks +
             "; there is first=2:int8, last=2:int8, layers=3:int8, layers=3-5:channel4+rotated4");
    const any_codec codec = codec_or_pair(value.substr(colon + 1));
    if (of_layer_.empty()) refuse("'" + option + "' is for caches, which have layers");
    const auto [begin, end] = layers_in(key, which, option);
    std::fill(of_layer_.begin() + begin, of_layer_.begin() + end, static_cast<index_t>(codecs_.size()));
    codecs_.push_back(codec);
  }

  /// The layers [begin, end) that "first=2", "last=2", "layers=3" or "layers=3-5" is about.
  [[nodiscard]] std::pair<index_t, index_t> layers_in(std::string_view key, std::string_view which,
                                                      const std::string& option) const {
    const auto num_layers = static_cast<index_t>(of_layer_.size());
    const std::size_t dash = key == "layers" ? which.find('-') : std::string_view::npos;
    const index_t n = number_in(which.substr(0, dash), "a number of layers");
    const index_t to =
        dash == std::string_view::npos ? n : number_in(which.substr(dash + 1), "a number of layers");
    if (n > to) refuse("'" + option + "' names a range that runs backwards");
    if (key == "layers" ? to >= num_layers : n > num_layers)
      throw shape_error("kvcache: '" + option + "' names layers that do not exist; there are " +
                        std::to_string(num_layers) + ", from 0 on");
    if (key == "layers") return {n, to + 1};
    return key == "first" ? std::pair(index_t{0}, n) : std::pair(num_layers - n, num_layers);
  }

  /// "int8", or keys and values, "channel4+rotated4".
  [[nodiscard]] any_codec codec_or_pair(std::string_view text) const {
    const std::size_t plus = text.find('+');
    if (text.empty() || plus == 0 || plus + 1 == text.size())
      refuse("'" + shown(text) + "' lacks a codec; there is " + source_.names());
    any_codec made;
    made.keys = keys_named(text.substr(0, plus));
    if (plus != std::string_view::npos) {
      made.values = values_named(text.substr(plus + 1));
    } else {
      made.values = *source_.values(text);
    }
    return made;
  }

  [[nodiscard]] codec::any_keys keys_named(std::string_view name) const {
    if (auto found = source_.keys(name)) return *found;
    refuse_name(name);
  }
  [[nodiscard]] codec::any_values values_named(std::string_view name) const {
    auto found = source_.values(name);
    if (!found) refuse_name(name);
    if (name.substr(0, 7) == "channel")
      refuse("'" + shown(name) + "' is for keys; its values are those of rotated");
    if (name.substr(0, 8) == "centred_")
      refuse("'" + shown(name) + "' is for keys; its values are those of " + shown(name.substr(8)));
    return *found;
  }
  [[noreturn]] void refuse_name(std::string_view name) const {
    const std::vector<std::string> known = codec_names();
    refuse("there is no codec '" + shown(name) + "'" + did_you_mean(name, {known.begin(), known.end()}) +
           "; there is " + source_.names());
  }

  /// A whole number from 0 to `most`.
  [[nodiscard]] index_t number_in(std::string_view text, const char* what,
                                  index_t most = index_t{1} << 30) const {
    index_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc{} || end != text.data() + text.size() || number < 0 || number > most)
      refuse("'" + shown(text) + "' is not " + what + " from 0 to " + std::to_string(most));
    return number;
  }

  std::string_view spec_;
  Source source_;
  index_t head_dim_;
  shared_turns turns_;                          // null: nothing turns
  std::vector<any_codec> codecs_{any_codec{}};  // the first is that of layers that are not named
  std::vector<index_t> of_layer_;               // [num_layers] which of them a layer has
  std::vector<std::string_view> given_;         // options that may be given once
  std::string_view both_sides_;                 // the codec named before the options
};

}  // namespace detail

/// \param spec  "rotated4", or "k=channel4,v=rotated4,sinks=4,tail=128"; what is not said is bf16, or 0
/// \param head_dim  what rope= needs
/// Throws std::invalid_argument that says what was wrong and lists what there is; so do options for some layers only.
inline any_codec make_codec(std::string_view spec, index_t head_dim = 0) {
  return detail::codec_spec_reader<>(spec, 0, head_dim).read();
}

/// The same for `num_layers` layers, and options for some of them. What is not said of them is the spec's first codec.
/// \param turns  how keys are rotated; null: it is not known. rope= may say so instead, or the same
/// Throws std::invalid_argument as make_codec, and shape_error that names the option whose layers do not exist.
inline codec::by_layer<any_codec> make_codec_by_layer(
    std::string_view spec, index_t num_layers, index_t head_dim = 0,
    const std::shared_ptr<const codec::rope_turns>& turns = nullptr) {
  if (num_layers < 1) throw shape_error("kvcache: num_layers must be at least 1");
  return detail::codec_spec_reader<>(spec, num_layers, head_dim, {}, turns).read_by_layer();
}

}  // namespace kvcache::inline v0
