// SPDX-License-Identifier: MIT
// Every codec that has a name, alone and with exact tokens, in every container: what caches promise whatever they store.
// Caches are made from strings, so that one more codec is tested without being named here, and nothing compiles twice.

#include <kvcache/attention/rope.hpp>
#include <kvcache/interop/any_cache.hpp>

#include "conformance/caches.hpp"
#include "support/heap.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

using namespace conformance;
using kvcache::any_cache;

namespace {

constexpr cache_shape shape{.num_layers = 2, .num_kv_heads = 2, .head_dim = 20, .block_size = 16};
constexpr index_t token_size = shape.num_kv_heads * shape.head_dim;  // floats
constexpr index_t num_q_heads = 6;
constexpr index_t max_q_len = 5;
constexpr index_t num_tokens = 84;  // five blocks and a part of one
const kvcache::rope_config rope{.head_dim = shape.head_dim, .pairing = kvcache::rope_pairing::half};

const std::array<std::string, 3> containers = {"contiguous", "chunked", "paged"};

// ---------------------------------------------------------------------------------------------- codecs

/// A codec by name, with options or without.
struct subject {
  std::string name;
  std::string options;
  std::optional<kvcache::rope_config> turning = {};  // what make_cache is told of it

  [[nodiscard]] any_cache in(const std::string& container, const cache_shape& of = shape) const {
    return kvcache::make_cache(container + "/" + name + options, of, turning);
  }
};

/// All names, centred ones with a mean that turns, and once without.
std::vector<subject> subjects() {
  std::vector<subject> all;
  for (const std::string& name : kvcache::codec_names()) {
    const bool centred = name.starts_with("centred_");
    for (const std::string options : {"", ",tail=20", ",tail=5,sinks=7,exact=f16"}) {
      if (!centred || options.empty()) all.push_back({name, options});
      if (centred) all.push_back({name, options, rope});
    }
  }
  return all;
}

/// How far off a codec's rows and attention over them may be. Rows are normally distributed, keys have as much in common.
struct accuracy {
  double stored;    // mean square of what is lost of rows, relative to theirs
  double attended;  // largest difference from attention over what the cache gives back
};

/// Attention differs by the rounding of sums, and where bytes are multiplied as integers (see kernel::table) by that of queries
/// and weights: for int8 to 15 and 16 bits, below 8 bits to 8. Those are off by 1/254 of a query's largest number and 1/510 of
/// the largest weight, logits then by a hundredth, outputs of the order of one by as much; more where queries were multiplied
/// by the scales of channels. Means that turn have their cosines in bytes everywhere. The bounds are twice what is seen.
accuracy accuracy_of(const subject& of) {
  using kvcache::kernel::isa;
  const isa level = kvcache::kernel::best().level;
  const bool floats = level == isa::portable || level == isa::avx2;
  const double rounding = level == isa::amx ? 8e-5 : 1e-5;
  if (of.name == "f32") return {0.0, rounding};
  if (of.name == "f16") return {0x1p-22, rounding};
  if (of.name == "bf16") return {0x1p-16, rounding};
  if (of.name.ends_with("int8")) return {1e-4, of.turning ? 0.015 : floats ? rounding : 3e-4};
  const std::map<char, double> lost = {{'4', 0.02}, {'3', 0.07}, {'2', 0.25}};
  const double bytes = of.name.starts_with("channel") ? 0.06 : 0.03;
  return {lost.at(of.name.back()), floats && !of.turning ? rounding : bytes};
}

// ---------------------------------------------------------------------------------------------- tokens

/// Keys and values of every layer, [layer, token, head, dim]; keys are rotated, and have a mean that turns as they do.
struct token_rows {
  index_t count;
  std::vector<float> k;
  std::vector<float> v;

  token_rows(index_t tokens, test::random& random)
      : count(tokens),
        k(random.floats(shape.num_layers * tokens * token_size)),
        v(random.floats(shape.num_layers * tokens * token_size)) {
    const std::vector<float> mean = random.floats(token_size);
    for (std::size_t i = 0; i < k.size(); ++i) k[i] += mean[i % mean.size()];
    std::vector<index_t> positions(static_cast<std::size_t>(shape.num_layers * tokens));
    for (std::size_t t = 0; t < positions.size(); ++t) positions[t] = static_cast<index_t>(t) % tokens;
    kvcache::rope(k, positions, kvcache::rope_table(rope));
  }

