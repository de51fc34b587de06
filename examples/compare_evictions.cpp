// SPDX-License-Identifier: MIT
// Measures what token policies forget: facts that a model still recalls at 1/2, 1/4 and 1/8 of the tokens.
//
//   compare_evictions
//   compare_evictions --cache paged/int8 --documents 2 --unit 1
#include "common/program.hpp"
#include "llama/command_line.hpp"
#include "llama/load_model.hpp"
#include "llama/text_table.hpp"
#include "streaming/recall.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace {

using llama::index_t;

struct options {
  std::filesystem::path model = llama::default_model();
  std::string cache = "paged/bf16";
  index_t num_documents = 64;
  index_t block_size = 16;
  std::vector<index_t> units = {1, 16};
};

constexpr double shares[] = {1.0 / 2, 1.0 / 4, 1.0 / 8};

/// Right answers of every policy, in the order of `settings`.
using answers = std::vector<std::pair<std::string, std::vector<index_t>>>;

std::optional<options> parse(int argc, char** argv, int& exit_code) {
  options given;
  CLI::App app{"Measures what is recalled after eviction, for every policy."};
  app.add_option("--model", given.model, "folder with recall documents in its reference.json")
      ->capture_default_str();
  app.add_option("--cache", given.cache, "container/codec, see kvcache::make_cache")->capture_default_str();
  app.add_option("--documents", given.num_documents, "at most")->capture_default_str();
  app.add_option("--block-size", given.block_size, "tokens")->capture_default_str();
  app.add_option("--unit", given.units, "tokens that go together: 1, the block size, or both")
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  if (given.num_documents < 1) throw llama::usage_error("--documents: at least 1");
  if (!kvcache::is_block_size(given.block_size))
    throw llama::usage_error("--block-size: 16, 32, 64, 128 or 256");
  for (const index_t unit : given.units) {
    if (unit != 1 && unit != given.block_size)
      throw llama::usage_error("--unit: 1 or the block size, " + std::to_string(given.block_size));
  }
  try {
    (void)kvcache::make_cache(given.cache, {.num_layers = 1, .num_kv_heads = 1, .head_dim = 2});
  } catch (const std::invalid_argument& error) {
    throw llama::usage_error("--cache: " + std::string(error.what()));
  }
  return given;
}

/// Adds the right answers of one document.
template <class Policy>
void add_answers(const streaming::document_reader& reader, const Policy& policy,
                 const std::vector<streaming::recall_setting>& settings, std::size_t row, answers& all) {
  if (row == all.size()) all.emplace_back(Policy::name, std::vector<index_t>(settings.size(), 0));
  for (std::size_t i = 0; i < settings.size(); ++i)
    all[row].second[i] += reader.count_answers(policy, settings[i]);
}

void run(const options& given) {
  const llama::decoder model(llama::load_model(given.model));
  auto documents = streaming::read_documents(given.model);
  if (std::ssize(documents) > given.num_documents)
    documents.resize(static_cast<std::size_t>(given.num_documents));

  std::vector<streaming::recall_setting> settings;
  std::vector<std::string> titles{"policy"};
  for (const bool visible : {false, true}) {
    for (const index_t unit : given.units) {
      if (visible && unit != given.units.front()) continue;
      for (const double share : shares) {
        settings.push_back({share, unit, visible});
        titles.push_back("1/" + std::to_string(std::lround(1 / share)) + (unit > 1 ? " blocks" : "") +
                         (visible ? " seen" : ""));
      }
    }
  }

  answers all;
  index_t questions = 0;
  index_t full = 0;  // right answers with all tokens
  index_t tokens = 0;
  for (const auto& document : documents) {
    const streaming::document_reader reader(model, document, given.cache, given.block_size);
    questions += document.num_questions();
    tokens += document.first_question;
    full += reader.count_answers(streaming::eviction::sliding_window{}, {});
    std::size_t row = 0;
    for (const auto& policy : streaming::all_policies())
      std::visit([&](const auto& p) { add_answers(reader, p, settings, row++, all); }, policy);
    add_answers(reader, streaming::random_tokens{}, settings, row, all);
  }

  std::cout << "Facts recalled, % of " << questions << " questions about " << documents.size()
            << " documents of " << tokens / std::ssize(documents) << " tokens on average; " << given.cache
            << ", all tokens kept: "
            << llama::formatted("%.1f", 100.0 * static_cast<double>(full) / static_cast<double>(questions))
            << "\nTokens are chosen before the questions are known, but in columns that say `seen`\n\n";
  llama::text_table table(titles, llama::text_table::names_first);
  for (const auto& [name, correct] : all) {
    std::vector<std::string> cells{name};
    for (const index_t n : correct)
      cells.push_back(
          llama::formatted("%.1f", 100.0 * static_cast<double>(n) / static_cast<double>(questions)));
    table.add(cells);
  }
  std::cout << table;
  if (!std::cout.flush()) throw std::runtime_error("standard output cannot be written");
}

}  // namespace

int main(int argc, char** argv) { return program::run("compare_evictions", argc, argv, parse, run); }
