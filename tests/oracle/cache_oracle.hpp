// SPDX-License-Identifier: MIT
// The model of a cache: one std::vector of rows per layer. What every container has to agree with, exactly.
// Uses nothing of the library; numbers are narrowed with Eigen's 16-bit types.
#pragma once

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace oracle {

/// What reading back gives after a codec stored `x`. \pre `codec` is "f32", "f16" or "bf16"
inline float stored(float x, std::string_view codec) {
  if (codec == "f16") return static_cast<float>(Eigen::half(x));
  if (codec == "bf16") return static_cast<float>(Eigen::bfloat16(x));
  return x;
}

/// Bytes of one row of keys or values.
inline std::ptrdiff_t row_bytes(std::ptrdiff_t head_dim, std::string_view codec) {
  if (codec == "int8") return head_dim + 2;
  if (codec == "rotated4" || codec == "trellis4") return (head_dim * 4 + 7) / 8 + 2;
  if (codec == "rotated3" || codec == "trellis3") return (head_dim * 3 + 7) / 8 + 2;
  if (codec == "rotated2" || codec == "trellis2") return (head_dim * 2 + 7) / 8 + 2;
  return head_dim * (codec == "f32" ? 4 : 2);
}

/// The smallest bfloat16 that is not less than `x`. \pre x >= 0
inline float bfloat16_not_below(float x) {
  Eigen::bfloat16 b(x);
  while (static_cast<float>(b) < x)
    b = Eigen::numext::bit_cast<Eigen::bfloat16>(
        static_cast<std::uint16_t>(Eigen::numext::bit_cast<std::uint16_t>(b) + 1));
  while (x > 0 && static_cast<float>(b) > x) {
    const auto below = Eigen::numext::bit_cast<Eigen::bfloat16>(
        static_cast<std::uint16_t>(Eigen::numext::bit_cast<std::uint16_t>(b) - 1));
    if (static_cast<float>(below) < x) break;
    b = below;
  }
  return static_cast<float>(b);
}

/// The same for rows of one token and head, [n, head_dim], and any codec.
inline std::vector<float> stored_rows(std::vector<float> rows, std::ptrdiff_t head_dim,
                                      std::string_view codec) {
  if (codec != "int8") {
    for (float& x : rows) x = stored(x, codec);
    return rows;
  }
  for (auto row = rows.begin(); row != rows.end(); row += head_dim) {
    float largest = 0;
    std::for_each(row, row + head_dim, [&](float x) { largest = std::max(largest, std::fabs(x)); });
    const float scale = bfloat16_not_below(largest / 127);
    // + 0: an integer has no negative zero
    std::for_each(row, row + head_dim,
                  [&](float& x) { x = scale == 0 ? 0 : scale * std::nearbyint(x / scale) + 0.0F; });
  }
  return rows;
}

class cache {
 public:
  /// What reading rows of a layer back gives, [n, head_dim]; keys if the flag is set.
  using narrow_rows = std::function<std::vector<float>(std::vector<float>, bool, std::ptrdiff_t)>;

  struct row {
    std::vector<float> k;  // [num_kv_heads, head_dim], narrowed
    std::vector<float> v;
  };

  /// \param codec  as for stored_rows
  cache(std::ptrdiff_t num_layers, std::ptrdiff_t num_kv_heads, std::ptrdiff_t head_dim,
        std::string_view codec)
      : cache(num_layers, num_kv_heads, head_dim,
              [name = std::string(codec), head_dim](std::vector<float> rows, bool, std::ptrdiff_t) {
                return stored_rows(std::move(rows), head_dim, name);
              }) {}

  cache(std::ptrdiff_t num_layers, std::ptrdiff_t num_kv_heads, std::ptrdiff_t head_dim, narrow_rows narrow)
      : num_kv_heads_(num_kv_heads),
        head_dim_(head_dim),
        narrow_(std::move(narrow)),
        layers_(static_cast<std::size_t>(num_layers)) {}

  /// k, v: [tokens, num_kv_heads, head_dim]
  void append(std::ptrdiff_t layer, const std::vector<float>& k, const std::vector<float>& v) {
    const std::size_t width = static_cast<std::size_t>(num_kv_heads_ * head_dim_);
    for (std::size_t first = 0; first < k.size(); first += width) {
      const auto narrowed = [&](const std::vector<float>& x, bool keys) {
        const auto begin = x.begin() + static_cast<std::ptrdiff_t>(first);
        return narrow_({begin, begin + static_cast<std::ptrdiff_t>(width)}, keys, layer);
      };
      rows(layer).push_back({narrowed(k, true), narrowed(v, false)});
    }
    while (static_cast<std::ptrdiff_t>(positions_.size()) < longest())
      positions_.push_back(positions_.empty() ? 0 : positions_.back() + 1);
  }

  /// Tokens that every layer has.
  [[nodiscard]] std::ptrdiff_t size() const {
    std::size_t n = layers_.front().size();
    for (const auto& layer : layers_) n = std::min(n, layer.size());
    return static_cast<std::ptrdiff_t>(n);
  }

  [[nodiscard]] std::ptrdiff_t size(std::ptrdiff_t layer) const {
    return static_cast<std::ptrdiff_t>(layers_[static_cast<std::size_t>(layer)].size());
  }

  [[nodiscard]] std::ptrdiff_t longest() const {
    std::size_t n = 0;
    for (const auto& layer : layers_) n = std::max(n, layer.size());
    return static_cast<std::ptrdiff_t>(n);
  }

  void truncate(std::ptrdiff_t n) {
    for (auto& layer : layers_) layer.resize(std::min(layer.size(), static_cast<std::size_t>(n)));
    positions_.resize(std::min(positions_.size(), static_cast<std::size_t>(n)));
  }

  void clear() { truncate(0); }

  [[nodiscard]] cache fork(std::ptrdiff_t n) const {
    cache copy = *this;
    copy.truncate(n);
    return copy;
  }

  /// Tokens [first, last) now sit `delta` positions further.
  void shift(std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t delta) {
    for (std::ptrdiff_t i = first; i < last; ++i) positions_[static_cast<std::size_t>(i)] += delta;
  }

  [[nodiscard]] const std::vector<std::ptrdiff_t>& positions() const { return positions_; }
  [[nodiscard]] std::ptrdiff_t num_layers() const { return static_cast<std::ptrdiff_t>(layers_.size()); }

  /// Keys or values of tokens [first, first + count) of a layer, [token, head, dim]; [head, token, dim] if
  /// `by_head`.
  [[nodiscard]] std::vector<float> keys(std::ptrdiff_t layer, std::ptrdiff_t first, std::ptrdiff_t count,
                                        bool by_head = false) const {
    return copied(layer, first, count, by_head, &row::k);
  }
  [[nodiscard]] std::vector<float> values(std::ptrdiff_t layer, std::ptrdiff_t first, std::ptrdiff_t count,
                                          bool by_head = false) const {
    return copied(layer, first, count, by_head, &row::v);
  }

 private:
  std::vector<row>& rows(std::ptrdiff_t layer) { return layers_[static_cast<std::size_t>(layer)]; }

  [[nodiscard]] std::vector<float> copied(std::ptrdiff_t layer, std::ptrdiff_t first, std::ptrdiff_t count,
                                          bool by_head, std::vector<float> row::*side) const {
    const auto& from = layers_[static_cast<std::size_t>(layer)];
    std::vector<float> out(static_cast<std::size_t>(count * num_kv_heads_ * head_dim_));
    for (std::ptrdiff_t t = 0; t < count; ++t)
      for (std::ptrdiff_t h = 0; h < num_kv_heads_; ++h)
        for (std::ptrdiff_t d = 0; d < head_dim_; ++d) {
          const std::ptrdiff_t to =
              by_head ? (h * count + t) * head_dim_ + d : (t * num_kv_heads_ + h) * head_dim_ + d;
          out[static_cast<std::size_t>(to)] =
              (from[static_cast<std::size_t>(first + t)].*side)[static_cast<std::size_t>(h * head_dim_ + d)];
        }
    return out;
  }

  std::ptrdiff_t num_kv_heads_;
  std::ptrdiff_t head_dim_;
  narrow_rows narrow_;
  std::vector<std::vector<row>> layers_;
  std::vector<std::ptrdiff_t> positions_;
};

}  // namespace oracle
