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

// The size of a launch: blocks for each head, rows of the largest pack, and the most keys that 16 neighbouring rows see, counted
// from a multiple of 16.
struct Extent {
  int64_t blocks, rows, keys;
};

// What there are kernels for: head dims, and how many keys (the forward kernels hold the logits of all in registers).
constexpr int kShortHeadDims[] = {32, 64, 80, 96, 128};
constexpr int kShortKeys[] = {144, 208, 272};

// Shared memory a block needs for packs of `rows` rows.
constexpr int64_t short_forward_bytes(int64_t rows, int64_t head_dim) { return (rows + 15) / 16 * 16 * (8 + 2 * 2 * head_dim); }
constexpr int64_t short_backward_bytes(int64_t rows, int64_t head_dim) { return (rows + 15) / 16 * 16 * (16 + 4 * 2 * head_dim); }

}  // namespace hlip
