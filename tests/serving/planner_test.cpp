// SPDX-License-Identifier: MIT
// Plans against real pools: sizes to the byte, limits to the token; and the measured tables against the pages they are from.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <kvcache/cache/paged.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/serving/planner.hpp>

#include <cmath>
#include <cstddef>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

using namespace kvcache;
using namespace kvcache::serving;

namespace {

constexpr index_t huge = std::numeric_limits<index_t>::max();

std::string codec_of(const plan_row& row) { return row.spec.substr(row.spec.find('/') + 1); }

/// Sequences in a pool that was made as the row says.
struct real_pool {
  page_pool<any_codec> pool;
  std::vector<paged_cache<any_codec>> sequences;
  std::vector<float> rows;

  real_pool(const plan_row& row, index_t num_sequences)
      : pool(row.shape, {.budget_bytes = row.budget_bytes}, make_codec(codec_of(row))),
        rows(static_cast<std::size_t>(512 * row.shape.num_kv_heads * row.shape.head_dim), 0.5F) {
    for (index_t i = 0; i < num_sequences; ++i) sequences.push_back(pool.sequence());
  }

  /// Appends to every layer of a sequence; false when the pool is full.
  bool grow(std::size_t sequence, index_t tokens) {
    auto& cache = sequences[sequence];
    for (index_t done = 0; done < tokens;) {
      const index_t n = std::min(tokens - done, index_t{512});
      const auto floats = static_cast<std::size_t>(n * cache.shape().num_kv_heads * cache.shape().head_dim);
      for (index_t layer = 0; layer < cache.shape().num_layers; ++layer) {
        const status s = cache[layer].try_append({rows.data(), floats}, {rows.data(), floats});
        if (s == status::out_of_pages) return false;
        REQUIRE(s == status::ok);
      }
      done += n;
    }
    return true;
  }
  bool grow_all(index_t tokens) {
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      if (!grow(i, tokens)) return false;
    }
    return true;
  }

  [[nodiscard]] index_t bytes() const {
    index_t total = 0;
    for (const auto& cache : sequences) total += cache.bytes().total;
    return total;
  }
};

std::string file_text(const std::string& name) {
  std::ifstream in(std::string(KVCACHE_SOURCE_DIR) + "/" + name);
  std::ostringstream text;
  text << in.rdbuf();
  REQUIRE(text.str().size() > 1000);
  return text.str();
}

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" `");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" `") - first + 1);
}

/// The rows of the table below the heading that has these first columns, cell by cell; the heading is the first.
std::vector<std::vector<std::string>> markdown_table(const std::string& text, const std::string& heading,
                                                     const std::string& after) {
  std::size_t at = text.find("\n| " + heading, text.find(after));
  REQUIRE(at != std::string::npos);
  std::istringstream lines(text.substr(at + 1));
  std::vector<std::vector<std::string>> table;
  for (std::string line; std::getline(lines, line) && line.starts_with('|');) {
    if (line.starts_with("|--")) continue;
    std::vector<std::string> cells;
    std::istringstream rest(line.substr(1));
    for (std::string cell; std::getline(rest, cell, '|');) cells.push_back(trimmed(cell));
    table.push_back(cells);
  }
  return table;
}

const std::vector<std::string>* find_row(const std::vector<std::vector<std::string>>& table,
                                         const std::string& name, const std::string& tail = "") {
  for (const auto& row : table) {
    if (row[0] == name && (tail.empty() || row[1] == tail)) return &row;
  }
  return nullptr;
}

std::string name_of(std::string_view keys, std::string_view values) {
  return codec_choice{std::string(keys), std::string(values)}.spec();
}

bool same(double a, double b) { return std::abs(a - b) <= 1e-9 * std::abs(b); }

}  // namespace

