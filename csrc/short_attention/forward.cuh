// Attention over short segments, forward, for packs of several segments (and of rows that none holds); a segment that has a pack of its
// own comes to whole_forward.cuh.
//
// A block handles one pack (pack.cuh) for one head. Its keys and values are read from device memory once, into shared memory; the
// output is written once. A warp takes 16 rows at a time; where their spans differ, logits outside are masked. The logits of 16
// rows against all keys they see stay in registers, so softmax is one pass, without rescaling.
//
// Isolation: a masked probability is 0, but 0 * NaN is NaN. Where a pack of several segments holds a value that is not finite
// (checked as it arrives), the block goes over its segments one at a time, with zeros in place of the others. So does backward.
#pragma once

#include "pack.cuh"

namespace hlip {

template <typename T, int D>
HLIP_DEVICE void forward_tile(const ForwardArguments& a, const Pack& pack, int tile, Shared keys, Shared values, int64_t head) {
  const int lane = lane_index(), quad = lane % 4, i[2] = {tile + lane / 4, tile + lane / 4 + 8};
  const Seen seen = seen_by(pack, tile);
  uint32_t q[D / 16][4];
  load_left<T, D>(q, a.q, head, pack, tile);
  // Softmax of scaled logits is that of the logits with a largest one scaled once, if the scale is positive: its sign goes to the
  // queries. (0 would make NaN of -inf.)
  const float scale = fmaxf(fabsf(a.scale_log2), kLeast);
  if (a.scale_log2 < 0.0f) negate<D>(q);

  const KeptPlaces<D> keys_at(matrix_place<D>(keys, seen.first, 0, false));
  constexpr int kTiles = kPackRows / kTile;
  float p[kTiles][2][4];
  float largest[2] = {-INFINITY, -INFINITY};
  const auto consider = [&](const float (&c)[2][4]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) largest[e % 4 / 2] = fmaxf(largest[e % 4 / 2], c[e / 4][e % 4]);
  };
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {  // two at a time: products of one fill the time that those of the other take
    const int m = n + 1 < kTiles ? n + 1 : n, key = seen.first + n * kTile, next = seen.first + m * kTile;
    if (n < m && next < seen.last) {
      times_rows<T, D>(p[n], q, keys_at, n * kTile);
      times_rows<T, D>(p[m], q, keys_at, m * kTile);
      if (!all_see(seen, key, 2 * kTile)) {
        hide(p[n], tile, key, -INFINITY);
        hide(p[m], tile, next, -INFINITY);
      }
      consider(p[n]);
      consider(p[m]);
      continue;
    }
    // No logits are said to be none, or the compiler takes the values of the round before to be needed still.
#pragma unroll
    for (int e = 0; e < 8; ++e) p[m][e / 4][e % 4] = -INFINITY;
    if (key < seen.last) {
      times_rows<T, D>(p[n], q, keys_at, n * kTile);
      if (!all_see(seen, key)) hide(p[n], tile, key, -INFINITY);
      consider(p[n]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) p[n][e / 4][e % 4] = -INFINITY;
    }
  }
  int last = seen.last;
  forget(last);
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto sum = [](float x, float y) { return x + y; };
  float total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    largest[half] = over_quad(largest[half], larger) * scale;
    if (largest[half] == -INFINITY) largest[half] = 0.0f;  // a row that is not there, or whose logits are all -inf
  }

  // All probabilities before the first product: as left operands they take half the registers, which the output then has.
  uint32_t left[kTiles][4];
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    const int after = n + 2 < kTiles ? n + 2 : kTiles;
    if (seen.first + n * kTile >= last) {
#pragma unroll
      for (int e = 4 * n; e < 4 * after; ++e) left[e / 4][e % 4] = 0;
      continue;
    }
#pragma unroll
    for (int m = n; m < after; ++m) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& x = p[m][e / 4][e % 4];
        x = exp2_fast(x * scale - largest[e % 4 / 2]);
        total[e % 4 / 2] += x;
      }
      as_left<T>(left[m], p[m][0], p[m][1]);
    }
  }
  forget(last);
  const KeptPlaces<D> values_at(matrix_place<D>(values, seen.first, 0, true));
  float out[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) clear(out[n]);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    const int key = seen.first + n * kTile;
    if (n + 1 < kTiles && key + kTile < last) {
      add_times<T, D>(out, left[n], values_at, n * kTile);
      add_times<T, D>(out, left[n + 1], values_at, (n + 1) * kTile);
    } else if (key < last) {
      add_times<T, D>(out, left[n], values_at, n * kTile);
    }
  }
  float share[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = over_quad(total[half], sum);
    share[half] = reciprocal_fast(total[half]);
    if (quad == 0 && i[half] >= pack.from && i[half] < pack.to) {
      global_store(a.lse + head * a.num_rows + row_at(i[half]), (largest[half] + log2_fast(total[half])) * kLn2);
    }
  }
  store_rows<T, D>(static_cast<T*>(a.out), out, share, head, a.heads, pack, tile);
}

template <typename T, int D, int kWarps, int kBlocks>
HLIP_KERNEL(kWarps * 32, kBlocks) short_attention_forward(ForwardArguments a) {
  constexpr int kThreads = kWarps * 32;
  const int item = static_cast<int>(block_index()), heads = static_cast<int>(a.heads);
  const int64_t index = item / heads, head = item % heads;  // heads of one pack run side by side
  if (sees_nothing(a.tables, index)) {
    zero_rows<T, D, kThreads>(static_cast<T*>(a.out), a.tables, index, head, a.heads);
    const int4 pack = global_load<int4>(a.tables.packs + 4 * index);
    const int64_t first = global_load<int>(a.tables.records + 8 * pack.x) + pack.z;
    for (int i = thread_index(); i < pack.w; i += kThreads) global_store(a.lse + head * a.num_rows + first + i, 0.0f);
    return;
  }
  Pack pack = open_pack<kThreads>(a.tables, index);
  const Shared keys = 8 * pack.padded, values = keys + pack.padded * 2 * D;
  bool one_by_one = false;
  while (true) {
    start_rows<T, D, kThreads>({keys, values}, {&a.k, &a.v}, head, pack);
    copy_async_wait();
    if (pack.segments > 1 && !one_by_one) {
      one_by_one = block_any(not_finite<T, D, kThreads>(values, pack));
      if (one_by_one) {
        pack.to = span_at(0).last;
        continue;
      }
    } else {
      block_sync();
    }
    for (int tile = warp_index() * kTile; tile < pack.to; tile += kWarps * kTile) {
      if (tile + kTile > pack.from) forward_tile<T, D>(a, pack, tile, keys, values, head);
    }
    if (!next_segment(pack)) break;
    block_sync();  // nobody reads the tiles any more
  }
}

}  // namespace hlip
