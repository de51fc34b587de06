// SPDX-License-Identifier: MIT
// any_cache: a cache whose container and codec are chosen by a string at run time.
//
//   any_cache cache = make_cache("paged/bf16", shape);       container / codec
//   cache[layer].append(k, v);
//   attend(q, cache[layer], out);
//
// One virtual call per append and per attend, one more per task of it; blocks are walked by the same code as in the typed
// containers.
#pragma once

#include <kvcache/attention/attend.hpp>
#include <kvcache/attention/weights.hpp>
#include <kvcache/cache/concepts.hpp>
#include <kvcache/cache/keep_tokens.hpp>
#include <kvcache/cache/step.hpp>
#include <kvcache/codec/by_layer.hpp>
#include <kvcache/codec/exact_tokens.hpp>
#include <kvcache/core/executor.hpp>
#include <kvcache/core/rope_config.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/interop/named_codecs.hpp>
#include <kvcache/interop/spec_text.hpp>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

class any_layer;

namespace detail {

/// What any_cache calls; one function per verb of the containers.
class erased_cache {
 public:
  erased_cache() = default;
  erased_cache(const erased_cache&) = delete;
  erased_cache& operator=(const erased_cache&) = delete;
  virtual ~erased_cache() = default;

  virtual status try_append(index_t layer, std::span<const float> k, std::span<const float> v) = 0;
  /// Attends over the items of a batch whose contents() are of the type of this one's; leaves the others alone.
  virtual void attend(std::span<const attend_item<any_layer>> batch, const attend_options& options,
                      executor_ref executor) const = 0;
  virtual void add_token_weights(index_t layer, std::span<const float> q, std::span<const float> lse,
                                 std::span<float> sums, const attend_options& options,
                                 executor_ref executor) const = 0;
  virtual void copy_out(index_t layer, index_t first, index_t count, std::span<float> k, std::span<float> v,
                        kv_layout layout) const = 0;
  [[nodiscard]] virtual const cache_shape& shape() const noexcept = 0;
  [[nodiscard]] virtual index_t size() const noexcept = 0;
  [[nodiscard]] virtual index_t layer_size(index_t layer) const noexcept = 0;
  [[nodiscard]] virtual index_t bytes_per_token() const noexcept = 0;
  [[nodiscard]] virtual std::optional<codec::exact_element> exact_as() const noexcept = 0;
  [[nodiscard]] virtual memory_use bytes() const noexcept = 0;
  [[nodiscard]] virtual const position_map& positions() const noexcept = 0;
  virtual void shift(index_t first, index_t last, index_t delta) = 0;
  virtual void set_positions(const position_map& positions) = 0;
  [[nodiscard]] virtual keep_result keep_tokens(std::span<const index_t> tokens, keep_positions mode) = 0;
  [[nodiscard]] virtual kvcache::keep_limits keep_limits() const noexcept = 0;
  virtual status reserve(index_t num_tokens) = 0;
  virtual void truncate(index_t num_tokens) noexcept = 0;
  [[nodiscard]] virtual std::unique_ptr<erased_cache> clone() const = 0;
  [[nodiscard]] virtual std::unique_ptr<erased_cache> fork(index_t num_tokens) const = 0;
  virtual void shrink_to_fit() noexcept = 0;
  virtual status begin_step(index_t num_tokens) = 0;
  virtual void end_step(bool commit) noexcept = 0;
  virtual void check() const = 0;
  /// The one that has the tokens, where this one stands before it.
  [[nodiscard]] virtual const erased_cache& contents() const noexcept { return *this; }
};

template <kv_cache Cache>
class erased_cache_of final : public erased_cache {
 public:
  explicit erased_cache_of(Cache cache) : cache_(std::move(cache)) {}

