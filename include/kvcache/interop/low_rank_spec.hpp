// SPDX-License-Identifier: MIT
// make_cache_with_low_rank: make_cache, and low_rank by name, with bases that are found in the sequence's own first tokens.
//
//   auto cache = make_cache_with_low_rank("chunked/k=low_rank48,v=low_rank64,fit=512,tail=128", shape);
//
//   tokens  |   0 .. fit + tail: all exact          |   then: bases from tokens 0 .. fit, everything older than the tail
//                                                       in them, once, and on from there like any low_rank cache
//
// Wherever a codec may stand, also in first=, last=, layers=:
//
//   low_rank48      the 48 components with the most energy, 8 bits each (codec/low_rank.hpp)
//   low_rank99.5%   as many as hold so much of the energy in every head
//   low_rank3bit    3 bits to a number of the head, scales included, in components of 8, 4, 2 or no bits as fits best
//
// `fit` is 512 unless given. The append, or the end of the step, that makes the last layer long enough
// takes the time of two eigenvalue problems of head_dim for each head, and memory for both copies. Where that memory is not
// to be had the tokens stay exact, and it is tried again when there are twice as many. Forks made before that each find
// bases of their own, and share no pages with one another afterwards.
//
// store::save and load_any take such a cache as any other, see interop/any_snapshot.hpp; what was saved before there were
// bases comes back through load_any_with_low_rank, in interop/low_rank_snapshot.hpp.
//
// Needs Eigen's solvers, so kvcache.hpp leaves it out.
#pragma once

#include <kvcache/cache/recoded.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/low_rank_chooser.hpp>
#include <kvcache/codec/low_rank_layout.hpp>
#include <kvcache/core/executor.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_cache.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/interop/spec_text.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

namespace detail {

/// A whole number, all of `text`, above zero; nothing if it is something else.
inline std::optional<index_t> positive_number(std::string_view text) {
  constexpr index_t most = index_t{1} << 30;
  index_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size() || number < 1 || number > most) return {};
  return number;
}

/// What a reader of specs knows, and low_rank: from a calibration, or, while there is none, bf16 in its place.
class low_rank_source : public known_codec_source {
 public:
  static constexpr std::string_view more_options = ", fit=";

  low_rank_source() = default;
  explicit low_rank_source(const cache_shape& shape) : shape_(shape) {}
  explicit low_rank_source(const codec::low_rank_calibration& calibration) : calibration_(&calibration) {}

  [[nodiscard]] std::optional<codec::any_keys> keys(std::string_view name) const {
    const auto options = options_in<codec::detail::key_groups>(name);
    if (!options) return known_codec_source::keys(name);
    if (calibration_ == nullptr) return codec::any_keys{};
    codec::low_rank_keys keys;
    keys.bases = calibration_->bases(*options, {.left_out = true});
    return codec::any_keys::of(keys);
  }
  [[nodiscard]] std::optional<codec::any_values> values(std::string_view name) const {
    const auto options = options_in<codec::detail::value_groups>(name);
    if (!options) return known_codec_source::values(name);
    if (calibration_ == nullptr) return codec::any_values{};
    codec::low_rank_values values;
    values.bases = calibration_->bases({.left_out = true}, *options);
    return codec::any_values::of(values);
  }
  [[nodiscard]] static std::string names() {
    return list() + ", low_rank<rank>, <energy>% or <bits>bit as in low_rank48, low_rank99%, low_rank3bit";
  }

 private:
  /// Throws shape_error where they cannot be for the shape.
  template <class Groups>
  [[nodiscard]] std::optional<codec::low_rank_options> options_in(std::string_view name) const {
    constexpr std::string_view prefix = codec::low_rank::name;
    if (name.substr(0, prefix.size()) != prefix) return {};
    const std::string_view amount = name.substr(prefix.size());
    codec::low_rank_options options;
    if (const auto rank = positive_number(amount)) {
      options.rank = *rank;
    } else if (const auto percent = positive_number_before("%", amount)) {
      options.energy = *percent / 100;
    } else if (const auto bits = positive_number_before("bit", amount)) {
      options.bits_per_value = *bits;
      options.store = codec::component_store::allocated;
    } else {
      return {};
    }
    if (calibration_ == nullptr) check<Groups>(options, name);
    return options;
  }

  /// Such a number with `unit` behind it.
  static std::optional<double> positive_number_before(std::string_view unit, std::string_view text) {
    double number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    const std::string_view rest(end, static_cast<std::size_t>(text.data() + text.size() - end));
    if (error != std::errc{} || rest != unit || !std::isfinite(number) || number <= 0) return {};
    return number;
  }