TEST_CASE("the sizes of all codecs are those of their blocks", "[serving]") {
  std::vector<std::string> names;
  for (const auto& sizes : serving::detail::known_sizes) names.emplace_back(sizes.name);
  CHECK(names == codec_names());
  for (const std::string& keys : names) {
    for (const std::string& values : names) {
      if (keys != values && (values.starts_with("channel") || values.starts_with("centred_"))) {
        CHECK_THROWS_AS(cache_sizes({}, {keys, values}), std::invalid_argument);
        continue;
      }
      const codec_choice choice{keys, values};
      const any_codec codec = make_codec(choice.spec());
      for (const cache_shape shape :
           {cache_shape{1, 1, 128, 128}, {2, 3, 72, 16}, {1, 2, 1, 64}, {1, 1, 511, 256}}) {
        const cache_sizes sizes(shape, choice);
        CHECK(sizes.page_bytes() ==
              shape.num_layers * shape.num_kv_heads * codec.block_bytes(geometry_of(shape)));
        CHECK((sizes.tail_bytes() > 0) == codec.needs_whole_blocks());
      }
    }
  }
}

TEST_CASE("a plan's bytes are those of a pool that was made by it", "[serving]") {
  test::random random;
  const std::vector<index_t> all_block_sizes{16, 32, 64, 128, 256};
  for (int round = 0; round < 40; ++round) {
    const model_shape model{1 + random.below(2), 2, 1 + random.below(2), 1 + random.below(40)};
    const index_t num_sequences = 1 + random.below(3);
    const index_t context = 1 + random.below(400);
    std::vector<codec_choice> codecs = default_choices();
    codecs.push_back({"channel4", "channel4", random.below(17), 0});
    codecs.push_back({"rotated4", "bf16", random.below(2), random.below(300)});
    codecs.push_back({"f32", "balanced3"});
    const index_t memory =
        random.chance(0.5) ? 1_MiB * (1 + random.below(4)) : 20_KiB * (1 + random.below(60));
    const auto block_size = all_block_sizes[static_cast<std::size_t>(random.below(5))];
    const cache_plan made =
        plan(model, memory, num_sequences, context,
             {.codecs = {codecs[static_cast<std::size_t>(random.below(12))]}, .block_sizes = {block_size}});
    const plan_row& row = made.rows.at(0);
    CAPTURE(row.spec, block_size, model.num_layers, model.num_kv_heads, model.head_dim, num_sequences,
            context, memory);
    CHECK(row.fits == (row.budget_bytes > 0 && row.needed_bytes <= memory));
    const bool is_slow = row.spec.find("trellis") != std::string::npos;
    CHECK(row.is_good_enough == (!is_slow && row.quality != nullptr && row.quality->kl_ratio() <= 10));
    CHECK(made.recommended.has_value() == (row.fits && row.is_good_enough));
    if (row.budget_bytes == 0) {
      CHECK(num_sequences * row.tail_bytes + row.page_bytes > memory);
      CHECK_FALSE(row.fits);
      continue;
    }
    CHECK(row.budget_bytes % row.page_bytes == 0);
    CHECK(row.budget_bytes + num_sequences * row.tail_bytes <= memory);
    CHECK(row.budget_bytes + row.page_bytes + num_sequences * row.tail_bytes > memory);

    real_pool real(row, num_sequences);
    CHECK(real.pool.page_bytes() == row.page_bytes);
    CHECK(real.grow_all(context) == row.fits);
    CHECK(real.bytes() <= memory);
    if (row.fits) {
      CHECK(real.bytes() == row.needed_bytes);
      CHECK(row.bytes_per_token == ceil_div(row.page_bytes, row.shape.block_size));
    }
    real.pool.check();
    CHECK(real.pool.bytes().total <= row.budget_bytes);
  }
}

