// Attention over short segments, backward, for segments that have a pack of their own: five products, and the next segment
// arrives while this one is worked on.
//
// A block stays on its multiprocessor and takes one (segment, head) after the other. Each warp keeps 32 rows as keys: their keys
// and values are operands in its registers, dK and dV grow there. All warps go over the queries together, a step of 32 or 64 at a
// time: each makes the probabilities P and their gradients dS of its keys once, uses them for dV and dK as they are, and leaves dS in
// shared memory for the others. After a barrier the warps (in turns, where a step has fewer pieces than warps) make dQ = dS K of the
// step; dS has two places, so that nobody waits for that before going on.
//
// Shared memory is free again bit by bit, and the next segment's rows are copied there: values and outputs once they are in
// registers, queries and output gradients after each step. Keys are needed to the end; they have two places where there is room.
#pragma once

#include "whole_segment.cuh"

namespace hlip {

constexpr int kKeyTiles = 2;  // tiles of 16 keys that a warp keeps

struct WholeArguments {
  BackwardArguments of;
  int items, rows;  // segments times heads; rows of the longest segment, a multiple of 16
  bool two_keys;    // room for the keys of two segments
};

HLIP_DEVICE int padded_at(Shared at) { return shared_load<int>(at + 16); }

// Where the places of a block lie in shared memory.
constexpr int kSegments = 4;  // this one, the next, the one after, and one that may still be read

struct Places {
  Shared stats, exchange, queries, grads, values, outs, keys;  // of the first of two, where there are two
  Shared stats_on, exchange_on, keys_on;                       // how far on the second is
};

template <int D, int kStep>
HLIP_DEVICE Places places(int rows, bool two_keys) {
  const Shared tile = rows * 2 * D, stats = rows * 8, exchange = rows * 2 * kStep;
  const Shared first = kSegments * kSegmentBytes, tiles = first + 2 * stats + 2 * exchange;
  return {first,           first + 2 * stats, tiles, tiles + tile,       tiles + 2 * tile, tiles + 3 * tile,
          tiles + 4 * tile, stats,            exchange, two_keys ? tile : 0};
}

// Starts copying (log-sum-exp, its gradient) of each row.
template <int kThreads>
HLIP_DEVICE void start_stats(Shared stats, const BackwardArguments& a, Shared segment) {
  const Segment s = segment_at(segment);
  const float* lse = a.lse + s.head * a.num_rows;
  const float* grad = a.grad_lse != nullptr ? a.grad_lse + s.head * a.grad_lse_head : lse;
#pragma unroll 1
  for (int i = thread_index(); i < s.padded; i += kThreads) {
    const bool live = i < s.rows;
    const int64_t row = live ? row_of(s, i) : 0;
    copy_async_4(stats + 8 * i, lse + row, live);
    copy_async_4(stats + 8 * i + 4, a.grad_lse != nullptr ? grad + row * a.grad_lse_row : lse, live && a.grad_lse != nullptr);
  }
}

// Those become (log2-sum-exp, delta), delta = rowsum(dO * O) - dLSE.
template <typename T, int D, int kThreads>
HLIP_DEVICE void make_deltas(int padded, const Places& at, Shared stats) {
  constexpr int kLanes = D / 8, kRows = kThreads / kLanes, kMany = 4;  // rows at once, so that no one waits for another's loads
  const int chunk = thread_index() % kLanes;
#pragma unroll 1
  for (int first = thread_index() / kLanes; first < padded; first += kMany * kRows) {
    float delta[kMany];
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      const int i = first + j * kRows;
      delta[j] = 0.0f;
      if (i >= padded) continue;
      const uint4 x = shared_load<uint4>(at.outs + swizzled<D>(i, chunk)), y = shared_load<uint4>(at.grads + swizzled<D>(i, chunk));
      const uint32_t out[4] = {x.x, x.y, x.z, x.w}, grad[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 u = unpack2<T>(out[e]), w = unpack2<T>(grad[e]);
        delta[j] += u.x * w.x + u.y * w.y;
      }
    }
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) {
#pragma unroll
      for (int j = 0; j < kMany; ++j) delta[j] += shuffle_xor(delta[j], mask);
    }
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      const int i = first + j * kRows;
      if (chunk != 0 || i >= padded) continue;
      const float2 own = shared_load<float2>(stats + 8 * i);
      shared_store(stats + 8 * i, make_float2(own.x * kLog2E, delta[j] - own.y));
    }
  }
}

