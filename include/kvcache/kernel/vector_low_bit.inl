// SPDX-License-Identifier: MIT
// Numbers of less than 8 bits, written once over the primitives that vector_kernels.inl lists, and included by it.

// ---- unpacking ------------------------------------------------------------------------------------------------------

/// Codes of line `Line` of a unit, one in each byte. `in`: the unit's packed lines.
template <int Bits, int Line>
KVCACHE_INLINE bits codes_of(const bits* in) {
  if constexpr (Bits == 4) {
    return and_bits(shifted<4 * Line>(in[0]), fill(0x0f0f0f0fU));
  } else if constexpr (Bits == 1) {
    return and_bits(shifted<Line>(in[0]), fill(0x01010101U));
  } else {
    const bits low = and_bits(shifted<2 * (Line % 4)>(in[Line / 4]), fill(0x03030303U));
    if constexpr (Bits == 2)
      return low;
    else
      return or_bits(low, and_bits(shifted<Line - 2>(in[2]), fill(0x04040404U)));
  }
}

template <int Bits, int Line>
KVCACHE_INLINE void unpack_unit(const bits* in, bits codebook, std::int8_t* out, index_t num_lines) {
  if (Line >= num_lines) return;
  store_bits(out + Line * packed_line_bytes, look_up(codebook, codes_of<Bits, Line>(in)));
  if constexpr (Line + 1 < packed_order<Bits>::lines_per_unit)
    unpack_unit<Bits, Line + 1>(in, codebook, out, num_lines);
}

template <int Bits>
KVCACHE_TARGET inline void unpack_lines(const std::byte* packed, index_t num_lines, const std::int8_t* levels,
                                        std::int8_t* out, const std::byte* next) {
  using order = packed_order<Bits>;
  constexpr index_t lines = order::lines_per_unit;
  constexpr index_t packed_lines = order::unit_bytes / packed_line_bytes;
  const bits codebook = load_codebook(levels);
  for (; num_lines > 0; num_lines -= lines, out += lines * packed_line_bytes) {
    bits in[packed_lines];
#pragma GCC unroll 4
    for (index_t i = 0; i < packed_lines; ++i) {
      in[i] = load_bits(packed + i * packed_line_bytes);
      prefetch::line(next + i * packed_line_bytes);
    }
    packed += order::unit_bytes;
    next += order::unit_bytes;
    if (num_lines >= lines)
      unpack_unit<Bits, 0>(in, codebook, out, lines);
    else
      unpack_unit<Bits, 0>(in, codebook, out, num_lines);
  }
}

template <int Bits>
KVCACHE_TARGET inline void unpack_section(const std::byte* packed, index_t first_line, index_t num_lines,
                                          const std::int8_t* codebook, std::int8_t* out,
                                          const std::byte* next) {
  const index_t skip = first_line / packed_order<Bits>::lines_per_unit * packed_order<Bits>::unit_bytes;
  // without a next section, the lines at hand are asked for
  unpack_lines<Bits>(packed + skip, num_lines, codebook, out, (next == nullptr ? packed : next) + skip);
}

KVCACHE_TARGET inline void unpack(int bits_per_code, const std::byte* packed, index_t first_line,
                                  index_t num_lines, const std::int8_t* codebook, std::int8_t* out,
                                  const std::byte* next) {
  if (bits_per_code == 1) unpack_section<1>(packed, first_line, num_lines, codebook, out, next);
  if (bits_per_code == 2) unpack_section<2>(packed, first_line, num_lines, codebook, out, next);
  if (bits_per_code == 3) unpack_section<3>(packed, first_line, num_lines, codebook, out, next);
  if (bits_per_code == 4) unpack_section<4>(packed, first_line, num_lines, codebook, out, next);
}

// ---- Walsh-Hadamard transform ---------------------------------------------------------------------------------------