  [[nodiscard]] std::span<const float> of(const std::vector<float>& side, index_t layer, index_t first,
                                          index_t n) const {
    return std::span(side).subspan(static_cast<std::size_t>((layer * count + first) * token_size),
                                   static_cast<std::size_t>(n * token_size));
  }
};

/// Appends tokens [first, last) of `rows`, `step` at a time. \return whether all went well
bool appended(any_cache& cache, const token_rows& rows, index_t first, index_t last, index_t step) {
  bool all_well = true;
  for (index_t t = first; t < last; t += step) {
    const index_t n = std::min(step, last - t);
    for (index_t layer = 0; layer < cache.shape().num_layers; ++layer)
      all_well &=
          cache[layer].try_append(rows.of(rows.k, layer, t, n), rows.of(rows.v, layer, t, n)) == status::ok;
  }
  return all_well;
}
void append(any_cache& cache, const token_rows& rows, index_t first, index_t last) {
  REQUIRE(appended(cache, rows, first, last, num_tokens));
}

any_cache filled(const subject& of, const std::string& container, const token_rows& rows,
                 index_t step = num_tokens) {
  any_cache cache = of.in(container);
  REQUIRE(appended(cache, rows, 0, rows.count, step));
  return cache;
}

/// Which tokens a cache keeps exact, and how.
struct exact_part {
  std::optional<codec::exact_element> element;  // nothing: none of them
  index_t tail_tokens;
  index_t sinks;

  exact_part(const subject& of, const any_cache& cache) : element(cache.exact_as()) {
    const kvcache::any_codec codec = kvcache::make_codec(of.name + of.options);
    tail_tokens = codec.tail_tokens;
    sinks = codec.sink_tokens;
  }
  /// Tokens that the codec has at the latest when there are `size`: whole blocks.
  [[nodiscard]] index_t encoded(index_t size) const {
    if (!element) return size;
    return std::max(size - tail_tokens, index_t{0}) / shape.block_size * shape.block_size;
  }
  [[nodiscard]] bool has(index_t token, index_t size) const {
    return element && (token >= encoded(size) || token < sinks);
  }
  [[nodiscard]] float rounded(float x) const {
    return element == codec::exact_element::f16
               ? kvcache::to_float(kvcache::from_float<kvcache::half>(x))
               : kvcache::to_float(kvcache::from_float<kvcache::bfloat16>(x));
  }
};

// ---------------------------------------------------------------------------------------------- answers

/// What is read from a cache, and attention over it.
struct contents {
  std::vector<float> k;  // [layer, token, head, dim]
  std::vector<float> v;
  std::vector<float> out;
};

bool operator==(const contents& a, const contents& b) {
  return same_numbers(a.k, b.k) && same_numbers(a.v, b.v) && same_numbers(a.out, b.out);
}

/// Two workers in turn, last task first: no threads, which would allocate.
struct two_workers {
  [[nodiscard]] static index_t num_workers() { return 2; }
  static void run(index_t num_tasks, kvcache::task_ref task) {
    for (index_t i = num_tasks; i-- > 0;) task(i, i % 2);
  }
};

/// Attention of one query, and of several with a window, over every layer.
/// \param q  [max_q_len, num_q_heads, head_dim]
template <class Executor = kvcache::serial_executor>
std::vector<float> attended(const any_cache& cache, const std::vector<float>& q,
                            const std::vector<index_t>& k_positions = {}, Executor executor = {}) {
  static const kvcache::rope_table turns(rope);
  std::vector<float> all;
  kvcache::attend_workspace workspace;
  for (index_t layer = 0; layer < cache.shape().num_layers; ++layer) {
    for (const index_t q_len : {index_t{1}, std::min(max_q_len, cache.size())}) {
      std::vector<float> out(static_cast<std::size_t>(q_len * num_q_heads * shape.head_dim));
      attend(std::span(q).first(out.size()), cache[layer], out,
             {.q_len = q_len,
              .window = q_len > 1 ? 40 : 0,
              .sinks = 2,
              .k_positions = k_positions,
              .rope = &turns,
              .workspace = &workspace},
             executor);
      all.insert(all.end(), out.begin(), out.end());
    }
  }
  return all;
}

contents contents_of(const any_cache& cache, const std::vector<float>& q) {
  cache.check();
  const auto layer_floats = static_cast<std::size_t>(cache.size() * token_size);
  contents read{std::vector<float>(static_cast<std::size_t>(shape.num_layers) * layer_floats), {}, {}};
  read.v = read.k;
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const auto at = static_cast<std::size_t>(layer) * layer_floats;
    cache[layer].copy_out(0, cache.size(), std::span(read.k).subspan(at, layer_floats),
                          std::span(read.v).subspan(at, layer_floats));
  }
  read.out = attended(cache, q);
  return read;
}

