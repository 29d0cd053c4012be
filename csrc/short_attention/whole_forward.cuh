// Attention over short segments, forward, for segments that have a pack of their own.
//
// Keys and values lie in shared memory, each read from device memory once. A warp takes 32 queries, so that an operand from shared
// memory serves four products, and goes over the keys 32 at a time.
//
// Logits are exponentiated less a number that each row goes by, its largest logit so far or one up to kFar below that: a power of two
// too large does no harm to floats, and what was summed is scaled anew only where a row's logits rise by more, seldom after the first.
#pragma once

#include "whole_segment.cuh"

namespace hlip {

constexpr int kQueryTiles = 2;  // tiles of 16 queries that a warp takes at a time
constexpr float kLowest = -3.402823466e38f;  // what rows go by at first: below every logit but -inf
constexpr float kFar = 8.0f;                 // of logits, times log2(e)

// What a warp knows of its queries.
template <int D>
struct QueryRows {
  uint32_t q[kQueryTiles][D / 16][4];
  float out[kQueryTiles][D / 8][4];
  float base[kQueryTiles][2], total[kQueryTiles][2];  // of rows g and g + 8; this thread's share of the total
};

// Scales what was summed to the largest of the new logits, of which `most` is the largest of this thread's.
template <int D>
HLIP_DEVICE void rise(QueryRows<D>& own, const float (&most)[kQueryTiles][2], float scale) {
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = fmaxf(over_quad(most[m][half], [](float x, float y) { return fmaxf(x, y); }) * scale, own.base[m][half]);
      const float factor = exp2_fast(own.base[m][half] - top);
      own.base[m][half] = top;
      own.total[m][half] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        own.out[m][n][2 * half] *= factor;
        own.out[m][n][2 * half + 1] *= factor;
      }
    }
  }
}

// kCount tiles of 16 keys from `key` on, which lie at keys_at and values_at; those from `rows` on are not there.
template <typename T, int D, int kCount, bool kEnd>
HLIP_DEVICE void attend(QueryRows<D>& own, const PlaceOf<D>& keys_at, const PlaceOf<D>& values_at, int key, int rows,
                        float scale) {
  const int quad = lane_index() % 4;
  float p[kQueryTiles][kCount][2][4];
#pragma unroll
  for (int e = 0; e < 2 * kCount * kQueryTiles; ++e) clear(p[e / 2 / kCount][e / 2 % kCount][e % 2]);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      uint32_t b[4];
      load_matrices(b, keys_at(2 * k) + n * kTile * 2 * D);
#pragma unroll
      for (int m = 0; m < kQueryTiles; ++m) {
        multiply_add<T>(p[m][n][0], own.q[m][k], b[0], b[1]);
        multiply_add<T>(p[m][n][1], own.q[m][k], b[2], b[3]);
      }
    }
  }
  float most[kQueryTiles][2];
  bool far = false;
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m) {
    most[m][0] = most[m][1] = -INFINITY;
#pragma unroll
    for (int e = 0; e < 8 * kCount; ++e) {
      float& x = p[m][e / 8][e / 4 % 2][e % 4];
      if (kEnd && key + e / 4 * 8 + 2 * quad + e % 2 >= rows) x = -INFINITY;
      most[m][e % 4 / 2] = fmaxf(most[m][e % 4 / 2], x);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) far |= most[m][half] * scale > own.base[m][half] + kFar;
  }
  if (warp_any(far)) rise(own, most, scale);
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m) {
#pragma unroll
    for (int e = 0; e < 8 * kCount; ++e) {
      float& x = p[m][e / 8][e / 4 % 2][e % 4];
      x = exp2_fast(x * scale - own.base[m][e % 4 / 2]);
      own.total[m][e % 4 / 2] += x;
    }
  }
  uint32_t left[kQueryTiles][kCount][4];
#pragma unroll
  for (int e = 0; e < kQueryTiles * kCount; ++e) {
    const int m = e / kCount, n = e % kCount;
    as_left<T>(left[m][n], p[m][n][0], p[m][n][1]);
  }
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t b[4];
      load_matrices_transposed(b, values_at(2 * c) + n * kTile * 2 * D);
