// Tiles of shared memory and of registers, and products between them, for the attention kernels of this folder.
//
// Names of register tiles follow mma.m16n8k16: thread t of a quad (4 threads) holds columns 2t and 2t + 1 of rows g and g + 8.
#pragma once

#include <cmath>

#include "../device/device.cuh"
#include "arguments.h"

namespace hlip {

constexpr int kTile = 16;           // rows a warp takes at a time, and keys of one step
constexpr float kLeast = 1e-37f;    // a scale so small that any logit times it is 0 to an exponential
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---------------------------------------------------------------- shared memory

template <int D>
constexpr int kTrading = D / 8 % 8 == 0 ? 8 : (D / 8 % 4 == 0 ? 4 : 2);  // neighbouring chunks that trade places

// Where 16-byte chunk `chunk` of row `row` lies in a tile of D columns. Chunks are exclusive-or'ed with bits of the row so
// that the 8 rows one matrix load touches lie in different banks.
template <int D>
HLIP_DEVICE Shared swizzled(int row, int chunk) {
  constexpr int kShift = kTrading<D> == 8 ? 0 : (kTrading<D> == 4 ? 1 : 2);
  return static_cast<Shared>(row * (2 * D) + ((chunk ^ ((row >> kShift) & (kTrading<D> - 1))) << 4));
}

// From the place of a chunk of a row to that of the one `chunks` further on, where adding their numbers carries no bit (any number
// from chunk 0, an even one from 1). Chunks trade places within groups, which lie on multiples of their size: so this changes
// address bits, and takes no register.
template <int D>
HLIP_DEVICE uint32_t chunks_on(uint32_t at, int chunks) {
  return (at ^ static_cast<uint32_t>(chunks % kTrading<D> << 4)) + chunks / kTrading<D> * kTrading<D> * 16;
}

// This lane's address (shared_address) for a matrix load of 16 rows by 2 chunks. Rows 8 or 16 further on, it is as many rows of 2 * D
// bytes further on: bits of the row beyond the third do not matter to where chunks lie. `across`: matrices go row half first (left operands, and
// right ones that are transposed), else chunk first (right operands as they are).
template <int D>
HLIP_DEVICE uint32_t matrix_place(Shared tile, int row, int chunk, bool across) {
  const int lane = lane_index(), matrix = lane / 8;
  const int half = across ? matrix % 2 : matrix / 2, side = across ? matrix / 2 : matrix % 2;
  return shared_address(tile) + swizzled<D>(row + 8 * half + lane % 8, chunk + side);
}

// Where the chunks beside a lane's matrix_place lie: worked out for each load, or once and kept in registers for many.
template <int D>
struct PlaceOf {
  uint32_t at;
  HLIP_DEVICE uint32_t operator()(int chunks) const { return chunks_on<D>(at, chunks); }
};

template <int D>
struct KeptPlaces {
  uint32_t at[kTrading<D> / 2];
  HLIP_DEVICE explicit KeptPlaces(uint32_t first) {
#pragma unroll
    for (int n = 0; n < kTrading<D> / 2; ++n) forget(at[n] = chunks_on<D>(first, 2 * n));
  }
  HLIP_DEVICE uint32_t operator()(int chunks) const { return at[chunks % kTrading<D> / 2] + chunks / kTrading<D> * kTrading<D> * 16; }
};

// ---------------------------------------------------------------- registers

HLIP_DEVICE void clear(float (&c)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) c[e] = 0.0f;
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

// Writes rows g and g + 8 of an accumulator, times `factor` each, to two places, 16 bytes a thread; a place may be null.
template <typename T, int kColumns>
HLIP_DEVICE void store_tile(T* const (&to)[2], const float (&c)[kColumns / 8][4], const float (&factor)[2]) {
  constexpr int kChunks = kColumns / 8;
  const int lane = lane_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
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
      if (to[half] != nullptr && chunk < kChunks) global_store(to[half] + chunk * 8, make_uint4(w[0], w[1], w[2], w[3]));
    }
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

// Two rows of a tensor, of each thread of a quad the same, as rows g and g + 8 of left operands: straight from device memory, 16 bytes a
// thread, and turned within quads.
template <typename T, int D>
HLIP_DEVICE void load_left(uint32_t (&a)[D / 16][4], const View& x, int64_t head, const int64_t (&rows)[2]) {
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* row = static_cast<const T*>(x.at) + head * x.head + rows[half] * x.row;
#pragma unroll
    for (int four = 0; four < (kChunks + 3) / 4; ++four) {
      const int chunk = 4 * four + lane_index() % 4;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (4 * four + 4 <= kChunks || chunk < kChunks) v = global_load<uint4>(row + chunk * 8);
      uint32_t w[4] = {v.x, v.y, v.z, v.w};
      transpose_quad(w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * four + j < kChunks) a[(4 * four + j) / 2][half + (4 * four + j) % 2 * 2] = w[j];
      }
    }
  }
}

template <int D>
HLIP_DEVICE void negate(uint32_t (&a)[D / 16][4]) {
#pragma unroll
  for (int e = 0; e < D / 4; ++e) a[e / 4][e % 4] ^= 0x80008000u;
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

// ---------------------------------------------------------------- products

// c (16 x 16) = a (16 x D) times the transpose of 16 rows of a tile: those `rows` after the ones of `at`, this lane's PlaceOf or
// KeptPlaces of matrix_place(..., 0, false).
template <typename T, int D, typename Places>
HLIP_DEVICE void times_rows(float (&c)[2][4], const uint32_t (&a)[D / 16][4], const Places& at, int rows = 0) {
  clear(c[0]);
  clear(c[1]);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    load_matrices(b, at(2 * k) + rows * 2 * D);
    multiply_add<T>(c[0], a[k], b[0], b[1]);
    multiply_add<T>(c[1], a[k], b[2], b[3]);
  }
}

// c (16 x D) += a (16 x 16) times 16 rows of a tile, likewise, with matrix_place(..., 0, true).
template <typename T, int D, typename Places>
HLIP_DEVICE void add_times(float (&c)[D / 8][4], const uint32_t (&a)[4], const Places& at, int rows = 0) {
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[4];
    load_matrices_transposed(b, at(2 * n) + rows * 2 * D);
    multiply_add<T>(c[2 * n], a, b[0], b[1]);
    multiply_add<T>(c[2 * n + 1], a, b[2], b[3]);
  }
}

}  // namespace hlip
