// Attention over short segments: what a call hands over, and what there are kernels for. Nothing here knows CUDA.
#pragma once

#include <cstdint>

namespace hlip {

// A (R, H, D) tensor whose rows of D elements are contiguous and lie on 16 bytes; strides in elements.
struct View {
  const void* at;
  int64_t row, head;
};

// Which rows belong together; see hlip_kernels/packs.py, which makes these int32 tables.
//   records (N, 8): query patches (start, count), query prefixes (start, count), the same of the keys.
//   packs (blocks, 4): first record, records, first row inside the record, rows. A pack with several records holds them whole.
//   starts (N): where in its pack a record starts.
struct Tables {
  const int *packs, *starts, *records;
};

struct ForwardArguments {
  View q, k, v;
  void* out;   // (R, H, D) contiguous
  float* lse;  // (H, R) contiguous
  Tables tables;
  int64_t heads, num_rows;
  float scale_log2;  // of the logits, times log2(e)
};

struct BackwardArguments {
  View q, k, v, out, grad_out;
  const float *lse, *grad_lse;  // grad_lse may be null
  int64_t grad_lse_head, grad_lse_row;
  void *dq, *dk, *dv;  // (R, H, D) contiguous
  Tables tables;
  int64_t heads, num_rows;
  float scale, scale_log2;
};

// Packs [first, last) of one segment each, the largest of `rows` rows.
struct Stretch {
  int64_t first, last, rows;
};

// The size of a launch: packs, how many of them (the first) hold one segment alone, rows of the largest; the others have up to
// kPackRows. For backward also `shared`, the bytes of shared memory a block may have, and which packs whole_backward.cuh is to take:
// of more than 128 rows, and of up to 128 (after those).
struct Extent {
  int64_t packs, alone, rows, shared;
  Stretch large, small;
};

constexpr int kPackRows = 128;

// What there are kernels for.
constexpr int kShortHeadDims[] = {32, 64, 80, 96, 128};
// Head dims, and rows, that whole_backward.cuh has kernels for: of 4 and of 8 warps, which keep 32 rows each.
constexpr int kWholeHeadDims[] = {32, 64};
constexpr int kWholeRows[] = {128, 256};

constexpr int64_t short_padded(int64_t rows) { return (rows + 15) / 16 * 16; }

// Shared memory a block needs for packs of `rows` rows; in whole_forward.cuh, with the segment's own record.
constexpr int64_t short_forward_bytes(int64_t rows, int64_t head_dim) { return short_padded(rows) * (8 + 2 * 2 * head_dim); }
constexpr int64_t whole_forward_bytes(int64_t rows, int64_t head_dim) { return 4 * 32 + short_padded(rows) * 2 * 2 * head_dim; }
constexpr int64_t short_backward_bytes(int64_t rows, int64_t head_dim) { return short_padded(rows) * (16 + 4 * 2 * head_dim); }

// The same for whole_backward.cuh: with `step` queries between barriers, and room for the keys of one segment or of two.
constexpr int64_t whole_backward_bytes(int64_t rows, int64_t head_dim, int step, int keys) {
  return 4 * 32 + short_padded(rows) * (2 * 8 + 2 * 2 * step + (4 + keys) * 2 * head_dim);
}

// How whole_backward.cuh runs: warps of a block, queries of a step, segments there is room for the keys of, bytes of shared memory,
// and blocks a multiprocessor holds. No blocks: it should not, or cannot, run.
struct WholeLaunch {
  int warps, step, keys, blocks;
  int64_t bytes;
};

// The launch for segments of up to `rows` rows, on a card whose blocks may have `shared` bytes: the first of these that leaves room
// for 8 warps. (The system keeps 1 KB of each block, and one KB of a multiprocessor is nobody's.)
constexpr WholeLaunch whole_launch(int64_t rows, int64_t head_dim, int64_t shared) {
  constexpr WholeLaunch kLarge[] = {{8, 64, 2, 1, 0}, {8, 32, 2, 1, 0}, {8, 32, 1, 1, 0}, {}};
  constexpr WholeLaunch kSmall64[] = {{4, 32, 2, 2, 0}, {4, 32, 1, 2, 0}, {}, {}};
  constexpr WholeLaunch kSmall32[] = {{4, 32, 2, 3, 0}, {4, 32, 1, 3, 0}, {4, 32, 2, 2, 0}, {4, 32, 1, 2, 0}};
  if ((head_dim != kWholeHeadDims[0] && head_dim != kWholeHeadDims[1]) || rows > kWholeRows[1]) return {};
  const WholeLaunch* choices = rows > kWholeRows[0] ? kLarge : (head_dim == 64 ? kSmall64 : kSmall32);
  for (int i = 0; i < 4; ++i) {
    WholeLaunch launch = choices[i];
    if (launch.blocks == 0) break;
    launch.bytes = whole_backward_bytes(rows, head_dim, launch.step, launch.keys);
    if (launch.blocks * (launch.bytes + 1024) <= shared + 1024) return launch;
  }
  return {};
}

}  // namespace hlip