  [[nodiscard]] Cache& cache() noexcept { return cache_; }
  [[nodiscard]] const Cache& cache() const noexcept { return cache_; }
  status try_append(index_t layer, std::span<const float> k, std::span<const float> v) override {
    return cache_.try_append(layer, k, v);
  }
  void attend(std::span<const attend_item<any_layer>> batch, const attend_options& options,
              executor_ref executor) const override;
  void add_token_weights(index_t layer, std::span<const float> q, std::span<const float> lse,
                         std::span<float> sums, const attend_options& options,
                         executor_ref executor) const override {
    kvcache::add_token_weights(q, cache_[layer], lse, sums, options, executor);
  }
  void copy_out(index_t layer, index_t first, index_t count, std::span<float> k, std::span<float> v,
                kv_layout layout) const override {
    cache_.copy_out(layer, first, count, k, v, layout);
  }
  [[nodiscard]] const cache_shape& shape() const noexcept override { return cache_.shape(); }
  [[nodiscard]] index_t size() const noexcept override { return cache_.size(); }
  [[nodiscard]] index_t layer_size(index_t layer) const noexcept override { return cache_.layer_size(layer); }
  [[nodiscard]] std::optional<codec::exact_element> exact_as() const noexcept override {
    return codec::exact_element_in(cache_);
  }
  [[nodiscard]] index_t bytes_per_token() const noexcept override {
    return kvcache::bytes_per_token(cache_.shape(), cache_.codec());
  }
  [[nodiscard]] memory_use bytes() const noexcept override { return cache_.bytes(); }
  [[nodiscard]] const position_map& positions() const noexcept override { return cache_.positions(); }
  void shift(index_t first, index_t last, index_t delta) override { cache_.shift(first, last, delta); }
  void set_positions(const position_map& positions) override { cache_.set_positions(positions); }
  [[nodiscard]] keep_result keep_tokens(std::span<const index_t> tokens, keep_positions mode) override {
    return cache_.keep_tokens(tokens, mode);
  }
  [[nodiscard]] kvcache::keep_limits keep_limits() const noexcept override { return cache_.keep_limits(); }
  status reserve(index_t num_tokens) override { return cache_.reserve(num_tokens); }
  void truncate(index_t num_tokens) noexcept override { cache_.truncate(num_tokens); }
  [[nodiscard]] std::unique_ptr<erased_cache> clone() const override {
    return std::make_unique<erased_cache_of>(cache_.clone());
  }
  [[nodiscard]] std::unique_ptr<erased_cache> fork(index_t num_tokens) const override {
    return std::make_unique<erased_cache_of>(cache_.fork(num_tokens));
  }
  void shrink_to_fit() noexcept override { cache_.shrink_to_fit(); }
  status begin_step(index_t num_tokens) override { return cache_.begin_step(num_tokens); }
  void end_step(bool commit) noexcept override { cache_.end_step(commit); }
  void check() const override { cache_.check(); }

 private:
  Cache cache_;
};

}  // namespace detail

/// One layer of an any_cache: what layer_ref is to the typed containers, without access to encoded blocks.
/// Like a pointer it does not pass constness on.
class any_layer {
 public:
  any_layer(detail::erased_cache& cache, index_t layer) noexcept : cache_(&cache), layer_(layer) {}

  [[nodiscard]] status try_append(std::span<const float> k, std::span<const float> v) const {
    return cache_->try_append(layer_, k, v);
  }
  void append(std::span<const float> k, std::span<const float> v) const {
    if (const status s = try_append(k, v); s != status::ok) throw capacity_error("append", s);
  }
  [[nodiscard]] index_t index() const noexcept { return layer_; }
  [[nodiscard]] index_t size() const noexcept { return cache_->layer_size(layer_); }
  [[nodiscard]] const cache_shape& shape() const noexcept { return cache_->shape(); }
  [[nodiscard]] const position_map& positions() const noexcept { return cache_->positions(); }
  void copy_out(index_t first, index_t count, std::span<float> k, std::span<float> v,
                kv_layout layout = kv_layout::nhd) const {
    cache_->copy_out(layer_, first, count, k, v, layout);
  }

  /// See attend below.
  void attend(std::span<const float> q, std::span<float> out, const attend_options& options,
              executor_ref executor) const {
    const attend_item<any_layer> item{
        q, *this, out, options.q_len, options.mask, options.q_positions, options.k_positions, options.lse};
    cache_->attend({&item, 1}, options, executor);
  }
  void add_token_weights(std::span<const float> q, std::span<const float> lse, std::span<float> sums,
                         const attend_options& options, executor_ref executor) const {
    cache_->add_token_weights(layer_, q, lse, sums, options, executor);
  }

  /// See any_cache::contents.
  [[nodiscard]] const detail::erased_cache& contents() const noexcept { return cache_->contents(); }

 private:
  detail::erased_cache* cache_;
  index_t layer_;
};

namespace detail {

/// A batch for batch_plan, of caches of one type. Items are translated each time they are asked for, so that no memory holds
/// them; those of other types come without queries, and so without tasks.
template <kv_cache Cache>
class items_of {
 public:
  using layer = std::remove_cvref_t<decltype(std::declval<const Cache&>()[index_t{}])>;

  /// \param some  any cache of the type
  items_of(std::span<const attend_item<any_layer>> batch, const Cache& some) noexcept
      : batch_(batch), some_(&some) {}

  [[nodiscard]] std::size_t size() const noexcept { return batch_.size(); }
  [[nodiscard]] attend_item<layer> operator[](std::size_t i) const noexcept {
    const attend_item<any_layer>& item = batch_[i];
    const erased_cache& cache = item.layer.contents();
    if (typeid(cache) != typeid(erased_cache_of<Cache>)) return {{}, (*some_)[0], {}, 0};
    const Cache& typed = static_cast<const erased_cache_of<Cache>&>(cache).cache();
    return {item.q,    typed[item.layer.index()], item.out,         item.q_len,
            item.mask, item.q_positions,          item.k_positions, item.lse};
  }

