// SPDX-License-Identifier: MIT
// Rotation of rows before they are quantised: an orthogonal map spreads what is large in a few dims over all of them, so
// that one codebook fits every row, and leaves dot products as they are.
//
// Unless the caller gives matrices: flipped signs, then a Hadamard transform of each block of a power of two dims, the
// largest that fit first (80 = 64 + 16). Additions in one fixed order: the same bits on every instruction set.
// Source: QuaRot, Ashkboos et al. 2024.
#pragma once

#include <kvcache/core/checked.hpp>
#include <kvcache/core/lanes.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/core/types.hpp>
#include <kvcache/kernel/table.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0::codec {

/// An orthogonal matrix for each layer and KV head, as calibration finds them; shared by the copies of a codec.
class rotation_matrices {
 public:
  /// \param matrices  [num_layers, num_kv_heads, head_dim, head_dim], row-major; a row x becomes R x
  /// Throws shape_error if a size is wrong or a matrix is not orthogonal to 1e-3.
  rotation_matrices(const cache_shape& shape, std::vector<float> matrices)
      : shape_(shape), matrices_(std::move(matrices)) {
    const index_t dim = shape.head_dim;
    if (static_cast<index_t>(matrices_.size()) !=
        checked_mul(shape.num_layers, shape.num_kv_heads, checked_mul(dim, dim)))
      throw shape_error("kvcache: rotations must be [num_layers, num_kv_heads, head_dim, head_dim]");
    for (index_t layer = 0; layer < shape.num_layers; ++layer) {
      for (index_t head = 0; head < shape.num_kv_heads; ++head) {
        if (!is_orthogonal(at(layer, head)))
          throw shape_error("kvcache: the rotation of layer " + std::to_string(layer) + ", head " +
                            std::to_string(head) + " is not orthogonal");
      }
    }
  }

  /// Throws shape_error where a cache has other layers, heads or dims.
  void validate(const cache_shape& shape) const {
    if (!same_heads(shape, shape_))
      throw shape_error("kvcache: the rotations are for another number of layers, heads or dims");
  }
  [[nodiscard]] index_t bytes() const noexcept {
    return static_cast<index_t>(matrices_.size()) * index_t{sizeof(float)};
  }

  /// [num_layers, num_kv_heads, head_dim, head_dim]
  [[nodiscard]] std::span<const float> all() const noexcept { return matrices_; }
  [[nodiscard]] const float* at(index_t layer, index_t head) const noexcept {
    const index_t dim = shape_.head_dim;
    return matrices_.data() + (layer * shape_.num_kv_heads + head) * dim * dim;
  }

 private:
  [[nodiscard]] bool is_orthogonal(const float* matrix) const noexcept {
    const index_t dim = shape_.head_dim;
    for (index_t i = 0; i < dim; ++i) {
      for (index_t j = 0; j <= i; ++j) {
        double dot = 0;
        for (index_t d = 0; d < dim; ++d) dot += double{matrix[i * dim + d]} * double{matrix[j * dim + d]};
        if (!(std::fabs(dot - (i == j ? 1.0 : 0.0)) < 1e-3)) return false;
      }
    }
    return true;
  }

  cache_shape shape_;
  std::vector<float> matrices_;
};

/// The rotation of one head: Hadamard, or a matrix.
struct rotation {
  std::shared_ptr<const rotation_matrices> matrices = nullptr;  ///< null: signs and Hadamard
  const float* matrix = nullptr;                                ///< of the head that this is for

  [[nodiscard]] rotation at(index_t layer, index_t head) const {
    return {matrices, matrices ? matrices->at(layer, head) : nullptr};
  }

  /// turned = R row * factor; `turned` may be `row`.
  void turn(const kernel::table& kernels, const float* row, index_t head_dim, float* turned,
            float factor = 1) const {
    if (matrix != nullptr) return multiply(row, head_dim, {head_dim, 1}, turned, factor);
    for_each_block(head_dim, [&](index_t d, index_t size, float norm) {
      kernels.channel.multiply(row + d, signs() + d, norm * factor, size, turned + d);
      kernels.low_bit.hadamard(turned + d, size);
    });
  }

  /// row = R^T row.
  void turn_back(const kernel::table& kernels, float* row, index_t head_dim) const {
    if (matrix != nullptr) return multiply(row, head_dim, {1, head_dim}, row, 1);
    for_each_block(head_dim, [&](index_t d, index_t size, float norm) {
      kernels.low_bit.hadamard(row + d, size);
      kernels.channel.multiply(row + d, signs() + d, norm, size, row + d);
    });
  }

  friend bool operator==(const rotation&, const rotation&) = default;

 private:
  /// Calls body(first dim, dims, 1 / sqrt(dims)) for each block of a power of two.
  template <class Body>
  static void for_each_block(index_t head_dim, Body body) {
    for (index_t d = 0; d < head_dim;) {
      const auto size = static_cast<index_t>(std::bit_floor(static_cast<std::uint64_t>(head_dim - d)));
      body(d, size, 1.0F / std::sqrt(static_cast<float>(size)));
      d += size;
    }
  }

  struct matrix_strides {
    index_t row;
    index_t column;
  };
  void multiply(const float* row, index_t head_dim, matrix_strides strides, float* out, float factor) const {
    std::array<float, max_head_dim> scaled;  // first: sums of the largest numbers there are would be infinite
    std::transform(row, row + head_dim, scaled.begin(), [factor](float x) { return x * factor; });
    for (index_t i = 0; i < head_dim; ++i) {
      float sum = 0;
      for (index_t d = 0; d < head_dim; ++d)
        sum += lanes::rounded(matrix[i * strides.row + d * strides.column] *
                              scaled[static_cast<std::size_t>(d)]);
      out[i] = sum;
    }
  }

  /// +1 or -1 for each dim: bits of splitmix64 (Steele et al. 2014). Part of the format of stored blocks.
  static const float* signs() noexcept {
    static constexpr std::array<float, max_head_dim> all = [] {
      std::array<float, max_head_dim> signs{};
      std::uint64_t state = 0;
      for (float& sign : signs) {
        state += 0x9e3779b97f4a7c15U;
        std::uint64_t z = state;
        z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
        z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
        sign = (z ^ (z >> 31U)) >> 63U != 0 ? -1.0F : 1.0F;
      }
      return signs;
    }();
    return all.data();
  }
};

}  // namespace kvcache::inline v0::codec
