// SPDX-License-Identifier: MIT
// Metrics: counting, rates of intervals, sums that cannot wrap; the Prometheus text, read back by a parser that knows the
// grammar only; and every recommendation on both sides of its threshold.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/cache/paged.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/serving/cache_manager.hpp>
#include <kvcache/serving/gauges.hpp>
#include <kvcache/serving/metrics.hpp>
#include <kvcache/serving/prometheus.hpp>
#include <kvcache/serving/recommend.hpp>

#include <cmath>
#include <cstdint>
#include <functional>
#include <iomanip>
#include <limits>
#include <locale>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

using namespace kvcache;
using namespace kvcache::serving;

namespace {

constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
constexpr index_t most_index = std::numeric_limits<index_t>::max();
constexpr double inf = std::numeric_limits<double>::infinity();

// -- an independent reader of the exposition format, version 0.0.4 ----------------------------------------------------

struct sample {
  std::string name;
  std::map<std::string, std::string> labels;
  double value = 0;
};

struct family {
  std::string name, help, type;
  std::vector<sample> samples;
};

struct exposition {
  std::vector<family> families;

  [[nodiscard]] const family* find(const std::string& name) const {
    for (const family& f : families) {
      if (f.name == name) return &f;
    }
    return nullptr;
  }
  /// The value of the one sample with these labels; NaN where there is none.
  [[nodiscard]] double value(const std::string& name,
                             const std::map<std::string, std::string>& labels = {}) const {
    for (const family& f : families) {
      for (const sample& s : f.samples) {
        if (s.name == name && s.labels == labels) return s.value;
      }
    }
    return std::nan("");
  }
};

/// Reads characters one after the other; throws std::runtime_error with the place where the grammar is broken.
class reader {
 public:
  explicit reader(std::string text) : text_(std::move(text)) {}

  exposition read() {
    if (text_.empty()) return {};
    need(text_.back() == '\n', "the last line ends with a line feed");
    exposition all;
    std::set<std::string> names;
    while (at_ < text_.size()) {
      family f;
      expect("# HELP ");
      f.name = name(true);
      need(names.insert(f.name).second, "a family stands in one piece");
      expect(" ");
      f.help = rest_of_line();
      need(f.help.find('\\') == std::string::npos, "our help texts need no escapes");
      expect("# TYPE ");
      need(name(true) == f.name, "TYPE is that of HELP");
      expect(" ");
      f.type = rest_of_line();
      need(f.type == "counter" || f.type == "gauge" || f.type == "histogram", "a type of the format");
      std::set<std::pair<std::string, std::map<std::string, std::string>>> seen;
      while (at_ < text_.size() && text_[at_] != '#') {
        f.samples.push_back(read_sample());
        need(seen.insert({f.samples.back().name, f.samples.back().labels}).second, "no sample twice");
      }
      need(!f.samples.empty(), "a family has samples");
      all.families.push_back(std::move(f));
    }
    return all;
  }

 private:
  void need(bool holds, const std::string& rule) const {
    if (!holds) throw std::runtime_error("at " + std::to_string(at_) + ": " + rule);
  }
  void expect(const std::string& literal) {
    need(text_.compare(at_, literal.size(), literal) == 0, "expected '" + literal + "'");
    at_ += literal.size();
  }
  [[nodiscard]] char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  std::string name(bool colon) {
    std::string out;
    const auto letter = [&](char c) {
      return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_' || (colon && c == ':');
    };
    need(letter(peek()), "a name begins with a letter");
    while (letter(peek()) || std::isdigit(static_cast<unsigned char>(peek())) != 0) out += text_[at_++];
    return out;
  }
  std::string rest_of_line() {
    const std::size_t end = text_.find('\n', at_);
    need(end != std::string::npos && end > at_, "a line has text");
    std::string out = text_.substr(at_, end - at_);
    at_ = end + 1;
    return out;
  }
  std::string quoted() {
    std::string out;
    expect("\"");
    while (peek() != '"') {
      need(at_ < text_.size() && peek() != '\n', "a quote ends on its line");
      char c = text_[at_++];
      if (c == '\\') {
        c = text_[at_++];
        need(c == '\\' || c == '"' || c == 'n', "an escape is one of three");
        if (c == 'n') c = '\n';
      }
      out += c;
    }
    expect("\"");
    return out;
  }
  sample read_sample() {
    sample s;
    s.name = name(true);
    if (peek() == '{') {
      do {
        ++at_;
        const std::string label = name(false);
        expect("=");
        need(s.labels.emplace(label, quoted()).second, "no label twice");
      } while (peek() == ',');
      expect("}");
    }
    expect(" ");
    const std::string number = rest_of_line();
    std::istringstream in(number);
    in.imbue(std::locale::classic());
    in >> s.value;
    need(!in.fail() && in.peek() == std::istringstream::traits_type::eof(), "a value is a number: " + number);
    return s;
  }

