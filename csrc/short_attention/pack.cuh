// Packs: which rows a thread block holds, which of them see one another, and how they come and go.
//
// The rows of a pack are one sequence, in which each segment's patch rows are followed by its prefix rows: prefix rows are found
// by address, nothing is concatenated. Each row sees a *span*, the part of the sequence that is its own segment.
#pragma once

#include "tiles.cuh"

namespace hlip {

// ---------------------------------------------------------------- packs

// What a block knows of its pack. The map in shared memory has 8 bytes a row: row of the packed buffer (-1: none), then its
// span as first | last << 16.
struct Pack {
  int rows, padded, segments;
  int from, to;  // the rows at work: all, or one segment after the other
};

struct Span {
  int first, last;
};

HLIP_DEVICE int row_at(int i) { return shared_load<int>(8 * i); }

HLIP_DEVICE Span span_at(int i) {
  const uint32_t span = shared_load<uint32_t>(8 * i + 4);
  return {static_cast<int>(span & 0xffff), static_cast<int>(span >> 16)};
}

HLIP_DEVICE bool sees(Span span, int i) { return i >= span.first && i < span.last; }

// Fills the map. Ends with a barrier.
template <int kThreads>
HLIP_DEVICE Pack open_pack(const Tables& tables, int64_t index) {
  const int4 pack = global_load<int4>(tables.packs + 4 * index);
  const int first = pack.x, segments = pack.y, rows = pack.w;
  const int padded = (rows + kTile - 1) / kTile * kTile;
  for (int i = thread_index(); i < padded; i += kThreads) {
    int row = -1;
    uint32_t span = 0;
    if (i < rows) {
      int low = first, high = first + segments - 1;
      while (low < high) {  // the last record that starts at or before i
        const int middle = (low + high + 1) / 2;
        if (global_load<int>(tables.starts + middle) <= i) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      const int start = segments > 1 ? global_load<int>(tables.starts + low) : 0;
      const int4 own = global_load<int4>(tables.records + 8 * low);  // patches (start, count), prefixes (start, count)
      const int at = pack.z + i - start;
      row = at < own.y ? own.x + at : own.z + (at - own.y);
      span = static_cast<uint32_t>(start) | static_cast<uint32_t>(segments > 1 ? start + own.y + own.w : rows) << 16;
    }
    shared_store<int>(8 * i, row);
    shared_store<uint32_t>(8 * i + 4, span);
  }
  block_sync();
  return {rows, padded, segments, 0, rows};
}

// Rows that no segment holds are a record that sees nothing: its outputs are 0.
HLIP_DEVICE bool sees_nothing(const Tables& tables, int64_t index) {
  const int4 pack = global_load<int4>(tables.packs + 4 * index);
  const int4 keys = global_load<int4>(tables.records + 8 * pack.x + 4);
  return keys.y + keys.w == 0;
}

template <typename T, int D, int kThreads>
HLIP_DEVICE void zero_rows(T* x, const Tables& tables, int64_t index, int64_t head, int64_t heads) {
  const int4 pack = global_load<int4>(tables.packs + 4 * index);
  const int64_t first = global_load<int>(tables.records + 8 * pack.x) + pack.z;
  for (int c = thread_index(); c < pack.w * (D / 8); c += kThreads) {
    global_store(x + ((first + c / (D / 8)) * heads + head) * D + c % (D / 8) * 8, make_uint4(0, 0, 0, 0));
  }
}

// ---------------------------------------------------------------- moving rows

// Starts copying the rows at work of N tensors into a tile each, zeros for all others. A thread stays with its chunks of a row.
template <typename T, int D, int kThreads, int N>
HLIP_DEVICE void start_rows(const Shared (&tiles)[N], const View* const (&x)[N], int64_t head, const Pack& pack) {
  constexpr int kLanes = kTrading<D>;
  const int chunk = thread_index() % kLanes;
  for (int i = thread_index() / kLanes; i < pack.padded; i += kThreads / kLanes) {
    const bool live = i >= pack.from && i < pack.to;
    const uint32_t row = live ? row_at(i) : 0;
    const Shared place = swizzled<D>(i, chunk);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T* from = static_cast<const T*>(x[n]->at) + head * x[n]->head + row * x[n]->row + chunk * 8;
#pragma unroll
      for (int c = 0; c < D / 8; c += kLanes) copy_async_16(tiles[n] + place + c * 16, from + c * 8, live);
    }
  }
}

// Whether this thread copied anything that is not finite into a tile. After copy_async_wait.
template <typename T, int D, int kThreads>
HLIP_DEVICE bool not_finite(Shared tile, const Pack& pack) {
  constexpr int kLanes = kTrading<D>;  // as they were copied
  constexpr uint32_t kExponent = kIsHalf<T> ? 0x7c00 : 0x7f80;
  bool bad = false;
#pragma unroll 1
  for (int i = thread_index() / kLanes; i < pack.padded; i += kThreads / kLanes) {
    const Shared place = tile + swizzled<D>(i, thread_index() % kLanes);
#pragma unroll
    for (int c = 0; c < D / 8; c += kLanes) {
      const uint4 v = shared_load<uint4>(place + c * 16);
      for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
        bad |= (word & kExponent) == kExponent || ((word >> 16) & kExponent) == kExponent;
      }
    }
  }
  return bad;
}