/// The largest difference of attention over a cache from that over its rows in f32, turned to where they are now.
double attention_error(const any_cache& cache, const contents& read, const std::vector<float>& q) {
  const index_t size = cache.size();
  const kvcache::rope_table turns(rope);
  std::vector<float> k = read.k;
  std::vector<index_t> positions(static_cast<std::size_t>(size));
  for (index_t t = 0; t < size; ++t) positions[static_cast<std::size_t>(t)] = cache.positions()[t];
  const auto segments = cache.positions().segments();
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const index_t end = s + 1 < segments.size() ? segments[s + 1].first_token : size;
    for (index_t layer = 0; layer < shape.num_layers && segments[s].rotation != 0; ++layer)
      turns.turn_by(k.data() + (layer * size + segments[s].first_token) * token_size,
                    (end - segments[s].first_token) * shape.num_kv_heads, segments[s].rotation);
  }
  any_cache plain = kvcache::make_cache("contiguous/f32", shape);
  for (index_t layer = 0; layer < shape.num_layers; ++layer) {
    const auto at = static_cast<std::size_t>(layer * size * token_size);
    const auto n = static_cast<std::size_t>(size * token_size);
    plain[layer].append(std::span(k).subspan(at, n), std::span(read.v).subspan(at, n));
  }
  const std::vector<float> expected = attended(plain, q, positions);
  double worst = 0;
  for (std::size_t i = 0; i < expected.size(); ++i)
    worst = std::max(worst, std::fabs(double{read.out[i]} - double{expected[i]}));
  return worst;
}

std::vector<float> random_queries(test::random& random) {
  return random.floats(max_q_len * num_q_heads * shape.head_dim);
}

/// Tokens kept exact are what they were, rounded; of the others no more is lost than the codec may lose.
void require_stored(const subject& of, const any_cache& cache, const token_rows& rows, const contents& read) {
  const exact_part exact(of, cache);
  const double rounding = exact.element ? 0x1p-16 : 0.0;  // what is encoded had been kept exact before
  for (const auto& [got, put] : {std::pair(&read.k, &rows.k), std::pair(&read.v, &rows.v)}) {
    double lost = 0;
    double all = 0;
    bool all_exact = true;
    for (std::size_t i = 0; i < put->size(); ++i) {
      const float was = (*put)[i];
      const float is = (*got)[i];
      if (exact.has(static_cast<index_t>(i) / token_size % cache.size(), cache.size())) {
        all_exact &= is == exact.rounded(was);
        continue;
      }
      lost += std::pow(double{is} - double{was}, 2);
      all += std::pow(double{was}, 2);
    }
    CHECK(all_exact);
    CHECK(lost <= (accuracy_of(of).stored + rounding) * all);
  }
}

/// Calls visit(subject, container) for all there are.
template <class Visit>
void for_each_cache(Visit visit) {
  for (const subject& of : subjects()) {
    for (const std::string& container : containers) {
      CAPTURE(container, of.name, of.options, of.turning.has_value());
      visit(of, container);
    }
  }
}