  std::string text_;
  std::size_t at_ = 0;
};

/// What else holds of each type.
void check_family(const family& f) {
  CAPTURE(f.name);
  CHECK(f.name.starts_with("kvcache_"));
  CHECK(f.help.ends_with('.'));
  CHECK(f.name.ends_with("_total") == (f.type == "counter"));
  if (f.type != "histogram") {
    for (const sample& s : f.samples) {
      CHECK(s.name == f.name);
      CHECK((f.type != "counter" || s.value >= 0));
    }
    return;
  }
  // Of each series: buckets that grow, +Inf, sum, count.
  std::map<std::map<std::string, std::string>, std::map<double, double>> buckets;
  std::map<std::map<std::string, std::string>, double> sums, counts;
  for (const sample& s : f.samples) {
    auto labels = s.labels;
    if (s.name == f.name + "_bucket") {
      REQUIRE(labels.count("le") == 1);
      const double bound = labels["le"] == "+Inf" ? inf : std::stod(labels["le"]);
      labels.erase("le");
      CHECK(buckets[labels].emplace(bound, s.value).second);
    } else if (s.name == f.name + "_sum") {
      sums[labels] = s.value;
    } else {
      REQUIRE(s.name == f.name + "_count");
      counts[labels] = s.value;
    }
  }
  CHECK(buckets.size() == sums.size());
  CHECK(buckets.size() == counts.size());
  for (const auto& [labels, by_bound] : buckets) {
    double before = 0;
    for (const auto& [bound, count] : by_bound) {
      CHECK(count >= before);
      before = count;
    }
    REQUIRE(by_bound.count(inf) == 1);
    CHECK(by_bound.at(inf) == counts[labels]);
  }
}

exposition parsed(const std::string& text) {
  exposition all;
  REQUIRE_NOTHROW(all = reader(text).read());
  for (const family& f : all.families) check_family(f);
  return all;
}

template <class... Arguments>
exposition written(const Arguments&... arguments) {
  std::ostringstream out;
  write_prometheus(out, arguments...);
  return parsed(out.str());
}

/// Reports random events, also senseless ones, and counts them by itself.
metrics_recorder random_recorder(test::random& random) {
  metrics_recorder recorder;
  for (int i = 0; i < 200; ++i) {
    const index_t n = random.below(5000) - 5;
    switch (random.below(9)) {
      case 0:
        recorder.on_lookup(n, n / 2);
        break;
      case 1:
        recorder.on_append(n, 1e-6 * static_cast<double>(n));
        break;
      case 2:
        recorder.on_attend(n, 2e-6 * static_cast<double>(n));
        break;
      case 3:
        recorder.on_evict(static_cast<rung>(random.below(4)), 64 * n, n);
        break;
      case 4:
        recorder.on_reuse(n * n);
        break;
      case 5:
        recorder.on_recode(2 * n, n);
        break;
      case 6:
        recorder.on_refuse(n);
        break;
      case 7:
        recorder.on_spill(n);
        break;
      default:
        recorder.on_decision(decision::grow, n, 0.5);
        break;
    }
  }
  recorder.values.memory = {4000, 1000, 500, random.below(9999), 9000};
  return recorder;
}

// -- recommendations --------------------------------------------------------------------------------------------------

/// 100 lookups, of which all is well.
metrics calm() {
  metrics m;
  m.lookups = 100;
  m.tokens_asked = 1000;
  m.tokens_hit = 600;
  m.memory = {.live = 900, .slack = 90, .shared = 0, .budget = 1000, .exact = 1620};
  return m;
}

bool says(const metrics& m, advice rule, const recommend_thresholds& t = {}) {
  for (const recommendation& r : recommend(m, t)) {
    CHECK_FALSE(r.what.empty());
    CHECK_FALSE(r.why.empty());
    CHECK(std::isfinite(r.figure));
    if (r.rule == rule) return true;
  }
  return false;
}

metrics changed(const std::function<void(metrics&)>& change, metrics m = calm()) {
  change(m);
  return m;
}

}  // namespace

