// SPDX-License-Identifier: MIT
// write_prometheus: metrics as text that a Prometheus server scrapes (exposition format, version 0.0.4).
//
//   # HELP kvcache_evictions_total Times that cached tokens went, by rung of the pressure ladder.
//   # TYPE kvcache_evictions_total counter
//   kvcache_evictions_total{model="llama",rung="drop"} 12
//
// Serve it with the content type `text/plain; version=0.0.4`. Seconds and bytes, counters end in _total; ratios and rates
// are left to the server: rate(kvcache_hit_tokens_total[5m]) / rate(kvcache_lookup_tokens_total[5m]).
#pragma once

#include <kvcache/core/types.hpp>
#include <kvcache/serving/metrics.hpp>
#include <kvcache/serving/observer.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvcache::inline v0::serving {

struct prometheus_label {
  std::string name;   ///< letters, digits and _, no digit first; not `le` or `rung`, which are ours
  std::string value;  ///< any UTF-8; escaped as the format asks for

  friend bool operator==(const prometheus_label&, const prometheus_label&) = default;
};

/// The metrics of one manager, and what tells them from the others': {"model", "llama"}.
struct prometheus_series {
  const metrics* values = nullptr;
  std::vector<prometheus_label> labels;
};

namespace detail {

/// [a-zA-Z_][a-zA-Z0-9_]*; with colons for names of metrics.
inline bool is_prometheus_name(std::string_view name, bool colons) noexcept {
  const auto is_letter = [colons](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (colons && c == ':');
  };
  return !name.empty() && is_letter(name.front()) && std::all_of(name.begin(), name.end(), [&](char c) {
    return is_letter(c) || (c >= '0' && c <= '9');
  });
}

inline std::string escaped_label_value(std::string_view value) {
  std::string out;
  for (const char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

/// Writes the families of metrics, one after the other. Numbers do not depend on the stream's locale or flags.
class prometheus_writer {
 public:
  prometheus_writer(std::ostream& out, std::string_view prefix, std::span<const prometheus_series> all)
      : out_(out), prefix_(prefix), all_(all) {
    for (const prometheus_series& series : all) labels_.push_back(joined(series.labels));
  }

  /// One sample of each series. \param value  of metrics: an unsigned or signed integer, or a double
  template <class Value>
  void family(std::string_view name, std::string_view type, std::string_view help, Value value) {
    head(name, type, help);
    for (std::size_t i = 0; i < all_.size(); ++i) sample(name, "", labels_[i], value(*all_[i].values));
  }

  /// Samples only where there is a value; nothing at all where none has one.
  template <class Value>
  void optional_family(std::string_view name, std::string_view help, Value value) {
    if (std::none_of(all_.begin(), all_.end(), [&](const auto& s) { return value(*s.values).has_value(); }))
      return;
    head(name, "gauge", help);
    for (std::size_t i = 0; i < all_.size(); ++i) {
      if (const auto present = value(*all_[i].values)) sample(name, "", labels_[i], *present);
    }
  }

  /// A sample for each rung.
  template <class Value>
  void rung_family(std::string_view name, std::string_view help, Value value) {
    head(name, "counter", help);
    for (std::size_t i = 0; i < all_.size(); ++i) {
      for (const rung r : {rung::drop, rung::recode, rung::spill, rung::refuse})
        sample(name, "", with(labels_[i], "rung", to_string(r)), value(all_[i].values->at(r)));
    }
  }

  void histogram(std::string_view name, std::string_view help, log2_histogram metrics::*member) {
    head(name, "histogram", help);
    for (std::size_t i = 0; i < all_.size(); ++i) {
      const log2_histogram& h = all_[i].values->*member;
      std::uint64_t below = 0;
      for (std::size_t bucket = 0; bucket < log2_histogram::num_bounds; ++bucket) {
        below = saturating_add(below, h.counts[bucket]);
        sample(name, "_bucket", with(labels_[i], "le", std::to_string(log2_histogram::bound(bucket))), below);
      }
      sample(name, "_bucket", with(labels_[i], "le", "+Inf"), h.count());
      sample(name, "_sum", labels_[i], h.sum);
      sample(name, "_count", labels_[i], h.count());
    }
  }

 private:
  static std::string joined(const std::vector<prometheus_label>& labels) {
    std::string text;
    for (const auto& [name, value] : labels) text = with(text, name, escaped_label_value(value));
    return text;
  }
  static std::string with(const std::string& labels, std::string_view name, std::string_view escaped) {
    std::string text = labels.empty() ? "" : labels + ",";
    return text.append(name).append("=\"").append(escaped).append("\"");
  }

  void head(std::string_view name, std::string_view type, std::string_view help) {
    out_ << "# HELP " << prefix_ << name << ' ' << help << "\n# TYPE " << prefix_ << name << ' ' << type
         << '\n';
  }

  template <class Number>
  void sample(std::string_view name, std::string_view suffix, const std::string& labels, Number value) {
    std::array<char, 32> digits{};
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
    out_ << prefix_ << name << suffix;
    if (!labels.empty()) out_ << '{' << labels << '}';
    out_ << ' ' << std::string_view(digits.data(), static_cast<std::size_t>(end - digits.data())) << '\n';
  }

  std::ostream& out_;
  std::string_view prefix_;
  std::span<const prometheus_series> all_;
  std::vector<std::string> labels_;  // of each series, without braces
};

/// Throws std::invalid_argument for what the format, or a server, would refuse.
inline void validate(std::span<const prometheus_series> all, std::string_view prefix) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("kvcache: write_prometheus: " + what);
  };
  require(is_prometheus_name(prefix, true), "'" + std::string(prefix) + "' cannot begin a metric's name");
  std::vector<std::vector<prometheus_label>> seen;
  for (const prometheus_series& series : all) {
    require(series.values != nullptr, "a series has no values");
    std::vector<prometheus_label> labels = series.labels;
    std::sort(labels.begin(), labels.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    for (std::size_t i = 0; i < labels.size(); ++i) {
      const std::string& name = labels[i].name;
      require(is_prometheus_name(name, false) && !name.starts_with("__") && name != "le" && name != "rung",
              "'" + name + "' cannot be a label's name");
      require(i == 0 || labels[i - 1].name != name, "the label '" + name + "' is there twice");
    }
    require(std::find(seen.begin(), seen.end(), labels) == seen.end(), "two series have the same labels");
    seen.push_back(std::move(labels));
  }
}

inline void write_memory(prometheus_writer& write) {
  write.family("live_bytes", "gauge", "Bytes that sequences and kept prefixes hold.",
               [](const metrics& m) { return m.memory.live; });
  write.family("slack_bytes", "gauge", "Part of the live bytes that no token uses.",
               [](const metrics& m) { return m.memory.slack; });
  write.family("shared_bytes", "gauge", "Part of the live bytes that several sequences refer to.",
               [](const metrics& m) { return m.memory.shared; });
  write.family("budget_bytes", "gauge", "Most bytes that may be held, 0 without a limit.",
               [](const metrics& m) { return m.memory.budget; });
  write.optional_family("compression_ratio", "Bytes of the live tokens in bf16 over the bytes they take.",
                        [](const metrics& m) { return m.compression_ratio(); });
}

inline void write_prefixes(prometheus_writer& write) {
  write.family("lookups_total", "counter", "Prefixes looked up.", [](const metrics& m) { return m.lookups; });
  write.family("lookup_tokens_total", "counter", "Tokens that lookups asked for.",
               [](const metrics& m) { return m.tokens_asked; });
  write.family("hit_tokens_total", "counter", "Tokens that were cached when a lookup asked for them.",
               [](const metrics& m) { return m.tokens_hit; });
  write.histogram("reuse_distance_lookups", "Lookups between two uses of what was hit.",
                  &metrics::reuse_distance);
}

inline void write_pressure(prometheus_writer& write) {
  write.rung_family("evictions_total",
                    "Times that cached tokens went, or a request was refused, by rung of the ladder.",
                    [](const rung_counts& r) { return r.count; });
  write.rung_family("evicted_bytes_total", "Bytes that became free, or were refused, by rung of the ladder.",
                    [](const rung_counts& r) { return r.bytes; });
  write.histogram("eviction_age_lookups", "Lookups since the last use of what went.",
                  &metrics::age_at_eviction);
  write.family("recodes_total", "counter", "Sequences that were encoded once more.",
               [](const metrics& m) { return m.recodes; });
  write.family("recode_read_bytes_total", "counter", "Bytes that they took before.",
               [](const metrics& m) { return m.recoded_bytes_before; });
  write.family("recode_written_bytes_total", "counter", "Bytes that they take now.",
               [](const metrics& m) { return m.recoded_bytes_after; });
  write.family("spilled_bytes_total", "counter", "Bytes handed to the spill tier.",
               [](const metrics& m) { return m.spilled_bytes; });
  write.family("decisions_total", "counter", "Times that the manager changed what it does.",
               [](const metrics& m) { return m.decisions; });
}

inline void write_work(prometheus_writer& write) {
  const auto seconds = [](std::uint64_t nanoseconds) { return static_cast<double>(nanoseconds) / 1e9; };
  write.family("appended_tokens_total", "counter", "Tokens appended.",
               [](const metrics& m) { return m.tokens_appended; });
  write.family("append_seconds_total", "counter", "Time it took to append, 0 without a clock.",
               [&](const metrics& m) { return seconds(m.append_nanoseconds); });
  write.family("attended_tokens_total", "counter", "Tokens attended over.",
               [](const metrics& m) { return m.tokens_attended; });
  write.family("attend_seconds_total", "counter", "Time that attention took, 0 without a clock.",
               [&](const metrics& m) { return seconds(m.attend_nanoseconds); });
}

}  // namespace detail

/// Writes the metrics of several managers, each family once with a line for each of them.
///
/// \param prefix  begins every name
/// Throws std::invalid_argument, before anything is written, for names that the format does not know, two series with the
/// same labels or one without values. Errors of the stream are the stream's; its flags and locale play no part in numbers.
inline void write_prometheus(std::ostream& out, std::span<const prometheus_series> all,
                             std::string_view prefix = "kvcache_") {
  detail::validate(all, prefix);
  if (all.empty()) return;
  detail::prometheus_writer write(out, prefix, all);
  detail::write_memory(write);
  detail::write_prefixes(write);
  detail::write_pressure(write);
  detail::write_work(write);
}

/// Writes the metrics of one manager.
inline void write_prometheus(std::ostream& out, const metrics& values,
                             const std::vector<prometheus_label>& labels = {},
                             std::string_view prefix = "kvcache_") {
  const prometheus_series only{&values, labels};
  write_prometheus(out, {&only, 1}, prefix);
}

}  // namespace kvcache::inline v0::serving