/// Numbers of tokens where two caches of `size` tokens differ, keys or values.
std::vector<index_t> tokens_that_differ(const contents& a, const contents& b, index_t size) {
  std::vector<bool> differ(static_cast<std::size_t>(size));
  for (std::size_t i = 0; i < a.k.size(); ++i) {
    const auto token = static_cast<index_t>(i) / token_size % size;
    if (a.k[i] != b.k[i] || a.v[i] != b.v[i]) differ[static_cast<std::size_t>(token)] = true;
  }
  std::vector<index_t> tokens;
  for (index_t t = 0; t < size; ++t) {
    if (differ[static_cast<std::size_t>(t)]) tokens.push_back(t);
  }
  return tokens;
}

/// After a truncation to `size` tokens each is read as before; where a block is no longer the codec's, it may also be exact
/// again, or what the codec had made of it, rounded.
void require_cut(const exact_part& exact, const token_rows& rows, const contents& before,
                 const contents& after, index_t size) {
  bool all_well = true;
  const auto check_side = [&](const std::vector<float>& was, const std::vector<float>& is,
                              const std::vector<float>& put) {
    for (std::size_t i = 0; i < is.size(); ++i) {
      const auto at = static_cast<index_t>(i);
      const index_t token = at / token_size % size;
      const index_t layer = at / (size * token_size);
      const auto from = static_cast<std::size_t>(at + layer * (num_tokens - size) * token_size);
      const bool changeable = exact.element && token >= exact.encoded(size);
      all_well &= is[i] == was[from] ||
                  (changeable && (is[i] == exact.rounded(put[from]) || is[i] == exact.rounded(was[from])));
    }
  };
  check_side(before.k, after.k, rows.k);
  check_side(before.v, after.v, rows.v);
  REQUIRE(all_well);
}

/// Whether a cache of num_tokens that kept these tokens only has them as they were.
bool are_kept(const contents& before, const contents& after, const std::vector<index_t>& tokens) {
  const auto same = [&](const std::vector<float>& was, const std::vector<float>& is) {
    auto next = is.begin();
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      for (const index_t token : tokens) {
        const auto from = was.begin() + (layer * num_tokens + token) * token_size;
        if (!std::equal(from, from + token_size, next)) return false;
        next += token_size;
      }
    }
    return next == is.end();
  };
  return same(before.k, after.k) && same(before.v, after.v);
}

/// Attention over layer 1 of several caches, in one call.
std::vector<float> attended_at_once(const std::vector<const any_cache*>& caches, const std::vector<float>& q,
                                    index_t q_len) {
  const auto floats = static_cast<std::size_t>(q_len * num_q_heads * shape.head_dim);
  std::vector<float> all(caches.size() * floats);
  std::vector<kvcache::attend_item<kvcache::any_layer>> batch;
  for (std::size_t i = 0; i < caches.size(); ++i)
    batch.push_back(
        {std::span(q).first(floats), (*caches[i])[1], std::span(all).subspan(i * floats, floats), q_len});
  kvcache::attend(batch, {}, two_workers{});
  return all;
}

}  // namespace

TEST_CASE("tokens are stored alike however they come, and wherever they lie", "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const std::vector<float> q = random_queries(random);
  std::optional<contents> expected;
  for_each_cache([&](const subject& of, const std::string& container) {
    const any_cache at_once = filled(of, container, rows);
    const contents read = contents_of(at_once, q);
    if (container == containers.front()) {
      expected = read;
      require_stored(of, at_once, rows, read);
    }
    REQUIRE(read == *expected);
    const index_t step = container == "paged" ? 7 : 1;
    REQUIRE(contents_of(filled(of, container, rows, step), q) == read);
  });
}

TEST_CASE("attention is that over the tokens that a cache gives back", "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const std::vector<float> q = random_queries(random);
  for_each_cache([&](const subject& of, const std::string& container) {
    any_cache cache = of.in(container);
    index_t size = 0;
    for (const index_t next : {1, 16, 23, 60}) {
      append(cache, rows, size, next);
      size = next;
      CAPTURE(size);
      CHECK(attention_error(cache, contents_of(cache, q), q) < accuracy_of(of).attended);
    }
  });
}