 private:
  std::span<const attend_item<any_layer>> batch_;
  const Cache* some_;
};

template <kv_cache Cache>
void erased_cache_of<Cache>::attend(std::span<const attend_item<any_layer>> batch,
                                    const attend_options& options, executor_ref executor) const {
  using items = items_of<Cache>;
  batch_plan<typename items::layer, items>(items(batch, cache_), options).run(executor);
}

/// A cache of each type in a batch, one type after the other: `last` is the one before, null at first; null after the last.
inline const erased_cache* next_type(std::span<const attend_item<any_layer>> batch,
                                     const erased_cache* last) noexcept {
  const erased_cache* next = nullptr;
  for (const attend_item<any_layer>& item : batch) {
    const erased_cache& cache = item.layer.contents();
    const bool to_come = last == nullptr || typeid(*last).before(typeid(cache));
    if (to_come && (next == nullptr || typeid(cache).before(typeid(*next)))) next = &cache;
  }
  return next;
}

}  // namespace detail

/// As for the typed containers; see attention/attend.hpp.
template <executor Executor = serial_executor>
void attend(std::span<const float> q, const any_layer& layer, std::span<float> out,
            const attend_options& options = {}, Executor&& executor = {}) {
  layer.attend(q, out, options, executor_ref(executor));
}

/// Attention of a batch of sequences, of different types, shapes, codecs and lengths if need be; see attention/attend.hpp.
///
/// Caches of one type, such as all that make_cache made of one container, whatever their codecs, are attended over together:
/// workers share all their tasks. Types come one after the other, in no particular order. Results are those of single calls and
/// of typed batches, bit by bit. Allocates what a typed batch of as many items does, and nothing for translating them.
template <executor Executor = serial_executor>
void attend(std::span<const attend_item<any_layer>> batch, const attend_options& options = {},
            Executor&& executor = {}) {
  detail::check_batch_options(options);
  const auto* cache = detail::next_type(batch, nullptr);
  for (; cache != nullptr; cache = detail::next_type(batch, cache))
    cache->attend(batch, options, executor_ref(executor));
}

/// As for the typed containers; see attention/weights.hpp.
template <executor Executor = serial_executor>
void add_token_weights(std::span<const float> q, const any_layer& layer, std::span<const float> lse,
                       std::span<float> sums, const attend_options& options = {}, Executor&& executor = {}) {
  layer.add_token_weights(q, lse, sums, options, executor_ref(executor));
}

/// The verbs of the containers, see sequence_cache. Moved from, it may only be destroyed or assigned to.
class any_cache {
 public:
  template <kv_cache Cache>
  any_cache(std::string spec, Cache cache)
      : spec_(std::move(spec)), cache_(std::make_unique<detail::erased_cache_of<Cache>>(std::move(cache))) {}
  any_cache(std::string spec, std::unique_ptr<detail::erased_cache> cache)
      : spec_(std::move(spec)), cache_(std::move(cache)) {}

  /// What make_cache was given; of what load_any read, what the saved cache said. Of a typed cache's file that is no codec:
  /// then it is the container's name alone, and make_cache does not take it.
  [[nodiscard]] const std::string& spec() const noexcept { return spec_; }

  /// The cache itself, if it is of this type; else null.
  template <kv_cache Cache>
  [[nodiscard]] Cache* get_if() noexcept {
    auto* typed = dynamic_cast<detail::erased_cache_of<Cache>*>(cache_.get());
    return typed != nullptr ? &typed->cache() : nullptr;
  }
  template <kv_cache Cache>
  [[nodiscard]] const Cache* get_if() const noexcept {
    auto* typed = dynamic_cast<detail::erased_cache_of<Cache>*>(cache_.get());
    return typed != nullptr ? &typed->cache() : nullptr;
  }

  /// What interop/any_snapshot.hpp saves: the cache itself, or the one that has its tokens now.
  [[nodiscard]] const detail::erased_cache& contents() const noexcept { return cache_->contents(); }