// Rows i and i + 8 (i = tile + g) as left operands. In the place of rows that are not at work comes one that is: what becomes of them is
// hidden, and never written.
template <typename T, int D>
HLIP_DEVICE void load_left(uint32_t (&a)[D / 16][4], const View& x, int64_t head, const Pack& pack, int tile) {
  int64_t rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = tile + lane_index() / 4 + 8 * half, before = i < pack.to ? i : pack.to - 1;
    rows[half] = row_at(before < pack.from ? pack.from : before);
  }
  load_left<T, D>(a, x, head, rows);
}

// Writes rows i and i + 8 (i = tile + g) of an accumulator, times `factor` each, to the packed rows of the pack.
template <typename T, int D>
HLIP_DEVICE void store_rows(T* x, const float (&c)[D / 8][4], const float (&factor)[2], int64_t head, int64_t heads, const Pack& pack,
                            int tile) {
  T* to[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = tile + lane_index() / 4 + 8 * half;
    to[half] = i >= pack.from && i < pack.to ? x + (row_at(i) * heads + head) * D : nullptr;
  }
  store_tile<T, D>(to, c, factor);
}

// The rows seen by the 16 rows from `tile` on, of those at work: from a multiple of 16, and those that all of them see. Of a warp.
struct Seen {
  int first, last, all_first, all_last;
};

HLIP_DEVICE Seen seen_by(const Pack& pack, int tile) {
  const int top = tile > pack.from ? tile : pack.from;
  const int bottom = (tile + kTile < pack.to ? tile + kTile : pack.to) - 1;
  const Span a = span_at(top), b = span_at(bottom);
  const int first = a.first > pack.from ? a.first : pack.from;
  const int last = b.last < pack.to ? b.last : pack.to;
  const bool whole = top == tile && bottom == tile + kTile - 1;  // else some of the 16 rows see nothing
  return {uniform(first / kTile * kTile), uniform(last), uniform(whole ? b.first : 1), uniform(whole ? a.last : 0)};
}

// Whether they all see `count` rows from `key` on.
HLIP_DEVICE bool all_see(const Seen& seen, int key, int count = kTile) { return key >= seen.all_first && key + count <= seen.all_last; }

// Puts `value` where a row of a 16 x 16 accumulator, of rows from `tile` on, does not see a column, of those from `column` on. Few
// accumulators need it: callers branch around it (all_see), which costs less than deciding for each element.
HLIP_DEVICE void hide(float (&c)[2][4], int tile, int column, float value) {
  const int lane = lane_index(), quad = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Span span = span_at(tile + lane / 4 + 8 * half);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!sees(span, column + e / 2 * 8 + 2 * quad + e % 2)) c[e / 2][2 * half + e % 2] = value;
    }
  }
}

// The next segment of a pack that is gone over one by one; false after the last.
HLIP_DEVICE bool next_segment(Pack& pack) {
  if (pack.to == pack.rows) return false;
  pack.from = pack.to;
  pack.to = span_at(pack.from).last;
  return true;
}

}  // namespace hlip