TEST_CASE("every sequence reaches the greatest context and none goes past it", "[serving]") {
  for (const codec_choice& codec : default_choices()) {
    for (const index_t num_sequences : {1, 3}) {
      const model_shape model{2, 2, 1, 16};
      const index_t memory = 160_KiB;
      const plan_row row =
          plan(model, memory, num_sequences, 10, {.codecs = {codec}, .block_sizes = {32}}).rows.at(0);
      CAPTURE(row.spec, num_sequences);
      REQUIRE(row.fits);
      CHECK(row.max_context == row.memory_context);
      real_pool real(row, num_sequences);
      CHECK(real.grow_all(row.memory_context));
      CHECK(real.bytes() <= memory);
      CHECK_FALSE(real.grow_all(1));
      CHECK(plan(model, memory, num_sequences, row.memory_context, {.codecs = {codec}, .block_sizes = {32}})
                .rows[0]
                .fits);
      CHECK_FALSE(
          plan(model, memory, num_sequences, row.memory_context + 1, {.codecs = {codec}, .block_sizes = {32}})
              .rows[0]
              .fits);
    }
  }
}

TEST_CASE("every choice names a spec that can be made", "[serving]") {
  for (const codec::exact_element element : codec::exact_elements) {
    for (const codec_choice& choice : {codec_choice{"int8", "int8", 0, 0, element},
                                       {"channel4", "rotated4", 0, 0, element},
                                       {"int8", "rotated4", 2, 0, element},
                                       {"bf16", "balanced3", 0, 5, element},
                                       {"bf16", "balanced3", 0, 0, element}}) {
      CAPTURE(choice.spec());
      const any_codec made = make_codec(choice.spec());
      CHECK(made.tail_tokens == choice.tail_tokens);
      CHECK(made.exact_as == (choice.seals() ? element : codec::exact_element::bf16));
    }
  }
}

TEST_CASE("an open long step takes what the plan sets aside for it", "[serving]") {
  const auto exact =
      GENERATE(codec::exact_element::bf16, codec::exact_element::f16, codec::exact_element::f32);
  const codec_choice codec{"int8", "int8", 4, 40, exact};
  const plan_options one_step{.codecs = {codec}, .block_sizes = {32}, .long_steps = 1};
  const plan_row row = plan({2, 2, 1, 16}, 1_MiB, 2, 100, one_step).rows.at(0);
  real_pool real(row, 2);
  REQUIRE(real.grow(0, 100));
  REQUIRE(real.grow(1, 50));
  auto step = real.sequences[1].begin(50);
  REQUIRE(real.grow(1, 50));
  CHECK(real.bytes() == row.needed_bytes);
  step.commit();
  CHECK(row.needed_bytes - real.bytes() == cache_sizes(row.shape, codec).long_step_bytes());
}

TEST_CASE("the block size that takes least is taken", "[serving]") {
  const model_shape model{4, 8, 2, 64};
  const std::vector<codec_choice> bf16{{}};
  const auto block_size = [&](index_t context, const std::vector<codec_choice>& codecs,
                              std::vector<index_t> sizes) {
    return plan(model, 1_GiB, 4, context, {.codecs = codecs, .block_sizes = std::move(sizes)})
        .rows.at(0)
        .shape.block_size;
  };
  CHECK(block_size(1024, bf16, {64, 128}) == 64);  // the same: the first
  CHECK(block_size(1024, bf16, {128, 64}) == 128);
  CHECK(block_size(1025, bf16, {128, 64}) == 64);  // less is unused in the last page
  CHECK(block_size(100, bf16, {256, 64, 32, 16}) == 16);
  CHECK(block_size(32 * 1024, {{"channel4", "rotated4"}}, {16, 64}) == 64);  // fewer scales
}