/// The rounds of low_bit_kernels on 16 * `Vectors` numbers in registers.
template <int Vectors>
KVCACHE_TARGET inline void hadamard_vectors(float* row) {
  vec x[Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Vectors; ++i) x[i] = load(row + i * key_lanes);
#pragma GCC unroll 16
  for (int size = Vectors * int{key_lanes}; size > 1; size /= 2) {
    vec y[Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Vectors / 2; ++i) {
      const vec sum = add(x[i], x[i + Vectors / 2]);
      const vec difference = sub(x[i], x[i + Vectors / 2]);
      y[2 * i] = interleave_low(sum, difference);
      y[2 * i + 1] = interleave_high(sum, difference);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Vectors; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < Vectors; ++i) store(row + i * key_lanes, x[i]);
}

KVCACHE_TARGET inline void hadamard(float* row, index_t size) {
  if (size < 2 * key_lanes) return portable::hadamard(row, size);
  if (size == 2 * key_lanes) return hadamard_vectors<2>(row);
  if (size == 4 * key_lanes) return hadamard_vectors<4>(row);
  // The first rounds in place: the numbers that they would shuffle apart lie next to each other.
  constexpr index_t in_registers = 8 * key_lanes;
  for (index_t half = size / 2; half >= in_registers; half /= 2) {
    for (index_t i = 0; i < size; i += (i + key_lanes) % half == 0 ? half + key_lanes : key_lanes) {
      const vec a = load(row + i);
      const vec b = load(row + i + half);
      store(row + i, add(a, b));
      store(row + i + half, sub(a, b));
    }
  }
  for (index_t i = 0; i < size; i += in_registers) hadamard_vectors<8>(row + i);
}

// ---- scalar quantisation --------------------------------------------------------------------------------------------

/// A row as whole numbers, zeros up to a multiple of 16, and what it will be coded with.
struct whole_row {
  alignas(64) std::array<float, max_head_dim> numbers;
  alignas(32) std::array<float, 8> levels{};  // the positive ones, at their codes modulo 8
  std::int32_t sum_of_squares = 0;
  int exponent = 0;  // numbers = row * 2^exponent
};

KVCACHE_TARGET inline float largest_number(const float* row, index_t count) {
  vec most = zero();
  for (index_t i = 0; i < count; i += key_lanes)
    most = larger(most, magnitude(load_first(row + i, count - i)));
  return largest_of(most);
}

/// Up to 16 numbers as whole ones. \return their squares
KVCACHE_INLINE vec to_whole(const float* row, index_t count, const portable::whole_scaling& scaling,
                            float* out) {
  const vec round_to_integer = broadcast(0x1.8p23F);
  const vec x = mul(load_first(row, count), broadcast(scaling.first));
  const vec m = sub(fma(x, broadcast(scaling.second), round_to_integer), round_to_integer);
  store(out, m);
  return mul(m, m);
}

KVCACHE_TARGET inline void to_whole(const float* row, index_t count, float largest_of_row, whole_row& out) {
  const portable::whole_scaling scaling = portable::whole_scaling_of(largest_of_row);
  float* numbers = out.numbers.data();
  vec even = zero();  // at most 16 times 2^18 in each lane: exact
  vec odd = zero();
  index_t i = 0;
  for (; i + 2 * key_lanes <= count; i += 2 * key_lanes) {
    even = add(even, to_whole(row + i, key_lanes, scaling, numbers + i));
    odd = add(odd, to_whole(row + i + key_lanes, key_lanes, scaling, numbers + i + key_lanes));
  }
  for (; i < count; i += key_lanes) even = add(even, to_whole(row + i, count - i, scaling, numbers + i));
  out.sum_of_squares = sum_of_whole(add(even, odd));
  out.exponent = scaling.exponent;
}

/// start + the number of limits below `size`, by bisection. \param limits  [Positive - 1], ascending
template <int Positive>
KVCACHE_INLINE vec place_of(vec size, const vec* limits, vec start) {
  if constexpr (Positive == 1) {
    return start;
  } else {
    constexpr int half = Positive / 2;
    vec rest[half];  // the limits that are still in question; one more than there are
#pragma GCC unroll 4
    for (int j = 0; j + 1 < half; ++j)
      rest[j] = pick_above(size, limits[half - 1], limits[half + j], limits[j]);
    return place_of<half>(size, rest, count_if_above(start, size, limits[half - 1], half));
  }
}

/// Codes of a row of whole numbers. \return the least-squares scale
template <int Positive>
KVCACHE_TARGET inline float code_whole(const whole_row& row, index_t count, const scalar_codebook& book,
                                       std::uint8_t* codes) {
  constexpr std::uint32_t mirror = 2 * Positive - 1;  // code ^ mirror: the level of the other sign
  const auto thresholds = portable::whole_thresholds(book, row.sum_of_squares, count);
  vec limits[Positive - 1];
#pragma GCC unroll 8
  for (int j = 0; j < Positive - 1; ++j) limits[j] = broadcast(thresholds[static_cast<std::size_t>(j)]);
  const vec start = broadcast(0x1p23F + Positive);  // the code of a positive number in its low mantissa bits
  vec products = zero();                            // sums of whole numbers below 2^24: exact
  vec squares = zero();
  for (index_t i = 0; i < count; i += key_lanes) {
    const vec m = load(&row.numbers[static_cast<std::size_t>(i)]);
    const vec size = magnitude(m);
    const vec place = place_of<Positive>(size, limits, start);
    const vec level = look_up(row.levels.data(), place);
    products = fma(size, level, products);
    squares = fma(level, level, squares);
    if (count - i >= key_lanes) {
      store_places(codes + i, place, m, mirror);
    } else {
      std::array<std::uint8_t, key_lanes> last;
      store_places(last.data(), place, m, mirror);
      std::copy_n(last.data(), count - i, codes + i);
    }
  }
  // The zeros behind the row have the smallest level.
  const auto padding = static_cast<std::int32_t>(round_up(count, key_lanes) - count);
  const auto smallest = static_cast<std::int32_t>(row.levels[Positive % 8]);
  return portable::least_squares_scale(sum_of_whole(products),
                                       sum_of_whole(squares) - padding * smallest * smallest, row.exponent);
}

KVCACHE_TARGET inline float nearest(const float* row, index_t count, const scalar_codebook& book,
                                    std::uint8_t* codes) {
  const int num_positive = 1 << (book.bits - 1);
  whole_row whole;  // levels first: they are read as one vector, long after their separate stores
  for (int j = 0; j < num_positive; ++j)
    whole.levels[static_cast<std::size_t>((num_positive + j) % 8)] =
        static_cast<float>(book.levels[num_positive + j]);
  const float largest_of_row = largest_number(row, count);
  if (largest_of_row == 0.0F) {
    std::fill_n(codes, count, static_cast<std::uint8_t>(num_positive));
    return 0.0F;
  }
  to_whole(row, count, largest_of_row, whole);
  if (book.bits == 2) return code_whole<2>(whole, count, book, codes);
  if (book.bits == 3) return code_whole<4>(whole, count, book, codes);
  return code_whole<8>(whole, count, book, codes);
}
