// Attention over short segments, forward and backward: each segment is held whole by one thread block.
//
// A block handles one *pack* for one head: a segment of up to a few hundred rows, or several tiny ones in a row. Its keys and
// values (backward: queries, keys, values and output gradients) are read from device memory once, into shared memory; every
// output is written once. The rows of a pack are one sequence, in which each segment's patch rows are followed by its prefix
// rows: prefix rows are found by address, nothing is concatenated. Each row sees a *span*, the part of the sequence that is
// its own segment. A warp takes 16 rows at a time; where their spans differ, logits outside are masked.
//
// Forward: the logits of 16 rows against all keys they see stay in registers, so softmax is one pass, without rescaling.
// Backward: one kernel. First each warp makes dQ of its rows, and leaves their softmax statistics in shared memory; then, on
// the same rows taken as keys, dK and dV. Probabilities are recomputed in both halves; no atomics, no pass before or after.
//
// Isolation: a masked probability is 0, but 0 * NaN is NaN. Where a pack of several segments holds a value that is not finite
// (checked as it arrives), the block goes over its segments one at a time, with zeros in place of the others.
//
// Names of register tiles follow mma.m16n8k16: thread t of a quad (4 threads) holds columns 2t and 2t + 1 of rows g and g + 8.
#pragma once

#include <cmath>

#include "device/device.cuh"
#include "short_attention.h"

namespace hlip {

constexpr int kTile = 16;           // rows a warp takes at a time, and keys of one step
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---------------------------------------------------------------- shared memory

// Where 16-byte chunk `chunk` of row `row` lies in a tile of D columns. Chunks are exclusive-or'ed with bits of the row so
// that the 8 rows one matrix load touches lie in different banks.
template <int D>
HLIP_DEVICE Shared place(int row, int chunk) {
  constexpr int kChunks = D / 8;
  constexpr int kPower = kChunks % 8 == 0 ? 8 : (kChunks % 4 == 0 ? 4 : 2);  // chunks that may trade places
  constexpr int kShift = kPower == 8 ? 0 : (kPower == 4 ? 1 : 2);
  return static_cast<Shared>(row * (2 * D) + ((chunk ^ ((row >> kShift) & (kPower - 1))) << 4));
}

// This lane's address for a matrix load of 16 rows by 2 chunks. `across`: matrices go row half first (left operands, and
// right ones that are transposed), else chunk first (right operands as they are).
template <int D>
HLIP_DEVICE Shared matrix_place(Shared tile, int row, int chunk, bool across) {
  const int lane = lane_index(), matrix = lane / 8;
  const int half = across ? matrix % 2 : matrix / 2, side = across ? matrix / 2 : matrix % 2;
  return tile + place<D>(row + 8 * half + lane % 8, chunk + side);
}

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

// Starts copying the rows at work into a tile, zeros for all others.
template <typename T, int D, int kThreads>
HLIP_DEVICE void start_rows(Shared tile, const View& x, int64_t head, const Pack& pack) {
  constexpr int kChunks = D / 8;
  const T* base = static_cast<const T*>(x.at) + head * x.head;
  for (int c = thread_index(); c < pack.padded * kChunks; c += kThreads) {
    const int i = c / kChunks, chunk = c % kChunks;
    const bool live = i >= pack.from && i < pack.to;
    copy_async_16(tile + place<D>(i, chunk), live ? base + row_at(i) * x.row + chunk * 8 : base, live);
  }
}

// Whether this thread copied anything that is not finite into a tile. After copy_async_wait.
template <typename T, int D, int kThreads>
HLIP_DEVICE bool not_finite(Shared tile, const Pack& pack) {
  constexpr int kChunks = D / 8;
  constexpr uint32_t kExponent = kIsHalf<T> ? 0x7c00 : 0x7f80;
  bool bad = false;
#pragma unroll 1
  for (int c = thread_index(); c < pack.padded * kChunks; c += kThreads) {
    const uint4 v = shared_load<uint4>(tile + place<D>(c / kChunks, c % kChunks));
    for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
      bad |= (word & kExponent) == kExponent || ((word >> 16) & kExponent) == kExponent;
    }
  }
  return bad;
}

// Word j of thread t of a quad becomes word t of thread j.
HLIP_DEVICE void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = lane_index() & 1, high = lane_index() & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t got = shuffle_xor(odd ? w[j] : w[j + 1], 1);
    (odd ? w[j] : w[j + 1]) = got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t got = shuffle_xor(high ? w[j] : w[j + 2], 2);
    (high ? w[j] : w[j + 2]) = got;
  }
}