TEST_CASE("a recorder counts what it is told", "[serving]") {
  metrics_recorder recorder;
  CHECK(recorder.values == metrics{});
  tell_lookup(recorder, 100, 60);
  tell_lookup(recorder, 50, 0);
  tell_append(recorder, 10, 0.25);
  tell_append(recorder, 5, 0);
  tell_attend(recorder, 1000, 1.5);
  tell_evict(recorder, rung::drop, 4096, 7);
  tell_evict(recorder, rung::recode, 100, 3);
  tell_evict(recorder, rung::spill, 200, 900);
  tell_reuse(recorder, 12);
  tell_recode(recorder, 300, 200);
  tell_refuse(recorder, 77);
  tell_spill(recorder, 200);
  tell_decision(recorder, decision::grow, 1, 0.5);
  const metrics& m = recorder.values;
  CHECK(m.lookups == 2);
  CHECK(m.tokens_asked == 150);
  CHECK(m.tokens_hit == 60);
  CHECK(m.hit_rate() == 0.4);
  CHECK(m.tokens_appended == 15);
  CHECK(m.append_nanoseconds == 250'000'000);
  CHECK(m.append_tokens_per_second() == 60.0);
  CHECK(m.attend_tokens_per_second() == 1000 / 1.5);
  CHECK(m.at(rung::drop) == rung_counts{1, 4096});
  CHECK(m.at(rung::recode) == rung_counts{1, 100});
  CHECK(m.at(rung::spill) == rung_counts{1, 200});
  CHECK(m.at(rung::refuse) == rung_counts{1, 77});
  CHECK(m.age_at_eviction.count() == 3);
  CHECK(m.age_at_eviction.sum == 910);
  CHECK(m.reuse_distance.quantile(1) == 16U);
  CHECK(m.recodes == 1);
  CHECK(m.recoded_bytes_before == 300);
  CHECK(m.recoded_bytes_after == 200);
  CHECK(m.spilled_bytes == 200);
  CHECK(m.decisions == 1);
}