#pragma unroll
      for (int m = 0; m < kQueryTiles; ++m) {
        multiply_add<T>(own.out[m][2 * c], left[m][n], b[0], b[1]);
        multiply_add<T>(own.out[m][2 * c + 1], left[m][n], b[2], b[3]);
      }
    }
  }
}

template <typename T, int D>
HLIP_DEVICE void open_queries(QueryRows<D>& own, const ForwardArguments& a, const Segment& s, int first) {
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m) {
    int64_t rows[2];  // the last one's in the place of those that are not there
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + m * kTile + half * 8 + lane_index() / 4;
      rows[half] = row_of(s, i < s.rows ? i : s.rows - 1);
      own.base[m][half] = kLowest;
      own.total[m][half] = 0.0f;
    }
    load_left<T, D>(own.q[m], a.q, s.head, rows);
    if (a.scale_log2 < 0.0f) negate<D>(own.q[m]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) clear(own.out[m][n]);
  }
}

template <typename T, int D>
HLIP_DEVICE void close_queries(QueryRows<D>& own, const ForwardArguments& a, const Segment& s, int first) {
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m) {
    if (first + m * kTile >= s.rows) continue;
    T* to[2];
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + m * kTile + half * 8 + lane_index() / 4;
      const float total = over_quad(own.total[m][half], [](float x, float y) { return x + y; });
      const int64_t row = row_of(s, i);
      share[half] = reciprocal_fast(total);
      to[half] = i < s.rows ? static_cast<T*>(a.out) + (row * a.heads + s.head) * D : nullptr;
      if (i < s.rows && lane_index() % 4 == 0) {
        global_store(a.lse + s.head * a.num_rows + row, (own.base[m][half] + log2_fast(total)) * kLn2);
      }
    }
    store_tile<T, D>(to, own.out[m], share);
  }
}

template <typename T, int D, int kWarps, int kBlocks>
HLIP_KERNEL(kWarps * 32, kBlocks) short_attention_whole_forward(ForwardArguments a) {
  if (thread_index() == 0) open_segment(0, a.tables, a.heads, static_cast<int>(block_index()));
  block_sync();
  constexpr Shared kKeys = 4 * kSegmentBytes;
  const auto values = [] { return kKeys + segment_at(0).padded * 2 * D; };
  start_segment<T, D, kWarps * 32>({kKeys, values()}, {&a.k, &a.v}, segment_at(0), 0, segment_at(0).padded);
  copy_async_wait();
  block_sync();
  QueryRows<D> own;
#pragma unroll 1
  for (int first = warp_index() * kQueryTiles * kTile; first < segment_at(0).rows; first += kWarps * kQueryTiles * kTile) {
    open_queries<T, D>(own, a, segment_at(0), first);
    // A scaled logit is largest where the logit is, if the scale is positive: its sign goes to the queries. (0 would make NaN of -inf.)
    const float scale = fmaxf(fabsf(a.scale_log2), kLeast);
    // The tile that may not be full comes first, so that the loop has nothing to hide.
    const int rows = segment_at(0).rows, tiles = (rows + kTile - 1) / kTile;
    int key = (tiles - 1) / 2 * 2 * kTile;
    PlaceOf<D> keys_at{matrix_place<D>(kKeys, key, 0, false)}, values_at{matrix_place<D>(values(), key, 0, true)};
    if (tiles % 2) {
      attend<T, D, 1, true>(own, keys_at, values_at, key, rows, scale);
    } else {
      attend<T, D, 2, true>(own, keys_at, values_at, key, rows, scale);
    }
#pragma unroll 1
    while ((key -= 2 * kTile) >= 0) {
      keys_at.at -= 2 * kTile * 2 * D;
      values_at.at -= 2 * kTile * 2 * D;
      attend<T, D, 2, false>(own, keys_at, values_at, key, rows, scale);
    }
    close_queries<T, D>(own, a, segment_at(0), first);
  }
}

}  // namespace hlip