TEST_CASE("weights and a reserve come off first", "[serving]") {
  const model_shape model{.num_layers = 32,
                          .num_q_heads = 32,
                          .num_kv_heads = 8,
                          .head_dim = 128,
                          .weight_bytes = 5_GiB,
                          .max_context = 131072};
  const machine_preset* machine = find_preset("16GB");
  REQUIRE(machine != nullptr);
  const cache_plan made =
      plan(model, machine->memory_bytes, 8, 4096, {.reserve_bytes = machine->reserve_bytes});
  CHECK(made.cache_bytes == 8_GiB);
  const plan_row& bf16 = made.rows.at(0);
  CHECK(bf16.spec == "paged/bf16");
  CHECK(bf16.bytes_per_token == 131072);  // 2 x 32 x 8 x 128 x 2
  CHECK(bf16.needed_bytes == 4_GiB);
  CHECK(bf16.max_context == 8192);            // README: 8,192 tokens take exactly 1 GiB
  CHECK(made.recommended == std::size_t{1});  // f16: the same bytes

  // Twice as long as bf16 holds: the next least lossy. Four times: the next. Nothing for ever.
  const auto recommended = [&](index_t context) -> std::string {
    const cache_plan p =
        plan(model, machine->memory_bytes, 8, context, {.reserve_bytes = machine->reserve_bytes});
    return p.recommended ? p.rows[*p.recommended].spec : "nothing";
  };
  CHECK(recommended(8192) == "paged/f16");
  CHECK(recommended(8193) == "paged/int8,sinks=4,tail=128,exact=f16");
  CHECK(recommended(29000) == "paged/k=channel4,v=rotated4,sinks=4,tail=128,exact=f16");
  CHECK(recommended(38000) == "paged/k=channel3,v=rotated3,sinks=4,tail=128,exact=f16");
  CHECK(recommended(50000) == "nothing");  // 2 bits would fit
  const auto slow = [&](index_t context, double worst) {
    const cache_plan p = plan(model, 16_GiB, 8, context,
                              {.reserve_bytes = 3_GiB, .worst_kl_ratio = worst, .slow_encoding = true});
    return p.recommended ? p.rows[*p.recommended].spec : "nothing";
  };
  CHECK(slow(38000, 10) == "paged/trellis3,sinks=4,tail=128,exact=f16");
  CHECK(slow(50000, 10) == "nothing");
  CHECK(slow(50000, 20) == "paged/trellis2,sinks=4,tail=128,exact=f16");
  const cache_plan roomy = plan(model, 200_GiB, 1, 50000);
  CHECK(roomy.rows[0].max_context == 131072);
  CHECK(roomy.rows[0].memory_context > 131072);

  CHECK(cache_memory(10, 4, 5) == 1);
  CHECK(cache_memory(10, 4, 6) == 0);
  CHECK(cache_memory(10, huge - 6, 6) == 0);
  const cache_plan none = plan(model, 8_GiB, 1, 1, {.reserve_bytes = 4_GiB});
  CHECK(none.cache_bytes == 0);
  CHECK_FALSE(none.recommended.has_value());
  for (const plan_row& row : none.rows) {
    CHECK_FALSE(row.fits);
    CHECK(row.max_context == 0);
    CHECK(row.budget_bytes == 0);
    CHECK(row.needed_bytes > 0);
  }
}