TEST_CASE("tokens that moved are attended over where they are now", "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const token_rows more(10, random);
  const std::vector<float> q = random_queries(random);
  for_each_cache([&](const subject& of, const std::string& container) {
    any_cache cache = filled(of, container, rows);
    const contents before = contents_of(cache, q);
    cache.shift(10, 40, 7);
    cache.shift(20, 70, -12);
    const contents moved = contents_of(cache, q);
    REQUIRE(tokens_that_differ(before, moved, num_tokens).empty());
    CHECK(attention_error(cache, moved, q) < accuracy_of(of).attended);
    append(cache, more, 0, more.count);
    CHECK(attention_error(cache, contents_of(cache, q), q) < accuracy_of(of).attended);
    cache.truncate(num_tokens);
    cache.shift(20, 70, 12);
    cache.shift(10, 40, -7);
    REQUIRE(contents_of(cache, q) == before);
  });
}

TEST_CASE("what is cut off and appended again is as it was, but where a block was cut long ago",
          "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const std::vector<float> q = random_queries(random);
  for_each_cache([&](const subject& of, const std::string& container) {
    const any_cache whole = filled(of, container, rows);
    const contents before = contents_of(whole, q);
    const exact_part exact(of, whole);
    for (const index_t size : {68, 64, 21, 2}) {
      CAPTURE(size);
      any_cache cut = whole.clone();
      cut.truncate(size);
      const contents after = contents_of(cut, q);
      require_cut(exact, rows, before, after, size);
      CHECK(attention_error(cut, after, q) < accuracy_of(of).attended);
      append(cut, rows, size, num_tokens);
      const contents again = contents_of(cut, q);
      // Exact tokens of a block that was just encoded are still there; those of older ones were encoded twice.
      const bool as_before =
          !exact.element || size % shape.block_size == 0 || size >= num_tokens - shape.block_size;
      if (as_before) REQUIRE(again == before);
      for (const index_t token : tokens_that_differ(again, before, num_tokens))
        REQUIRE(token / shape.block_size == size / shape.block_size);
    }
    any_cache cleared = whole.clone();
    cleared.clear();
    append(cleared, rows, 0, num_tokens);
    REQUIRE(contents_of(cleared, q) == before);
  });
}

TEST_CASE("clones and forks read alike, and what becomes of one leaves the others as they were",
          "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const token_rows more(20, random);
  const std::vector<float> q = random_queries(random);
  for_each_cache([&](const subject& of, const std::string& container) {
    any_cache parent = filled(of, container, rows);
    parent.shift(20, 50, 9);
    const contents before = contents_of(parent, q);
    any_cache clone = parent.clone();
    any_cache fork = parent.fork();
    any_cache part = parent.fork(41);
    any_cache cut = parent.clone();
    cut.truncate(41);
    REQUIRE(contents_of(clone, q) == before);
    REQUIRE(contents_of(fork, q) == before);
    const contents of_part = contents_of(part, q);
    REQUIRE(of_part == contents_of(cut, q));

    append(part, more, 0, 20);
    append(cut, more, 0, 20);
    REQUIRE(contents_of(part, q) == contents_of(cut, q));
    append(clone, more, 0, 10);
    clone.truncate(30);
    REQUIRE(contents_of(parent, q) == before);
    REQUIRE(contents_of(fork, q) == before);

    parent.truncate(50);
    append(parent, more, 10, 20);
    REQUIRE(contents_of(fork, q) == before);
    parent = fork.fork(41);
    fork.truncate(3);
    append(fork, more, 0, 20);
    REQUIRE(contents_of(parent, q) == of_part);
  });
}

TEST_CASE("steps that are given up leave no trace, and others are appends", "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const token_rows more(50, random);
  const std::vector<float> q = random_queries(random);
  for_each_cache([&](const subject& of, const std::string& container) {
    any_cache cache = filled(of, container, rows);
    const contents before = contents_of(cache, q);
    any_cache without_step = cache.clone();
    for (const index_t count : {15, 50}) {  // within a block, and over all that the tail had
      CAPTURE(count);
      {
        const auto step = cache.begin(count);
        append(cache, more, 0, count);
      }
      REQUIRE(contents_of(cache, q) == before);
    }
    auto step = cache.begin(more.count);
    append(cache, more, 0, more.count);
    step.commit();
    append(without_step, more, 0, more.count);
    REQUIRE(contents_of(cache, q) == contents_of(without_step, q));
  });
}

