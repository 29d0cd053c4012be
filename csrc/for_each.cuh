// Runs body(i) for every i in [0, n): one CUDA thread each, or a plain loop when the data is in host memory.
//
// The kernels of this folder are memory-bound and need no communication between threads, so a kernel is a functor that
// computes what thread i writes. The host loop runs the very same functor; the tests use it to check the device code on
// machines without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace hlip {

inline void check(cudaError_t status, const char* what, int64_t n, unsigned blocks, int threads) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("hlip: CUDA kernel ") + what + " failed: " + cudaGetErrorString(status) + " (" +
                           std::to_string(n) + " items, " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                           " threads)");
}

template <typename Body>
__global__ void __launch_bounds__(256) for_each_kernel(Body body, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) body(i);
}

template <typename Body>
void for_each(const char* what, Target target, int64_t n, Body body) {
  if (n <= 0) return;
  if (target.on_host) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  constexpr int kThreads = 256;
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string("hlip: ") + what + " has too many items for one launch: " + std::to_string(n));
  for_each_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(target.stream)>>>(body, n);
  check(cudaGetLastError(), what, n, static_cast<unsigned>(blocks), kThreads);
}

template <typename Body>
__global__ void __launch_bounds__(256) for_each_row_kernel(Body body, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row < rows) body(row, static_cast<int>(threadIdx.x % 32), 32);
}

// Runs body(row, lane, lanes) for every row in [0, rows): a warp each, whose lanes share the row's work and what is computed
// once for it. On the host one lane does it all.
template <typename Body>
void for_each_row(const char* what, Target target, int64_t rows, Body body) {
  if (rows <= 0) return;
  if (target.on_host) {
    for (int64_t row = 0; row < rows; ++row) body(row, 0, 1);
    return;
  }
  constexpr int kThreads = 256;
  const int64_t blocks = (rows + kThreads / 32 - 1) / (kThreads / 32);
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string("hlip: ") + what + " has too many rows for one launch: " + std::to_string(rows));
  for_each_row_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(target.stream)>>>(body, rows);
  check(cudaGetLastError(), what, rows, static_cast<unsigned>(blocks), kThreads);
}

}  // namespace hlip