TEST_CASE("presets leave room for an 8B model in 4 bits", "[serving]") {
  CHECK(find_preset("12GB") == nullptr);
  std::vector<std::string> names;
  for (const machine_preset& p : machine_presets) {
    names.emplace_back(p.name);
    CHECK(p.memory_bytes == std::stoll(names.back()) * 1_GiB);
    CHECK(p.reserve_bytes < p.memory_bytes / 2);
    const cache_plan made = plan({32, 32, 8, 128, 4'920'000'000, 131072}, p.memory_bytes, 1, 4096,
                                 {.reserve_bytes = p.reserve_bytes});
    CHECK(made.recommended.has_value());
  }
  CHECK(names == std::vector<std::string>{"8GB", "16GB", "24GB", "64GB"});
}

TEST_CASE("what cannot be planned is refused, and sizes never wrap", "[serving]") {
  const model_shape good{2, 4, 2, 64};
  const auto with = [&](auto change) {
    model_shape m = good;
    change(m);
    return m;
  };
  CHECK_NOTHROW(plan(good, 0, 1, 1));
  for (const model_shape& bad :
       {with([](auto& m) { m.num_layers = 0; }), with([](auto& m) { m.num_kv_heads = 0; }),
        with([](auto& m) { m.num_kv_heads = 3; }), with([](auto& m) { m.num_q_heads = 0; }),
        with([](auto& m) { m.head_dim = 513; }), with([](auto& m) { m.weight_bytes = -1; }),
        with([](auto& m) { m.max_context = -1; }), with([](auto& m) { m.max_context = 99; }),
        with([](auto& m) { m.num_layers = huge; }), with([](auto& m) { m.num_layers = huge / 1024; })})
    CHECK_THROWS_AS(plan(bad, 1_GiB, 1, 100), shape_error);
  CHECK_THROWS_AS(plan(good, -1, 1, 100), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 0, 100), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 0), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, huge, 100), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, huge), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.reserve_bytes = -1}), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.block_sizes = {48}}), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.block_sizes = {}}), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.long_steps = 2}), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.codecs = {{"int8", "int8", 65, 0}}, .block_sizes = {64}}),
                  shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.codecs = {{"int8", "int8", 0, -1}}}), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.codecs = {{"int8", "int8", 0, huge}}}), shape_error);
  CHECK_THROWS_AS(plan(good, 1_GiB, 1, 100, {.codecs = {{"int9", "int8"}}}), std::invalid_argument);
  // As much memory as can be said: no more pages than a pool can have.
  const plan_row most = plan({1, 1, 1, 1}, huge, 1, 1).rows.at(0);
  CHECK(most.budget_bytes / most.page_bytes == cache_sizes::most_pages);
  CHECK(most.memory_context == cache_sizes::most_pages * 64);
  CHECK(plan(good, 1_GiB, 1, 100, {.codecs = {}}).rows.empty());
}

TEST_CASE("whatever the numbers, a plan holds or is refused", "[serving]") {
  test::random random;
  // Of any magnitude, mostly small; now and then negative.
  const auto any_number = [&] {
    return static_cast<index_t>(random() >> (1 + random.below(63)) >> random.below(60)) -
           (random.chance(0.02) ? 1 : 0);
  };
  int num_plans = 0, num_refused = 0;
  for (int round = 0; round < 3000; ++round) {
    const index_t kv_heads = 1 + any_number();
    const index_t context = 1 + any_number();
    const index_t num_sequences = 1 + any_number();
    const model_shape model{1 + any_number(),      kv_heads,     kv_heads,
                            1 + random.below(512), any_number(), random.chance(0.9) ? 0 : any_number()};
    const auto memory = static_cast<index_t>(random() >> (1 + random.below(63)));
    const plan_options options{.reserve_bytes = any_number(),
                               .codecs = {{"channel4", "rotated4", random.below(17), any_number()}},
                               .long_steps = random.chance(0.9) ? 0 : any_number()};
    try {
      const cache_plan made = plan(model, memory, num_sequences, context, options);
      const plan_row& row = made.rows.at(0);
      ++num_plans;
      const bool holds = made.cache_bytes >= 0 && made.cache_bytes <= memory && row.page_bytes > 0 &&
                         row.needed_bytes >= 0 && row.budget_bytes >= 0 &&
                         row.budget_bytes <= made.cache_bytes && row.max_context <= row.memory_context &&
                         row.fits == (row.budget_bytes > 0 && row.needed_bytes <= made.cache_bytes &&
                                      context <= row.memory_context);
      if (!holds) FAIL("round " << round);
    } catch (const shape_error&) {
      ++num_refused;
    }
  }
  CHECK(num_plans > 100);
  CHECK(num_refused > 100);
}