TEST_CASE("a manager's recorder agrees with the manager", "[serving]") {
  using pool_type = page_pool<>;
  using cold_type = page_pool<codec::rotated<4>>;
  using manager_type = cache_manager<pool_type, eviction::lru, cold_type, no_spill_tier, metrics_recorder>;
  test::random random;
  const cache_shape shape{2, 2, 32, 32};
  const pool_type pool(shape, {.slab_bytes = 1});
  const cold_type cold(shape, {.slab_bytes = 1});
  const manager_options options{.budget_bytes = 600_KiB, .clock = [] { return 1.0; }};
  manager_type manager(pool, options, cold);
  std::uint64_t lookups = 0, asked = 0, hit = 0, appended = 0, refused = 0;
  for (int round = 0; round < 600; ++round) {
    std::vector<token_id> prompt(static_cast<std::size_t>(1 + random.below(300)));
    const auto kind = static_cast<token_id>(random.below(40));
    for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<token_id>(i) + 1000 * kind;
    if (round == 300) prompt.resize(20000);  // larger than the budget
    const acquired got = manager.acquire({}, prompt);
    if (got.code != status::ok) {
      ++refused;
      continue;
    }
    ++lookups;
    asked += prompt.size();
    hit += static_cast<std::uint64_t>(got.reused);
    const auto num_new = prompt.size() - static_cast<std::size_t>(got.reused);
    const std::vector<float> rows = random.floats(static_cast<index_t>(num_new * 64));
    bool stored = true;
    for (index_t layer = 0; stored && layer < shape.num_layers; ++layer)
      stored = manager.try_append(got.id, layer, rows, rows) == status::ok;
    stored ? appended += num_new : ++refused;
    manager.release(got.id);
  }
  const metrics& m = manager.observer().values;
  CHECK(m.lookups == lookups);
  CHECK(m.tokens_asked == asked);
  CHECK(m.tokens_hit == hit);
  CHECK(hit > 0);
  CHECK(m.tokens_appended >= appended);
  CHECK(m.append_nanoseconds == 0);  // that clock stands still
  CHECK(refused > 0);
  std::uint64_t evicted = 0;
  for (const rung r : {rung::drop, rung::recode, rung::spill, rung::refuse}) {
    CHECK(m.at(r).count == static_cast<std::uint64_t>(manager.counts().of(r)));
    if (r != rung::refuse) evicted += m.at(r).count;
  }
  CHECK(evicted > 0);
  CHECK(m.recodes > 0);
  CHECK(m.age_at_eviction.count() == evicted);
  CHECK(m.recoded_bytes_after < m.recoded_bytes_before);

  const memory_gauges g = gauges_of(manager, pool, cold);
  CHECK(g.live == manager.bytes());
  CHECK(g.budget == 600_KiB);
  CHECK(g.slack == manager.use().free);
  CHECK(g.shared == pool.bytes().shared + cold.bytes().shared);
  const index_t cold_pages = cold.num_in_use() * cold.page_bytes();
  CHECK(cold_pages > 0);
  CHECK(g.exact == g.live - g.slack - cold_pages + cold.num_in_use() * pool.page_bytes());
  metrics now = m;
  now.memory = g;
  CHECK(*now.compression_ratio() > 1);
  CHECK(*now.compression_ratio() < 4);
  CHECK(written(now).value("kvcache_live_bytes") == static_cast<double>(manager.bytes()));
}

TEST_CASE("what was not measured has no rate", "[serving]") {
  const metrics m;
  CHECK_FALSE(m.hit_rate().has_value());
  CHECK_FALSE(m.compression_ratio().has_value());
  CHECK_FALSE(m.append_tokens_per_second().has_value());
  CHECK_FALSE(m.attend_tokens_per_second().has_value());
  CHECK_FALSE(m.age_at_eviction.quantile(0.5).has_value());
  metrics full;
  full.memory = {.live = 300, .slack = 100, .shared = 0, .budget = 0, .exact = 800};
  CHECK(full.compression_ratio() == 4.0);
  full.memory.slack = 300;
  CHECK_FALSE(full.compression_ratio().has_value());
}

TEST_CASE("a histogram puts values below the power of two that bounds them", "[serving]") {
  const auto bucket = [](index_t value) {
    log2_histogram h;
    h.add(value);
    REQUIRE(h.count() == 1);
    for (std::size_t i = 0;; ++i) {
      if (h.counts.at(i) == 1) return i;
    }
  };
  CHECK(bucket(-3) == 0);
  for (std::size_t i = 1; i < log2_histogram::num_bounds; ++i) {
    const auto bound = static_cast<index_t>(log2_histogram::bound(i));
    CHECK(bucket(bound) == i);
    CHECK(bucket(bound + 1) == i + 1);
    CHECK(bucket(bound / 2 + 1) == (i == 1 ? 1 : i));
  }
  CHECK(bucket(0) == 0);
  CHECK(bucket(1) == 0);
  CHECK(bucket(most_index) == log2_histogram::num_bounds);

  log2_histogram h;
  for (const index_t value : {1, 2, 3, 4, 100}) h.add(value);
  CHECK(h.sum == 110);
  CHECK(h.quantile(0) == 1U);
  CHECK(h.quantile(0.2) == 1U);
  CHECK(h.quantile(0.5) == 4U);
  CHECK(h.quantile(0.8) == 4U);
  CHECK(h.quantile(0.81) == 128U);
  h.add(most_index);
  CHECK(h.quantile(1) == log2_histogram::bound(log2_histogram::num_bounds));
}

