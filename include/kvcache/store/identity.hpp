// SPDX-License-Identifier: MIT
// What a stored sequence says of itself besides its blocks: whose it is, which the caller says, and what it is made of.
#pragma once

#include <kvcache/cache/block_access.hpp>
#include <kvcache/cache/positions.hpp>
#include <kvcache/codec/description.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/core/checked.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/store/bytes.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace kvcache::inline v0::store {

enum class rope_kind : std::uint32_t { none = 0, half = 1, interleaved = 2 };

/// How keys were rotated; interop/rope_identity.hpp makes one from a rope_config.
struct rope_identity {
  rope_kind kind = rope_kind::none;
  double theta = 0;
  index_t rotary_dim = 0;
  std::string scaling = {};  ///< any bytes that tell one scaling from another

  friend bool operator==(const rope_identity&, const rope_identity&) = default;
};

/// What the caller says of a sequence. Texts may have any bytes, up to 4096: hashes, names, versions.
struct identity {
  std::string model = {};      ///< fingerprint of the weights that computed the keys and values
  std::string tokenizer = {};  ///< and of what made the tokens
  rope_identity rope = {};
  std::vector<token_id> tokens = {};  ///< of the sequence, in order; or none
};

/// What must be so, or loading ends in a load_error; what is not given may be anything.
struct expectation {
  std::optional<std::string> model = {};
  std::optional<std::string> tokenizer = {};
  std::optional<rope_identity> rope = {};
};

/// All that is known of a stored sequence before its blocks are looked at.
struct stored_sequence {
  cache_shape shape = {};
  codec_description codec = {};
  std::string spec = {};  ///< "container/codec" as make_cache takes it, where an any_cache was saved
  identity who = {};
  index_t first_token = 0;  ///< which of the saved sequence's tokens is the first one here
  std::vector<kvcache::detail::layer_blocks> layers = {};  ///< [num_layers]
  std::vector<index_t> block_bytes = {};                   ///< [num_layers]
  std::vector<position_segment> positions = {};

  /// Tokens that every layer has.
  [[nodiscard]] index_t size() const noexcept {
    index_t least = layers.empty() ? 0 : layers.front().size;
    for (const auto& l : layers) least = l.size < least ? l.size : least;
    return least;
  }
};

namespace detail {

/// The section `description`: everything but settings, tokens and positions.
inline std::vector<std::byte> encode_description(const stored_sequence& s) {
  std::vector<std::byte> out;
  byte_writer to(out);
  for (const index_t n : {s.shape.num_layers, s.shape.num_kv_heads, s.shape.head_dim, s.shape.block_size,
                          s.first_token, s.codec.tail_tokens, s.codec.sink_tokens})
    to.count(n);
  to.number(s.codec.seals ? 1 + static_cast<std::uint32_t>(s.codec.exact_as) : 0U);
  to.number(static_cast<std::uint32_t>(s.who.rope.kind));
  to.number(s.who.rope.theta);
  to.count(s.who.rope.rotary_dim);
  for (const std::string& text :
       {s.codec.keys.name, s.codec.values.name, s.spec, s.who.rope.scaling, s.who.model, s.who.tokenizer})
    to.text(text);
  for (std::size_t i = 0; i < s.layers.size(); ++i) {
    for (const index_t n :
         {s.layers[i].size, s.block_bytes[i], s.layers[i].num_sealed, s.layers[i].first_exact})
      to.count(n);
  }
  return out;
}

/// Throws load_error.
inline stored_sequence decode_description(byte_reader from) {
  stored_sequence s;
  for (index_t* n : {&s.shape.num_layers, &s.shape.num_kv_heads, &s.shape.head_dim, &s.shape.block_size,
                     &s.first_token, &s.codec.tail_tokens, &s.codec.sink_tokens})
    *n = from.count();
  const auto seals = from.number<std::uint32_t>();
  const auto rope = from.number<std::uint32_t>();
  if (seals > codec::exact_elements.size()) from.refuse("there is no such way to keep tokens exact", 8);
  if (rope > static_cast<std::uint32_t>(rope_kind::interleaved)) from.refuse("there is no such pairing", 4);
  s.codec.seals = seals != 0;
  if (seals != 0) s.codec.exact_as = codec::exact_elements[seals - 1];
  s.who.rope.kind = static_cast<rope_kind>(rope);
  s.who.rope.theta = from.number<double>();
  s.who.rope.rotary_dim = from.count();
  for (std::string* text : {&s.codec.keys.name, &s.codec.values.name, &s.spec, &s.who.rope.scaling,
                            &s.who.model, &s.who.tokenizer})
    *text = from.text();
  try {
    validate(s.shape);
  } catch (const shape_error& error) {
    from.refuse(error.what());
  }
  constexpr index_t layer_bytes = 32;
  if (static_cast<index_t>(from.left()) / layer_bytes != s.shape.num_layers)
    from.refuse("there are not as many layers as it says");
  for (index_t i = 0; i < s.shape.num_layers; ++i) {
    kvcache::detail::layer_blocks l;
    l.size = from.count();
    s.block_bytes.push_back(from.count());
    l.num_sealed = from.count();
    l.first_exact = from.count();
    s.layers.push_back(l);
  }
  from.finish();
  return s;
}

inline std::vector<std::byte> encode_positions(std::span<const position_segment> segments) {
  std::vector<std::byte> out;
  byte_writer to(out);
  for (const position_segment& s : segments) {
    for (const index_t n : {s.first_token, s.first_position, s.rotation}) to.count(n);
  }
  return out;
}

inline std::vector<position_segment> decode_positions(byte_reader from) {
  std::vector<position_segment> segments;
  while (from.left() > 0) {
    const auto first_token = from.number<std::int64_t>();
    const auto first_position = from.number<std::int64_t>();
    const auto rotation = from.number<std::int64_t>();
    segments.push_back({first_token, first_position, rotation});
  }
  return segments;
}

inline std::vector<token_id> decode_tokens(std::span<const std::byte> bytes) {
  std::vector<token_id> tokens(bytes.size() / sizeof(token_id));
  if (!tokens.empty()) std::memcpy(tokens.data(), bytes.data(), tokens.size() * sizeof(token_id));
  return tokens;
}

/// Throws load_error where the stored sequence is not what was expected.
inline void check_expectation(const stored_sequence& s, const expectation& expected,
                              const std::string& source, std::uint64_t offset) {
  const auto require = [&](bool holds, const char* reason) {
    if (!holds) throw load_error(source, offset, reason);
  };
  require(!expected.model || *expected.model == s.who.model, "it was saved with another model");
  require(!expected.tokenizer || *expected.tokenizer == s.who.tokenizer,
          "it was saved with another tokenizer");
  require(!expected.rope || *expected.rope == s.who.rope, "its keys were rotated in another way");
}

}  // namespace detail

}  // namespace kvcache::inline v0::store