TEST_CASE("a choice is judged by the longest tail that was measured and is not longer", "[serving]") {
  const auto tail_of = [](const codec_choice& choice) {
    const quality_figures* f = find_quality(choice);
    return f == nullptr ? index_t{-1} : f->tail_tokens;
  };
  CHECK(tail_of({"int8", "int8", 0, 0}) == 0);
  CHECK(tail_of({"int8", "int8", 4, 127}) == 0);
  CHECK(tail_of({"int8", "int8", 0, 128}) == 0);
  CHECK(tail_of({"int8", "int8", 4, 128}) == 128);
  CHECK(tail_of({"int8", "int8", 16, 512}) == 128);
  CHECK(tail_of({"channel4", "channel4", 4, 128}) == 128);
  const auto element_of = [](const codec_choice& choice) { return find_quality(choice)->exact_as; };
  for (const codec::exact_element element : codec::exact_elements) {
    CHECK(element_of({"int8", "int8", 4, 128, element}) == std::min(element, codec::exact_element::f16));
    CHECK(tail_of({"int8", "int8", 4, 100, element}) == 0);
  }
  CHECK(tail_of({"trellis3", "trellis3", 0, 0}) == -1);
  CHECK(tail_of({"bf16", "rotated2", 0, 0}) == -1);
  CHECK(find_speed({"channel3", "channel3"}) == find_speed({"channel3", "rotated3", 4, 128}));
  CHECK(find_speed({"f32", "f32"}) == nullptr);
  CHECK(find_speed({"int8", "int8"})->decode_at(4) == 1.9);
  CHECK(find_speed({"int8", "int8"})->decode_at(8) == 1.6);
  // Nothing is recommended that was not measured.
  CHECK_FALSE(
      plan({2, 4, 2, 64}, 1_GiB, 1, 100, {.codecs = {{"trellis3", "trellis3"}}}).recommended.has_value());
}

TEST_CASE("the figures of quality are those of docs/codecs.md", "[serving]") {
  const std::string page = file_text("docs/codecs.md");
  const auto model = markdown_table(page, "codec | tail | bits", "## The bundled model");
  const auto heads = markdown_table(page, "codec | keys: bits | KL", "## Synthetic heads");
  const auto trellis_heads = markdown_table(page, "codec | keys: bits | KL", "## With trellis codecs");
  const auto centred_heads = markdown_table(page, "codec | keys: bits | KL", "## Keys without their mean");
  const auto number = [](const std::string& cell) { return std::stod(cell); };
  for (const quality_figures& f : measured_quality) {
    const std::string name = name_of(f.keys, f.values);
    CAPTURE(name, f.tail_tokens);
    if (name == "f32") {
      CHECK(f.median_kl == 0);
      CHECK(page.find("f32\ngives 318 of 320") != std::string::npos);
      continue;
    }
    const auto& heads_of_kind = name.starts_with("centred_")                ? centred_heads
                                : name.find("trellis") != std::string::npos ? trellis_heads
                                                                            : heads;
    const std::string tail =
        std::to_string(f.tail_tokens) + (f.exact_as == codec::exact_element::f16 ? " f16" : "");
    const auto* row = find_row(model, name, tail);
    REQUIRE(row != nullptr);
    CHECK(same(f.median_kl, number(row->at(3))));
    CHECK(same(f.reference_kl, number(find_row(model, "int8", "128")->at(3))));
    CHECK(std::to_string(f.recalled) + "/320" == row->at(8));
    // Bits there include scales, at 64 dims and blocks of 128 tokens.
    const cache_sizes sizes({1, 1, 64, 128}, {std::string(f.keys), std::string(f.values)});
    CHECK(std::abs(sizes.bits_per_number() - number(row->at(2))) < 0.0006);
    const auto* head = find_row(heads_of_kind, name);
    CHECK((head != nullptr) == f.key_output_error.has_value());
    if (head == nullptr) continue;
    CHECK(same(*f.key_output_error, number(head->at(3))));
    CHECK(same(*f.value_output_error, number(head->at(4))));
  }
}

