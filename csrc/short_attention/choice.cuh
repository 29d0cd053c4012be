// From what is known at run time to an instantiation of the kernels of this folder. Where it runs is the caller's: a stream
// (launch.cu) or the emulator (tests/emulator).
#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "whole_backward.cuh"
#include "whole_forward.cuh"

namespace hlip {

// Warps of a block, and blocks that should fit a multiprocessor. Chosen so that at head dim 64 nothing spills on an sm_90, and
// that at 13 tiles of 16 rows (the published slice of 14 x 14 patches and its prefix rows) shared memory and registers run out
// together there. Registers come in steps: 8 resident warps may have 255 each, 12 have 168, 16 have 128. What becomes of the
// others is on record in tests/codegen/short_attention.csv.
constexpr int kForwardWarps = 4;
template <int D>
constexpr int kForwardBlocks = D <= 80 ? 4 : 3;
template <int D>
constexpr int kWholeForwardBlocks = D <= 32 ? 4 : (D <= 64 ? 3 : 2);

template <int D>
constexpr int kBackwardWarps = D <= 32 ? 4 : (D <= 64 ? 6 : 7);
template <int D>
constexpr int kBackwardBlocks = D <= 32 ? 4 : (D <= 64 ? 2 : 1);

// A launch: `items` pieces of work, a block each, or, of blocks that take one after the other, `resident` a multiprocessor.
struct Launch {
  const char* kernel;  // its name, for errors
  int64_t items;
  int threads;
  int64_t bytes;  // of shared memory
  int resident;   // 0: a block each
};

// Packs of one segment each to whole_forward.cuh, and all others to forward.cuh: calls run(kernel, arguments, launch) for those there
// are.
template <typename T, int D, typename Run>
bool choose_forward(ForwardArguments a, const Extent& extent, Run run) {
  constexpr int kThreads = kForwardWarps * 32;
  if (extent.alone > 0) {
    const Launch launch{"short_attention_whole_forward", extent.alone * a.heads, kThreads, whole_forward_bytes(extent.rows, D), 0};
    run(short_attention_whole_forward<T, D, kForwardWarps, kWholeForwardBlocks<D>>, a, launch);
    a.tables.packs += 4 * extent.alone;
  }
  if (extent.packs > extent.alone) {
    const int64_t rows = extent.rows < kPackRows ? extent.rows : kPackRows, items = (extent.packs - extent.alone) * a.heads;
    const Launch launch{"short_attention_forward", items, kThreads, short_forward_bytes(rows, D), 0};
    run(short_attention_forward<T, D, kForwardWarps, kForwardBlocks<D>>, a, launch);
  }
  return true;
}

// Packs of one segment each to whole_backward.cuh; false if it has no kernel for them, or there are none.
template <typename T, int D, typename Run>
bool choose_whole_backward(BackwardArguments a, const Stretch& packs, int64_t shared, Run run) {
  if constexpr (D == kWholeHeadDims[0] || D == kWholeHeadDims[1]) {
    constexpr int kSmallBlocks = D <= 32 ? 3 : 2;
    const WholeLaunch whole = whole_launch(packs.rows, D, shared);
    if (whole.blocks == 0 || packs.last <= packs.first) return false;
    a.tables.packs += 4 * packs.first;
    const int64_t items = (packs.last - packs.first) * a.heads;
    const WholeArguments arguments{a, static_cast<int>(items), static_cast<int>(short_padded(packs.rows)), whole.keys == 2};
    const Launch launch{"short_attention_whole_backward", items, whole.warps * 32, whole.bytes, whole.blocks};
    if (whole.warps == 4) {
      run(short_attention_whole_backward<T, D, 4, 32, kSmallBlocks>, arguments, launch);
    } else if (whole.step == 32) {
      run(short_attention_whole_backward<T, D, 8, 32, 1>, arguments, launch);
    } else {
      run(short_attention_whole_backward<T, D, 8, 64, 1>, arguments, launch);
    }
    return true;
  }
  return false;
}

// Two stretches of packs to whole_backward.cuh, where it has a kernel for them, and all others to backward.cuh: run() is called once
// for each run of packs that has the same kernel.
template <typename T, int D, typename Run>
bool choose_backward(const BackwardArguments& a, const Extent& extent, Run run) {
  int64_t waiting = 0;  // the first pack that no kernel was called for
  const auto others = [&](int64_t last) {
    if (last == waiting) return;
    BackwardArguments b = a;
    b.tables.packs += 4 * waiting;
    const bool small = extent.large.last > 0 && waiting >= extent.large.last;  // larger ones come first
    const int64_t rows = small ? kWholeRows[0] : extent.rows;
    const int64_t items = (last - waiting) * a.heads;
    const Launch launch{"short_attention_backward", items, kBackwardWarps<D> * 32, short_backward_bytes(rows, D), 0};
    run(short_attention_backward<T, D, kBackwardWarps<D>, kBackwardBlocks<D>>, b, launch);
    waiting = last;
  };
  for (const Stretch& packs : {extent.large, extent.small}) {
    const auto after_others = [&](auto kernel, const auto& arguments, const Launch& launch) {
      others(packs.first);
      run(kernel, arguments, launch);
    };
    if (choose_whole_backward<T, D>(a, packs, extent.shared, after_others)) waiting = packs.last;
  }
  others(extent.packs);
  return true;
}

}  // namespace hlip