TEST_CASE("metrics add and subtract", "[serving]") {
  test::random random;
  for (int round = 0; round < 20; ++round) {
    const metrics a = random_recorder(random).values;
    const metrics b = random_recorder(random).values;
    CHECK(a + b == b + a);
    metrics back = (a + b) - b;
    back.memory = a.memory;  // gauges are those of the later moment
    CHECK(back == a);
    CHECK((a + b).memory.live == a.memory.live + b.memory.live);
    CHECK((a - b).memory == a.memory);
    CHECK((metrics{} - a) == metrics{});  // a counter that was set back counts nothing, it does not wrap
    CHECK((a + metrics{}) == a);
  }
}

TEST_CASE("no counter wraps", "[serving]") {
  metrics_recorder recorder;
  recorder.on_lookup(most_index, most_index);
  recorder.on_lookup(most_index, most_index);
  CHECK(recorder.values.tokens_asked == 2 * static_cast<std::uint64_t>(most_index));
  recorder.on_lookup(most_index, -5);
  CHECK(recorder.values.tokens_asked == most);
  CHECK(recorder.values.tokens_hit == 2 * static_cast<std::uint64_t>(most_index));
  recorder.on_append(1, inf);
  recorder.on_append(1, 1);
  CHECK(recorder.values.append_nanoseconds == most);
  recorder.on_attend(1, std::nan(""));
  recorder.on_attend(1, -1);
  recorder.on_attend(-1, 1e-9);
  CHECK(recorder.values.attend_nanoseconds == 1);
  CHECK(recorder.values.tokens_attended == 2);

  metrics full;
  full.memory = {most_index, most_index, most_index, most_index, most_index};
  full.age_at_eviction.counts.fill(most);
  full.age_at_eviction.sum = most;
  full.rungs.fill({most, most});
  full.lookups = most;
  CHECK(full + full == full);
  CHECK(full.age_at_eviction.count() == most);
  CHECK(full.age_at_eviction.quantile(0.5) == 1U);
  (void)written(full);
  (void)recommend(full);
}

