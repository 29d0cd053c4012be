// From what is known at run time to an instantiation of the kernels of short_attention.cuh. Where it runs is the caller's:
// a stream (short_attention.cu) or the emulator (tests/emulator).
#pragma once

#include "short_attention.cuh"

namespace hlip {

// Warps of a block, and blocks that should fit a multiprocessor. Chosen so that at head dim 64 nothing spills on an sm_90, and
// that at 13 tiles of 16 rows (the published slice of 14 x 14 patches and its prefix rows) shared memory and registers run out
// together there. Registers come in steps: 8 resident warps may have 255 each, 12 have 168, 16 have 128. What becomes of the
// others is on record in tests/codegen/short_attention.csv.
constexpr int kForwardWarps = 4;

template <int D>
constexpr int forward_blocks(int keys) {
  if (keys <= kShortKeys[0]) return D == 64 ? 4 : (D >= 80 ? 2 : 3);
  return keys <= kShortKeys[1] && D <= 64 ? 3 : 2;
}

template <int D>
constexpr int kBackwardWarps = D <= 32 ? 4 : (D <= 64 ? 6 : 7);
template <int D>
constexpr int kBackwardBlocks = D <= 32 ? 4 : (D <= 64 ? 2 : 1);

// Calls run(kernel, arguments, threads, bytes of shared memory); false if there is no kernel for that many keys.
template <typename T, int D, typename Run>
bool choose_forward(const ForwardArguments& a, const Extent& extent, Run run) {
  const int64_t bytes = short_forward_bytes(extent.rows, D);
  constexpr int kThreads = kForwardWarps * 32;
  if (extent.keys <= kShortKeys[0]) {
    run(short_attention_forward<T, D, kShortKeys[0], kForwardWarps, forward_blocks<D>(kShortKeys[0])>, a, kThreads, bytes);
  } else if (extent.keys <= kShortKeys[1]) {
    run(short_attention_forward<T, D, kShortKeys[1], kForwardWarps, forward_blocks<D>(kShortKeys[1])>, a, kThreads, bytes);
  } else if (extent.keys <= kShortKeys[2]) {
    run(short_attention_forward<T, D, kShortKeys[2], kForwardWarps, forward_blocks<D>(kShortKeys[2])>, a, kThreads, bytes);
  } else {
    return false;
  }
  return true;
}

template <typename T, int D, typename Run>
bool choose_backward(const BackwardArguments& a, const Extent& extent, Run run) {
  const int64_t bytes = short_backward_bytes(extent.rows, D);
  run(short_attention_backward<T, D, kBackwardWarps<D>, kBackwardBlocks<D>>, a, kBackwardWarps<D> * 32, bytes);
  return true;
}

}  // namespace hlip