// c (kKeyTiles of 16 x 16) = keys or values (16 x D each) times the transpose of 16 rows of a tile.
template <typename T, int D>
HLIP_DEVICE void logits_of(float (&c)[kKeyTiles][2][4], const uint32_t (&a)[kKeyTiles][D / 16][4], Shared tile, int row) {
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
    clear(c[m][0]);
    clear(c[m][1]);
  }
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    load_matrices(b, chunks_on<D>(matrix_place<D>(tile, row, 0, false), 2 * k));
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
      multiply_add<T>(c[m][0], a[m][k], b[0], b[1]);
      multiply_add<T>(c[m][1], a[m][k], b[2], b[3]);
    }
  }
}

// c (kKeyTiles of 16 x D) += a (16 x 16 each) times 16 rows of a tile.
template <typename T, int D>
HLIP_DEVICE void add_gradient(float (&c)[kKeyTiles][D / 8][4], const uint32_t (&a)[kKeyTiles][4], Shared tile, int row) {
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[4];
    load_matrices_transposed(b, chunks_on<D>(matrix_place<D>(tile, row, 0, true), 2 * n));
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
      multiply_add<T>(c[m][2 * n], a[m], b[0], b[1]);
      multiply_add<T>(c[m][2 * n + 1], a[m], b[2], b[3]);
    }
  }
}

// What a warp keeps of its keys while all queries pass.
template <int D>
struct KeyRows {
  uint32_t k[kKeyTiles][D / 16][4], v[kKeyTiles][D / 16][4];
  float dk[kKeyTiles][D / 8][4], dv[kKeyTiles][D / 8][4];
};

HLIP_DEVICE int first_key() { return thread_index_anew() / 32 * kKeyTiles * kTile; }

template <typename T, int D>
HLIP_DEVICE void open_keys(KeyRows<D>& own, int padded, Shared keys, Shared values) {
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
    if (first_key() + m * kTile < padded) {
      load_left_shared<T, D>(own.k[m], keys, first_key() + m * kTile);
      load_left_shared<T, D>(own.v[m], values, first_key() + m * kTile);
    } else {
#pragma unroll
      for (int e = 0; e < D / 4; ++e) own.k[m][e / 4][e % 4] = own.v[m][e / 4][e % 4] = 0;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      clear(own.dk[m][n]);
      clear(own.dv[m][n]);
    }
  }
}

// 16 queries from `query` on against a warp's keys: adds to dV and dK, and leaves dS in `exchange`: a row for each key, a column
// for each query of the step, of which these are the 16 from `column` on.
template <typename T, int D, int kStep>
HLIP_DEVICE void pass_queries(KeyRows<D>& own, const BackwardArguments& a, int rows, const Places& at, Shared stats, int query,
                              Shared exchange, int column) {
  const int lane = lane_index(), quad = lane % 4;
  float p[kKeyTiles][2][4], ds[kKeyTiles][2][4];
  logits_of<T, D>(p, own.k, at.queries, query);
  logits_of<T, D>(ds, own.v, at.grads, query);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float4 two = shared_load<float4>(stats + 8 * (query + 8 * n + 2 * quad));  // of this query and the next
#pragma unroll
    for (int e = 0; e < 4 * kKeyTiles; ++e) {
      float &x = p[e / 4][n][e % 4], &y = ds[e / 4][n][e % 4];
      x = exp2_fast(x * a.scale_log2 - (e % 2 ? two.z : two.x));
      y = x * (y - (e % 2 ? two.w : two.y));
    }
  }
  if (query + kTile > rows) {  // some of the 16 queries are not there
#pragma unroll
    for (int e = 0; e < 8 * kKeyTiles; ++e) {
      if (query + e / 4 % 2 * 8 + 2 * quad + e % 2 >= rows) p[e / 8][e / 4 % 2][e % 4] = ds[e / 8][e / 4 % 2][e % 4] = 0.0f;
    }
  }
  uint32_t left_p[kKeyTiles][4], left_ds[kKeyTiles][4];
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
    as_left<T>(left_p[m], p[m][0], p[m][1]);
    as_left<T>(left_ds[m], ds[m][0], ds[m][1]);
  }
  add_gradient<T, D>(own.dv, left_p, at.grads, query);
  const Shared first = exchange + swizzled<kStep>(first_key() + lane / 4, 0) + 4 * quad;
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
    if (first_key() + m * kTile >= rows) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // keys 8 or 16 on lie 8 or 16 rows on, in the same banks
      const bool there = first_key() + m * kTile + e % 2 * 8 + lane / 4 < rows;
      shared_store<uint32_t>(chunks_on<kStep>(first, column / 8 + e / 2) + (m * kTile + e % 2 * 8) * 2 * kStep, there ? left_ds[m][e] : 0u);
    }
  }
  add_gradient<T, D>(own.dk, left_ds, at.queries, query);
}

