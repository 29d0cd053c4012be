// A segment that has a pack of its own: where its rows are, and how they come into shared memory.
#pragma once

#include "arguments.h"
#include "tiles.cuh"

namespace hlip {

// For one head: patch rows first, then prefix rows. `padded`: a multiple of 16.
struct Segment {
  int patch, patches, prefix, rows, padded, head;
};

// It lies in shared memory, since the registers are all taken.
constexpr int kSegmentBytes = 32;

HLIP_DEVICE void open_segment(Shared to, const Tables& tables, int64_t heads, int item) {
  const int head = item % static_cast<int>(heads), record = global_load<int>(tables.packs + 4 * (item / static_cast<int>(heads)));
  const int4 own = global_load<int4>(tables.records + 8 * record);  // patches (start, count), prefixes (start, count)
  const int rows = own.y + own.w;
  shared_store(to, make_int4(own.x, own.y, own.z, rows));
  shared_store(to + 16, make_int4((rows + kTile - 1) / kTile * kTile, head, 0, 0));
}

HLIP_DEVICE Segment segment_at(Shared at) {
  const int4 x = shared_load<int4>(at), y = shared_load<int4>(at + 16);
  return {x.x, x.y, x.z, x.w, y.x, y.y};
}

HLIP_DEVICE int64_t row_of(const Segment& s, int i) { return i < s.patches ? s.patch + i : s.prefix + (i - s.patches); }

// Starts copying rows [first, last) of a segment of N tensors into a tile each, as far as it is padded, with zeros beyond its end.
// `thread`: of kThreads (whole warps) that share the work, each row whole, or its chunks a half or a quarter at a time: those that are
// copied together lie in different banks, and in one line of a cache.
template <typename T, int D, int kThreads, int N>
HLIP_DEVICE void start_segment(const Shared (&tiles)[N], const View* const (&x)[N], const Segment& s, int first, int last,
                               int thread = thread_index_anew()) {
  constexpr int kLanes = kTrading<D>, kRows = kThreads / kLanes;
  static_assert(kThreads % kLanes == 0 && kRows % 8 == 0, "a chunk stays at its place in the row");
  if (last > s.padded) last = s.padded;
  int i = first + thread / kLanes;
  const T* from[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    from[n] = static_cast<const T*>(x[n]->at) + s.head * x[n]->head + (static_cast<int64_t>(s.patch) + i) * x[n]->row + thread % kLanes * 8;
  }
  Shared to = swizzled<D>(i, thread % kLanes);
  const auto copy = [&](int end) {
#pragma unroll 1
    for (; i < end; i += kRows, to += kRows * 2 * D) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < D / 8; c += kLanes) copy_async_16(tiles[n] + to + c * 16, from[n] + c * 8, true);
        from[n] += kRows * x[n]->row;
      }
    }
  };
  copy(s.patches < last ? s.patches : last);
#pragma unroll
  for (int n = 0; n < N; ++n) from[n] += (static_cast<int64_t>(s.prefix) - s.patches - s.patch) * x[n]->row;
  copy(s.rows < last ? s.rows : last);
#pragma unroll 1
  for (; i < last; i += kRows, to += kRows * 2 * D) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < D / 8; c += kLanes) copy_async_16(tiles[n] + to + c * 16, x[n]->at, false);
    }
  }
}

}  // namespace hlip