TEST_CASE("the figures of speed are those of the README", "[serving]") {
  const auto table = markdown_table(file_text("README.md"), "codec | 4 query heads", "Codecs against bf16");
  // a heading; all that was measured but bf16, which the others are measured by; low_rank and twice klt, which no plan weighs
  REQUIRE(table.size() == 1 + measured_speed.size() - 1 + 3);
  for (const speed_figures& f : measured_speed) {
    const std::string name(f.keys == f.values ? f.keys : std::string(f.keys) + " + " + std::string(f.values));
    CAPTURE(name);
    if (name == "bf16") continue;
    const auto row = std::find_if(table.begin(), table.end(), [&](const auto& r) { return r.at(0) == name; });
    REQUIRE(row != table.end());
    for (std::size_t group = 0; group < 2; ++group) {
      const std::string& cell = row->at(1 + group);
      CHECK(same(f.decode[2 * group], std::stod(cell)));
      CHECK(same(f.decode[2 * group + 1], std::stod(cell.substr(cell.find('/') + 1))));
    }
    CHECK((row->at(3) != "-") == f.encode_us.has_value());
    if (f.encode_us) CHECK(same(*f.encode_us, std::stod(row->at(3))));
  }
}

TEST_CASE("centred codecs are recommended where the cache is told how keys are rotated", "[serving]") {
  const model_shape model{2, 8, 4, 64};
  const auto planned = [&](bool knows_rope, bool slow_encoding = false) {
    const index_t room =
        cache_sizes({2, 4, 64, 128}, {"centred_rotated4", "centred_rotated4", 4, 128}).sequence_bytes(4096);
    return plan(model, room, 1, 4096,
                {.codecs = default_choices(true), .slow_encoding = slow_encoding, .knows_rope = knows_rope});
  };
  const auto recommended = [](const cache_plan& made) { return made.rows.at(made.recommended.value()).spec; };
  CHECK(recommended(planned(true)) == "paged/centred_rotated4,sinks=4,tail=128,exact=f16");
  CHECK(recommended(planned(true, true)) == "paged/centred_trellis4,sinks=4,tail=128,exact=f16");
  CHECK(recommended(planned(false)).find("centred") == std::string::npos);
  for (const plan_row& row : planned(true).rows) {
    CAPTURE(row.spec);
    CHECK(row.quality != nullptr);
    CHECK(row.is_good_enough ==
          (row.quality->kl_ratio() <= 10 && row.spec.find("trellis") == std::string::npos));
  }
  // by the name of the keys' codec, whatever the values are called
  CHECK(find_quality({"centred_rotated4", "rotated4", 4, 128}) ==
        find_quality({"centred_rotated4", "centred_rotated4", 4, 128}));
  CHECK(find_quality({"centred_rotated4", "rotated3", 4, 128}) == nullptr);
  CHECK(find_speed({"centred_trellis3", "trellis3"})->decode_at(4) == 1.3);
  CHECK(default_choices().size() == 10);
}

TEST_CASE("the lines of docs/planning.md make a pool", "[serving]") {
  // clang-format off
  // planning.md begin
  const serving::model_shape model{.num_layers = 32, .num_q_heads = 32, .num_kv_heads = 8, .head_dim = 128,
                                   .weight_bytes = 5_GiB, .max_context = 131072};
  const serving::cache_plan made = serving::plan(model, 16_GiB, 8, 32768, {.reserve_bytes = 3_GiB});
  if (made.recommended) {
    const serving::plan_row& row = made.rows[*made.recommended];
    page_pool<any_codec> pool(row.shape, {.budget_bytes = row.budget_bytes}, make_codec(row.codec.spec()));
  }
  // planning.md end
  // clang-format on
  CHECK(made.recommended.has_value());
  const std::string source = file_text("tests/serving/planner_test.cpp");
  const std::string begin = "  // planning.md begin\n";
  const std::size_t from = source.find(begin) + begin.size();
  std::istringstream lines(source.substr(from, source.find("  // planning.md end\n") - from));
  std::string shown;
  for (std::string line; std::getline(lines, line);) shown += line.substr(2) + "\n";
  CHECK(file_text("docs/planning.md").find("```cpp\n" + shown + "```\n") != std::string::npos);
}