// 32 columns of dQ of 16 queries: dS, as the warps left it, times the keys. Operands are loaded a tile ahead of their products.
template <typename T, int D, int kStep>
HLIP_DEVICE void make_queries(const BackwardArguments& a, Shared segment, Shared keys, int query, Shared exchange, int column, int part) {
  float dq[4][4];
#pragma unroll
  for (int n = 0; n < 4; ++n) clear(dq[n]);
  uint32_t left[2][4], b[2][2][4];
  const auto load = [&](int slot, int key) {
    load_matrices_transposed(left[slot], chunks_on<kStep>(matrix_place<kStep>(exchange, key, 0, false), column / 8));
#pragma unroll
    for (int n = 0; n < 2; ++n) load_matrices_transposed(b[slot][n], chunks_on<D>(matrix_place<D>(keys, key, 4 * part, true), 2 * n));
  };
  const auto multiply = [&](int slot) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      multiply_add<T>(dq[2 * n], left[slot], b[slot][n][0], b[slot][n][1]);
      multiply_add<T>(dq[2 * n + 1], left[slot], b[slot][n][2], b[slot][n][3]);
    }
  };
  const int padded = padded_at(segment);
  load(0, 0);
#pragma unroll 1
  for (int key = 0; key < padded; key += 2 * kTile) {
    if (key + kTile < padded) load(1, key + kTile);
    multiply(0);
    if (key + kTile >= padded) break;
    if (key + 2 * kTile < padded) load(0, key + 2 * kTile);
    multiply(1);
  }
  const Segment s = segment_at(segment);
  T* to[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = query + lane_index() / 4 + 8 * half;
    to[half] = i < s.rows ? static_cast<T*>(a.dq) + (row_of(s, i) * a.heads + s.head) * D + 32 * part : nullptr;
  }
  const float scale[2] = {a.scale, a.scale};
  store_tile<T, 32>(to, dq, scale);
}

template <typename T, int D>
HLIP_DEVICE void close_keys(const KeyRows<D>& own, const BackwardArguments& a, Shared segment) {
  const Segment s = segment_at(segment);
  const float scale[2] = {a.scale, a.scale}, one[2] = {1.0f, 1.0f};
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
    if (first_key() + m * kTile >= s.rows) continue;
    T *dk[2], *dv[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_key() + m * kTile + lane_index() / 4 + 8 * half;
      const int64_t at = i < s.rows ? (row_of(s, i) * a.heads + s.head) * D : 0;
      dk[half] = i < s.rows ? static_cast<T*>(a.dk) + at : nullptr;
      dv[half] = i < s.rows ? static_cast<T*>(a.dv) + at : nullptr;
    }
    store_tile<T, D>(dk, own.dk[m], scale);
    store_tile<T, D>(dv, own.dv[m], one);
  }
}

