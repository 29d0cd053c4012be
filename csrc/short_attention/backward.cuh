// Attention over short segments, backward: one kernel for every pack, no atomics, no pass before or after.
//
// Queries, keys, values and output gradients of a pack are read from device memory once, into shared memory. First each warp makes
// dQ of its rows, and leaves their softmax statistics in shared memory; then, on the same rows taken as keys, dK and dV.
// Probabilities are recomputed in both halves: seven products. For segments that have a pack of their own whole_backward.cuh
// needs five, where it has a kernel.
#pragma once

#include "pack.cuh"

namespace hlip {

// dQ of 16 query rows; leaves (log2-sum-exp, delta) of each for the second half, delta = rowsum(dO * O) - dLSE.
template <typename T, int D>
HLIP_DEVICE void backward_queries(const BackwardArguments& a, const Pack& pack, int tile, Shared stats, Shared queries, Shared keys,
                                  Shared values, Shared grads, int64_t head) {
  const int lane = lane_index(), quad = lane % 4, i[2] = {tile + lane / 4, tile + lane / 4 + 8};
  const Seen seen = seen_by(pack, tile);
  uint32_t q[D / 16][4], g[D / 16][4];
  load_left_shared<T, D>(g, grads, tile);
  float delta[2] = {0.0f, 0.0f}, lse[2] = {0.0f, 0.0f};
  load_left<T, D>(q, a.out, head, pack, tile);  // the output for a moment, in the place of the queries
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 x = unpack2<T>(q[k][e]), y = unpack2<T>(g[k][e]);
      delta[e % 2] += x.x * y.x + x.y * y.y;
    }
  }
  load_left_shared<T, D>(q, queries, tile);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    delta[half] = over_quad(delta[half], [](float x, float y) { return x + y; });
    if (i[half] >= pack.from && i[half] < pack.to) {
      const int64_t row = row_at(i[half]);
      lse[half] = global_load<float>(a.lse + head * a.num_rows + row) * kLog2E;
      if (a.grad_lse != nullptr) delta[half] -= global_load<float>(a.grad_lse + head * a.grad_lse_head + row * a.grad_lse_row);
    }
    if (quad == 0) shared_store(stats + 8 * i[half], make_float2(lse[half], delta[half]));
  }

  float dq[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) clear(dq[n]);
  // This lane's places, as left operands are turned and as they are; the values lie as far from the keys everywhere.
  uint32_t at = matrix_place<D>(keys, seen.first, 0, false), turned = matrix_place<D>(keys, seen.first, 0, true);
#pragma unroll 1
  for (int key = seen.first; key < seen.last; key += kTile, at += kTile * 2 * D, turned += kTile * 2 * D) {
    float s[2][4], dp[2][4];
    times_rows<T, D>(s, q, PlaceOf<D>{at});
    times_rows<T, D>(dp, g, PlaceOf<D>{at + (values - keys)});
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& x = s[e / 4][e % 4];
      x = exp2_fast(x * a.scale_log2 - lse[e % 4 / 2]) * (dp[e / 4][e % 4] - delta[e % 4 / 2]);
    }
    if (!all_see(seen, key)) hide(s, tile, key, 0.0f);
    uint32_t left[4];
    as_left<T>(left, s[0], s[1]);
    add_times<T, D>(dq, left, PlaceOf<D>{turned});
  }
  const float scale[2] = {a.scale, a.scale};
  store_rows<T, D>(static_cast<T*>(a.dq), dq, scale, head, a.heads, pack, tile);
}

