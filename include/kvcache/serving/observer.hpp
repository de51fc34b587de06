// SPDX-License-Identifier: MIT
// What cache_manager and prefix_index report while they work, to whoever wants to know. Costs nothing when absent.
//
//   struct counter {                                       // any of the members below, in any number
//     kvcache::index_t hits = 0;
//     void on_lookup(kvcache::index_t /*asked*/, kvcache::index_t hit) { hits += hit; }
//   };
//   cache_manager<pool, lru, no_cold_pool, no_spill_tier, counter> manager(...);
//
// An observer is a plain struct. A member that it does not have is not called, and one that it has with other
// parameters does not compile. Members must not throw, and must not call back into what reports to them.
#pragma once

#include <kvcache/core/types.hpp>

namespace kvcache::inline v0::serving {

/// What happens to cached tokens when bytes are short; the steps of the pressure ladder.
enum class rung {
  drop,    ///< blocks that nobody refers to are forgotten
  recode,  ///< a sequence that was not used for long is encoded once more, by a smaller codec
  spill,   ///< blocks go to a tier outside
  refuse,  ///< the caller gets a status, and nothing changed
};
inline constexpr int num_rungs = 4;

/// What a manager decides by itself, where that is not switched off.
enum class decision {
  grow,  ///< keeps more from now on. amount: the new limit, bytes; measure: hit rate by tokens, 0 to 1
  compress_first,  ///< re-encodes and spills before it drops. amount: bytes it must find; measure: hit rate
  not_worth,  ///< re-encoding would not free memory. amount: bytes it would take; measure: bytes it would free
  recall,     ///< brings a re-encoded prefix back. amount: tokens; measure: share of the lookup they serve
  keep_nothing,  ///< a released sequence is not kept, its books do not fit. amount: its tokens; measure: bytes short
};

constexpr const char* to_string(rung r) noexcept {
  switch (r) {
    case rung::drop:
      return "drop";
    case rung::recode:
      return "recode";
    case rung::spill:
      return "spill";
    case rung::refuse:
      return "refuse";
  }
  return "unknown rung";
}

/// Listens to nothing.
struct no_observer {};

namespace detail {

// Whether O has a member of that name, whatever its parameters; overloaded and templated ones count as absent.
template <class O>
concept names_lookup = requires {
  &O::on_lookup;
};
template <class O>
concept names_append = requires {
  &O::on_append;
};
template <class O>
concept names_attend = requires {
  &O::on_attend;
};
template <class O>
concept names_evict = requires {
  &O::on_evict;
};
template <class O>
concept names_reuse = requires {
  &O::on_reuse;
};
template <class O>
concept names_recode = requires {
  &O::on_recode;
};
template <class O>
concept names_refuse = requires {
  &O::on_refuse;
};
template <class O>
concept names_spill = requires {
  &O::on_spill;
};
template <class O>
concept names_decision = requires {
  &O::on_decision;
};

}  // namespace detail

// -- telling an observer; ticks count lookups -------------------------------------------------------------------------

/// A prefix was looked up: how many tokens were asked for, and how many of them are cached.
template <class O>
constexpr void tell_lookup([[maybe_unused]] O& observer, [[maybe_unused]] index_t tokens_asked,
                           [[maybe_unused]] index_t tokens_hit) {
  if constexpr (requires { observer.on_lookup(tokens_asked, tokens_hit); }) {
    observer.on_lookup(tokens_asked, tokens_hit);
  } else {
    static_assert(!detail::names_lookup<O>, "on_lookup(index_t tokens_asked, index_t tokens_hit)");
  }
}

/// Tokens were appended in all layers; seconds are 0 where no clock is given.
template <class O>
constexpr void tell_append([[maybe_unused]] O& observer, [[maybe_unused]] index_t tokens,
                           [[maybe_unused]] double seconds) {
  if constexpr (requires { observer.on_append(tokens, seconds); }) {
    observer.on_append(tokens, seconds);
  } else {
    static_assert(!detail::names_append<O>, "on_append(index_t tokens, double seconds)");
  }
}

/// Attention over so many tokens was computed; reported by the caller, who runs it.
template <class O>
constexpr void tell_attend([[maybe_unused]] O& observer, [[maybe_unused]] index_t tokens,
                           [[maybe_unused]] double seconds) {
  if constexpr (requires { observer.on_attend(tokens, seconds); }) {
    observer.on_attend(tokens, seconds);
  } else {
    static_assert(!detail::names_attend<O>, "on_attend(index_t tokens, double seconds)");
  }
}

/// Cached tokens went by this rung: bytes that became free, and ticks since they were last used.
template <class O>
constexpr void tell_evict([[maybe_unused]] O& observer, [[maybe_unused]] rung by,
                          [[maybe_unused]] index_t bytes, [[maybe_unused]] index_t age_ticks) {
  if constexpr (requires { observer.on_evict(by, bytes, age_ticks); }) {
    observer.on_evict(by, bytes, age_ticks);
  } else {
    static_assert(!detail::names_evict<O>, "on_evict(rung by, index_t bytes, index_t age_ticks)");
  }
}

/// A lookup hit tokens that were last used so many ticks ago.
template <class O>
constexpr void tell_reuse([[maybe_unused]] O& observer, [[maybe_unused]] index_t distance_ticks) {
  if constexpr (requires { observer.on_reuse(distance_ticks); }) {
    observer.on_reuse(distance_ticks);
  } else {
    static_assert(!detail::names_reuse<O>, "on_reuse(index_t distance_ticks)");
  }
}

/// A sequence was encoded once more: bytes that it alone took before, and takes now.
template <class O>
constexpr void tell_recode([[maybe_unused]] O& observer, [[maybe_unused]] index_t bytes_before,
                           [[maybe_unused]] index_t bytes_after) {
  if constexpr (requires { observer.on_recode(bytes_before, bytes_after); }) {
    observer.on_recode(bytes_before, bytes_after);
  } else {
    static_assert(!detail::names_recode<O>, "on_recode(index_t bytes_before, index_t bytes_after)");
  }
}

/// A request was refused for want of so many bytes.
template <class O>
constexpr void tell_refuse([[maybe_unused]] O& observer, [[maybe_unused]] index_t bytes) {
  if constexpr (requires { observer.on_refuse(bytes); }) {
    observer.on_refuse(bytes);
  } else {
    static_assert(!detail::names_refuse<O>, "on_refuse(index_t bytes)");
  }
}

/// So many bytes were handed to the spill tier.
template <class O>
constexpr void tell_spill([[maybe_unused]] O& observer, [[maybe_unused]] index_t bytes) {
  if constexpr (requires { observer.on_spill(bytes); }) {
    observer.on_spill(bytes);
  } else {
    static_assert(!detail::names_spill<O>, "on_spill(index_t bytes)");
  }
}

/// The manager changed what it does; `decision` says what the two numbers are.
template <class O>
constexpr void tell_decision([[maybe_unused]] O& observer, [[maybe_unused]] decision what,
                             [[maybe_unused]] index_t amount, [[maybe_unused]] double measure) {
  if constexpr (requires { observer.on_decision(what, amount, measure); }) {
    observer.on_decision(what, amount, measure);
  } else {
    static_assert(!detail::names_decision<O>, "on_decision(decision what, index_t amount, double measure)");
  }
}

}  // namespace kvcache::inline v0::serving
