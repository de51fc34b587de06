// SPDX-License-Identifier: MIT
// Encoding of the exact codecs, written once over the primitives that vector_kernels.inl lists, and included by it.

/// Numbers divided by one, correctly rounded: vectors are divided far more slowly than they are multiplied. Where the
/// divisor is between 2^-60 and 2^60, x * (1 / divisor) is corrected once (Markstein, IBM J. Res. Dev. 34, 1990). That gives
/// the quotient for all 2^23 mantissas of x with each of a bfloat16, of 5 / 127 and of whole divisors up to 256: all were
/// tried. Not for |x| below 2^-100, whose remainders may be no floats: who needs these has to divide.
class divider {
 public:
  explicit divider(float scale)
      : multiplies_(0x1p-60F < scale && scale < 0x1p60F), scale_(scale), inverse_(1.0F / scale) {}

  KVCACHE_INLINE vec operator()(vec x) const {
    if (!multiplies_) return div(x, broadcast(scale_));
    const vec q = mul(x, broadcast(inverse_));
    return fma(fma(q, broadcast(-scale_), x), broadcast(inverse_), q);
  }

 private:
  bool multiplies_;
  float scale_;
  float inverse_;
};

/// Transposes 16 vectors of 16 lanes: four perfect shuffles of rows i and i + 8.
KVCACHE_INLINE void transpose(vec (&rows)[key_lanes]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    vec mixed[key_lanes];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] = interleave_low(rows[i], rows[i + 8]);
      mixed[2 * i + 1] = interleave_high(rows[i], rows[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < key_lanes; ++i) rows[i] = mixed[i];
  }
}

/// One line of block order from `pack` vectors.
template <class Element>
KVCACHE_INLINE void store_line(Element* out, const vec* in) {
  if constexpr (block_order<Element>::pack == 1) {
    store(out, in[0]);
  } else {
    store_bits(out, low_high(narrow<Element>(in[0]), narrow<Element>(in[1])));
  }
}

/// A whole group of 16 keys: 16 dims at a time, turned so that tokens lie in lanes.
template <class Element>
KVCACHE_TARGET inline void encode_key_group(const block_geometry& g, Element* out, const_rows rows,
                                            index_t first_row) {
  constexpr index_t pack = block_order<Element>::pack;
  for (index_t d = 0; d < g.head_dim; d += key_lanes) {
    const index_t num_dims = std::min(key_lanes, g.head_dim - d);
    vec dims[key_lanes];
    for (index_t t = 0; t < key_lanes; ++t) dims[t] = load_first(rows.row(first_row + t) + d, num_dims);
    transpose(dims);
    for (index_t i = 0; i < num_dims; i += pack, out += key_lanes * pack) store_line(out, dims + i);
  }
}

/// out[0, head_dim) = row, narrowed, and zero up to the end of the last pack.
template <class Element>
KVCACHE_TARGET inline void narrow_row(const block_geometry& g, const float* row, Element* out) {
  index_t d = 0;
  for (; d + key_lanes <= g.head_dim; d += key_lanes)
    store_low_halves(out + d, narrow<Element>(load(row + d)));
  for (; d < g.head_dim; ++d) out[d] = from_float<Element>(row[d]);
  for (; d % block_order<Element>::pack != 0; ++d) out[d] = Element{};
}

template <class Element>
KVCACHE_TARGET inline void encode_keys(const block_geometry& g, std::byte* keys, index_t first, index_t count,
                                       const_rows rows) {
  using order = block_order<Element>;
  auto* out = reinterpret_cast<Element*>(keys);
  for (index_t t = first; t < first + count;) {
    if (t % key_lanes == 0 && t + key_lanes <= first + count) {
      encode_key_group(g, out + order::key_index(g, t, 0), rows, t - first);
      t += key_lanes;
      continue;
    }
    // one token: a word into every line
    alignas(64) std::array<Element, max_head_dim + key_lanes> narrowed;
    const void* words = rows.row(t - first);
    if constexpr (order::pack > 1) {
      narrow_row(g, rows.row(t - first), narrowed.data());
      words = narrowed.data();
    }
    std::byte* to = keys + order::key_index(g, t, 0) * static_cast<index_t>(sizeof(Element));
    for (index_t p = 0; p < order::key_packs(g); ++p)
      std::memcpy(to + p * key_lanes * 4, static_cast<const std::byte*>(words) + p * 4, 4);
    ++t;
  }
}

template <class Element>
KVCACHE_TARGET inline void encode_values(const block_geometry& g, std::byte* values, index_t first,
                                         index_t count, const_rows rows) {
  using order = block_order<Element>;
  auto* out = reinterpret_cast<Element*>(values);
  for (index_t t = first; t < first + count;) {
    const float* row = rows.row(t - first);
    Element* to = out + order::value_index(g, t, 0);
    index_t num_tokens = 1;
    index_t d = 0;
    if constexpr (order::pack == 1) {
      for (; d + key_lanes <= g.head_dim; d += key_lanes) store(to + d, load(row + d));
    } else if (t % 2 == 0 && t + 1 < first + count) {
      const float* second = rows.row(t + 1 - first);
      num_tokens = 2;
      for (; d + key_lanes <= g.head_dim; d += key_lanes)
        store_bits(to + 2 * d, low_high(narrow<Element>(load(row + d)), narrow<Element>(load(second + d))));
    } else {
      Element* line = to - t % 2;
      for (; d + key_lanes <= g.head_dim; d += key_lanes)
        store_bits(line + 2 * d, with_half(load_bits(line + 2 * d), t % 2, narrow<Element>(load(row + d))));
    }
    for (index_t i = 0; i < num_tokens; ++i) {
      for (index_t e = d; e < g.head_dim; ++e)
        out[order::value_index(g, t + i, e)] = from_float<Element>(rows.row(t + i - first)[e]);
    }
    t += num_tokens;
  }
}
