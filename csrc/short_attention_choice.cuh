// From what is known at run time to an instantiation of the kernels of short_attention.cuh. Where it runs is the caller's:
// a stream (short_attention.cu) or the emulator (tests/emulator).
#pragma once

#include "short_attention.cuh"

namespace hlip {

constexpr int kForwardWarps = 4;
constexpr int kBackwardWarps = 4;

// Calls run(kernel, arguments, threads, bytes of shared memory); false if there is no kernel for that many keys.
template <typename T, int D, typename Run>
bool choose_forward(const ForwardArguments& a, const Extent& extent, Run run) {
  const int64_t bytes = short_forward_bytes(extent.rows, D);
  constexpr int kThreads = kForwardWarps * 32;
  if (extent.keys <= kShortKeys[0]) {
    run(short_attention_forward<T, D, kShortKeys[0], kForwardWarps>, a, kThreads, bytes);
  } else if (extent.keys <= kShortKeys[1]) {
    run(short_attention_forward<T, D, kShortKeys[1], kForwardWarps>, a, kThreads, bytes);
  } else if (extent.keys <= kShortKeys[2]) {
    run(short_attention_forward<T, D, kShortKeys[2], kForwardWarps>, a, kThreads, bytes);
  } else {
    return false;
  }
  return true;
}

template <typename T, int D, typename Run>
bool choose_backward(const BackwardArguments& a, const Extent& extent, Run run) {
  run(short_attention_backward<T, D, kBackwardWarps>, a, kBackwardWarps * 32, short_backward_bytes(extent.rows, D));
  return true;
}

}  // namespace hlip