  [[nodiscard]] any_layer operator[](index_t layer) const noexcept {
    KVCACHE_ASSERT(0 <= layer && layer < shape().num_layers, "the layer must exist");
    return {*cache_, layer};
  }
  [[nodiscard]] const cache_shape& shape() const noexcept { return cache_->shape(); }
  [[nodiscard]] index_t size() const noexcept { return cache_->size(); }
  [[nodiscard]] index_t bytes_per_token() const noexcept { return cache_->bytes_per_token(); }
  /// How tokens are kept exact; nothing where none are.
  [[nodiscard]] std::optional<codec::exact_element> exact_as() const noexcept { return cache_->exact_as(); }
  [[nodiscard]] memory_use bytes() const noexcept { return cache_->bytes(); }
  [[nodiscard]] const position_map& positions() const noexcept { return cache_->positions(); }
  void shift(index_t first, index_t last, index_t delta) { cache_->shift(first, last, delta); }
  void set_positions(const position_map& positions) { cache_->set_positions(positions); }
  [[nodiscard]] keep_result keep_tokens(std::span<const index_t> tokens,
                                        keep_positions mode = keep_positions::original) {
    return cache_->keep_tokens(tokens, mode);
  }
  [[nodiscard]] kvcache::keep_limits keep_limits() const noexcept { return cache_->keep_limits(); }
  [[nodiscard]] status reserve(index_t num_tokens) { return cache_->reserve(num_tokens); }
  void truncate(index_t num_tokens) noexcept { cache_->truncate(num_tokens); }
  void clear() noexcept { truncate(0); }
  void shrink_to_fit() noexcept { cache_->shrink_to_fit(); }
  [[nodiscard]] any_cache clone() const { return {spec_, cache_->clone()}; }
  [[nodiscard]] any_cache fork(index_t num_tokens) const { return {spec_, cache_->fork(num_tokens)}; }
  [[nodiscard]] any_cache fork() const { return fork(size()); }
  void check() const { cache_->check(); }

  using step = cache_step<any_cache>;
  step begin(index_t num_tokens) {
    if (const status s = begin_step(num_tokens); s != status::ok) throw capacity_error("begin", s);
    return step(*this);
  }
  [[nodiscard]] std::optional<step> try_begin(index_t num_tokens) {
    return begin_step(num_tokens) == status::ok ? std::optional<step>(std::in_place, *this) : std::nullopt;
  }
  [[nodiscard]] status begin_step(index_t num_tokens) { return cache_->begin_step(num_tokens); }
  void end_step(bool commit) noexcept { cache_->end_step(commit); }

 private:
  std::string spec_;
  std::unique_ptr<detail::erased_cache> cache_;
};

namespace detail {

inline constexpr std::string_view known_containers[] = {"contiguous", "chunked", "paged"};

/// "container/codec", taken apart.
struct spec_parts {
  std::string_view container;
  std::string_view codec;
};

/// Throws std::invalid_argument that lists the containers.
inline spec_parts parts_of(std::string_view spec) {
  const std::size_t slash = std::min(spec.find('/'), spec.size());
  std::string known;
  for (const std::string_view name : known_containers) {
    if (name == spec.substr(0, slash) && slash < spec.size()) return {name, spec.substr(slash + 1)};
    known.append(known.empty() ? "" : ", ").append(name).append("/<codec>");
  }
  const std::string meant =
      slash == spec.size()
          ? ""
          : did_you_mean(spec.substr(0, slash), {std::begin(known_containers), std::end(known_containers)});
  throw std::invalid_argument("kvcache: there is no cache '" + shown(spec) + "'" + meant + "; there is " +
                              known);
}

KVCACHE_CODECS_INLINE any_cache make_container(const std::string& spec, std::string_view container,
                                               const codec::by_layer<any_codec>& codec,
                                               const cache_shape& shape);

}  // namespace detail

/// Every container with every codec, as make_cache takes them. Options of codecs come on top; see make_codec.
inline std::vector<std::string> cache_specs() {
  std::vector<std::string> specs;
  for (const std::string_view container : detail::known_containers) {
    for (const std::string& codec : codec_names()) specs.push_back(std::string(container) + "/" + codec);
  }
  return specs;
}

/// \param spec  "container/codec", as cache_specs() lists them or with options:
///              "chunked/k=channel4,v=rotated4,sinks=4,tail=128"; for some layers only:
///              "chunked/k=channel3,v=rotated3,first=2:int8,last=2:int8,tail=128"; see codec_spec.hpp
/// \param rope  how the keys that will be appended are rotated, for codecs named centred_; the spec may say so instead, with
///              rope=, or the same: what differs in effect is refused
/// Throws std::invalid_argument that lists what there is, and shape_error, also if rope is for another head_dim.
inline any_cache make_cache(const std::string& spec, const cache_shape& shape,
                            const std::optional<rope_config>& rope = {}) {
  const detail::spec_parts parts = detail::parts_of(spec);
  validate(shape);
  const auto turns = rope ? std::make_shared<const codec::rope_turns>(*rope) : nullptr;
  return detail::make_container(spec, parts.container,
                                make_codec_by_layer(parts.codec, shape.num_layers, shape.head_dim, turns),
                                shape);
}

}  // namespace kvcache::inline v0

#ifndef KVCACHE_SEPARATE_CODECS
#include <kvcache/interop/known_containers.hpp>
#endif