TEST_CASE("the Prometheus text says what the metrics say", "[serving]") {
  test::random random;
  for (int round = 0; round < 10; ++round) {
    const metrics m = random_recorder(random).values;
    const exposition text = written(m);
    CHECK(text.families.size() == 21);
    const auto number = [](auto value) { return static_cast<double>(value); };
    CHECK(text.value("kvcache_live_bytes") == 4000);
    CHECK(text.value("kvcache_slack_bytes") == 1000);
    CHECK(text.value("kvcache_shared_bytes") == 500);
    CHECK(text.value("kvcache_budget_bytes") == number(m.memory.budget));
    CHECK(text.value("kvcache_compression_ratio") == 3.0);
    CHECK(text.value("kvcache_lookups_total") == number(m.lookups));
    CHECK(text.value("kvcache_lookup_tokens_total") == number(m.tokens_asked));
    CHECK(text.value("kvcache_hit_tokens_total") == number(m.tokens_hit));
    CHECK(text.value("kvcache_appended_tokens_total") == number(m.tokens_appended));
    CHECK(text.value("kvcache_append_seconds_total") == number(m.append_nanoseconds) / 1e9);
    CHECK(text.value("kvcache_attended_tokens_total") == number(m.tokens_attended));
    CHECK(text.value("kvcache_attend_seconds_total") == number(m.attend_nanoseconds) / 1e9);
    CHECK(text.value("kvcache_recodes_total") == number(m.recodes));
    CHECK(text.value("kvcache_recode_read_bytes_total") == number(m.recoded_bytes_before));
    CHECK(text.value("kvcache_recode_written_bytes_total") == number(m.recoded_bytes_after));
    CHECK(text.value("kvcache_spilled_bytes_total") == number(m.spilled_bytes));
    CHECK(text.value("kvcache_decisions_total") == number(m.decisions));
    for (const rung r : {rung::drop, rung::recode, rung::spill, rung::refuse}) {
      CHECK(text.value("kvcache_evictions_total", {{"rung", to_string(r)}}) == number(m.at(r).count));
      CHECK(text.value("kvcache_evicted_bytes_total", {{"rung", to_string(r)}}) == number(m.at(r).bytes));
    }
    for (const auto& [name, h] : {std::pair{"kvcache_reuse_distance_lookups", &m.reuse_distance},
                                  std::pair{"kvcache_eviction_age_lookups", &m.age_at_eviction}}) {
      CHECK(text.value(std::string(name) + "_sum") == number(h->sum));
      CHECK(text.value(std::string(name) + "_count") == number(h->count()));
      std::uint64_t below = 0;
      for (std::size_t i = 0; i < log2_histogram::num_bounds; ++i) {
        below += h->counts[i];
        CHECK(text.value(std::string(name) + "_bucket", {{"le", std::to_string(std::uint64_t{1} << i)}}) ==
              number(below));
      }
    }
  }
}

TEST_CASE("labels are escaped and tell series apart", "[serving]") {
  metrics a, b;
  a.lookups = 1;
  b.lookups = 2;
  b.memory = {.live = 10, .slack = 0, .shared = 0, .budget = 0, .exact = 20};
  const std::string awkward = "C:\\models\\\"q4\"\nsecond line, } and \xc3\xa4 = n\\";
  const std::vector<prometheus_series> both{{&a, {{"model", awkward}, {"tenant", ""}}},
                                            {&b, {{"model", "n"}}}};
  const exposition text = written(both);
  CHECK(text.value("kvcache_lookups_total", {{"model", awkward}, {"tenant", ""}}) == 1);
  CHECK(text.value("kvcache_lookups_total", {{"model", "n"}}) == 2);
  CHECK(text.find("kvcache_evictions_total")->samples.size() == 2 * num_rungs);
  CHECK(text.find("kvcache_compression_ratio")->samples.size() == 1);  // the other's is not known
  CHECK(written(a).find("kvcache_compression_ratio") == nullptr);
  CHECK(written(std::vector<prometheus_series>{}).families.empty());

  std::ostringstream out;
  write_prometheus(out, a, {}, "my:cache_");
  CHECK(out.str().find("\nmy:cache_lookups_total 1\n") != std::string::npos);
}

TEST_CASE("names that the format does not know are refused before anything is written", "[serving]") {
  const metrics m;
  const auto refused = [&](const std::vector<prometheus_series>& all, const std::string& prefix) {
    std::ostringstream out;
    try {
      write_prometheus(out, all, prefix);
    } catch (const std::invalid_argument&) {
      return out.str().empty();
    }
    return false;
  };
  for (const char* name : {"", "1st", "a b", "a-b", "le", "rung", "__name", "a:b", "\xc3\xa4"})
    CHECK(refused({{&m, {{name, "x"}}}}, "kvcache_"));
  for (const char* prefix : {"", "1_", "a b_", "a\n"}) CHECK(refused({{&m, {}}}, prefix));
  CHECK(refused({{&m, {{"a", "x"}, {"b", "x"}, {"a", "y"}}}}, "kvcache_"));
  CHECK(refused({{&m, {{"a", "x"}, {"b", "y"}}}, {&m, {{"b", "y"}, {"a", "x"}}}}, "kvcache_"));
  CHECK(refused({{nullptr, {}}}, "kvcache_"));
  CHECK_FALSE(refused({{&m, {{"_a1", "x"}}}, {&m, {{"_a1", "y"}}}}, "k"));
}