// Rows i and i + 8 (i = tile + g) of a tensor as left operands: straight from device memory, 16 bytes a thread, and turned
// within quads. Rows that are not at work are 0.
template <typename T, int D>
HLIP_DEVICE void load_left(uint32_t (&a)[D / 16][4], const View& x, int64_t head, const Pack& pack, int tile) {
  constexpr int kChunks = D / 8;
  const int lane = lane_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = tile + lane / 4 + 8 * half;
    const bool live = i >= pack.from && i < pack.to;
    const T* row = static_cast<const T*>(x.at) + head * x.head + (live ? row_at(i) * x.row : 0);
#pragma unroll
    for (int four = 0; four < (kChunks + 3) / 4; ++four) {
      const int chunk = 4 * four + lane % 4;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (live && chunk < kChunks) v = global_load<uint4>(row + chunk * 8);
      uint32_t w[4] = {v.x, v.y, v.z, v.w};
      transpose_quad(w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * four + j < kChunks) a[(4 * four + j) / 2][half + (4 * four + j) % 2 * 2] = w[j];
      }
    }
  }
}

// Writes rows i and i + 8 of an accumulator, times `factor` each, to the packed rows of the pack: 16 bytes a thread.
template <typename T, int D>
HLIP_DEVICE void store_rows(T* x, const float (&c)[D / 8][4], const float (&factor)[2], int64_t head, int64_t heads, const Pack& pack,
                            int tile) {
  constexpr int kChunks = D / 8;
  const int lane = lane_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = tile + lane / 4 + 8 * half;
    const bool live = i >= pack.from && i < pack.to;
    T* row = x + ((live ? row_at(i) : 0) * heads + head) * D;
#pragma unroll
    for (int four = 0; four < (kChunks + 3) / 4; ++four) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        constexpr int kLast = kChunks - 1;
        const int chunk = 4 * four + j < kChunks ? 4 * four + j : kLast;
        w[j] = pack2<T>(c[chunk][2 * half] * factor[half], c[chunk][2 * half + 1] * factor[half]);
      }
      transpose_quad(w);
      const int chunk = 4 * four + lane % 4;
      if (live && chunk < kChunks) global_store(row + chunk * 8, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

// ---------------------------------------------------------------- products

HLIP_DEVICE void clear(float (&c)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) c[e] = 0.0f;
}

// c (16 x 16) = a (16 x D) times the transpose of 16 rows of a tile.
template <typename T, int D>
HLIP_DEVICE void times_rows(float (&c)[2][4], const uint32_t (&a)[D / 16][4], Shared tile, int row) {
  clear(c[0]);
  clear(c[1]);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    load_matrices(b, matrix_place<D>(tile, row, 2 * k, false));
    multiply_add<T>(c[0], a[k], b[0], b[1]);
    multiply_add<T>(c[1], a[k], b[2], b[3]);
  }
}

// c (16 x D) += a (16 x 16) times 16 rows of a tile.
template <typename T, int D>
HLIP_DEVICE void add_times(float (&c)[D / 8][4], const uint32_t (&a)[4], Shared tile, int row) {
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[4];
    load_matrices_transposed(b, matrix_place<D>(tile, row, 2 * n, true));
    multiply_add<T>(c[2 * n], a, b[0], b[1]);
    multiply_add<T>(c[2 * n + 1], a, b[2], b[3]);
  }
}

// A 16 x 16 accumulator as a left operand.
template <typename T>
HLIP_DEVICE void as_left(uint32_t (&a)[4], const float (&c0)[4], const float (&c1)[4]) {
  a[0] = pack2<T>(c0[0], c0[1]);
  a[1] = pack2<T>(c0[2], c0[3]);
  a[2] = pack2<T>(c1[0], c1[1]);
  a[3] = pack2<T>(c1[2], c1[3]);
}

template <typename T, int D>
HLIP_DEVICE void load_left_shared(uint32_t (&a)[D / 16][4], Shared tile, int row) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) load_matrices(a[k], matrix_place<D>(tile, row, 2 * k, true));
}

template <typename F>
HLIP_DEVICE float over_quad(float x, F combine) {
  x = combine(x, shuffle_xor(x, 1));
  return combine(x, shuffle_xor(x, 2));
}

// The rows seen by the 16 rows from `tile` on, of those at work: from a multiple of 16, and those that all of them see.
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
  return {first / kTile * kTile, last, whole ? b.first : 1, whole ? a.last : 0};
}

HLIP_DEVICE bool all_see(const Seen& seen, int key) { return key >= seen.all_first && key + kTile <= seen.all_last; }

