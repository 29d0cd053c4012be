// The GPU's side of device.cuh: wrappers over PTX, sm_80 and newer. The PTX ISA manual names every layout used here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../element.cuh"

#define HLIP_DEVICE __device__ __forceinline__
// Threads of a block, and how many blocks should fit a multiprocessor: what the compiler divides the registers by.
#define HLIP_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)

namespace hlip {

// Blocks and grids have one dimension.
HLIP_DEVICE int thread_index() { return threadIdx.x; }
HLIP_DEVICE int lane_index() { return threadIdx.x % 32; }
HLIP_DEVICE int warp_index() { return threadIdx.x / 32; }
// The same as thread_index(), read anew: the compiler keeps no register for it from one use to the next.
HLIP_DEVICE int thread_index_anew() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}
HLIP_DEVICE int64_t block_index() { return blockIdx.x; }
HLIP_DEVICE int64_t block_count() { return gridDim.x; }

// A place in the block's dynamic shared memory: bytes from its start.
using Shared = uint32_t;

extern __shared__ __align__(128) unsigned char shared_memory[];

HLIP_DEVICE uint32_t shared_address(Shared at) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + at; }

template <typename V>
HLIP_DEVICE V shared_load(Shared at) {
  return *reinterpret_cast<const V*>(shared_memory + at);
}

template <typename V>
HLIP_DEVICE void shared_store(Shared at, V value) {
  *reinterpret_cast<V*>(shared_memory + at) = value;
}

// Starts copying 16 bytes, past the first-level cache; zeros, and nothing is read, when not `really`.
HLIP_DEVICE void copy_async_16(Shared to, const void* from, bool really) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(really ? 16 : 0) : "memory");
}

// The same for 4 bytes, which take the first-level cache.
HLIP_DEVICE void copy_async_4(Shared to, const void* from, bool really) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(really ? 4 : 0) : "memory");
}

// Waits for this thread's copies. Other threads see them after a barrier.
HLIP_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

HLIP_DEVICE void block_sync() { __syncthreads(); }
HLIP_DEVICE bool block_any(bool condition) { return __syncthreads_or(condition); }
HLIP_DEVICE void warp_sync() { __syncwarp(); }

// What a kernel reads from device memory is never written while it runs: the read-only path is safe.
template <typename V>
HLIP_DEVICE V global_load(const void* from) {
  return __ldg(static_cast<const V*>(from));
}

template <typename V>
HLIP_DEVICE void global_store(void* to, V value) {
  *static_cast<V*>(to) = value;
}

template <typename V>
HLIP_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// What all lanes of a warp have alike, told to the compiler: it decides by it without a way back for lanes that went elsewhere.
HLIP_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

HLIP_DEVICE bool warp_any(bool condition) { return __any_sync(0xffffffffu, condition); }

// Four 8 x 8 matrices of 2-byte elements. Lane l gives the address (shared_address) of row l % 8 of matrix l / 8 and gets elements
// 2 * (l % 4) and the next of row l / 4 of each.
HLIP_DEVICE void load_matrices(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// The same, each matrix transposed on the way.
HLIP_DEVICE void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8).
template <typename T>
HLIP_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
HLIP_DEVICE void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
HLIP_DEVICE void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What the compiler knows of x it forgets: it makes comparisons anew instead of keeping their results in registers.
template <typename V>
HLIP_DEVICE void forget(V& x) {
  asm volatile("" : "+r"(x));
}

HLIP_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

HLIP_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

HLIP_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two elements in one register, the first in the low half. (CUDA's own functions return a struct of two 16-bit halves, which the
// compiler may keep in two registers.)
template <typename T>
HLIP_DEVICE uint32_t pack2(float low, float high);

template <>
HLIP_DEVICE uint32_t pack2<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
HLIP_DEVICE uint32_t pack2<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <typename T>
HLIP_DEVICE float2 unpack2(uint32_t pair);

template <>
HLIP_DEVICE float2 unpack2<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <>
HLIP_DEVICE float2 unpack2<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

}  // namespace hlip
