// SPDX-License-Identifier: MIT
// make_codec: from a string to an any_codec.
//
//   spec    = codec *( "," option )  |  option *( "," option )
//   option  = "k=" codec | "v=" codec | "sinks=" tokens | "tail=" tokens
#pragma once

#include <kvcache/codec/balanced.hpp>
#include <kvcache/codec/channel.hpp>
#include <kvcache/codec/exact.hpp>
#include <kvcache/codec/int8.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/trellis.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_codec.hpp>

#include <array>
#include <charconv>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <vector>

namespace kvcache::inline v0 {

namespace detail {

template <class... Codecs>
struct codec_list {};

/// What make_codec knows. A new codec is one more name here.
using known_codecs = codec_list<codec::f32, codec::f16, codec::bf16, codec::int8, codec::rotated<4>,
                                codec::rotated<3>, codec::rotated<2>, codec::channel<4>, codec::channel<3>,
                                codec::balanced<4>, codec::balanced<3>, codec::balanced<2>, codec::trellis<4>,
                                codec::trellis<3>, codec::trellis<2>>;

template <class... Codecs>
std::vector<std::string_view> names_of(codec_list<Codecs...>) {
  return {Codecs::name...};
}

/// A codec by name, keys and values; nothing if there is none.
template <class... Codecs>
std::optional<any_codec> find_codec(codec_list<Codecs...>, std::string_view name) {
  std::optional<any_codec> found;
  const auto take_if = [&]<class Codec>() {
    if (name != Codec::name) return;
    found.emplace();
    found->keys = codec::any_keys::of(typename Codec::keys_type{});
    found->values = codec::any_values::of(typename Codec::values_type{});
  };
  (take_if.template operator()<Codecs>(), ...);
  return found;
}

/// Reads a codec's spec, piece by piece.
class codec_spec_reader {
 public:
  explicit codec_spec_reader(std::string_view spec) : spec_(spec) {}

  /// Throws std::invalid_argument naming what was wrong and what there is.
  any_codec read() {
    any_codec made;
    bool first = true;
    for (std::string_view rest = spec_; first || !rest.empty(); first = false) {
      const std::string_view piece = rest.substr(0, rest.find(','));
      rest.remove_prefix(std::min(piece.size() + 1, rest.size()));
      const std::size_t equals = piece.find('=');
      if (equals == std::string_view::npos && first) {
        made = codec_named(piece);
        continue;
      }
      const std::string_view value = equals == std::string_view::npos ? "" : piece.substr(equals + 1);
      set_option(made, piece.substr(0, equals), value);
    }
    if (spec_.empty() || spec_.back() == ',') refuse("it ends where a codec or an option is expected");
    return made;
  }

 private:
  [[noreturn]] void refuse(const std::string& reason) const {
    throw std::invalid_argument("kvcache: '" + std::string(spec_) + "' is not a codec: " + reason);
  }

  void set_option(any_codec& made, std::string_view key, std::string_view value) const {
    if (key == "k") {
      made.keys = codec_named(value).keys;
    } else if (key == "v") {
      if (value.substr(0, 7) == "channel")
        refuse("'" + std::string(value) + "' is for keys; its values are those of rotated");
      made.values = codec_named(value).values;
    } else if (key == "tail") {
      made.tail_tokens = tokens_in(value);
    } else if (key == "sinks") {
      made.sink_tokens = tokens_in(value);
    } else {
      refuse("there is no option '" + std::string(key) + "'; there is k=, v=, sinks=, tail=");
    }
  }

  [[nodiscard]] any_codec codec_named(std::string_view name) const {
    if (auto found = find_codec(known_codecs{}, name)) return *found;
    std::string known;
    for (const std::string_view other : names_of(known_codecs{}))
      known.append(known.empty() ? "" : ", ").append(other);
    refuse("there is no codec '" + std::string(name) + "'; there is " + known);
  }

  [[nodiscard]] index_t tokens_in(std::string_view text) const {
    constexpr index_t most = index_t{1} << 30;
    index_t tokens = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), tokens);
    if (error != std::errc{} || end != text.data() + text.size() || tokens < 0 || tokens > most)
      refuse("'" + std::string(text) + "' is not a number of tokens");
    return tokens;
  }

  std::string_view spec_;
};

/// Side::of for the one of `known_codecs` whose side has that name.
template <class AnySide, class... Codecs>
AnySide any_side_from(codec_list<Codecs...>, const side_description& described, const cache_shape& shape) {
  std::optional<AnySide> found;
  const auto take_if = [&]<class Side>() {
    if (!found && described.name == Side{}.side_name())
      found = AnySide::of(side_from<Side>(described, shape));
  };
  if constexpr (std::is_same_v<AnySide, codec::any_keys>) {
    (take_if.template operator()<typename Codecs::keys_type>(), ...);
  } else {
    (take_if.template operator()<typename Codecs::values_type>(), ...);
  }
  if (!found) throw shape_error("kvcache: there is no codec '" + described.name + "'");
  return *found;
}

}  // namespace detail

inline codec::any_keys codec::any_keys::from_description(const side_description& described,
                                                         const cache_shape& shape) {
  return kvcache::detail::any_side_from<any_keys>(kvcache::detail::known_codecs{}, described, shape);
}
inline codec::any_values codec::any_values::from_description(const side_description& described,
                                                             const cache_shape& shape) {
  return kvcache::detail::any_side_from<any_values>(kvcache::detail::known_codecs{}, described, shape);
}

/// The names of all codecs.
inline std::vector<std::string> codec_names() {
  const auto names = detail::names_of(detail::known_codecs{});
  return {names.begin(), names.end()};
}

/// \param spec  "rotated4", or "k=channel4,v=rotated4,sinks=4,tail=128"; what is not said is bf16, or 0
/// Throws std::invalid_argument that says what was wrong and lists what there is.
inline any_codec make_codec(std::string_view spec) { return detail::codec_spec_reader(spec).read(); }

}  // namespace kvcache::inline v0