template <typename T, int D, int kWarps, int kStep, int kBlocks>
HLIP_KERNEL(kWarps * 32, kBlocks) short_attention_whole_backward(WholeArguments whole) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kParts = D / 32, kUnits = kStep / kTile * kParts;  // of dQ, a step
  static_assert(kUnits <= kWarps, "a unit each, in turns");
  constexpr int kCopiers = kUnits < kWarps ? kThreads - kUnits * 32 : kThreads;  // threads that copy while others make dQ, or all
  const BackwardArguments& a = whole.of;
  const Places at = places<D, kStep>(whole.rows, whole.two_keys);
  const auto item = [&](int turn) { return static_cast<int>(block_index()) + turn * static_cast<int>(block_count()); };
  if (block_index() >= whole.items) return;
  if (thread_index() < 2 && item(thread_index()) < whole.items) {
    open_segment(thread_index() * kSegmentBytes, a.tables, a.heads, item(thread_index()));
  }
  block_sync();
  start_segment<T, D, kThreads>({at.queries, at.grads, at.values, at.outs, at.keys}, {&a.q, &a.grad_out, &a.v, &a.out, &a.k},
                                segment_at(0), 0, whole.rows);
  start_stats<kThreads>(at.stats, a, 0);
  KeyRows<D> own;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const auto segment = [&](int later) { return static_cast<Shared>((turn + later) % kSegments * kSegmentBytes); };
    const auto stats = [&](int later) { return at.stats + (turn + later) % 2 * at.stats_on; };
    const auto keys = [&](int later) { return at.keys + (turn + later) % 2 * at.keys_on; };
    copy_async_wait();
    block_sync();  // all of this segment is there, and nobody is at the one before
    const int padded = segment_at(segment(0)).padded, rows = segment_at(segment(0)).rows;
    make_deltas<T, D, kThreads>(padded, at, stats(0));
    open_keys<T, D>(own, padded, keys(0), at.values);
    block_sync();
    if (item(turn + 1) < whole.items) {
      start_segment<T, D, kThreads>({at.values, at.outs}, {&a.v, &a.out}, segment_at(segment(1)), 0, whole.rows);
      if (whole.two_keys) start_segment<T, D, kThreads>({keys(1)}, {&a.k}, segment_at(segment(1)), 0, whole.rows);
      start_stats<kThreads>(stats(1), a, segment(1));
      // The one after the next, by a warp that has no keys of short segments.
      if (thread_index() == kThreads - 1 && item(turn + 2) < whole.items) open_segment(segment(2), a.tables, a.heads, item(turn + 2));
    }
#pragma unroll 1
    for (int step = 0; step < padded; step += kStep) {
      const Shared exchange = at.exchange + step / kStep % 2 * at.exchange_on;
      if (first_key() < padded) {
#pragma unroll 1
        for (int column = 0; column < kStep && step + column < padded; column += kTile) {
          pass_queries<T, D, kStep>(own, a, rows, at, stats(0), step + column, exchange, column);
        }
      }
      block_sync();   // dS is there, and nobody reads these queries any more
      forget(turn);  // what follows from it is made anew: no register is left to keep it in
      const int self = thread_index_anew(), unit = (self / 32 + step / kStep * (kWarps - kUnits)) % kWarps, column = unit / kParts * kTile;
      if (item(turn + 1) < whole.items && (kUnits == kWarps || unit >= kUnits)) {
        const int thread = kUnits == kWarps ? self : (unit - kUnits) * 32 + self % 32;
        start_segment<T, D, kCopiers>({at.queries, at.grads}, {&a.q, &a.grad_out}, segment_at(segment(1)), step, step + kStep, thread);
      }
      if (unit < kUnits && step + column < padded) {
        make_queries<T, D, kStep>(a, segment(0), keys(0), step + column, exchange, column, unit % kParts);
      }
    }
    close_keys<T, D>(own, a, segment(0));
    if (item(turn + 1) >= whole.items) break;
    const int done = (padded + kStep - 1) / kStep * kStep;
    start_segment<T, D, kThreads>({at.queries, at.grads}, {&a.q, &a.grad_out}, segment_at(segment(1)), done, whole.rows);
    if (!whole.two_keys) {
      block_sync();  // nobody reads the keys any more
      start_segment<T, D, kThreads>({at.keys}, {&a.k}, segment_at(segment(1)), 0, whole.rows);
    }
  }
}

}  // namespace hlip
