// SPDX-License-Identifier: MIT
// recommend: what the metrics of a manager suggest to change, in words, and the figures that say so.
//
//   for (const recommendation& r : recommend(now - an_hour_ago)) log(r.what + ": " + r.why);
//
// Rules of thumb with thresholds that a user can set. Where there is too little data, nothing is said.
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/serving/metrics.hpp>
#include <kvcache/serving/observer.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::serving {

/// Which rule spoke.
enum class advice {
  admit_more,       ///< requests are refused
  keep_longer,      ///< blocks go before they would be hit again
  share_prefixes,   ///< few hits although nothing had to go
  compress,         ///< blocks are dropped while tokens take as much as in bf16
  smaller_blocks,   ///< much of the memory has no tokens
  spend_or_return,  ///< much of the budget is never used
  calm_recoding,    ///< sequences are encoded anew all the time
  recode_smaller,   ///< encoding anew frees little
  encode_faster,    ///< storing takes much of the time
};

/// When a rule speaks: when its figure passes the threshold, never at the threshold itself.
struct recommend_thresholds {
  std::uint64_t min_lookups = 100;   ///< with fewer nothing is said of lookups and memory
  std::uint64_t min_evictions = 20;  ///< with fewer drops, or recodings, nothing is said of them
  std::uint64_t min_reuses = 20;     ///< with fewer hits nothing is said of their distance
  double max_refused = 0.01;         ///< refused requests for each lookup
  double min_hit_rate = 0.3;         ///< tokens hit of tokens asked for
  double min_age_to_reuse = 1;       ///< median age of what goes, in ninth deciles of the reuse distance
  double min_compression = 1.5;      ///< bytes in bf16 over bytes
  double max_slack = 0.25;           ///< part of the live bytes
  double max_unused_budget = 0.5;    ///< part of the budget
  double max_recodes = 0.5;          ///< for each lookup
  double max_recoded_size = 0.7;     ///< bytes after over bytes before
  double max_append_time = 0.25;     ///< of the time of appending and attention
};

struct recommendation {
  advice rule;
  std::string what;   ///< to change
  std::string why;    ///< with the figure in it
  double figure = 0;  ///< what was compared with the threshold
};

namespace detail {

/// .1234 as "12.3 %"; the same in every locale.
inline std::string percent(double part) {
  const long long tenths = std::llround(std::min(part, 1e12) * 1000);
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " %";
}

/// 1.234 as "1.23".
inline std::string two_digits(double number) {
  const long long hundredths = std::llround(std::min(number, 1e12) * 100);
  const std::string rest = std::to_string(hundredths % 100);
  return std::to_string(hundredths / 100) + (rest.size() == 1 ? ".0" : ".") + rest;
}

inline double share(std::uint64_t part, std::uint64_t whole) noexcept {
  return static_cast<double>(part) / static_cast<double>(whole);
}

/// The rules, each of which adds a recommendation or does not.
class recommender {
 public:
  recommender(const metrics& m, const recommend_thresholds& t) : m_(m), t_(t) {}

  std::vector<recommendation> all() && {
    if (m_.lookups >= t_.min_lookups && m_.lookups > 0) {
      judge_refusals();
      judge_hits();
      judge_memory();
      judge_recoding();
    }
    judge_compression();
    judge_recoded_size();
    judge_append_time();
    return std::move(found_);
  }

 private:
  void add(advice rule, std::string what, std::string why, double figure) {
    found_.push_back({rule, std::move(what), std::move(why), figure});
  }

  [[nodiscard]] bool under_pressure() const noexcept {
    for (const rung_counts& r : m_.rungs) {
      if (r.count > 0) return true;
    }
    return m_.recodes > 0 || m_.spilled_bytes > 0;
  }

  void judge_refusals() {
    const double refused = share(m_.at(rung::refuse).count, m_.lookups);
    if (!(refused > t_.max_refused)) return;
    add(advice::admit_more,
        "raise the budget, store tokens in fewer bits, or admit fewer sequences at a time",
        percent(refused) + " of the requests were refused for want of memory", refused);
  }

