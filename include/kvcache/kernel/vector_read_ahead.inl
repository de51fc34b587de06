// SPDX-License-Identifier: MIT
// Reading ahead; included by vector_kernels.inl.

/// How lines are asked for.
enum class asking {
  twice,      ///< once more some way back: when the miss buffers are full, processors drop prefetches
  by_levels,  ///< into L2, and those wanted before them from there into L1 (core/prefetch.hpp)
  page_by_page,  ///< so, in streams one to a page: pages that are new to the processor's table of addresses, as those of
                 ///< other blocks may be, are then looked up beside one another
};

/// Fetches, while a kernel reads n lines, n lines that are wanted next: the memory stays busy during the softmax and across
/// blocks. `stride` is less than a line where the kernel passes over its own lines more often than once.
struct read_ahead {
  const std::byte* at;
  const std::byte* first;  ///< asking::twice: nothing before it
  const std::byte* near;   ///< by levels: wanted before those at `at`
  index_t stride;
  asking way;
  index_t apart = 0;               ///< bytes from one stream to the next
  const std::byte* end = nullptr;  ///< of the last one
  index_t back = 0;                ///< from there to the line of the first stream that comes next

  /// A piece of the section at hand begins. \param piece  the one behind it, or null
  void go_on(const upcoming& then, const std::byte* piece) {
    if (stride == 0) return;
    const std::byte* soon = piece != nullptr ? piece : way == asking::twice ? then.next : then.soon;
    if (way != asking::twice) {
      if (soon != nullptr) near = soon;
    } else if (soon != at) {
      at = first = soon;
    }
  }

  [[gnu::always_inline]] void step() {
    if (way != asking::page_by_page) {
      at += stride;
    } else if (at += apart; at >= end) {
      at -= back;
    }
  }
};

/// Tokens of a section that are read while as many are fetched. Lines that wait in L1 are the least recently used ones:
/// twice as many bytes must find room there.
template <class Element>
inline index_t piece_tokens(const block_geometry& g) {
  constexpr index_t most_bytes = 16 * 1024;
  index_t tokens = 4 * key_lanes;
  while (tokens > key_lanes && tokens * g.head_dim * index_t{sizeof(Element)} > most_bytes) tokens /= 2;
  return tokens;
}

/// Whether lines wanted before those that are asked for are asked into L1 as well. Not by streams in 16-bit blocks: between few
/// multiplications a line these are waited for longer than they save (bench/NOTES.md, "Blocks that lie apart, once more").
template <class Element, asking Way>
inline constexpr bool asks_near = Way != asking::page_by_page || sizeof(Element) != 2;

/// `Lines` lines. Few at a time, between multiplications: of many at once always the same ones would be dropped.
template <int Lines, bool Twice = true, bool Near = true>
[[gnu::always_inline]] inline void fetch(read_ahead& next) {
  if (next.way != asking::twice) {
#pragma GCC unroll 16
    for (int i = 0; i < Lines; ++i, next.step(), next.near += next.stride) {
      __builtin_prefetch(next.at, 0, 2);
      if constexpr (Near) __builtin_prefetch(next.near, 0, 3);
    }
    return;
  }
  constexpr index_t second_chance =
      34 * 64;  // bytes; what was dropped at one place of a turn comes up at another
  const std::byte* again = next.at - std::min(next.at - next.first, second_chance);
#pragma GCC unroll 16
  for (int i = 0; i < Lines; ++i, next.step(), again += next.stride) {
    __builtin_prefetch(next.at, 0, 3);
    if constexpr (Twice) __builtin_prefetch(again, 0, 3);
  }
}

/// The share of turn `turn` where `Lines` lines are fetched in `Turns` turns.
template <int Lines, int Turns, bool Twice, bool Near>
[[gnu::always_inline]] inline void fetch_at(int turn, read_ahead& next) {
  static_assert(Lines % Turns == 0 || Turns % Lines == 0);
  if (turn % std::max(Turns / Lines, 1) == 0) fetch<std::max(Lines / Turns, 1), Twice, Near>(next);
}

/// By levels, a section's share of a block that its sections fetch together: some lines of every page of it.
/// \param at, offset  the section in that block, and how far in it
inline read_ahead page_beside_page(const std::byte* at, const std::byte* near, index_t offset,
                                   index_t block_bytes, index_t stride) {
  constexpr index_t page_bytes = 4096;
  constexpr int most_streams = 3;  // as a power of two
  const auto num_pages = static_cast<std::size_t>(block_bytes / page_bytes);
  const int streams = std::clamp(static_cast<int>(std::bit_width(num_pages)) - 1, 0, most_streams);
  const index_t apart = round_up(block_bytes >> streams, 64);
  const std::byte* block = at - offset;
  const std::byte* share = block + ((offset >> streams) & -64);
  const index_t around = apart << streams;
  return {share, block, near, stride, asking::page_by_page, apart, block + around, around - stride};
}

/// `next` may be null; then a line that is at hand anyway is asked for. Unless told otherwise, those at hand are near.
inline read_ahead ahead_of(const upcoming& next, const std::byte* at_hand, index_t passes) {
  const index_t stride = next.next == nullptr ? 0 : 64 / passes;
  const upcoming from = next.or_at_hand(at_hand);
  if (stride != 0 && prefetch::by_levels && next.block_bytes != 0)
    return page_beside_page(from.next, from.soon, next.offset, next.block_bytes, stride);
  return {from.next, from.next, from.soon, stride, prefetch::by_levels ? asking::by_levels : asking::twice};
}

/// f.operator()<way>() of next.way: as a constant it costs no registers.
template <class F>
[[gnu::always_inline]] inline void with_way_of(const read_ahead& next, F f) {
  switch (next.way) {
    case asking::twice:
      return f.template operator()<asking::twice>();
    case asking::by_levels:
      return f.template operator()<asking::by_levels>();
    case asking::page_by_page:
      return f.template operator()<asking::page_by_page>();
  }
}

/// Tiles that `num_rows` rows are cut into: as many of `max_rows` as there are, then smaller powers of two.
inline index_t num_row_tiles(index_t num_rows, index_t max_rows) {
  index_t tiles = num_rows / max_rows;
  for (index_t rest = num_rows % max_rows; rest != 0; rest &= rest - 1) ++tiles;
  return std::max(tiles, index_t{1});
}
