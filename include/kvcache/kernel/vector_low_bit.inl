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

/// Up to 16 numbers times a power of two, rounded to whole ones.
KVCACHE_INLINE vec to_whole(const float* row, index_t count, vec power) {
  const vec round_to_integer = broadcast(0x1.8p23F);
  return sub(fma(load_first(row, count), power, round_to_integer), round_to_integer);
}

/// row * power in `numbers`, as whole numbers, zeros up to a multiple of 16. \return sums of their squares
KVCACHE_INLINE vec to_whole(const float* row, index_t count, vec factor, float* numbers) {
  vec squares[2] = {zero(), zero()};  // at most 17 times 2^18 in each lane: exact
  index_t i = 0;
  for (; i + 2 * key_lanes <= count; i += 2 * key_lanes) {
#pragma GCC unroll 2
    for (index_t j = 0; j < 2; ++j) {
      const vec m = to_whole(row + i + j * key_lanes, key_lanes, factor);
      store(numbers + i + j * key_lanes, m);
      squares[j] = fma(m, m, squares[j]);
    }
  }
  for (; i < count; i += key_lanes) {
    const vec m = to_whole(row + i, count - i, factor);
    store(numbers + i, m);
    squares[0] = fma(m, m, squares[0]);
  }
  return add(squares[0], squares[1]);
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

/// Whether a threshold may be whole, as far as floats tell: the nearest whole number is less than 2^-11 away.
KVCACHE_INLINE bool may_be_whole(const scalar_codebook& book, vec mean_square) {
  const float rms = std::sqrt(std::bit_cast<float>(first_word(as_bits(mean_square))));
  const vec thresholds = mul(load(book.thresholds), broadcast(rms));
  const vec round_to_integer = broadcast(0x1.8p23F);
  const vec whole = sub(add(thresholds, round_to_integer), round_to_integer);
  return reaches(broadcast(0x1p-11F), magnitude(sub(thresholds, whole))) != 0;
}

/// Codes whole numbers, and sums up what their least-squares scale is made of.
template <int Positive>
struct whole_coder {
  vec limits[Positive - 1];  // the square of a number above a threshold is above that one's limit
  vec levels;                // the positive ones, at their codes modulo 8
  vec products = zero();     // sums of whole numbers below 2^24: exact
  vec squares = zero();

  /// \param sums  of the numbers' squares
  KVCACHE_INLINE whole_coder(const scalar_codebook& book, vec sums, index_t count)
      : levels(eight_twice(book.levels + Positive / 8 * 8)) {
    // The squares of thresholds in floats, five roundings off, are on the same side of those of whole numbers as they are
    // themselves unless they nearly are whole: nothing has to wait for a root and a division.
    const vec mean_square = mul(sum_everywhere(sums), broadcast(1.0F / static_cast<float>(count)));
#pragma GCC unroll 8
    for (int j = 0; j < Positive - 1; ++j) {
      const vec threshold = broadcast(book.thresholds[j]);
      limits[j] = mul(mul(threshold, threshold), mean_square);
    }
    if (may_be_whole(book, mean_square)) {
      const std::array<float, 7> exact = portable::whole_thresholds(book, sum_of_whole(sums), count);
#pragma GCC unroll 8
      for (int j = 0; j < Positive - 1; ++j) {
        const vec threshold = broadcast(exact[static_cast<std::size_t>(j)]);
        limits[j] = mul(threshold, threshold);
      }
    }
  }

  KVCACHE_INLINE void code(vec m, std::uint8_t* codes) {
    constexpr std::uint32_t mirror = 2 * Positive - 1;  // code ^ mirror: the level of the other sign
    const vec start =
        broadcast(0x1p23F + Positive);  // the code of a positive number in its low mantissa bits
    const vec place = place_of<Positive>(mul(m, m), limits, start);
    const vec level = look_up(levels, place);
    products = fma(magnitude(m), level, products);
    squares = fma(level, level, squares);
    store_places(codes, place, m, mirror);
  }
};

/// The power of two that brings a row's largest number into [256, 512), from its word; a float if that is not below 2^-119.
constexpr int whole_exponent(std::uint32_t word) { return 8 - (static_cast<int>(word >> 23U) - 127); }
inline constexpr std::uint32_t least_for_whole = 8U << 23U;

/// low_bit_kernels::nearest with 2 * Positive levels.
/// \param most    the word of the largest magnitude, in every lane
/// \param raised  `row` is the row times 2^raised
template <int Positive>
KVCACHE_INLINE float nearest(const float* row, index_t count, bits most, int raised,
                             const scalar_codebook& book, std::uint8_t* codes) {
  alignas(64) std::array<float, max_head_dim> numbers;
  const bits exponent_bits = fill(0xffU << 23U);
  const vec power =
      as_floats(sub_words(fill(262U << 23U), and_bits(most, exponent_bits)));  // 2^whole_exponent
  whole_coder<Positive> coder(book, to_whole(row, count, power, numbers.data()), count);
  index_t i = 0;
  for (; i + key_lanes <= count; i += key_lanes)
    coder.code(load(&numbers[static_cast<std::size_t>(i)]), codes + i);
  std::int32_t squares_behind = 0;  // the zeros there have the smallest level
  if (i < count) {
    std::array<std::uint8_t, key_lanes> last;
    coder.code(load(&numbers[static_cast<std::size_t>(i)]), last.data());
    std::copy_n(last.data(), count - i, codes + i);
    const std::int32_t smallest = book.levels[Positive];
    squares_behind = static_cast<std::int32_t>(i + key_lanes - count) * smallest * smallest;
  }
  return portable::least_squares_scale(sum_of_whole(coder.products),
                                       sum_of_whole(coder.squares) - squares_behind,
                                       whole_exponent(first_word(most)) + raised);
}

/// A row is waited for twice: for its largest number, and for its mean square. Both stay in vectors for that reason.
KVCACHE_TARGET inline float nearest(const float* row, index_t count, const scalar_codebook& book,
                                    std::uint8_t* codes) {
  bits most = largest_magnitude(row, count);
  std::array<float, max_head_dim> larger_row;
  int raised = 0;
  if (first_word(most) < least_for_whole) {
    if (first_word(most) == 0) {
      std::fill_n(codes, count, static_cast<std::uint8_t>(1 << (book.bits - 1)));
      return 0.0F;
    }
    raised = 64;
    std::transform(row, row + count, larger_row.begin(), [](float x) { return x * 0x1p64F; });
    row = larger_row.data();
    most = largest_magnitude(row, count);
  }
  if (book.bits == 2) return nearest<2>(row, count, most, raised, book, codes);
  if (book.bits == 3) return nearest<4>(row, count, most, raised, book, codes);
  return nearest<8>(row, count, most, raised, book, codes);
}
