// Attention over short segments, forward: each segment is held whole by one thread block.
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

template <typename T, int D, int kKeys>
HLIP_DEVICE void forward_tile(const ForwardArguments& a, const Pack& pack, int tile, Shared keys, Shared values, int64_t head) {
  const int lane = lane_index(), quad = lane % 4, i[2] = {tile + lane / 4, tile + lane / 4 + 8};
  const Seen seen = seen_by(pack, tile);
  const Span span[2] = {span_at(i[0]), span_at(i[1])};
  uint32_t q[D / 16][4];
  load_left<T, D>(q, a.q, head, pack, tile);

  float p[kKeys / 8][4];
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < kKeys / kTile; ++n) {
    const int key = seen.first + n * kTile;
    if (key >= seen.last) {  // said, or the compiler takes the values of the round before to be needed still
#pragma unroll
      for (int e = 0; e < 8; ++e) p[2 * n + e / 4][e % 4] = -INFINITY;
      continue;
    }
    float c[2][4];
    times_rows<T, D>(c, q, keys, key);
    const bool masked = !all_see(seen, key);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& logit = p[2 * n + e / 4][e % 4];
      logit = c[e / 4][e % 4] * a.scale_log2;
      if (masked && !sees(span[e % 4 / 2], key + e / 4 * 8 + 2 * quad + e % 2)) logit = -INFINITY;
      largest[e % 4 / 2] = fmaxf(largest[e % 4 / 2], logit);
    }
  }
  int last = seen.last;
  forget(last);
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto sum = [](float x, float y) { return x + y; };
  float total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    largest[half] = over_quad(largest[half], larger);
    if (largest[half] == -INFINITY) largest[half] = 0.0f;  // a row that is not there, or whose logits are all -inf
  }

  // All probabilities before the first product: as left operands they take half the registers, which the output then has.
  uint32_t left[kKeys / kTile][4];
#pragma unroll
  for (int n = 0; n < kKeys / kTile; ++n) {
    if (seen.first + n * kTile >= last) {
#pragma unroll
      for (int e = 0; e < 4; ++e) left[n][e] = 0;
      continue;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& x = p[2 * n + e / 4][e % 4];
      x = exp2_fast(x - largest[e % 4 / 2]);
      total[e % 4 / 2] += x;
    }
    as_left<T>(left[n], p[2 * n], p[2 * n + 1]);
  }
  forget(last);
  float out[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) clear(out[n]);
#pragma unroll
  for (int n = 0; n < kKeys / kTile; ++n) {
    const int key = seen.first + n * kTile;
    if (key < last) add_times<T, D>(out, left[n], values, key);
  }
  float share[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = over_quad(total[half], sum);
    share[half] = 1.0f / total[half];
    if (quad == 0 && i[half] >= pack.from && i[half] < pack.to) {
      global_store(a.lse + head * a.num_rows + row_at(i[half]), (largest[half] + log2_fast(total[half])) * kLn2);
    }
  }
  store_rows<T, D>(static_cast<T*>(a.out), out, share, head, a.heads, pack, tile);
}

template <typename T, int D, int kKeys, int kWarps, int kBlocks>
HLIP_KERNEL(kWarps * 32, kBlocks) short_attention_forward(ForwardArguments a) {
  constexpr int kThreads = kWarps * 32;
  const int64_t index = block_index() / a.heads, head = block_index() % a.heads;  // heads of one pack run side by side
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
    start_rows<T, D, kThreads>(keys, a.k, head, pack);
    start_rows<T, D, kThreads>(values, a.v, head, pack);
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
      if (tile + kTile > pack.from) forward_tile<T, D, kKeys>(a, pack, tile, keys, values, head);
    }
    if (!next_segment(pack)) break;
    block_sync();  // nobody reads the tiles any more
  }
}

}  // namespace hlip
