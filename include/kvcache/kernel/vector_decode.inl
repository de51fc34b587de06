// SPDX-License-Identifier: MIT
// Decoding of the exact codecs, written once over the primitives that vector_kernels.inl lists, and included by it after
// vector_encode.inl, whose transposition it uses.

/// A whole group of 16 keys, 16 dims at a time. \pre head_dim is a multiple of 16
template <class Element>
KVCACHE_TARGET inline void decode_key_group(const block_geometry& g, const Element* in, mutable_rows rows,
                                            index_t first_row) {
  constexpr index_t pack = block_order<Element>::pack;
  for (index_t d = 0; d < g.head_dim; d += key_lanes) {
    vec dims[key_lanes];
#pragma GCC unroll 16
    for (index_t i = 0; i < key_lanes; i += pack, in += key_lanes * pack) {
      const auto line = widen(in);
#pragma GCC unroll 2
      for (index_t j = 0; j < pack; ++j) dims[i + j] = line.part[j];
    }
    transpose(dims);
    for (index_t t = 0; t < key_lanes; ++t) store(rows.row(first_row + t) + d, dims[t]);
  }
}

template <class Element>
KVCACHE_TARGET inline void decode_keys(const block_geometry& g, const std::byte* keys, index_t first,
                                       index_t count, mutable_rows rows) {
  const auto* in = reinterpret_cast<const Element*>(keys);
  const index_t end = first + count;
  for (index_t t = first; t < end;) {
    const index_t num_tokens = std::min(end, t / key_lanes * key_lanes + key_lanes) - t;
    if (num_tokens == key_lanes && g.head_dim % key_lanes == 0) {
      decode_key_group(g, in + block_order<Element>::key_index(g, t, 0), rows, t - first);
    } else {
      portable::element<Element>::decode_keys(g, keys, t, num_tokens, {rows.row(t - first), rows.stride});
    }
    t += num_tokens;
  }
}

template <class Element>
KVCACHE_TARGET inline void decode_values(const block_geometry& g, const std::byte* values, index_t first,
                                         index_t count, mutable_rows rows) {
  using order = block_order<Element>;
  const auto* in = reinterpret_cast<const Element*>(values);
  for (index_t t = first; t < first + count;) {
    const index_t num_tokens = std::min(first + count, t / order::pack * order::pack + order::pack) - t;
    index_t d = 0;
    for (; num_tokens == order::pack && d + key_lanes <= g.head_dim; d += key_lanes) {
      const auto line = widen(in + order::value_index(g, t, d));
#pragma GCC unroll 2
      for (index_t i = 0; i < order::pack; ++i) store(rows.row(t + i - first) + d, line.part[i]);
    }
    for (index_t i = 0; i < num_tokens; ++i) {
      for (index_t e = d; e < g.head_dim; ++e)
        rows.row(t + i - first)[e] = to_float(in[order::value_index(g, t + i, e)]);
    }
    t += num_tokens;
  }
}