TEST_CASE("tokens that are kept when others go stay as they are", "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const std::vector<float> q = random_queries(random);
  for_each_cache([&](const subject& of, const std::string& container) {
    any_cache cache = filled(of, container, rows);
    const contents before = contents_of(cache, q);
    const kvcache::keep_limits limits = cache.keep_limits();
    std::vector<index_t> tokens;
    for (index_t t = 0; t < num_tokens; ++t) {
      const bool goes =
          t < limits.whole_blocks ? t / shape.block_size == 1 : t < num_tokens - 2 && t % 3 == 0;
      if (t < limits.pinned || !goes) tokens.push_back(t);
    }
    REQUIRE(std::ssize(tokens) < num_tokens);
    for (const auto mode : {kvcache::keep_positions::original, kvcache::keep_positions::consecutive}) {
      any_cache fewer = cache.fork();
      REQUIRE(fewer.keep_tokens(tokens, mode).code == status::ok);
      const contents after = contents_of(fewer, q);
      REQUIRE(are_kept(before, after, tokens));
      CHECK(attention_error(fewer, after, q) < accuracy_of(of).attended);
    }
    REQUIRE(contents_of(cache, q) == before);
  });
}

TEST_CASE("two workers, and a batch, give the bits of one call after the other", "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const std::vector<float> q = random_queries(random);
  for_each_cache([&](const subject& of, const std::string& container) {
    const any_cache whole = filled(of, container, rows);
    REQUIRE(same_numbers(attended(whole, q, {}, two_workers{}), attended(whole, q)));
    const any_cache part = whole.fork(41);
    any_cache few = whole.clone();
    few.truncate(7);
    const std::vector<const any_cache*> caches = {&whole, &few, &part};
    for (const index_t q_len : {1, 5}) {
      const auto floats = static_cast<std::size_t>(q_len * num_q_heads * shape.head_dim);
      const std::vector<float> got = attended_at_once(caches, q, q_len);
      std::vector<float> expected(caches.size() * floats);
      for (std::size_t i = 0; i < caches.size(); ++i)
        attend(std::span(q).first(floats), (*caches[i])[1], std::span(expected).subspan(i * floats, floats),
               {.q_len = q_len});
      REQUIRE(same_numbers(got, expected));
    }
  });
}

TEST_CASE("two workers that share a long sequence give the bits of one", "[conformance]") {
  test::random random;
  const token_rows rows(2100, random);  // beyond a span of attend
  const std::vector<float> q = random_queries(random);
  cache_shape one_layer = shape;
  one_layer.num_layers = 1;
  for (const subject& of : subjects()) {
    if (!of.options.empty()) continue;
    CAPTURE(of.name, of.options, of.turning.has_value());
    any_cache cache = of.in("contiguous", one_layer);
    REQUIRE(appended(cache, rows, 0, rows.count, rows.count));
    REQUIRE(same_numbers(attended(cache, q, {}, two_workers{}), attended(cache, q)));
  }
}

TEST_CASE("neither append in reserved room nor copy_out nor attend once warm allocates", "[conformance]") {
  test::random random;
  const token_rows rows(num_tokens, random);
  const std::vector<float> q = random_queries(random);
  std::vector<float> out(q.size());
  std::vector<float> k(static_cast<std::size_t>(num_tokens * token_size));
  std::vector<float> v(k.size());
  kvcache::attend_workspace workspace;
  for_each_cache([&](const subject& of, const std::string& container) {
    any_cache cache = of.in(container);
    REQUIRE(cache.reserve(num_tokens) == status::ok);
    bool all_well = true;
    CHECK(heap::allocations_in([&] {
            all_well &= appended(cache, rows, 0, 60, 1);
            all_well &= appended(cache, rows, 60, num_tokens, num_tokens);
          }) == 0);
    REQUIRE(all_well);
    const auto read = [&] {
      for (index_t layer = 0; layer < shape.num_layers; ++layer) {
        cache[layer].copy_out(0, num_tokens, k, v);
        attend(q, cache[layer], out, {.q_len = max_q_len, .workspace = &workspace});
        attend(q, cache[layer], out, {.q_len = max_q_len, .workspace = &workspace}, two_workers{});
      }
    };
    read();
    CHECK(heap::allocations_in(read) == 0);
  });
}