// The next segment of a pack that is gone over one by one; false after the last.
HLIP_DEVICE bool next_segment(Pack& pack) {
  if (pack.to == pack.rows) return false;
  pack.from = pack.to;
  pack.to = span_at(pack.from).last;
  return true;
}

// ---------------------------------------------------------------- forward

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

// ---------------------------------------------------------------- backward

// dQ of 16 query rows; leaves (log2-sum-exp, delta) of each for the second half, delta = rowsum(dO * O) - dLSE.
template <typename T, int D>
HLIP_DEVICE void backward_queries(const BackwardArguments& a, const Pack& pack, int tile, Shared stats, Shared queries, Shared keys,
                                  Shared values, Shared grads, int64_t head) {
  const int lane = lane_index(), quad = lane % 4, i[2] = {tile + lane / 4, tile + lane / 4 + 8};
  const Seen seen = seen_by(pack, tile);
  const Span span[2] = {span_at(i[0]), span_at(i[1])};
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
#pragma unroll 1
  for (int key = seen.first; key < seen.last; key += kTile) {
    float s[2][4], dp[2][4];
    times_rows<T, D>(s, q, keys, key);
    times_rows<T, D>(dp, g, values, key);
    const bool masked = !all_see(seen, key);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int half = e % 4 / 2;
      float& x = s[e / 4][e % 4];
      x = exp2_fast(x * a.scale_log2 - lse[half]) * (dp[e / 4][e % 4] - delta[half]);
      if (masked && !sees(span[half], key + e / 4 * 8 + 2 * quad + e % 2)) x = 0.0f;
    }
    uint32_t left[4];
    as_left<T>(left, s[0], s[1]);
    add_times<T, D>(dq, left, keys, key);
  }
  const float scale[2] = {a.scale, a.scale};
  store_rows<T, D>(static_cast<T*>(a.dq), dq, scale, head, a.heads, pack, tile);
}

// dK and dV of 16 key rows. Whom a row sees sees it, so spans serve the other way round.
template <typename T, int D>
HLIP_DEVICE void backward_keys(const BackwardArguments& a, const Pack& pack, int tile, Shared stats, Shared queries, Shared keys,
                               Shared values, Shared grads, int64_t head) {
  const int lane = lane_index(), quad = lane % 4, i[2] = {tile + lane / 4, tile + lane / 4 + 8};
  const Seen seen = seen_by(pack, tile);
  const Span span[2] = {span_at(i[0]), span_at(i[1])};
  uint32_t k[D / 16][4], v[D / 16][4];
  load_left_shared<T, D>(k, keys, tile);
  load_left_shared<T, D>(v, values, tile);
  float dk[D / 8][4], dv[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    clear(dk[n]);
    clear(dv[n]);
  }
#pragma unroll 1
  for (int query = seen.first; query < seen.last; query += kTile) {
    float p[2][4], ds[2][4];
    times_rows<T, D>(p, k, queries, query);
    times_rows<T, D>(ds, v, grads, query);
    const bool masked = !all_see(seen, query);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = query + 8 * n + 2 * quad;
      const float4 two = shared_load<float4>(stats + 8 * column);  // statistics of this query and the next
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool gone = masked && !sees(span[e / 2], column + e % 2);
        const float x = exp2_fast(p[n][e] * a.scale_log2 - (e % 2 ? two.z : two.x));
        p[n][e] = gone ? 0.0f : x;
        ds[n][e] = gone ? 0.0f : x * (ds[n][e] - (e % 2 ? two.w : two.y));
      }
    }
    uint32_t left[4];
    as_left<T>(left, p[0], p[1]);
    add_times<T, D>(dv, left, grads, query);
    as_left<T>(left, ds[0], ds[1]);
    add_times<T, D>(dk, left, queries, query);
  }
  const float scale[2] = {a.scale, a.scale}, one[2] = {1.0f, 1.0f};
  store_rows<T, D>(static_cast<T*>(a.dk), dk, scale, head, a.heads, pack, tile);
  store_rows<T, D>(static_cast<T*>(a.dv), dv, one, head, a.heads, pack, tile);
}

template <typename T, int D, int kWarps, int kBlocks>
HLIP_KERNEL(kWarps * 32, kBlocks) short_attention_backward(BackwardArguments a) {
  constexpr int kThreads = kWarps * 32;
  const int64_t index = block_index() / a.heads, head = block_index() % a.heads;
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
    start_rows<T, D, kThreads>(queries, a.q, head, pack);
    start_rows<T, D, kThreads>(keys, a.k, head, pack);
    start_rows<T, D, kThreads>(values, a.v, head, pack);
    start_rows<T, D, kThreads>(grads, a.grad_out, head, pack);
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