  void judge_hits() {
    const std::optional<double> rate = m_.hit_rate();
    if (!rate || !(*rate < t_.min_hit_rate)) return;
    if (!under_pressure()) {
      add(advice::share_prefixes,
          "put what requests have in common first, word for word, and check that they share a namespace",
          "only " + percent(*rate) + " of the tokens asked for were cached, although nothing had to go",
          *rate);
      return;
    }
    if (m_.at(rung::drop).count < t_.min_evictions || m_.reuse_distance.count() < t_.min_reuses) return;
    const auto age = m_.age_at_eviction.quantile(0.5);
    const auto reuse = m_.reuse_distance.quantile(0.9);
    if (!age || !reuse) return;
    const double figure = share(*age, *reuse);
    if (!(figure < t_.min_age_to_reuse)) return;
    add(advice::keep_longer, "raise the budget, or store tokens in fewer bits",
        "only " + percent(*rate) +
            " of the tokens asked for were cached; half of what goes was used within " +
            std::to_string(*age) + " lookups, while hits come up to " + std::to_string(*reuse) +
            " lookups later",
        figure);
  }

  void judge_memory() {
    const memory_gauges& memory = m_.memory;
    if (memory.live > 0) {
      const double slack = static_cast<double>(memory.slack) / static_cast<double>(memory.live);
      if (slack > t_.max_slack)
        add(advice::smaller_blocks, "give free pages back (release_free), or use a smaller block_size",
            percent(slack) + " of the live bytes hold no tokens", slack);
    }
    if (memory.budget > 0 && !under_pressure()) {
      const double unused = 1 - static_cast<double>(memory.live) / static_cast<double>(memory.budget);
      if (unused > t_.max_unused_budget)
        add(advice::spend_or_return, "give memory back, or spend it on a codec of more bits",
            percent(unused) + " of the budget is unused, and nothing had to go", unused);
    }
  }

  void judge_recoding() {
    const double recodes = share(m_.recodes, m_.lookups);
    if (m_.recodes < t_.min_evictions || !(recodes > t_.max_recodes)) return;
    add(advice::calm_recoding,
        "raise the budget, recode more at a time, or store tokens in fewer bits at once",
        two_digits(recodes) + " sequences are encoded anew for each lookup", recodes);
  }

  void judge_compression() {
    const std::optional<double> ratio = m_.compression_ratio();
    if (!ratio || m_.at(rung::drop).count < t_.min_evictions || !(*ratio < t_.min_compression)) return;
    add(advice::compress, "store tokens in int8 with sinks=4,tail=128,exact=f16",
        "blocks are dropped, while tokens take " + two_digits(1 / *ratio) + " times what they take in bf16",
        *ratio);
  }

  void judge_recoded_size() {
    if (m_.recodes < t_.min_evictions || m_.recoded_bytes_before == 0) return;
    const double size = share(m_.recoded_bytes_after, m_.recoded_bytes_before);
    if (!(size > t_.max_recoded_size)) return;
    add(advice::recode_smaller, "recode to a codec of fewer bits, or leave that rung out",
        "what was encoded anew still takes " + percent(size) + " of its bytes", size);
  }

  void judge_append_time() {
    const std::uint64_t both = saturating_add(m_.append_nanoseconds, m_.attend_nanoseconds);
    if (m_.append_nanoseconds == 0 || m_.attend_nanoseconds == 0) return;  // no clock for one of them
    const double part = share(m_.append_nanoseconds, both);
    if (!(part > t_.max_append_time)) return;
    add(advice::encode_faster,
        "use a codec that encodes faster: rotated rather than trellis, int8 rather than rotated",
        "appending takes " + percent(part) + " of the time of appending and attention", part);
  }

  const metrics& m_;
  const recommend_thresholds& t_;
  std::vector<recommendation> found_;
};

}  // namespace detail

/// What `m`, best the difference of two moments, suggests; in the order of `advice`, mostly. Nothing where all is well
/// or nothing is known. Allocates for what it returns.
inline std::vector<recommendation> recommend(const metrics& m, const recommend_thresholds& thresholds = {}) {
  return detail::recommender(m, thresholds).all();
}

}  // namespace kvcache::inline v0::serving