  /// Chooses among components that are all alike: what cannot be is refused here, not when there are rows.
  template <class Groups>
  void check(const codec::low_rank_options& options, std::string_view name) const {
    cache_shape one = shape_;
    one.num_layers = one.num_kv_heads = 1;
    const std::vector<std::vector<double>> energies{
        std::vector<double>(static_cast<std::size_t>(one.head_dim), 1.0)};
    try {
      (void)codec::detail::layout_chooser<Groups>(one, options, energies).choose();
    } catch (const shape_error& error) {
      constexpr std::string_view who = "kvcache: low_rank: ";
      std::string_view what = error.what();
      if (what.substr(0, who.size()) == who) what.remove_prefix(who.size());
      throw shape_error("kvcache: '" + shown(name) + "', head_dim " + std::to_string(one.head_dim) + ": " +
                        std::string(what));
    }
  }

  cache_shape shape_;
  const codec::low_rank_calibration* calibration_ = nullptr;
};

/// A spec with low_rank in it, taken apart and checked.
struct low_rank_plan {
  std::string spec;
  cache_shape shape;
  std::string container = {};
  std::string codec = {};  // without fit=
  index_t fit_tokens = 512;
  index_t tail_tokens = 0;
  codec::exact_tokens exact = {};

  /// Throws std::invalid_argument and shape_error as make_cache does.
  low_rank_plan(const std::string& whole, const cache_shape& wanted) : spec(whole), shape(wanted) {
    const spec_parts parts = parts_of(spec);
    container = parts.container;
    bool fit_is_given = false;
    for (std::string_view rest = parts.codec; !rest.empty();) {
      const std::string_view piece = rest.substr(0, rest.find(','));
      rest.remove_prefix(std::min(piece.size() + 1, rest.size()));
      if (piece.substr(0, 4) == "fit=") {
        const auto tokens = positive_number(piece.substr(4));
        if (!tokens) throw std::invalid_argument("kvcache: '" + shown(piece) + "' is not a number of tokens");
        if (std::exchange(fit_is_given, true)) throw std::invalid_argument("kvcache: 'fit=' is given twice");
        fit_tokens = *tokens;
      } else {
        codec.append(codec.empty() ? "" : ",").append(piece);
      }
    }
    if (!parts.codec.empty() && parts.codec.back() == ',') codec.append(",");  // for the reader to refuse
    validate(shape);
    const auto in_place =
        codec_spec_reader<low_rank_source>(codec, shape.num_layers, shape.head_dim, low_rank_source(shape))
            .read_by_layer();
    tail_tokens = in_place.tail_tokens;
    exact = {in_place.exact_as};
    (void)make_container(spec, container, in_place, shape);  // whatever else it would refuse later
  }

  [[nodiscard]] any_cache exact_cache() const {
    // With a tail, so that rows that are not finite are refused from the start.
    const std::string element(exact.name());
    return make_cache(container + "/" + element + ",exact=" + element +
                          ",tail=" + std::to_string(std::max(tail_tokens, index_t{1})),
                      shape);
  }
  [[nodiscard]] any_cache fitted_cache(const codec::low_rank_calibration& calibration) const {
    codec_spec_reader<low_rank_source> reader(codec, shape.num_layers, shape.head_dim,
                                              low_rank_source(calibration));
    return make_container(spec, container, reader.read_by_layer(), shape);
  }
};

/// Exact until there are tokens enough to find bases in, then low_rank.
class fitting_cache final : public erased_cache {
 public:
  explicit fitting_cache(const std::shared_ptr<const low_rank_plan>& plan)
      : fitting_cache(plan, plan->exact_cache()) {}
  /// \param exact  plan->exact_cache(), which may have got tokens
  fitting_cache(std::shared_ptr<const low_rank_plan> plan, any_cache exact)
      : plan_(std::move(plan)), cache_(std::move(exact)), due_(plan_->fit_tokens + plan_->tail_tokens) {}