TEST_CASE("the text depends on neither the stream's flags nor its locale", "[serving]") {
  struct punctuation : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  metrics m = calm();
  m.lookups = 1234567;
  m.append_nanoseconds = 1'500'000'000;
  std::ostringstream plain, odd;
  odd.imbue(std::locale(std::locale::classic(), new punctuation));
  odd << std::hex << std::showbase << std::setprecision(2) << std::left;
  write_prometheus(plain, m);
  write_prometheus(odd, m);
  CHECK(plain.str() == odd.str());
  CHECK(plain.str().find("kvcache_append_seconds_total 1.5\n") != std::string::npos);
}

TEST_CASE("nothing is recommended where all is well or nothing is known", "[serving]") {
  CHECK(recommend(metrics{}).empty());
  CHECK(recommend(calm()).empty());
  // Every threshold is passed, and there is too little data.
  metrics few = calm();
  few.lookups = 99;
  few.tokens_hit = 0;
  few.memory = {.live = 10, .slack = 9, .shared = 0, .budget = 1000, .exact = 1};
  few.at(rung::refuse) = {19, 100};
  few.at(rung::drop) = {19, 100};
  few.recodes = 19;
  few.recoded_bytes_before = few.recoded_bytes_after = 100;
  few.append_nanoseconds = 1000;  // no clock for attention
  CHECK(recommend(few).empty());
  few.lookups = 0;
  CHECK(recommend(few, {.min_lookups = 0, .min_evictions = 0, .min_reuses = 0, .max_recodes = 0}).size() ==
        2);  // of recoding
}

