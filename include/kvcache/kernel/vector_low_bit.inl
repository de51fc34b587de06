// SPDX-License-Identifier: MIT
// Numbers of less than 8 bits, written once over the primitives that vector_kernels.inl lists, and included by it.

// ---- unpacking ------------------------------------------------------------------------------------------------------

/// Codes of line `Line` of a unit, one in each byte. `in`: the unit's packed lines.
template <int Bits, int Line>
KVCACHE_INLINE bits codes_of(const bits* in) {
  if constexpr (Bits == 4) {
    return and_bits(shifted<4 * Line>(in[0]), fill(0x0f0f0f0fU));
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
      __builtin_prefetch(next + i * packed_line_bytes, 0, 2);
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

/// A row as whole numbers, zeros up to a multiple of 16.
struct whole_row {
  alignas(64) std::array<float, max_head_dim> numbers;
  std::int32_t sum_of_squares;
};

KVCACHE_TARGET inline float largest_number(const float* row, index_t count) {
  vec most = zero();
  for (index_t i = 0; i < count; i += key_lanes)
    most = larger(most, magnitude(load_first(row + i, count - i)));
  return largest_of(most);
}

KVCACHE_TARGET inline void to_whole(const float* row, index_t count, const portable::whole_scaling& scaling,
                                    whole_row& out) {
  const vec round_to_integer = broadcast(0x1.8p23F);
  vec squares = zero();  // at most 32 times 2^18 in each lane: exact
  for (index_t i = 0; i < count; i += key_lanes) {
    const vec x = mul(load_first(row + i, count - i), broadcast(scaling.first));
    const vec m = sub(fma(x, broadcast(scaling.second), round_to_integer), round_to_integer);
    store(&out.numbers[static_cast<std::size_t>(i)], m);
    squares = fma(m, m, squares);
  }
  out.sum_of_squares = sum_of_whole(squares);
}

/// Codes of a row of whole numbers. \return the least-squares scale
template <int Thresholds>
KVCACHE_TARGET inline float code_whole(const whole_row& row, index_t count, const scalar_codebook& book,
                                       int exponent, std::uint8_t* codes) {
  constexpr int num_positive = Thresholds + 1;
  const auto thresholds = portable::whole_thresholds(book, row.sum_of_squares, count);
  vec limits[Thresholds];
#pragma GCC unroll 8
  for (int j = 0; j < Thresholds; ++j) limits[j] = broadcast(thresholds[static_cast<std::size_t>(j)]);
  alignas(64) std::array<float, 8> levels{};
  for (int j = 0; j < num_positive; ++j)
    levels[static_cast<std::size_t>(j)] = static_cast<float>(book.levels[num_positive + j]);

  const vec one = broadcast(1.0F);
  const vec start = broadcast(0x1p23F);  // counts in its low mantissa bits
  vec products = zero();                 // sums of whole numbers below 2^24: exact
  vec squares = zero();
  for (index_t i = 0; i < count; i += key_lanes) {
    const vec m = load(&row.numbers[static_cast<std::size_t>(i)]);
    const vec size = magnitude(m);
    vec place = start;
#pragma GCC unroll 8
    for (int j = 0; j < Thresholds; ++j) place = add_if_above(place, size, limits[j], one);
    const vec level = look_up(levels, place);
    products = fma(size, level, products);
    squares = fma(level, level, squares);
    // num_positive + index, mirrored for negative numbers: num_positive - 1/2 +- (index + 1/2)
    const vec from_middle = add(sub(place, start), broadcast(0.5F));
    const vec code = add(with_sign(m, from_middle), broadcast(static_cast<float>(num_positive) - 0.5F));
    if (count - i >= key_lanes) {
      store_bytes(codes + i, code);
    } else {
      std::array<std::uint8_t, key_lanes> last;
      store_bytes(last.data(), code);
      std::copy_n(last.data(), count - i, codes + i);
    }
  }
  // The zeros behind the row have the smallest level.
  const auto padding = static_cast<std::int32_t>(round_up(count, key_lanes) - count);
  const std::int32_t smallest = book.levels[num_positive];
  return portable::least_squares_scale(sum_of_whole(products),
                                       sum_of_whole(squares) - padding * smallest * smallest, exponent);
}

KVCACHE_TARGET inline float nearest(const float* row, index_t count, const scalar_codebook& book,
                                    std::uint8_t* codes) {
  const float largest_of_row = largest_number(row, count);
  if (largest_of_row == 0.0F) {
    std::fill_n(codes, count, static_cast<std::uint8_t>(1U << (book.bits - 1)));
    return 0.0F;
  }
  const portable::whole_scaling scaling = portable::whole_scaling_of(largest_of_row);
  whole_row whole;
  to_whole(row, count, scaling, whole);
  if (book.bits == 2) return code_whole<1>(whole, count, book, scaling.exponent, codes);
  if (book.bits == 3) return code_whole<3>(whole, count, book, scaling.exponent, codes);
  return code_whole<7>(whole, count, book, scaling.exponent, codes);
}