// dK and dV of 16 key rows. Whom a row sees sees it, so spans serve the other way round.
template <typename T, int D>
HLIP_DEVICE void backward_keys(const BackwardArguments& a, const Pack& pack, int tile, Shared stats, Shared queries, Shared keys,
                               Shared values, Shared grads, int64_t head) {
  const int quad = lane_index() % 4;
  const Seen seen = seen_by(pack, tile);
  uint32_t k[D / 16][4], v[D / 16][4];
  load_left_shared<T, D>(k, keys, tile);
  load_left_shared<T, D>(v, values, tile);
  float dk[D / 8][4], dv[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    clear(dk[n]);
    clear(dv[n]);
  }
  uint32_t at = matrix_place<D>(queries, seen.first, 0, false), turned = matrix_place<D>(queries, seen.first, 0, true);
#pragma unroll 1
  for (int query = seen.first; query < seen.last; query += kTile, at += kTile * 2 * D, turned += kTile * 2 * D) {
    float p[2][4], ds[2][4];
    times_rows<T, D>(p, k, PlaceOf<D>{at});
    times_rows<T, D>(ds, v, PlaceOf<D>{at + (grads - queries)});
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = query + 8 * n + 2 * quad;
      const float4 two = shared_load<float4>(stats + 8 * column);  // statistics of this query and the next
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[n][e] = exp2_fast(p[n][e] * a.scale_log2 - (e % 2 ? two.z : two.x));
        ds[n][e] = p[n][e] * (ds[n][e] - (e % 2 ? two.w : two.y));
      }
    }
    if (!all_see(seen, query)) {
      hide(p, tile, query, 0.0f);
      hide(ds, tile, query, 0.0f);
    }
    uint32_t left[4];
    as_left<T>(left, p[0], p[1]);
    add_times<T, D>(dv, left, PlaceOf<D>{turned + (grads - queries)});
    as_left<T>(left, ds[0], ds[1]);
    add_times<T, D>(dk, left, PlaceOf<D>{turned});
  }
  const float scale[2] = {a.scale, a.scale}, one[2] = {1.0f, 1.0f};
  store_rows<T, D>(static_cast<T*>(a.dk), dk, scale, head, a.heads, pack, tile);
  store_rows<T, D>(static_cast<T*>(a.dv), dv, one, head, a.heads, pack, tile);
}

template <typename T, int D, int kWarps, int kBlocks>
HLIP_KERNEL(kWarps * 32, kBlocks) short_attention_backward(BackwardArguments a) {
  constexpr int kThreads = kWarps * 32;
  const int item = static_cast<int>(block_index()), heads = static_cast<int>(a.heads);
  const int64_t index = item / heads, head = item % heads;
  if (sees_nothing(a.tables, index)) {
    zero_rows<T, D, kThreads>(static_cast<T*>(a.dq), a.tables, index, head, a.heads);
    zero_rows<T, D, kThreads>(static_cast<T*>(a.dk), a.tables, index, head, a.heads);
    zero_rows<T, D, kThreads>(static_cast<T*>(a.dv), a.tables, index, head, a.heads);
    return;
  }
  Pack pack = open_pack<kThreads>(a.tables, index);
  const Shared tile_bytes = pack.padded * 2 * D, stats = 8 * pack.padded;
  const Shared queries = 16 * pack.padded, keys = queries + tile_bytes, values = keys + tile_bytes, grads = values + tile_bytes;
  bool one_by_one = false;
  while (true) {
    start_rows<T, D, kThreads>({queries, keys, values, grads}, {&a.q, &a.k, &a.v, &a.grad_out}, head, pack);
    copy_async_wait();
    if (pack.segments > 1 && !one_by_one) {
      one_by_one = block_any(not_finite<T, D, kThreads>(queries, pack) || not_finite<T, D, kThreads>(keys, pack) ||
                             not_finite<T, D, kThreads>(grads, pack));
      if (one_by_one) {
        pack.to = span_at(0).last;
        continue;
      }
    } else {
      block_sync();
    }
    for (int tile = warp_index() * kTile; tile < pack.to; tile += kWarps * kTile) {
      if (tile + kTile > pack.from) backward_queries<T, D>(a, pack, tile, stats, queries, keys, values, grads, head);
    }
    block_sync();
    for (int tile = warp_index() * kTile; tile < pack.to; tile += kWarps * kTile) {
      if (tile + kTile > pack.from) backward_keys<T, D>(a, pack, tile, stats, queries, keys, values, grads, head);
    }
    if (!next_segment(pack)) break;
    block_sync();
  }
}

}  // namespace hlip