TEST_CASE("each recommendation comes past its threshold and not at it", "[serving]") {
  SECTION("refused requests") {
    const auto with = [](std::uint64_t n) {
      return changed([n](metrics& m) { m.at(rung::refuse).count = n; });
    };
    CHECK_FALSE(says(with(1), advice::admit_more));
    CHECK(says(with(2), advice::admit_more));
    CHECK_FALSE(says(with(2), advice::admit_more, {.max_refused = 0.02}));
    CHECK(recommend(with(2)).at(0).figure == 0.02);
    CHECK(recommend(with(2)).at(0).why.find("2.0 %") != std::string::npos);
  }
  SECTION("few hits without pressure") {
    const auto with = [](std::uint64_t n) { return changed([n](metrics& m) { m.tokens_hit = n; }); };
    CHECK_FALSE(says(with(300), advice::share_prefixes));
    CHECK(says(with(299), advice::share_prefixes));
    CHECK_FALSE(says(with(299), advice::share_prefixes, {.min_hit_rate = 0.2}));
    metrics pressed = with(299);
    pressed.at(rung::drop).count = 1;
    CHECK_FALSE(says(pressed, advice::share_prefixes));
    metrics unasked = with(0);
    unasked.tokens_asked = 0;
    CHECK_FALSE(says(unasked, advice::share_prefixes));
  }
  SECTION("blocks that go too early") {
    const auto with = [](index_t age, index_t distance, std::uint64_t drops, int reuses) {
      return changed([=](metrics& m) {
        m.tokens_hit = 100;
        m.at(rung::drop).count = drops;
        for (std::uint64_t i = 0; i < drops; ++i) m.age_at_eviction.add(age);
        for (int i = 0; i < reuses; ++i) m.reuse_distance.add(distance);
      });
    };
    CHECK(says(with(32, 64, 20, 20), advice::keep_longer));
    CHECK_FALSE(says(with(64, 64, 20, 20), advice::keep_longer));
    CHECK_FALSE(says(with(32, 64, 19, 20), advice::keep_longer));
    CHECK_FALSE(says(with(32, 64, 20, 19), advice::keep_longer));
    CHECK_FALSE(says(with(32, 64, 20, 20), advice::keep_longer, {.min_age_to_reuse = 0.5}));
    CHECK_FALSE(says(with(32, 64, 20, 20), advice::keep_longer, {.min_hit_rate = 0.1}));
    CHECK(recommend(with(32, 64, 20, 20)).at(0).figure == 0.5);
  }
  SECTION("tokens in bf16 while blocks are dropped") {
    const auto with = [](index_t exact, std::uint64_t drops) {
      return changed([=](metrics& m) {
        m.memory.exact = exact;
        m.at(rung::drop).count = drops;
      });
    };
    CHECK(says(with(810, 20), advice::compress));  // 810 bytes hold tokens
    CHECK(says(with(1214, 20), advice::compress));
    CHECK_FALSE(says(with(1215, 20), advice::compress));
    CHECK_FALSE(says(with(810, 19), advice::compress));
    CHECK_FALSE(says(with(0, 20), advice::compress));
    CHECK_FALSE(says(with(810, 20), advice::compress, {.min_compression = 1}));
  }
  SECTION("memory without tokens") {
    const auto with = [](index_t slack) { return changed([=](metrics& m) { m.memory.slack = slack; }); };
    CHECK_FALSE(says(with(225), advice::smaller_blocks));
    CHECK(says(with(226), advice::smaller_blocks));
    CHECK_FALSE(says(with(226), advice::smaller_blocks, {.max_slack = 0.5}));
  }
  SECTION("a budget that is not used") {
    const auto with = [](index_t live) {
      return changed([=](metrics& m) { m.memory.live = live, m.memory.slack = 0; });
    };
    CHECK_FALSE(says(with(500), advice::spend_or_return));
    CHECK(says(with(499), advice::spend_or_return));
    CHECK(says(with(0), advice::spend_or_return));
    CHECK_FALSE(says(with(499), advice::spend_or_return, {.max_unused_budget = 0.6}));
    CHECK_FALSE(says(changed([](metrics& m) { m.spilled_bytes = 1; }, with(499)), advice::spend_or_return));
    CHECK_FALSE(says(changed([](metrics& m) { m.memory.budget = 0; }, with(499)), advice::spend_or_return));
  }
  SECTION("recoding all the time") {
    const auto with = [](std::uint64_t n) { return changed([=](metrics& m) { m.recodes = n; }); };
    CHECK_FALSE(says(with(50), advice::calm_recoding));
    CHECK(says(with(51), advice::calm_recoding));
    CHECK_FALSE(says(with(51), advice::calm_recoding, {.max_recodes = 0.6}));
    CHECK_FALSE(says(with(51), advice::calm_recoding, {.min_evictions = 52}));
  }
  SECTION("recoding that frees little") {
    const auto with = [](std::uint64_t after, std::uint64_t n) {
      return changed([=](metrics& m) {
        m.recodes = n;
        m.recoded_bytes_before = 1000;
        m.recoded_bytes_after = after;
      });
    };
    CHECK_FALSE(says(with(700, 20), advice::recode_smaller));
    CHECK(says(with(701, 20), advice::recode_smaller));
    CHECK_FALSE(says(with(701, 19), advice::recode_smaller));
    CHECK_FALSE(says(with(701, 20), advice::recode_smaller, {.max_recoded_size = 0.8}));
  }
  SECTION("appending that takes long") {
    const auto with = [](std::uint64_t append, std::uint64_t attend) {
      return changed([=](metrics& m) { m.append_nanoseconds = append, m.attend_nanoseconds = attend; });
    };
    CHECK_FALSE(says(with(25, 75), advice::encode_faster));
    CHECK(says(with(26, 75), advice::encode_faster));
    CHECK_FALSE(says(with(26, 0), advice::encode_faster));
    CHECK_FALSE(says(with(26, 75), advice::encode_faster, {.max_append_time = 0.3}));
  }
}