  status try_append(index_t layer, std::span<const float> k, std::span<const float> v) override {
    const status s = cache_[layer].try_append(k, v);
    if (s == status::ok && !in_step_) fit_when_due();
    return s;
  }
  void attend(std::span<const attend_item<any_layer>> batch, const attend_options& options,
              executor_ref executor) const override {
    contents().attend(batch, options, executor);
  }
  void add_token_weights(index_t layer, std::span<const float> q, std::span<const float> lse,
                         std::span<float> sums, const attend_options& options,
                         executor_ref executor) const override {
    cache_[layer].add_token_weights(q, lse, sums, options, executor);
  }
  void copy_out(index_t layer, index_t first, index_t count, std::span<float> k, std::span<float> v,
                kv_layout layout) const override {
    cache_[layer].copy_out(first, count, k, v, layout);
  }
  [[nodiscard]] const cache_shape& shape() const noexcept override { return cache_.shape(); }
  [[nodiscard]] index_t size() const noexcept override { return cache_.size(); }
  [[nodiscard]] index_t layer_size(index_t layer) const noexcept override { return cache_[layer].size(); }
  [[nodiscard]] index_t bytes_per_token() const noexcept override { return cache_.bytes_per_token(); }
  [[nodiscard]] std::optional<codec::exact_element> exact_as() const noexcept override {
    return cache_.exact_as();
  }
  [[nodiscard]] memory_use bytes() const noexcept override { return cache_.bytes(); }
  [[nodiscard]] const position_map& positions() const noexcept override { return cache_.positions(); }
  void shift(index_t first, index_t last, index_t delta) override { cache_.shift(first, last, delta); }
  void set_positions(const position_map& positions) override { cache_.set_positions(positions); }
  [[nodiscard]] keep_result keep_tokens(std::span<const index_t> tokens, keep_positions mode) override {
    return cache_.keep_tokens(tokens, mode);
  }
  [[nodiscard]] kvcache::keep_limits keep_limits() const noexcept override { return cache_.keep_limits(); }
  status reserve(index_t num_tokens) override {
    const status s = cache_.reserve(num_tokens);
    if (s == status::ok) reserved_ = std::max(reserved_, num_tokens);
    return s;
  }
  void truncate(index_t num_tokens) noexcept override {
    cache_.truncate(num_tokens);
    reserved_ = 0;
  }
  [[nodiscard]] std::unique_ptr<erased_cache> clone() const override { return copied(cache_.clone()); }
  [[nodiscard]] std::unique_ptr<erased_cache> fork(index_t num_tokens) const override {
    return copied(cache_.fork(num_tokens));
  }
  void shrink_to_fit() noexcept override {
    cache_.shrink_to_fit();
    reserved_ = 0;
  }
  status begin_step(index_t num_tokens) override {
    const status s = cache_.begin_step(num_tokens);
    in_step_ = s == status::ok;
    return s;
  }
  void end_step(bool commit) noexcept override {
    cache_.end_step(commit);
    in_step_ = false;
    fit_when_due();
  }
  void check() const override { cache_.check(); }
  [[nodiscard]] const erased_cache& contents() const noexcept override { return cache_.contents(); }

 private:
  fitting_cache(const fitting_cache& other, any_cache cache)
      : plan_(other.plan_), cache_(std::move(cache)), due_(other.due_), fitted_(other.fitted_) {}

  [[nodiscard]] std::unique_ptr<erased_cache> copied(any_cache cache) const {
    return std::unique_ptr<erased_cache>(new fitting_cache(*this, std::move(cache)));
  }

  void fit_when_due() noexcept {
    if (fitted_ || size() < due_) return;
    try {
      any_cache made = recoded(cache_, plan_->fitted_cache(calibrated()));
      if (reserved_ > made.size()) {
        if (const status s = made.reserve(reserved_); s != status::ok) throw capacity_error("reserve", s);
      }
      cache_ = std::move(made);
      fitted_ = true;
    } catch (const std::bad_alloc&) {
      due_ = 2 * size();
    } catch (const capacity_error&) {
      due_ = 2 * size();
    } catch (const shape_error&) {  // numbers that are not finite, which files may bring: it stays exact
      due_ = 2 * size();
    }
  }

  /// What the first tokens of every layer look like.
  [[nodiscard]] codec::low_rank_calibration calibrated() const {
    codec::low_rank_calibration calibration(shape());
    std::vector<float> k(
        static_cast<std::size_t>(plan_->fit_tokens * shape().num_kv_heads * shape().head_dim));
    std::vector<float> v(k.size());
    for (index_t layer = 0; layer < shape().num_layers; ++layer) {
      cache_[layer].copy_out(0, plan_->fit_tokens, k, v);
      calibration.add(layer, k, v);
    }
    return calibration;
  }

  std::shared_ptr<const low_rank_plan> plan_;
  any_cache cache_;
  index_t due_;           // tokens of every layer from which on bases are looked for
  index_t reserved_ = 0;  // tokens there was room for when cache_ was last asked
  bool fitted_ = false;
  bool in_step_ = false;
};

}  // namespace detail

/// \param spec  as for make_cache, with low_rank as above among the codecs and fit=<tokens>; one without is make_cache's
/// Throws std::invalid_argument that lists what there is, and shape_error.
inline any_cache make_cache_with_low_rank(const std::string& spec, const cache_shape& shape) {
  if (spec.find(codec::low_rank::name) == std::string::npos) return make_cache(spec, shape);
  auto plan = std::make_shared<const detail::low_rank_plan>(spec, shape);
  return {spec,
          std::unique_ptr<detail::erased_cache>(std::make_unique<detail::fitting_cache>(std::move(plan)))};
}

}  // namespace kvcache::inline v0
