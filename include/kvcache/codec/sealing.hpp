// SPDX-License-Identifier: MIT
// exact_tail and exact_sinks: codecs that leave some tokens exact, where a lossy one costs most.
//
//   tokens  | sinks |        encoded by the codec, whole blocks        |  exact, at least tail_tokens  |
//
// The wrappers nest: exact_sinks<exact_tail<rotated<4>>>. Codecs that need whole blocks keep the newest tokens exact until
// they fill a block, wrapped or not. Source of the idea: sinks, Xiao et al. 2023, "Efficient Streaming Language
// Models with Attention Sinks"; a recent window in full precision, Liu et al. 2024, "KIVI".
#pragma once

#include <kvcache/codec/concepts.hpp>
#include <kvcache/core/types.hpp>

#include <algorithm>

namespace kvcache::inline v0::codec {

/// What a sealing codec can be told; a base of codecs that need whole blocks.
struct sealing_options {
  index_t tail_tokens =
      0;  ///< newest tokens that stay exact; a block is encoded once all of its tokens are older
  index_t sink_tokens = 0;                       ///< first tokens that stay exact, at most a block of them
  exact_element exact_as = exact_element::bf16;  ///< how all of them are stored, see codec/exact_tokens.hpp
};

/// The newest `tail_tokens` tokens stay exact.
/// \tparam Exact  how they and sinks are stored, or finer where the codec says so; f16 takes the bytes of bf16, and where a model computes in float, it loses
///                less than the codec behind it, which bf16 does not
template <block_codec Codec, index_t TailTokens = 128, exact_element Exact = exact_element::bf16>
struct exact_tail : Codec, sealing_options {
  constexpr exact_tail() : exact_tail(Codec{}) {}
  constexpr explicit exact_tail(const Codec& codec, index_t tokens = TailTokens)
      : Codec(codec), sealing_options{tokens, 0, Exact} {
    static_assert(sealing_codec<exact_tail>, "a codec has no member of a sealing option's name");
  }
};
template <sealing_codec Codec, index_t TailTokens, exact_element Exact>
struct exact_tail<Codec, TailTokens, Exact> : Codec {
  constexpr exact_tail() : exact_tail(Codec{}) {}
  constexpr explicit exact_tail(const Codec& codec, index_t tokens = TailTokens) : Codec(codec) {
    this->tail_tokens = tokens;
    this->exact_as = std::max(this->exact_as, Exact);
  }
};

/// The first `sink_tokens` tokens stay exact, besides what the codec keeps.
template <block_codec Codec, index_t SinkTokens = 4>
struct exact_sinks : Codec, sealing_options {
  constexpr exact_sinks() : exact_sinks(Codec{}) {}
  constexpr explicit exact_sinks(const Codec& codec, index_t tokens = SinkTokens)
      : Codec(codec), sealing_options{0, tokens, exact_element::bf16} {
    static_assert(sealing_codec<exact_sinks>, "a codec has no member of a sealing option's name");
  }
};
template <sealing_codec Codec, index_t SinkTokens>
struct exact_sinks<Codec, SinkTokens> : Codec {
  constexpr exact_sinks() : exact_sinks(Codec{}) {}
  constexpr explicit exact_sinks(const Codec& codec, index_t tokens = SinkTokens) : Codec(codec) {
    this->sink_tokens = tokens;
  }
};

}  // namespace kvcache::inline v0::codec
